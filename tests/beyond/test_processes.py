"""Several processes compute what one does; if one is lost, the others end too.

What depends on torchrun itself starts it. The other tests start processes with torchrun's
environment in forks of a warm process, which takes a tenth of the time.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from base_llama import load_safely
from run_llama import main
from tests.beyond import forks
from tests.beyond.runs import (
    FINETUNE,
    INT,
    PRETRAIN,
    TERM,
    Job,
    RunForks,
    Strike,
    assert_close_results,
    assert_same_results,
    copy_of,
    epoch_lines,
    free_port,
    run,
)
from tests.conftest import ROOT, make_llama, save_llama

# Without dropout, since each process draws its own random numbers.
STILL = ["--dropout", "0", "--lr", "1e-4", "--epochs", "2"]
STILL_FINETUNE = [*FINETUNE, *STILL, "--hidden_dropout_prob", "0"]
STILL_PRETRAIN = [*PRETRAIN, *STILL]


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
    """Return the standard output of a run of several processes that has to succeed."""
    process = start_torchrun(processes, argv, cwd)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Return the ids of the processes that torchrun has started."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


# ------------------------------------------------------------------------------------ same results


def check_several_processes(
    workplace: Path, capsys: pytest.CaptureFixture[str], argv: Sequence[str], out: str
) -> None:
    """Compare the run of several processes in the folder `several` with one process.

    Args:
        workplace: the current folder, where one process runs.
        capsys: captures its output.
        argv: the command line of both.
        out: what the several processes have printed.
    """
    folder = workplace / "several"
    status, expected, _ = run([*argv], capsys)
    assert status == 0
    assert epoch_lines(out) == epoch_lines(expected)
    assert out.count("save the model") == expected.count("save the model")
    assert_close_results(folder, workplace)
    (log,) = [path for path in (folder / "out").iterdir() if path.is_dir()]
    (theirs,) = [path for path in Path("out").iterdir() if path.is_dir()]
    files = [len(list(path.rglob("*tfevents*"))) for path in (log, theirs)]
    assert files[0] == files[1] > 0  # as many as a single process writes
    curves = [
        [event.value for event in EventAccumulator(str(path / "train")).Reload().Scalars("loss")]
        for path in (log, theirs)
    ]
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


@pytest.mark.sweep  # the suite has prompting under torchrun, and fine-tuning without it
def test_torchrun_computes_what_one_process_does(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*STILL_FINETUNE, "--micro_batch_size", "1"]
    out = torchrun(2, argv, copy_of(workplace, "several"))
    check_several_processes(workplace, capsys, argv, out)


@pytest.mark.parametrize(
    ("processes", "argv"),
    [
        (2, [*STILL_FINETUNE, "--causal"]),
        (3, STILL_FINETUNE),  # an epoch's last batch has two rows: none for the third process
        (2, [*STILL_PRETRAIN, "--micro_batch_size", "1"]),
        (3, STILL_PRETRAIN),  # batches of two blocks, and an epoch's last one of one
    ],
)
def test_several_processes_compute_what_one_does(
    run_forks: RunForks,
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    processes: int,
    argv: list[str],
) -> None:
    folder = copy_of(workplace, "several")
    ((status, out, err),) = run_forks([Job(argv, folder, processes=processes)])
    assert status == 0, err
    check_several_processes(workplace, capsys, argv, out)


@pytest.mark.parametrize("option", ["finetune", "pretrain"])
def test_two_processes_train_an_untied_model(
    run_forks: RunForks, workplace: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """As one process does; after SIGTERM and --resume it ends bit for bit as without them.

    Fine-tuning leaves `output` as it is, since the classifier does not use it.
    """
    llama = make_llama(False, tie_embeddings=False, rope_theta=500000.0)
    save_llama(llama, Path("stories42M.pt"))
    argv = STILL_FINETUNE
    if option == "pretrain":
        argv = ["--option", "pretrain", "--batch_size", "2", "--max_seq_len", "16", *STILL]
        argv += ["--dtype", "float32", "--filepath", "out/a.pt"]
    folder, struck = copy_of(workplace, "several"), copy_of(workplace, "struck")
    ((status, out, err),) = run_forks([Job(argv, folder, processes=2)])
    assert status == 0, err
    ((status, _, err),) = run_forks([Job(argv, struck, Strike(TERM, "step", 4, 1), processes=2)])
    assert status == 128 + TERM, err
    ((status, _, err),) = run_forks([Job([*argv, "--resume"], struck, processes=2)])
    assert status == 0, err
    assert_same_results(struck, folder)
    state = load_safely(folder / "out/a.pt.state")["model"]
    prefix = "llama." if option == "pretrain" else "classifier.llama."
    for name in ("output.weight", "tok_embeddings.weight"):
        unchanged = torch.equal(state[prefix + name], llama.state_dict()[name])
        assert unchanged == (option == "finetune" and "output" in name), name
    check_several_processes(workplace, capsys, argv, out)


@pytest.mark.sweep
def test_torchrun_prompts_as_one_process_does(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--option", "prompt", "--batch_size", "3"]
    folder = copy_of(workplace, "several")
    out = torchrun(2, argv, folder)
    status, expected, _ = run(argv, capsys)
    assert status == 0 and out == expected
    for split in ("dev", "test"):
        name = f"output/task_2/cfimdb-{split}-prompting-output.txt"
        assert (folder / name).read_bytes() == Path(name).read_bytes()


@pytest.mark.sweep  # `test_command_line.py` has the same with torchrun's environment alone
def test_generate_is_for_one_process(workplace: Path) -> None:
    process = start_torchrun(2, [], workplace)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: --option generate runs in one process; start it without torchrun" in err


# -------------------------------------------------------------------------------------- signals


@pytest.mark.sweep
def test_another_number_of_processes_resumes(run_forks: RunForks, workplace: Path) -> None:
    """One process is interrupted; three resume the run and are interrupted; two finish it."""
    argv = [*STILL_FINETUNE, "--epochs", "3", "--lr", "1e-5"]
    assert main(argv) == 0
    folder = copy_of(workplace, "several")
    state = folder / "out/a.pt.state"
    resume = [*argv, "--resume"]
    ((status, _, _),) = run_forks([Job(argv, folder, Strike(INT, "step", 2))])
    assert status == 130 and load_safely(state)["position"] == {"epoch": 0, "step": 2}
    ((status, _, err),) = run_forks([Job(resume, folder, Strike(INT, "step", 3), processes=3)])
    assert status == 130, err
    second = load_safely(state)
    assert second["position"] == {"epoch": 1, "step": 2} and len(second["random"]) == 3
    ((status, _, err),) = run_forks([Job(resume, folder, processes=2, keep=False)])
    assert status == 0, err
    assert_close_results(folder, workplace)
    assert not state.exists()


@pytest.mark.sweep
def test_torchruns_processes_are_interrupted_and_resumed(
    run_forks: RunForks, workplace: Path
) -> None:
    """The same with the real torchrun for the three, and SIGTERM to it."""
    argv = [*STILL_FINETUNE, "--epochs", "30", "--lr", "1e-5"]  # long enough to be interrupted
    assert main(argv) == 0
    folder = copy_of(workplace, "several")
    state = folder / "out/a.pt.state"
    ((status, _, _),) = run_forks([Job(argv, folder, Strike(INT, "step", 2))])
    assert status == 130
    assert load_safely(state)["position"] == {"epoch": 0, "step": 2}
    process = start_torchrun(3, [*argv, "--resume", "--save_every", "1"], folder)
    while load_safely(state)["position"] == {"epoch": 0, "step": 2}:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    second = load_safely(state)
    position = second["position"]
    assert (0, 2) < (position["epoch"], position["step"]) and len(second["random"]) == 3
    ((status, _, err),) = run_forks([Job([*argv, "--resume"], folder, processes=2, keep=False)])
    assert status == 0, err
    assert_close_results(folder, workplace)
    assert not state.exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_ends_all(run_forks: RunForks, workplace: Path, rank: int) -> None:
    """All stop after the same step, the run is saved, and it can be resumed."""
    assert main(STILL_FINETUNE) == 0
    folder = copy_of(workplace, "several")
    job = Job(STILL_FINETUNE, folder, Strike(INT, "step", 2, rank), processes=2)
    ((status, out, err),) = run_forks([job])
    assert status == 130, err
    assert err.count("rank 0: interrupted; the same command with --resume continues") == 1
    assert "rank 1" not in err
    assert load_safely(folder / "out/a.pt.state")["position"] == {"epoch": 0, "step": 2}
    job = Job([*STILL_FINETUNE, "--resume"], folder, processes=2)
    ((status, _, err),) = run_forks([job])
    assert status == 0, err
    assert_close_results(folder, workplace)


def test_the_tests_do_not_wait_long_for_processes_that_have_lost_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forks, "LAST", 0.1)
    (first, ended), (second, waiting) = os.pipe(), os.pipe()
    try:
        os.write(ended, b"a")
        os.close(ended)
        start = time.monotonic()
        texts, in_time = forks.read_all([first, second], 60.0)
        assert time.monotonic() - start < 30
        assert texts == {first: b"a", second: b""} and not in_time
    finally:
        for descriptor in (first, second, waiting):
            os.close(descriptor)


@pytest.mark.sweep
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


def test_ports_do_not_depend_on_the_seed() -> None:
    """Tests that run at the same time, after runs with the same seed, get other ports."""
    ports = []
    for _ in range(2):
        random.seed(1)
        ports.append([free_port() for _ in range(3)])
    assert ports[0] != ports[1]


# --------------------------------------------------------------------------------- two machines


def start_two_machines(
    workplace: Path, argv: Sequence[str]
) -> list[tuple[Path, subprocess.Popen[str]]]:
    """Start one process on each of two machines, which have the inputs but share no folder."""
    endpoint = f"127.0.0.1:{free_port()}"
    flags = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    folders = [copy_of(workplace, name) for name in ("one", "two")]
    return [(folder, start_torchrun(1, argv, folder, flags)) for folder in folders]


@pytest.mark.sweep
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


@pytest.mark.sweep  # a long start, and close to `test_a_dead_process_ends_the_others`
def test_a_lost_machine_ends_the_other(workplace: Path) -> None:
    """SIGKILL to all that runs on one of two."""
    machines = start_two_machines(workplace, [*STILL_FINETUNE, "--epochs", "5000"])
    results = [folder / "out/a.pt" for folder, _ in machines]
    while not any(result.exists() for result in results):
        for _, process in machines:
            assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    (_, survivor), (_, lost) = machines
    for pid in [*ranks_of(lost), lost.pid]:
        os.kill(pid, signal.SIGKILL)
    lost.communicate()
    _, err = survivor.communicate(timeout=60)
    assert survivor.returncode != 0
    assert "error: lost another process: " in err
