"""LoRA against its equation, what trains, and what is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import run_llama
from base_llama import load_safely
from beyond.command_line import build_parser
from beyond.methods.frozen_backbone import FrozenBackbone
from beyond.methods.lora import PATHS, Lora, LowRankUpdate
from beyond.methods.method import Method
from beyond.methods.options import MATRICES
from classifier import ClassifierConfig, LlamaEmbeddingClassifier, load_classifier
from llama import load_pretrained
from optimizer import AdamW
from run_llama import classification_loss
from tests.beyond.methods.helpers import (
    finetune_and_load,
    make_classifier,
    make_rows,
    train_steps,
    weights_of,
)
from tests.beyond.runs import FINETUNE, run
from tests.conftest import ROOT, make_llama

LORA = [*FINETUNE, "--lora_rank", "2", "--lr", "1e-2"]
QUERY_VALUE = ("query", "value")


def lora_of(method: Method) -> Lora:
    (lora,) = method.ingredients
    assert isinstance(lora, Lora)
    return lora


def make_lora(
    classifier: LlamaEmbeddingClassifier, matrices: tuple[str, ...] = QUERY_VALUE, seed: int = 7
) -> Method:
    lora = Lora(classifier, rank=3, alpha=6.0, matrices=matrices, seed=seed)
    return Method(classifier, classification_loss, [lora])


def test_update_matches_the_equation() -> None:
    """h = W0 x + (alpha / r) B A x, in NumPy's float64."""
    rng = np.random.default_rng(0)
    w0, a, b = (rng.normal(size=size) for size in ((5, 7), (3, 7), (5, 3)))
    x = rng.normal(size=(2, 4, 7))
    linear = nn.Linear(7, 5, bias=False)
    update = LowRankUpdate(linear, rank=3, alpha=6.0, generator=torch.Generator())
    with torch.no_grad():
        for parameter, value in ((linear.weight, w0), (update.a, a), (update.b, b)):
            parameter.copy_(torch.from_numpy(value))
    expected = x @ w0.T + 6 / 3 * (x @ a.T @ b.T)
    # Values of order 10 in float32.
    np.testing.assert_allclose(linear(torch.tensor(x).float()).detach(), expected, atol=1e-5)
    merged = update.merge(linear.weight).numpy()
    np.testing.assert_allclose(merged, w0 + 6 / 3 * (b @ a), atol=1e-6)


