"""A model prepared for decoding: the same function as `Llama`, in fewer and faster operations.

Decoding one token at a time multiplies every weight with one vector, so it is as fast as weights
come from memory, and as what is done around them is brief. Zero-shot scores, which are read off
whole sentences, gain by the same means. Hence, beside `llama.py`:

- query, key and value are one product, and so are the gate and up projections;
- RMSNorm's gains, and the root of the dimension, are multiplied into the weights that follow;
- query and key are rotated together, as complex numbers (RoFormer, arXiv:2104.09864, eq. 13);
- weights are stored as the fastest matrix-vector product wants them: float32 column by column,
  bfloat16 row by row, or int8 with a scale for each row.

Causal models only: without a mask every new token changes what all others compute.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import KVCache, Llama, LlamaLayer
from rope import rotary_tables


class Projection:
    """A matrix-vector product, x W^T, that reads the weights (out, in) fast.

    Args:
        weight: (out, in), float32.
        dtype: of inputs, outputs, and, unless quantized, of the stored weights.
        quantize: whether to store int8: each row is divided by 1/127 of its largest magnitude and
            rounded.

    Attributes:
        error: largest absolute difference between a weight and what is stored for it.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, quantize: bool) -> None:
        self.scales: Tensor | None = None
        if quantize:
            # Rounded first to the dtype that it is stored in, so that no error is added later.
            scales = (weight.abs().amax(dim=1).clamp(min=1e-12) / 127).to(dtype)  # (out,)
            rounded = (weight / scales.float()[:, None]).round().clamp(-127, 127)
            stored = rounded * scales.float()[:, None]
            # The product reads 16 columns at a time, also beyond the last.
            self.padding = -weight.shape[1] % 16
            self.weight = F.pad(rounded.char(), (0, self.padding))
            self.scales = scales
        elif dtype == torch.float32:
            self.weight = weight.t().contiguous().t()  # a column is contiguous
            stored = weight
        else:
            self.weight = weight.to(dtype)
            stored = self.weight.float()
        self.error = (stored - weight).abs().max().item()

    def __call__(self, x: Tensor) -> Tensor:
        """x (n, in) to (n, out)."""
        if self.scales is not None:
            x = F.pad(x, (0, self.padding)) if self.padding else x
            return torch._weight_int8pack_mm(x, self.weight, self.scales)
        if len(x) == 1:
            return torch.mv(self.weight, x[0])[None]
        return F.linear(x, self.weight)


class DecodingLayer:
    """The weights of a `LlamaLayer`: two products where it has three, one where it has two."""

    def __init__(self, layer: LlamaLayer, dtype: torch.dtype, quantize: bool) -> None:
        attention, feed_forward = layer.attention, layer.feed_forward
        parts = [attention.compute_query, attention.compute_key, attention.compute_value]
        root = layer.attention_norm.weight.numel() ** 0.5
        gain = layer.attention_norm.weight * root
        self.query_key_value = Projection(
            torch.cat([part.weight for part in parts]) * gain, dtype, quantize
        )
        self.output = Projection(attention.compute_output.weight, dtype, quantize)
        gate_up = torch.cat([feed_forward.w1.weight, feed_forward.w3.weight])
        self.gate_up = Projection(gate_up * layer.ffn_norm.weight * root, dtype, quantize)
        self.down = Projection(feed_forward.w2.weight, dtype, quantize)


