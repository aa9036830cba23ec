"""Decoding: a causal model prepared to generate fast, and sampling filters.

`prepare_for_decoding` makes a model that computes the same function as `Llama` in fewer and faster
operations. Decoding one token at a time multiplies every weight by one vector, so its speed is
limited by reading the weights from memory, and by the overhead of the operations around that.
Zero-shot scores, computed from whole sentences, become faster in the same way. The prepared
model differs from `llama.py` in:
- keys and values of earlier positions are cached, so for a new token only one position is computed;
- query, key and value are one matrix product, and so are the gate and up projections;
- RMSNorm's gains, and the factor sqrt(dim) that `normalise` leaves out, are multiplied into the
  weights that follow;
- query and key are rotated together, as complex numbers (RoFormer, arXiv:2104.09864, eq. 13);
- weights are stored as the fastest matrix-vector product of the machine wants them (`kernels.py`),
  in float32, in bfloat16, or as int8 with a scale for each row; int8 rounds the weights only, the
  activations are bfloat16;
- one token of one row is computed in place and in few operations: in float32 by NumPy
  (`numpy_step.py`), in bfloat16 and int8 by PyTorch (`DecodingLayer.step`). Or the step is compiled
  (`compiled_decoding.py`).

Causal models only: without a mask every new token changes the results at all other positions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond.kernels import DEFAULTS, Choice, store
from beyond.kv_cache import KVCache
from beyond.numpy_step import NumpyStep
from beyond.runtime import has_bfloat16
from config import LlamaConfig
from llama import (
    Llama,
    LlamaLayer,
    check_context,
    sample_next_token,
    select,
    token_probabilities,
)
from rope import rotary_tables


def left_padding_mask(padding: Tensor, seq: int) -> Tensor:
    """Return which positions attend to which, in causal rows that are padded on the left.

    Args:
        padding: (batch,), the number of padding columns of each row.
        seq: columns.

    Returns:
        (batch, 1, seq, seq), bool. A padding column attends to itself, since softmax needs at least
        one key.
    """
    columns = torch.arange(seq, device=padding.device)
    causal = columns <= columns[:, None]  # (seq, seq)
    real = columns >= padding[:, None, None]  # (batch, 1, seq)
    return ((causal & real) | (columns == columns[:, None]))[:, None]


def last_row_mask(padding: Tensor, seq: int) -> Tensor:
    """Return the last row of `left_padding_mask`: (batch, 1, 1, seq)."""
    return (torch.arange(seq, device=padding.device) >= padding[:, None])[:, None, None]


# ----------------------------------------------------------------------------- the prepared model


class Projection:
    """The matrix product x W^T, with the weights W (out, in) stored so that they are read fast.

    Args:
        weight: (out, in), float32.
        dtype: of inputs, outputs, and, unless quantized, of the stored weights.
        quantize: whether to store int8: each row is divided by 1/127 of its largest magnitude and
            rounded.
        choice: the storage of each shape; the default for shapes that are not in it.

    Attributes:
        weight: (out, in), as stored; int8 weights have further columns of zeros.
        scales: (out,), the factor of each int8 row; else None.
        error: largest absolute difference between a weight and its stored value.
    """

    def __init__(
        self, weight: Tensor, dtype: torch.dtype, quantize: bool, choice: Choice | None = None
    ) -> None:
        self.dtype = dtype
        self.scales: Tensor | None = None
        shape = (weight.shape[0], weight.shape[1])
        if quantize:
            # The scales are rounded to their stored dtype before the weights are divided by them.
            scales = (weight.abs().amax(dim=1).clamp(min=1e-12) / 127).to(dtype)  # (out,)
            rounded = (weight / scales.float()[:, None]).round().clamp(-127, 127)
            error = rounded * scales.float()[:, None] - weight
            # The kernel reads 16 columns at a time, also beyond the last one.
            self.padding = -shape[1] % 16
            self.storage = store("rows", F.pad(rounded.char(), (0, self.padding)))
            self.scales = scales
        else:
            default = DEFAULTS[dtype] if weight.device.type == "cpu" else "rows"
            self.storage = store((choice or {}).get(shape, default), weight.to(dtype))
            error = self.weight.float() - weight
        self.error = error.abs().max().item()
        # Without units for bfloat16, reading such weights is fast but matrix products of them are
        # very slow: products with several rows are computed in float32.
        self.is_emulated = dtype == torch.bfloat16 and not has_bfloat16(weight.device)
        self.out = torch.empty(shape[0], dtype=dtype, device=weight.device)
        # A vector to multiply, in the dtype and with the columns of the stored weights.
        padded = shape[1] + (self.padding if quantize else 0)
        self.vector = torch.zeros(1, padded, dtype=dtype, device=weight.device)
        self.flat = self.vector[0, : shape[1]]

    @property
    def weight(self) -> Tensor:
        return self.storage.matrix

    def __call__(self, x: Tensor) -> Tensor:
        """Map x (n, in) to (n, out)."""
        if self.scales is not None:
            x = F.pad(x, (0, self.padding)) if self.padding else x
            return torch._weight_int8pack_mm(x, self.weight, self.scales)
        if len(x) == 1 and self.dtype == torch.bfloat16:
            out = x.new_empty(1, len(self.out))
            self.storage.multiply_vector(x[0], out[0])
            return out
        if self.is_emulated:
            return F.linear(x.float(), self.weight.float()).to(x.dtype)
        return self.storage.multiply(x)

    def scaled(self, x: Tensor, scale: float, out: Tensor) -> None:
        """Compute out = scale W x for one vector x (in,); x and out (out,) are float32."""
        torch.mul(x, scale, out=self.flat)
        out.copy_(self.multiply_vector())

    def add_to(self, h: Tensor, x: Tensor) -> None:
        """Add W x to h (out,) in place, for one vector x (in,); both are float32."""
        self.flat.copy_(x)
        h.add_(self.multiply_vector())

    def multiply_vector(self) -> Tensor:
        """Multiply `self.vector`; the result (out,) may be overwritten by the next call."""
        if self.scales is not None:
            return torch._weight_int8pack_mm(self.vector, self.storage.stored, self.scales).view(-1)
        self.storage.multiply_vector(self.flat, self.out)
        return self.out


class Workspace:
    """Memory of a step, which all layers use one after the other; all of it is float32.

    Attributes:
        heads: (n_heads + 2 n_kv_heads) head_dim, query, key and value of the new position.
        pairs: the query's and the key's pairs of features, as complex numbers, in `heads`.
        query, key_value: parts of `heads`, by heads.
        gate_up: (2 hidden_dim,); gate, up: its halves.
    """

    def __init__(self, config: LlamaConfig) -> None:
        num_heads = config.n_heads + 2 * config.n_kv_heads
        self.heads = torch.empty(num_heads * config.head_dim)
        heads = self.heads.view(num_heads, config.head_dim)
        rotated = heads[: config.n_heads + config.n_kv_heads]
        self.pairs = torch.view_as_complex(rotated.unflatten(-1, (-1, 2)))
        self.query = heads[: config.n_heads].view(config.n_kv_heads, config.n_rep, -1)
        self.key_value = heads[config.n_heads :].view(2, config.n_kv_heads, -1)
        self.gate_up = torch.empty(2 * config.hidden_dim)
        self.gate, self.up = self.gate_up.chunk(2)


class DecodingLayer:
    """A `LlamaLayer` with four matrices instead of seven.

    Args:
        layer: its weights are taken.
        config: of the model.
        dtype, quantize, choice: as in `Projection`.
    """

    def __init__(
        self,
        layer: LlamaLayer,
        config: LlamaConfig,
        dtype: torch.dtype,
        quantize: bool,
        choice: Choice | None,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.num_rotated = config.n_heads + config.n_kv_heads
        attention, feed_forward = layer.attention, layer.feed_forward
        sqrt_dim = config.dim**0.5
        query_key_value = torch.cat(
            [
                attention.compute_query.weight * config.head_dim**-0.5,  # the scale of the scores
                attention.compute_key.weight,
                attention.compute_value.weight,
            ]
        )
        gate_up = torch.cat([feed_forward.w1.weight, feed_forward.w3.weight])
        make = partial(Projection, dtype=dtype, quantize=quantize, choice=choice)
        self.query_key_value = make(query_key_value * layer.attention_norm.weight * sqrt_dim)
        self.output = make(attention.compute_output.weight)
        self.gate_up = make(gate_up * layer.ffn_norm.weight * sqrt_dim)
        self.down = make(feed_forward.w2.weight)

    def projections(self) -> list[Projection]:
        """Return the four matrices."""
        return [self.query_key_value, self.output, self.gate_up, self.down]

    def forward(
        self,
        h: Tensor,
        batch: int,
        rotations: Tensor,
        cache: KVCache | None,
        mask: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        """Compute the layer for several positions or rows.

        Args:
            h: (batch * seq, dim), float32.
            batch: rows.
            rotations: (seq, 1, head_dim / 2), complex, of the positions.
            cache: extended by the positions' keys and values.
            mask, positions: as in `DecodingLlama.compute_hidden`.

        Returns:
            As h; with positions, (batch, dim).
        """
        config, seq = self.config, len(rotations)
        heads = self.query_key_value(normalise(h, config).to(self.dtype))
        heads = heads.view(batch, seq, -1, config.head_dim)
        pairs = heads[:, :, : self.num_rotated].float().unflatten(-1, (-1, 2))
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * rotations)
        rotated = rotated.flatten(-2).to(self.dtype).transpose(1, 2)
        query, key = rotated[:, : config.n_heads], rotated[:, config.n_heads :]
        value = heads[:, :, self.num_rotated :].transpose(1, 2)
        if cache:
            start = cache.length
            keys, values = cache.extend(key, value)  # (batch, n_kv_heads, positions, head_dim)
            if start:
                query, key, value = query.float(), keys, values
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            is_causal=mask is None and seq > 1,
            scale=1.0,
            enable_gqa=config.n_rep > 1,
        )
        attended = select(attended.transpose(1, 2), positions)  # (batch, seq, n_heads, head_dim)
        h = select(h.view(batch, seq, -1), positions).flatten(0, 1)
        h = h + self.output(attended.reshape(len(h), -1).to(self.dtype))
        gate, up = self.gate_up(normalise(h, config).to(self.dtype)).chunk(2, dim=-1)
        hidden = F.silu(gate.float()) * up  # float32, to be rounded once
        return h + self.down(hidden.to(self.dtype))

    def step(self, h: Tensor, rotation: Tensor, cache: KVCache, space: Workspace) -> None:
        """Compute the layer for the next position of one row, in bfloat16 or int8, in place.

        Args:
            h: (dim,), float32; its new value replaces it.
            rotation: (1, head_dim / 2), complex, of the position.
            cache: extended by the position's key and value.
            space: overwritten.
        """
        self.query_key_value.scaled(h, inverse_norm(h, self.config), space.heads)
        space.pairs.mul_(rotation)
        keys, values = cache.append(space.key_value)
        # One query for each head: two products and a softmax; the general kernel is slower here.
        weights = torch.bmm(space.query, keys).softmax(dim=-1)  # (n_kv_heads, n_rep, length)
        self.output.add_to(h, torch.bmm(weights, values).view(-1))
        self.gate_up.scaled(h, inverse_norm(h, self.config), space.gate_up)
        self.down.add_to(h, F.silu(space.gate, inplace=True).mul_(space.up))


def normalise(x: Tensor, config: LlamaConfig) -> Tensor:
    """Compute RMSNorm of x (n, dim) without its gain, divided by sqrt(dim).

    That is x / sqrt(|x|^2 + dim eps).
    """
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
    return x * torch.rsqrt(squares + config.dim * config.layer_norm_eps)


def inverse_norm(x: Tensor, config: LlamaConfig) -> float:
    """Compute the factor by which `normalise` multiplies one vector x (dim,)."""
    return (torch.dot(x, x).item() + config.dim * config.layer_norm_eps) ** -0.5


class DecodingHead:
    """The final norm and the output projection.

    In bfloat16 it computes the highest logits again in float32.

    A bfloat16 logit between 8 and 16 is a multiple of 1/16, so that at one in fifty of the demo's
    positions two tokens share the highest logit. Reading a few rows of the float32 matrix costs
    little.

    Args:
        config: of the model.
        weight: (vocab, dim), float32.
        gain: (dim,), the final RMSNorm's.
        dtype, quantize, choice: as in `Projection`.
    """

    RESCORED = 16  # tokens whose logits are computed again

    def __init__(
        self,
        config: LlamaConfig,
        weight: Tensor,
        gain: Tensor,
        dtype: torch.dtype,
        quantize: bool,
        choice: Choice | None,
    ) -> None:
        self.config = config
        self.gain = gain * weight.shape[1] ** 0.5
        self.dtype = dtype
        self.projection = Projection(weight * self.gain, dtype, quantize, choice)
        # To compute logits again. In float32 that is not done; then it costs no memory.
        self.weight = weight if dtype == torch.bfloat16 else self.projection.weight
        self.compute_logits: Callable[[Tensor], Tensor] | None = None  # a faster one, of one vector

    def __call__(self, hidden: Tensor) -> Tensor:
        """Compute logits (n, vocab), float32.

        Args:
            hidden: (n, dim), float32, before the final norm.
        """
        if self.compute_logits and len(hidden) == 1:
            logits = self.compute_logits(hidden[0])[None]
        else:
            logits = self.projection(normalise(hidden, self.config).to(self.dtype)).float()
        if self.dtype == torch.float32:
            return logits
        tokens = likeliest(logits, min(self.RESCORED, logits.shape[1]))  # (n, RESCORED)
        normalised = normalise(hidden, self.config) * self.gain
        exact = self.weight[tokens] @ normalised[:, :, None]
        return logits.scatter_(1, tokens, exact[:, :, 0])


BLOCK = 128  # tokens


def likeliest(logits: Tensor, count: int) -> Tensor:
    """Return the tokens with the highest logits of each row (n, vocab): (n, count), highest first.

    The maximum of each block of tokens is a vectorised operation and `topk` is not, so only the
    blocks with the highest maxima are searched.
    """
    blocks = logits.shape[1] // BLOCK
    if logits.shape[1] % BLOCK or blocks <= count:
        return logits.topk(count).indices
    block = logits.view(-1, blocks, BLOCK).amax(dim=2).topk(count).indices  # (n, count)
    tokens = block[:, :, None] * BLOCK + torch.arange(BLOCK, device=block.device)
    tokens = tokens.flatten(1)  # (n, count * BLOCK)
    return tokens.gather(1, logits.gather(1, tokens).topk(count).indices)


class TokenStep(Protocol):
    """A faster computation of one token: `NumpyStep` or `CompiledStep`.

    Attributes:
        capacity: of the caches that it takes; None: any.
    """

    @property
    def capacity(self) -> int | None: ...

    def compute_hidden(self, h: Tensor, caches: Sequence[KVCache]) -> Tensor:
        """Compute the layers for the next position of one row, at h (dim,); returns the new h.

        It may overwrite `h`. The caches hold two positions or more.
        """

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Compute logits (vocab,), float32, of hidden (dim,), before the final norm."""