def test_updates_are_those_of_peft() -> None:
    """With its A and B set to ours: predictions, gradients of A and B, and merged matrices."""
    from peft import LoraConfig, inject_adapter_in_model  # here, since it takes seconds

    rows, method = make_rows(), make_lora(make_classifier(), MATRICES)
    train_steps(method)
    theirs = make_classifier()
    theirs.load_state_dict(method.classifier.state_dict())  # the head has been trained
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=[path.split(".")[-1] for path in PATHS.values()]
    )
    inject_adapter_in_model(config, theirs.llama)
    modules: list[Any] = [
        theirs.llama.layers[i].get_submodule(PATHS[name]) for i in range(2) for name in MATRICES
    ]
    updates = [u for u in lora_of(method).updates if isinstance(u, LowRankUpdate)]
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    for update, module in zip(updates, modules, strict=True):
        pairs += [
            (update.a, module.lora_A["default"].weight),
            (update.b, module.lora_B["default"].weight),
        ]
    with torch.no_grad():
        for our, their in pairs:
            their.copy_(our)
    outputs = [c.eval()(rows.tokens, rows.lengths) for c in (method.classifier, theirs)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
    method.zero_grad()
    for output in outputs:
        output[:, 0].sum().backward()
    for our, their in pairs:
        assert our.grad is not None and our.grad.any()
        torch.testing.assert_close(our.grad, their.grad, atol=1e-5, rtol=1e-4)
    for update, module in zip(updates, modules, strict=True):
        merged = update.merge(module.base_layer.weight)
        module.merge()
        torch.testing.assert_close(merged, module.base_layer.weight, atol=1e-6, rtol=0)


def test_first_step_starts_from_the_pretrained_model() -> None:
    """B is zero, and A is uniform in +-1/sqrt(in)."""
    rows, plain = make_rows(), make_classifier()
    expected = plain(rows.tokens, rows.lengths)
    method = make_lora(make_classifier(), MATRICES)
    assert torch.equal(method.classifier(rows.tokens, rows.lengths), expected)
    lora = lora_of(method)
    updates = [update for update in lora.modules() if isinstance(update, LowRankUpdate)]
    assert len(updates) == 2 * len(MATRICES)
    for update in updates:
        bound = update.a.shape[1] ** -0.5
        assert not update.b.any() and update.a.abs().max() <= bound
        assert update.a.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_random_numbers_depend_on_the_seed_alone() -> None:
    def draw(seed: int) -> list[torch.Tensor]:
        method = make_lora(make_classifier(), seed=seed)
        return [p for p in lora_of(method).parameters() if p.any()]

    first = draw(7)
    torch.manual_seed(99)
    classifier, state = make_classifier(), torch.get_rng_state()
    make_lora(classifier)
    assert torch.equal(torch.get_rng_state(), state)  # nothing of the global generator
    assert all(torch.equal(a, b) for a, b in zip(first, draw(7), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, draw(8), strict=True))
    # A has other numbers than a head that is drawn with the same seed.
    torch.manual_seed(7)
    head = nn.Linear(first[0].shape[1], 2).weight
    assert not torch.isin(head, first[0]).any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("matrices", [QUERY_VALUE, ("output", "w2"), MATRICES])
def test_kept_weights_are_merged_and_given_back(causal: bool, matrices: tuple[str, ...]) -> None:
    """A plain model with W0 + (alpha / r) B A computes the same, and training goes on from W0."""
    rows, method = make_rows(), make_lora(make_classifier(causal), matrices)
    before = weights_of(method.classifier)
    train_steps(method)
    lora = lora_of(method)
    parameters = dict(lora.named_parameters())
    unmerged = method.classifier(rows.tokens, rows.lengths)
    plain = make_classifier(causal)
    with method.kept_weights():
        merged = method.classifier(rows.tokens, rows.lengths)
        plain.load_state_dict(method.classifier.state_dict())  # strict: no other names
    torch.testing.assert_close(merged, unmerged, atol=1e-5, rtol=1e-5)
    assert torch.equal(plain(rows.tokens, rows.lengths), merged)
    assert not torch.equal(merged, make_classifier(causal)(rows.tokens, rows.lengths))
    names = [f"layers.{i}.{PATHS[name]}.weight" for i in range(2) for name in matrices]
    for number, name in enumerate(names):
        a, b = (parameters[f"updates.{number}.{side}"].detach().numpy() for side in "ab")
        assert b.any()
        expected = before[f"llama.{name}"].numpy() + 6 / 3 * (b.astype(float) @ a.astype(float))
        kept_weight = plain.state_dict()[f"llama.{name}"].numpy()
        np.testing.assert_allclose(kept_weight, expected, atol=1e-6)
    for name, weight in weights_of(method.classifier).items():
        assert torch.equal(weight, before[name]) == (not name.startswith("classifier_head")), name
    assert torch.equal(method.classifier(rows.tokens, rows.lengths), unmerged)


def test_weights_are_given_back_after_an_interruption() -> None:
    rows, method = make_rows(), make_lora(make_classifier())
    train_steps(method)
    before = method.classifier(rows.tokens, rows.lengths)
    with pytest.raises(KeyboardInterrupt), method.kept_weights():
        raise KeyboardInterrupt
    assert torch.equal(method.classifier(rows.tokens, rows.lengths), before)


def test_only_the_updates_and_the_head_train(workplace: Path) -> None:
    """The result is a plain classifier, whose chosen matrices changed by one of rank 2."""
    pretrained = load_pretrained("stories42M.pt").state_dict()
    weights = finetune_and_load([*LORA, "--lora_matrices", "key,w2"])
    changed = set()
    for name, weight in pretrained.items():
        difference = weights.pop(f"llama.{name}") - weight
        if difference.any():
            changed.add(name)
            # Rounding W0 + BA to float32 leaves a full rank, of size 1e-7.
            assert torch.linalg.matrix_rank(difference, atol=1e-5) == 2
    paths = ("attention.compute_key", "feed_forward.w2")
    assert changed == {f"layers.{i}.{path}.weight" for i in range(2) for path in paths}
    assert weights.keys() == {"classifier_head.weight", "classifier_head.bias"}


def test_predictions_are_those_of_the_saved_classifier(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The epochs are judged by the merged weights, so the best one's accuracy is the final one."""
    status, out, _ = run([*LORA, "--epochs", "2"], capsys)
    accuracies = [line[-5:] for line in out.splitlines() if line.startswith("epoch")]
    assert status == 0 and f"dev acc :: {max(accuracies)}\n" in out
    classifier = load_classifier("out/a.pt")
    assert type(classifier) is LlamaEmbeddingClassifier
    assert not any(module._forward_hooks for module in classifier.modules())


def test_optimizer_holds_only_what_trains(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[AdamW] = []

    class Recording(AdamW):
        def __init__(self, *args, **options):  # type: ignore[no-untyped-def]
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(run_llama, "AdamW", Recording)
    finetune_and_load(LORA)
    (optimizer,) = made
    shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]]
    assert len(optimizer.state) == len(shapes)
    query_value = [(2, 48), (48, 2), (2, 48), (24, 2)]
    assert shapes == [(2, 48), (2,), *query_value * 2]


def make_demo() -> LlamaEmbeddingClassifier:
    llama = load_pretrained(ROOT / "data/demo/model.pt")
    return LlamaEmbeddingClassifier(ClassifierConfig(5, "", 0.3, "finetune"), llama)


def make_eighth() -> LlamaEmbeddingClassifier:
    """A model with the proportions of stories42M.pt, whose sizes are eight times as large."""
    shape = {"dim": 64, "n_layers": 8, "n_heads": 1, "n_kv_heads": 1, "vocab_size": 4000}
    llama = make_llama(causal=True, **shape, multiple_of=4)
    assert llama.config.hidden_dim == 1376 / 8
    return LlamaEmbeddingClassifier(ClassifierConfig(5, "", 0.3, "finetune"), llama)


@pytest.mark.parametrize(("make", "rank"), [(make_demo, 8), (make_eighth, 1)])
def test_gradients_and_optimizer_state_are_small(
    make: Callable[[], LlamaEmbeddingClassifier], rank: int
) -> None:
    """Rank 8 on query and value takes less than 5% of what full fine-tuning takes.

    An eighth of the rank, in a model of an eighth of the sizes, takes the same share.
    """

    def num_bytes(rank: int | None) -> int:
        classifier = make()
        parts = [Lora(classifier, rank, 16.0, QUERY_VALUE, seed=1)] if rank else []
        method = Method(classifier, classification_loss, parts)
        optimizer = AdamW(method.parameter_groups(), lr=1e-3)
        method(*make_rows()).backward()
        optimizer.step()
        gradients = [p.grad for p in method.parameters() if p.grad is not None]
        moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        return sum(tensor.nbytes for tensor in (*gradients, *moments))

    assert 0 < num_bytes(rank) < 0.05 * num_bytes(None)


def test_updates_scaled_by_zero_train_the_head_alone(workplace: Path) -> None:
    """--lora_alpha 0 is a frozen backbone, bit for bit, if there is no dropout inside it."""
    argv = [*FINETUNE, "--dropout", "0"]
    frozen = finetune_and_load([*argv, "--freeze_backbone"])
    scaled = finetune_and_load([*argv, "--lora_rank", "2", "--lora_alpha", "0"])
    assert all(torch.equal(scaled[name], weight) for name, weight in frozen.items())


def test_bfloat16(workplace: Path) -> None:
    """The updates are computed in bfloat16 too, so a layer's output keeps its dtype."""
    rows, method = make_rows(), make_lora(make_classifier())
    train_steps(method)
    dtypes = []
    value = method.classifier.llama.get_submodule("layers.0.attention.compute_value")
    value.register_forward_hook(lambda *args: dtypes.append(args[-1].dtype))
    expected = method.classifier(rows.tokens, rows.lengths)
    with torch.autocast("cpu", torch.bfloat16):
        found = method.classifier(rows.tokens, rows.lengths)
    assert dtypes == [torch.float32, torch.bfloat16]
    # bfloat16 has 8 bits; log-probabilities are of order one.
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)
    expected_weights = finetune_and_load(LORA)
    weights = finetune_and_load([*LORA, "--dtype", "bfloat16"])
    assert weights.keys() == expected_weights.keys()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            ["--lora_rank", "49"],
            "--lora_rank 49: layers.0.attention.compute_query is 48 x 48; choose a rank of at "
            "most 48, or other --lora_matrices",
        ),
        (
            ["--lora_rank", "25", "--lora_matrices", "w1,key"],
            "--lora_rank 25: layers.0.attention.compute_key is 24 x 48; choose a rank of at most "
            "24, or other --lora_matrices",
        ),
        (["--lora_rank", "0"], "argument --lora_rank: 0 is below 1"),
        (
            ["--lora_rank", "2", "--lora_matrices", ""],
            "argument --lora_matrices: '' is not a list of different matrices among query, key, "
            "value, output, w1, w2, w3",
        ),
        (["--lora_alpha", "8"], "--lora_alpha: needs --lora_rank"),
        (["--lora_matrices", "key"], "--lora_matrices: needs --lora_rank"),
        (
            ["--lora_rank", "2", "--freeze_backbone"],
            "--lora_rank and --freeze_backbone: choose one of them",
        ),
    ],
)
def test_bad_flags_are_one_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], flags: list[str], reason: str
) -> None:
    status, _, err = run([*FINETUNE, *flags], capsys)
    assert (status, err) == (2, f"run_llama.py: error: {reason}\n")
    assert not Path("out/a.pt").exists()


