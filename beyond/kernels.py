"""How a weight matrix is stored, and which kernel multiplies it with one vector.

Decoding a token reads every weight once, so the best kernel is the one that reads memory fastest.
Which one that is differs from processor to processor, and between shapes: the rates differ by a
factor of three. In float32 the kernels are NumPy's, in bfloat16 PyTorch's. `choose_storages`
measures them once for a processor, the libraries' versions, a number of threads, a shape and a
dtype, and keeps the results in the user's cache folder. Kernels add up products in different
orders, so their results differ in the last bits; a choice that is kept makes two equal runs equal
in every bit. Without measurements `DEFAULTS` decides.
"""

import contextlib
import itertools
import json
import math
import mmap
import os
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import open_atomically

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

Shape = tuple[int, int]  # (out, in) of a weight matrix


# --------------------------------------------------------------------------------------- memory


class HugePages:
    """Memory in pages of 2 MiB instead of 4 KiB, where the system has them (Linux).

    Reading a large matrix needs the address of each of its pages. With 4 KiB pages, looking them up
    takes as long as reading: the same kernel reads twice as fast from huge pages.
    """

    PAGE = 2 * 2**20
    CHUNK = 32 * PAGE

    def __init__(self) -> None:
        self.rest = torch.empty(0, dtype=torch.uint8)  # what is left of the last chunk

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor on the CPU, with values that are not set.

        It shares a chunk of memory with others, which is freed when none of them is used and the
        next chunk has begun.
        """
        size = math.prod(shape) * dtype.itemsize
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype)
        if size > len(self.rest):
            self.rest = self.new_chunk(max(size, self.CHUNK))
        taken, self.rest = self.rest[:size], self.rest[-(-size // 64) * 64 :]
        return taken.view(dtype).view(shape)

    def alone(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Do what `empty` does, in memory of its own, which is freed with the tensor.

        What is smaller than a huge page is in pages of 4 KiB.
        """
        size = math.prod(shape) * dtype.itemsize
        if size < self.PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype)
        return self.new_chunk(size).view(dtype).view(shape)

    def copy(self, x: Tensor) -> Tensor:
        """Return a contiguous copy of a tensor; on a GPU `x` itself, made contiguous."""
        if x.device.type != "cpu":
            return x.contiguous()
        return self.empty(tuple(x.shape), x.dtype).copy_(x)

    def new_chunk(self, size: int) -> Tensor:
        """Map memory, which is freed when no tensor uses it; returns (size,), uint8."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        chunk = mmap.mmap(-1, size + self.PAGE, flags=flags)
        with contextlib.suppress(OSError):  # a system that was built without huge pages
            chunk.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(chunk, dtype=torch.uint8)
        start = -memory.data_ptr() % self.PAGE  # a huge page begins at a multiple of its size
        return memory[start : start + size]


MEMORY = HugePages()


# ----------------------------------------------------------------------------------- the storages


class Storage(ABC):
    """A matrix W (out, in), stored for one kernel.

    Attributes:
        stored: the elements of W, in the storage's own layout.
    """

    stored: Tensor

    @property
    @abstractmethod
    def matrix(self) -> Tensor:
        """W, (out, in); not contiguous in every storage."""

    def multiply(self, x: Tensor) -> Tensor:
        """Compute x W^T of several vectors x (n, in): (n, out)."""
        return F.linear(x, self.matrix)

    @abstractmethod
    def multiply_vector(self, x: Tensor, out: Tensor) -> None:
        """Compute W x for one vector x (in,); out (out,) is overwritten."""


class Rows(Storage):
    """A row is contiguous; the kernel is BLAS's gemv, NumPy's in float32."""

    def __init__(self, weight: Tensor) -> None:
        self.stored = MEMORY.copy(weight)

    @property
    def matrix(self) -> Tensor:
        return self.stored

    def multiply_vector(self, x: Tensor, out: Tensor) -> None:
        if x.dtype == torch.float32:
            np.dot(self.stored.numpy(), x.numpy(), out=out.numpy())
        else:
            torch.mv(self.stored, x, out=out)


class Columns(Rows):
    """A column is contiguous; the kernel is BLAS's transposed gemv, NumPy's in float32."""

    def __init__(self, weight: Tensor) -> None:
        self.stored = MEMORY.copy(weight.t()).t()


class ColumnBlocks(Storage):
    """Equal blocks of rows, each stored column by column; the kernel is the batched product."""

    def __init__(self, weight: Tensor, blocks: int) -> None:
        rows = weight.contiguous().view(blocks, len(weight) // blocks, -1)
        self.stored = MEMORY.copy(rows.transpose(1, 2))  # (blocks, in, out / blocks)

    @property
    def matrix(self) -> Tensor:
        return self.stored.transpose(1, 2).flatten(0, 1)  # a copy

    def multiply(self, x: Tensor) -> Tensor:
        products = torch.matmul(x, self.stored)  # (blocks, n, out / blocks)
        return products.transpose(0, 1).reshape(len(x), -1)

    def multiply_vector(self, x: Tensor, out: Tensor) -> None:
        blocks, size, rows = self.stored.shape
        vectors = x.expand(blocks, 1, size)
        torch.bmm(vectors, self.stored, out=out.view(blocks, 1, rows))


class Bags(ColumnBlocks):
    """Small blocks of rows, each stored column by column; the kernel is an embedding bag.

    W x is a sum of W's columns, weighted by x. An embedding bag computes just that: the weighted
    sum of some rows of a table, here of a block's columns, and each block is one bag.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        super().__init__(weight, len(weight) // rows)
        blocks, size, _ = self.stored.shape
        self.table = self.stored.view(-1, rows)
        self.columns = torch.arange(blocks * size, device=weight.device)
        self.starts = torch.arange(0, blocks * size, size, device=weight.device)
        self.factors = torch.empty(blocks, size, dtype=weight.dtype, device=weight.device)

    def multiply_vector(self, x: Tensor, out: Tensor) -> None:
        self.factors.copy_(x)
        factors = self.factors.view(-1)
        sums = F.embedding_bag(
            self.columns, self.table, self.starts, mode="sum", per_sample_weights=factors
        )
        out.copy_(sums.view(-1))


