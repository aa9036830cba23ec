"""Mixout: mixed weights and their gradients against the equation, and which weights are mixed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from base_llama import load_safely
from beyond.methods.method import Method
from beyond.methods.mixout import Mixout
from classifier import LlamaEmbeddingClassifier
from run_llama import classification_loss
from tests.beyond.methods.steps import (
    assert_close_gradients,
    assert_same_training,
    make_classifier,
    make_rows,
    run_steps,
    train,
)
from tests.beyond.runs import (
    FINETUNE,
    interrupt,
)
from tests.oracle import numpy_forward

P = 0.3
MATRICES = [f"attention.compute_{name}" for name in ("query", "key", "value", "output")]
MATRICES += [f"feed_forward.{name}" for name in ("w1", "w2", "w3")]
MIXED = {f"llama.layers.{layer}.{name}.weight" for layer in range(2) for name in MATRICES}
MODES = pytest.mark.parametrize("causal", [False, True])


def weights_of(classifier: LlamaEmbeddingClassifier) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in classifier.named_parameters()}


def move_away(classifier: LlamaEmbeddingClassifier) -> None:
    """Change all weights, as training would, but visibly."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def find_kept(mixed: Tensor, own: Tensor, pretrained: Tensor, p: float) -> np.ndarray:
    """Return which entries are kept, and assert that all entries are as the equation says."""
    w, u = own.double().numpy(), pretrained.double().numpy()
    replaced, kept = (u - p * u) / (1 - p), (w - p * u) / (1 - p)
    distances = [np.abs(mixed.double().numpy() - x) for x in (replaced, kept)]
    assert np.minimum(*distances).max() < 1e-6
    return distances[1] < distances[0]


def test_mixed_weights_are_the_equations() -> None:
    classifier = make_classifier(True)
    pretrained = weights_of(classifier)
    mixout = Mixout(classifier, P, seed=3)
    move_away(classifier)
    own = weights_of(classifier)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    mixout.begin_step(0, 10)
    assert torch.equal(torch.get_rng_state(), state)
    mixed = weights_of(classifier)
    assert {name for name in own if not torch.equal(mixed[name], own[name])} == MIXED
    kept = [find_kept(mixed[name], own[name], pretrained[name], P) for name in MIXED]
    entries = np.concatenate([k.flatten() for k in kept])
    # Five standard errors.
    assert abs(entries.mean() - (1 - P)) < 5 * (P * (1 - P) / len(entries)) ** 0.5
    unused = torch.optim.SGD(classifier.parameters(), lr=1.0)
    mixout.before_update(unused)
    for name, weight in weights_of(classifier).items():
        assert torch.equal(weight, own[name]), name


def test_the_expectation_of_the_mixed_weights_is_the_weight() -> None:
    classifier = make_classifier(True)
    pretrained, mixout = weights_of(classifier), Mixout(classifier, P, seed=3)
    move_away(classifier)
    own, steps = weights_of(classifier), 200
    sums = {name: torch.zeros_like(own[name]) for name in MIXED}
    for step in range(steps):
        mixout.begin_step(step, steps)
        for name, weight in classifier.named_parameters():
            if name in MIXED:
                sums[name] += weight.detach()
        mixout.before_update(torch.optim.SGD(classifier.parameters(), lr=1.0))
    for name, total in sums.items():
        # The variance of an entry is (w - u)^2 p / (1 - p).
        errors = (own[name] - pretrained[name]).abs() * (P / (1 - P) / steps) ** 0.5
        assert ((total / steps - own[name]).abs() < 6 * errors + 1e-6).all()


def loss_of_mixed(
    classifier: LlamaEmbeddingClassifier,
    weights: dict[str, np.ndarray],
    pretrained: dict[str, np.ndarray],
    kept: dict[str, np.ndarray],
) -> float:
    """The loss with mixed weights, all in float64 and NumPy."""
    mixed = {}
    for name, w in weights.items():
        m = 1.0 - kept[name] if name in kept else 0.0
        p = P if name in kept else 0.0
        mixed[name] = (m * pretrained[name] + (1 - m) * w - p * pretrained[name]) / (1 - p)
    copy = make_classifier(classifier.llama.config.causal).double()
    copy.load_state_dict({name: torch.tensor(w) for name, w in mixed.items()}, strict=False)
    rows = make_rows()
    _, hidden = numpy_forward(copy.llama, rows.tokens)
    head, bias = mixed["classifier_head.weight"], mixed["classifier_head.bias"]
    total = 0.0
    for row, (length, label) in enumerate(zip(rows.lengths, rows.labels, strict=True)):
        last = int(length) - 1 if classifier.llama.config.causal else -1
        logits = head @ hidden[row, last] + bias
        total += np.log(np.exp(logits).sum()) - logits[label]
    return total


