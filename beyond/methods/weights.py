"""Helpers for ingredients that choose which weights train, or which weights are kept."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def replaced(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Let parameters have other values in the block, and after it their own again, bit for bit.

    Nothing is copied: in the block a parameter uses the memory of its value, so whoever refers to
    the parameter sees the value. Nothing in the block may change a parameter.
    """
    own = [parameter.data for parameter in parameters]
    set_data(parameters, values)
    try:
        yield
    finally:  # also if the evaluation is interrupted
        set_data(parameters, own)


def set_data(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Let parameters use the memory of values."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value.detach()


def trained(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters of modules that train, each once."""
    return [p for p in nn.ModuleList(modules).parameters() if p.requires_grad]


def only_trained(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parameter groups without the parameters that do not train."""
    return [
        {**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups
    ]
