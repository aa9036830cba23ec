"""Runs that survive: resumed, shared out to processes, split up, and interrupted."""

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import run_llama
from base_llama import load_safely, read_checkpoint
from classifier import ClassifierConfig, LlamaEmbeddingClassifier
from run_llama import main
from tests.conftest import ROOT, SENTENCES, make_llama, save_llama
from tests.test_run_llama import run
from training import Interrupted, accumulate, signals_wait, stop_if_asked
from utils import pad_batch

# 8 sentences: three steps an epoch, the last one of two sentences; 12 steps in all.
FINETUNE = ["--option", "finetune", "--batch_size", "3", "--epochs", "4", "--lr", "1e-3"]
FINETUNE += ["--dropout", "0.1", "--filepath", "out/a.pt"]
FINETUNE += ["--dev_out", "out/dev-finetuning-output.txt"]
FINETUNE += ["--test_out", "out/test-finetuning-output.txt"]
# 9 blocks: five steps an epoch; 20 steps in all.
PRETRAIN = ["--option", "pretrain", "--batch_size", "2", "--epochs", "4", "--dim", "32"]
PRETRAIN += ["--n_layers", "1", "--n_heads", "4", "--max_seq_len", "16", "--dropout", "0.1"]
PRETRAIN += ["--tokenizer_path", "tokenizer.model", "--dtype", "float32", "--filepath", "out/a.pt"]
RUNS = {"reference": FINETUNE, "causal": [*FINETUNE, "--causal"], "pretrain": PRETRAIN}
KILL, INT, TERM = int(signal.SIGKILL), int(signal.SIGINT), int(signal.SIGTERM)


RunForks = Callable[[Sequence[dict[str, Any]]], list[tuple[int, str, str]]]


