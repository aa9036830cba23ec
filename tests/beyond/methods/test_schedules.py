"""Learning rates by step and by layer, weight decay, and clipping, against their equations."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from beyond.methods.ingredient import Ingredient
from beyond.methods.method import Method
from beyond.methods.schedules import (
    GradientClipping,
    LearningRates,
    WeightDecay,
    layers_to_head,
    rate_factor,
)
from classifier import LlamaEmbeddingClassifier
from optimizer import AdamW
from run_llama import classification_loss, main
from tests.beyond.methods.helpers import (
    MakeIngredient,
    add_ingredient,
    finetune_and_load,
    load_weights,
    make_classifier,
    read_curve,
    train_steps,
    weights_of,
)
from tests.beyond.runs import FINETUNE, assert_equal, interrupt
from tests.conftest import SHAPE, make_llama

ONE_STEP = [*FINETUNE, "--epochs", "1", "--batch_size", "8", "--lr", "1e-2", "--dropout", "0"]


# ------------------------------------------------------------------------------- rates by step


@pytest.mark.parametrize(
    ("warmup", "linear_decay", "expected"),
    [
        (0.0, False, [1, 1, 1, 1, 1, 1, 1, 1]),
        (0.0, True, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        (0.25, False, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]),
        (0.25, True, [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        (1.0, True, [i / 9 for i in range(1, 9)]),
        (0.01, True, [(8 - i) / 8 for i in range(8)]),  # less than half a step
    ],
)
def test_rate_factor_rises_and_falls(
    warmup: float, linear_decay: bool, expected: list[float]
) -> None:
    factors = [rate_factor(step, 8, warmup, linear_decay) for step in range(8)]
    assert factors == pytest.approx(expected, rel=1e-12)


def test_a_run_follows_the_schedule(workplace: Path) -> None:
    """12 steps, as TensorBoard has them; a resumed run too."""
    argv = [*FINETUNE, "--warmup", "0.25", "--linear_decay", "--lr", "1e-3"]
    expected = [0.25, 0.5, 0.75, *((12 - step) / 9 for step in range(3, 12))]
    weights = finetune_and_load(argv)
    assert read_curve("learning_rate") == pytest.approx([1e-3 * factor for factor in expected])
    shutil.rmtree("out")
    assert interrupt(argv, 5) == 130
    assert main([*argv, "--resume"]) == 0
    assert read_curve("learning_rate") == pytest.approx([1e-3 * factor for factor in expected])
    assert_equal(load_weights(Path()), weights)


# ------------------------------------------------------------------------------ rates by layer


def test_distances_from_the_head() -> None:
    classifier = make_classifier()
    distances = layers_to_head(classifier)
    found = {name: distances[id(p)] for name, p in classifier.named_parameters()}
    expected = {
        name: {"0": 2, "1": 1}[name.split(".")[2]] if ".layers." in name else 0 for name in found
    }
    expected["llama.output.weight"] = 3  # the embeddings, which are tied to it
    assert found == expected


def test_untied_embeddings_are_the_furthest() -> None:
    classifier = make_classifier()
    classifier.llama = make_llama(causal=True, tie_embeddings=False)
    distances = layers_to_head(classifier)
    assert distances[id(classifier.llama.tok_embeddings.weight)] == SHAPE["n_layers"] + 1
    assert distances[id(classifier.llama.output.weight)] == 0


def test_layer_decay_scales_each_layers_step() -> None:
    """AdamW's first step has the size of the learning rate, so steps compare as rates do."""
    before, changes = weights_of(make_classifier()), []
    for decay in (1.0, 0.5):
        classifier = make_classifier()
        rates = LearningRates(classifier, layer_decay=decay)
        train_steps(Method(classifier, classification_loss, [rates]), steps=1)
        changes.append({name: w - before[name] for name, w in weights_of(classifier).items()})
    for name, change in changes[0].items():
        factor = 1.0
        if ".layers." in name:
            factor = {"0": 0.25, "1": 0.5}[name.split(".")[2]]
        elif name == "llama.output.weight":
            factor = 0.125
        # Differences of weights of order one in float32.
        torch.testing.assert_close(changes[1][name], factor * change, atol=1e-6, rtol=0)


