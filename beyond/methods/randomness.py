"""Random numbers of the ingredients, which leave PyTorch's global generators as they were.

Head, order of the data and dropout of the plain forward pass then depend on the run's seed alone,
whatever the ingredients draw, so runs with the same seed can be compared in pairs.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from beyond.run import get_random_state, set_random_state


def derive_seed(*key: str | int) -> int:
    """Return a seed of 64 bits that depends on the whole key; other keys have other seeds."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8])


def make_generator(device: torch.device, *key: str | int) -> torch.Generator:
    """Return a generator whose random numbers depend on its device and the key alone."""
    return torch.Generator(device).manual_seed(derive_seed(*key))


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the state of PyTorch's global generators at the end of the block."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)
