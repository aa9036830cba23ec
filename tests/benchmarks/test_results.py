"""The file of results: what is written is read again, and which run it belongs to."""

import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.quality.plan import Plan
from benchmarks.quality.results import (
    COLUMNS,
    add_result,
    current_commit,
    find_result,
    is_result_of,
    read_results,
)
from tests.benchmarks.conftest import make_result, runs_of

CSV = Path("plan.csv")


def test_results_are_read_as_they_were_written(plan: Plan) -> None:
    screen, full = runs_of(plan, "screen")[0], runs_of(plan, "full")[0]
    results = [make_result(full, 0.5, 0.25), make_result(screen, 1 / 3, memory_mib=math.nan)]
    for result in results:
        add_result(CSV, result)
    assert CSV.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert ',"a processor, fast",1,tiny,' in CSV.read_text()
    first, second = read_results(CSV)
    assert first == results[0]
    assert second.dev == pytest.approx(1 / 3, abs=1e-6)
    assert math.isnan(second.test) and math.isnan(second.memory_mib)
    assert replace(second, dev=0, test=0, memory_mib=0) == replace(
        results[1], dev=0, test=0, memory_mib=0
    )


def test_a_result_is_added_and_the_other_lines_stay(plan: Plan) -> None:
    """Even if the last line has no line end, as some editors leave it."""
    (run, *_) = runs_of(plan, "full")
    add_result(CSV, make_result(run, 0.5, 0.25))
    before = CSV.read_bytes().rstrip(b"\n")
    CSV.write_bytes(before)
    add_result(CSV, make_result(run, 0.75, 0.25))
    assert CSV.read_bytes().startswith(before + b"\n")
    assert [result.dev for result in read_results(CSV)] == [0.5, 0.75]
    assert [path.name for path in Path().glob("*plan.csv*")] == ["plan.csv"]  # nothing temporary


def test_no_file_means_no_results(place: Path) -> None:
    assert read_results(CSV) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("date,", "day,"), "plan.csv:1: expected the columns date,"),
        (lambda text: "", "plan.csv:1: expected the columns date,"),
        (lambda text: text + "1,2\n", "plan.csv:3: expected 19 cells, found 2"),
        (lambda text: text.replace(",0.5,", ",half,"), "plan.csv:2: dev: expected a number, found"),
        (
            lambda text: text.replace(",0.5,", ",1.5,"),
            "plan.csv:2: dev: expected an accuracy",
        ),
        (lambda text: text.replace(",0.5,", ",,"), "plan.csv:2: dev: expected an accuracy"),
        (lambda text: text.replace(",0.25,", ",2,"), "plan.csv:2: test: expected an accuracy"),
        (lambda text: text.replace(",90,", ",0,"), "plan.csv:2: seconds: expected a number above"),
        (lambda text: text.replace(",6,90,", ",0,90,"), "plan.csv:2: steps: expected a number"),
        (lambda text: text.replace(",500", ",0"), "plan.csv:2: memory_mib: expected a number"),
        (lambda text: text + '"x', "plan.csv: not a CSV file: "),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(
    plan: Plan, change: Callable[[str], str], message: str
) -> None:
    add_result(CSV, make_result(runs_of(plan, "full")[0], 0.5, 0.25))
    CSV.write_text(change(CSV.read_text()))
    with pytest.raises(ValueError) as caught:
        read_results(CSV)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_what_decides_whose_result_it_is(plan: Plan) -> None:
    (run, *_) = runs_of(plan, "full")
    result = make_result(run, 0.5, 0.25)
    assert is_result_of(result, run)
    for changed in (
        {"checkpoint_hash": "0"},
        {"data_hash": "0"},
        {"test_hash": "0"},
        {"train_lines": "first 3"},
        {"method": "better"},
        {"flags": run.flags + " pooling=mean"},
        {"flags": run.flags.replace("2e-05", "1e-05")},
        {"seed": 2},
        {"test": math.nan},  # the run reads test
    ):
        assert not is_result_of(replace(result, **changed), run), changed
    other = replace(result, commit="x", machine="x", threads=9, date="x", seconds=1.0)
    assert is_result_of(other, run)


def test_a_result_with_test_serves_a_run_on_dev_only(plan: Plan) -> None:
    (run, *_) = runs_of(plan, "full")
    assert is_result_of(make_result(run, 0.5, 0.25), replace(run, dev_only=True, test_hash=""))


def test_the_newest_result_counts(plan: Plan) -> None:
    run, other, *_ = runs_of(plan, "full")
    results = [make_result(run, dev, 0.25) for dev in (0.5, 0.75)]
    assert find_result([*results, make_result(other, 0.9, 0.9)], run) == results[1]
    assert find_result(results, other) is None


def test_without_the_files_results_are_found_by_name(plan: Plan) -> None:
    before = runs_of(plan, "full")
    results = [make_result(run, 0.5, 0.25) for run in before]
    Path("stories42M.pt").unlink()
    for path in Path("data").glob("*"):
        path.unlink()
    for run, result in zip(runs_of(plan, "full"), results, strict=True):
        assert find_result(results, run) == result


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_the_commit_says_whether_a_python_file_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, capture_output=True)
        return done.stdout.decode().strip()

    monkeypatch.setattr("benchmarks.quality.results.ROOT", tmp_path)
    assert current_commit() == "unknown"
    git("init")
    (tmp_path / "a.py").write_text("1\n")
    git("add", "a.py")
    git("commit", "-m", "One")
    assert current_commit() == git("rev-parse", "--short=10", "HEAD") != ""
    (tmp_path / "results.csv").write_text("")
    assert not current_commit().endswith("+")
    (tmp_path / "a.py").write_text("2\n")
    assert current_commit() == git("rev-parse", "--short=10", "HEAD") + "+"
