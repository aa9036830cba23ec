"""Measure time, peak memory, and the peak rates of the machine."""

import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
import transformers

from benchmarks.machine import peak_resident, processor

LONG = 0.005  # seconds; the next size takes up to 64 times as long, and ten times in all
Work = Callable[[], float | None]  # may return the seconds that count
MakeWork = Callable[..., Work]  # (*what, device)


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_in_turn(works: Sequence[Work], rounds: int, device: torch.device) -> list[float]:
    """Return the median seconds of one call of each work.

    Every round calls each work once, and every second round in the opposite order, so that
    disturbances on the machine affect all of them alike. If a work returns seconds, those count.
    """
    times: list[list[float]] = [[] for _ in works]
    for work in works:
        work()  # warm up
    order = list(range(len(works)))
    for _ in range(rounds):
        for i in order:
            wait(device)
            start = time.perf_counter()
            seconds = works[i]()
            wait(device)
            times[i].append(time.perf_counter() - start if seconds is None else seconds)
        order.reverse()
    return [statistics.median(series) for series in times]


def peak_memory(make_work: MakeWork, what: Sequence[object], device: torch.device) -> float:
    """Return the peak memory, in GiB, of a new process that does the work once.

    That is the memory of the GPU, or the resident memory if the work runs on the CPU.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(_peak_memory, make_work, what, device).result()


def quiet_transformers() -> None:
    """Let transformers print neither warnings nor progress bars."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _peak_memory(make_work: MakeWork, what: Sequence[object], device: torch.device) -> float:
    quiet_transformers()
    make_work(*what, device)()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    peak = peak_resident()
    if peak is not None:
        return peak / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the FLOP/s of a product of two square matrices; returns the best of three sizes.

    A size is left out if a single product of the size before took longer than `LONG`, as it does
    for bfloat16 on a processor without units for it.
    """
    best = seconds = 0.0
    for size in (256, 1024, 2048):
        if seconds > LONG:
            break
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

        def product(a: torch.Tensor = a, b: torch.Tensor = b) -> None:
            torch.matmul(a, b)

        (seconds,) = time_in_turn([product], 9, device)
        best = max(best, 2 * size**3 / seconds)
    return best


def memory_rate(device: torch.device) -> float:
    """Measure the bytes/s at which a matrix-vector product reads a float32 matrix of 256 MiB."""
    matrix = torch.randn(8192, 8192, device=device).t()
    vector = torch.randn(8192, device=device)

    def product() -> None:
        torch.mv(matrix, vector)

    (seconds,) = time_in_turn([product], 9, device)
    return matrix.numel() * 4 / seconds


def describe_machine(device: torch.device) -> str:
    """Return hardware, versions and date, for the head of the results."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{processor()}, {torch.get_num_threads()} threads"
    return (
        f"{machine}; Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"transformers {transformers.__version__}; {time.strftime('%Y-%m-%d')}"
    )
