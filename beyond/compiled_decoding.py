"""Decoding, compiled: the step of one token in C++ that PyTorch's compiler generates.

Products are written as a multiplication and a sum. The compiler turns that into one loop, which
reads the weights once and converts bfloat16 and int8 in registers. All that happens between two
products of a layer becomes a few loops too. One layer is compiled, for caches of any length, and
called for each layer with its own weights, so the work does not grow with the number of layers.
The result is kept on disk, so that later runs start faster.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond.ahead_of_time import Arguments, DynamicSize, compile_ahead
from beyond.decoding import DecodingLayer, DecodingLlama, Projection
from beyond.kernels import Rows
from beyond.kv_cache import KVCache
from beyond.runtime import is_compiler_error
from config import LlamaConfig

Matrix = list[Tensor]  # (out, in), and for int8 the factors of its rows, (out,)


def product(matrix: Matrix, x: Tensor) -> Tensor:
    """Compute W x for x (in,), float32: (out,), float32."""
    weight, *scales = matrix
    result = (weight.float() * x).sum(dim=-1)
    return result * scales[0].float() if scales else result


def inverse_norm(x: Tensor, config: LlamaConfig) -> Tensor:
    """Compute the factor of RMSNorm, divided by sqrt(dim), for one vector x (dim,)."""
    return torch.rsqrt(x.square().sum() + config.dim * config.layer_norm_eps)


class LayerStep(nn.Module):
    """`DecodingLayer.step`, but it returns the new h.

    Args:
        config: of the model.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        h: Tensor,
        rotation: Tensor,
        past: Tensor,
        slot: Tensor,
        query_key_value: Matrix,
        output: Matrix,
        gate_up: Matrix,
        down: Matrix,
    ) -> Tensor:
        """Compute a layer for the next position of one row.

        Args:
            h: (dim,), float32.
            rotation: (head_dim / 2, 2), cosine and sine.
            past: (2, n_kv_heads, positions, head_dim), keys and values of the earlier positions.
            slot: (2, n_kv_heads, head_dim), where those of the new position are written.
            query_key_value, output, gate_up, down: the matrices of the layer.

        Returns:
            h: (dim,), float32.
        """
        config = self.config
        n_kv_heads, head_dim = config.n_kv_heads, config.head_dim
        num_rotated = config.n_heads + n_kv_heads
        # The factor of the norm is the same for all elements, so it can follow the product.
        heads = (product(query_key_value, h) * inverse_norm(h, config)).view(-1, head_dim)
        even, odd = heads[:num_rotated].unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rotation.unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
        query = rotated[: config.n_heads].view(n_kv_heads, config.n_rep, 1, head_dim)
        key, value = rotated[config.n_heads :], heads[num_rotated:]  # (n_kv_heads, head_dim)
        slot.copy_(torch.stack((key, value)))
        keys, values = past[:, :, None]  # (n_kv_heads, 1, positions, head_dim)
        scores = (query * keys).sum(dim=-1)  # (n_kv_heads, n_rep, positions)
        own_score = (query[:, :, 0] * key[:, None]).sum(dim=-1, keepdim=True)
        weights = torch.cat((scores, own_score), dim=-1).softmax(dim=-1)
        attended = (weights[:, :, :-1, None] * values).sum(dim=2)  # (n_kv_heads, n_rep, head_dim)
        attended = attended + weights[:, :, -1:] * value[:, None]
        h = h + product(output, attended.flatten())
        gate, up = (product(gate_up, h) * inverse_norm(h, config)).chunk(2)
        return h + product(down, F.silu(gate) * up)


