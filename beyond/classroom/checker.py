"""Examine a folder's parts in a process of their own, which may do anything without harm.

The process is ended when it takes too long, too much memory, or prints too much. Then, and when it
ends by itself, the part that it was at has that as its finding, and another process goes on with
the next part. Afterwards no process is left that any of them has started.
"""

import json
import os
import re
import selectors
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

from beyond.classroom.descendants import Descendants, ended_after, resident_memory
from beyond.classroom.part import Finding, Part
from beyond.classroom.worker import LOST_PIPE, WHERE, Job, start

# The files of the assignment; a folder needs at least one.
FILES = ("rope.py", "llama.py", "optimizer.py", "classifier.py", "base_llama.py")
START = 120.0  # seconds for a process to begin: it runs our own parts first
INTERVAL = 0.1  # seconds between two looks at what the processes use
FORGED = 1 << 20  # bytes on the pipe of the results that are none
TAIL = 1 << 14  # bytes of what is printed that are kept


@dataclass(frozen=True)
class Limits:
    """What the code of a folder may use."""

    part: float = 30.0  # seconds for a part
    total: float = 180.0  # seconds for all parts
    memory: int = 2 << 30  # bytes, of all its processes together, besides what libraries use
    output: int = 16 << 20  # bytes that are printed
    processes: int = 64


LIMITS = Limits()


