"""Llama 2, from its parts: RMSNorm, rotary attention over grouped heads, and SwiGLU.

Touvron et al. 2023, "Llama 2: Open Foundation and Fine-Tuned Chat Models", arXiv:2307.09288,
section 2.2. Each class cites its own paper.

Differs from the paper in:
- reference mode (`LlamaConfig.causal` is False, the assignment's own): attention has no mask, so
  every position attends to all positions of its row, padding included. Causal mode is the
  paper's;
- the input embedding and the output projection share one matrix (`tie_embeddings`).

Conventions:
- rows of a batch are padded on the right;
- hidden states are (batch, seq, dim);
- "Faithful:" marks code that may look wrong but that published numbers depend on.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base_llama import LlamaPreTrainedModel, read_checkpoint
from config import LlamaConfig
from rope import apply_rotary_emb


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
        """Scale x (..., dim) to a root mean square of one, without the gain."""
        return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., dim) in float32, cast it back, then multiply by the gain."""
        return self.norm(x.float()).type_as(x) * self.weight


class Attention(nn.Module):
    """Self-attention with grouped heads: `n_rep` consecutive query heads share a key/value head.

    softmax(query key^T / sqrt(head_dim)) value: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    Grouped-query attention: Ainslie et al. 2023, arXiv:2305.13245.
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

    def compute_query_key_value_scores(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Average the values, weighted by the softmax of the scaled query-key scores.

        Args:
            query: (batch, n_heads, seq, head_dim).
            key, value: (batch, n_kv_heads, seq, head_dim).

        Returns:
            As query. In causal mode position i attends to positions <= i, in reference mode to all.
        """
        config = self.config
        dropout = config.dropout if self.training else 0.0
        # Faithful: without `causal` there is no mask at all, not even on padding. The assignment's
        # sanity_check.data and all its published accuracies depend on it.
        return F.scaled_dot_product_attention(
            query, key, value, None, dropout, config.causal, enable_gqa=config.n_rep > 1
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute self-attention over x (batch, seq, dim); returns the same shape."""
        config = self.config
        head_shape = (-1, config.head_dim)
        query = self.compute_query(x).unflatten(-1, head_shape)  # (batch, seq, n_heads, head_dim)
        key = self.compute_key(x).unflatten(-1, head_shape)  # (batch, seq, n_kv_heads, head_dim)
        value = self.compute_value(x).unflatten(-1, head_shape)  # as key
        query, key = apply_rotary_emb(
            query, key, config.head_dim, config.max_seq_len, config.rope_theta
        )
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        # output: (batch, n_heads, seq, head_dim)
        output = self.compute_query_key_value_scores(query, key, value)
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
        """Compute the gated hidden layer: (..., dim) to (..., hidden_dim)."""
        return F.silu(self.w1(x)) * self.w3(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim)."""
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

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, seq, dim) to (batch, seq, dim)."""
        h = x + self.attention(self.attention_norm(x))
        return h + self.feed_forward(self.ffn_norm(h))


class Llama(LlamaPreTrainedModel):
    """The language model: embeddings, `n_layers` blocks, a final norm, an output projection."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        # from_pretrained, since it draws no random numbers for a matrix that may be replaced.
        matrix = torch.empty(config.vocab_size, config.dim)
        self.tok_embeddings = nn.Embedding.from_pretrained(matrix, freeze=False)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LlamaLayer(i, config) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.layer_norm_eps)
        self.tie_weights()  # unless the config says otherwise
        self.init_weights()

    def compute_hidden(self, tokens: Tensor) -> Tensor:
        """Compute hidden states (batch, seq, dim), after the final norm, of tokens (batch, seq)."""
        h = self.dropout(self.tok_embeddings(tokens))
        for layer in self.layers:
            h = layer(h)
        return self.norm(h)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute logits and hidden states.

        Args:
            tokens: (batch, seq), integer ids.
            targets: anything but None asks for the logits of all positions.

        Returns:
            logits: (batch, seq, vocab) with targets, else (batch, 1, vocab): the last column's.
            hidden: (batch, seq, dim), after the final norm.

        Raises ValueError if seq > max_seq_len.
        """
        hidden = self.compute_hidden(tokens)
        # The projection to the vocabulary is the largest matrix product, so it is computed only
        # for the positions that are returned.
        logits = self.output(hidden if targets is not None else hidden[:, -1:])
        return logits, hidden

    @torch.no_grad()  # not inference_mode, whose tokens could not be used in training
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue each row by `max_new_tokens` tokens; never stops early.

        Each step computes the whole context, or its last `max_seq_len` tokens, anew.
        For causal models `beyond/decoding.py` gives the same tokens with less work.

        Args:
            idx: (batch, seq), integer ids, seq >= 1.
            max_new_tokens: >= 0.
            temperature, generator: as in `sample_next_token`.

        Returns:
            (batch, seq + max_new_tokens): the context and its continuation.

        Raises:
            ValueError: an argument is out of bounds, or a logit is inf or NaN.
        """
        check_context(idx, max_new_tokens)
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                logits, _ = self(idx[:, -self.config.max_seq_len :])  # (batch, 1, vocab)
                next_token = sample_next_token(logits[:, -1], temperature, generator)
                idx = torch.cat((idx, next_token), dim=1)  # (batch, seq + 1)
        finally:
            self.train(was_training)
        return idx


def check_context(idx: Tensor, max_new_tokens: int) -> None:
    """Raise ValueError unless idx is (batch, seq >= 1) and max_new_tokens >= 0."""
    if idx.dim() != 2 or idx.shape[1] < 1:
        raise ValueError(f"expected a context of (batch, seq >= 1), found {tuple(idx.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is negative")


def sample_next_token(
    logits: Tensor, temperature: float, generator: torch.Generator | None = None
) -> Tensor:
    """Choose one token per row, (batch, 1): the argmax at temperature 0, else a draw from softmax.

    Args:
        logits: (batch, vocab).
        temperature: >= 0 and finite; 0 draws no random number.
        generator: source of randomness, on the logits' device; None: PyTorch's global one.

    Raises:
        ValueError: temperature is out of bounds, or a logit is inf or NaN.
    """
    if temperature == 0:
        return max_logits(logits)[1]
    return torch.multinomial(token_probabilities(logits, temperature), 1, generator=generator)


def token_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Compute softmax(logits / temperature) of logits (batch, vocab) in float64; temperature > 0.

    Raises ValueError if temperature is out of bounds, or a logit is inf or NaN.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be finite and >= 0")  # 0 is the argmax
    # Subtract the maximum and use float64, so that dividing by a tiny temperature cannot overflow.
    logits = logits.double() - max_logits(logits)[0]
    return F.softmax(logits / temperature, dim=-1)


def max_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest logit and its token in each row of (batch, vocab), (batch, 1) each.

    Raises ValueError if a logit is inf or NaN, or all of a row are -inf.
    """
    values, tokens = logits.max(dim=-1, keepdim=True)  # NaN if a logit of the row is NaN
    if not values.isfinite().all():
        raise ValueError("the logits are infinite or NaN: the model's weights are too large")
    return values, tokens


def load_pretrained(
    path: str | Path,
    causal: bool | None = None,
    dropout: float | None = None,
    max_seq_len: int | None = None,
) -> Llama:
    """Load the model of a checkpoint, on the CPU, in eval mode.

    Args:
        path: a file in the format that `base_llama` reads.
        causal, dropout, max_seq_len: override the checkpoint's own values unless None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint, or its weights do not fit its `model_args`.
    """
    return Llama.from_checkpoint(read_checkpoint(path), path, causal, dropout, max_seq_len)
