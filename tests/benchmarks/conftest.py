"""A small plan, the files that it needs, and results of it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.plan import Plan, read_plan
from benchmarks.quality.results import Result
from benchmarks.quality.runs import Run, list_runs

PLAN = """
threads = 1

[checkpoints]
tiny = { path = "stories42M.pt", flags = "--batch_size 3" }

[data]
sst = "--epochs 2"
cfimdb = "--epochs 2 --lr 1e-3"

[methods]
plain = ""
mean = "--pooling mean --lr 1e-2"
better = "--recipe better"

[[stages]]
name = "screen"
checkpoints = ["tiny"]
data = ["sst"]
methods = ["plain", "mean"]
seeds = [1, 2]
train_lines = 5
splits = ["dev"]

[[stages]]
name = "full"
checkpoints = ["tiny"]
data = ["sst", "cfimdb"]
methods = ["plain", "better"]
seeds = [1, 2, 3]
"""


@pytest.fixture
def place(workplace: Path) -> Path:
    """The current folder of a measurement: a checkpoint, two data sets, and a plan."""
    for path in workplace.glob("data/cfimdb-*"):
        name = path.name.replace("cfimdb", "sst")
        (path.parent / name).write_bytes(path.read_bytes())
    Path("plan.toml").write_text(PLAN)
    return workplace


@pytest.fixture
def plan(place: Path) -> Plan:
    """The small plan."""
    return read_plan(Path("plan.toml"))


def runs_of(plan: Plan, name: str) -> list[Run]:
    """Return the runs of a stage."""
    (stage,) = (stage for stage in plan.stages if stage.name == name)
    return list_runs(plan, stage)


@pytest.fixture
def changed(place: Path) -> Callable[[str, str], Plan]:
    """A function that replaces a text in the plan's file, and reads it."""

    def change(old: str, new: str) -> Plan:
        assert old in PLAN
        Path("plan.toml").write_text(PLAN.replace(old, new, 1))
        return read_plan(Path("plan.toml"))

    return change


def make_result(run: Run, dev: float, test: float = math.nan, **values: Any) -> Result:
    """Make the result of a run."""
    result = Result(
        date="2026-11-26T01:02:03+00:00",
        commit="0123456789",
        machine="a processor, fast",  # the comma has to be quoted
        threads=1,
        checkpoint=run.checkpoint,
        checkpoint_hash=run.checkpoint_hash,
        data=run.data,
        data_hash=run.data_hash,
        test_hash=run.test_hash,
        train_lines=run.train_lines,
        method=run.method,
        flags=run.flags,
        seed=run.seed,
        dev=dev,
        test=math.nan if run.dev_only else test,
        best_epoch=1,
        steps=6,
        seconds=90.0,
        memory_mib=500.0,
    )
    return replace(result, **values)
