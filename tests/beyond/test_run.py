"""Training runs that are killed and resumed, computed in micro-batches, and short of disk space.

Signals are in `test_interrupts.py`, several processes in `test_processes.py`, and each kill point
in `tests/sweeps/test_kill_points.py`.
"""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import run_llama
from base_llama import load_safely, read_checkpoint
from beyond.processes import backward_in_micro_batches
from classifier import ClassifierConfig, LlamaEmbeddingClassifier, load_classifier
from llama import load_pretrained
from run_llama import main
from tests.beyond.runs import (
    FINETUNE,
    KILL,
    PRETRAIN,
    RUNS,
    TERM,
    Job,
    RunForks,
    Strike,
    assert_same_results,
    copy_of,
    error_lines,
    interrupt,
    run,
    run_uninterrupted,
    strike_and_resume,
)
from tests.conftest import SENTENCES, make_llama, pad_rows, save_llama, write_inputs

STATE = Path("out/a.pt.state")  # the training checkpoint of FINETUNE and PRETRAIN
EVERY_TWO = ["--save_every", "2"]


# -------------------------------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def interrupted_run(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a run that was interrupted after its fourth step."""
    folder = tmp_path_factory.mktemp("interrupted")
    write_inputs(folder, tokenizer_path, make_llama(causal=False))
    with contextlib.chdir(folder):
        assert interrupt(FINETUNE, 4) == 130
    return folder