# The storages by name, each with the number that a matrix's `out` must be a multiple of.
STORAGES: Mapping[str, tuple[int, Callable[[Tensor], Storage]]] = {
    "rows": (1, Rows),
    "columns": (1, Columns),
    "8 column blocks": (8, partial(ColumnBlocks, blocks=8)),
    "32 column blocks": (32, partial(ColumnBlocks, blocks=32)),
    "bags of 64 rows": (64, partial(Bags, rows=64)),
    "bags of 128 rows": (128, partial(Bags, rows=128)),
}


FLOAT32_STORAGES = ("rows", "columns")  # those with a kernel of NumPy


def fits(name: str, shape: Shape, dtype: torch.dtype) -> bool:
    """Return whether a storage can hold a matrix of this shape and dtype."""
    return shape[0] % STORAGES[name][0] == 0 and (
        dtype != torch.float32 or name in FLOAT32_STORAGES
    )


def store(name: str, weight: Tensor) -> Storage:
    """Store a matrix in the named way; row by row if its shape or dtype does not fit."""
    shape = (weight.shape[0], weight.shape[1])
    make = STORAGES[name][1] if fits(name, shape, weight.dtype) else Rows
    return make(weight)


# ------------------------------------------------------------------------------------- the choice

# Without measurements, by dtype: fast enough on every processor that was tried.
DEFAULTS = {torch.float32: "columns", torch.bfloat16: "rows"}
Choice = Mapping[Shape, str]  # the storage of each shape; of a shape that is missing: the default


