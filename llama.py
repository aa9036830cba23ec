"""Llama 2, from its parts: RMSNorm, rotary attention over grouped heads, and SwiGLU.

Touvron et al. 2023, "Llama 2: Open Foundation and Fine-Tuned Chat Models", arXiv:2307.09288,
section 2.2; the parts are cited where they stand.

Differs from the paper in:
- reference mode (`LlamaConfig.causal` is False, the assignment's own): attention has no mask, so
  every position sees every other one of its row, padding included. Causal mode is the paper's;
- input embedding and output projection share one matrix.

Conventions: tokens are padded on the right; every tensor is (batch, seq, ...) outside of attention.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base_llama import (
    LlamaPreTrainedModel,
    load_strictly,
    parse_config,
    parse_weights,
    read_checkpoint,
)
from config import LlamaConfig
from rope import apply_rotary_emb

Generators = torch.Generator | Sequence[torch.Generator] | None


class RMSNorm(nn.Module):
    """Root mean square normalisation: x / sqrt(mean(x^2) + eps) * weight.

    Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4, with eps inside the root.

    Args:
        dim: size of the last axis, over which the mean is taken.
        eps: keeps the root away from zero.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def norm(self, x: Tensor) -> Tensor:
        """x (..., dim) scaled to a root mean square of one, without the gain."""
        return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x (..., dim), computed in float32, cast back, then scaled."""
        return self.norm(x.float()).type_as(x) * self.weight


class KVCache:
    """Keys and values of one layer for the positions seen so far, so that none is computed twice.

    Args:
        capacity: positions that it can hold; memory for all of them is taken at the first use.

    Attributes:
        length: positions that it holds.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the next positions; all keys and values so far.

        Args:
            key, value: (batch, n_kv_heads, seq, head_dim).

        Returns:
            (batch, n_kv_heads, length, head_dim) each.

        Raises:
            ValueError: there is no room left; or several positions come after the first ones, which
                would not be causal among themselves.
        """
        batch, n_kv_heads, seq, head_dim = key.shape
        start, end = self.length, self.length + seq
        if end > self.capacity:
            raise ValueError(f"{end} positions do not fit a cache of {self.capacity}")
        if start and seq > 1:
            raise ValueError(f"after its first use a cache takes one position at a time, not {seq}")
        if start == 0:
            self.keys = key.new_empty(batch, n_kv_heads, self.capacity, head_dim)
            self.values = torch.empty_like(self.keys)
        self.keys[:, :, start:end] = key
        self.values[:, :, start:end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Attention over grouped heads: each key/value head serves `n_rep` consecutive query heads.

    softmax(query key^T / sqrt(head_dim)) value: Vaswani et al. 2017, arXiv:1706.03762, eq. 1;
    grouped-query attention: Ainslie et al. 2023, arXiv:2305.13245.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        kv_dim = config.n_kv_heads * config.head_dim
        self.compute_query = nn.Linear(config.dim, config.dim, bias=False)
        self.compute_key = nn.Linear(config.dim, kv_dim, bias=False)
        self.compute_value = nn.Linear(config.dim, kv_dim, bias=False)
        self.compute_output = nn.Linear(config.dim, config.dim, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)

    def compute_query_key_value_scores(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Values weighted by the softmax of the scaled query-key products.

        Args:
            query: (batch, n_heads, seq, head_dim).
            key, value: (batch, n_kv_heads, keys, head_dim); keys = seq, or more if seq = 1.
            mask: (batch, 1, seq, keys), True where a query may attend to a key; None: as below.

        Returns:
            (batch, n_heads, seq, head_dim). In causal mode position i attends to positions <= i; a
            single query is the last position and attends to all.
        """
        # Faithful: without `causal` there is no mask at all, not even on padding. The assignment's
        # sanity_check.data and all its published accuracies depend on it.
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.config.dropout if self.training else 0.0,
            is_causal=self.config.causal and mask is None and query.shape[2] > 1,
            enable_gqa=self.config.n_rep > 1,
        )

    def forward(
        self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """What each position (batch, seq, dim) gathers from the others, same shape.

        With a cache, x are the first positions, or the next one, which gathers from the cache too.
        """
        config = self.config
        heads = (-1, config.head_dim)
        query = self.compute_query(x).unflatten(-1, heads)  # (batch, seq, n_heads, head_dim)
        key = self.compute_key(x).unflatten(-1, heads)  # (batch, seq, n_kv_heads, head_dim)
        value = self.compute_value(x).unflatten(-1, heads)  # (batch, seq, n_kv_heads, head_dim)
        start = 0 if cache is None else cache.length
        query, key = apply_rotary_emb(query, key, config.head_dim, config.max_seq_len, start=start)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        if cache is not None:
            key, value = cache.extend(key, value)  # (batch, n_kv_heads, start + seq, head_dim)
        output = self.compute_query_key_value_scores(
            query, key, value, mask
        )  # (batch, n_heads, seq, head_dim)
        output = output.transpose(1, 2).flatten(-2)  # (batch, seq, dim)
        return self.resid_dropout(self.compute_output(output))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), with w1 the gate, w3 up and w2 down.

    Shazeer 2020, arXiv:2002.05202, eq. 6 with Swish_1 = silu.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def SwiGLU(self, x: Tensor) -> Tensor:
        """The gated hidden layer: (..., dim) to (..., hidden_dim)."""
        return F.silu(self.w1(x)) * self.w3(x)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        return self.dropout(self.w2(self.SwiGLU(x)))


