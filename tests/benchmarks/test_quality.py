"""`python -m benchmarks.quality`: its runs, what it prints, and going on after an interruption.

Most tests run `run_llama.py` in this process, since starting a new one takes seconds. Two start
real processes, and send real signals to them.
"""

import contextlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.machine
import benchmarks.quality.process
import benchmarks.quality.runs
import beyond.methods.rule
import run_llama
from benchmarks.quality.__main__ import main
from benchmarks.quality.estimate import Estimator
from benchmarks.quality.plan import Plan
from benchmarks.quality.process import RunClaimed, RunFailed, Usage, claimed
from benchmarks.quality.results import Result, add_result, current_commit, read_results
from benchmarks.quality.runs import Run
from beyond.interrupts import Interrupted
from beyond.options import FinetuneOptions
from tests.benchmarks.conftest import make_result, runs_of
from tests.beyond.runs import interrupt
from tests.conftest import ROOT, make_llama, save_llama
from utils import lock_results

CSV, REPORT = Path("plan.csv"), Path("plan.md")
PLAN = ["--plan", "plan.toml"]
INTERRUPTED = "python -m benchmarks.quality: interrupted; "
INTERRUPTED += "the same command continues where it stopped"
Change = Callable[[str, str], Plan]


@pytest.fixture
def started(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let runs happen in this process; returns the command lines that were started."""
    argvs: list[list[str]] = []

    def run_process(run: Run, resume: bool) -> tuple[int, str]:
        argvs.append([*run.argv(), *(["--resume"] if resume else [])])
        run.folder.mkdir(parents=True, exist_ok=True)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run_llama.main(argvs[-1])
        with (run.folder / "out.txt").open("a") as file:
            file.write(out.getvalue())
        (run.folder / "err.txt").write_text(err.getvalue())
        Usage(seconds=1.5, memory_mib=99).write(run.folder / "usage.json")
        return status, benchmarks.quality.process.last_line(run.folder / "err.txt")

    monkeypatch.setattr(benchmarks.quality.process, "run_process", run_process)
    return argvs


def measure(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, list[str], str]:
    """Run a command line; returns its status, the lines that it printed, and its errors."""
    capsys.readouterr()
    status = main([*PLAN, *argv])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err


# -------------------------------------------------------------------------------------------- runs


def test_missing_runs_are_run_once(
    started: list[list[str]], plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = measure(capsys, "--stage", "screen")
    assert status == 0, err
    estimate = r", about [\d.]+ s \(estimated: 4 from timed steps\)"
    assert re.fullmatch("stage screen: 4 of 4 runs to do" + estimate, out[0])
    assert out[1:5] == [
        "  tiny, sst, plain, seed 1",
        "  tiny, sst, mean, seed 1",
        "  tiny, sst, plain, seed 2",
        "  tiny, sst, mean, seed 2",
    ]
    assert re.fullmatch("runs to do in all stages, each once: 4" + estimate, out[5])
    assert re.fullmatch(
        r"run 2 of 4: tiny, sst, mean, seed 1 \(about [\d.]+ \w+; the last one ends about "
        r"\w{3} \d\d:\d\d\)",
        out[8],
    )
    assert re.fullmatch(r"run 2 of 4: dev (\.\d{3}|1\.000), 1\.5 s", out[9])
    assert out[-1] == "wrote plan.md"
    results = read_results(CSV)
    assert [(r.method, r.seed) for r in results] == [
        ("plain", 1),
        ("mean", 1),
        ("plain", 2),
        ("mean", 2),
    ]
    assert all(math.isnan(r.test) and r.steps == 2 * 2 for r in results)  # 5 lines, 3 a batch
    assert {(r.seconds, r.memory_mib, r.threads) for r in results} == {(1.5, 99, 1)}
    assert not any("sst-test" in word for argv in started for word in argv)
    assert "| mean | 2 |" in REPORT.read_text()
    before = CSV.read_bytes()
    status, out, _ = measure(capsys, "--stage", "screen")
    assert (status, out) == (0, ["stage screen: 0 of 4 runs to do", "wrote plan.md"])
    assert len(started) == 4 and CSV.read_bytes() == before
    assert [path.name for path in Path("output/quality").iterdir()] == ["sst-train-first-5.txt"]


def test_a_result_is_what_the_program_says(
    started: list[list[str]], changed: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    """The accuracies of the same command line by itself, with test where it means something."""
    changed("seeds = [1, 2, 3]", "seeds = [1]")
    assert measure(capsys, "--stage", "full")[0] == 0
    for result, argv in zip(read_results(CSV), list(started), strict=True):
        assert run_llama.main(argv) == 0
        out = capsys.readouterr().out
        dev, test = re.findall(r"^(?:dev|test) acc :: (.*)", out, re.MULTILINE)
        assert f"{result.dev:.3f}" == dev
        assert result.has_test == (result.data == "sst")
        assert not result.has_test or f"{result.test:.3f}" == test
        (best,) = re.findall(r"^  best epoch  (\d+)", out, re.MULTILINE)
        assert result.best_epoch == int(best)


@pytest.mark.sweep
def test_a_run_of_two_stages_is_run_once(
    started: list[list[str]], changed: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the one that reads test."""
    changed("train_lines = 5\n", "")
    assert measure(capsys)[0] == 0
    assert len(started) == 4 + 12 - 2  # `plain` of screen
    assert len(read_results(CSV)) == 14
    assert sum("data/sst-dev.txt" in argv for argv in started) == 2  # `mean` of screen


@pytest.mark.parametrize("flags", ["--lora_rank 5000", "--recipe better --pool_layer 9"])
def test_runs_that_fail_do_not_stop_the_others(
    flags: str, started: list[list[str]], changed: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake that only the model shows."""
    changed('mean = "--pooling mean --lr 1e-2"', f'mean = "{flags}"')
    status, out, _ = measure(capsys, "--stage", "screen")
    assert status == 1 and len(started) == 4
    assert out[0].endswith("2 from timed steps; 2 from runs that will fail)")
    failed = [line for line in out if "failed" in line]
    assert failed[0].startswith(f"run 2 of 4: failed: --{flags.split('--')[-1]}")
    assert failed[-1] == "failed runs: 2; the same command tries them again"
    assert [result.method for result in read_results(CSV)] == ["plain", "plain"]
    assert "| mean | 0 of 2 | not measured |" in REPORT.read_text()


def test_listing_and_reporting_run_nothing(
    started: list[list[str]], plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = measure(capsys, "--list")
    assert status == 0 and not CSV.exists() and not REPORT.exists()
    assert out[0].startswith("stage screen: 4 of 4 runs to do, about ")
    assert out[-1].startswith("runs to do in all stages, each once: 16, about ")
    Path("stories42M.pt").unlink()
    status, out, _ = measure(capsys, "--report")
    assert (status, out) == (0, ["wrote plan.md"])
    assert "No run of this plan is complete yet." in REPORT.read_text()
    assert not started


def test_a_recipes_rule_is_computed_with_the_threads_of_the_plan(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside another measurement, more threads than that would make both slower."""
    seen = []

    def apply_rule(*arguments: Any) -> FinetuneOptions:
        seen.append(torch.get_num_threads())
        return beyond.methods.rule.apply_rule(*arguments)

    monkeypatch.setattr(benchmarks.quality.runs, "apply_rule", apply_rule)
    torch.set_num_threads(2)
    try:
        assert measure(capsys, "--list")[0] == 0
    finally:
        torch.set_num_threads(1)
    assert set(seen) == {1}


def test_a_method_whose_flags_have_changed_is_refused(
    started: list[list[str]], changed: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its results would be mixed with others; with another name they are kept."""
    assert measure(capsys, "--stage", "screen")[0] == 0
    before = CSV.read_bytes()
    flags = read_results(CSV)[1].flags
    changed('mean = "--pooling mean', 'mean = "--pooling max')
    message = (
        f"plan.csv:3: the method mean had other flags ({flags}); give it another name in "
        "plan.toml, so that these results are kept"
    )
    REPORT.unlink()
    for argv in ([], ["--stage", "full"], ["--list"], ["--report"]):
        assert refused(capsys, *argv) == message
    renamed = (
        Path("plan.toml").read_text().replace('mean = "', 'max = "').replace('"mean"', '"max"')
    )
    Path("plan.toml").write_text(renamed)
    status, out, _ = measure(capsys, "--stage", "screen")
    assert status == 0 and len(started) == 4 + 2
    assert out[0] == (
        "note: 2 of 4 results in plan.csv do not belong to this plan; they are kept there, and "
        "left out of the tables"
    )
    assert CSV.read_bytes().startswith(before) and len(read_results(CSV)) == 6


def test_another_checkpoint_has_no_results_yet(
    started: list[list[str]], plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even if the recipe's rule gives it other flags."""
    runs = runs_of(plan, "full")
    for run in runs:
        add_result(CSV, make_result(run, 0.5, 0.4))
    save_llama(make_llama(causal=False, n_layers=3), Path("stories42M.pt"))
    status, out, err = measure(capsys, "--stage", "full", "--list")
    assert status == 0, err
    assert out[0].startswith("note: 12 of 12 results in plan.csv do not belong to this plan")
    assert out[1].startswith("stage full: 12 of 12 runs to do")


def test_a_checkpoint_without_its_tokenizer_is_left_out(
    started: list[list[str]], changed: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other").mkdir()
    Path("other/model.pt").write_bytes(Path("stories42M.pt").read_bytes())
    changed("[data]", 'other = "other/model.pt"\n\n[data]')
    text = Path("plan.toml").read_text()
    Path("plan.toml").write_text(text.replace('["tiny"]', '["tiny", "other"]'))
    status, out, err = measure(capsys, "--list")
    assert status == 0 and out[0].startswith(
        "note: left out, 16 of the runs: other/tokenizer.model"
    ), err
    assert measure(capsys, "--report")[0] == 0


def test_runs_whose_files_are_missing_are_left_out(
    started: list[list[str]], changed: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are done; without any of them it is an error."""
    changed("[data]", 'large = { path = "large.pt" }\n\n[data]')
    text = Path("plan.toml").read_text()
    Path("plan.toml").write_text(text.replace('["tiny"]', '["tiny", "large"]', 1))
    note = "note: left out, 4 of the runs: large.pt: No such file or directory"
    status, out, err = measure(capsys, "--stage", "screen", "--list")
    assert status == 0, err
    assert out[0] == note and out[1].startswith("stage screen: 4 of 8 runs to do")
    status, out, err = measure(capsys, "--stage", "screen")
    assert status == 0 and out[0] == note and len(started) == 4, err
    assert REPORT.read_text().count("| 0 of 2 | not measured |") == 2
    status, out, err = measure(capsys, "--stage", "screen")  # those that can be done are done
    assert (status, out[0], out[-1]) == (0, note, "wrote plan.md"), err
    CSV.unlink()
    REPORT.unlink()
    Path("stories42M.pt").unlink()
    assert refused(capsys, "--stage", "screen").startswith("stories42M.pt: no such file; get it")


# ---------------------------------------------------------------------------------------- estimates


def test_estimates_come_from_earlier_runs_on_this_machine(
    started: list[list[str]], plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    """18 sentences in 90 s are 5 s each; the runs of `full` have 16, those of `screen` 10."""
    plain, mean, *_ = runs_of(plan, "screen")
    here: dict[str, Any] = {"machine": benchmarks.machine.processor(), "seconds": 90.0, "steps": 6}
    add_result(CSV, make_result(plain, 0.5, **here))
    out = measure(capsys, "--stage", "screen", "--list")[1]
    assert out[-1] == (
        "runs to do in all stages, each once: 3, about 2.5 min (estimated: 2 from earlier runs of "
        "similar methods; 1 from earlier runs of the same method)"
    )
    add_result(CSV, make_result(mean, 0.5, **{**here, "seconds": 900.0}))
    out = measure(capsys, "--stage", "screen", "--list")[1]
    assert out[-1] == (
        "runs to do in all stages, each once: 2, about 9.2 min (estimated: 2 from earlier runs of "
        "the same method)"
    )
    for other in ({"machine": "another"}, {"threads": 3}):
        CSV.unlink()
        add_result(CSV, make_result(plain, 0.5, **{**here, **other}))
        out = measure(capsys, "--stage", "screen", "--list")[1]
        assert out[-1].endswith("(estimated: 3 from timed steps)")


# ----------------------------------------------------------------------------------------- mistakes


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command line that is refused before any run; returns its error."""
    status, _, err = measure(capsys, *argv)
    assert status == 2 and err.count("\n") == 1 and not REPORT.exists()
    return err.removeprefix("python -m benchmarks.quality: error: ").rstrip("\n")


def test_mistakes_are_found_before_any_run(
    started: list[list[str]], changed: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, "--stage", "x") == "--stage x: unknown; the plan has screen, full"
    assert refused(capsys, "--plan", "plan.md") == "--plan plan.md: must end in .toml"
    assert refused(capsys, "--plan", "no.toml") == "no.toml: No such file or directory"
    assert refused(capsys, "--x") == "unrecognized arguments: --x"
    assert "not allowed with argument" in refused(capsys, "--list", "--report")
    changed('better = "--recipe better"', 'better = "--recipe best"')  # of the last stage
    assert "stage full: tiny, sst, better: argument --recipe: invalid choice" in refused(capsys)
    with pytest.raises(ValueError):
        changed("[1, 2, 3]", "[1, 2.5]")
    assert "stage full: seeds: expected a whole number" in refused(capsys)
    changed('path = "stories42M.pt"', 'path = "none.pt"')
    assert refused(capsys).startswith("none.pt: ")
    changed("threads = 1", "threads = 1")  # the plan as it was
    CSV.write_text("x\n")
    assert refused(capsys).startswith("plan.csv:1: expected the columns")
    CSV.unlink()
    Path("data/sst-dev.txt").unlink()
    assert refused(capsys, "--stage", "screen").startswith(
        "data/sst-dev.txt: no such file; get it with: "
    )
    assert not started


# ------------------------------------------------------------------------------------- interruption


def test_a_run_that_was_interrupted_is_resumed(
    started: list[list[str]], plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the results of one that was not."""
    assert measure(capsys, "--stage", "screen")[0] == 0
    expected = [(r.method, r.seed, r.dev, r.best_epoch, r.steps) for r in read_results(CSV)]
    CSV.unlink()
    run = runs_of(plan, "screen")[1]
    run.folder.mkdir(parents=True)
    assert interrupt(run.argv(), steps=3) == 130
    (run.folder / "out.txt").write_text("epoch 0: train loss :: 1, ...\n")
    started.clear()
    assert measure(capsys, "--stage", "screen")[0] == 0
    assert ["--resume" in argv for argv in started] == [False, True, False, False]
    found = [(r.method, r.seed, r.dev, r.best_epoch, r.steps) for r in read_results(CSV)]
    assert found == expected


def test_a_run_that_cannot_be_resumed_starts_again(
    started: list[list[str]], plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a change of the program."""
    run = runs_of(plan, "screen")[0]
    run.folder.mkdir(parents=True)
    (run.folder / "classifier.pt.state").write_bytes(b"another version's")
    assert measure(capsys, "--stage", "screen")[0] == 0
    assert ["--resume" in argv for argv in started] == [True, False, False, False, False]
    assert len(read_results(CSV)) == 4


def test_another_error_of_a_resumed_run_keeps_its_training_checkpoint(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of training would be lost."""
    run = runs_of(plan, "screen")[0]
    run.folder.mkdir(parents=True)
    state = run.folder / "classifier.pt.state"
    state.touch()
    for message in (f"{state}: No space left on device", "out of memory"):
        monkeypatch.setattr(
            benchmarks.quality.process, "run_process", lambda *_, message=message: (2, message)
        )
        with pytest.raises(RunFailed, match=message):
            benchmarks.quality.process.finetune(run)
        assert state.exists()


def test_a_run_that_goes_on_at_another_commit_has_both(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "nothing.py"
    script.touch()
    monkeypatch.setattr(benchmarks.quality.process, "RUN_LLAMA", script)
    run = runs_of(plan, "screen")[0]
    run.folder.mkdir(parents=True)
    notes = run.folder / "usage.json"
    for commit in ("0123456789", "0123456789", "abcdef0123"):
        monkeypatch.setattr(benchmarks.quality.process, "current_commit", lambda c=commit: c)
        benchmarks.quality.process.run_process(run, notes.exists())
    assert Usage.read(notes).commit == "0123456789 abcdef0123"


def test_a_resumed_run_that_is_killed_says_so(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not how the process before it ended."""
    script = tmp_path / "killed.py"
    script.write_text("import os\nos.kill(os.getpid(), 9)\n")
    monkeypatch.setattr(benchmarks.quality.process, "RUN_LLAMA", script)
    run = runs_of(plan, "screen")[0]
    run.folder.mkdir(parents=True)
    (run.folder / "classifier.pt.state").touch()
    (run.folder / "err.txt").write_text("run_llama.py: interrupted\n")
    with pytest.raises(RunFailed, match="^killed by SIGKILL$"):
        benchmarks.quality.process.finetune(run)


def test_a_folder_that_another_process_deletes_is_its_run(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the run after this process has made the folder, and before it locks a file there."""
    run = runs_of(plan, "screen")[0]

    def lock(*arguments: Any) -> AbstractContextManager[None]:
        shutil.rmtree(run.folder)
        return lock_results(*arguments)

    monkeypatch.setattr(benchmarks.quality.process, "lock_results", lock)
    with pytest.raises(RunClaimed), benchmarks.quality.process.claimed(run):
        pass


def test_another_resolution_of_the_recipe_is_no_result(plan: Plan) -> None:
    """The program may have changed since the plan was read, and then trained otherwise."""
    run = runs_of(plan, "full")[1]
    assert run.method == "better"
    flags = shlex.join(run.options.recipe_flags)
    run.folder.mkdir(parents=True)
    for name in ("dev-finetuning-output.txt", "test-finetuning-output.txt", "classifier.pt"):
        record = {"scores": {"accuracy": 0.5, "epoch": 0}, "recipe flags": flags}
        (run.folder / f"{name}.json").write_text(json.dumps(record))
    (run.folder / "out.txt").write_text("epoch 0: \n")
    assert benchmarks.quality.process.read_results(run).dev == 0.5
    changed = replace(run, options=replace(run.options, lr=0.5))
    with pytest.raises(RunFailed, match="stood for other flags than planned: .* --lr 0.5"):
        benchmarks.quality.process.read_results(changed)


def test_a_run_that_somebody_else_ends_ends_the_measurement(
    started: list[list[str]],
    plan: Plan,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmarks.quality.process, "run_process", lambda *_: (143, "interrupted"))
    status, _, err = measure(capsys, "--stage", "screen")
    assert (status, err) == (143, f"{INTERRUPTED}\n")
    with pytest.raises(Interrupted):
        benchmarks.quality.process.finetune(runs_of(plan, "screen")[0])


LONG = 40  # epochs, so that a signal comes in the middle


def start(place: Path) -> "subprocess.Popen[str]":
    """Start a real measurement, and wait until its first run is in its third epoch or later."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.quality", *PLAN, "--stage", "screen"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 180
    while not any("epoch 2:" in path.read_text() for path in outputs()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return process


def outputs() -> list[Path]:
    """Return what the runs print to."""
    return list(Path("output/quality").glob("*/out.txt"))


def one_long_run(changed: Change) -> Run:
    """Change the plan to a single run."""
    plan = changed('sst = "--epochs 2"', f'sst = "--epochs {LONG}"')
    text = Path("plan.toml").read_text()
    text = text.replace('methods = ["plain", "mean"]', 'methods = ["plain"]')
    Path("plan.toml").write_text(text.replace("seeds = [1, 2]\n", "seeds = [1]\n"))
    return runs_of(plan, "screen")[0]


@pytest.mark.sweep
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_real_signal_loses_nothing(place: Path, changed: Change, number: int) -> None:
    """After SIGKILL the run ends too, and both continue in the middle of it."""
    run = one_long_run(changed)
    process = start(place)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert out.splitlines()[-1] == INTERRUPTED
        assert (run.folder / "usage.json").exists()
    assert not CSV.exists() and (run.folder / "classifier.pt.state").exists()
    (before,) = outputs()
    epochs = re.findall(r"^epoch (\d+):", before.read_text(), re.MULTILINE)
    assert len(epochs) < LONG
    notes = run.folder / "usage.json"
    assert Usage.read(notes).commit == current_commit()
    replace(Usage.read(notes), commit="0123456789").write(notes)  # as if it had changed since
    again = subprocess.run(
        [sys.executable, "-m", "benchmarks.quality", *PLAN, "--stage", "screen"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    (result,) = read_results(CSV)
    assert result.steps == 2 * LONG and result.commit == f"0123456789 {current_commit()}"
    assert result.memory_mib > 50 and result.seconds > 1
    assert not run.folder.exists()
    check_same_as_uninterrupted(run, result)


def check_same_as_uninterrupted(run: Run, result: Result) -> None:
    """Assert that a run by itself, in this process, gives the same result."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run_llama.main(run.argv()) == 0
    assert f"dev acc :: {result.dev:.3f}\n" in out.getvalue()
    assert re.findall(r"best epoch  (\d+)", out.getvalue()) == [str(result.best_epoch)]


# -------------------------------------------------------------------------------- at the same time


def test_a_run_that_another_process_is_at_is_left_to_it(
    started: list[list[str]], plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs_of(plan, "screen")[1]
    with claimed(run):
        status, out, _ = measure(capsys, "--stage", "screen")
    assert status == 0 and len(started) == 3
    assert "run 2 of 4: left to another process, which is doing it" in out
    assert len(read_results(CSV)) == 3
    assert measure(capsys, "--stage", "screen")[0] == 0 and len(started) == 4


def test_results_of_another_process_are_kept_and_not_repeated(
    started: list[list[str]],
    plan: Plan,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the first run is done here, another process adds the result of the second."""
    other = make_result(runs_of(plan, "screen")[1], 0.75)
    here = benchmarks.quality.process.run_process

    def run_process(run: Run, resume: bool) -> tuple[int, str]:
        if not CSV.exists():
            add_result(CSV, other)
        return here(run, resume)

    monkeypatch.setattr(benchmarks.quality.process, "run_process", run_process)
    assert measure(capsys, "--stage", "screen")[0] == 0
    assert len(started) == 3 and len(read_results(CSV)) == 4
    assert "| mean | 2 |" in REPORT.read_text()


def test_the_announced_end_leaves_out_what_another_process_has_done(
    started: list[list[str]],
    plan: Plan,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the first of four runs is done here, another process adds the result of the last."""
    other, counts = make_result(runs_of(plan, "screen")[3], 0.75), list[int]()
    here, total = benchmarks.quality.process.run_process, Estimator.total

    def run_process(run: Run, resume: bool) -> tuple[int, str]:
        if not CSV.exists():
            add_result(CSV, other)
        return here(run, resume)

    def count(estimator: Estimator, runs: list[Run]) -> tuple[float, Counter[str]]:
        counts.append(len(runs))
        return total(estimator, runs)

    monkeypatch.setattr(benchmarks.quality.process, "run_process", run_process)
    monkeypatch.setattr(Estimator, "total", count)
    assert measure(capsys, "--stage", "screen")[0] == 0
    assert counts[-3:] == [4, 2, 1]


def test_a_run_that_another_process_ends_before_it_is_claimed_is_not_repeated(
    started: list[list[str]],
    plan: Plan,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    second = runs_of(plan, "screen")[1]

    @contextlib.contextmanager
    def claimed_late(run: Run) -> Iterator[None]:
        if run == second:
            add_result(CSV, make_result(second, 0.75))
        with claimed(run):
            yield

    monkeypatch.setattr(benchmarks.quality.__main__, "claimed", claimed_late)
    status, out, _ = measure(capsys, "--stage", "screen")
    assert status == 0 and len(started) == 3 and len(read_results(CSV)) == 4
    assert "run 2 of 4: done by another process meanwhile" in out and not second.folder.exists()