def choose_storages(
    shapes: Sequence[Shape], dtype: torch.dtype, note: Callable[[str], None]
) -> Choice:
    """Return the fastest storage of each shape on this machine, measuring what was not measured.

    Args:
        shapes: (out, in) of all matrices, in the order in which the model reads them.
        dtype: of their weights.
        note: called with one line that says where the choice comes from.

    Returns:
        The choice. It is empty, so that the defaults hold, if it could not be kept for the next
        run, which would then have to measure again and might choose differently, or if other
        programs disturb the measurements.
    """
    try:
        path = results_file()
        measured = read_results(path)
        own = {shape: measured.get(result_key(shape, dtype), {}) for shape in sorted(set(shapes))}
        missing = [shape for shape, rates in own.items() if not rates]
        if missing:
            write_results(path, {})  # before the work, in case this is not possible
    except (OSError, RuntimeError) as error:  # no home folder is a RuntimeError
        note(f"kernels: the defaults, since measurements cannot be kept: {error}")
        return {}
    source = f"kept in {path}"
    if missing:
        start, check = time.perf_counter(), BusyCheck()
        rates = measure(shapes, dtype, check)
        own |= {shape: rates[shape] for shape in missing}
        if check.is_busy:
            note("kernels: the defaults, since other programs use this machine")
            return {}
        source = f"measured in {time.perf_counter() - start:.1f} s and {source}"
        try:
            write_results(path, {result_key(shape, dtype): own[shape] for shape in missing})
        except OSError as error:  # the disk may be full now
            note(f"kernels: the defaults, since measurements cannot be kept: {error}")
            return {}
    choice = {shape: pick(rates, DEFAULTS[dtype]) for shape, rates in own.items()}
    parts = (
        f"{shape[0]}x{shape[1]} {name} {own[shape].get(name, 0):.0f} GB/s"
        for shape, name in choice.items()
    )
    note(f"kernels: {', '.join(parts)}; {source}")
    return choice


class BusyCheck:
    """Finds out whether this process had to wait for processors during `with` blocks.

    Measurements would then say more about the other programs than about the kernels.
    """

    def __init__(self) -> None:
        self.wall, self.waited = 0.0, 0.0  # seconds; what all threads waited is summed

    def __enter__(self) -> None:
        self.start = self.read()

    def __exit__(self, *_: object) -> None:
        wall, waited = self.read()
        self.wall += wall - self.start[0]
        self.waited += waited - self.start[1]

    @property
    def is_busy(self) -> bool:
        """Return whether the threads waited for more than a twentieth of the time."""
        return self.waited > 0.05 * self.wall

    @staticmethod
    def read() -> tuple[float, float]:
        """Return the time, and how long threads that could have run did not, in seconds."""
        waits = []
        for path in Path("/proc/self/task").glob("*/schedstat"):  # on Linux
            with contextlib.suppress(OSError, ValueError, IndexError):  # the thread has just ended
                # Time on a processor, time waiting for one (both in ns), and the number of turns.
                waits.append(int(path.read_text().split()[1]))
        if waits:
            return time.perf_counter(), sum(waits) / 1e9
        running = time.thread_time()  # before the time, since a thread waits at the end of a call
        wall = time.perf_counter()
        return wall, wall - running  # this thread's only


MARGIN = 1.1  # a storage must be this much faster than the default to replace it


def pick(rates: Mapping[str, float], default: str) -> str:
    """Return the storage with the highest rate; the default unless another is clearly faster."""
    best = max(rates, key=lambda name: rates[name])
    return best if rates[best] > MARGIN * rates.get(default, 0.0) else default


MEASURED_BYTES = 256 * 2**20  # of the matrices that a round reads
ROUNDS = 5
WARM_UP = 0.03  # seconds


def measure(
    shapes: Sequence[Shape], dtype: torch.dtype, check: BusyCheck
) -> dict[Shape, dict[str, float]]:
    """Measure all storages that fit each shape.

    Each round measures every storage, since the rate of the memory itself changes with time.

    Args:
        shapes, dtype: as in `choose_storages`.
        check: covers all that is timed.

    Returns:
        GB/s by shape and name of the storage, from the best of five rounds.
    """
    chosen: list[Shape] = []
    left = MEASURED_BYTES
    for shape in shapes:
        left -= shape[0] * shape[1] * dtype.itemsize
        if left >= 0 or shape not in chosen:
            chosen.append(shape)
    rates: dict[Shape, dict[str, float]] = {shape: {} for shape in chosen}
    for _, name in itertools.product(range(ROUNDS), STORAGES):
        for shape, rate in measure_storage(name, chosen, dtype, check).items():
            rates[shape][name] = max(rate, rates[shape].get(name, 0.0))
    return rates


