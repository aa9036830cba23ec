"""The report: its tables follow from the results, by figures that are worked out by hand."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.quality.measurement import DEFAULT_PLAN, Files, Measurement
from benchmarks.quality.plan import Plan, read_plan
from benchmarks.quality.report import signed
from benchmarks.quality.results import Result, add_result
from benchmarks.quality.tables import make_tables
from tests.benchmarks.conftest import PLAN, make_result, runs_of
from tests.conftest import ROOT

FILES = Files(Path("plan.toml"), Path("plan.csv"), Path("plan.md"))
Change = Callable[[str, str], Plan]


def report_of(results: list[Result]) -> dict[str, list[str]]:
    """Write a report; returns the rows of its tables below their heads, by `stage: title`."""
    measurement = Measurement(FILES)
    measurement.results = results
    measurement.report()
    tables: dict[str, list[str]] = {}
    stage = title = ""
    for line in Path("plan.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            stage, title = line[3:], ""
        elif line.startswith("### "):
            title = line[4:]
        elif line.startswith("|") and not line.startswith("|---"):
            tables.setdefault(f"{stage}: {title}", []).append(line)
    return tables


def test_a_table_has_means_differences_and_costs(plan: Plan) -> None:
    """dev .50 .52 .54 against .50 three times: +.02, and 4.3027 * .02 / sqrt(3) on each side."""
    results = []
    for run in runs_of(plan, "full"):
        dev, test, cost = 0.5, 0.4, 1.0
        if run.method == "better":
            dev, test, cost = 0.48 + 0.02 * run.seed, 0.41, 1.5
        values = {"seconds": 100 * cost * run.seed, "memory_mib": 400 * cost}
        results.append(make_result(run, dev, test, **values))
    tables = report_of(results)
    assert tables["full: tiny on sst"] == [
        "| method | seeds | dev | vs. plain | test | vs. plain | time | memory |",
        "| plain | 3 | .500 ± .000 |  | .400 ± .000 |  | 200 s | 400 MiB |",
        "| better | 3 | .520 ± .020 | +.020 [-.030, +.070] | .410 ± .000 | +.010 [+.010, +.010] "
        "| 1.50x | 1.50x |",
    ]
    assert tables["full: tiny on cfimdb"] == [
        "| method | seeds | dev | vs. plain | time | memory |",
        "| plain | 3 | .500 ± .000 |  | 200 s | 400 MiB |",
        "| better | 3 | .520 ± .020 | +.020 [-.030, +.070] | 1.50x | 1.50x |",
    ]
    assert "The test labels of cfimdb are placeholders" in Path("plan.md").read_text()


def test_a_stage_with_another_baseline_is_compared_with_plain_too(changed: Change) -> None:
    """dev .50, .53 (mean) and .56 (max, the baseline)."""
    changed('better = "--recipe better"', 'better = "--recipe better"\nmax = "--pooling max"')
    text = Path("plan.toml").read_text()
    text = text.replace(
        '"mean"]\nseeds = [1, 2]', '"mean", "max"]\nseeds = [1, 2]\nbaseline = "max"'
    )
    Path("plan.toml").write_text(text)
    plan = read_plan(Path("plan.toml"))
    scores = {"plain": 0.5, "mean": 0.53, "max": 0.56}
    results = [make_result(run, scores[run.method]) for run in runs_of(plan, "screen")]
    assert [line.split(" | ")[:5] for line in report_of(results)["screen: tiny on sst"]] == [
        ["| method", "seeds", "dev", "vs. max", "vs. plain"],
        ["| plain", "2", ".500 ± .000", "-.060", ""],
        ["| mean", "2", ".530 ± .000", "-.030", "+.030"],
        ["| max", "2", ".560 ± .000", "", "+.060"],
    ]


def test_unknown_memory_is_left_out(plan: Plan) -> None:
    """The system did not tell it for one run of plain, and for none of better."""
    results = [
        make_result(run, 0.5, 0.4, memory_mib=math.nan)
        if run.method == "better" or run.seed == 2
        else make_result(run, 0.5, 0.4, memory_mib=100 * run.seed)
        for run in runs_of(plan, "full")
    ]
    rows = report_of(results)["full: tiny on sst"]
    assert rows[1].endswith("| 90 s | 200 MiB |") and rows[2].endswith("| 1.00x |  |")
    results = [replace(result, memory_mib=math.nan) for result in results]
    assert report_of(results)["full: tiny on sst"][1].endswith("| 90 s |  |")


def test_what_is_planned_and_not_run_is_listed(plan: Plan) -> None:
    plain, better = runs_of(plan, "full")[:2]
    tables = report_of([make_result(plain, 0.5, 0.4), make_result(better, 0.45, 0.45)])
    assert tables["full: tiny on sst"][1:] == [
        "| plain | 1 of 3 | .500 |  | .400 |  | 90 s | 500 MiB |",
        "| better | 1 of 3 | .450 | -.050 | .450 | +.050 | 1.00x | 1.00x |",
    ]
    assert tables["screen: tiny on sst"][1:] == [
        "| plain | 0 of 2 | not measured |  |  |  |",
        "| mean | 0 of 2 | not measured |  |  |  |",
    ]


def test_a_method_without_the_baseline_has_no_difference(plan: Plan) -> None:
    _, better = runs_of(plan, "full")[:2]
    tables = report_of([make_result(better, 0.5, 0.4)])
    assert tables["full: tiny on sst"][2] == "| better | 1 of 3 | .500 | n/a | .400 | n/a |  |  |"


def test_a_stage_on_dev_only_shows_no_test_even_if_it_is_known(changed: Change) -> None:
    """The results of the stage that reads test serve it too."""
    plan = changed("train_lines = 5\n", "")
    results = [make_result(run, 0.5, 0.123) for run in runs_of(plan, "full")]
    table = report_of(results)["screen: tiny on sst"]
    assert table[1] == "| plain | 2 | .500 ± .000 |  | 90 s | 500 MiB |"
    assert not any(".123" in line for line in table)


def test_costs_of_different_machines_are_not_compared(plan: Plan) -> None:
    plain, better = runs_of(plan, "full")[:2]
    results = [make_result(plain, 0.5, 0.4), make_result(better, 0.6, 0.5, machine="another")]
    tables = report_of(results)
    assert tables["full: tiny on sst"][2].endswith("| +.100 | .500 | +.100 |  |  |")
    assert "a processor, fast, 1 thread; another, 1 thread;" in Path("plan.md").read_text()


def test_the_baseline_is_that_of_the_stage(changed: Change) -> None:
    plan = changed('methods = ["plain", "mean"]', 'methods = ["plain", "mean"]\nbaseline = "mean"')
    results = [
        make_result(run, 0.5 + 0.1 * (run.method == "plain")) for run in runs_of(plan, "screen")
    ]
    table = report_of(results)["screen: tiny on sst"]
    assert table[1] == "| plain | 2 | .600 ± .000 | +.100 |  | 1.00x | 1.00x |"
    assert table[2] == "| mean | 2 | .500 ± .000 |  | -.100 | 90 s | 500 MiB |"


def test_a_stage_may_compare_checkpoints(place: Path) -> None:
    """Then its baseline is one of them, and each method has a table."""
    Path("other.pt").write_bytes(Path("stories42M.pt").read_bytes())
    stage = 'checkpoints = ["tiny"]\ndata = ["sst"]\nmethods = ["plain", "mean"]'
    text = PLAN.replace("[data]", '"tiny + text" = "other.pt"\n\n[data]', 1)
    new = stage.replace('["tiny"]', '["tiny", "tiny + text"]') + '\nbaseline = "tiny"'
    assert stage in text
    Path("plan.toml").write_text(text.replace(stage, new, 1))
    scores = {("tiny", "plain"): 0.5, ("tiny + text", "plain"): 0.52}
    scores |= {("tiny", "mean"): 0.6, ("tiny + text", "mean"): 0.59}
    runs = runs_of(read_plan(Path("plan.toml")), "screen")
    tables = report_of([make_result(r, scores[r.checkpoint, r.method]) for r in runs])
    assert tables["screen: plain on sst"] == [
        "| checkpoint | seeds | dev | vs. tiny | time | memory |",
        "| tiny | 2 | .500 ± .000 |  | 90 s | 500 MiB |",
        "| tiny + text | 2 | .520 ± .000 | +.020 | 1.00x | 1.00x |",
    ]
    assert tables["screen: mean on sst"][2].startswith("| tiny + text | 2 | .590 ± .000 | -.010 |")
    assert "screen: plain on sst, dev, against tiny" in Path("plan-pictures/screen.svg").read_text()


def test_results_of_two_checkpoints_of_one_name_are_not_mixed(plan: Plan) -> None:
    """Without the checkpoint, the newest results count."""
    runs = runs_of(plan, "screen")
    old = [make_result(run, 0.3, checkpoint_hash="aaaaaaaaaaaa") for run in runs]
    new = [make_result(run, 0.5, checkpoint_hash="bbbbbbbbbbbb") for run in runs if run.seed == 1]
    Path("stories42M.pt").unlink()
    for result in old + new:
        add_result(FILES.results, result)
    table = report_of(old + new)["screen: tiny on sst"]
    assert table[1].startswith("| plain | 1 of 2 | .500 |")


def test_the_report_says_where_its_figures_come_from(plan: Plan) -> None:
    first, second = runs_of(plan, "full")[:2]
    report_of([make_result(first, 0.5, 0.4), make_result(second, 0.5, 0.4, commit="abc")])
    text = Path("plan.md").read_text(encoding="utf-8")
    assert "2 runs, from 2026-11-26 to 2026-11-26; a processor, fast, 1 thread; " in text
    assert "commits 0123456789, abc." in text
    assert "`uv run python -m benchmarks.quality --plan plan.toml`" in text
    assert "The first 5 training lines; dev only, test is left unread; seeds 1, 2; " in text
    assert "| mean | `--pooling mean --lr 1e-2` |" in text
    assert "](plan-pictures/full.svg)" in text


def test_each_stage_has_its_own_picture(place: Path) -> None:
    text = PLAN.replace('name = "screen"', 'name = "two (small) runs"', 1)
    Path("plan.toml").write_text(text)
    runs = runs_of(read_plan(Path("plan.toml")), "two (small) runs")
    report_of([make_result(run, 0.5) for run in runs])
    links = re.findall(r"!\[(.*)\]\((.*)\)", Path("plan.md").read_text(encoding="utf-8"))
    assert links == [
        (
            "two (small) runs: differences from plain, by seed",
            "plan-pictures/two%20%28small%29%20runs.svg",
        )
    ]
    (picture,) = Path("plan-pictures").iterdir()
    assert picture.name == "two (small) runs.svg"


def test_results_of_no_run_are_kept_and_left_out(plan: Plan) -> None:
    (run, *_) = runs_of(plan, "full")
    measurement = Measurement(FILES)
    measurement.results = [make_result(run, 0.5, 0.4), make_result(run, 0.9, 0.9, method="old")]
    assert measurement.describe_others() == (
        "1 of 2 results in plan.csv do not belong to this plan; they are kept there, and left out "
        "of the tables"
    )
    del measurement.results[1]
    assert measurement.describe_others() == ""


def test_the_committed_tables_follow_from_the_committed_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`uv run python -m benchmarks.quality --report` writes those of the report again."""
    monkeypatch.chdir(ROOT)
    files = Files.of_plan(DEFAULT_PLAN)
    measurement = Measurement(Files(files.plan, files.results, tmp_path / files.report.name))
    measurement.report()
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    pictures = files.report.with_name("quality-pictures").iterdir()
    assert written[1:] == sorted(path.relative_to(files.report.parent) for path in pictures)
    for name in written:
        committed = (files.report.parent / name).read_text(encoding="utf-8")
        assert (tmp_path / name).read_text(encoding="utf-8") == committed
    tables = make_tables(measurement.plan, measurement.runs, measurement.results)
    (screen,) = (table for table in tables if table.stage.name == "screen")
    rows = {row.name: row for row in screen.rows}
    text = Path("docs/going-further.md").read_text(encoding="utf-8")
    lines = re.findall(
        r"^\| ([^|]+) \| `(--.+)` \| (\S+) \| (\S+) \| (\S+) \|$", text, re.MULTILINE
    )
    assert len(lines) == 25
    for name, flags, *numbers in lines:
        difference = rows[name].difference("dev")
        assert difference is not None
        assert numbers == [signed(value) for value in (*difference.values, difference.mean)]
        assert set(flags.split()) <= set(measurement.plan.methods[name])
