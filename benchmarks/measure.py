"""Timing, memory, and the machine's ceilings: what all benchmarks share."""

import multiprocessing
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

Work = Callable[[], object]
MakeWork = Callable[..., Work]  # (*what, device)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_in_turn(works: Sequence[Work], rounds: int, device: torch.device) -> list[float]:
    """Median seconds of one call of each work.

    Every round calls each work once, each second round in the opposite order, so that what else
    happens on the machine meets all of them alike.
    """
    times: list[list[float]] = [[] for _ in works]
    for work in works:
        work()  # warm up
    order = list(range(len(works)))
    for _ in range(rounds):
        for i in order:
            wait(device)
            start = time.perf_counter()
            works[i]()
            wait(device)
            times[i].append(time.perf_counter() - start)
        order.reverse()
    return [statistics.median(series) for series in times]


def peak_memory(make_work: MakeWork, what: Sequence[object], device: torch.device) -> float:
    """GiB of a fresh process that does the work twice: of the GPU, or resident."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (make_work, what, device))


def _peak_memory(make_work: MakeWork, what: Sequence[object], device: torch.device) -> float:
    work = make_work(*what, device)
    for _ in range(2):
        work()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    # Not getrusage's maximum: on Linux that is the parent's, where the parent's was larger.
    status = Path("/proc/self/status")
    if status.exists():
        (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())
        return int(peak) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a product of two square matrices, the best of two sizes."""
    best = 0.0
    for size in (1024, 2048):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

        def product(a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
            return a @ b

        (seconds,) = time_in_turn([product], 9, device)
        best = max(best, 2 * size**3 / seconds)
    return best


def memory_rate(device: torch.device) -> float:
    """Bytes/s at which a float32 matrix of 256 MiB streams through a product with a vector."""
    matrix = torch.randn(8192, 8192, device=device).t()
    vector = torch.randn(8192, device=device)
    (seconds,) = time_in_turn([lambda: torch.mv(matrix, vector)], 9, device)
    return matrix.numel() * 4 / seconds


def describe_machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        models = [line.split(": ")[1] for line in lines if line.startswith("model name")]
        machine = (
            f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"
        )
    return (
        f"{machine}; Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"transformers {transformers.__version__}; {time.strftime('%Y-%m-%d')}"
    )
