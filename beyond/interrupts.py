"""Signals: Ctrl-C (SIGINT) and SIGTERM end a run between two steps, so that it can be resumed."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from beyond.processes import world_size

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM asked the program to end.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


_waiting: list[int] = []  # numbers of the signals that `signals_wait` holds back


@contextmanager
def _handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Let SIGINT and SIGTERM call `handler` in the block, except those that are ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    not_ignored = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in not_ignored}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _raise(number: int, _: object) -> None:
    raise Interrupted(number)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise `Interrupted` at once."""
    with _handling(_raise):
        yield


@contextmanager
def signals_wait() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait for `stop_if_asked`, or for the end of the block.

    Waiting also protects TensorBoard's writer: after an exception while it hands events to its
    thread, the thread would sleep forever, and closing the writer would hang.
    """
    try:
        with _handling(lambda number, _: _waiting.append(number)):
            yield
        if _waiting:
            raise Interrupted(_waiting[0])
    finally:
        _waiting.clear()


def stop_if_asked() -> None:
    """Raise `Interrupted`, in all processes, if a signal waits in any of them.

    All processes have to call this at the same point.
    """
    number = torch.tensor(max(_waiting, default=0))
    if world_size() > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    if number:
        raise Interrupted(int(number))
