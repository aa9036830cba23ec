"""Training runs of a second, and helpers that interrupt them, resume them, and compare results."""

import os
import re
import secrets
import shutil
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import run_llama
from base_llama import load_safely, read_checkpoint

# 8 sentences: three steps per epoch, the last one of two sentences; 12 steps in all.
FINETUNE = ["--option", "finetune", "--batch_size", "3", "--epochs", "4", "--lr", "1e-3"]
FINETUNE += ["--dropout", "0.1", "--filepath", "out/a.pt"]
FINETUNE += ["--dev_out", "out/dev-finetuning-output.txt"]
FINETUNE += ["--test_out", "out/test-finetuning-output.txt"]
# 9 blocks: five steps per epoch; 20 steps in all.
PRETRAIN = ["--option", "pretrain", "--batch_size", "2", "--epochs", "4", "--dim", "32"]
PRETRAIN += ["--n_layers", "1", "--n_heads", "4", "--max_seq_len", "16", "--dropout", "0.1"]
PRETRAIN += ["--tokenizer_path", "tokenizer.model", "--dtype", "float32", "--filepath", "out/a.pt"]
RUNS = {"reference": FINETUNE, "causal": [*FINETUNE, "--causal"], "pretrain": PRETRAIN}
KILL, INT, TERM = int(signal.SIGKILL), int(signal.SIGINT), int(signal.SIGTERM)
INTERRUPTED = "run_llama.py: interrupted"
RESUME_HINT = "; the same command with --resume continues where it stopped"


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run a command line in this process; returns status, output, and errors without progress."""
    capsys.readouterr()
    status = run_llama.main(argv)
    out, err = capsys.readouterr()
    return status, out, re.sub(r"[^\n]*\r", "", err)


def free_port() -> int:
    """Return a TCP port that is free, and that no outgoing connection will get.

    It does not come from the global generator: runs seed that, so two processes that test at the
    same time would get the same port.
    """
    while True:
        port = 20_000 + secrets.randbelow(10_000)  # systems assign higher ones
        with socket.socket() as attempt, suppress(OSError):
            attempt.bind(("", port))
            return port


# ------------------------------------------------------------------- jobs of the warm process


class Strike(NamedTuple):
    """A signal that a process sends to itself when it comes to a place for the `nth` time.

    Places:
        step: an optimizer's step is done.
        eval: a tensor of an evaluation's batch was moved to the device.
        write: half of a checkpoint, or of a training checkpoint, is written.
        replace: a complete file is about to get its final name.
        replaced: it has its final name.
        time: anywhere; `nth` milliseconds after the start.
    """

    signal: int
    place: str
    nth: int
    rank: int = 0  # of the process that is struck, if there are several


PLACES = ("step", "eval", "write", "replace", "replaced")  # those that can be counted


class Job(NamedTuple):
    """A command line to run in a fork of the warm process (`forks.py`).

    Attributes:
        argv: the words of the command line.
        cwd: the folder where it runs.
        strike: what interrupts it, or None.
        processes: how many run it together, as torchrun would start them.
        keep: whether the training checkpoint of a complete run is kept, so that tests can read it.
        memory: bytes that each process may have more than at its start, or None.
        file_size: bytes that a file may have, or None.
        watch: whether to write the resident bytes and the number of open files after each training
            step, or each sampled token, to samples.json.
        stdin: what a pipe holds that is its standard input, or None.
    """

    argv: Sequence[str]
    cwd: Path
    strike: Strike | None = None
    processes: int = 1
    keep: bool = True
    memory: int | None = None
    file_size: int | None = None
    watch: bool = False
    stdin: bytes | None = None


class Result(NamedTuple):
    """How a job ended; several processes have ended with the same status."""

    status: int  # negative: the number of the signal that killed it
    out: str  # of several processes, one after the other
    err: str


RunForks = Callable[[Sequence[Job]], list[Result]]


# ---------------------------------------------------------------------------------- comparison


def copy_of(workplace: Path, name: str) -> Path:
    """Make a folder with the inputs of a run and nothing else."""
    folder = workplace / name
    shutil.copytree(workplace / "data", folder / "data")
    for file in ("stories42M.pt", "tokenizer.model"):
        os.link(workplace / file, folder / file)
    return folder


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Compare bit for bit, through dicts and lists."""
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
    """Two runs have the same last training checkpoint, best checkpoint, and predictions."""
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


