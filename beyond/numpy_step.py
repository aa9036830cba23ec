"""The step of one token in float32, in NumPy.

The step is some twenty operations for each layer. Most are on a few hundred numbers, for which a
call of PyTorch takes several times as long as the work itself, and a call of NumPy does not. For
matrix products, NumPy's BLAS is as fast as the fastest kernel of PyTorch (on the processors that
were tried).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from beyond.kv_cache import KVCache
from config import LlamaConfig

Array = np.ndarray


class NumpyStep:
    """Computes a `DecodingLlama` in float32, one token of one row at a time, on the CPU.

    It computes in memory of its own, so two threads must not use it at the same time.

    Args:
        config: of the model.
        layers: of each layer query_key_value, output, gate_up and down, (out, in), float32.
        head: (vocab, dim), float32.
        rotations: (max_seq_len, head_dim / 2), complex.
    """

    capacity = None  # it takes caches of any capacity

    def __init__(
        self,
        config: LlamaConfig,
        layers: Sequence[Sequence[Tensor]],
        head: Tensor,
        rotations: Tensor,
    ) -> None:
        self.config = config
        self.layers = [[matrix.numpy() for matrix in matrices] for matrices in layers]
        self.head = head.numpy()
        self.rotations = rotations.numpy()
        # Memory that all layers use, one after the other.
        num_heads = config.n_heads + 2 * config.n_kv_heads
        self.heads = np.empty((num_heads, config.head_dim), np.float32)
        num_rotated = config.n_heads + config.n_kv_heads
        self.pairs = self.heads[:num_rotated].view(np.complex64)  # of features, to be rotated
        self.query = self.heads[: config.n_heads].reshape(config.n_kv_heads, config.n_rep, -1)
        self.key_value = self.heads[config.n_heads :].reshape(2, config.n_kv_heads, -1)
        self.gate_up = np.empty((2, config.hidden_dim), np.float32)
        self.sums = np.empty(config.dim, np.float32)

    def compute_hidden(self, h: Tensor, caches: Sequence[KVCache]) -> Tensor:
        """Compute the layers for the next position, at h (dim,), float32; returns the new h."""
        x = h.numpy()
        rotation = self.rotations[caches[0].length]
        with np.errstate(all="ignore"):  # infinite or NaN logits are an error later
            for matrices, cache in zip(self.layers, caches, strict=True):
                self.compute_layer(x, rotation, cache, *matrices)
        return h

    def compute_layer(
        self,
        x: Array,
        rotation: Array,
        cache: KVCache,
        query_key_value: Array,
        output: Array,
        gate_up: Array,
        down: Array,
    ) -> None:
        """Compute `DecodingLayer.step`: x (dim,) is replaced by its new value."""
        np.dot(query_key_value, x, out=self.heads.reshape(-1))
        self.heads *= self.inverse_norm(x)
        self.pairs *= rotation
        position = cache.add_position()
        cache.array[:, :, position] = self.key_value
        keys, values = cache.array[:, :, : position + 1]  # (n_kv_heads, positions, head_dim)
        weights = np.matmul(self.query, keys.transpose(0, 2, 1))  # (n_kv_heads, n_rep, positions)
        weights -= weights.max(axis=-1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(axis=-1, keepdims=True)
        np.dot(output, np.matmul(weights, values).reshape(-1), out=self.sums)
        x += self.sums
        np.dot(gate_up, x, out=self.gate_up.reshape(-1))
        self.gate_up *= self.inverse_norm(x)
        gate, up = self.gate_up
        gate /= 1 + np.exp(-gate)  # SiLU
        gate *= up
        np.dot(down, gate, out=self.sums)
        x += self.sums

    def inverse_norm(self, x: Array) -> np.float32:
        """Compute the factor of RMSNorm, divided by sqrt(dim), for one vector x (dim,)."""
        return np.float32((np.dot(x, x) + self.config.dim * self.config.layer_norm_eps) ** -0.5)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Compute logits (vocab,) of hidden (dim,), before the final norm."""
        x = hidden.numpy()
        with np.errstate(all="ignore"):
            return torch.from_numpy(np.dot(self.head, x * self.inverse_norm(x)))
