"""Safetensors files: named tensors, read and written one at a time.

| bytes | what |
|---|---|
| 0 to 7 | n, the size of the header: uint64, little-endian |
| 8 to 7 + n | JSON: `{tensor: {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}}` |
| the rest | the tensors, little-endian, without gaps; the offsets count from here |

The header may also have `"__metadata__"`, an object of strings. Source:
github.com/huggingface/safetensors, README.md, "Format". The library checks the header of a file
that is read. The writer is our own, because the library's needs all tensors at once.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beyond.formats.optional import import_library

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a file with the library, whose errors become a ValueError that begins with `path`."""
    library = import_library("safetensors", path)
    try:
        with library.safe_open(path, framework="pt") as file:
            yield file
    except (library.SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as safetensors: {reason}") from None


def locate_tensors(paths: Iterable[Path]) -> dict[str, Path]:
    """Return the file of each tensor; raises ValueError if two have the same name."""
    files: dict[str, Path] = {}
    for path in paths:
        with open_safetensors(path) as file:
            for name in file.keys():
                if name in files:
                    raise ValueError(f"{path}: {name[:100]!r} is also in {files[name]}")
                files[name] = path
    return files


def read_tensor(path: Path, name: str, shape: Sequence[int]) -> Tensor:
    """Read a tensor as float32, in memory of its own.

    Raises ValueError, before it is read, if it is stored with another shape or dtype.
    """
    # The file is open for this tensor only: while it is open, the pages read count as memory.
    with open_safetensors(path) as file:
        stored = file.get_slice(name)
        if list(stored.get_shape()) != list(shape):
            found = tuple(stored.get_shape())
            raise ValueError(f"{path}: {name} has shape {found}, expected {tuple(shape)}")
        if (dtype := stored.get_dtype()) not in DTYPES:
            raise ValueError(f"{path}: {name} is stored as {dtype}; read are {', '.join(DTYPES)}")
        return file.get_tensor(name).to(torch.float32, copy=True)


def write_safetensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    tensors: Iterable[Tensor],
    dtype: torch.dtype,
) -> None:
    """Write tensors.

    Args:
        path: of the file.
        shapes: of the tensors, by name, in the order of the file.
        tensors: in the same order; each is made only when it is written.
        dtype: in which they are stored.

    Raises:
        ValueError: a number is not finite in `dtype`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which transformers asks for
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)  # so that the tensors are aligned
    with open(path, "wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for name, tensor in zip(shapes, tensors, strict=True):
            tensor = tensor.to("cpu", dtype).contiguous()
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds a number that is not finite in {dtype}")
            file.write(tensor.view(torch.uint8).numpy())
