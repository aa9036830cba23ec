"""How long runs will take: from earlier results on this machine, else from one timed step."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from benchmarks.quality.results import Result
from benchmarks.quality.runs import Run, parse_resolved
from benchmarks.quality.timing import time_steps
from beyond.options import FinetuneOptions
from utils import read_lines

METHOD = "earlier runs of the same method"
ALIKE = "earlier runs of similar methods"
# The flags that change the time of a step most.
COSTLY = (
    *("batch_size", "bregman", "causal", "dtype", "freeze_backbone", "head", "lora_rank"),
    *("micro_batch_size", "pool_layer", "r_drop", "smart"),
)
Cost = tuple[str | None, ...]
START = 8.0  # seconds to import PyTorch and load a model
STEP = "timed steps"
FAILING = "runs that will fail"


class Estimator:
    """Estimates the seconds of runs.

    Args:
        results: those of earlier runs; those of other machines are not used.
        machine: the processor.
        threads: of each run, and of PyTorch in this process.
    """

    def __init__(self, results: Iterable[Result], machine: str, threads: int) -> None:
        self.results = [r for r in results if (r.machine, r.threads) == (machine, threads)]
        self.timed: dict[tuple[str, str, Cost], tuple[float, float]] = {}

    def add(self, result: Result) -> None:
        """Use a result of this machine too."""
        self.results.append(result)

    def seconds(self, run: Run) -> tuple[float, str]:
        """Return the seconds that a run will take, and what that is estimated from."""
        sentences = run.options.epochs * count_lines(run.options.train)
        alike = [
            result
            for result in self.results
            if (result.checkpoint_hash, result.data) == (run.checkpoint_hash, run.data)
            and cost_of(result.flags) == cost_of(run.flags)
        ]
        of_method = [result for result in alike if result.method == run.method]
        if alike:
            rate = statistics.median(seconds_per_sentence(r) for r in of_method or alike)
            return rate * sentences, METHOD if of_method else ALIKE
        key = run.checkpoint, run.data, cost_of(run.flags)
        if key not in self.timed:
            try:
                self.timed[key] = time_steps(run.options)
            except ValueError:  # a flag does not fit the model; the run itself says so
                return START, FAILING
        train, evaluate = self.timed[key]
        # Each epoch evaluates train and dev; at the end dev and test are predicted.
        dev, test = count_lines(run.options.dev), count_lines(run.options.test)
        evaluated = sentences + run.options.epochs * dev + dev + test
        return START + sentences * train + evaluated * evaluate, STEP

    def total(self, runs: Sequence[Run]) -> tuple[float, Counter[str]]:
        """Return the seconds of all runs, and how many are estimated from what."""
        estimates = [self.seconds(run) for run in runs]
        return sum(seconds for seconds, _ in estimates), Counter(source for _, source in estimates)

    def describe(self, runs: Sequence[Run]) -> str:
        """Say how long runs will take, to be added to a line; nothing without a run."""
        if not runs:
            return ""
        seconds, sources = self.total(runs)
        origin = "; ".join(f"{count} from {source}" for source, count in sources.items())
        return f", about {show_duration(seconds)} (estimated: {origin})"


def cost_of(flags: str) -> Cost:
    """Return what decides the time of a run for each sentence, from its recorded flags."""
    values = parse_resolved(flags)
    return tuple(values.get(name) for name in COSTLY)


def seconds_per_sentence(result: Result) -> float:
    """Return the seconds of a run for each sentence that it has trained on, evaluation included."""
    batch_size = int(parse_resolved(result.flags).get("batch_size", FinetuneOptions.batch_size))
    return result.seconds / (result.steps * batch_size)


@cache
def count_lines(path: str) -> int:
    """Return the number of lines of a file."""
    return len(read_lines(Path(path)))


def show_duration(seconds: float) -> str:
    """Return a duration with two digits: 42 s, 4.2 min or 4.2 h."""
    for limit, unit, size in ((90, "s", 1), (90 * 60, "min", 60)):
        if seconds < limit:
            return f"{round_to_two(seconds / size)} {unit}"
    return f"{round_to_two(seconds / 3600)} h"


def round_to_two(value: float) -> str:
    """Return a number with two digits, or more before the point."""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
