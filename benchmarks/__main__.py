"""Measure speed and memory; prints tables and writes `benchmarks/RESULTS.md` and its pictures.

    uv run python -m benchmarks [--llama2c FOLDER] [--smollm2 FOLDER] [--use_gpu] [--rounds N]

Takes about twenty minutes on two cores; no other program should use them meanwhile. With
`--only TEXT` a part is measured, and nothing is written: `--only "generate 200"`.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from benchmarks import growth, llama2c, rows
from benchmarks.measure import describe_machine, quiet_transformers
from benchmarks.table import (
    HEAD,
    Progress,
    Setting,
    describe_peak_rates,
    measure,
    peak_rate,
)
from benchmarks.works import can_compile, make_llama, missing_inputs, read_llama
from beyond.program import exit_status
from beyond.runtime import resolve_device
from utils import OneLineParser, at_least_one, describe_error, open_atomically, prepare_output

FOLDER = Path(__file__).parent
PROGRAM = "python -m benchmarks"
MEMORY_SECONDS = 12.0  # roughly, to measure the memory of a side
CONTEXT_SECONDS, STEP_SECONDS = 24.0, 22.0  # roughly, of one call of all sides
INTRODUCTION = """\
# Benchmark results

Measured by `uv run python -m benchmarks`. The model has the shape of `stories42M.pt` and random
weights, or is SmolLM2 where that is said. It generates greedily, *new tokens* after a context of
random tokens or after the assignment's prompt. Its speed is that of the new tokens after the first
one, for all sides. It reads real sentences of SST and CFIMDB in the assignment's batch sizes. Times
are medians of {rounds} rounds, for CFIMDB of {quick}; in each round all sides of the same work run,
one after the other.

- *speedup*: the speed of *side* divided by the speed of *baseline*, in the same run.
- *target*: the speedup that this project aims for. 3.5 is for a processor with AMX.
- *causal* and *reference* are this project's two modes; *compiled* is causal with `--compile`.
- *utilisation*: the part of the machine's peak rate that *side* reaches. The peak is measured in
  the same run. For generation it is the memory bandwidth, and each weight is read once per token.
  For the other tasks it is the rate of large matrix products, and padding does not count as work.
- *GiB*: the peak memory of a process that does only this work, *side* / *baseline*.
- On CUDA, float32 products use TF32 on all sides but *reference*, as the program does.
{notes}
{machine}
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: an argument is wrong.
    """
    parser = OneLineParser(prog=PROGRAM, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--use_gpu", action="store_true", help="run on CUDA")
    parser.add_argument(
        "--rounds", type=at_least_one, default=7, help="rounds per row (default: %(default)s)"
    )
    parser.add_argument(
        "--llama2c",
        type=Path,
        metavar="FOLDER",
        help="compare with llama2.c: the folder of its source, run.c and runq.c",
    )
    parser.add_argument(
        "--smollm2",
        type=Path,
        metavar="FOLDER",
        help="compare with Hugging Face on SmolLM2: the folder of its model",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="measure only rows whose work or sides contain TEXT; writes nothing without --output",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="write there (default: benchmarks/)"
    )
    args = parser.parse_args(argv)
    if args.llama2c is not None:
        if args.use_gpu:
            raise ValueError("--llama2c: llama2.c computes on the CPU; leave out --use_gpu")
        llama2c.check(args.llama2c)
    if args.smollm2 is not None:
        try:
            read_llama(str(args.smollm2))
        except (ValueError, OSError) as error:
            raise ValueError(f"--smollm2: {describe_error(error)}") from None
    if missing := missing_inputs():
        raise FileNotFoundError(
            f"{missing[0]}: no such file; get it with: uv run python data/download.py"
        )
    if args.output is None and not args.only:
        args.output = FOLDER
    if args.output is not None:
        prepare_output(args.output / "RESULTS.md")
    return args


@dataclass(frozen=True)
class Part:
    """A part of the results that is measured at once.

    Attributes:
        what: name, for the progress.
        seconds: roughly, until it is measured.
        heading: lines before those of `measure`.
        measure: yields the lines.
    """

    what: str
    seconds: float
    heading: tuple[str, ...]
    measure: Callable[[], Iterable[str]]


def list_parts(args: argparse.Namespace, setting: Setting) -> list[Part]:
    """Return what is to be measured, in the order of the results."""
    device = setting.device
    parts: list[Part] = []
    for group in rows.choose(device, args.llama2c, args.smollm2, can_compile(device), args.only):
        what = f"{group.job}: {', '.join(group.sides)}"
        seconds = group.seconds * (setting.rounds_of(group.is_quick) + 1)  # the first warms up
        seconds += len(group.sides) * MEMORY_SECONDS
        heading = () if parts else tuple(HEAD.split("\n"))
        parts.append(Part(what, seconds, heading, partial(measure, group, setting)))
    for what, contexts, seconds in (
        ("tokens per second by context", True, CONTEXT_SECONDS),
        ("time of a training step by batch", False, STEP_SECONDS),
    ):
        if args.only in what:
            seconds *= setting.rounds_of(is_quick=not contexts) + 1
            grow = partial(measure_growth, setting, args.output, contexts)
            parts.append(Part(what, seconds, (), grow))
    if not parts:
        raise ValueError(f"--only {args.only}: no row that can be measured here has this text")
    return parts


def measure_growth(setting: Setting, folder: Path | None, contexts: bool) -> list[str]:
    """Measure how times grow, draw it into a folder if one is given, and return it as lines."""
    peak = partial(peak_rate, device=setting.device)
    if contexts:
        times, draw = growth.measure_contexts(setting), growth.draw_contexts
        lines = growth.describe_contexts(times, peak)
    else:
        times, draw = growth.measure_steps(setting), growth.draw_steps
        lines = growth.describe_steps(times, peak, setting.rounds_of(is_quick=True))
    if folder is not None:
        draw(times, folder)
    return lines


def run(args: argparse.Namespace) -> int:
    """Measure everything that the command line asks for, print it, and write it."""
    device = resolve_device(args.use_gpu)
    with ExitStack() as stack:
        peer = None
        if args.llama2c is not None:
            threads = torch.get_num_threads()
            peer = stack.enter_context(
                llama2c.build(args.llama2c, make_llama(causal=True), threads)
            )
        setting = Setting(args.rounds, device, peer)
        parts = list_parts(args, setting)
        progress = Progress([part.seconds for part in parts])
        text = INTRODUCTION.format(
            rounds=args.rounds,
            quick=setting.rounds_of(is_quick=True),
            notes="".join(
                f"{note}\n"
                for note in rows.notes(device, args.llama2c, args.smollm2, can_compile(device))
            ),
            machine=f"{describe_machine(device)}; {describe_peak_rates(device)}",
        )
        text += "\n"  # a table begins after an empty line
        print(text, end="", flush=True)
        for part in parts:
            progress.next(part.what)
            for line in chain(part.heading, part.measure()):
                print(line, flush=True)
                text += f"{line}\n"
    if args.output is not None:
        with open_atomically(args.output / "RESULTS.md") as file:
            file.write(text)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    quiet_transformers()
    return exit_status(PROGRAM, lambda: run(parse_args(argv)), "nothing is written")


if __name__ == "__main__":
    sys.exit(main())
