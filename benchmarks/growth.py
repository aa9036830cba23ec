"""How times grow: of a token with its context, of a training step with its batch."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.measure import time_in_turn
from benchmarks.table import HEAD, Setting
from benchmarks.works import Job, make_work
from beyond.runtime import has_bfloat16
from config import LlamaConfig
from llama import Llama

NEW_TOKENS = 75
CONTEXTS = (16, 128, 512, 949)  # the tokens after the last one fill up max_seq_len
TARGET = 0.8  # speed after the longest context / after the shortest, in float32
GENERATING = ("causal int8", "causal bfloat16", "causal float32", "Hugging Face float32")
BATCHES = ((1, 32), (4, 32), (16, 32), (64, 32))  # sentences, tokens of each
LENGTHS = ((4, 16), (4, 64), (4, 256), (4, 512))
TRAINING = ("causal bfloat16", "causal float32", "Hugging Face float32")
CONTEXT_PICTURE, STEP_PICTURE = "context.png", "step.png"
ADAMW_BYTES = 28  # per weight: read it, its gradient and two averages; write all but the gradient

Size = int | tuple[int, int]
Times = Mapping[str, Mapping[Size, float]]  # side -> context or batch -> seconds
PeakRate = Callable[[str], float]  # see `table.peak_rate`


def measure_all(
    jobs: Mapping[Size, Job], sides: Sequence[str], rounds: int, device: torch.device
) -> Times:
    """Measure each job on each side, all in turn; returns seconds."""
    keys = [(side, size) for side in sides for size in jobs]
    works = [make_work(jobs[size], side, device) for side, size in keys]
    seconds = dict(zip(keys, time_in_turn(works, rounds, device), strict=True))
    return {side: {size: seconds[side, size] for size in jobs} for side in sides}


def wrap(text: str) -> str:
    """Return a paragraph with lines of at most 100 characters."""
    return textwrap.fill(" ".join(text.split()), 100)


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Return intercept and slope of the least-squares line."""
    slope, intercept = np.polyfit(xs, ys, 1)
    return float(intercept), float(slope)


def make_table(head: str, times: Times, scale: float, inverse: bool = False) -> list[str]:
    """Return a table of times; a row for each size, a column for each side.

    Args:
        head: of the first column.
        times: in seconds.
        scale: multiplies each number.
        inverse: show scale / seconds instead.
    """
    lines = [f"| {head} | {' | '.join(times)} |", "|---" * (len(times) + 1) + "|"]
    for size in next(iter(times.values())):
        values = [
            (1 / column[size] if inverse else column[size]) * scale for column in times.values()
        ]
        name = " x ".join(map(str, size)) if isinstance(size, tuple) else str(size)
        lines.append(f"| {name} | {' | '.join(f'{value:.3g}' for value in values)} |")
    return lines


# ------------------------------------------------------------------------------- tokens by context


def measure_contexts(setting: Setting) -> Times:
    """Return the seconds of `NEW_TOKENS` tokens after each context."""
    sides = [side for side in GENERATING if setting.device.type == "cpu" or "int8" not in side]
    jobs: dict[Size, Job] = {c: Job("generate", f"{NEW_TOKENS} after {c}") for c in CONTEXTS}
    return measure_all(jobs, sides, setting.rounds, setting.device)


def describe_contexts(times: Times, peak_rate: PeakRate) -> list[str]:
    """Return the lines that show and explain how a token's time grows with its context."""
    config = LlamaConfig()
    numbers = 2 * config.n_layers * config.n_kv_heads * config.head_dim  # keys and values
    memory = peak_rate("memory")
    short, long = CONTEXTS[0], CONTEXTS[-1]
    ours = times["causal float32"]
    speeds = NEW_TOKENS / ours[long], NEW_TOKENS / ours[short]
    row = (
        f"| generate {NEW_TOKENS} after {long} | causal float32 | the same after {short} | "
        f"**{speeds[0] / speeds[1]:.2f}** | {TARGET} | {speeds[0]:.3g} | {speeds[1]:.3g} | "
        "tokens/s |  |  |"
    )
    slopes = [
        "| side | ms per token without context | µs per position | KiB per position | "
        "µs to read them |",
        "|---" * 5 + "|",
    ]
    for side, column in times.items():
        # While new tokens come, the context is half of them longer on average.
        middles = [context + NEW_TOKENS / 2 for context in CONTEXTS]
        start, slope = fit_line(middles, [column[context] / NEW_TOKENS for context in CONTEXTS])
        slopes.append(
            f"| {side} | {start * 1e3:.3g} | {slope * 1e6:.3g} | {4 * numbers / 2**10:g} | "
            f"{4 * numbers / memory * 1e6:.2g} |"
        )
    explanation = f"""\
Why speed falls: for each new token all weights are read, and the keys and values of all earlier
positions. The weights take the same time for every token. The keys and values grow by the same
number of bytes with each position, so the time of a token is close to a straight line. The table
has the line that fits best: the time without context, and the time that one position adds. A
position has {numbers:,} numbers ({config.n_layers} layers, keys and values of
{config.n_kv_heads * config.head_dim}); they are float32 on all sides, whatever the
weights are. The last column is the time that the memory needs to give them, at the rate above.
Where the measured time is near that, or below it because a part is still in the processor's cache,
reading is the limit; where it is much longer, computing the attention is. The fewer bytes the
weights have, the more a context matters."""
    return [
        "\n## Tokens per second by context\n",
        f"Speed of {NEW_TOKENS} tokens after a context; the context itself does not count.\n",
        *make_table("context", times, NEW_TOKENS, inverse=True),
        f"\n![Tokens per second by context]({CONTEXT_PICTURE})\n",
        *HEAD.split("\n"),
        row,
        f"\n{wrap(explanation)}\n",
        *slopes,
    ]


