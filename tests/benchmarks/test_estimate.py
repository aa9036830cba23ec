"""Estimates of time: what is timed, and how durations are shown."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from benchmarks.quality import estimate, timing
from benchmarks.quality.estimate import (
    FAILING,
    START,
    STEP,
    Estimator,
    cost_of,
    seconds_per_sentence,
    show_duration,
)
from benchmarks.quality.plan import Plan
from benchmarks.quality.timing import choose_lines, time_steps
from llama import Llama
from optimizer import AdamW
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


@pytest.mark.parametrize(
    ("flags", "passes", "rows"),
    [({}, 1, 3), ({"micro_batch_size": 2}, 2, 3), ({"batch_size": 100}, 1, 8)],
    ids=["batch", "micro-batches", "file"],
)
def test_a_step_is_that_of_a_whole_batch(
    plan: Plan, flags: dict[str, Any], passes: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock moves in forward passes (10 s in training, else 1 s) and updates (100 s) alone."""
    run = next(run for run in runs_of(plan, "full") if run.method == "plain")
    now = [0.0]
    compute_hidden, step = Llama.compute_hidden, AdamW.step

    def forward(self: Llama, *args: Any, **kwargs: Any) -> Tensor:
        now[0] += 10 if self.training else 1
        return compute_hidden(self, *args, **kwargs)

    def update(self: AdamW, *args: Any) -> Any:
        assert all(p.grad is not None for group in self.param_groups for p in group["params"])
        now[0] += 100
        return step(self, *args)

    monkeypatch.setattr(Llama, "compute_hidden", forward)
    monkeypatch.setattr(AdamW, "step", update)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    train, evaluate = time_steps(replace(run.options, **flags))
    assert train == (10 * passes + 100) / rows and evaluate == 1 / rows


def test_seconds_without_an_earlier_run(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of 8 sentences; each evaluates them and the 8 of dev, the end dev and test."""
    run = next(run for run in runs_of(plan, "full") if (run.data, run.method) == ("sst", "plain"))
    monkeypatch.setattr(estimate, "time_steps", lambda options: (3.0, 0.5))
    evaluated = 2 * (8 + 8) + (8 + 8)
    expected = START + 2 * 8 * 3 + evaluated * 0.5
    assert Estimator([], "a processor", 1).seconds(run) == (expected, STEP)


@pytest.mark.parametrize("label", [9, -1])
def test_the_time_of_a_bad_label_is_that_of_a_run_that_fails(plan: Plan, label: int) -> None:
    path = Path("data/sst-train.txt")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{label} ||| a film", *lines[1:]]))
    run = next(run for run in runs_of(plan, "full") if run.method == "plain")
    assert Estimator([], "a processor", 1).seconds(run) == (START, FAILING)


def test_runs_are_alike_if_a_step_takes_the_same_time() -> None:
    assert cost_of("causal=True lr=0.1 pooling=mean") == cost_of("causal=True lr=0.2 warmup=0.1")
    for other in ("causal=False", "causal=True r_drop=1.0", "causal=True dtype=bfloat16"):
        assert cost_of(other) != cost_of("causal=True")


def test_seconds_per_sentence_are_those_of_the_steps(plan: Plan) -> None:
    (run, *_) = runs_of(plan, "full")  # batches of three
    assert seconds_per_sentence(make_result(run, 0.5, 0.4, seconds=90, steps=6)) == 5
    other = make_result(run, 0.5, 0.4, seconds=96, steps=6, flags="lr=2e-05")
    assert seconds_per_sentence(other) == 2  # batches of eight