def require_folder(folder: Path) -> None:
    """Raise unless a folder holds an implementation of the assignment.

    Raises:
        FileNotFoundError, NotADirectoryError: no such folder.
        ValueError: it holds none of the assignment's files.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder, found a file; unpack an archive")
    if not any((folder / name).is_file() for name in FILES):
        inner = [path.parent for name in FILES for path in sorted(folder.glob(f"*/{name}"))]
        hint = f"did you mean {inner[0]}?" if inner else "give the folder that holds the code"
        raise ValueError(f"{folder}: holds none of {', '.join(FILES)}; {hint}")


def check(
    folder: Path,
    parts: Sequence[Part],
    limits: Limits = LIMITS,
    tell: Callable[[Finding], None] = lambda finding: None,
) -> list[Finding]:
    """Examine parts of another implementation. This runs the folder's code.

    Args:
        folder: holds the implementation.
        parts: are examined in this order.
        limits: of what the folder's code may use.
        tell: called with each finding as soon as it is there.

    Returns:
        A finding for each part.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `require_folder`.
    """
    require_folder(folder)
    findings: list[Finding] = []
    failures: dict[str, str] = {}
    end = time.monotonic() + limits.total

    def add(finding: Finding) -> None:
        findings.append(finding)
        tell(finding)

    with (
        tempfile.TemporaryDirectory(prefix="classroom-", ignore_cleanup_errors=True) as place,
        ended_after() as started,
    ):
        while len(findings) < len(parts):
            left = parts[len(findings) :]
            if time.monotonic() >= end:
                reason = f"not examined: the parts before took {limits.total:g} s"
                add(Finding(left[0].name, "error", reason))
                continue
            cwd = Path(place, str(len(findings)))  # its own: code may have deleted another
            cwd.mkdir(parents=True)
            job = Job(left, folder.resolve(), cwd, failures, limits.memory, secret=token_hex())
            worker = _Worker(job, limits, started)
            try:
                reason = worker.watch(add, end)
            finally:
                worker.close()
            if reason:
                if worker.importing:
                    reason = f"while {worker.importing}.py was imported: {reason}"
                    failures[worker.importing] = reason
                add(Finding(parts[len(findings)].name, "error", reason))
    return findings


class _Worker:
    """A worker, as the checker sees it."""

    def __init__(self, job: Job, limits: Limits, started: Descendants) -> None:
        self.job = job
        self.limits = limits
        self.started = started
        self.importing = ""  # the module that it is importing
        self._is_ready = False
        self._end: str | None = None  # how it ended
        self._printed = 0  # bytes
        self._tail = b""  # of what it printed
        self._forged = 0  # bytes
        self._rest = b""  # of the results: an unfinished line
        self._found: list[Finding] = []
        self._looked = 0.0  # when its processes were looked at
        self._has = 0  # bytes of memory that it had before any code of the folder ran
        with warnings.catch_warnings():
            # Python warns that threads do not come along. Those of the libraries need not.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._leader, *pipes = start(job)
        self._results, self._output, self._status = self._pipes = pipes
        self._selector = selectors.DefaultSelector()
        for pipe in pipes:
            os.set_blocking(pipe, False)
            self._selector.register(pipe, selectors.EVENT_READ)

    def close(self) -> None:
        """End the worker and all that it has started."""
        self.started.end(self._leader)
        self._selector.close()
        for pipe in self._pipes:
            os.close(pipe)

    def watch(self, add: Callable[[Finding], None], end: float) -> str:
        """Hand over findings until there is one for each part; else returns why it was ended."""
        left, since = len(self.job.parts), time.monotonic()
        while True:
            was_ready = self._is_ready
            self._read_all(INTERVAL)
            for finding in self._found:
                add(finding)
            left -= len(self._found)
            if left == 0:
                return ""
            if self._found or self._is_ready != was_ready:
                since = time.monotonic()
            self._found.clear()
            problem = self._problem(since, end)
            if problem and not self._is_ready:  # no code of the folder has run
                raise RuntimeError(f"the checker failed: {problem}: {self._tail.decode()}")
            if problem:
                place = self._place()
                return f"{problem} ({place})" if place else problem

    def _problem(self, since: float, end: float) -> str:
        """Return why the worker has to be ended, or nothing."""
        limits, now = self.limits, time.monotonic()
        if self._end is not None:
            return self._end
        if self._forged > FORGED:
            return "the code writes into the checker's pipes"
        if self._printed > limits.output:
            return f"more than {limits.output >> 20} MiB of output"
        seconds = limits.part if self._is_ready else START
        if now > min(since + seconds, end):
            self._ask_where()
            return f"no end within {min(seconds, now - since):.3g} s"
        if not self._is_ready or now - self._looked < INTERVAL:
            return ""
        self._looked = now
        processes = self.started.list()
        if len(processes) > limits.processes:
            return f"more than {limits.processes} processes"
        most = self._has + limits.memory
        if resident_memory(processes, most) > most:
            return f"more than {limits.memory / (1 << 30):.3g} GiB of memory"
        return ""

    def _ask_where(self) -> None:
        """Let the worker print where it is; the signal may end its wait, and the code goes on."""
        importing = self.importing
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._leader, WHERE)
        self._tail, end = b"", time.monotonic() + 0.5
        while time.monotonic() < end and not self._place():
            self._read_all(0.05)
        self.importing = importing

    def _place(self) -> str:
        """Return the last "file:line" of the folder in what `faulthandler` printed, or nothing."""
        trace = self._tail.decode(errors="replace").rpartition("most recent call first")[2]
        for name, line in re.findall(r'File "(.+)", line (\d+)', trace):
            if Path(name).is_relative_to(self.job.folder):
                return f"{Path(name).relative_to(self.job.folder)}:{line}"
        return ""

    def _read_all(self, seconds: float) -> None:
        """Read what the worker writes; wait for it for some seconds at most."""
        for key, _ in self._selector.select(seconds):
            self._read(key.fd)
        if self._end is not None:
            self._read(self._results)
            self._read(self._output)

    def _read(self, pipe: int) -> None:
        """Read what is in a pipe now, or a large piece of it."""
        text = b""
        while len(text) <= FORGED:
            try:
                piece = os.read(pipe, 1 << 16)
            except BlockingIOError:
                break
            text += piece
            if not piece:
                with suppress(KeyError):
                    self._selector.unregister(pipe)
                break
        if pipe == self._output:
            self._printed += len(text)
            self._tail = (self._tail + text)[-TAIL:]
        elif pipe == self._status:
            self._end = _describe_status(int(text)) if text else "the code killed its parent"
        else:
            *lines, self._rest = (self._rest + text).split(b"\n")
            for line in lines:
                self._take(line)
            if len(self._rest) > FORGED:
                self._forged, self._rest = self._forged + len(self._rest), b""

    def _take(self, line: bytes) -> None:
        """Take a message, if it is one of the worker's."""
        if self.job.secret.encode() not in line:
            self._forged += len(line)
            return
        message = json.loads(line)
        if "ready" in message:
            # The largest of its processes, which are forks of each other. A sum of their shares
            # would grow by itself, since a page that only one of them still uses counts whole.
            sizes = [resident_memory([process], sys.maxsize) for process in self.started.list()]
            self._is_ready, self._has = True, max(sizes, default=0)
        self.importing = message.get("importing", self.importing)
        if "finding" in message:
            self._found.append(Finding(**message["finding"]))


def _describe_status(status: int) -> str:
    """Describe the status of a process, as `os.waitpid` gives it."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"the process was killed by {signal.Signals(-code).name}"
    if code == LOST_PIPE:
        return "the code closed the checker's pipes"
    return f"the code ended the process (exit status {code})"