class HeadStep(nn.Module):
    """The final norm and the output projection, as in `DecodingHead`.

    Args:
        config: of the model.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, matrix: Matrix, h: Tensor) -> Tensor:
        """Compute logits (vocab,), float32, of h (dim,), float32."""
        return product(matrix, h) * inverse_norm(h, self.config)


class CompiledStep:
    """The compiled functions of a model.

    Args:
        model: on the CPU, with all matrices stored row by row.

    Raises:
        ValueError: a matrix is stored otherwise.
        Exception: as in `compile_ahead`.
    """

    def __init__(self, model: DecodingLlama) -> None:
        config = self.config = model.config
        self.rotations = torch.view_as_real(model.rotations)[:, 0]  # (max_seq_len, head_dim / 2, 2)
        layers = [as_matrices(layer) for layer in model.decoding_layers]
        head = as_matrix(model.output.projection, config.dim)  # type: ignore[arg-type]
        self.layers = [[x for matrix in matrices for x in matrix] for matrices in layers]
        self.head = head
        # The generated code is for caches of this capacity, at most capacity - 1 of it in use.
        self.capacity = max(config.max_seq_len, 4)
        shape = (2, config.n_kv_heads, self.capacity, config.head_dim)
        past = torch.empty(shape)[:, :, : self.capacity // 2]
        slot = torch.empty(shape)[:, :, 0]  # of another cache: what is traced must not overlap
        h = torch.empty(config.dim)
        key = f"{config} {Path(__file__).read_text(encoding='utf-8')}"
        layer_example: Arguments = (h, self.rotations[0], past, slot, *layers[0])
        sizes = DynamicSize(argument=2, dim=2, largest=self.capacity - 1)
        self.compute_layer = compile_ahead(LayerStep(config), layer_example, key, sizes)
        self.compute_head = compile_ahead(HeadStep(config), (head, h), key)

    def compute_hidden(self, h: Tensor, caches: Sequence[KVCache]) -> Tensor:
        """Compute the layers for the next position of one row, at h (dim,); returns h.

        Raises:
            ValueError: the caches were not made by the model's `new_caches`.
        """
        if caches[0].capacity != self.capacity:
            raise ValueError(
                f"the compiled step takes caches for {self.capacity} positions, "
                f"not for {caches[0].capacity}"
            )
        rotation = self.rotations[caches[0].length]
        for matrices, cache in zip(self.layers, caches, strict=True):
            past = cache.row.narrow(2, 0, cache.length)
            slot = cache.row.select(2, cache.add_position())
            [h] = self.compute_layer([h, rotation, past, slot, *matrices])
        return h

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Compute logits (vocab,), float32, of hidden (dim,), float32, before the final norm."""
        [logits] = self.compute_head([*self.head, hidden])
        return logits


def as_matrix(projection: Projection, size: int) -> Matrix:
    """Return the weights of a product, without padding, and the factors of their rows."""
    if type(projection.storage) is not Rows:
        raise ValueError("the compiled step reads matrices that are stored row by row")
    weight, scales = projection.weight[:, :size], projection.scales
    return [weight] if scales is None else [weight, scales]


def as_matrices(layer: DecodingLayer) -> list[Matrix]:
    """Return the four matrices of a layer."""
    dim, hidden_dim = layer.config.dim, layer.config.hidden_dim
    sizes = (dim, dim, dim, hidden_dim)
    return [as_matrix(p, size) for p, size in zip(layer.projections(), sizes, strict=True)]


def compile_for_decoding(model: DecodingLlama, eager: float, note: Callable[[str], None]) -> bool:
    """Compile the step of one token, and print what that costs and gains.

    Args:
        model: as in `CompiledStep`.
        eager: seconds of a token without compilation.
        note: called with one line.

    Returns:
        Whether that worked; False without a C++ compiler. The model has its old step then.
    """
    start = time.perf_counter()
    try:
        step = CompiledStep(model)
    except Exception as error:
        if not is_compiler_error(error):
            raise
        reason = str(error).partition("\n")[0]
        note(f"--compile: decodes without it, since PyTorch finds no C++ compiler: {reason}")
        return False
    model.use_step(step)
    seconds_per_token(model)  # the first call takes longer
    cost = time.perf_counter() - start
    compiled = seconds_per_token(model)
    change = f"{compiled * 1e3:.2f} ms a token instead of {eager * 1e3:.2f} ms"
    gain = (
        f"pays off after {cost / (eager - compiled):.0f} tokens" if compiled < eager else "no gain"
    )
    note(f"compiled in {cost:.1f} s: {change}, {gain}")
    return True


@torch.no_grad()
def seconds_per_token(model: DecodingLlama, steps: int = 9, context: int = 4) -> float:
    """Measure the median time of one token after a short context; max_seq_len is 2 or more."""
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
