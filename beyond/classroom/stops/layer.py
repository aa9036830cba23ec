"""A layer, opened up: each step on its way, checked against the layer itself."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.testing import assert_close

from llama import LlamaLayer
from rope import apply_rotary_emb


class OpenedLayer(NamedTuple):
    """What a layer computes on its way, for one row of tokens."""

    normed: Tensor  # (seq, dim)
    query: Tensor  # (seq, n_heads, head_dim), before it is rotated
    key: Tensor  # (seq, n_kv_heads, head_dim), before it is rotated
    rotated_query: Tensor
    scores: Tensor  # (n_heads, seq, seq)
    weights: Tensor  # the same
    averages: Tensor  # (seq, n_heads, head_dim)
    attended: Tensor  # (seq, dim)
    middle: Tensor  # (seq, dim)
    gate: Tensor  # (seq, hidden_dim)
    up: Tensor  # (seq, hidden_dim)
    fed: Tensor  # (seq, dim)
    result: Tensor  # (seq, dim)


def open_layer(layer: LlamaLayer, x: Tensor) -> OpenedLayer:
    """Compute a layer for x (seq, dim) by elementary steps; raises unless the layer agrees."""
    attention, feed_forward, config = layer.attention, layer.feed_forward, layer.attention.config
    normed = x / torch.sqrt((x**2).mean(-1, keepdim=True) + config.layer_norm_eps)
    normed = normed * layer.attention_norm.weight
    matrices = (attention.compute_query, attention.compute_key, attention.compute_value)
    query, key, value = (matrix(normed).unflatten(-1, (-1, config.head_dim)) for matrix in matrices)
    rotated_query, rotated_key = rotate(layer, query, key)
    keys = rotated_key.repeat_interleave(config.n_rep, dim=1)
    values = value.repeat_interleave(config.n_rep, dim=1)
    scores = torch.einsum("ihd,jhd->hij", rotated_query, keys) / math.sqrt(config.head_dim)
    closed = torch.ones(len(x), len(x)).triu(1).bool() & config.causal
    weights = scores.masked_fill(closed, -math.inf).softmax(dim=-1)
    averages = torch.einsum("hij,jhd->ihd", weights, values)
    attended = attention.compute_output(averages.flatten(1))
    middle = x + attended
    gate, up = (w(layer.ffn_norm(middle)) for w in (feed_forward.w1, feed_forward.w3))
    fed = feed_forward.w2(gate * torch.sigmoid(gate) * up)
    result = middle + fed
    assert_close(attended, attention(layer.attention_norm(x[None]))[0])
    assert_close(result, layer(x[None])[0])
    parts = (normed, query, key, rotated_query, scores, weights, averages)
    return OpenedLayer(*parts, attended, middle, gate, up, fed, result)


def rotate(layer: LlamaLayer, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate query and key (seq, heads, head_dim), as the layer's attention does."""
    config = layer.attention.config
    limits = (config.head_dim, config.max_seq_len, config.rope_theta)
    rotated = apply_rotary_emb(query[None], key[None], *limits)
    return rotated[0][0], rotated[1][0]
