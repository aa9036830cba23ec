"""Rotary position embeddings (RoPE).

Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864,
section 3.4.2, eq. 34: the product with their sparse rotation matrix, in real arithmetic.

Conventions:
- features (2i, 2i+1) form a rotated pair, as in RoFormer and in Meta's Llama; Hugging Face's Llama
  pairs features i and i + head_dim / 2 instead;
- positions start at 0; the angle of pair i at position m is m * theta^(-2i / head_dim).
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
) -> tuple[Tensor, Tensor]:
    """Rotate query and key by angles that grow with the position (RoPE).

    Args:
        query: (batch, seq, n_heads, head_dim), any float dtype.
        key: (batch, seq, n_kv_heads, head_dim), any float dtype.
        head_dim: number of features per head, even.
        max_seq_len: maximum sequence length of the model, in tokens; the tables of cosines and
            sines are computed once for this length.
        theta: base of the frequencies, dimensionless, > 0.

    Returns:
        Rotated query and key, same shapes and dtypes as given; computed in float32.

    Raises:
        ValueError: head_dim is odd, query or key has another head_dim, or seq > max_seq_len.
    """
    seq_len = query.shape[1]
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} is odd; rotary embeddings rotate pairs of features")
    if query.shape[-1] != head_dim or key.shape[-1] != head_dim:
        raise ValueError(
            f"head_dim={head_dim}, but query has {query.shape[-1]} features per head "
            f"and key has {key.shape[-1]}"
        )
    if seq_len > max_seq_len:
        raise ValueError(f"a sequence of {seq_len} tokens is longer than max_seq_len={max_seq_len}")
    cos, sin = rotary_tables(head_dim, max_seq_len, theta, query.device)
    cos, sin = cos[:seq_len], sin[:seq_len]  # (seq, 1, head_dim / 2)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


@lru_cache(maxsize=16)  # so that all layers and all calls share the same tables
def rotary_tables(
    head_dim: int, max_seq_len: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute the cosine and the sine of every angle.

    Returns:
        cos, sin: (max_seq_len, 1, head_dim / 2) each, float32; the axis of size 1 broadcasts over
            the heads.
    """
    # The cached tables are used again by later calls. If the first call is inside
    # torch.inference_mode, tables made in that mode could not be used in training later.
    with torch.inference_mode(False):
        even_indices = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)  # 2i
        # (head_dim / 2,), radians per position
        frequencies = 1.0 / theta ** (even_indices / head_dim)
        positions = torch.arange(max_seq_len, device=device, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)[:, None, :]  # (max_seq_len, 1, head_dim / 2)
        return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of features of x in float32; the result has the dtype of x."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (batch, seq, heads, head_dim / 2)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)  # (batch, seq, heads, head_dim)
