"""Run all benchmarks; prints the tables and writes `benchmarks/RESULTS.md` and its plot.

    uv run python -m benchmarks [--use_gpu] [--rounds N]

Takes about half an hour on two cores; no other program should use them meanwhile.
"""

import sys
from pathlib import Path

import torch

from benchmarks import causal, reference
from benchmarks.measure import describe_machine, time_in_turn
from benchmarks.table import describe_peak_rates, lines, parse_args
from benchmarks.works import NEW_TOKENS, make_work
from beyond.runtime import resolve_device
from utils import open_atomically

FOLDER = Path(__file__).parent
CONTEXTS = (16, 128, 512)  # tokens before the first new one
SIDES = (
    "causal int8",
    "causal bfloat16",
    "causal float32",
    "Hugging Face float32",
    "reference float32",
)
INTRODUCTION = """\
# Benchmark results

Measured by `uv run python -m benchmarks`, on a model with the shape of `stories42M.pt` and random
weights. It generates 75 new tokens, and reads real sentences of SST and CFIMDB in the assignment's
batch sizes. Times are medians of {rounds} rounds; each round runs both sides, one after the other.

- *speedup*: the speed of *side* divided by the speed of *baseline*, in the same run.
- *target*: the speedup that this project aims for.
- *utilisation*: the part of the machine's peak rate that *side* reaches. The peak is measured in
  the same run. For generation it is the memory bandwidth, and each weight is read once per token.
  For the other tasks it is the rate of large matrix products, and padding does not count as work.
- *GiB*: the peak memory of a process that does only this work, *side* / *baseline*.

{machine}
"""


def plot(device: torch.device, rounds: int, path: Path) -> list[str]:
    """Draw tokens per second against the length of the context; returns the same as a table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=110)
    table = ["| context | " + " | ".join(SIDES) + " |", "|---" * (len(SIDES) + 1) + "|"]
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    for context in CONTEXTS:
        works = [make_work("generate", str(context), side, device) for side in SIDES]
        seconds = time_in_turn(works, rounds, device)
        for side, s in zip(SIDES, seconds, strict=True):
            speeds[side].append(NEW_TOKENS / s)
        row = " | ".join(f"{speeds[side][-1]:.3g}" for side in SIDES)
        table.append(f"| {context} | {row} |")
    for side in SIDES:
        axes.plot(CONTEXTS, speeds[side], marker="o", label=side)
    axes.set(xlabel="tokens before the first new one", ylabel="tokens per second", ylim=(0, None))
    axes.set_title(f"Greedy generation of {NEW_TOKENS} tokens, prompt included, 42M parameters")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    return table


def main() -> int:
    """Run the command line; returns the exit status."""
    args = parse_args(__doc__)
    device = resolve_device(args.use_gpu)
    machine = f"{describe_machine(device)}; {describe_peak_rates(device)}"
    text = [INTRODUCTION.format(rounds=args.rounds, machine=machine)]
    for title, rows in (("Reference mode", reference.ROWS), ("Causal mode", causal.ROWS)):
        text.append(f"## {title}\n")
        print(f"\n## {title}\n")
        for line in lines(rows, args.rounds, device):
            print(line, flush=True)
            text.append(line)
        text.append("")
    table = plot(device, args.rounds, FOLDER / "context.png")
    text += ["## Tokens per second by context length\n", *table, ""]
    text.append("![Tokens per second by context length](context.png)")
    print("\n".join(table))
    with open_atomically(FOLDER / "RESULTS.md") as file:
        file.write("\n".join(text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