class LlamaLayer(nn.Module):
    """One pre-norm block: h = x + attention(norm(x)), then h + feed_forward(norm(h))."""

    def __init__(self, layer_id: int, config: LlamaConfig) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.layer_norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.layer_norm_eps)

    def forward(
        self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(batch, seq, dim) to (batch, seq, dim)."""
        h = x + self.attention(self.attention_norm(x), cache, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Llama(LlamaPreTrainedModel):
    """The language model: embeddings, `n_layers` blocks, a final norm, an output projection."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        # Not drawn on its own, since it becomes output's matrix.
        self.tok_embeddings = nn.Embedding.from_pretrained(self.output.weight, freeze=False)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LlamaLayer(i, config) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.layer_norm_eps)
        self.tie_weights()
        self.init_weights()

    def tie_weights(self) -> None:
        """Let the input embedding be the output projection's matrix."""
        self.tok_embeddings.weight = self.output.weight

    def compute_hidden(
        self,
        tokens: Tensor,
        caches: Sequence[KVCache] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, (batch, seq, dim), of tokens (batch, seq).

        Args:
            tokens: integer ids; with caches, the first ones, or the one after what the caches hold.
            caches: one for each layer, extended by the tokens.
            mask: as in `Attention.compute_query_key_value_scores`.

        Raises:
            ValueError: more than max_seq_len positions.
        """
        h = self.dropout(self.tok_embeddings(tokens))
        for i, layer in enumerate(self.layers):
            h = layer(h, caches[i] if caches else None, mask)
        return self.norm(h)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits and hidden states.

        Args:
            tokens: (batch, seq), integer ids.
            targets: anything but None asks for the logits of all positions.

        Returns:
            logits: (batch, seq, vocab) with targets, else (batch, 1, vocab): the last column's.
            hidden: (batch, seq, dim), after the final norm.

        Raises:
            ValueError: seq > max_seq_len.
        """
        hidden = self.compute_hidden(tokens)
        # The projection to the vocabulary is the largest product of all: only where it is read.
        logits = self.output(hidden if targets is not None else hidden[:, -1:])
        return logits, hidden

    @torch.no_grad()  # not inference_mode: its tensors could not be trained on later
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: Generators = None,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        padding: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """The tokens that continue each row, one column after the other; never stops early.

        Each token is drawn from the whole context, or from its last `max_seq_len` tokens. In causal
        mode keys and values are kept while the context is no longer than that; once it is, every
        token has another position at each step, and each step computes them all.

        Args:
            idx: (batch, seq), integer ids, seq >= 1.
            max_new_tokens: >= 0.
            temperature, generator, top_k, top_p: as in `sample_next_token`.
            padding: (batch,), how many tokens at the left end of each row are no part of it; causal
                mode only.

        Yields:
            (batch, 1), int64, `max_new_tokens` times.

        Raises:
            ValueError: when the first token is asked for: an argument is out of bounds.
        """
        config = self.config
        if idx.dim() != 2 or idx.shape[1] < 1:
            raise ValueError(f"expected a context of (batch, seq >= 1), found {tuple(idx.shape)}")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens} is negative")
        if padding is not None and not config.causal:
            raise ValueError("without a causal mask rows of different lengths would see padding")
        caches = None
        if config.causal:
            capacity = min(idx.shape[1] + max_new_tokens, config.max_seq_len)
            caches = [KVCache(capacity) for _ in range(config.n_layers)]
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                cropped = max(0, idx.shape[1] - config.max_seq_len)
                if cropped:
                    caches = None
                known = caches[0].length if caches else cropped
                mask = None
                if padding is not None:
                    visible = left_padding_mask if known == cropped else last_row_mask
                    mask = visible(padding - cropped, idx.shape[1] - cropped)
                hidden = self.compute_hidden(idx[:, known:], caches, mask)
                logits = self.output(hidden[:, -1])  # (batch, vocab)
                next_token = sample_next_token(
                    logits, temperature, generator, top_k=top_k, top_p=top_p
                )
                yield next_token
                idx = torch.cat((idx, next_token), dim=1)  # (batch, seq + 1)
        finally:
            self.train(was_training)

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: Generators = None,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Continue each row by `max_new_tokens` tokens; arguments and errors as in `stream`.

        Returns:
            (batch, seq + max_new_tokens): the context and its continuation.
        """
        tokens = self.stream(
            idx, max_new_tokens, temperature, generator, top_k=top_k, top_p=top_p, padding=padding
        )
        return torch.cat((idx, *tokens), dim=1)


def left_padding_mask(padding: Tensor, seq: int) -> Tensor:
    """Which positions see which, when rows are causal and padded on the left.

    Args:
        padding: (batch,), how many columns of each row are padding.
        seq: columns.

    Returns:
        (batch, 1, seq, seq), bool. A pad sees itself, since softmax must see something.
    """
    columns = torch.arange(seq, device=padding.device)
    causal = columns <= columns[:, None]  # (seq, seq)
    real = columns >= padding[:, None, None]  # (batch, 1, seq)
    return ((causal & real) | (columns == columns[:, None]))[:, None]


def last_row_mask(padding: Tensor, seq: int) -> Tensor:
    """The last row of `left_padding_mask`: (batch, 1, 1, seq)."""
    return (torch.arange(seq, device=padding.device) >= padding[:, None])[:, None, None]


def sample_next_token(
    logits: Tensor,
    temperature: float,
    generator: Generators = None,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """One token a row: the likeliest at temperature 0, else a draw from softmax(logits / t).

    Args:
        logits: (batch, vocab).
        temperature: >= 0 and finite; 0 draws no random number.
        generator: source of randomness, on the logits' device, one for all rows or one for each;
            None: PyTorch's global one.
        top_k: draw from the k likeliest only; 0: from all.
        top_p: draw from the likeliest only, as few as have this probability together, in (0, 1]
            (nucleus sampling: Holtzman et al. 2020, arXiv:1904.09751, section 3.1).

    Returns:
        (batch, 1), int64.

    Raises:
        ValueError: an argument is out of bounds, or the logits are not finite.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} is not a number of at least 0")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} is negative")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is not in (0, 1]")
    if temperature == 0:
        return logits.max(dim=-1, keepdim=True).indices
    # The largest logit becomes 0 first, and float64, so that no temperature can overflow.
    logits = logits.double() - logits.max(dim=-1, keepdim=True).values
    probabilities = F.softmax(logits / temperature, dim=-1)
    if top_k or top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        if top_k:
            ordered[:, top_k:] = 0
            ordered /= ordered.sum(dim=-1, keepdim=True)
        # A token is out if those before it have enough probability already.
        ordered[ordered.cumsum(dim=-1) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(ordered).scatter_(-1, order, ordered)
    try:
        if isinstance(generator, Sequence):
            rows = zip(probabilities, generator, strict=True)
            return torch.stack([torch.multinomial(row, 1, generator=own) for row, own in rows])
        return torch.multinomial(probabilities, num_samples=1, generator=generator)
    except RuntimeError:
        if not logits.isnan().any():
            raise
        raise ValueError("the logits are not finite: the model's weights are too large") from None


def load_pretrained(
    path: str | Path,
    causal: bool | None = None,
    dropout: float | None = None,
    max_seq_len: int | None = None,
) -> Llama:
    """The model of a checkpoint, on the CPU, in eval mode.

    Args:
        path: a checkpoint in one of the formats that `base_llama` reads.
        causal, dropout, max_seq_len: override the checkpoint's own where they are not None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or its weights do not fit its `model_args`.
    """
    checkpoint = read_checkpoint(path)
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        model = Llama(parse_config(checkpoint, path, causal, dropout, max_seq_len))
    load_strictly(model, parse_weights(checkpoint, path), path)
    model.tie_weights()
    return model.eval()
