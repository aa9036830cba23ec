"""A measurement: a plan, its runs, the results so far, and the report of them."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.machine import processor
from benchmarks.quality.plan import Plan, read_plan
from benchmarks.quality.process import Measured
from benchmarks.quality.report import write_report
from benchmarks.quality.results import (
    Result,
    add_result,
    find_result,
    has_flags_of,
    has_inputs_of,
    has_names_of,
    is_result_of,
    read_results,
)
from benchmarks.quality.runs import Run, list_runs
from benchmarks.quality.tables import make_tables
from utils import lock_results

DEFAULT_PLAN = Path(__file__).with_name("plan.toml")
LOCK_TRIES, LOCK_PAUSE = 100, 0.1  # tries, and seconds between two; writing takes far less


@dataclass(frozen=True)
class Files:
    """The files of a plan: itself, its results and its report."""

    plan: Path
    results: Path
    report: Path

    @classmethod
    def of_plan(cls, plan: Path) -> "Files":
        """Return the files of a plan: those of another plan than the default are beside it."""
        if plan.suffix != ".toml":
            raise ValueError(f"--plan {plan}: must end in .toml")
        if plan.resolve() == DEFAULT_PLAN.resolve():
            return cls(plan, plan.with_name("results.csv"), plan.parent.parent / "QUALITY.md")
        return cls(plan, plan.with_suffix(".csv"), plan.with_suffix(".md"))


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Lock a file while the block runs; wait for another process that has locked it.

    Raises:
        OSError: the other process does not unlock it.
    """
    with ExitStack() as stack:
        for attempt in range(1, LOCK_TRIES + 1):
            try:
                stack.enter_context(lock_results([path], lambda note: None))
                break
            except OSError:
                if attempt == LOCK_TRIES:
                    raise
                time.sleep(LOCK_PAUSE)
        yield


class Measurement:
    """A plan, its runs by stage, and the results so far.

    PyTorch has the plan's number of threads afterwards, in this process too.

    Args:
        files: of the plan.

    Raises:
        ValueError: a file cannot be used, or a method has results with other flags.
        OSError: a file cannot be read.
    """

    def __init__(self, files: Files) -> None:
        self.files = files
        self.plan: Plan = read_plan(files.plan)
        torch.set_num_threads(self.plan.threads)  # a recipe's rule computes with the model
        self.results = read_results(files.results)
        self.runs = {
            stage.name: [self.with_newest_hash(run) for run in list_runs(self.plan, stage)]
            for stage in self.plan.stages
        }
        self.check_flags()

    def with_newest_hash(self, run: Run) -> Run:
        """Return a run with a checkpoint's hash: the last one measured, if the file is not here.

        So results of two checkpoints of the same name are never mixed.
        """
        hashes = [r.checkpoint_hash for r in self.results if r.checkpoint == run.checkpoint]
        if run.checkpoint_hash or not hashes:
            return run
        return replace(run, checkpoint_hash=hashes[-1])

    def check_flags(self) -> None:
        """Raise ValueError if a method of the plan has results with other flags."""
        runs = [run for runs in self.runs.values() for run in runs]
        for line, result in enumerate(self.results, start=2):
            named = [
                run for run in runs if has_names_of(result, run) and has_inputs_of(result, run)
            ]
            if named and not any(has_flags_of(result, run) for run in named):
                raise ValueError(
                    f"{self.files.results}:{line}: the method {result.method} had other flags "
                    f"({result.flags}); give it another name in {self.files.plan}, so that these "
                    "results are kept"
                )

    def unique_runs(self, stages: Sequence[str]) -> list[Run]:
        """Return the runs of some stages, each once, in their order."""
        chosen: dict[Run, Run] = {}
        for stage in stages:
            for run in self.runs[stage]:
                key = replace(run, dev_only=True, test_hash="")
                # One that reads test as well is a result for both.
                chosen[key] = run if key not in chosen or not run.dev_only else chosen[key]
        return list(chosen.values())

    def missing(self, stages: Sequence[str]) -> list[Run]:
        """Return those of the runs that have no result."""
        return [run for run in self.unique_runs(stages) if find_result(self.results, run) is None]

    def add(self, run: Run, measured: Measured) -> Result:
        """Add the result of a run that has ended, and write the report again."""
        names = ("checkpoint", "checkpoint_hash", "data", "data_hash", "test_hash", "train_lines")
        result = Result(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=processor(),
            threads=self.plan.threads,
            **{name: getattr(run, name) for name in (*names, "method", "flags", "seed")},
            **asdict(measured),
        )
        with waiting_lock(self.files.results):
            add_result(self.files.results, result)
            self._report_again()
        return result

    def read_again(self) -> None:
        """Read the results again, since another process may have added some."""
        self.results = read_results(self.files.results)

    def report_again(self) -> None:
        """Write the report of all results that there are now."""
        with waiting_lock(self.files.results):
            self._report_again()

    def _report_again(self) -> None:
        self.read_again()
        self.report()

    def report(self) -> None:
        """Write the report and its pictures."""
        tables, used = make_tables(self.plan, self.runs, self.results), self.used_results()
        write_report(self.plan, tables, used, self.files.report, self.files.results)

    def describe_others(self) -> str:
        """Say how many results are not in the tables; empty if all are."""
        used = len(self.used_results())
        if used == len(self.results):
            return ""
        return (
            f"{len(self.results) - used} of {len(self.results)} results in {self.files.results} "
            "do not belong to this plan; they are kept there, and left out of the tables"
        )

    def used_results(self) -> list[Result]:
        """Return the results of this plan's runs."""
        runs = [run for runs in self.runs.values() for run in runs]
        return [r for r in self.results if any(is_result_of(r, run) for run in runs)]
