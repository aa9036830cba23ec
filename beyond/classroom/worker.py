"""The process that runs someone else's code, and what it may use.

It is a fork of the checker, which watches it (`checker.py`). Between the two is a third process, so
that code that kills its parent does not kill the checker. Results go back as lines of JSON with a
secret word, so that what the code prints, wherever it prints it, is not taken for a result.
"""

import faulthandler
import importlib
import json
import os
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from beyond.classroom.descendants import DIE_WITH_PARENT, control
from beyond.classroom.part import Finding, Part, examine, expected_of
from beyond.classroom.student import Student

FILE_SIZE = 256 << 20  # bytes of a file that it may write
LOST_PIPE = 97  # exit status: its pipe to the checker is closed
FAILED = 98  # exit status: the checker's own code failed
WHERE = signal.SIGUSR1  # lets it print where it is
# Imported before the fork: an optimizer imports it when it is made, which takes a second or more.
LATE_IMPORT = "torch._dynamo"


@dataclass(frozen=True)
class Job:
    """What a worker has to do."""

    parts: Sequence[Part]
    folder: Path  # the student's
    place: Path  # an empty folder to run in
    failures: Mapping[str, str]  # module of the folder -> why it cannot be imported
    memory: int  # bytes that it may allocate
    secret: str


def start(job: Job) -> tuple[int, int, int, int]:
    """Start a worker.

    Returns:
        The number of the process above it, which leads its process group, and three pipes to read:
        its results, what it prints, and its status as `os.waitpid` gives it.
    """
    importlib.import_module(LATE_IMPORT)
    sys.stdout.flush()  # or the fork would print it again
    sys.stderr.flush()
    pipes = [os.pipe() for _ in range(3)]
    leader = os.fork()
    if leader == 0:
        try:
            for reader, _ in pipes:
                os.close(reader)
            _lead(job, *(writer for _, writer in pipes))
        finally:
            os._exit(FAILED)
    for _, writer in pipes:
        os.close(writer)
    results, output, status = (reader for reader, _ in pipes)
    return leader, results, output, status


def _lead(job: Job, results: int, output: int, status: int) -> None:
    """Start the worker itself, wait for it, and report its status."""
    os.setsid()
    control(DIE_WITH_PARENT, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(WHERE, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    worker = os.fork()
    if worker == 0:
        try:
            control(DIE_WITH_PARENT, signal.SIGKILL)
            os.close(status)
            _confine(job, output, results)
            _work(job, results)
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
        finally:
            os._exit(FAILED)
    os.close(results)
    os.close(output)
    os.write(status, str(os.waitpid(worker, 0)[1]).encode())
    os._exit(0)


def _confine(job: Job, output: int, results: int) -> None:
    """Let this process read nothing, write to its two pipes only, and use only so much."""
    null = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((null, 0), (output, 1), (output, 2)):
        os.dup2(old, new)
    os.closerange(3, results)
    os.closerange(results + 1, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 16))
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", errors="replace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="replace", closefd=False)  # noqa: SIM115
    faulthandler.enable(2)
    faulthandler.register(WHERE, 2, all_threads=False)
    os.chdir(job.place)
    os.environ |= {"TMPDIR": str(job.place), "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ |= {"CUDA_VISIBLE_DEVICES": ""}  # the probes are tensors on the CPU
    tempfile.tempdir = None  # so that TMPDIR is read again
    sys.argv = ["run_llama.py"]
    torch.set_num_threads(1)  # threads of an earlier pool did not come along
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, FILE_SIZE)
    with suppress(OSError):  # without /proc, memory is not limited
        # If the machine has too little memory, this process is ended and not the checker.
        Path("/proc/self/oom_score_adj").write_text("1000")
        data = re.search(r"VmData:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if data:
            _limit(resource.RLIMIT_DATA, (int(data[1]) << 10) + job.memory)


def _limit(kind: int, value: int) -> None:
    """Lower a limit of this process."""
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def _work(job: Job, results: int) -> None:
    """Examine the parts one after the other, and report each."""
    process, write, dumps = os.getpid(), os.write, json.dumps

    def send(**message: object) -> None:
        if os.getpid() != process:
            os._exit(0)  # a fork that the student's code has made
        line = dumps({"secret": job.secret, **message})
        try:
            write(results, f"\n{line}\n".encode())
        except OSError:
            os._exit(LOST_PIPE)

    for part in job.parts:  # before the student's code can change anything
        expected_of(part)
    student = Student(job.folder, job.failures, lambda module: send(importing=module))
    send(ready=True)
    for part in job.parts:
        try:
            finding = examine(part, student)
        except BaseException as error:
            finding = Finding(part.name, "error", student.describe(error))
        send(finding=asdict(finding))
