"""One run in a process of its own: start or resume it, watch it, and read its results."""

import ctypes
import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.machine import peak_resident
from benchmarks.quality.results import current_commit
from benchmarks.quality.runs import Run
from beyond.interrupts import Interrupted
from beyond.options import record_path, training_checkpoint
from utils import lock_results, open_atomically, read_lines

RUN_LLAMA = Path(__file__).parent.parent.parent / "run_llama.py"
POLL, SAVE = 0.2, 10.0  # seconds between two looks at the process, and two writes of usage.json
LOCKED_TRIES = 60  # 1 s apart, while the process of a killed measurement still ends
CANNOT_RESUME = ("cannot resume", "cannot be read", "other settings", "checkpoint")  # in messages
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class RunFailed(Exception):
    """A run ended with an error; the message is its last line."""


class RunClaimed(Exception):
    """Another process is doing this run."""


@dataclass(frozen=True)
class Measured:
    """What came out of a run; see `results.Result`."""

    commit: str
    dev: float
    test: float
    best_epoch: int
    steps: int
    seconds: float
    memory_mib: float


@dataclass
class Usage:
    """The commits at which a run began or was resumed, and its time and peak memory in all.

    They are noted in a file, so that an interrupted run loses at most `SAVE` seconds of its time.
    """

    commit: str = ""
    seconds: float = 0.0
    memory_mib: float = math.nan

    @classmethod
    def read(cls, path: Path) -> "Usage":
        """Read what earlier processes have used; zeros if the file is missing or damaged."""
        try:
            noted = json.loads(path.read_bytes())
            return cls(str(noted["commit"]), float(noted["seconds"]), float(noted["memory_mib"]))
        except (OSError, ValueError, TypeError, KeyError):
            return cls()

    def write(self, path: Path) -> None:
        """Write the file, completely or not at all."""
        with open_atomically(path) as file:
            json.dump(asdict(self), file)

    def note_memory(self, peak: float | None) -> None:
        """Raise the peak, in MiB, to this one if it is known and higher."""
        if peak is not None:
            self.memory_mib = peak if math.isnan(self.memory_mib) else max(peak, self.memory_mib)


@contextmanager
def claimed(run: Run) -> Iterator[None]:
    """Keep a run for this process while the block runs.

    Raises:
        RunClaimed: another process has it.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_results([run.folder / "usage.json"], lambda note: None))
        except FileNotFoundError:  # another process has ended the run and deletes its folder
            raise RunClaimed from None
        except OSError as error:
            if "is writing this file" not in str(error):
                raise
            raise RunClaimed from None
        yield


def finetune(run: Run) -> Measured:
    """Do a run, or the rest of it if it was interrupted; its files stay in its folder.

    Raises:
        Interrupted: a signal came; the run can be resumed.
        RunFailed: the program ended with an error.
    """
    state = training_checkpoint(str(run.folder / "classifier.pt"))
    for attempt in range(LOCKED_TRIES):
        resumed = state.exists()
        status, message = run_process(run, resumed)
        if status == 0:
            return read_results(run)
        if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise Interrupted(status - 128)  # somebody ended the run and not this program
        if status == 2 and "is writing this file" in message and attempt + 1 < LOCKED_TRIES:
            time.sleep(1)
        elif status == 2 and resumed and is_about_resuming(message, state):
            state.unlink()  # the program has changed since, so the run starts again
        elif status < 0:
            raise RunFailed(f"killed by {signal.Signals(-status).name}")
        else:
            raise RunFailed(message or f"ended with status {status}")
    raise RunFailed(message)


def is_about_resuming(message: str, state: Path) -> bool:
    """Return whether an error says that a training checkpoint cannot be used.

    There are other errors about that file: the disk may be full.
    """
    return state.name in message and any(words in message for words in CANNOT_RESUME)


def run_process(run: Run, resume: bool) -> tuple[int, str]:
    """Run the program; returns its exit status and the last line of its standard error.

    Raises:
        Interrupted: a signal came; the process has been asked to end, and has ended.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    notes = run.folder / "usage.json"
    out, err = run.folder / "out.txt", run.folder / "err.txt"
    usage = Usage.read(notes) if resume else Usage()
    if (commit := current_commit()) not in usage.commit.split():
        usage.commit = f"{usage.commit} {commit}".lstrip()
    usage.write(notes)
    argv = [sys.executable, str(RUN_LLAMA), *run.argv(), *(["--resume"] if resume else [])]
    mode = "ab" if resume else "wb"
    with out.open(mode) as out_file, err.open(mode) as err_file:
        start = err_file.tell()
        # In a session of its own, so that Ctrl-C reaches it by way of this program only.
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out_file,
            stderr=err_file,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            watch(process, usage, lambda: usage.write(notes))
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            usage.write(notes)
    return process.returncode, last_line(err, start)


def watch(process: subprocess.Popen[bytes], usage: Usage, save: Callable[[], None]) -> None:
    """Wait until a process ends; follow its time and memory, and save them from time to time."""
    before, start, saved = usage.seconds, time.perf_counter(), 0.0
    ended = False
    while not ended:
        usage.note_memory(peak_resident(process.pid))
        try:
            process.wait(POLL)
            ended = True
        except subprocess.TimeoutExpired:
            pass
        elapsed = time.perf_counter() - start
        usage.seconds = before + elapsed
        if elapsed - saved > SAVE:
            save()
            saved = elapsed


def end_with_parent() -> None:
    """Ask the system to send SIGTERM to this new process when this program ends, even if killed."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def last_line(err: Path, start: int = 0) -> str:
    """Return the last line of standard error, without the program's name and progress bars.

    Args:
        err: the file that has it.
        start: the byte from which to read, since earlier processes may have written to it.
    """
    text = err.read_bytes()[start:].decode("utf-8", "replace")
    lines = [line.strip() for line in re.split("[\r\n]+", text)]
    lines = [line for line in lines if line and "it/s" not in line and "s/it" not in line]
    return lines[-1].removeprefix("run_llama.py: ").removeprefix("error: ") if lines else ""


def read_results(run: Run) -> Measured:
    """Read the results of a complete run from its records and what it has printed.

    Raises:
        RunFailed: they are not those of the planned run.
    """
    options, folder = run.options, run.folder
    records = {
        name: json.loads(Path(record_path(folder / path)).read_bytes())
        for name, path in (
            ("dev", "dev-finetuning-output.txt"),
            ("best", "classifier.pt"),
            # Of a run on dev only, this file holds dev again.
            *([] if run.dev_only else [("test", "test-finetuning-output.txt")]),
        )
    }
    scores = {name: record["scores"] for name, record in records.items()}
    planned = shlex.join(options.recipe_flags)
    if (found := records["dev"].get("recipe flags", "")) != planned:
        raise RunFailed(f"the recipe stood for other flags than planned: {found}, not {planned}")
    if None in (score["accuracy"] for score in scores.values() if "accuracy" in score):
        raise RunFailed("the dev or the test file has no labels")
    out = (folder / "out.txt").read_bytes().decode("utf-8", "replace")
    done = max(int(number) for number in re.findall(r"^epoch (\d+):", out, re.MULTILINE)) + 1
    usage = Usage.read(folder / "usage.json")
    return Measured(
        commit=usage.commit,
        dev=scores["dev"]["accuracy"],
        test=scores["test"]["accuracy"] if "test" in scores else math.nan,
        best_epoch=scores["best"]["epoch"],
        steps=done * math.ceil(len(read_lines(options.train)) / options.batch_size),
        seconds=usage.seconds,
        memory_mib=usage.memory_mib,
    )