class DecodingHead:
    """The output projection. In half precision the likeliest tokens' logits are computed again.

    A logit of 8 to 16 in bfloat16 is a multiple of 1/16: one in fifty of the demo's positions then
    has a tie at the top. Reading a few rows of the float32 embeddings costs little.

    Args:
        weight: (vocab, dim), float32.
        gain: (dim,), the final RMSNorm's.
        dtype, quantize: as in `Projection`.
    """

    RESCORED = 16  # tokens

    def __init__(self, weight: Tensor, gain: Tensor, dtype: torch.dtype, quantize: bool) -> None:
        self.weight = weight
        self.gain = gain * weight.shape[1] ** 0.5
        self.dtype = dtype
        self.projection = Projection(weight * self.gain, dtype, quantize)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (n, vocab), float32, of hidden states (n, dim), float32, of length 1."""
        logits = self.projection(hidden.to(self.dtype)).float()
        if self.dtype == torch.float32:
            return logits
        likeliest = logits.topk(min(self.RESCORED, logits.shape[1])).indices  # (n, RESCORED)
        exact = self.weight[likeliest] @ (hidden * self.gain)[:, :, None]
        return logits.scatter(1, likeliest, exact[:, :, 0])


class DecodingLlama(Llama):
    """A causal `Llama` that cannot be trained; `forward`, `stream` and `generate` are inherited.

    Args:
        llama: the model whose weights to take.
        dtype: float32 or bfloat16.
        quantize: whether to store the matrices as int8, on the CPU.
        exact_head: whether logits are computed in float32 whatever the dtype, at some cost.

    Attributes:
        error: largest absolute error of a stored weight.
    """

    @torch.no_grad()
    def __init__(
        self, llama: Llama, dtype: torch.dtype, quantize: bool = False, exact_head: bool = False
    ) -> None:
        nn.Module.__init__(self)  # none of Llama's parts is made
        config = llama.config
        self.config = config
        self.dtype = dtype
        self.embeddings = llama.tok_embeddings.weight.detach()
        layers = cast(list[LlamaLayer], list(llama.layers))
        self.blocks = [DecodingLayer(layer, dtype, quantize) for layer in layers]
        gain = llama.norm.weight.detach()
        head_dtype = torch.float32 if exact_head else dtype
        head = DecodingHead(self.embeddings, gain, head_dtype, quantize and not exact_head)
        self.output = head  # type: ignore[assignment]
        cos, sin = rotary_tables(
            config.head_dim, config.max_seq_len, 10000.0, self.embeddings.device
        )
        self.eps_root = torch.tensor((config.dim * config.layer_norm_eps) ** 0.5, device=cos.device)
        self.rotations = torch.complex(cos, sin)  # (max_seq_len, 1, head_dim / 2)
        matrices = [head.projection] + [p for block in self.blocks for p in vars(block).values()]
        self.error = max(matrix.error for matrix in matrices)
        self.eval()

    def compute_hidden(
        self,
        tokens: Tensor,
        caches: Sequence[KVCache] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As `Llama.compute_hidden`, but for the final norm's gain: as long as 1."""
        config, (batch, seq) = self.config, tokens.shape
        start = caches[0].length if caches else 0
        if start + seq > config.max_seq_len:
            raise ValueError(
                f"a sequence of {start + seq} tokens is longer than "
                f"max_seq_len={config.max_seq_len}"
            )
        rotations = self.rotations[start : start + seq]  # (seq, 1, head_dim / 2)
        rotated = config.n_heads + config.n_kv_heads
        is_causal = mask is None and seq > 1
        # The sum over the layers stays in float32: added to in bfloat16, it would lose most.
        h = F.embedding(tokens.flatten(), self.embeddings)  # (batch * seq, dim)
        for i, block in enumerate(self.blocks):
            heads = block.query_key_value(self.normalise(h).to(self.dtype))
            heads = heads.view(batch, seq, -1, config.head_dim)
            pairs = heads[:, :, :rotated].float().view(batch, seq, rotated, -1, 2)
            turned = torch.view_as_real(torch.view_as_complex(pairs) * rotations)
            turned = turned.view(batch, seq, rotated, -1).to(self.dtype).transpose(1, 2)
            query, key = turned[:, : config.n_heads], turned[:, config.n_heads :]
            value = heads[:, :, rotated:].transpose(1, 2)  # (batch, n_kv_heads, seq, head_dim)
            if caches:
                key, value = caches[i].extend(key, value)
            attended = F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=is_causal, enable_gqa=config.n_rep > 1
            )
            h = h + block.output(attended.transpose(1, 2).reshape(batch * seq, -1))
            gate, up = block.gate_up(self.normalise(h).to(self.dtype)).chunk(2, dim=-1)
            h = h + block.down(F.silu(gate) * up)
        return self.normalise(h).view(batch, seq, -1)

    def normalise(self, x: Tensor) -> Tensor:
        """RMSNorm of x (n, dim) without its gain, over sqrt(dim): x / sqrt(|x|^2 + dim eps)."""
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.eps_root)


def prepare_for_decoding(
    llama: Llama,
    dtype: torch.dtype = torch.float32,
    quantize: bool = False,
    exact_head: bool = False,
) -> Llama:
    """The model to generate with: `DecodingLlama` if `llama` is causal, else `llama` itself.

    Args:
        llama: on its device.
        dtype: of what is computed; with int8 weights it is bfloat16.
        quantize: whether to store the matrices as int8.
        exact_head: whether logits are computed in float32 all the same, to compare any two of them.

    Raises:
        ValueError: the model cannot be quantized: it is not causal, or not on the CPU.
    """
    if quantize and not (llama.config.causal and llama.output.weight.device.type == "cpu"):
        raise ValueError("--quantize int8: only for a causal model (--causal), on the CPU")
    if not llama.config.causal:
        return llama.to(dtype)
    return DecodingLlama(llama, torch.bfloat16 if quantize else dtype, quantize, exact_head)