@pytest.fixture
def interrupted(interrupted_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the current folder a copy of that folder."""
    shutil.copytree(interrupted_run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


# The sweep `test_kill_points.py` tries more points of all three.
@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["reference", "causal", "pretrain"])
def test_a_killed_run_ends_as_if_it_had_not_been(
    run_forks: RunForks, workplace: Path, kind: str
) -> None:
    """SIGKILL at a step, in a write, at a rename; then --resume: weights, moments, predictions."""
    argv = RUNS[kind]
    expected = run_uninterrupted(run_forks, workplace, argv)
    points = [
        (EVERY_TWO, Strike(KILL, "step", 7)),  # one step after a save
        ([], Strike(KILL, "write", 4)),
        ([], Strike(KILL, "replace", 6)),
        (EVERY_TWO, Strike(KILL, "replaced", 5)),
    ]
    ends = [
        strike_and_resume(run_forks, workplace, [*argv, *flags], strike, expected)
        for flags, strike in points
    ]
    assert ends == [(True, True)] * len(points)


def test_a_training_checkpoint_is_not_overwritten_and_goes_with_the_run(
    interrupted: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = STATE.read_bytes()
    status, _, err = run(FINETUNE, capsys)
    assert status == 2 and STATE.read_bytes() == before
    assert err == (
        "run_llama.py: error: out/a.pt.state: is the training checkpoint of an interrupted run; "
        "resume the run with --resume, or delete the file to start again\n"
    )
    assert main([*FINETUNE, "--resume"]) == 0
    assert not STATE.exists()
    status, _, err = run([*FINETUNE, "--resume"], capsys)
    assert status == 2 and "there is no training checkpoint; start without --resume" in err


def test_a_training_checkpoint_without_its_best_checkpoint(
    interrupted: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out/a.pt").unlink()
    status, _, err = run([*FINETUNE, "--resume"], capsys)
    assert status == 2 and "out/a.pt, the best epoch's result, is missing" in err


def test_resume_with_other_settings_lists_them(
    interrupted: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = STATE.read_bytes()
    Path("data/cfimdb-train.txt").write_text("\n".join(SENTENCES[::-1]) + "\n")
    argv = [*FINETUNE, "--resume", "--lr", "2e-3", "--hidden_dropout_prob", "0.1"]
    status, out, err = run(argv, capsys)
    assert status == 2 and "epoch" not in out and err.count("\n") == 1
    beginning = "--resume: out/a.pt.state belongs to a run with other settings: SHA-256 of data/"
    assert beginning in err
    assert "; hidden_dropout_prob=0.3, now 0.1; lr=0.001, now 0.002\n" in err
    assert STATE.read_bytes() == before


State = dict[str, Any]


def change_optimizer(state: State, **values: Any) -> State:
    """Change the optimizer's state of every parameter."""
    optimizer = {number: {**own, **values} for number, own in state["optimizer"].items()}
    return {**state, "optimizer": optimizer}


def without(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if key != name}


DAMAGES: dict[str, Callable[[State], Any]] = {
    "a list": lambda state: [1, 2],
    "another checkpoint": lambda state: {"model": {}, "model_args": {}},
    "hyperparameters": lambda state: {**state, "hyperparameters": None},
    "moment of another shape": lambda state: change_optimizer(state, exp_avg=torch.zeros(3)),
    "step 0 of the optimizer": lambda state: change_optimizer(state, step=0),
    "position before the first step": lambda state: {**state, "position": {"epoch": 0, "step": -1}},
    "position before the first epoch": lambda state: {
        **state,
        "position": {"epoch": -1, "step": 0},
    },
    "position without a step": lambda state: {**state, "position": {"epoch": 1}},
    "log of another run": lambda state: {**state, "log": "b-20260101-000000"},
    "log elsewhere": lambda state: {**state, "log": "../../elsewhere"},
    "log elsewhere, by its name": lambda state: {**state, "log": "a-/../../../elsewhere"},
    "random state": lambda state: {
        **state,
        "random": [{**state["random"][0], "torch": torch.zeros(3)}],
    },
    "best epoch in the future": lambda state: {**state, "best_epoch": 10**30},
    "best epoch before the first": lambda state: {**state, "best_epoch": -1},
    "order": lambda state: {**state, "order": torch.zeros(7, dtype=torch.uint8)},
}
KEYS = "hyperparameters position best best_epoch totals order random log model optimizer".split()
DAMAGES |= {f"without {key}": partial(without, name=key) for key in KEYS}


@pytest.mark.parametrize("name", ["truncated", *DAMAGES])
def test_a_damaged_training_checkpoint_is_one_line(
    interrupted: None, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if name == "truncated":
        STATE.write_bytes(STATE.read_bytes()[:-1000])
    else:
        state = load_safely(STATE)
        assert {*KEYS} == state.keys()
        torch.save(DAMAGES[name](state), STATE)
    status, _, err = run([*FINETUNE, "--resume"], capsys)
    assert status == 2 and err.count("\n") == 1, err
    assert err.startswith("run_llama.py: error: out/a.pt.state: ")


def test_a_training_checkpoint_of_an_earlier_version_is_refused_by_name(
    interrupted: None, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_safely(STATE)
    same = {key: state[key] for key in ("best", "order", "random", "log", "model", "optimizer")}
    earlier = {"settings": state["hyperparameters"], "epoch": 1, "done": 1, "step": 4}
    torch.save({**earlier, "totals": [1.0, 30.0, 40.0], **same}, STATE)
    before = STATE.read_bytes()
    status, _, err = run([*FINETUNE, "--resume"], capsys)
    assert status == 2 and STATE.read_bytes() == before
    assert err == (
        "run_llama.py: error: out/a.pt.state: an earlier version of this program wrote this "
        "training checkpoint; finish the run with that version, or delete the file and start "
        "again\n"
    )


def test_a_resumed_run_goes_on_in_its_own_curves(workplace: Path) -> None:
    assert interrupt(FINETUNE, 8) == 130
    assert main([*FINETUNE, "--resume"]) == 0
    (folder,) = [path for path in Path("out").iterdir() if path.is_dir()]
    train, dev = (EventAccumulator(str(folder / name)).Reload() for name in ("train", "dev"))
    assert [event.step for event in train.Scalars("loss")] == list(range(1, 13))
    assert [event.step for event in dev.Scalars("accuracy")] == [3, 6, 9, 12]


def test_a_loss_of_nan_keeps_the_last_good_training_checkpoint(
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
    assert status == 2 and "step 6: made weights that are infinite or NaN" in err
    state = load_safely(STATE)
    assert state["position"] == {"epoch": 1, "step": 3}  # six steps are done
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_deterministic_runs_are_equal(run_forks: RunForks, workplace: Path) -> None:
    argv = [*FINETUNE, "--deterministic"]
    folders = [copy_of(workplace, name) for name in "ab"]
    results = run_forks([Job(argv, folder) for folder in folders])
    assert [result.status for result in results] == [0, 0]
    assert_same_results(folders[0], folders[1])


# ------------------------------------------------------------------------------- untied matrices


def save_untied() -> Tensor:
    """Replace the default checkpoint by an untied one; returns its output matrix."""
    llama = make_llama(False, tie_embeddings=False, rope_theta=500000.0)
    Path("stories42M.pt").unlink()  # other folders may have links to it
    save_llama(llama, Path("stories42M.pt"))
    return llama.output.weight.detach()


@pytest.mark.parametrize("causal", [False, True])
def test_finetuning_leaves_an_untied_output_as_it_is(
    workplace: Path, capsys: pytest.CaptureFixture[str], causal: bool
) -> None:
    """All else trains. `--option classify` predicts with the saved classifier what the run did."""
    output = save_untied()
    assert main([*RUNS["causal" if causal else "reference"], "--batch_size", "1"]) == 0
    best, start = load_classifier("out/a.pt"), load_pretrained("stories42M.pt")
    assert best.llama.config == replace(start.config, causal=causal, dropout=0.1)
    assert torch.equal(best.llama.output.weight, output)
    for name, parameter in start.named_parameters():
        trained = not torch.equal(best.llama.get_parameter(name), parameter)
        assert trained == (name != "output.weight"), name
    argv = ["--option", "classify", "--filepath", "out/a.pt", "--input", "data/cfimdb-dev.txt"]
    status, out, _ = run([*argv, "--batch_size", "1"], capsys)
    lines = Path("out/dev-finetuning-output.txt").read_text(encoding="utf-8").splitlines()
    predictions = [["bad", "good"][int(line[0])] for line in lines]
    assert status == 0 and [line.split("\t")[0] for line in out.splitlines()] == predictions


UNTIED_RUNS = {name: argv for name, argv in RUNS.items() if name != "pretrain"}
UNTIED_RUNS["pretrain"] = [*PRETRAIN[:6], "--max_seq_len", "16", "--dropout", "0.1"]
UNTIED_RUNS["pretrain"] += ["--dtype", "float32", "--filepath", "out/a.pt"]


@pytest.mark.parametrize(
    "kind", [pytest.param("reference", marks=pytest.mark.sweep), "causal", "pretrain"]
)
def test_an_untied_run_that_is_terminated_and_resumed_ends_alike(
    run_forks: RunForks, workplace: Path, kind: str
) -> None:
    """Bit for bit: weights, moments, predictions; a frozen matrix has no moments."""
    output = save_untied()
    expected = run_uninterrupted(run_forks, workplace, UNTIED_RUNS[kind])
    for strike in (Strike(TERM, "step", 7), Strike(TERM, "eval", 1)):
        end = strike_and_resume(run_forks, workplace, UNTIED_RUNS[kind], strike, expected)
        assert end == (True, True)
    state = load_safely(expected.folder / STATE)
    best = read_checkpoint(expected.folder / "out/a.pt")["model"]
    prefix = "" if kind == "pretrain" else "llama."
    unchanged = torch.equal(best[f"{prefix}output.weight"], output)
    stored = "llama.output.weight" if kind == "pretrain" else "classifier.llama.output.weight"
    assert torch.equal(state["model"][stored], output) == unchanged
    # The parameters are output, tok_embeddings, ...; all but a frozen output have moments.
    numbers = set(range(len(state["model"])))
    if kind == "pretrain":
        assert not unchanged and state["optimizer"].keys() == numbers
    else:
        assert unchanged and state["optimizer"].keys() == numbers - {0}


# ---------------------------------------------------------------------------------- micro-batches


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
    tokens, lengths = pad_rows(rows, 3)
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    model = make_classifier(causal)

    def loss_fn(model: nn.Module, *rows: Tensor) -> Tensor:
        return nn.functional.nll_loss(model(*rows[:2]), rows[2], reduction="sum")

    batch = (tokens, lengths, labels)
    expected = backward_in_micro_batches(loss_fn, model, batch, 10)
    gradients = [parameter.grad for parameter in model.parameters()]
    assert expected == loss_fn(model, *batch) / 10
    model.zero_grad()
    loss = backward_in_micro_batches(loss_fn, model, batch, 10, size)
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


def test_micro_batches_take_less_memory(run_forks: RunForks, workplace: Path) -> None:
    """Where the whole batch does not fit, the run fails with an advice that works."""
    save_llama(make_llama(causal=True, n_layers=4), Path("stories42M.pt"))
    lines = [f"{i % 2} ||| {'a long and dull film ' * 8}" for i in range(160)]
    Path("data/cfimdb-train.txt").write_text("\n".join(lines) + "\n")
    argv = [
        "--option",
        "finetune",
        "--epochs",
        "1",
        "--batch_size",
        "160",
        "--filepath",
        "out/a.pt",
    ]
    memory = 180 << 20  # the whole batch takes more than 300 MiB, the micro-batches about 100
    ((status, _, err),) = run_forks([Job(argv, workplace, memory=memory)])
    assert status == 2
    assert error_lines(err) == [
        "run_llama.py: error: out of memory; compute fewer rows at a time with --micro_batch_size"
    ]
    argv += ["--micro_batch_size", "8"]
    ((status, _, err),) = run_forks([Job(argv, workplace, memory=memory)])
    assert status == 0, err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), MemoryError()])
def test_out_of_memory_is_one_line(
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    """CUDA's error is raised by hand, since there may be no such device here."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(run_llama, "classification_loss", fail)
    status, _, err = run(FINETUNE, capsys)
    assert status == 2
    assert err == (
        "run_llama.py: error: out of memory; compute fewer rows at a time with --micro_batch_size\n"
    )


# -------------------------------------------------------------------------------------- early stop

# A learning rate of 0 never changes the dev accuracy, so epoch 0 stays the best one.
STOPPED = [*FINETUNE, "--lr", "0", "--patience", "2"]  # after epoch 2, which are 9 steps
STOP = "stop: none of the last 2 epochs was the best on dev\n"


def dev_accuracies(out: str) -> list[float]:
    """Return the dev accuracy of each epoch of a run."""
    return [float(x) for x in re.findall(r"^epoch .*dev acc :: (.*)", out, re.MULTILINE)]


def epochs_with(patience: int, accuracies: list[float]) -> int:
    """Return how many epochs a run has that stops `patience` epochs after its best one."""
    best = 0
    for epoch, accuracy in enumerate(accuracies):
        if accuracy > accuracies[best]:
            best = epoch
        if epoch - best >= patience:
            return epoch + 1
    return len(accuracies)


def test_patience_ends_a_run_some_epochs_after_the_best_one(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until then, epochs and learning rates are those of the whole run, and so is its best."""
    argv = [*FINETUNE, "--epochs", "10", "--lr", "3e-3", "--warmup", "0.1", "--linear_decay"]

    def output_and_rates(*flags: str) -> tuple[str, list[float]]:
        shutil.rmtree("out", ignore_errors=True)
        status, out, err = run([*argv, *flags], capsys)
        assert status == 0, err
        (folder,) = [path for path in Path("out").iterdir() if path.is_dir()]
        rates = EventAccumulator(str(folder / "train")).Reload().Scalars("learning_rate")
        return out, [rate.value for rate in rates]

    whole, all_rates = output_and_rates()
    accuracies = dev_accuracies(whole)
    assert len(set(accuracies)) > 1 and "stop:" not in whole
    for patience in (1, 2, 3):
        out, rates = output_and_rates("--patience", str(patience))
        expected = epochs_with(patience, accuracies)
        assert patience < expected < 10  # it is not that simple
        assert dev_accuracies(out) == accuracies[:expected]
        assert rates == all_rates[: 3 * expected]
        best = accuracies.index(max(accuracies[:expected]))
        assert re.search(rf"best epoch +{best} \(of 0 to {expected - 1}\)\n", out)
        assert out.count("stop: none of the last") == 1


def test_patience_that_does_not_run_out_changes_nothing(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run([*STOPPED, "--patience", "4"], capsys)
    assert status == 0 and len(dev_accuracies(out)) == 4 and "stop:" not in out
    kept = []
    for flags in ([], ["--patience", "9"]):
        assert run([*FINETUNE, *flags], capsys)[0] == 0
        kept.append(read_checkpoint("out/a.pt")["model"])
    plain, ours = kept
    assert all(torch.equal(ours[name], weight) for name, weight in plain.items())


@pytest.mark.sweep
def test_a_stopped_run_stays_stopped_when_it_is_resumed(
    run_forks: RunForks, workplace: Path
) -> None:
    argv = [*STOPPED, "--save_every", "2"]
    expected = run_uninterrupted(run_forks, workplace, argv)
    assert len(dev_accuracies(expected.out)) == 3 and STOP in expected.out
    for strike in (
        Strike(KILL, "step", 7),  # epoch 2, one step after a save
        Strike(TERM, "step", 9),
        Strike(TERM, "eval", 30),  # epoch 2, the last one
        Strike(TERM, "eval", 38),  # all epochs are done: the predictions of dev
        Strike(TERM, "eval", 44),  # and of test
        Strike(KILL, "replace", 12),
    ):
        ends = strike_and_resume(run_forks, workplace, argv, strike, expected)
        assert ends == (True, True), strike


def test_a_run_interrupted_in_its_predictions_does_not_train_again(
    run_forks: RunForks, workplace: Path
) -> None:
    ((status, _, _),) = run_forks([Job(STOPPED, workplace, Strike(TERM, "eval", 38))])
    assert status == 128 + TERM
    ((status, out, err),) = run_forks([Job([*STOPPED, "--resume"], workplace)])
    assert status == 0, err
    assert dev_accuracies(out) == [] and STOP in out and "test acc ::" in out


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_stop_after_the_same_epoch(
    run_forks: RunForks, workplace: Path, processes: int
) -> None:
    ((status, out, err),) = run_forks([Job(STOPPED, workplace, processes=processes)])
    assert status == 0, err
    assert len(dev_accuracies(out)) == 3 and out.count(STOP) == 1


# -------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize("option", ["finetune", "pretrain", "prompt", "generate"])
def test_a_full_disk_leaves_the_old_files(
    run_forks: RunForks, workplace: Path, option: str
) -> None:
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
    job = Job([*argv, "--seed", "7"], workplace, file_size=limit, keep=False)
    ((status, _, err),) = run_forks([job])
    assert status == 2, err
    (error,) = error_lines(err)
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
        ((status, _, err),) = run_forks([Job([*FINETUNE, "--filepath", "disk/a.pt"], workplace)])
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