def test_the_heads_rate_is_the_one_that_is_logged(workplace: Path) -> None:
    argv = [*FINETUNE, "--epochs", "1", "--layer_decay", "0.5", "--weight_decay", "0.1"]
    finetune_and_load([*argv, "--lr", "1e-3"])
    assert read_curve("learning_rate") == pytest.approx([1e-3] * 3)


# -------------------------------------------------------------------------------- weight decay


def test_weight_decay_shrinks_matrices_only(workplace: Path) -> None:
    """In one step: theta <- (1 - lr * decay) theta, after the plain update."""
    plain, decayed = (
        finetune_and_load([*ONE_STEP, "--weight_decay", decay]) for decay in ("0", "3")
    )
    for name, weight in plain.items():
        if weight.dim() == 2:
            expected = weight * (1 - 1e-2 * 3)
            torch.testing.assert_close(decayed[name], expected, atol=1e-7, rtol=1e-6)
        else:
            assert torch.equal(decayed[name], weight), name


# ------------------------------------------------------------------------------------ clipping


@pytest.mark.parametrize("limit", [1e-3, 1e9])
def test_clipping_scales_all_gradients_together(limit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(size)) for size in ((3, 4), (5,), (2, 2))]
    gradients = [torch.randn(p.shape, generator=generator) for p in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    norm = GradientClipping(limit).before_update(AdamW(groups))
    expected = sum(g.double().square().sum().item() for g in gradients) ** 0.5
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        if limit > expected:
            assert torch.equal(parameter.grad, gradient)
        else:
            # PyTorch divides by the norm + 1e-6.
            torch.testing.assert_close(
                parameter.grad, gradient * (limit / expected), atol=0, rtol=1e-5
            )


def test_the_norm_before_clipping_is_logged(workplace: Path) -> None:
    """In the first step, where both runs have the same weights."""
    norms = []
    for flags in ([], ["--max_grad_norm", "1e-3"]):
        finetune_and_load([*FINETUNE, "--epochs", "1", *flags])
        norms.append(read_curve("gradient_norm")[0])
    assert norms[0] > 1e-2 and norms[0] == pytest.approx(norms[1], rel=1e-5)


# ---------------------------------------------------------------------------------- limit cases


def test_without_flags_the_groups_are_the_plain_ones(workplace: Path) -> None:
    classifier = make_classifier()
    (group,) = Method(classifier, classification_loss).parameter_groups()
    assert list(map(id, group["params"])) == list(map(id, classifier.parameters()))
    assert group.keys() == {"params"}


LIMITS: dict[str, MakeIngredient] = {
    "constant rate": lambda classifier: LearningRates(classifier),
    "no decay": lambda classifier: WeightDecay(0.0),
    "high limit": lambda classifier: GradientClipping(1e9),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limit_case_is_plain_fine_tuning_bit_for_bit(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plain = finetune_and_load(FINETUNE)
    add_ingredient(monkeypatch, LIMITS[name])
    assert_equal(finetune_and_load(FINETUNE), plain)


def test_groups_by_layer_at_one_rate_are_plain_fine_tuning_bit_for_bit() -> None:
    """The groups are computed one after the other, but to the same numbers."""

    class Apart(LearningRates):
        def parameter_groups(self, groups):  # type: ignore[no-untyped-def]
            self.layer_decay = 0.5
            groups = super().parameter_groups(groups)
            assert len(groups) == 4
            return [{**group, "lr_factor": 1.0} for group in groups]

    def train(*makers: type[LearningRates]) -> LlamaEmbeddingClassifier:
        classifier = make_classifier()
        ingredients: list[Ingredient] = [make(classifier) for make in makers]
        train_steps(Method(classifier, classification_loss, ingredients))
        return classifier

    assert_equal(weights_of(train(Apart)), weights_of(train()))
