"""Rotary position embeddings (RoPE).

Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864,
section 3.4.2: the sparse form of their rotation matrix, eq. 34, in real arithmetic.

Conventions where there are two camps:
- features (2i, 2i+1) form a rotated pair, as in RoFormer and Meta's Llama, and not features i and
  i + head_dim / 2, as in Hugging Face's;
- positions count from 0; the angle of pair i at position m is m * theta^(-2i / head_dim).
"""

from functools import lru_cache

import torch
from torch import Tensor


def apply_rotary_emb(
    query: Tensor,
    key: Tensor,
    head_dim: int,
    max_seq_len: int,
    theta: float = 10000.0,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Rotate query and key by position.

    Args:
        query: (batch, seq, n_heads, head_dim), any float dtype.
        key: (batch, seq, n_kv_heads, head_dim), any float dtype.
        head_dim: features per head, even.
        max_seq_len: the longest sequence, in tokens, that the model takes; the tables of sines and
            cosines are made once for this length.
        theta: base of the frequencies, dimensionless, > 0.
        start: position of the first token, >= 0.

    Returns:
        Rotated query and key, same shapes and dtypes as given; computed in float32.

    Raises:
        ValueError: head_dim is odd or not that of query and key, or start + seq > max_seq_len.
    """
    end = start + query.shape[1]
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} is odd; rotary embeddings rotate pairs of features")
    if query.shape[-1] != head_dim or key.shape[-1] != head_dim:
        raise ValueError(
            f"head_dim={head_dim}, but query has {query.shape[-1]} features per head "
            f"and key {key.shape[-1]}"
        )
    if end > max_seq_len:
        raise ValueError(f"a sequence of {end} tokens is longer than max_seq_len={max_seq_len}")
    cos, sin = (
        table[start:end] for table in rotary_tables(head_dim, max_seq_len, theta, query.device)
    )
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


@lru_cache(maxsize=16)  # so that all layers of all calls share one pair of tables
def rotary_tables(
    head_dim: int, max_seq_len: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every angle.

    Returns:
        cos, sin: (max_seq_len, 1, head_dim / 2) each, float32; the axis of 1 broadcasts over heads.
    """
    # Not an inference tensor, even if the first call comes from an evaluation: training needs the
    # same tables later.
    with torch.inference_mode(False):
        pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
        frequencies = 1.0 / theta ** (pairs / head_dim)  # (head_dim / 2,), radians per position
        positions = torch.arange(max_seq_len, device=device, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)[:, None, :]
        return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (batch, seq, heads, head_dim / 2)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)  # (batch, seq, heads, head_dim)
