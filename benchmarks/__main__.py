"""All benchmarks: prints the tables and writes `benchmarks/RESULTS.md` and the plot beside it.

    uv run python -m benchmarks [--use_gpu] [--rounds N]

About half an hour on two cores, of which nothing else should have any.
"""

import sys
from pathlib import Path

import torch

from benchmarks import causal, reference
from benchmarks.measure import describe_machine, time_in_turn
from benchmarks.table import describe_ceilings, lines, parse_args
from benchmarks.works import NEW_TOKENS, make_work
from utils import open_atomically, resolve_device

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
# Figures

`uv run python -m benchmarks`: the shape of `stories42M.pt` with random weights, real sentences of
SST and CFIMDB in the assignment's batch sizes, 75 new tokens; medians of {rounds} rounds that take
both sides in turn. "Times as fast" is the side's speed over that of what stands beside it, in the
same run. The ceiling is the machine's, measured in the same run: for generating, the memory's rate,
each weight read once a token; for the rest, the rate of large matrix products, padding not counted
as work. Memory is the peak of a process that does this work alone: the side's / the other's.

{machine}
"""


def plot(device: torch.device, rounds: int, path: Path) -> list[str]:
    """Draw tokens per second against the context's length; returns the same as a table."""
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
    axes.set_title(f"{NEW_TOKENS} greedy tokens, prompt included, 42M parameters")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    return table


def main() -> int:
    args = parse_args(__doc__)
    device = resolve_device(args.use_gpu)
    machine = f"{describe_machine(device)}; {describe_ceilings(device)}"
    text = [INTRODUCTION.format(rounds=args.rounds, machine=machine)]
    for title, rows in (("Reference mode", reference.ROWS), ("Causal mode", causal.ROWS)):
        text.append(f"## {title}\n")
        print(f"\n## {title}\n")
        for line in lines(rows, args.rounds, device):
            print(line, flush=True)
            text.append(line)
        text.append("")
    table = plot(device, args.rounds, FOLDER / "context.png")
    text += ["## Tokens per second by context\n", *table, "", "![Tokens per second](context.png)"]
    print("\n".join(table))
    with open_atomically(FOLDER / "RESULTS.md") as file:
        file.write("\n".join(text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
