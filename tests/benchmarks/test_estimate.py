"""Estimates of time: what is timed, and how durations are shown."""

from collections import Counter
from typing import Any

import pytest
from torch import Tensor

from benchmarks.quality.estimate import cost_of, seconds_per_sentence, show_duration
from benchmarks.quality.plan import Plan
from benchmarks.quality.timing import choose_lines, time_steps
from llama import Llama
from tests.benchmarks.conftest import make_result, runs_of


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (89, "89 s"),
        (90, "1.5 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (360_000, "100 h"),
    ],
)
def test_durations_have_two_digits(seconds: float, text: str) -> None:
    assert show_duration(seconds) == text


def test_lines_to_time_are_typical_of_the_batches() -> None:
    lines = [size * "x" for size in (1, 50, 2, 40, 3, 30, 4, 20, 5, 45)]  # 20 on average
    assert choose_lines(lines, 3, by_length=False) == [0, 3, 6]
    chosen = choose_lines(lines, 3, by_length=True)
    assert [len(lines[i]) for i in chosen] == [5, 20, 30]
    assert choose_lines(lines[:2], 2, by_length=True) == [0, 1]


@pytest.mark.parametrize(("method", "passes"), [("plain", 1), ("better", 2)])
def test_the_steps_of_a_method_are_timed(
    plan: Plan, method: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-Drop, a part of better, computes each row twice in training."""
    run = next(run for run in runs_of(plan, "full") if run.method == method)
    calls = Counter[bool]()
    compute_hidden = Llama.compute_hidden

    def count(self: Llama, *args: Any, **kwargs: Any) -> Tensor:
        calls[self.training] += 1
        return compute_hidden(self, *args, **kwargs)

    monkeypatch.setattr(Llama, "compute_hidden", count)
    train, evaluate = time_steps(run.options)
    assert 0 < train < 10 and 0 < evaluate < 10  # of a tiny model
    assert calls[True] == passes * calls[False] > 0


def test_runs_are_alike_if_a_step_takes_the_same_time() -> None:
    assert cost_of("causal=True lr=0.1 pooling=mean") == cost_of("causal=True lr=0.2 warmup=0.1")
    for other in ("causal=False", "causal=True r_drop=1.0", "causal=True dtype=bfloat16"):
        assert cost_of(other) != cost_of("causal=True")


def test_seconds_per_sentence_are_those_of_the_steps(plan: Plan) -> None:
    (run, *_) = runs_of(plan, "full")  # batches of three
    assert seconds_per_sentence(make_result(run, 0.5, 0.4, seconds=90, steps=6)) == 5
    other = make_result(run, 0.5, 0.4, seconds=96, steps=6, flags="lr=2e-05")
    assert seconds_per_sentence(other) == 2  # batches of eight