# ------------------------------------------------------------------------------ steps by batch size


def measure_steps(setting: Setting) -> Times:
    """Return the seconds of a training step for each of `BATCHES` and `LENGTHS`."""
    sides = [side for side in TRAINING if has_bfloat16(setting.device) or "bfloat16" not in side]
    sizes: list[tuple[int, int]] = [*BATCHES, *LENGTHS]
    jobs: dict[Size, Job] = {size: Job("finetune", f"{size[0]} x {size[1]}") for size in sizes}
    return measure_all(jobs, sides, setting.rounds_of(is_quick=True), setting.device)


def describe_steps(times: Times, peak_rate: PeakRate, rounds: int) -> list[str]:
    """Return the lines that show and explain how a step's time grows with its batch."""
    config = LlamaConfig()
    with torch.device("meta"):  # shapes without memory
        llama = Llama(config)
    weights = sum(parameter.numel() for parameter in llama.parameters())
    in_layers = weights - llama.output.weight.numel()
    memory = peak_rate("memory")
    longest = LENGTHS[-1]
    share = 2 * longest[1] * config.dim * config.n_layers / in_layers
    slopes = [
        f"| side | ms per step | µs per token | products alone, µs | at length {longest[1]}, µs |",
        "|---" * 5 + "|",
    ]
    for side, column in times.items():
        fixed, slope = fit_line([n * m for n, m in BATCHES], [column[size] for size in BATCHES])
        rate = peak_rate(side.split(" ")[-1])
        long = (column[longest] - fixed) / math.prod(longest)
        slopes.append(
            f"| {side} | {fixed * 1e3:.3g} | {slope * 1e6:.3g} | {6 * in_layers / rate * 1e6:.3g} "
            f"| {long * 1e6:.3g} |"
        )
    explanation = f"""\
Why it grows: a step has a part that does not depend on the batch. AdamW reads and writes each
weight and its two averages, {ADAMW_BYTES * weights / 1e9:.1f} GB in all, for which the memory needs
{ADAMW_BYTES * weights / memory * 1e3:.0f} ms; and the gradient of the embedding is as large for one
sentence as for many. So small batches pay mostly for the update. The rest grows with the tokens:
each one is multiplied with all weights of the layers, once forward and twice backward. The table
has the line that fits the batches of {BATCHES[0][1]} tokens a sentence best, beside the time of
these products at the peak rate above. Longer sentences add attention, whose products grow with the
square of the length: at {longest[1]} tokens they are {share:.0%} of those with the weights, or half
of that where later positions are skipped. The last column is the time per token without the fixed
part, in sentences of {longest[1]} tokens."""
    return [
        "\n## Time of a training step by batch\n",
        wrap(
            "Milliseconds of one fine-tuning step (forward, backward, update) on a batch of "
            f"*sentences x tokens*, all sentences equally long. Medians of {rounds} rounds."
        ),
        "",
        *make_table("batch", times, 1e3),
        f"\n![Time of a training step by batch]({STEP_PICTURE})\n",
        wrap(explanation),
        "",
        *slopes,
    ]


# ----------------------------------------------------------------------------------------- pictures


def draw_contexts(times: Times, folder: Path) -> None:
    """Draw tokens per second against the context, into a file of the folder."""
    figure = Figure(figsize=(9, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for side, column in times.items():
        speeds = [NEW_TOKENS / column[context] for context in CONTEXTS]
        axes.plot(CONTEXTS, speeds, marker="o", label=side)
    axes.set(xlabel="tokens before the first new one", ylabel="tokens per second")
    axes.set(title=f"Greedy generation of {NEW_TOKENS} tokens, 42M parameters", ylim=(0, None))
    figure.legend(loc="outside right center")
    axes.grid(alpha=0.3)
    figure.savefig(folder / CONTEXT_PICTURE)


def draw_steps(times: Times, folder: Path) -> None:
    """Draw the time of a step against sentences and their length, into a file of the folder."""
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, sizes, index in zip(panels, (BATCHES, LENGTHS), (0, 1), strict=True):
        for side, column in times.items():
            seconds = [column[size] for size in sizes]
            axes.plot([size[index] for size in sizes], seconds, marker="o", label=side)
        axes.grid(alpha=0.3)
    panels[0].set(xlabel=f"sentences, each of {BATCHES[0][1]} tokens", ylabel="seconds per step")
    panels[1].set(xlabel=f"tokens in each of {LENGTHS[0][0]} sentences")
    panels[0].set(ylim=(0, None))
    panels[0].legend()
    figure.suptitle("A fine-tuning step: forward, backward, update; 42M parameters")
    figure.savefig(folder / STEP_PICTURE)
