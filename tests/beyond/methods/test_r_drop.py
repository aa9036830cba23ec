"""R-Drop: the loss of two passes, their gradients, and which dropout they have."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from beyond.methods.divergence import symmetric_kl
from beyond.methods.ingredient import Rows
from beyond.methods.method import Method
from beyond.methods.r_drop import RDrop
from run_llama import classification_loss
from tests.beyond.methods.steps import (
    assert_close_gradients,
    assert_same_training,
    make_classifier,
    make_rows,
    run_steps,
    train,
)

ALPHA = 1.7
MODES = pytest.mark.parametrize("causal", [False, True])


def record_outputs(classifier: nn.Module) -> list[Tensor]:
    """Collect the classifier's log-probabilities, which then get gradients of their own."""
    outputs: list[Tensor] = []

    def record(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    classifier.register_forward_hook(record)
    return outputs


def equation(first: np.ndarray, second: np.ndarray, labels: list[int], alpha: float) -> float:
    """Eq. 2 to 4 of the paper for two predictions, summed over rows, in float64."""
    total = 0.0
    for p, q, label in zip(first, second, labels, strict=True):
        forward = sum(p[k] * np.log(p[k] / q[k]) for k in range(len(p)))
        backward = sum(q[k] * np.log(q[k] / p[k]) for k in range(len(p)))
        total += -np.log(p[label]) - np.log(q[label]) + alpha * (forward + backward) / 2
    return total


def test_symmetric_kl_of_two_coins() -> None:
    """Between (1/2, 1/2) and (1/4, 3/4) it is (1/4) ln 3, by hand."""
    first, second = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    for pair in ((first, second), (second, first)):
        assert symmetric_kl(*pair).tolist() == pytest.approx([0.25 * np.log(3)], rel=1e-6)
    assert symmetric_kl(first, first).tolist() == [0]


@MODES
def test_loss_and_gradients_are_the_equations(causal: bool) -> None:
    classifier = make_classifier(causal, dropout=True)
    outputs, rows = record_outputs(classifier), make_rows()
    loss = Method(classifier, classification_loss, [RDrop(classification_loss, ALPHA, 3)])(*rows)
    loss.backward()
    assert len(outputs) == 2 and not torch.allclose(outputs[0], outputs[1], atol=0.1)
    labels = rows.labels.tolist()
    # In logs, since the gradients are those of log-probabilities.
    first, second = (output.detach().double().numpy() for output in outputs)
    expected = equation(np.exp(first), np.exp(second), labels, ALPHA)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    step = 1e-6
    for number, output in enumerate(outputs):
        assert output.grad is not None
        for index in np.ndindex(*output.shape):
            around = []
            for change in (step, -step):
                moved = [first.copy(), second.copy()]
                moved[number][index] += change
                around.append(equation(np.exp(moved[0]), np.exp(moved[1]), labels, ALPHA))
            slope = (around[0] - around[1]) / (2 * step)
            assert output.grad[index].item() == pytest.approx(slope, abs=1e-4)


@MODES
def test_the_first_pass_is_plain_and_the_random_state_stays_plain(causal: bool) -> None:
    passes, states = [], []
    for ingredients in ([], [RDrop(classification_loss, ALPHA, 3)]):
        classifier = make_classifier(causal, dropout=True)
        outputs = record_outputs(classifier)
        run_steps(Method(classifier, classification_loss, ingredients), make_rows())
        passes.append(outputs[0])
        states.append(torch.get_rng_state())
    assert torch.equal(*passes) and torch.equal(*states)


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
@MODES
def test_without_dropout_everything_is_doubled(causal: bool, alpha: float) -> None:
    """Exactly, since the passes are equal and a doubling rounds nothing."""
    plain = train(lambda _: [], causal, steps=1)
    ours = train(lambda _: [RDrop(classification_loss, alpha, 3)], causal, steps=1)
    for name, value in plain.items():
        if name.startswith("gradient"):
            assert torch.equal(ours[name], 2 * value), name


def second_pass(seed: int = 3, step: int = 0, rows: Rows | None = None) -> Tensor:
    """Return the second pass's prediction for the first of some rows."""
    classifier = make_classifier(True, dropout=True)
    outputs, ingredient = record_outputs(classifier), RDrop(classification_loss, ALPHA, seed)
    ingredient.begin_step(step, 10)
    Method(classifier, classification_loss, [ingredient])(*(rows or make_rows()))
    return outputs[1][0]


def test_the_second_dropout_depends_on_seed_step_and_first_line() -> None:
    torch.manual_seed(1)
    expected = second_pass()
    torch.manual_seed(2)
    assert torch.equal(second_pass(), expected)
    others = [second_pass(seed=4), second_pass(step=1), second_pass(rows=make_rows((5, 0, 9, 7)))]
    for other in others:
        assert not torch.allclose(other, expected, atol=1e-3)


@MODES
def test_micro_batches_have_the_same_gradients_without_dropout(causal: bool) -> None:
    both = [
        train(lambda _: [RDrop(classification_loss, ALPHA, 3)], causal, 1, micro_batch_size=size)
        for size in (None, 3)
    ]
    assert_close_gradients(both[1], both[0])


def test_steps_are_repeatable() -> None:
    runs = [
        train(lambda _: [RDrop(classification_loss, ALPHA, 3)], True, dropout=True)
        for _ in range(2)
    ]
    assert_same_training(*runs)