@pytest.fixture(scope="module")
def run_forks() -> Iterator[RunForks]:
    """Statuses, outputs and errors of what `tests.forks` does."""
    command = [sys.executable, "-m", "tests.forks"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None

        def run_all(jobs: Sequence[dict[str, Any]]) -> list[tuple[int, str, str]]:
            results = []
            for job in jobs:
                stdin.write(json.dumps(job) + "\n")
                stdin.flush()
                results.append(tuple(json.loads(stdout.readline())))
            return results

        yield run_all
        stdin.close()


def copy_of(workplace: Path, name: str) -> Path:
    """A folder with the inputs of a run and nothing else."""
    folder = workplace / name
    shutil.copytree(workplace / "data", folder / "data")
    for file in ("stories42M.pt", "tokenizer.model"):
        os.link(workplace / file, folder / file)
    return folder


def job(cwd: Path, argv: Sequence[str], strike: Any = None) -> dict[str, Any]:
    return {"argv": [*argv], "cwd": str(cwd), "strike": strike}


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Bitwise, through dicts and lists."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_results(folder: Path, expected: Path) -> None:
    """The same last state, best checkpoint, and predictions."""
    states = [load_safely(path / "out/a.pt.state") for path in (folder, expected)]
    for state in states:
        del state["log"]  # has the time in its name
    assert_equal(states[0], states[1])
    models = [read_checkpoint(path / "out/a.pt") for path in (folder, expected)]
    assert_equal(models[0], models[1])
    for name in ("dev-finetuning-output.txt", "test-finetuning-output.txt"):
        ours, theirs = (path / "out" / name for path in (folder, expected))
        assert ours.exists() == theirs.exists()
        assert not ours.exists() or ours.read_bytes() == theirs.read_bytes()


def error_lines(err: str) -> list[str]:
    """Standard error without progress bars."""
    lines = [line.strip() for line in re.split("[\r\n]+", err)]
    return [line for line in lines if line and "it/s]" not in line and "s/it]" not in line]


def epoch_lines(out: str) -> list[str]:
    """What a run printed of its epochs, but for the speed."""
    lines = re.findall(r"^(?:epoch|train padding|dev acc|test acc).*", out, re.MULTILINE)
    return [re.sub(", tokens/s.*", "", line) for line in lines]


def strikes(steps: int, saves: int, number: int, seed: int) -> list[tuple[int, str, int]]:
    """Some steps at random, each stage of some writes, and any moments."""
    chance = random.Random(seed)
    counts = [*sorted(chance.sample(range(1, steps + 1), 4))]
    points = [(number, "step", count) for count in counts]
    for place in ("write", "replace", "replaced"):
        points += [(number, place, count) for count in chance.sample(range(1, saves + 1), 2)]
    return points + [(number, "time", chance.randrange(20, 150)) for _ in range(3)]


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("every", [None, 2])
def test_a_killed_run_ends_as_if_it_had_not_been(
    run_forks: RunForks, workplace: Path, kind: str, every: int | None
) -> None:
    """SIGKILL at steps and in saves, then --resume: weights, moments, orders, predictions."""
    argv = RUNS[kind] if every is None else [*RUNS[kind], "--save_every", str(every)]
    expected = copy_of(workplace, "expected")
    steps, saves = (20 if kind == "pretrain" else 12), 5
    points = strikes(steps, saves, KILL, seed=len(kind))
    folders = [copy_of(workplace, f"{place}-{count}") for _, place, count in points]
    jobs = [job(expected, argv)]
    jobs += [job(folder, argv, point) for folder, point in zip(folders, points, strict=True)]
    (status, out, _), *killed = run_forks(jobs)
    assert status == 0
    for (status, _, err), (_, place, _) in zip(killed, points, strict=True):
        assert status == -KILL or (place == "time" and status == 0), err  # it was faster

    had_state = [(folder / "out/a.pt.state").exists() for folder in folders]
    assert any(had_state)
    resumed = run_forks(
        [
            job(folder, [*argv, "--resume"] if state else argv)
            for folder, state in zip(folders, had_state, strict=True)
        ]
    )
    for folder, state, (status, rest, err) in zip(folders, had_state, resumed, strict=True):
        assert status == 0, err
        assert_same_results(folder, expected)
        lines = epoch_lines(rest)
        assert lines == epoch_lines(out)[-len(lines) :]
        if state:
            assert not list(folder.rglob(".*.tmp"))  # what the kill had left


@pytest.mark.parametrize("number", [INT, TERM])
def test_an_interrupted_run_saves_and_says_how_to_go_on(
    run_forks: RunForks, workplace: Path, number: int
) -> None:
    """In a step, in the evaluation after an epoch, in a write, and in the final predictions."""
    expected = copy_of(workplace, "expected")
    points = [("step", 1), ("step", 3), ("step", 8), ("eval", 11), ("eval", 30), ("write", 1)]
    points += [("eval", 47), ("eval", 51), ("replace", 6)]
    folders = [copy_of(workplace, f"{place}-{count}") for place, count in points]
    jobs = [job(expected, FINETUNE)]
    jobs += [
        job(folder, FINETUNE, (number, *point))
        for folder, point in zip(folders, points, strict=True)
    ]
    (status, out, _), *interrupted = run_forks(jobs)
    assert status == 0
    for (status, _, err), point in zip(interrupted, points, strict=True):
        assert status == 128 + number, (point, err)
        assert error_lines(err) == [
            "run_llama.py: interrupted; the same command with --resume goes on where it stopped"
        ], point
    for folder in folders:
        assert not list(folder.rglob(".*.tmp"))
    resumed = run_forks([job(folder, [*FINETUNE, "--resume"]) for folder in folders])
    for folder, point, (status, rest, err) in zip(folders, points, resumed, strict=True):
        assert status == 0, err
        assert_same_results(folder, expected)
        lines = epoch_lines(rest)
        assert lines == epoch_lines(out)[-len(lines) :], point


def test_signals_of_runs_without_a_state(run_forks: RunForks, workplace: Path) -> None:
    prompt = ["--option", "prompt"]
    for number in (INT, TERM):
        ((status, _, err),) = run_forks([job(workplace, prompt, (number, "eval", 1))])
        assert status == 128 + number
        assert error_lines(err) == ["run_llama.py: interrupted"]


def test_signals_wait_for_the_end_of_a_block() -> None:
    """As in the middle of TensorBoard's queue, where they made the end wait for ever."""
    before = signal.getsignal(signal.SIGTERM)
    done = []
    with pytest.raises(Interrupted), signals_wait():
        signal.raise_signal(signal.SIGTERM)
        done.append("block")
        stop_if_asked()
        done.append("after")
    with pytest.raises(Interrupted) as caught, signals_wait():
        signal.raise_signal(signal.SIGINT)
        done.append("block")
    assert done == ["block", "block"] and caught.value.number == signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupted_run_leaves_no_signal_behind(workplace: Path) -> None:
    """What comes after it in the same process is not interrupted."""
    assert interrupt(FINETUNE, 4) == 130
    assert main(["--option", "prompt"]) == 0


def test_a_state_without_its_best_checkpoint(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert interrupt(FINETUNE, 4) == 130
    Path("out/a.pt").unlink()
    status, _, err = run([*FINETUNE, "--resume"], capsys)
    assert status == 2 and "out/a.pt, the best epoch's result, is gone" in err


def test_an_ignored_signal_stays_ignored() -> None:
    """As SIGINT is in a script's background jobs, which a Ctrl-C in the terminal is not for."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals_wait():
            signal.raise_signal(signal.SIGINT)
            stop_if_asked()
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt(argv: Sequence[str], steps: int) -> int:
    """Run and interrupt after some steps; returns the status."""

    class Interrupting(run_llama.AdamW):
        def step(self, closure=None):  # type: ignore[no-untyped-def]
            nonlocal steps
            super().step(closure)
            steps -= 1
            if steps == 0:
                signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_llama, "AdamW", Interrupting)
        return main(argv)


def test_a_state_is_not_overwritten_and_goes_with_the_run(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert interrupt(FINETUNE, 4) == 130
    state = Path("out/a.pt.state")
    before = state.read_bytes()
    status, _, err = run(FINETUNE, capsys)
    assert status == 2 and state.read_bytes() == before
    assert err == (
        "run_llama.py: error: out/a.pt.state: holds a run that was interrupted; go on with it by "
        "--resume, or delete the file to begin anew\n"
    )
    assert main([*FINETUNE, "--resume"]) == 0
    assert not state.exists()
    status, _, err = run([*FINETUNE, "--resume"], capsys)
    assert status == 2 and "there is no such state; start without --resume" in err


def test_resume_with_other_settings_lists_them(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert interrupt(FINETUNE, 4) == 130
    before = Path("out/a.pt.state").read_bytes()
    Path("data/cfimdb-train.txt").write_text("\n".join(SENTENCES[::-1]) + "\n")
    argv = [*FINETUNE, "--resume", "--lr", "2e-3", "--hidden_dropout_prob", "0.1"]
    status, out, err = run(argv, capsys)
    assert status == 2 and "epoch" not in out and err.count("\n") == 1
    assert "--resume: out/a.pt.state is of a run with other settings: SHA-256 of data/" in err
    assert "; hidden_dropout_prob=0.3, now 0.1; lr=0.001, now 0.002\n" in err
    assert Path("out/a.pt.state").read_bytes() == before


def damage(state: dict[str, Any], name: str) -> Any:
    """A state with something wrong in it."""
    if name == "list":
        return [1, 2]
    if name == "checkpoint":
        return {"model": {}, "model_args": {}}
    if name == "settings":
        return {**state, "settings": None}
    if name == "shape":
        optimizer = {key: {**value} for key, value in state["optimizer"].items()}
        optimizer[0]["exp_avg"] = torch.zeros(3)
        return {**state, "optimizer": optimizer}
    if name == "step":
        optimizer = {key: {**value, "step": 0} for key, value in state["optimizer"].items()}
        return {**state, "optimizer": optimizer}
    if name == "place":
        return {**state, "done": -1}
    if name == "log":
        return {**state, "log": "../../elsewhere"}
    if name == "states":
        return {**state, "random": [{**state["random"][0], "torch": torch.zeros(3)}]}
    if name == "random":
        return {**state, "order": torch.zeros(7, dtype=torch.uint8)}
    return {key: value for key, value in state.items() if key != name}


DAMAGES = "truncated list checkpoint settings shape step place log states random model".split()
DAMAGES += "optimizer best totals".split()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_one_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert interrupt(FINETUNE, 4) == 130
    path = Path("out/a.pt.state")
    if name == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        torch.save(damage(load_safely(path), name), path)
    status, _, err = run([*FINETUNE, "--resume"], capsys)
    assert status == 2 and err.count("\n") == 1, err
    assert err.startswith("run_llama.py: error: out/a.pt.state: ")


def test_a_resumed_run_goes_on_in_its_own_curves(workplace: Path) -> None:
    assert interrupt(FINETUNE, 8) == 130
    assert main([*FINETUNE, "--resume"]) == 0
    (folder,) = [path for path in Path("out").iterdir() if path.is_dir()]
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("step/loss")] == list(range(12))
    assert [event.step for event in events.Scalars("accuracy/dev")] == [0, 1, 2, 3]


def test_a_loss_of_nan_keeps_the_last_good_state(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Spoiling(run_llama.AdamW):
        steps = 0

        def step(self, closure=None):  # type: ignore[no-untyped-def]
            super().step(closure)
            Spoiling.steps += 1
            if Spoiling.steps == 7:
                with torch.no_grad():
                    self.param_groups[0]["params"][-1].fill_(float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_llama, "AdamW", Spoiling)
        status, _, err = run([*FINETUNE, "--save_every", "1"], capsys)
    assert status == 2 and "step 6: made weights that are NaN" in err
    state = load_safely("out/a.pt.state")
    assert state["step"] == 6
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


# ------------------------------------------------------------------------------- micro-batches


def make_classifier(causal: bool) -> LlamaEmbeddingClassifier:
    config = ClassifierConfig(2, "", 0.0, "finetune")
    return LlamaEmbeddingClassifier(config, make_llama(causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4, 7, 9])
def test_micro_batches_have_the_same_loss_and_gradients(causal: bool, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(3, 320, (length,), generator=generator).tolist()
        for length in (3, 9, 14, 5, 7, 2, 11)
    ]
    tokens, lengths = pad_batch(rows, 3)
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    model = make_classifier(causal)

    def loss_of(*rows: Tensor) -> Tensor:
        return nn.functional.nll_loss(model(*rows[:2]), rows[2], reduction="sum")

    batch, cpu = (tokens, lengths, labels), torch.device("cpu")
    expected = accumulate(loss_of, model, batch, 10, None, cpu)
    gradients = [parameter.grad for parameter in model.parameters()]
    assert expected == loss_of(*batch) / 10
    model.zero_grad()
    loss = accumulate(loss_of, model, batch, 10, size, cpu)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", RUNS)
def test_micro_batches_train_alike(workplace: Path, kind: str) -> None:
    still = [*RUNS[kind], "--dropout", "0"]
    still += [] if kind == "pretrain" else ["--hidden_dropout_prob", "0", "--lr", "1e-4"]
    weights = []
    for flags in ([], ["--micro_batch_size", "1"]):
        assert main([*still, *flags]) == 0
        weights.append(read_checkpoint("out/a.pt")["model"])
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], atol=1e-6, rtol=0)


def test_micro_batches_take_less_memory(workplace: Path) -> None:
    """Where the whole batch does not fit, the run fails with an advice that works."""
    save_llama(make_llama(causal=True, dim=240, n_layers=4), Path("stories42M.pt"))
    lines = [f"{i % 2} ||| {'a long and dull film ' * 8}" for i in range(160)]
    Path("data/cfimdb-train.txt").write_text("\n".join(lines) + "\n")
    argv = [sys.executable, str(ROOT / "run_llama.py"), "--option", "finetune", "--epochs", "1"]
    argv += ["--batch_size", "160", "--filepath", "out/a.pt"]
    limit = 2 << 30

    def start(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*argv, *flags],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )

    done = start()
    assert done.returncode == 2
    assert error_lines(done.stderr) == [
        "run_llama.py: error: out of memory; compute fewer rows at a time: --micro_batch_size"
    ]
    done = start("--micro_batch_size", "8")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), MemoryError()])
def test_out_of_memory_is_one_line(
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    """CUDA's error is raised by hand, since the device cannot be had."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(run_llama, "train_epoch", fail)
    status, _, err = run(FINETUNE, capsys)
    assert status == 2
    assert err == (
        "run_llama.py: error: out of memory; compute fewer rows at a time: --micro_batch_size\n"
    )


# ----------------------------------------------------------------------------------- processes


def start_torchrun(
    processes: int, argv: Sequence[str], cwd: Path, machines: Sequence[str] = ("--standalone",)
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *machines]
    command += ["--nproc_per_node", str(processes), str(ROOT / "run_llama.py"), *argv]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(processes: int, argv: Sequence[str], cwd: Path) -> str:
    """Standard output of a run of several processes that has to end well."""
    process = start_torchrun(processes, argv, cwd)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def assert_close_results(folder: Path, expected: Path) -> None:
    """The same best checkpoint to 1e-6, and the same predictions."""
    ours, theirs = (read_checkpoint(path / "out/a.pt")["model"] for path in (folder, expected))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)
    for path in (expected / "out").glob("*-output.txt"):
        assert (folder / "out" / path.name).read_bytes() == path.read_bytes()


STILL = ["--dropout", "0", "--lr", "1e-4", "--epochs", "2"]
STILL_FINETUNE = [*FINETUNE, *STILL, "--hidden_dropout_prob", "0"]
STILL_RUNS = {
    # three processes, and two rows in the last batch; five, and eight in it with a batch of twelve
    "reference 2": (2, [*STILL_FINETUNE, "--micro_batch_size", "1"]),
    "reference 3": (3, STILL_FINETUNE),
    "causal 2": (2, [*STILL_FINETUNE, "--causal"]),
    "pretrain 2": (2, [*PRETRAIN, *STILL, "--micro_batch_size", "1"]),
    "pretrain 3": (3, [*PRETRAIN, *STILL]),
}


@pytest.mark.parametrize("name", STILL_RUNS)
def test_several_processes_compute_what_one_does(
    workplace: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    processes, argv = STILL_RUNS[name]
    folder = copy_of(workplace, "several")
    out = torchrun(processes, argv, folder)
    status, expected, _ = run(argv, capsys)
    assert status == 0
    assert epoch_lines(out) == epoch_lines(expected)
    assert out.count("save the model") == expected.count("save the model")
    assert_close_results(folder, workplace)
    (log,) = [path for path in (folder / "out").iterdir() if path.is_dir()]
    assert len(list(log.iterdir())) == 1  # one process has written
    (theirs,) = [path for path in Path("out").iterdir() if path.is_dir()]
    curves = [
        [event.value for event in EventAccumulator(str(path)).Reload().Scalars("step/loss")]
        for path in (log, theirs)
    ]
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def start_two_machines(
    workplace: Path, argv: Sequence[str]
) -> list[tuple[Path, subprocess.Popen[str]]]:
    """One process on each of two, which have the inputs but share no folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    folders = [copy_of(workplace, name) for name in ("one", "two")]
    return [(folder, start_torchrun(1, argv, folder, flags)) for folder in folders]


def test_two_machines(workplace: Path) -> None:
    """Only the first process's machine has results; it may be either."""
    assert main(STILL_FINETUNE) == 0
    machines = start_two_machines(workplace, STILL_FINETUNE)
    outs = []
    for _, process in machines:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        outs.append(out)
    writers = [folder for folder, _ in machines if (folder / "out/a.pt").exists()]
    assert len(writers) == 1 and sum("dev acc" in out for out in outs) == 1
    assert_close_results(writers[0], workplace)


def test_a_lost_machine_ends_the_other(workplace: Path) -> None:
    """SIGKILL to all that runs on one of two."""
    machines = start_two_machines(workplace, [*STILL_FINETUNE, "--epochs", "5000"])
    logs = [folder / "out/a.pt" for folder, _ in machines]
    while not any(log.exists() for log in logs):
        assert all(process.poll() is None for _, process in machines)
        time.sleep(0.1)
    (_, survivor), (_, lost) = machines
    for pid in [*ranks_of(lost), lost.pid]:
        os.kill(pid, signal.SIGKILL)
    lost.communicate()
    _, err = survivor.communicate(timeout=60)
    assert survivor.returncode != 0
    assert "error: lost another process: " in err


def test_prompt_in_several_processes(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--option", "prompt", "--batch_size", "3"]
    folder = copy_of(workplace, "several")
    out = torchrun(2, argv, folder)
    status, expected, _ = run(argv, capsys)
    assert status == 0 and out == expected
    for split in ("dev", "test"):
        name = f"output/task_2/cfimdb-{split}-prompting-output.txt"
        assert (folder / name).read_bytes() == Path(name).read_bytes()


def test_generate_is_for_one_process(workplace: Path) -> None:
    process = start_torchrun(2, [], workplace)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: --option generate runs in one process; start it without torchrun" in err


def test_another_number_of_processes_resumes(run_forks: RunForks, workplace: Path) -> None:
    """One process is interrupted, three go on and are interrupted, two end it."""
    argv = [*STILL_FINETUNE, "--epochs", "30", "--lr", "1e-5"]  # long enough to be interrupted
    assert main(argv) == 0
    folder = copy_of(workplace, "several")
    ((status, _, _),) = run_forks([job(folder, argv, (INT, "step", 2))])
    assert status == 130
    first = load_safely(folder / "out/a.pt.state")
    process = start_torchrun(3, [*argv, "--resume", "--save_every", "1"], folder)
    while load_safely(folder / "out/a.pt.state")["step"] == first["step"]:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    second = load_safely(folder / "out/a.pt.state")
    assert first["step"] == 2 < second["step"] and len(second["random"]) == 3
    torchrun(2, [*argv, "--resume"], folder)
    assert_close_results(folder, workplace)
    assert not (folder / "out/a.pt.state").exists()


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of what torchrun has started."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def test_a_dead_process_ends_the_others(workplace: Path) -> None:
    """SIGKILL to one of three in the middle of training."""
    argv = [*STILL_FINETUNE, "--epochs", "5000"]
    process = start_torchrun(3, argv, workplace)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1"):
            break
    ranks = ranks_of(process)
    assert len(ranks) == 3
    os.kill(ranks[1], signal.SIGKILL)
    start = time.perf_counter()
    _, err = process.communicate(timeout=60)
    assert time.perf_counter() - start < 60 and process.returncode != 0
    assert "Signal 9 (SIGKILL)" in err
    for pid in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# ------------------------------------------------------------------------- files that are whole


@pytest.mark.parametrize("option", ["finetune", "pretrain", "prompt", "generate"])
def test_a_full_disk_leaves_the_old_files(workplace: Path, option: str) -> None:
    """Writes fail in their middle, by a limit on a file's size; old results stay as they were."""
    argv = {
        "finetune": FINETUNE,
        "pretrain": PRETRAIN,
        "prompt": ["--option", "prompt"],
        "generate": ["--max_new_tokens", "60"],
    }[option]
    assert main(argv) == 0
    results = [
        path
        for path in Path().rglob("out*/**/*")
        if path.is_file() and "events" not in path.name and path.suffix in (".pt", ".txt")
    ]
    assert results
    before = {path: path.read_bytes() for path in results}
    limit = min(len(content) for content in before.values()) // 2
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_llama.py"), *argv, "--seed", "7"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    (error,) = error_lines(done.stderr)
    assert re.fullmatch("run_llama.py: error: .*File too large", error)
    assert {path: path.read_bytes() for path in results} == before
    assert not list(Path().rglob(".*.tmp"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_file_system(run_forks: RunForks, workplace: Path) -> None:
    """The same on a real one, of 200 KB, smaller than the checkpoint."""
    disk = workplace / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (disk / "a.pt").write_bytes(b"old")
        ((status, _, err),) = run_forks([job(workplace, [*FINETUNE, "--filepath", "disk/a.pt"])])
        assert status == 2
        assert error_lines(err) == ["run_llama.py: error: disk/a.pt: No space left on device"]
        assert [path.name for path in disk.iterdir()] == ["a.pt"]
        assert (disk / "a.pt").read_bytes() == b"old"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_unwritable_folder_is_found_before_any_work(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").write_text("a file")
    status, out, err = run([*FINETUNE, "--filepath", "taken/a.pt"], capsys)
    assert (status, out) == (2, "") and err.count("\n") == 1 and "taken" in err


# ---------------------------------------------------------------------- seeds and determinism


def test_seeds_are_summed_up_and_resumed(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*FINETUNE, "--seeds", "1,2,3", "--epochs", "2"]
    status, out, err = run(argv, capsys)
    assert (status, err) == (0, "")
    written = json.loads(Path("out/a.seeds.json").read_text())
    assert [*written["accuracy"]] == ["1", "2", "3"]
    for i, split in enumerate(("dev", "test")):
        values = [accuracies[i] for accuracies in written["accuracy"].values()]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        assert written[split]["mean"] == pytest.approx(mean)
        assert written[split]["standard deviation"] == pytest.approx(deviation)
        assert f"{split} acc over 3 seeds :: {mean:.3f} +- {deviation:.3f}\n" in out
    # Each is the run of its seed alone.
    predictions = {
        number: Path(f"out/seed-{number}-dev-finetuning-output.txt").read_bytes()
        for number in "123"
    }
    for number in "123":
        alone = [*FINETUNE, "--epochs", "2", "--seed", number, "--filepath", "out/alone.pt"]
        assert main(alone) == 0
        assert Path("out/dev-finetuning-output.txt").read_bytes() == predictions[number]
        models = [read_checkpoint(f"out/{n}.pt")["model"] for n in ("alone", f"a-seed-{number}")]
        assert_equal(models[0], models[1])

    shutil.rmtree("out")
    steps_of_a_run = 6
    assert interrupt(argv, steps_of_a_run + 4) == 130
    status, out, _ = run([*argv, "--resume"], capsys)
    assert status == 0 and "seed 1\n" not in out and "seed 2\n" in out and "epoch 0" in out
    again = json.loads(Path("out/a.seeds.json").read_text())
    assert again == written


def test_seeds_of_another_run_are_not_taken(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*FINETUNE, "--seeds", "1,2", "--epochs", "1"]
    assert main(argv) == 0
    status, _, err = run([*argv, "--resume", "--lr", "1e-4"], capsys)
    assert status == 2 and "with other settings: lr=0.001, now 0.0001" in err
    Path("out/a.seeds.json").write_text("[]")
    status, _, err = run([*argv, "--resume"], capsys)
    assert status == 2 and "holds no accuracies of several seeds" in err


@pytest.mark.parametrize("text", ["1", "1,1", "1,x", "", "-1,2", "1,,2"])
def test_bad_seeds(workplace: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    status, _, err = run([*FINETUNE, f"--seeds={text}"], capsys)
    assert status == 2 and "--seeds" in err and err.count("\n") == 1


def test_deterministic_runs_are_equal(run_forks: RunForks, workplace: Path) -> None:
    argv = [*FINETUNE, "--deterministic"]
    folders = [copy_of(workplace, name) for name in "ab"]
    results = run_forks([job(folder, argv) for folder in folders])
    assert [status for status, _, _ in results] == [0, 0]
    assert_same_results(folders[0], folders[1])