@MODES
def test_gradients_are_the_equations(causal: bool) -> None:
    """Those of the weights themselves, by finite differences; 0 where a weight was replaced."""
    classifier = make_classifier(causal)
    pretrained = weights_of(classifier)
    mixout = Mixout(classifier, P, seed=3)
    move_away(classifier)
    own = weights_of(classifier)
    mixout.begin_step(0, 10)
    mixed = weights_of(classifier)
    kept = {name: find_kept(mixed[name], own[name], pretrained[name], P) for name in MIXED}
    Method(classifier, classification_loss, [mixout])(*make_rows()).backward()
    mixout.before_update(torch.optim.SGD(classifier.parameters(), lr=1.0))
    w, u = ({name: v.double().numpy() for name, v in part.items()} for part in (own, pretrained))
    names = ["llama.layers.0.attention.compute_key.weight", "llama.layers.1.feed_forward.w2.weight"]
    names += ["llama.layers.0.ffn_norm.weight", "classifier_head.weight"]
    for name in names:
        grad = classifier.get_parameter(name).grad
        assert grad is not None
        gradient = grad.numpy()
        if name in kept:
            assert not gradient[~kept[name]].any() and gradient[kept[name]].all()
        order = np.abs(gradient).flatten().argsort()[::-1]
        for place in order[[0, 1, 7, 20]]:
            index, step, around = np.unravel_index(place, gradient.shape), 1e-5, []
            for change in (step, -step):
                moved = w[name].copy()
                moved[index] += change
                around.append(loss_of_mixed(classifier, w | {name: moved}, u, kept))
            slope = (around[0] - around[1]) / (2 * step)
            assert gradient[index] == pytest.approx(slope, rel=1e-3)


@MODES
def test_probability_0_is_plain_fine_tuning(causal: bool) -> None:
    """Weights, gradients and random state, with dropout."""
    plain = train(lambda _: [], causal, dropout=True)
    ours = train(lambda classifier: [Mixout(classifier, 0.0, seed=3)], causal, dropout=True)
    assert_same_training(ours, plain)
    others = train(lambda classifier: [Mixout(classifier, P, seed=3)], causal, dropout=True)
    assert torch.equal(others["random state"], plain["random state"])
    assert not torch.equal(others["classifier_head.weight"], plain["classifier_head.weight"])


def mixed_weights(seed: int = 3, step: int = 0) -> dict[str, Tensor]:
    classifier = make_classifier(True)
    mixout = Mixout(classifier, P, seed)
    move_away(classifier)
    mixout.begin_step(step, 10)
    return {name: weight for name, weight in weights_of(classifier).items() if name in MIXED}


def test_masks_depend_on_seed_step_and_matrix_only() -> None:
    torch.manual_seed(1)
    expected = mixed_weights()
    torch.manual_seed(2)
    again = mixed_weights()
    assert all(torch.equal(again[name], expected[name]) for name in MIXED)
    for other in (mixed_weights(seed=4), mixed_weights(step=1)):
        assert not any(torch.equal(other[name], expected[name]) for name in MIXED)
    classifier = make_classifier(True)
    mixout = Mixout(classifier, P, seed=3)
    with torch.no_grad():
        for weight in classifier.parameters():
            weight.add_(1)  # then an entry tells whether it is kept
    mixout.begin_step(0, 10)
    masks = [
        (weight - old).abs() > 0.5
        for weight, old in zip(mixout.weights.values(), mixout.pretrained, strict=True)
    ]
    same_shape = [mask for mask in masks if mask.shape == (48, 48)]
    assert len(same_shape) == 4  # queries and outputs of both layers
    assert not any(torch.equal(same_shape[0], mask) for mask in same_shape[1:])


@MODES
def test_micro_batches_have_the_same_gradients(causal: bool) -> None:
    both = [
        train(lambda c: [Mixout(c, P, seed=3)], causal, steps=1, micro_batch_size=size)
        for size in (None, 1)
    ]
    assert_close_gradients(both[1], both[0])


def test_pretrained_values_stay_and_are_not_saved() -> None:
    classifier = make_classifier(True)
    pretrained = weights_of(classifier)
    mixout = Mixout(classifier, P, seed=3)
    method = Method(classifier, classification_loss, [mixout])
    plain = Method(make_classifier(True), classification_loss)
    run_steps(method, make_rows(), steps=3)
    assert method.state_dict().keys() == plain.state_dict().keys()
    for name, buffer in zip(mixout.weights, mixout.pretrained, strict=True):
        assert torch.equal(buffer, pretrained[f"llama.layers.{name}"])
    assert not mixout.own and not mixout.kept  # no memory between steps


def test_an_interrupted_run_saves_the_weights_themselves(workplace: Path) -> None:
    """After its first step, an entry has moved by at most the learning rate."""
    assert interrupt([*FINETUNE, "--mixout", "0.5"], 1) == 130
    saved, pretrained = (load_safely(path)["model"] for path in ("out/a.pt.state", "stories42M.pt"))
    name = "layers.0.feed_forward.w1.weight"
    moved = (saved[f"classifier.llama.{name}"] - pretrained[name]).abs()
    assert moved.max() <= 1.01e-3
    # About half of the weights were kept; the others had no gradient.
    assert 0.4 < (moved == 0).float().mean() < 0.6
