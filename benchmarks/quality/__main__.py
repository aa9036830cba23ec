"""Measure how well ways of fine-tuning work; writes `results.csv` and `benchmarks/QUALITY.md`.

    uv run python -m benchmarks.quality [--stage NAME ...] [--plan FILE] [--list | --report]

`plan.toml` says which runs there are; see `plan.py`. Those that `results.csv` already has are not
repeated, and those whose checkpoint or data are not here are left out. After Ctrl-C, or after a
kill, the same command continues in the middle of a run. Two copies can run at once: each takes the
next run that the other has not started.
A choice between methods is made by a stage that reads dev only, before a stage that reads test.
"""

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from benchmarks.machine import processor
from benchmarks.quality.estimate import Estimator, show_duration
from benchmarks.quality.measurement import DEFAULT_PLAN, Files, Measurement
from benchmarks.quality.plan import Plan
from benchmarks.quality.process import RunClaimed, RunFailed, claimed, finetune
from benchmarks.quality.report import decimals
from benchmarks.quality.results import find_result
from benchmarks.quality.runs import Run, check_inputs
from beyond.interrupts import signals_wait
from beyond.program import exit_status
from utils import OneLineParser, describe_error, prepare_output

PROGRAM = "python -m benchmarks.quality"


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ValueError: an argument is unknown or lacks its value.
    """
    parser = OneLineParser(prog=PROGRAM, description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--plan", type=Path, default=DEFAULT_PLAN, metavar="FILE", help="the plan, a TOML file"
    )
    parser.add_argument(
        "--stage", action="append", metavar="NAME", help="run this stage only; may be repeated"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the missing runs and exit")
    what.add_argument("--report", action="store_true", help="only write the report again")
    return parser.parse_args(argv)


def choose_stages(plan: Plan, names: Sequence[str] | None) -> list[str]:
    """Return the names of the stages to run, in the order of the plan."""
    known = [stage.name for stage in plan.stages]
    for name in names or ():
        if name not in known:
            raise ValueError(f"--stage {name}: unknown; the plan has {', '.join(known)}")
    return [name for name in known if names is None or name in names]


def run_missing(measurement: Measurement, runs: Sequence[Run], estimator: Estimator) -> int:
    """Do the runs, one after the other; returns how many have failed."""
    failed = 0
    for number, run in enumerate(runs, start=1):
        measurement.read_again()
        if find_result(measurement.results, run):
            continue  # another process has done it
        # Without those that another process has done; it may be doing one of the rest, too.
        rest = [r for r in runs[number - 1 :] if find_result(measurement.results, r) is None]
        left, _ = estimator.total(rest)
        seconds, _ = estimator.seconds(run)
        end = f"{datetime.now() + timedelta(seconds=left):%a %H:%M}"
        title = f"run {number} of {len(runs)}"
        say(f"{title}: {run.name} (about {show_duration(seconds)}; the last one ends about {end})")
        try:
            with claimed(run):
                measurement.read_again()
                if find_result(measurement.results, run):
                    shutil.rmtree(run.folder, ignore_errors=True)
                    say(f"{title}: done by another process meanwhile")
                    continue
                measured = finetune(run)
                with signals_wait():
                    result = measurement.add(run, measured)
                    shutil.rmtree(run.folder, ignore_errors=True)
        except RunClaimed:
            say(f"{title}: left to another process, which is doing it")
            continue
        except RunFailed as error:
            failed += 1
            say(f"{title}: failed: {error}")
            continue
        estimator.add(result)
        test = f", test {decimals(result.test)}" if result.has_test else ""
        say(f"{title}: dev {decimals(result.dev)}{test}, {show_duration(result.seconds)}")
    return failed


def problem_of_inputs(run: Run) -> str:
    """Return why a run's checkpoint or data cannot be read; "" if they can."""
    try:
        check_inputs(run)
    except OSError as error:
        return describe_error(error)
    return ""


def runnable(runs: Sequence[Run], nothing_done: bool) -> list[Run]:
    """Return the runs whose inputs can be read, and say which ones are left out.

    Args:
        runs: those without a result.
        nothing_done: whether no run of the chosen stages has a result.

    Raises:
        OSError: the same, and no run has inputs that can be read.
    """
    here = [run for run in runs if not problem_of_inputs(run)]
    if nothing_done and runs and not here:
        check_inputs(runs[0])
    problems = Counter(problem for run in runs if (problem := problem_of_inputs(run)))
    for problem, count in problems.items():
        say(f"note: left out, {count} of the runs: {problem}")
    return here


def measure(args: argparse.Namespace) -> int:
    """Do what the command line asks for; returns the exit status."""
    measurement = Measurement(Files.of_plan(args.plan))
    if note := measurement.describe_others():
        say(f"note: {note}")
    stages = choose_stages(measurement.plan, args.stage)
    if args.report:
        measurement.report_again()
        say(f"wrote {measurement.files.report}")
        return 0
    missing = measurement.missing(stages)
    nothing_done = len(missing) == len(measurement.unique_runs(stages))
    missing = runnable(missing, nothing_done)
    for path in (measurement.files.results, measurement.files.report):
        prepare_output(path)
    estimator = Estimator(measurement.results, processor(), measurement.plan.threads)
    for stage in stages:
        runs = [run for run in measurement.missing([stage]) if not problem_of_inputs(run)]
        planned = len(measurement.runs[stage])
        say(f"stage {stage}: {len(runs)} of {planned} runs to do{estimator.describe(runs)}")
        for run in runs:
            say(f"  {run.name}")
    if missing:
        say(f"runs to do in all stages, each once: {len(missing)}{estimator.describe(missing)}")
    if args.list:
        return 0
    failed = run_missing(measurement, missing, estimator)
    measurement.report_again()
    say(f"wrote {measurement.files.report}")
    if failed:
        say(f"failed runs: {failed}; the same command tries them again")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (None: the program's); returns the exit status."""
    consequence = "the same command continues where it stopped"
    return exit_status(PROGRAM, lambda: measure(parse_args(argv)), consequence)


if __name__ == "__main__":
    sys.exit(main())
