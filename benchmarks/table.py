"""Measure the rows of a benchmark and print them as a table."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path

import torch

from benchmarks import llama2c
from benchmarks.measure import matrix_rate, memory_rate, peak_memory, time_in_turn
from benchmarks.works import DTYPES, Job, batches_of, make_llama, make_work, precision

HEAD = """\
| work | side | baseline | speedup | target | speed | of baseline | unit | utilisation | GiB |
|---|---|---|---|---|---|---|---|---|---|"""
QUICK_ROUNDS = 3


@dataclass(frozen=True)
class Row:
    """One comparison of two sides that do the same work."""

    side: str  # see `works.make_work`
    baseline: str  # the side that it is compared with
    target: float | None = None  # the speedup that this project aims for


@dataclass(frozen=True)
class Group:
    """Comparisons whose sides are all measured in turn.

    Attributes:
        job: the work.
        rows: the comparisons.
        seconds: roughly, of one call of all sides; tells when the run ends.
        is_quick: whether at most `QUICK_ROUNDS` rounds are measured, to save time.
    """

    job: Job
    rows: tuple[Row, ...]
    seconds: float
    is_quick: bool = False

    @property
    def sides(self) -> list[str]:
        """Return every side once, in the order of the rows."""
        return list(dict.fromkeys(side for row in self.rows for side in (row.side, row.baseline)))


@dataclass(frozen=True)
class Setting:
    """What is the same for all rows."""

    rounds: int
    device: torch.device
    peer: Path | None = None  # the folder of llama2.c's programs

    def rounds_of(self, is_quick: bool) -> int:
        """Return how many rounds are measured."""
        return min(self.rounds, QUICK_ROUNDS) if is_quick else self.rounds


class Progress:
    """Prints on standard error what is measured now, and when all will end.

    The end is estimated from the time that the earlier parts took.

    Args:
        costs: roughly, the seconds of each part.
    """

    def __init__(self, costs: Sequence[float]) -> None:
        self.costs = list(costs)
        self.done = 0
        self.start = time.monotonic()

    def next(self, what: str) -> None:
        """Print that the next part starts."""
        elapsed = time.monotonic() - self.start
        before, left = sum(self.costs[: self.done]), sum(self.costs[self.done :])
        scale = elapsed / before if before else 1.0
        self.done += 1
        now = datetime.now()
        end = now + timedelta(seconds=left * scale)
        print(
            f"{now:%H:%M:%S} {self.done} of {len(self.costs)}: {what}; all ends at about "
            f"{end:%H:%M}",
            file=sys.stderr,
            flush=True,
        )


def count_units(job: Job, side: str) -> float:
    """Return how many tokens or sentences one call of the work processes."""
    return job.new_tokens if job.task == "generate" else batches_of(job, side)[1]


# ------------------------------------------------------------------------------------ peak rates


def peak_rate(what: str, device: torch.device) -> float:
    """Return the peak rate of memory in bytes/s, or of products in a dtype in FLOP/s."""
    return _peak_rate(what, device, torch.get_float32_matmul_precision())


@cache
def _peak_rate(what: str, device: torch.device, precision: str) -> float:
    """Measure a rate once for each precision of float32 products."""
    return memory_rate(device) if what == "memory" else matrix_rate(DTYPES[what], device)


def describe_peak_rates(device: torch.device) -> str:
    """Return the peak rates of the machine, for the head of the results."""
    rates = f"{peak_rate('float32', device) / 1e9:.0f} GFLOP/s in float32"
    if device.type == "cuda":
        with precision("causal", device):
            rates += f", {peak_rate('float32', device) / 1e9:.0f} in TF32"
    return (
        f"matrix products {rates}, {peak_rate('bfloat16', device) / 1e9:.0f} in bfloat16; "
        f"memory {peak_rate('memory', device) / 1e9:.0f} GB/s"
    )


def utilisation(job: Job, side: str, seconds: float, device: torch.device) -> str:
    """Return which part of the peak rate a side reaches.

    Generation reads each weight once per token. The other tasks multiply each weight of the layers
    with each token that is not padding, and training does so three times as often as evaluation.
    """
    llama = make_llama(True, job.model)
    parameters = sum(parameter.numel() for parameter in llama.parameters())
    dtype = side.split(" ")[-1]
    if job.task == "generate":
        if side.startswith("reference"):
            return ""
        size = {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
        rate = job.new_tokens * parameters * size / seconds
        return f"{rate / peak_rate('memory', device):.0%} of memory"
    batches, _ = batches_of(job, side)
    tokens = sum(int(lengths.sum()) for _, lengths, _ in batches)
    in_layers = parameters - llama.output.weight.numel()
    rate = (6 if job.task == "finetune" else 2) * in_layers * tokens / seconds
    with precision(side, device):
        return f"{rate / peak_rate(dtype, device):.0%} of {dtype}"


# ------------------------------------------------------------------------------------ measuring


def side_memory(job: Job, side: str, setting: Setting) -> str:
    """Return the peak memory of a process that does a side's work, in GiB; "" if not known."""
    kind, dtype = side.rsplit(" ", 1)
    if kind == "llama2.c":
        assert setting.peer is not None, "the row is left out without a folder"
        command = llama2c.command_line(setting.peer, dtype, job.new_tokens)
        peak = llama2c.peak_memory(command, torch.get_num_threads())
    else:
        peak = peak_memory(make_work, (job, side), setting.device)
    return "" if peak is None else f"{peak:.2f}"


def measure(group: Group, setting: Setting) -> Iterator[str]:
    """Measure all sides of a group; yields the lines of its rows."""
    job, sides, device = group.job, group.sides, setting.device
    memory = {side: side_memory(job, side, setting) for side in sides}
    works = [make_work(job, side, device, setting.peer) for side in sides]
    times = time_in_turn(works, setting.rounds_of(group.is_quick), device)
    seconds = dict(zip(sides, times, strict=True))
    speeds = {side: count_units(job, side) / seconds[side] for side in sides}
    for row in group.rows:
        cells = [
            str(job),
            row.side,
            row.baseline,
            f"**{speeds[row.side] / speeds[row.baseline]:.2f}**",
            f"{row.target}" if row.target else "",
            f"{speeds[row.side]:.3g}",
            f"{speeds[row.baseline]:.3g}",
            "tokens/s" if job.task == "generate" else "sentences/s",
            utilisation(job, row.side, seconds[row.side], device),
            f"{memory[row.side]} / {memory[row.baseline]}",
        ]
        yield f"| {' | '.join(cells)} |"
