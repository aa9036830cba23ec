"""A run may be struck at any point: resumed, it ends bit for bit as if it had not been.

    uv run pytest -m sweep tests/sweeps/test_kill_points.py

`tests/beyond/test_run.py` and `test_interrupts.py` do the same at a few points.
"""

import itertools
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from tests.beyond.runs import (
    INT,
    KILL,
    PLACES,
    RUNS,
    TERM,
    RunForks,
    Strike,
    run_uninterrupted,
    strike_and_resume,
)

pytestmark = pytest.mark.sweep

STRIDE = {"eval": 5}  # an evaluation has many points, and they are alike
TIMES = 6  # random moments per run


# SIGTERM is answered as SIGINT is, so one kind of run has to do.
@pytest.mark.parametrize(
    ("kind", "number"), [*product(RUNS, (KILL, INT)), ("causal", TERM)], ids=str
)
@pytest.mark.parametrize("every", [None, 2])
def test_every_step_and_every_write(
    run_forks: RunForks, workplace: Path, kind: str, every: int | None, number: int
) -> None:
    """A signal after each step, at each stage of each write, in evaluations, and at any time."""
    argv = RUNS[kind] if every is None else [*RUNS[kind], "--save_every", str(every)]
    expected = run_uninterrupted(run_forks, workplace, argv)
    struck = resumed = 0
    for place in PLACES:
        for count in itertools.count(1, STRIDE.get(place, 1)):
            strike = Strike(number, place, count)
            ends = strike_and_resume(run_forks, workplace, argv, strike, expected)
            if ends == (False, False):  # the run does not come to the place so often
                break
            struck, resumed = struck + ends[0], resumed + ends[1]
        assert count > 3, f"hardly any point at {place}"
    for strike in random_times(number, seed=len(kind)):
        strike_and_resume(run_forks, workplace, argv, strike, expected)
    print(f"{kind}, --save_every {every}, signal {number}: {struck} points, {resumed} resumed")
    assert resumed > struck / 2


def random_times(number: int, seed: int) -> Iterator[Strike]:
    """Yield strikes at random times, in which a run may have ended already."""
    chance = random.Random(seed)
    for _ in range(TIMES):
        yield Strike(number, "time", chance.randrange(20, 150))