def assert_close_results(folder: Path, expected: Path) -> None:
    """Two runs have the same best checkpoint, to 1e-6, and the same predictions."""
    ours, theirs = (read_checkpoint(path / "out/a.pt")["model"] for path in (folder, expected))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)
    for path in (expected / "out").glob("*-output.txt"):
        assert (folder / "out" / path.name).read_bytes() == path.read_bytes()


def error_lines(err: str) -> list[str]:
    """Return the lines of standard error without progress bars and notes of replaced results."""
    lines = [line.strip() for line in re.split("[\r\n]+", err)]
    noise = re.compile(r"(it/s|s/it)[],]|note: replaces ")
    return [line for line in lines if line and not noise.search(line)]


def epoch_lines(out: str) -> list[str]:
    """Return the lines that a run printed about its epochs, without the speed."""
    lines = re.findall(r"^(?:epoch|train padding|dev acc|test acc).*", out, re.MULTILINE)
    return [re.sub(", tokens/s.*", "", line) for line in lines]


# ------------------------------------------------------------------------------- interruption


def interrupt(argv: Sequence[str], steps: int) -> int:
    """Fine-tune in this process, interrupted (SIGINT) after some steps; returns the status."""

    class Interrupting(run_llama.AdamW):
        def step(self, closure=None):  # type: ignore[no-untyped-def]
            nonlocal steps
            super().step(closure)
            steps -= 1
            if steps == 0:
                signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_llama, "AdamW", Interrupting)
        return run_llama.main(argv)


class Uninterrupted(NamedTuple):
    """A run that nothing has interrupted."""

    folder: Path
    out: str


def run_uninterrupted(run_forks: RunForks, workplace: Path, argv: Sequence[str]) -> Uninterrupted:
    """Run a command line in a folder of its own."""
    folder = copy_of(workplace, "expected")
    ((status, out, err),) = run_forks([Job(argv, folder)])
    assert status == 0, err
    return Uninterrupted(folder, out)


def strike_and_resume(
    run_forks: RunForks,
    workplace: Path,
    argv: Sequence[str],
    strike: Strike,
    expected: Uninterrupted,
) -> tuple[bool, bool]:
    """Strike a run, start it again, and assert that its results are those of `expected`.

    After SIGINT and SIGTERM in the training the run can be resumed, and says so. After SIGKILL it
    is resumed if it has been saved, and otherwise started anew.

    Returns:
        Whether the run ended by the strike, and whether it was resumed.
    """
    folder = copy_of(workplace, "struck")
    ((status, _, err),) = run_forks([Job(argv, folder, strike)])
    struck = status != 0
    if struck:
        assert status == (-KILL if strike.signal == KILL else 128 + strike.signal), (strike, err)
    else:
        assert_same_results(folder, expected.folder)
    resumed = struck and (folder / "out/a.pt.state").exists()
    if struck and strike.signal != KILL:
        has_begun = any(path.is_dir() for path in folder.glob("out/a-*"))  # TensorBoard's folder
        assert resumed == has_begun, strike
        assert error_lines(err) == [INTERRUPTED + (RESUME_HINT if resumed else "")], strike
        assert not list(folder.rglob(".*.tmp")), strike
    if struck:
        again = [*argv, "--resume"] if resumed else argv
        ((status, rest, err),) = run_forks([Job(again, folder)])
        assert status == 0, (strike, err)
        assert_same_results(folder, expected.folder)
        lines, all_lines = epoch_lines(rest), epoch_lines(expected.out)
        assert lines == all_lines[len(all_lines) - len(lines) :], strike
    if resumed:
        assert not list(folder.rglob(".*.tmp")), strike  # what the kill had left
    shutil.rmtree(folder)
    return struck, resumed
