"""Bregman proximal point optimization against its equations in float64, and its limit cases."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from base_llama import load_safely
from beyond.methods.method import Method
from beyond.methods.proximal_point import ProximalPoint
from beyond.methods.smart import Smart
from beyond.methods.weights import trained
from beyond.runtime import Runtime, prepare_model
from classifier import LlamaEmbeddingClassifier
from optimizer import AdamW
from run_llama import classification_loss
from tests.beyond.methods.steps import (
    assert_close_gradients,
    assert_same_training,
    make_classifier,
    make_rows,
    run_steps,
    train,
)
from tests.beyond.runs import FINETUNE, Job, RunForks, copy_of, run
from tests.oracle import numpy_forward

TINY = {"dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 16}
BETA = 0.99
WEIGHT = 30.0  # so large that the penalty of a few steps counts
MODES = pytest.mark.parametrize("causal", [False, True])
Weights = Mapping[str, np.ndarray]


def proximal_point(classifier: LlamaEmbeddingClassifier, weight: float = WEIGHT) -> ProximalPoint:
    return ProximalPoint(classifier, trained([classifier]), weight)


def with_moved_average(classifier: LlamaEmbeddingClassifier) -> ProximalPoint:
    """Return the ingredient with an average that is not the model itself, as after many steps."""
    ingredient = proximal_point(classifier, weight=1.0)
    with torch.no_grad():
        for parameter in ingredient.average.averages:
            parameter.mul_(0.9)
    return ingredient


def weights_of(classifier: LlamaEmbeddingClassifier) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in classifier.named_parameters()}


def log_probs_of(weights: Weights, causal: bool) -> np.ndarray:
    """The log-probabilities of `make_rows`, in NumPy's float64."""
    copy, rows = make_classifier(causal, False, **TINY).double(), make_rows()
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    _, hidden = numpy_forward(copy.llama, rows.tokens)
    last = rows.lengths.numpy() - 1 if causal else [-1] * len(hidden)
    pooled = hidden[range(len(hidden)), last]
    logits = pooled @ weights["classifier_head.weight"].T + weights["classifier_head.bias"]
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def equation(weights: Weights, average: Weights, causal: bool, mu: float = WEIGHT) -> float:
    """F(theta) + mu D(theta, theta_avg), summed over rows."""
    first, second = (log_probs_of(w, causal) for w in (weights, average))
    total = 0.0
    for log_p, log_q, label in zip(first, second, make_rows().labels.tolist(), strict=True):
        p, q = np.exp(log_p), np.exp(log_q)
        total += (p * (log_p - log_q)).sum() * mu + (q * (log_q - log_p)).sum() * mu
        total -= log_p[label]
    return total


@MODES
def test_loss_and_gradients_are_the_equations(causal: bool) -> None:
    """In four steps, whose averages are computed here; the last step's gradients too."""
    classifier, rows = make_classifier(causal, False, **TINY), make_rows()
    method = Method(classifier, classification_loss, [proximal_point(classifier)])
    optimizer = AdamW(method.parameter_groups(), lr=0.1)
    average = weights_of(classifier)
    for step in range(4):
        method.begin_step(step, 4)
        optimizer.zero_grad()
        loss = method(*rows)
        loss.backward()
        weights = {name: w.copy() for name, w in weights_of(classifier).items()}
        expected = equation(weights, average, causal)
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        if step < 3:
            optimizer.step()
            method.after_update()
            moved = weights_of(classifier)
            average = {n: BETA * w + (1 - BETA) * moved[n] for n, w in average.items()}
    assert expected > 1.05 * equation(weights, average, causal, mu=0.0)  # the penalty counts
    change = 1e-5
    for name, parameter in classifier.named_parameters():
        assert parameter.grad is not None
        order = parameter.grad.abs().flatten().argsort(descending=True)
        for place in order[[0, 5]].tolist() if len(order) > 5 else order[[0]].tolist():
            index, around = np.unravel_index(place, parameter.shape), []
            for sign in (1, -1):
                shifted = weights[name].copy()
                shifted[index] += sign * change
                around.append(equation({**weights, name: shifted}, average, causal))
            slope = (around[0] - around[1]) / (2 * change)
            assert parameter.grad[index].item() == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("smart", [0.0, 1.0])