def measure_storage(
    name: str, shapes: Sequence[Shape], dtype: torch.dtype, check: BusyCheck
) -> dict[Shape, float]:
    """Measure one storage; returns GB/s by shape, where it fits.

    The matrices are read as in a model: each once, in their order, after small operations. A kernel
    that reads matrices of one shape again and again can be twice as fast.
    """
    shapes = [shape for shape in shapes if fits(name, shape, dtype)]
    weights = {shape: torch.full(shape, 0.01, dtype=dtype) for shape in shapes}
    vectors = {size: torch.full((size,), 0.01, dtype=dtype) for _, size in shapes}
    outputs = {size: torch.empty(size, dtype=dtype) for size, _ in shapes}
    storages = [store(name, weights[shape]) for shape in shapes]

    def read_all() -> dict[Shape, float]:
        seconds = dict.fromkeys(shapes, 0.0)
        for shape, storage in zip(shapes, storages, strict=True):
            vectors[shape[1]].softmax(0).sum().item()
            start = time.perf_counter()
            storage.multiply_vector(vectors[shape[1]], outputs[shape[0]])
            seconds[shape] += time.perf_counter() - start
        return seconds

    # Threads of another library, that have just stored the weights, look for work for some time.
    end = time.perf_counter() + WARM_UP
    while time.perf_counter() < end:
        read_all()
    with check:
        seconds = read_all()
    sizes = {shape: shapes.count(shape) * weights[shape].nbytes for shape in shapes}
    return {shape: round(sizes[shape] / seconds[shape] / 1e9, 1) for shape in weights}


# ------------------------------------------------------------------------------ measurements kept


def cache_folder() -> Path:
    """Return the folder for what can be computed again: $XDG_CACHE_HOME/min-llama.

    Raises:
        RuntimeError: the user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    # An unset, empty or relative value means ~/.cache (XDG Base Directory Specification 0.8).
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "min-llama"


def results_file() -> Path:
    """Return the file of all measurements."""
    return cache_folder() / "kernels.json"


def result_key(shape: Shape, dtype: torch.dtype) -> str:
    """Return the name of a measurement: all that it depends on."""
    name = str(dtype).removeprefix("torch.")
    threads = f"{torch.get_num_threads()} threads"
    machine = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"
    libraries = f"PyTorch {torch.__version__}; NumPy {np.__version__}"
    return f"{machine}; {libraries}; {threads}; {name} {shape[0]}x{shape[1]}"


def processor() -> str:
    """Return the processor's name, and on Linux its family, model and stepping."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except (OSError, UnicodeDecodeError):
        return platform.processor() or platform.machine()
    values = dict(
        line.replace("\t", "").split(":", 1) for line in first.splitlines() if ":" in line
    )
    names = ("model name", "cpu family", "model", "stepping")
    parts = [values[name].strip() for name in names if name in values]
    return " ".join(parts) or platform.machine()


def read_results(path: Path) -> dict[str, dict[str, float]]:
    """Read all measurements; what is not one is left out, also if that is the whole file."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: rates for key, rates in content.items() if is_result(rates)}


def is_result(rates: object) -> bool:
    """Return whether a value of the file is a rate, above 0, for each of some storages."""
    return (
        isinstance(rates, dict)
        and rates.keys() <= set(STORAGES)
        and len(rates) > 0
        and all(isinstance(rate, float) and 0 < rate < math.inf for rate in rates.values())
    )


def write_results(path: Path, results: Mapping[str, Mapping[str, float]]) -> None:
    """Add measurements to the file; another process reads it before or after this, never between.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomically(path) as file:
        json.dump({**read_results(path), **results}, file, indent=1, sort_keys=True)
        file.write("\n")
