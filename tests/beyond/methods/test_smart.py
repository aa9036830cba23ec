"""SMART: delta and penalty against the equations in float64, and what the noise depends on."""

import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

from beyond.methods.ingredient import Rows
from beyond.methods.method import Method
from beyond.methods.smart import NOISE, RADIUS, STEP_SIZE, Smart
from beyond.runtime import Runtime, prepare_model
from classifier import LlamaEmbeddingClassifier
from run_llama import classification_loss
from tests.beyond.methods.steps import (
    SENTENCES,
    assert_close_gradients,
    assert_same_training,
    make_classifier,
    make_rows,
    train,
)
from tests.conftest import make_llama
from tests.oracle import numpy_forward

TINY = {"dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 16}
WEIGHT = 1e5  # so large that the penalty is about as large as the rest of the loss
MODES = pytest.mark.parametrize("causal", [False, True])


class Oracle:
    """The classifier in float64, in NumPy, with a change of the embedding at each position."""

    def __init__(self, classifier: LlamaEmbeddingClassifier, rows: Rows) -> None:
        self.weights = {name: w.double().clone() for name, w in classifier.state_dict().items()}
        self.rows = rows
        self.causal = classifier.llama.config.causal
        # Every position gets a token of its own, whose embedding is the changed one.
        length = rows.tokens.shape[1]
        self.llama = make_llama(self.causal, **TINY, vocab_size=length).double()

    def log_probs(self, row: int, delta: np.ndarray) -> np.ndarray:
        """Of one row; delta: (seq, dim)."""
        tokens = self.rows.tokens[row]
        own = {
            name.removeprefix("llama."): w
            for name, w in self.weights.items()
            if name.startswith("llama.layers") or name == "llama.norm.weight"
        }
        embeddings = self.weights["llama.tok_embeddings.weight"][tokens] + torch.tensor(delta)
        names = ("tok_embeddings.weight", "output.weight")
        self.llama.load_state_dict(own | dict.fromkeys(names, embeddings))
        _, hidden = numpy_forward(self.llama, torch.arange(len(tokens))[None])
        last = int(self.rows.lengths[row]) - 1 if self.causal else -1
        head, bias = (
            self.weights[f"classifier_head.{part}"].numpy() for part in ("weight", "bias")
        )
        logits = head @ hidden[0, last] + bias
        return logits - np.log(np.exp(logits).sum())

    def divergence(self, row: int, delta: np.ndarray) -> float:
        """KL in both directions between a row's predictions with and without delta."""
        p, q = (np.exp(self.log_probs(row, d)) for d in (delta, np.zeros_like(delta)))
        return float((p * np.log(p / q)).sum() + (q * np.log(q / p)).sum())

    def loss(self, delta: np.ndarray, weight: float) -> float:
        """Eq. 1 of the paper, summed over rows, with a given delta, (rows, seq, dim)."""
        nothing = np.zeros_like(delta[0])
        return sum(
            weight * self.divergence(row, delta[row]) - self.log_probs(row, nothing)[label]
            for row, label in enumerate(self.rows.labels.tolist())
        )


@MODES
def test_delta_is_one_step_of_projected_gradient_ascent(causal: bool) -> None:
    """Algorithm 1 for one step, with a gradient of finite differences."""
    classifier, rows = make_classifier(causal, False, **TINY), make_rows()
    smart = Smart(classifier, WEIGHT, seed=3)
    smart.before_forward(rows)
    log_probs = classifier(rows.tokens, rows.lengths).detach()
    delta = smart.find_delta(classifier, rows, log_probs).numpy()
    noise = smart.draw_noise(rows).double().numpy()
    embeddings = classifier.llama.tok_embeddings.weight.detach().double().numpy()
    unit = np.sqrt((embeddings**2).mean())
    oracle, step = Oracle(classifier, rows), 1e-5 * unit
    expected = np.zeros_like(noise)
    for row, length in enumerate(rows.lengths.tolist()):
        for position in range(length):
            slopes = np.zeros(TINY["dim"])
            for i in range(TINY["dim"]):
                around = []
                for change in (step, -step):
                    moved = noise[row].copy()
                    moved[position, i] += change
                    around.append(oracle.divergence(row, moved))
                slopes[i] = (around[0] - around[1]) / (2 * step)
            if not slopes.any():  # a causal model cannot see the token
                continue
            ascended = noise[row, position] + STEP_SIZE * unit * slopes / np.abs(slopes).max()
            expected[row, position] = np.clip(ascended, -RADIUS * unit, RADIUS * unit)
    # A wrong direction would differ by up to twice the radius.
    np.testing.assert_allclose(delta, expected, atol=0.02 * RADIUS * unit)
    assert (np.abs(expected) > 0.99 * RADIUS * unit).sum() > 100


@MODES
def test_loss_and_gradients_are_the_equations(causal: bool) -> None:
    classifier, rows = make_classifier(causal, False, **TINY), make_rows()
    smart = Smart(classifier, WEIGHT, seed=3)
    loss = Method(classifier, classification_loss, [smart])(*rows)
    loss.backward()
    log_probs = classifier(rows.tokens, rows.lengths).detach()
    delta = smart.find_delta(classifier, rows, log_probs).double().numpy()
    oracle = Oracle(classifier, rows)
    expected = oracle.loss(delta, WEIGHT)
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    assert expected > 1.2 * oracle.loss(delta, 0)  # the penalty counts
    generator, step = np.random.default_rng(0), 1e-5
    for name, parameter in classifier.named_parameters():
        assert parameter.grad is not None
        name = name.replace("llama.output", "llama.tok_embeddings")  # they are tied
        # Entries with a large gradient; most embeddings have none.
        order = parameter.grad.abs().flatten().argsort(descending=True)
        for place in generator.choice(order[:10].numpy(), 2, replace=False):
            entries, around = oracle.weights[name].flatten(), []
            for change in (step, -step):
                moved = entries.clone()
                moved[place] += change
                oracle.weights[name] = moved.view(parameter.shape)
                around.append(oracle.loss(delta, WEIGHT))
            oracle.weights[name] = entries.view(parameter.shape)
            slope = (around[0] - around[1]) / (2 * step)
            scale = parameter.grad.abs().max().item()
            assert parameter.grad.flatten()[place].item() == pytest.approx(slope, abs=0.01 * scale)


@MODES
def test_weight_0_is_plain_fine_tuning(causal: bool) -> None:
    """Weights, gradients and random state, with dropout."""
    plain = train(lambda _: [], causal, dropout=True)
    ours = train(lambda classifier: [Smart(classifier, 0.0, seed=3)], causal, dropout=True)
    assert_same_training(ours, plain)
    others = train(lambda classifier: [Smart(classifier, 1.0, seed=3)], causal, dropout=True)
    assert torch.equal(others["random state"], plain["random state"])
    assert not torch.equal(others["classifier_head.weight"], plain["classifier_head.weight"])


@MODES
def test_all_passes_have_the_same_dropout(causal: bool) -> None:
    """Without a change of the embeddings, the prediction is the plain one, bit for bit."""
    classifier, rows = make_classifier(causal, dropout=True), make_rows()
    smart = Smart(classifier, WEIGHT, seed=3)
    torch.manual_seed(8)
    smart.before_forward(rows)
    log_probs = classifier(rows.tokens, rows.lengths)
    assert not torch.allclose(log_probs, classifier(rows.tokens, rows.lengths), atol=1e-3)
    for _ in range(2):
        nothing = torch.zeros(*rows.tokens.shape, smart.dim)
        assert torch.equal(smart.predict(classifier, rows, nothing), log_probs)


def noise(rows: Rows, seed: int = 3, step: int = 0) -> Tensor:
    smart = Smart(make_classifier(True), WEIGHT, seed)
    smart.begin_step(step, 10)
    return smart.draw_noise(rows)


def test_noise_depends_on_seed_step_and_line_only() -> None:
    rows = make_rows()
    expected = noise(rows)
    order = [2, 0, 3]
    some = Rows(*(part[order] for part in rows))
    assert torch.equal(noise(some), expected[order])
    wide = rows._replace(tokens=torch.nn.functional.pad(rows.tokens, (0, 5), value=3))
    assert torch.equal(noise(wide)[:, :-5], expected)
    others = [noise(rows, seed=4), noise(rows, step=1), noise(make_rows((5, 1, 8, 6)))]
    for other in others:
        assert not (other == expected)[expected != 0].any()


def test_noise_is_normal_and_not_on_padding() -> None:
    rows = make_rows()
    values = noise(rows)
    is_token = torch.arange(values.shape[1]) < rows.lengths[:, None]
    assert not values[~is_token].any()
    unit = make_classifier(True).llama.tok_embeddings.weight.square().mean().sqrt().item()
    drawn = values[is_token].flatten() / (NOISE * unit)
    assert len(drawn) == 48 * sum(map(len, SENTENCES))
    # Five standard errors of the mean and of the standard deviation.
    assert abs(drawn.mean().item()) < 5 / len(drawn) ** 0.5
    assert abs(drawn.std().item() - 1) < 5 / (2 * len(drawn)) ** 0.5


@MODES
def test_delta_leaves_padding_and_evaluation_alone(causal: bool) -> None:
    classifier, rows = make_classifier(causal).eval(), make_rows()
    before = classifier(rows.tokens, rows.lengths)
    smart = Smart(classifier, WEIGHT, seed=3)
    Method(classifier, classification_loss, [smart])(*rows)
    assert torch.equal(classifier(rows.tokens, rows.lengths), before)
    delta = smart.find_delta(classifier, rows, before.detach())
    is_token = torch.arange(delta.shape[1]) < rows.lengths[:, None]
    assert not delta[~is_token].any() and delta[is_token].any(dim=-1).sum() > len(SENTENCES)
    with pytest.raises(IndexError):  # a token outside the vocabulary
        smart.predict(classifier, rows._replace(tokens=rows.tokens + 320), delta)
    assert torch.equal(classifier(rows.tokens, rows.lengths), before)


def test_causal_penalties_do_not_depend_on_the_batch() -> None:
    """The median over five seeds is compared, since in some of them rounding matters.

    The change of an embedding depends on little but the sign of its gradient, so where a gradient
    is almost 0, rounding can flip the change.
    """
    errors = []
    for seed in range(5):
        classifier, rows = make_classifier(True), make_rows()
        method = Method(classifier, classification_loss, [Smart(classifier, WEIGHT, seed=seed)])
        together = method(*rows).item()
        alone = 0.0
        for i, sentence in enumerate(SENTENCES):
            row = Rows(*(part[i : i + 1] for part in rows))
            alone += method(*row._replace(tokens=torch.tensor([sentence]))).item()
        errors.append(abs(alone - together) / together)
    assert statistics.median(errors) < 1e-5


@MODES
def test_micro_batches_have_the_same_gradients(causal: bool) -> None:
    runs = [
        train(lambda c: [Smart(c, 1.0, seed=3)], causal, steps=1, micro_batch_size=size)
        for size in (None, 1, 3)
    ]
    assert_close_gradients(runs[1], runs[0])
    assert_close_gradients(runs[2], runs[0])


def test_the_penalty_survives_bfloat16() -> None:
    """With the paper's radius, it would be a hundred times as large as in float32."""
    penalties = []
    for dtype in (torch.float32, torch.bfloat16):
        classifier, rows = make_classifier(True), make_rows()
        smart = Smart(classifier, 1.0, seed=3)
        prepare_model(classifier, Runtime(torch.device("cpu"), dtype, True), False)
        method, plain = (
            Method(classifier, classification_loss, parts)(*rows) for parts in ([smart], [])
        )
        method.backward()
        assert all(p.grad.isfinite().all() for p in classifier.parameters() if p.grad is not None)
        penalties.append((method - plain).item())
    assert penalties[1] == pytest.approx(penalties[0], rel=0.5)
