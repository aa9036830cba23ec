"""Measure the rows of a benchmark and print them as a table."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import transformers

from benchmarks.measure import (
    describe_machine,
    matrix_rate,
    memory_rate,
    peak_memory,
    time_in_turn,
)
from benchmarks.works import (
    DTYPES,
    NEW_TOKENS,
    make_llama,
    make_work,
    missing_inputs,
    sample_batches,
)
from beyond.runtime import resolve_device
from utils import at_least_one

HEAD = """\
| work | side | baseline | speedup | target | speed | of baseline | unit | utilisation | GiB |
|---|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Row:
    """One comparison of two sides that do the same work."""

    task: str
    data: str
    side: str  # see `works.make_work`
    baseline: str  # the side that it is compared with
    target: float | None = None  # the speedup that this project aims for


def count_units(row: Row, side: str) -> float:
    """Return how many tokens or sentences one call of the work processes."""
    if row.task == "generate":
        return NEW_TOKENS
    return sample_batches(row.task, row.data, side.startswith("causal"))[1]


@cache
def peak_rate(what: str, device: torch.device) -> float:
    """Return the peak rate of memory in bytes/s, or of products in a dtype in FLOP/s."""
    return memory_rate(device) if what == "memory" else matrix_rate(DTYPES[what], device)


def describe_peak_rates(device: torch.device) -> str:
    """Return the peak rates of the machine, for the head of the results."""
    return (
        f"matrix products {peak_rate('float32', device) / 1e9:.0f} GFLOP/s in float32, "
        f"{peak_rate('bfloat16', device) / 1e9:.0f} in bfloat16; "
        f"memory {peak_rate('memory', device) / 1e9:.0f} GB/s"
    )


def utilisation(row: Row, seconds: float, device: torch.device) -> str:
    """Return which part of the peak rate the side reaches.

    Generation reads each weight once per token. The other tasks multiply each weight of the layers
    with each token that is not padding, and training does so three times as often as evaluation.
    """
    llama = make_llama(causal=True)
    parameters = sum(parameter.numel() for parameter in llama.parameters())
    dtype = row.side.split(" ")[-1]
    if row.task == "generate":
        if row.side.startswith("reference"):
            return ""
        size = {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
        rate = NEW_TOKENS * parameters * size / seconds
        return f"{rate / peak_rate('memory', device):.0%} of memory"
    batches, _ = sample_batches(row.task, row.data, row.side.startswith("causal"))
    tokens = sum(int(lengths.sum()) for _, lengths, _ in batches)
    in_layers = parameters - llama.output.weight.numel()
    rate = (6 if row.task == "finetune" else 2) * in_layers * tokens / seconds
    return f"{rate / peak_rate(dtype, device):.0%} of {dtype}"


def measure(row: Row, rounds: int, device: torch.device) -> str:
    """Measure both sides of a row; returns its line of the table."""
    sides = (row.side, row.baseline)
    memory = [peak_memory(make_work, (row.task, row.data, side), device) for side in sides]
    seconds = time_in_turn(
        [make_work(row.task, row.data, side, device) for side in sides], rounds, device
    )
    speeds = [count_units(row, side) / s for side, s in zip(sides, seconds, strict=True)]
    cells = [
        f"{row.task} {row.data}".strip(),
        *sides,
        f"**{speeds[0] / speeds[1]:.2f}**",
        f"{row.target}" if row.target else "",
        *(f"{speed:.3g}" for speed in speeds),
        "tokens/s" if row.task == "generate" else "sentences/s",
        utilisation(row, seconds[0], device),
        f"{memory[0]:.2f} / {memory[1]:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def lines(rows: Iterable[Row], rounds: int, device: torch.device) -> Iterator[str]:
    """Yield the lines of the table, each as soon as it is measured."""
    yield from HEAD.split("\n")
    for row in rows:
        yield measure(row, rounds, device)


def parse_args(doc: str | None) -> argparse.Namespace:
    """Parse the flags that all benchmarks share; end the program if an input is missing."""
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--use_gpu", action="store_true", help="run on CUDA")
    parser.add_argument(
        "--rounds", type=at_least_one, default=5, help="rounds per row (default: %(default)s)"
    )
    args = parser.parse_args()
    if missing := missing_inputs():
        parser.error(f"{missing[0]}: no such file; get it with: uv run python data/download.py")
    return args


def main(rows: Sequence[Row], doc: str | None) -> int:
    """Measure some rows and print their table."""
    args = parse_args(doc)
    device = resolve_device(args.use_gpu)
    print(f"{describe_machine(device)}; {describe_peak_rates(device)}\n")
    for line in lines(rows, args.rounds, device):
        print(line, flush=True)
    return 0
