"""From a command line to an exit status: closed streams, Ctrl-C, locks, notes, and advice."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from beyond.program import exit_status
from beyond.runtime import ThreadWatch, thread_advice
from run_llama import main
from tests.beyond import forks
from tests.beyond.runs import Job
from tests.conftest import ROOT, SENTENCES, make_llama, save_llama
from tests.test_run_llama import FINETUNE, PROMPT, run

SCRIPT = str(ROOT / "run_llama.py")


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command in the current folder; $RUN stands for the program."""
    env = {**os.environ, "RUN": f"{sys.executable} {SCRIPT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=env)


@pytest.mark.sweep
def test_closed_output_streams_change_no_result(workplace: Path) -> None:
    """All in one: standard input, output and error are closed; the files are right."""
    argv = [*FINETUNE, "--epochs", "1"]
    done = shell(f"exec $RUN {' '.join(argv)} <&- >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    closed = {p: p.read_bytes() for p in Path("output/task_3").glob("*-output.txt")}
    checkpoint = Path("output/task_3/cfimdb-finetune-1-0.001.pt").read_bytes()
    for path in closed:
        assert path.read_text("utf-8").count("\n") == len(SENTENCES)
    assert main(argv) == 0  # the same in this process, whose streams are open
    assert {p: p.read_bytes() for p in Path("output/task_3").glob("*-output.txt")} == closed
    assert Path("output/task_3/cfimdb-finetune-1-0.001.pt").read_bytes() == checkpoint


@pytest.mark.sweep  # the test above closes it too; `test_generation.py` has an empty one
def test_a_closed_standard_input_is_an_empty_prompt(workplace: Path) -> None:
    done = shell("exec $RUN --prompt - <&-")
    assert done.returncode == 2
    assert done.stderr == "run_llama.py: error: --prompt -: standard input is empty\n"


def test_ctrl_c_while_modules_are_imported_is_one_line(workplace: Path) -> None:
    """The signal comes as soon as PyTorch's library is mapped, long before it is imported."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "run_llama.py: interrupted\n")


def test_two_runs_do_not_write_one_result(workplace: Path) -> None:
    """The second of two at the same time is refused; the first one's results are its own."""
    first, (out, _) = forks.start(Job([*FINETUNE, "--epochs", "200"], Path.cwd()))
    with open(out.fileno(), closefd=False) as lines:
        assert any(line.startswith("epoch 0") for line in lines)
    try:
        done = shell(f"exec $RUN {' '.join(FINETUNE)} --epochs 200 --seed 7")
        path = Path("output/task_3/cfimdb-dev-finetuning-output.txt").absolute()
        assert done.returncode == 2 and "epoch" not in done.stdout
        assert done.stderr == (
            f"run_llama.py: error: {path}: process {first.pid} is writing this file; wait until it "
            "ends, or choose another name\n"
        )
    finally:
        first.kill()
        first.join()


@pytest.mark.parametrize("argv", [PROMPT, FINETUNE, ["--max_new_tokens", "2"]])
def test_replaced_results_are_named(
    workplace: Path, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    status, _, err = run(argv, capsys)
    assert (status, err) == (0, "")
    results = [p for p in Path("output").rglob("*") if p.suffix in (".txt", ".pt")]
    assert main(argv) == 0
    (note,) = re.findall("run_llama.py: note: replaces .*", capsys.readouterr().err)
    assert all(str(path) in note for path in results)


def test_greedy_decoding_of_nan_is_an_error(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finite weights, but a gain so large that the logits are not finite."""
    for causal in (False, True):
        llama = make_llama(causal)
        torch.nn.init.constant_(llama.norm.weight, 3e38)
        save_llama(llama, Path("stories42M.pt"))
        status, _, err = run(["--temperature", "0"], capsys)
        assert status == 2 and "the logits are infinite or NaN" in err and err.count("\n") == 1
        assert not list(Path("output").rglob("*.txt"))


# -------------------------------------------------------------------------------------- threads


def test_threads_sets_pytorchs_number(workplace: Path) -> None:
    before, cores = torch.get_num_threads(), os.cpu_count() or 1
    argv = ["--max_new_tokens", "1", "--prompt", "A", "--threads"]
    try:
        for threads in (cores, 1):
            torch.set_num_threads(max(1, cores - 1) if threads == cores else cores)
            assert main([*argv, str(threads)]) == 0
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", ["0", "-1", "x", str((os.cpu_count() or 1) + 1), "9" * 30])
def test_bad_numbers_of_threads(
    workplace: Path, capsys: pytest.CaptureFixture[str], threads: str
) -> None:
    status, out, err = run(["--threads", threads], capsys)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("run_llama.py: error: argument --threads: ")


@pytest.mark.parametrize(
    ("busy", "threads", "advice"),
    [
        (1.0, 1, None),
        (0.3, 1, None),  # one thread that waits for others needs no fewer
        (1.9, 2, None),
        (1.25, 2, None),
        (
            1.1,
            2,
            "2 threads of PyTorch get only the CPU time of 1.1; .* --threads 1 may be much faster",
        ),
        (4.0, 2, "2 threads of PyTorch use the CPU time of 4.0; another number of --threads"),
    ],
)
def test_thread_advice(busy: float, threads: int, advice: str | None) -> None:
    given = thread_advice(busy, threads)
    assert (given is None) == (advice is None)
    assert advice is None or given is None or re.match(advice, given)


def test_thread_advice_comes_once(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ThreadWatch, "SECONDS", 0.0)
    monkeypatch.setattr(ThreadWatch, "SHARES", (0.0, 1e-9))
    status, _, err = run(FINETUNE, capsys)
    assert status == 0 and err.count("note: ") == 1 and "of PyTorch use the CPU time of" in err


def test_bfloat16_without_units_is_noted(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the work starts; what is computed is right all the same."""
    for has_units in (True, False):
        monkeypatch.setattr("beyond.runtime.has_bfloat16", lambda device, has=has_units: has)
        monkeypatch.setattr("beyond.decoding.has_bfloat16", lambda device, has=has_units: has)
        status, out, err = run([*PROMPT, "--causal", "--dtype", "bfloat16"], capsys)
        assert status == 0 and "dev acc ::" in out
        assert ("has no units for bfloat16" in err) == (not has_units)


@pytest.mark.parametrize(
    ("work", "consequence", "status", "line"),
    [
        (lambda: 1, "", 1, ""),
        (lambda: int("x"), "", 2, "p: error: invalid literal for int() with base 10: 'x'\n"),
        (lambda: len(os.listdir("none")), "", 2, "p: error: none: No such file or directory\n"),
        (lambda: torch.empty(2**60).dim(), "", 2, "p: error: out of memory\n"),
        (lambda: signal.raise_signal(signal.SIGTERM), "", 143, "p: interrupted\n"),
        (lambda: signal.raise_signal(signal.SIGINT), "no file", 130, "p: interrupted; no file\n"),
    ],
)
def test_a_small_program_ends_with_a_status_and_a_line(
    work: Callable[[], int],
    consequence: str,
    status: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_status("p", work, consequence) == status
    assert capsys.readouterr().err == line


def test_an_error_of_a_small_program_itself_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        exit_status("p", lambda: torch.zeros(2).view(3).dim())
