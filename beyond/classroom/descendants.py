"""The processes that this one has started, directly or not: what they use, and how they are ended.

A process that detaches itself (a session of its own, its parent gone) becomes a child of the
nearest ancestor that adopts orphans. In a block of `ended_after` this process does. Where there is
no `/proc` (macOS), only the process group that is named can be ended.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
HAS_PROC = (PROC / "self" / "stat").exists()
PAGE = os.sysconf("SC_PAGE_SIZE")
SECONDS = 10.0  # that ending all may take
# prctl(2)
DIE_WITH_PARENT, ADOPT_ORPHANS, DOES_ADOPT = 1, 36, 37


def control(option: int, value: object) -> None:
    """Call Linux's prctl; does nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


class Process(NamedTuple):
    """A process, by numbers."""

    number: int
    parent: int
    group: int


def processes() -> list[Process]:
    """List all processes; empty where there is no `/proc`."""
    found = []
    for folder in PROC.glob("[0-9]*") if HAS_PROC else ():
        with suppress(OSError):  # it has ended
            # "pid (name) state parent group ...", where the name may hold anything
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            found.append(Process(int(folder.name), int(fields[1]), int(fields[2])))
    return found


def kill(how: Callable[[int, int], None], number: int) -> None:
    """Kill a process, or a group, if it is still there."""
    with suppress(ProcessLookupError, PermissionError):
        how(number, signal.SIGKILL)


def resident_memory(processes: list[Process], limit: int = 0) -> int:
    """Sum the bytes of memory that processes use; pages that several share count once.

    Where a cheaper sum, which counts shared pages in each process, is within the limit, that is
    returned.
    """
    most = 0
    for process in processes:
        with suppress(OSError):
            most += int((PROC / str(process.number) / "statm").read_bytes().split()[1]) * PAGE
    if most <= limit:
        return most
    total = 0
    for process in processes:
        with suppress(OSError):
            lines = (PROC / str(process.number) / "smaps_rollup").read_bytes().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith(b"Pss:"))
    return total


class Descendants:
    """The processes that this one starts from now on, and those that they start."""

    def __init__(self) -> None:
        self._keep: set[int] = set()
        self._keep |= {process.number for process in self.list()}

    def list(self) -> list[Process]:
        """List them; empty where there is no `/proc`."""
        children: dict[int, list[Process]] = {}
        for process in processes():
            children.setdefault(process.parent, []).append(process)
        found = children.get(os.getpid(), [])
        found = [process for process in found if process.number not in self._keep]
        for process in found:  # grows meanwhile
            found += children.get(process.number, [])
        return found

    def end(self, leader: int | None = None) -> None:
        """Kill them all; Ctrl-C and SIGTERM wait meanwhile.

        Args:
            leader: a child of this process that leads a process group, or will.
        """
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            if leader is not None:
                kill(os.killpg, leader)
                kill(os.kill, leader)  # if it does not lead the group yet
                with suppress(ChildProcessError):
                    os.waitpid(leader, 0)
            end = time.monotonic() + SECONDS
            while (found := self.list()) and time.monotonic() < end:
                # A group is killed at once, even if its processes end and fork all the time.
                for group in {process.group for process in found} - {os.getpgrp()}:
                    kill(os.killpg, group)
                for process in found:
                    kill(os.kill, process.number)
                    with suppress(ChildProcessError):  # not this process's own child
                        os.waitpid(process.number, os.WNOHANG)
                time.sleep(0.005)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)


@contextmanager
def ended_after() -> Iterator[Descendants]:
    """End all processes that are started in the block; this process adopts orphans meanwhile."""
    before = ctypes.c_int(0)
    control(DOES_ADOPT, ctypes.byref(before))
    control(ADOPT_ORPHANS, 1)
    started = Descendants()
    try:
        yield started
    finally:
        try:
            started.end()
        finally:
            control(ADOPT_ORPHANS, before.value)
