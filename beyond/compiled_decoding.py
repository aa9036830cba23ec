"""Decoding, compiled: the step of one token in C++ that `torch.compile` generates.

Products are written as a multiplication and a sum. The compiler turns that into one loop, which
reads the weights once and converts bfloat16 and int8 in registers. All that happens between two
products of a layer becomes a few loops too. One layer is compiled, for caches of any length, and
called for each layer with its own weights, so the work does not grow with the number of layers.
The compiler keeps its results on disk, so that later runs start faster.
"""

import os
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from beyond.decoding import DecodingLayer, DecodingLlama, KVCache, Projection
from beyond.kernels import cache_folder
from beyond.runtime import is_compiler_error
from config import LlamaConfig

Matrix = tuple[Tensor, Tensor | None]  # (out, in), and the factors of int8 rows, (out,)


def product(matrix: Matrix, x: Tensor) -> Tensor:
    """Compute W x for x (in,), float32: (out,), float32."""
    weight, scales = matrix
    result = (weight.float() * x).sum(dim=-1)
    return result if scales is None else result * scales.float()


def inverse_norm(x: Tensor, config: LlamaConfig) -> Tensor:
    """Compute the factor of RMSNorm, divided by sqrt(dim), for one vector x (dim,)."""
    return torch.rsqrt(x.square().sum() + config.dim * config.layer_norm_eps)


def compute_layer(
    h: Tensor, rotation: Tensor, past: Tensor, matrices: list[Matrix], config: LlamaConfig
) -> tuple[Tensor, Tensor]:
    """Compute `DecodingLayer.step`, but change no argument.

    Args:
        h: (dim,), float32.
        rotation: (head_dim / 2, 2), cosine and sine.
        past: (2, n_kv_heads, positions, head_dim), keys and values of the earlier positions.
        matrices: in the order of `DecodingLayer.projections`.
        config: of the model.

    Returns:
        h: (dim,), float32.
        key_value: (2, n_kv_heads, head_dim), of the new position.
    """
    query_key_value, output, gate_up, down = matrices
    n_kv_heads, head_dim = config.n_kv_heads, config.head_dim
    num_rotated = config.n_heads + n_kv_heads
    # The factor of the norm is the same for all elements, so it can follow the product.
    heads = (product(query_key_value, h) * inverse_norm(h, config)).view(-1, head_dim)
    even, odd = heads[:num_rotated].unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    query = rotated[: config.n_heads].view(n_kv_heads, config.n_rep, 1, head_dim)
    key, value = rotated[config.n_heads :], heads[num_rotated:]  # (n_kv_heads, head_dim)
    keys, values = past.float()[:, :, None]  # (n_kv_heads, 1, positions, head_dim)
    scores = (query * keys).sum(dim=-1)  # (n_kv_heads, n_rep, positions)
    own_score = (query[:, :, 0] * key[:, None]).sum(dim=-1, keepdim=True)
    weights = torch.cat((scores, own_score), dim=-1).softmax(dim=-1)
    attended = (weights[:, :, :-1, None] * values).sum(dim=2)  # (n_kv_heads, n_rep, head_dim)
    attended = attended + weights[:, :, -1:] * value[:, None]
    h = h + product(output, attended.flatten())
    gate, up = (product(gate_up, h) * inverse_norm(h, config)).chunk(2)
    h = h + product(down, F.silu(gate) * up)
    return h, torch.stack((key, value))


class CompiledStep:
    """The compiled functions of a model, and its matrices as they take them.

    The model's matrices are stored row by row from now on.
    """

    def __init__(self, model: DecodingLlama) -> None:
        self.config = model.config
        self.dtype = model.dtype
        self.rotations = torch.view_as_real(model.rotations)[:, 0]  # (max_seq_len, head_dim / 2, 2)
        self.layers = [as_matrices(layer) for layer in model.decoding_layers]
        self.head = as_matrix(model.output.projection, model.config.dim)  # type: ignore[arg-type]
        self.compute_layer = torch.compile(compute_layer)
        self.product = torch.compile(product)

    def compute_hidden(self, h: Tensor, caches: Sequence[KVCache]) -> Tensor:
        """Compute the layers for the next position of one row, at h (dim,); returns h."""
        rotation = self.rotations[caches[0].length]
        for matrices, cache in zip(self.layers, caches, strict=True):
            past = cache.row.narrow(2, 0, cache.length)
            torch._dynamo.mark_dynamic(past, 2)
            h, key_value = self.compute_layer(h, rotation, past, matrices, self.config)
            cache.append(key_value)
        return h

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Compute logits (vocab,), float32, of hidden (dim,), float32."""
        return self.product(self.head, hidden)


def as_matrix(projection: Projection, size: int) -> Matrix:
    """Return the weights of a product, row by row and without padding, and their factors."""
    projection.store_rows()
    return projection.weight[:, :size], projection.scales


def as_matrices(layer: DecodingLayer) -> list[Matrix]:
    """Return the four matrices of a layer."""
    dim, hidden_dim = layer.config.dim, layer.config.hidden_dim
    sizes = (dim, dim, dim, hidden_dim)
    return [as_matrix(p, size) for p, size in zip(layer.projections(), sizes, strict=True)]


def compile_for_decoding(model: DecodingLlama, note: Callable[[str], None]) -> None:
    """Compile the step of one token, and print what that costs and gains.

    Without a C++ compiler the model stays as it is.

    Args:
        model: on the CPU.
        note: called with one line.
    """
    keep_results_on_disk()
    eager = seconds_per_token(model)
    start = time.perf_counter()
    try:
        use(model, CompiledStep(model))
        seconds_per_token(model)
    except Exception as error:
        if not is_compiler_error(error):
            raise
        use(model, None)
        reason = str(error).partition("\n")[0]
        note(f"--compile: decodes without it, since PyTorch finds no C++ compiler: {reason}")
        return
    cost = time.perf_counter() - start
    compiled = seconds_per_token(model)
    change = f"{compiled * 1e3:.2f} ms a token instead of {eager * 1e3:.2f} ms"
    gain = (
        f"pays off after {cost / (eager - compiled):.0f} tokens" if compiled < eager else "no gain"
    )
    note(f"compiled in {cost:.1f} s: {change}, {gain}")


def use(model: DecodingLlama, compiled: CompiledStep | None) -> None:
    """Let a model compute single tokens with its compiled step, or without one."""
    model.compiled = compiled
    model.output.compute_logits = compiled and compiled.compute_logits  # type: ignore[assignment]


def keep_results_on_disk() -> None:
    """Let the compiler keep its results in the user's cache folder, if that can be written."""
    try:
        folder = cache_folder() / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return  # then they are kept in the folder for temporary files
    if os.access(folder, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


@torch.no_grad()
def seconds_per_token(model: DecodingLlama, steps: int = 9, context: int = 4) -> float:
    """Measure the median time of one token after a short context."""
    context = min(context, model.config.max_seq_len - 1)
    steps = min(steps, model.config.max_seq_len - context)
    caches = model.new_caches(context + steps)
    tokens = torch.zeros(1, context, dtype=torch.int64)
    model.compute_hidden(tokens, caches)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        hidden = model.compute_hidden(tokens[:, :1], caches)
        model.output(hidden[:, -1]).argmax()
        seconds.append(time.perf_counter() - start)
    return median(seconds)
