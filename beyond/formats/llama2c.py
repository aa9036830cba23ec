"""Model files of llama2.c (`.bin`): read versions 0, 1 and 2; write versions 0 and 2.

`llama2c_layout.py` has the layout of the files.
"""

import os
from collections.abc import Callable, Collection, Iterable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from beyond.formats.llama2c_layout import (
    EPS,
    HEADER_BYTES,
    TABLES,
    THETA,
    Layout,
    check_size,
    group_size,
    make_header,
    parse_header,
)
from llama import Llama
from rope import rotary_tables
from utils import open_atomically

LARGEST_INT8 = 127
CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------------- reading


def read_llama2c(path: str | Path) -> dict[str, Any]:
    """Read a model file of llama2.c; `Llama.from_checkpoint` makes a model of the result.

    The file is read once, straight into the tensors, after its size was compared with its header.

    Returns:
        The dicts "model" (tensors by name, float32) and "model_args" (causal).

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a model file of llama2.c, is truncated, or goes on after the model.
    """
    with open(path, "rb") as file:
        layout = parse_header(file.read(max(HEADER_BYTES.values())), path)
        check_size(layout, os.fstat(file.fileno()).st_size, path)
        file.seek(HEADER_BYTES[layout.version])
        weights = {name: _read_tensor(file, layout, shape) for name, shape in layout.tensors()}
    for name in TABLES:
        weights.pop(name, None)
    return {"model": weights, "model_args": layout.config.to_model_args()}


def _read_tensor(file: BinaryIO, layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """Read the next tensor, as float32."""
    if not layout.is_quantized(shape):
        return _read_numbers(file, torch.empty(shape))
    group_shape = (prod(shape) // layout.group_size, layout.group_size)
    groups = _read_numbers(file, torch.empty(group_shape, dtype=torch.int8))
    scales = _read_numbers(file, torch.empty(len(groups), 1))
    return groups.float().mul_(scales).view(shape)


def _read_numbers(file: BinaryIO, tensor: Tensor) -> Tensor:
    """Fill a tensor with the next numbers of the file."""
    buffer = tensor.numpy().data.cast("B")
    if file.readinto(buffer) < len(buffer):  # type: ignore[attr-defined]
        raise ValueError(f"{file.name}: became shorter while it was read")
    return tensor


# ----------------------------------------------------------------------------------------- writing


def write_llama2c(
    path: str | Path,
    llama: Llama,
    quantize: bool,
    progress: Callable[[Collection[str]], Iterable[str]] = iter,
) -> None:
    """Write a model file of llama2.c, completely or not at all.

    What the format does not say is lost: that a model is not causal (llama2.c's always are), and
    its dropout.

    Args:
        path: the file.
        llama: the model.
        quantize: write version 2, int8, for llama2.c's `runq`; else version 0, float32, for `run`.
        progress: called with the names of the tensors; one is written when it yields its name.

    Raises:
        OSError: the file cannot be written.
        ValueError: the model has another RoPE base or epsilon than llama2.c.
    """
    config = llama.config
    for field, constant in (("rope_theta", THETA), ("layer_norm_eps", EPS)):
        if np.float32(getattr(config, field)) != np.float32(constant):
            raise ValueError(
                f"{path}: cannot store {field}={getattr(config, field)}: in llama2.c it is always "
                f"{constant}; choose another format"
            )
    layout = Layout(2, config, group_size(config)) if quantize else Layout(0, config)
    # PyTorch's float32 tables are, bit for bit, those that llama2.c's Python code has written.
    tables = rotary_tables(config.head_dim, config.max_seq_len, THETA, CPU)
    weights = {**llama.state_dict(), **dict(zip(TABLES, tables, strict=True))}
    shapes = dict(layout.tensors())
    with open_atomically(path, "wb") as file:
        file.write(make_header(layout))
        for name in progress(list(shapes)):
            weight = weights[name].detach().to(CPU, torch.float32).contiguous()
            stored = [weight]
            if layout.is_quantized(shapes[name]):
                stored = _quantize(weight.view(-1, layout.group_size))
            for tensor in stored:
                file.write(tensor.numpy().data)


def _quantize(groups: Tensor) -> list[Tensor]:
    """Quantize each row of (groups, group size) to int8, as export.py's `quantize_q80` does.

    Returns:
        The numbers, int8, and the scales (groups,), float32.
    """
    scales = groups.abs().amax(dim=1) / LARGEST_INT8
    divisors = torch.where(scales > 0, scales, 1.0)  # a group of zeros stays zero
    numbers = (groups / divisors[:, None]).round().clamp(-LARGEST_INT8, LARGEST_INT8)
    return [numbers.to(torch.int8), scales]
