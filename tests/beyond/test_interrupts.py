"""SIGINT and SIGTERM end a run between two steps; it can be resumed bit for bit.

Each point and each kind of run is in `tests/sweeps/test_kill_points.py`.
"""

import signal
from pathlib import Path

import pytest

from beyond.interrupts import Interrupted, signals_wait, stop_if_asked
from run_llama import main
from tests.beyond.runs import (
    FINETUNE,
    INT,
    INTERRUPTED,
    TERM,
    Job,
    RunForks,
    Strike,
    error_lines,
    interrupt,
    run_uninterrupted,
    strike_and_resume,
)

# An epoch moves twelve tensors to the device for its evaluations: tokens and lengths of the three
# batches of train, then those of dev.
POINTS = [
    ("step", 1),
    ("step", 3),  # the last step of epoch 0
    ("step", 8),
    ("eval", 11),  # epoch 0, dev
    ("eval", 30),  # epoch 2, train
    ("write", 1),  # the best checkpoint, at the end of epoch 0
    ("eval", 47),  # epoch 3, dev
    ("replace", 6),  # all epochs are done: the predictions of dev
    ("eval", 51),  # all epochs are done: predicting dev
]


@pytest.mark.parametrize(
    ("number", "points"),
    [
        (INT, POINTS[::2]),
        (TERM, POINTS[1::2]),
        pytest.param(INT, POINTS[1::2], marks=pytest.mark.sweep),
        pytest.param(TERM, POINTS[::2], marks=pytest.mark.sweep),
    ],
)
def test_an_interrupted_run_saves_and_says_how_to_go_on(
    run_forks: RunForks, workplace: Path, number: int, points: list[tuple[str, int]]
) -> None:
    """In a step, in the evaluation after an epoch, in a write, and in the final predictions."""
    expected = run_uninterrupted(run_forks, workplace, FINETUNE)
    for place, count in points:
        strike = Strike(number, place, count)
        ends = strike_and_resume(run_forks, workplace, FINETUNE, strike, expected)
        assert ends == (True, True), strike


@pytest.mark.parametrize("number", [INT, TERM])
def test_an_interrupted_run_without_a_training_checkpoint(
    run_forks: RunForks, workplace: Path, number: int
) -> None:
    job = Job(["--option", "prompt"], workplace, Strike(number, "eval", 1))
    ((status, _, err),) = run_forks([job])
    assert status == 128 + number
    assert error_lines(err) == [INTERRUPTED]


def test_signals_wait_for_the_end_of_a_block() -> None:
    """Otherwise a signal inside TensorBoard's queue would make closing its writer hang."""
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


def test_an_ignored_signal_stays_ignored() -> None:
    """A shell starts background jobs with SIGINT ignored, so that Ctrl-C does not reach them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals_wait():
            signal.raise_signal(signal.SIGINT)
            stop_if_asked()
    finally:
        signal.signal(signal.SIGINT, before)