class DecodingLlama(Llama):
    """A causal `Llama` that cannot be trained; `forward` is inherited.

    Args:
        llama: the model whose weights to take.
        dtype: float32 or bfloat16.
        quantize: whether to store the matrices as int8, on the CPU.
        exact_head: whether logits are computed in float32 whatever the dtype, at some cost.
        choice: as in `Projection`.

    Attributes:
        error: largest absolute error of a stored weight.
        token_step: how single tokens are computed; None: by `DecodingLayer.step`.
    """

    @torch.no_grad()
    def __init__(
        self,
        llama: Llama,
        dtype: torch.dtype,
        quantize: bool = False,
        exact_head: bool = False,
        choice: Choice | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not Llama's, which would make the parts of a `Llama`
        config = llama.config
        self.config = config
        self.dtype = dtype
        self.embeddings = llama.tok_embeddings.weight.detach()
        output = llama.output.weight.detach()  # the same matrix, if the model ties them
        layers = cast(list[LlamaLayer], list(llama.layers))
        self.decoding_layers = [
            DecodingLayer(layer, config, dtype, quantize, choice) for layer in layers
        ]
        gain = llama.norm.weight.detach()
        head_dtype = torch.float32 if exact_head else dtype
        head = DecodingHead(config, output, gain, head_dtype, quantize and not exact_head, choice)
        self.output = head  # type: ignore[assignment]
        cos, sin = rotary_tables(
            config.head_dim, config.max_seq_len, config.rope_theta, self.embeddings.device
        )
        self.rotations = torch.complex(cos, sin)  # (max_seq_len, 1, head_dim / 2)
        projections = [head.projection]
        for layer in self.decoding_layers:
            projections += layer.projections()
        self.space = Workspace(config)
        self.use_step(self.numpy_step())
        self.error = max(projection.error for projection in projections)
        self.eval()

    def numpy_step(self) -> NumpyStep | None:
        """Return the step in NumPy, which is for float32 on the CPU; for others None."""
        if self.dtype != torch.float32 or self.embeddings.device.type != "cpu":
            return None
        layers = [[p.weight for p in layer.projections()] for layer in self.decoding_layers]
        head: Projection = self.output.projection  # type: ignore[assignment]
        return NumpyStep(self.config, layers, head.weight, self.rotations[:, 0])

    def use_step(self, step: TokenStep | None) -> None:
        """Compute single tokens with a step from now on; None: by `DecodingLayer.step`."""
        self.token_step = step
        self.output.compute_logits = step and step.compute_logits  # type: ignore[assignment]

    def compute_hidden(
        self,
        tokens: Tensor,
        caches: Sequence[KVCache] | None = None,
        mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Compute what `Llama.compute_hidden` does, up to the final norm, which the head computes.

        Args:
            tokens: (batch, seq), integer ids. With caches: the whole prompt if they are empty,
                else one token per row.
            caches: one for each layer; they are extended.
            mask: (batch, 1, seq, positions so far), True where a query may attend to a key; None:
                causal.
            positions: (batch,), as in `Llama.compute_hidden`.

        Raises:
            ValueError: more than max_seq_len positions.
        """
        config, (batch, seq) = self.config, tokens.shape
        start = caches[0].length if caches else 0
        if start + seq > config.max_seq_len:
            raise ValueError(
                f"a sequence of {start + seq} tokens is longer than "
                f"max_seq_len={config.max_seq_len}"
            )
        # The residual stream h stays in float32; bfloat16 sums would lose the most precision here.
        if start > 1 and batch == 1 and mask is None and tokens.device.type == "cpu":
            assert caches is not None
            h = self.embeddings[tokens[0, 0]].clone()  # (dim,)
            if self.token_step:
                h = self.token_step.compute_hidden(h, caches)
            else:
                rotation = self.rotations[start]
                for layer, cache in zip(self.decoding_layers, caches, strict=True):
                    layer.step(h, rotation, cache, self.space)
            return h.view(1, 1, -1)
        h = F.embedding(tokens.flatten(), self.embeddings)  # (batch * seq, dim)
        rotations = self.rotations[start : start + seq]  # (seq, 1, head_dim / 2)
        for i, layer in enumerate(self.decoding_layers):
            is_last = layer is self.decoding_layers[-1]
            read = positions if is_last else None
            h = layer.forward(h, batch, rotations, caches[i] if caches else None, mask, read)
        return h.view(batch, -1, config.dim)

    def new_caches(self, length: int) -> list[KVCache]:
        """Make a cache for each layer, for `length` positions, but no more than the model takes."""
        capacity = min(length, self.config.max_seq_len)
        if self.token_step and self.token_step.capacity:
            capacity = self.token_step.capacity
        return [KVCache(capacity) for _ in self.decoding_layers]

    def compute_window(
        self,
        idx: Tensor,
        window_start: int,
        caches: Sequence[KVCache] | None,
        padding: Tensor | None,
    ) -> Tensor:
        """Compute hidden states of the window's positions that are not cached yet.

        The window is the last max_seq_len columns of the context.

        Args:
            idx: (batch, seq), the whole context.
            window_start: first column of the window.
            caches: what they hold is not computed again.
            padding: (batch,), the number of padding columns of each row, or None.
        """
        first_new = caches[0].length if caches else window_start
        mask = None
        if padding is not None:
            make_mask = left_padding_mask if first_new == window_start else last_row_mask
            mask = make_mask(padding - window_start, idx.shape[1] - window_start)
        return self.compute_hidden(idx[:, first_new:], caches, mask)

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Generate the tokens that `Llama.generate` does, with the cache."""
        sampler = Sampler(temperature, generators=generator)
        return torch.cat((idx, *stream(self, idx, max_new_tokens, sampler)), dim=1)


def prepare_for_decoding(
    llama: Llama,
    dtype: torch.dtype = torch.float32,
    quantize: bool = False,
    exact_head: bool = False,
    choice: Choice | None = None,
) -> Llama:
    """Return a `DecodingLlama` if `llama` is causal, else `llama` itself, converted to dtype.

    Args:
        llama: on its device.
        dtype: of the computation; with int8 weights it is bfloat16.
        quantize: whether to store the matrices as int8.
        exact_head: whether logits are computed in float32 even when the dtype is bfloat16; needed
            when logits other than the highest are compared.
        choice: how to store the matrices (see `kernels.py`); None: in the default way.

    Raises:
        ValueError: the model cannot be quantized: it is not causal, or not on the CPU.
    """
    if quantize and not (llama.config.causal and llama.output.weight.device.type == "cpu"):
        raise ValueError("--quantize int8: only for a causal model (--causal), on the CPU")
    if not llama.config.causal:
        return llama.to(dtype)
    return DecodingLlama(llama, torch.bfloat16 if quantize else dtype, quantize, exact_head, choice)


# ------------------------------------------------------------------------------------- generation


@dataclass(frozen=True)
class Sampler:
    """Chooses the next token of each row; called with logits (batch, vocab), returns (batch, 1).

    Args:
        temperature: as in `sample_next_token`.
        top_k: sample from the k likeliest tokens only; 0: from all.
        top_p: sample from the smallest set of likeliest tokens whose total probability reaches
            top_p, in (0, 1] (nucleus sampling: Holtzman et al. 2020, arXiv:1904.09751, section
            3.1).
        generators: sources of randomness, one for all rows or one for each; None: PyTorch's global
            one.

    Raises:
        ValueError: an argument is out of bounds.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    generators: torch.Generator | Sequence[torch.Generator] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be finite and >= 0")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]")

    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return greedy_token(logits)
        with one_thread() if len(logits) == 1 else nullcontext():
            return self.draw(logits)

    def draw(self, logits: Tensor) -> Tensor:
        """Draw a token for each row, above temperature 0."""
        probabilities = token_probabilities(logits, self.temperature)  # (batch, vocab)
        if self.top_k or self.top_p < 1:
            probabilities = self.filter(probabilities)
        if isinstance(self.generators, Sequence):
            rows = zip(probabilities, self.generators, strict=True)
            return torch.stack([torch.multinomial(row, 1, generator=own) for row, own in rows])
        return torch.multinomial(probabilities, 1, generator=self.generators)

    def filter(self, probabilities: Tensor) -> Tensor:
        """Set the probabilities (batch, vocab) of all tokens outside top-k and top-p to 0."""
        sorted_probs, sorted_ids = probabilities.sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            sorted_probs[:, self.top_k :] = 0
            sorted_probs /= sorted_probs.sum(dim=-1, keepdim=True)
        # A token is left out if the tokens before it reach top_p without it.
        before = sorted_probs.cumsum(dim=-1) - sorted_probs
        sorted_probs[before >= self.top_p] = 0
        return torch.zeros_like(sorted_probs).scatter_(-1, sorted_ids, sorted_probs)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread in the block.

    Its other threads look for work for some time after an operation, and then those of NumPy, which
    computes the next token, wait for a processor.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def greedy_token(logits: Tensor) -> Tensor:
    """Return what `sample_next_token` does at temperature 0.

    On the CPU with NumPy, whose argmax is vectorised; PyTorch's is not.
    """
    if logits.device.type != "cpu":
        return sample_next_token(logits, 0.0)
    values = logits.detach().float().numpy()
    tokens = [row.argmax() for row in values]  # NaN is the highest
    if not all(math.isfinite(row[token]) for row, token in zip(values, tokens, strict=True)):
        return sample_next_token(logits, 0.0)  # which raises the error
    return torch.tensor(tokens)[:, None]


@torch.no_grad()  # not inference_mode, whose tokens could not be used in training
def stream(
    llama: Llama,
    idx: Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    padding: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the tokens that continue each row, one column after the other; never stops early.

    Each token is predicted from the whole context, or from its last `max_seq_len` tokens. A
    `DecodingLlama` uses its cache until the context exceeds max_seq_len. Then the window slides,
    every token's position changes, and each step computes the whole window. Any other `Llama`
    computes the whole window in each step.

    Args:
        llama: as `prepare_for_decoding` returned it.
        idx: (batch, seq), integer ids, seq >= 1.
        max_new_tokens: >= 0.
        sampler: chooses the tokens.
        padding: (batch,), the number of columns at the left end of each row that are padding; for a
            `DecodingLlama` only.

    Yields:
        (batch, 1), int64, `max_new_tokens` times.

    Raises:
        ValueError: an argument is out of bounds (raised at the first next()).
    """
    check_context(idx, max_new_tokens)
    if padding is not None and not isinstance(llama, DecodingLlama):
        raise ValueError("a model that is not a DecodingLlama would attend to the padding")
    caches = None
    if isinstance(llama, DecodingLlama):
        caches = llama.new_caches(idx.shape[1] + max_new_tokens)
    was_training = llama.training
    llama.eval()
    try:
        for _ in range(max_new_tokens):
            window_start = max(0, idx.shape[1] - llama.config.max_seq_len)
            if isinstance(llama, DecodingLlama):
                caches = None if window_start else caches
                hidden = llama.compute_window(idx, window_start, caches, padding)
            else:
                hidden = llama.compute_hidden(idx[:, window_start:])
            next_token = sampler(llama.output(hidden[:, -1]))
            yield next_token
            idx = torch.cat((idx, next_token), dim=1)  # (batch, seq + 1)
    finally:
        llama.train(was_training)
