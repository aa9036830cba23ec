"""The rows of the report's tables and pictures: the results of each method of a stage."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.quality.intervals import Difference, paired_difference
from benchmarks.quality.plan import Plan, Stage
from benchmarks.quality.results import Result, find_result
from benchmarks.quality.runs import Run


@dataclass(frozen=True)
class Row:
    """A method on a checkpoint and a data set.

    Attributes:
        name: of the method, or of the checkpoint if the table compares checkpoints.
        planned: the number of seeds in the plan.
        results: by seed; those that are there.
        baseline: the results that it is compared with.
        plain: those of the plain recipe; empty if the table does not have it.
    """

    name: str
    planned: int
    results: dict[int, Result]
    baseline: dict[int, Result]
    plain: dict[int, Result]

    def scores(self, split: str) -> list[float]:
        """Return the accuracies on dev or test, in the order of the seeds."""
        return [getattr(self.results[seed], split) for seed in sorted(self.results)]

    def difference(self, split: str, to_plain: bool = False) -> Difference | None:
        """Compare the accuracies on dev or test with the baseline's, paired by seed.

        Args:
            split: dev or test.
            to_plain: whether to compare with the plain recipe's instead.
        """
        values, others = (
            {seed: getattr(result, split) for seed, result in results.items()}
            for results in (self.results, self.plain if to_plain else self.baseline)
        )
        return paired_difference(values, others)

    def ratio(self, quantity: Callable[[Result], float]) -> float | None:
        """Return the median ratio of a quantity to the baseline's, by seed on the same machine."""
        ratios = [
            quantity(result) / quantity(self.baseline[seed])
            for seed, result in self.results.items()
            if seed in self.baseline and same_machine(result, self.baseline[seed])
        ]
        return median_of_known(ratios)


@dataclass(frozen=True)
class Table:
    """All methods of a stage with a checkpoint on a data set, or all checkpoints with a method."""

    stage: Stage
    subject: str  # the checkpoint, or the method
    data: str
    splits: tuple[str, ...]  # those that were read
    rows: tuple[Row, ...]
    plain: str | None  # the method without flags; None if there is no such row

    @property
    def title(self) -> str:
        """Return what the table is about."""
        return f"{self.subject} on {self.data}"


def median_of_known(values: Iterable[float]) -> float | None:
    """Return the median of the values that are not NaN, or None if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else None


def same_machine(a: Result, b: Result) -> bool:
    """Return whether two results have the same processor and number of threads."""
    return (a.machine, a.threads) == (b.machine, b.threads)


def make_tables(plan: Plan, runs: dict[str, list[Run]], results: Sequence[Result]) -> list[Table]:
    """Sort results into tables.

    Args:
        plan: has the stages.
        runs: by the name of the stage.
        results: of any plan.
    """
    tables = []
    for stage in plan.stages:
        names = () if stage.compares_checkpoints else stage.methods
        plain = next((name for name in names if not plan.methods[name]), None)
        for subject in stage.methods if stage.compares_checkpoints else stage.checkpoints:
            for data in stage.data:
                here = [
                    run
                    for run in runs[stage.name]
                    if (subject_and_row(stage, run)[0], run.data) == (subject, data)
                ]
                tables.append(make_table(stage, subject, data, here, results, plain))
    return tables


def subject_and_row(stage: Stage, run: Run) -> tuple[str, str]:
    """Return the subject of the table that a run belongs to, and the name of its row there."""
    if stage.compares_checkpoints:
        return run.method, run.checkpoint
    return run.checkpoint, run.method


def make_table(
    stage: Stage,
    subject: str,
    data: str,
    runs: Sequence[Run],
    results: Sequence[Result],
    plain: str | None,
) -> Table:
    """Make the table of a stage's runs with a checkpoint or a method on a data set."""
    names = stage.checkpoints if stage.compares_checkpoints else stage.methods
    found: dict[str, dict[int, Result]] = {name: {} for name in names}
    for run in runs:
        if (result := find_result(results, run)) is not None:
            found[subject_and_row(stage, run)[1]][run.seed] = result
    rows = [
        Row(
            name,
            planned=len(stage.seeds),
            results=found[name],
            baseline=found[stage.baseline],
            plain=found[plain] if plain else {},
        )
        for name in names
    ]
    splits = ("dev",) if runs[0].dev_only else stage.splits
    return Table(stage, subject, data, splits, tuple(rows), plain)
