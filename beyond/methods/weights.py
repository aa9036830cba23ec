"""What ingredients share that choose which weights train, or which weights are kept."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def replaced(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Let parameters have other values in the block, and after it their own again, bit for bit.

    The values are copied into the parameters, so whoever refers to a parameter sees them.
    """
    own = [parameter.detach().clone() for parameter in parameters]
    copy(values, parameters)
    try:
        yield
    finally:  # also if the evaluation is interrupted
        copy(own, parameters)


@torch.no_grad()
def copy(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Copy values into parameters."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def trained(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters of modules that train, each once."""
    return [p for p in nn.ModuleList(modules).parameters() if p.requires_grad]


def only_trained(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parameter groups without the parameters that do not train."""
    return [
        {**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups
    ]
