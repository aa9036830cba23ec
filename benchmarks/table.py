"""A benchmark's rows, measured and printed as a table."""

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
from benchmarks.works import DTYPES, NEW_TOKENS, make_llama, make_work, sample_batches
from utils import at_least_one, resolve_device

HEAD = """\
| work | side | beside | times as fast | aim | speed | beside | unit | of the ceiling | GiB |
|---|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    task: str
    data: str
    side: str  # see `works.make_work`
    beside: str
    aim: float | None = None  # how many times as fast the side should be


def count_units(row: Row, side: str) -> float:
    """Tokens or sentences that one call of the work goes through."""
    if row.task == "generate":
        return NEW_TOKENS
    return sample_batches(row.task, row.data, side.startswith("causal"))[1]


@cache
def ceiling(what: str, device: torch.device) -> float:
    """The machine's memory rate in bytes/s, or its matrix rate of a dtype in FLOP/s."""
    return memory_rate(device) if what == "memory" else matrix_rate(DTYPES[what], device)


def describe_ceilings(device: torch.device) -> str:
    """The rates that shares are of."""
    return (
        f"products {ceiling('float32', device) / 1e9:.0f} GFLOP/s in float32, "
        f"{ceiling('bfloat16', device) / 1e9:.0f} in bfloat16; "
        f"memory {ceiling('memory', device) / 1e9:.0f} GB/s"
    )


def share_of_ceiling(row: Row, seconds: float, device: torch.device) -> str:
    """What the side's work takes of what the machine can do.

    Generating reads each weight once a token; the rest multiplies each weight of the layers with
    each token that is no padding, three times as often in training as in evaluation.
    """
    llama = make_llama(causal=True)
    parameters = sum(parameter.numel() for parameter in llama.parameters())
    dtype = row.side.split(" ")[-1]
    if row.task == "generate":
        if row.side.startswith("reference"):
            return ""
        size = {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
        rate = NEW_TOKENS * parameters * size / seconds
        return f"{rate / ceiling('memory', device):.0%} of memory"
    batches, _ = sample_batches(row.task, row.data, row.side.startswith("causal"))
    tokens = sum(int(lengths.sum()) for _, lengths, _ in batches)
    in_layers = parameters - llama.output.weight.numel()
    rate = (6 if row.task == "finetune" else 2) * in_layers * tokens / seconds
    return f"{rate / ceiling(dtype, device):.0%} of {dtype}"


def measure(row: Row, rounds: int, device: torch.device) -> str:
    """The row's line of the table."""
    sides = (row.side, row.beside)
    memory = [peak_memory(make_work, (row.task, row.data, side), device) for side in sides]
    seconds = time_in_turn(
        [make_work(row.task, row.data, side, device) for side in sides], rounds, device
    )
    speeds = [count_units(row, side) / s for side, s in zip(sides, seconds, strict=True)]
    cells = [
        f"{row.task} {row.data}".strip(),
        *sides,
        f"**{speeds[0] / speeds[1]:.2f}**",
        f"{row.aim}" if row.aim else "",
        *(f"{speed:.3g}" for speed in speeds),
        "tokens/s" if row.task == "generate" else "sentences/s",
        share_of_ceiling(row, seconds[0], device),
        f"{memory[0]:.2f} / {memory[1]:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def lines(rows: Iterable[Row], rounds: int, device: torch.device) -> Iterator[str]:
    """The table, line by line as it is measured."""
    yield from HEAD.split("\n")
    for row in rows:
        yield measure(row, rounds, device)


def parse_args(doc: str | None) -> argparse.Namespace:
    """The options that all benchmarks share."""
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--use_gpu", action="store_true")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="default: %(default)s")
    return parser.parse_args()


def main(rows: Sequence[Row], doc: str | None) -> int:
    """Measure some rows and print their table."""
    args = parse_args(doc)
    device = resolve_device(args.use_gpu)
    print(f"{describe_machine(device)}; {describe_ceilings(device)}\n")
    for line in lines(rows, args.rounds, device):
        print(line, flush=True)
    return 0