def test_help_of_lora_matrices_says_the_default_once() -> None:
    words = " ".join(build_parser().format_help().split())
    assert "output, w1, w2, w3 (default: query,value) --smart" in words


def test_largest_rank_is_allowed(workplace: Path) -> None:
    finetune_and_load([*FINETUNE, "--epochs", "1", "--lora_rank", "24", "--lora_matrices", "key"])


def test_training_checkpoint_has_the_updates(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_llama, "remove_training_checkpoint", lambda path: None)
    finetune_and_load(LORA)
    names = load_safely(Path("out/a.pt.state"))["model"].keys()
    updates = {name for name in names if not name.startswith("classifier.")}
    prefix = "modules_of_ingredients.0.updates."
    assert updates == {f"{prefix}{i}.{side}" for i in range(4) for side in "ab"}


def test_gradients_match_those_of_the_merged_matrix() -> None:
    """d loss / d A and d B by the chain rule, from the gradient of a plain model's W."""
    rows, method = make_rows(), make_lora(make_classifier())
    train_steps(method)
    method.zero_grad()
    method(*rows).backward()
    parameters = dict(lora_of(method).named_parameters())
    plain = make_classifier()
    with method.kept_weights():
        plain.load_state_dict(method.classifier.state_dict())
    F.nll_loss(plain(rows.tokens, rows.lengths), rows.labels, reduction="sum").backward()
    gradient = plain.llama.get_parameter("layers.0.attention.compute_query.weight").grad
    assert gradient is not None
    a, b = parameters["updates.0.a"], parameters["updates.0.b"]
    # Gradients of order one in float32.
    torch.testing.assert_close(a.grad, 2 * b.T @ gradient, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(b.grad, 2 * gradient @ a.T, atol=1e-4, rtol=1e-4)


def test_frozen_backbone_and_lora_leave_the_same_groups_of_the_classifier() -> None:
    """Both leave the head, and LoRA adds A and B to it."""
    groups = []
    for ingredient in (FrozenBackbone, lambda c: Lora(c, 3, 6.0, QUERY_VALUE, seed=1)):
        classifier = make_classifier()
        (group,) = Method(
            classifier, classification_loss, [ingredient(classifier)]
        ).parameter_groups()
        groups.append([tuple(p.shape) for p in group["params"]])
    assert groups[0] == groups[1][:2] == [(2, 48), (2,)] and len(groups[1]) == 2 + 2 * 4
