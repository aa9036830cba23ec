"""Compile a function ahead of time, and keep the result as a file for later runs.

PyTorch's AOTInductor generates C++ from a module that `torch.export` has traced. The result is
called faster than a function of `torch.compile`, because it looks nothing up and checks nothing: it
trusts that it gets tensors like those of its example.
"""

import contextlib
import hashlib
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beyond.kernels import cache_folder, processor
from utils import open_atomically

# With CUDA's tools but without a GPU PyTorch would warn, although nothing is amiss.
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: "No CUDA runtime" not in record.getMessage()
)

Compiled = Callable[[list[Tensor]], list[Tensor]]
Arguments = tuple[Tensor | list[Tensor], ...]


class DynamicSize(NamedTuple):
    """A dimension of an argument that may have any size from 2 to `largest`."""

    argument: int
    dim: int
    largest: int


def compile_ahead(
    module: nn.Module, example: Arguments, key: str, dynamic: DynamicSize | None = None
) -> Compiled:
    """Compile the `forward` of a module for this machine, or load what an earlier run compiled.

    Args:
        module: without parameters. Its `forward` returns tensors; it may write to an argument that
            it does not read.
        example: the arguments, on the CPU.
        key: names what the result depends on besides the example and the machine.
        dynamic: the size that may differ from the example's.

    Returns:
        A function from a list of all tensors of the arguments, which it empties, to a list of the
        results. All other sizes, strides and dtypes must be those of the example; with others it
        reads and writes memory that is not its own.

    Raises:
        Exception: the C++ compiler is missing or fails; `is_compiler_error` tells it from others.
    """
    name = file_name(example, f"{type(module).__name__} {key}", dynamic)
    with contextlib.suppress(OSError, RuntimeError):  # no home folder, no such file, a broken one
        if (kept := packages_folder() / name).is_file():
            return load(kept)
    shapes: list[Any] = [[None] * len(x) if isinstance(x, list) else None for x in example]
    if dynamic:
        size = torch.export.Dim("size", min=2, max=dynamic.largest)
        shapes[dynamic.argument] = {dynamic.dim: size}
    with tempfile.TemporaryDirectory(prefix="min-llama-") as folder:
        path = Path(folder, name)
        with torch.no_grad():
            program = torch.export.export(module, example, dynamic_shapes=tuple(shapes))
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        with contextlib.suppress(OSError, RuntimeError):  # then the next run compiles it again
            packages_folder().mkdir(parents=True, exist_ok=True)
            with open_atomically(packages_folder() / name, "wb") as file:
                file.write(path.read_bytes())
        return load(path)


def packages_folder() -> Path:
    """Return the folder of the compiled files.

    Raises:
        RuntimeError: the user has no home folder.
    """
    return cache_folder() / "compiled"


def file_name(example: Arguments, key: str, dynamic: DynamicSize | None) -> str:
    """Return a name that differs wherever the generated code could."""
    threads = torch.get_num_threads()  # each loop is cut for them
    machine = (torch.__version__, processor(), torch.backends.cpu.get_cpu_capability(), threads)
    tensors = [
        [(x.dtype, x.shape, x.stride()) for x in ([x] if isinstance(x, Tensor) else x)]
        for x in example
    ]
    parts = repr((machine, tensors, key, dynamic))
    return f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.pt2"


def load(path: Path) -> Compiled:
    """Load a compiled file.

    Raises:
        RuntimeError: it is broken.
    """
    # A call of the package itself would also search its arguments for tensors, which takes longer.
    return torch._inductor.aoti_load_package(str(path), True).loader.boxed_run
