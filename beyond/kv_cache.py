"""The key/value cache of one layer."""

import numpy as np
import torch
from torch import Tensor

from beyond.kernels import MEMORY


class KVCache:
    """Keys and values of one layer for the positions so far, so that none is computed twice.

    They are stored in float32 whatever the model's dtype: the products with one float32 query are
    the fastest on every processor, although they read twice as much.

    Args:
        capacity: positions that it can hold; the first use allocates memory for all of them.

    Attributes:
        length: positions that it holds.
        keys, values: (batch, n_kv_heads, capacity, head_dim), from the first use on.
        row: (2, n_kv_heads, capacity, head_dim), keys and values of the first row.
        array: `row` as a NumPy array, on the CPU.
    """

    keys: Tensor
    values: Tensor
    row: Tensor
    array: np.ndarray

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the next positions and return all keys and values so far.

        Args:
            key, value: (batch, n_kv_heads, seq, head_dim).

        Returns:
            (batch, n_kv_heads, length, head_dim) each, float32.

        Raises:
            ValueError: they do not fit, or more than one position is added to a cache that is not
                empty (they would need a causal mask).
        """
        batch, n_kv_heads, seq, head_dim = key.shape
        start, end = self.length, self.length + seq
        self.check_end(end)
        if start and seq > 1:
            raise ValueError(f"after its first use a cache takes one position at a time, not {seq}")
        if start == 0:
            shape = (2, batch, n_kv_heads, self.capacity, head_dim)
            if key.device.type == "cpu":
                both = MEMORY.alone(shape, torch.float32)  # keys and values
                self.array = both[:, 0].numpy()
            else:
                both = key.new_empty(shape, dtype=torch.float32)
            self.keys, self.values = both
            self.row = both[:, 0]
            self.transposed_keys, self.row_values = self.row[0].transpose(1, 2), self.row[1]
        self.keys[:, :, start:end] = key
        self.values[:, :, start:end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def append(self, key_value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the next position of the first row, in few operations; `extend` was called before.

        Args:
            key_value: (2, n_kv_heads, head_dim), the key and the value.

        Returns:
            keys: (n_kv_heads, head_dim, length).
            values: (n_kv_heads, length, head_dim).

        Raises:
            ValueError: it does not fit.
        """
        self.row.select(2, self.add_position()).copy_(key_value)
        return (
            self.transposed_keys.narrow(2, 0, self.length),
            self.row_values.narrow(1, 0, self.length),
        )

    def add_position(self) -> int:
        """Count the next position of the first row, and return its index.

        `extend` was called before.

        Raises:
            ValueError: it does not fit.
        """
        self.check_end(self.length + 1)
        self.length += 1
        return self.length - 1

    def check_end(self, end: int) -> None:
        """Raise ValueError unless `end` positions fit."""
        if end > self.capacity:
            raise ValueError(f"{end} positions do not fit a cache of {self.capacity}")
