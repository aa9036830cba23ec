"""The moving average against its recurrence, and what it leaves alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from base_llama import load_safely
from beyond.methods.averaging import MovingAverage
from beyond.methods.method import Method
from beyond.methods.weights import trained
from run_llama import classification_loss
from tests.beyond.methods.helpers import (
    add_ingredient,
    finetune_and_load,
    load_weights,
    make_classifier,
    train_steps,
    weights_of,
)
from tests.beyond.runs import FINETUNE, Job, RunForks, assert_equal, copy_of, run


def test_matches_the_recurrence() -> None:
    """In NumPy's float64, over thirty steps of random weights; the decay of the last is 0.7."""
    rng = np.random.default_rng(0)
    parameter = torch.nn.Parameter(torch.tensor(rng.normal(size=(3, 4))).float())
    average = MovingAverage([parameter], decay=0.7)
    expected = parameter.detach().double().numpy()
    decays = [min(0.7, (1 + step) / (10 + step)) for step in range(30)]
    assert decays[0] == 0.1 and decays[-1] == 0.7
    for step, decay in enumerate(decays):
        theta = rng.normal(size=(3, 4)).astype(np.float32)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(theta))
        average.begin_step(step, 30)
        average.after_update()
        expected = decay * expected + (1 - decay) * theta
    with average.kept_weights():
        np.testing.assert_allclose(parameter.detach(), expected, atol=1e-6)
    assert np.array_equal(parameter.detach(), theta)


def test_kept_weights_are_averages_of_all_that_trains() -> None:
    classifier = make_classifier()
    history = [weights_of(classifier)]
    method = Method(classifier, classification_loss, [MovingAverage(trained([classifier]), 0.5)])
    follow = method.after_update

    def record() -> None:
        follow()
        history.append(weights_of(classifier))

    method.after_update = record  # type: ignore[method-assign]
    train_steps(method, steps=2)
    last = weights_of(classifier)
    with method.kept_weights():
        averages = weights_of(classifier)
    for name, weight in averages.items():
        start, first, second = (weights[name] for weights in history)
        expected = 0.1 * start + 0.9 * first  # 1/10 and 2/11 are the decays of these steps
        expected = 2 / 11 * expected + 9 / 11 * second
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-6)
        assert not torch.equal(weight, last[name])
    assert all(torch.equal(w, last[name]) for name, w in weights_of(classifier).items())


def test_decay_zero_keeps_the_last_weights_bit_for_bit(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = finetune_and_load(FINETUNE)
    add_ingredient(monkeypatch, lambda classifier: MovingAverage(trained([classifier]), 0.0))
    averaged = finetune_and_load(FINETUNE)
    assert all(torch.equal(averaged[name], weight) for name, weight in plain.items())


def test_training_goes_on_from_the_weights_themselves(run_forks: RunForks, workplace: Path) -> None:
    """Weights and moments at the end are those of a plain run; the averages are saved with them."""
    folders = {name: copy_of(workplace, name) for name in ("plain", "ema")}
    argv = {"plain": FINETUNE, "ema": [*FINETUNE, "--ema", "0.8"]}
    results = run_forks([Job(argv[name], folder) for name, folder in folders.items()])
    assert [result.status for result in results] == [0, 0]
    states = {name: load_safely(folder / "out/a.pt.state") for name, folder in folders.items()}
    assert_equal(states["ema"]["optimizer"], states["plain"]["optimizer"])
    weights = states["ema"]["model"]
    for name, weight in states["plain"]["model"].items():
        assert torch.equal(weights.pop(name), weight), name
    assert all(".averages." in name for name in weights)
    assert len(weights) == len(list(make_classifier().parameters()))
    kept_weights = [load_weights(folder) for folder in folders.values()]
    assert not torch.equal(*(w["classifier_head.weight"] for w in kept_weights))


def test_a_short_run_forgets_the_untrained_weights() -> None:
    """After 65 steps, five epochs of 100 lines, with a decay of 0.99; half would stay without
    the lower decays of the first steps.
    """
    parameter = torch.nn.Parameter(torch.ones(1))
    average = MovingAverage([parameter], decay=0.99)
    with torch.no_grad():
        parameter.zero_()
    for step in range(65):
        average.begin_step(step, 65)
        average.after_update()
    with average.kept_weights():
        assert 0 < parameter.item() < 1e-6


class Unmoved(MovingAverage):
    """An average that stays at the weights before the first step."""

    def begin_step(self, step: int, total_steps: int) -> None:
        self.step_decay = 1.0


def test_averages_are_evaluated(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If they do not move, every epoch has the accuracies of the untrained classifier."""
    add_ingredient(monkeypatch, lambda classifier: Unmoved(trained([classifier]), 0.5))
    found = []
    for flags in (["--lr", "0"], ["--lr", "1e-2"]):
        status, out, _ = run([*FINETUNE, *flags], capsys)
        assert status == 0
        found.append([line.partition(", train acc")[2] for line in out.splitlines()])
    assert found[0] == found[1] and len({*found[0]} - {""}) == 1