@MODES
def test_weight_0_changes_nothing(causal: bool, smart: float) -> None:
    """Of plain fine-tuning and of SMART's regulariser: weights, gradients and random state."""
    without = train(lambda c: [Smart(c, smart, seed=3)], causal, dropout=True)
    ours = train(lambda c: [Smart(c, smart, seed=3), proximal_point(c, 0.0)], causal, dropout=True)
    assert_same_training(ours, without)
    others = train(lambda c: [Smart(c, smart, seed=3), proximal_point(c)], causal, dropout=True)
    assert torch.equal(others["random state"], without["random state"])
    assert not torch.equal(others["classifier_head.weight"], without["classifier_head.weight"])


@MODES
def test_the_first_step_is_plain(causal: bool) -> None:
    """The average is the model itself then, and has the same dropout, so the penalty is 0."""
    plain = train(lambda _: [], causal, steps=1, dropout=True)
    assert_same_training(train(lambda c: [proximal_point(c)], causal, 1, dropout=True), plain)


@MODES
def test_micro_batches_have_the_same_gradients(causal: bool) -> None:
    runs = [
        train(lambda c: [with_moved_average(c)], causal, steps=1, micro_batch_size=size)
        for size in (None, 1, 3)
    ]
    assert_close_gradients(runs[1], runs[0])
    assert_close_gradients(runs[2], runs[0])


def test_the_average_is_not_what_is_kept() -> None:
    classifier = make_classifier(True)
    method = Method(classifier, classification_loss, [proximal_point(classifier)])
    run_steps(method, make_rows(), steps=3)
    last = {name: p.detach().clone() for name, p in classifier.named_parameters()}
    with method.kept_weights():
        assert all(torch.equal(p, last[name]) for name, p in classifier.named_parameters())
    (optimized,) = method.parameter_groups()
    assert list(map(id, optimized["params"])) == list(map(id, classifier.parameters()))


def test_the_average_of_a_run_is_saved(run_forks: RunForks, workplace: Path) -> None:
    folders = {name: copy_of(workplace, name) for name in ("plain", "bregman")}
    argv = {"plain": FINETUNE, "bregman": [*FINETUNE, "--bregman", "1"]}
    results = run_forks([Job(argv[name], folder) for name, folder in folders.items()])
    assert [result.status for result in results] == [0, 0]
    plain, ours = (load_safely(f / "out/a.pt.state")["model"] for f in folders.values())
    names = [name for name in ours if name not in plain]
    assert len(names) == len(trained([make_classifier(True)]))
    assert all(name.startswith("modules_of_ingredients.0.average.averages.") for name in names)


def test_bfloat16() -> None:
    """Of both predictions; with equal weights they are equal in bfloat16 too."""
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        classifier, rows = make_classifier(True), make_rows()
        penalties = proximal_point(classifier), with_moved_average(classifier)
        prepare_model(classifier, Runtime(torch.device("cpu"), dtype, True), False)
        plain, equal, moved = (
            Method(classifier, classification_loss, parts)(*rows).item()
            for parts in ([], *([penalty] for penalty in penalties))
        )
        assert equal == plain
        losses.append(moved - plain)
    assert losses[0] > 1e-3 and losses[1] == pytest.approx(losses[0], rel=0.2)


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "x"])
def test_bad_weights_are_one_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    status, out, err = run([*FINETUNE, "--bregman", value], capsys)
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("run_llama.py: error: argument --bregman: ")


def test_mixout_is_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run([*FINETUNE, "--bregman", "1", "--mixout", "0.5"], capsys)
    assert status == 2 and err == (
        "run_llama.py: error: --bregman and --mixout: the penalty would measure what mixout does "
        "in a step; leave one out\n"
    )
