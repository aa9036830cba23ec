"""`Method`: how flags build it, and runs with all ingredients together."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from beyond.command_line import get_args
from beyond.methods.averaging import MovingAverage
from beyond.methods.frozen_backbone import FrozenBackbone
from beyond.methods.label_smoothing import smooth_labels
from beyond.methods.lora import Lora
from beyond.methods.method import Method, build_method
from beyond.methods.mixout import Mixout
from beyond.methods.proximal_point import ProximalPoint
from beyond.methods.r_drop import RDrop
from beyond.methods.randomness import derive_seed
from beyond.methods.schedules import GradientClipping, LearningRates, WeightDecay
from beyond.methods.smart import Smart
from beyond.methods.weights import trained
from beyond.methods.wise_ft import WiseFt
from beyond.options import FinetuneOptions
from run_llama import classification_loss, main
from tests.beyond.methods.conftest import PROMPT, WORDS
from tests.beyond.methods.helpers import (
    assert_close_curves,
    finetune_and_load,
    make_classifier,
    read_curve,
    train_steps,
    weights_of,
)
from tests.beyond.runs import (
    FINETUNE,
    KILL,
    TERM,
    Job,
    RunForks,
    Strike,
    assert_close_results,
    assert_equal,
    copy_of,
    run_uninterrupted,
    strike_and_resume,
)
from tests.beyond.test_processes import STILL_FINETUNE
from tokenizer import Tokenizer

RATES = ["--warmup", "0.3", "--linear_decay", "--weight_decay", "0.1", "--max_grad_norm", "0.5"]
RATES += ["--label_smoothing", "0.1"]
BREGMAN = ["--bregman", "200"]  # so that a step's loss shows it
METHODS = {
    "layers": [*RATES, "--layer_decay", "0.7", "--ema", "0.6", *BREGMAN],
    "lora": [*RATES, "--lora_rank", "2", "--lora_matrices", "key,w2", "--ema", "0.6", *BREGMAN],
    "frozen": [*RATES, "--freeze_backbone", "--ema", "0.6"],
    "words": [*RATES, "--head", "label_words", "--wise_ft", "0.6", "--layer_decay", "0.7"],
}


@pytest.fixture
def workplace(workplace: Path) -> Path:
    """A folder of a run whose label words are a token each."""
    (workplace / "data/cfimdb-label-mapping.json").write_text('["a", "and"]')
    return workplace


@pytest.mark.parametrize(
    "name",
    ["layers", *(pytest.param(n, marks=pytest.mark.sweep) for n in METHODS if n != "layers")],
)
def test_a_resumed_run_ends_as_if_it_had_not_been_interrupted(
    run_forks: RunForks, workplace: Path, name: str
) -> None:
    """In a step, in the evaluation of the kept weights, while they are written, at a rename."""
    argv = [*FINETUNE, *METHODS[name]]
    expected = run_uninterrupted(run_forks, workplace, argv)
    points = [
        ([], Strike(TERM, "step", 8)),
        ([], Strike(TERM, "eval", 30)),
        ([], Strike(KILL, "write", 4)),
        (["--save_every", "2"], Strike(KILL, "step", 7)),
    ]
    for flags, strike in points:
        ends = strike_and_resume(run_forks, workplace, [*argv, *flags], strike, expected)
        assert ends == (True, True), strike


@pytest.mark.parametrize("flag", ["--mixout=0.5", "--smart=1", "--r_drop=1"])
def test_a_resumed_run_of_a_method_that_draws_ends_alike(
    run_forks: RunForks, workplace: Path, flag: str
) -> None:
    argv = [*FINETUNE, flag]
    expected = run_uninterrupted(run_forks, workplace, argv)
    strike = Strike(TERM, "step", 4)
    assert strike_and_resume(run_forks, workplace, argv, strike, expected) == (True, True)


@pytest.mark.parametrize("mode", [["--causal"], ["--micro_batch_size", "1"]])
@pytest.mark.parametrize("flag", ["--mixout=0.5", "--smart=1", "--r_drop=1"])
def test_two_processes_draw_what_one_does(
    run_forks: RunForks, workplace: Path, flag: str, mode: list[str]
) -> None:
    """What is drawn depends on seed, step and line only; dropout, which R-Drop draws too, is 0."""
    argv = [*STILL_FINETUNE, flag, *mode]
    folder = copy_of(workplace, "several")
    ((status, _, err),) = run_forks([Job(argv, folder, processes=2)])
    assert status == 0, err
    assert main(argv) == 0
    assert_close_results(folder, workplace)
    assert_close_curves(folder, workplace)


@pytest.mark.parametrize(
    ("name", "processes"), [("layers", 3), ("lora", 2), ("frozen", 2), ("words", 2)]
)
def test_several_processes_compute_what_one_does(
    run_forks: RunForks, workplace: Path, name: str, processes: int
) -> None:
    argv = [*FINETUNE, *METHODS[name], "--dropout", "0", "--hidden_dropout_prob", "0"]
    argv += ["--lr", "1e-4", "--epochs", "2"]
    assert main(argv) == 0
    folder = copy_of(workplace, "several")
    ((status, _, err),) = run_forks([Job(argv, folder, processes=processes)])
    assert status == 0, err
    assert_close_results(folder, workplace)
    assert_close_curves(folder, workplace)


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_train_alike(workplace: Path, name: str) -> None:
    argv = [*FINETUNE, *METHODS[name], "--dropout", "0", "--hidden_dropout_prob", "0"]
    argv += ["--lr", "1e-4", "--epochs", "2"]
    whole, micro = (
        (finetune_and_load([*argv, *flags]), read_curve("loss"))
        for flags in ([], ["--micro_batch_size", "1"])
    )
    for tensor_name, weight in whole[0].items():
        torch.testing.assert_close(micro[0][tensor_name], weight, atol=1e-6, rtol=0)
    assert micro[1] == pytest.approx(whole[1], rel=1e-6)


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name != "words"]
)  # these have no new head
def test_head_and_data_order_depend_on_the_seed_alone(workplace: Path, name: str) -> None:
    """So runs pair by seed: with a learning rate of 0 each step has the plain run's loss."""
    argv = [*FINETUNE, "--epochs", "1", "--dropout", "0", "--lr", "0"]
    finetune_and_load(argv)
    plain = read_curve("loss")
    finetune_and_load([*argv, *METHODS[name], "--label_smoothing", "0"])
    assert read_curve("loss") == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("mode", ["--causal", "--no-causal"])
def test_each_step_has_the_same_lines_whatever_the_method(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    steps: list[list[int]] = []

    def record(method: Method, tokens: Tensor, lengths: Tensor, *others: Tensor) -> Tensor:
        steps.append(others[1].tolist())
        return forward(method, tokens, lengths, *others)

    forward = Method.forward
    monkeypatch.setattr(Method, "forward", record)
    lines = {}
    flags = ["--mixout=0.5", "--smart=1", "--r_drop=1", "--bregman=1", "--head=label_words"]
    for flag in ("--label_smoothing=0", *flags):
        finetune_and_load([*FINETUNE, "--epochs", "2", mode, flag])
        lines[flag] = [*steps]
        steps.clear()
    plain = lines["--label_smoothing=0"]
    assert len(plain) == 6 and plain[:3] != plain[3:]
    assert [flag for flag in flags if lines[flag] != plain] == []


OF_FLAGS = {
    "--smart 3": (Smart, {"weight": 3.0, "seed": 7}),
    "--bregman 3": (ProximalPoint, {"weight": 3.0}),
    "--r_drop 3": (RDrop, {"alpha": 3.0, "seed": 7}),
    "--mixout 0.25": (Mixout, {"probability": 0.25, "seed": 7}),
    "--ema 0.75": (MovingAverage, {"decay": 0.75}),
    "--weight_decay 0.25": (WeightDecay, {"weight_decay": 0.25}),
    "--warmup 0.25": (LearningRates, {"warmup": 0.25, "linear_decay": False, "layer_decay": 1.0}),
    "--linear_decay": (LearningRates, {"warmup": 0.0, "linear_decay": True, "layer_decay": 1.0}),
    "--layer_decay 0.75": (
        LearningRates,
        {"warmup": 0.0, "linear_decay": False, "layer_decay": 0.75},
    ),
    "--max_grad_norm 0.25": (GradientClipping, {"limit": 0.25}),
    "--head label_words --wise_ft 0.25": (WiseFt, {"alpha": 0.25}),
}


def build(word_tokenizer: Tokenizer, flags: str) -> Method:
    """Build the method of some flags."""
    options = get_args(["--option", "finetune", "--seed", "7", *flags.split()])
    assert isinstance(options, FinetuneOptions)
    plain = make_classifier()
    plain.label_names, plain.tokenizer = WORDS, word_tokenizer
    return build_method(options, plain, classification_loss, PROMPT)


@pytest.mark.parametrize("flags", OF_FLAGS)
def test_values_of_flags_reach_the_ingredient(word_tokenizer: Tokenizer, flags: str) -> None:
    kind, values = OF_FLAGS[flags]
    (ingredient,) = build(word_tokenizer, flags).ingredients
    assert type(ingredient) is kind
    assert {name: getattr(ingredient, name) for name in values} == values


def test_values_of_flags_reach_lora(word_tokenizer: Tokenizer) -> None:
    flags = "--lora_rank 3 --lora_alpha 6 --lora_matrices query,w2"
    (built,) = build(word_tokenizer, flags).ingredients
    expected = Lora(make_classifier(), 3, 6.0, ("query", "w2"), seed=7)
    assert isinstance(built, Lora)
    assert_equal(dict(built.state_dict()), dict(expected.state_dict()))
    assert [u.scale for u in built.updates] == [u.scale for u in expected.updates] == [2.0] * 4


def test_label_smoothing_reaches_the_loss(word_tokenizer: Tokenizer) -> None:
    log_probs, labels = torch.tensor([[0.2, 0.8], [0.5, 0.5]]).log(), torch.tensor([1, 0])
    loss = build(word_tokenizer, "--label_smoothing 0.25").loss_fn(log_probs, labels)
    expected = smooth_labels(classification_loss, 0.25)(log_probs, labels)
    assert torch.equal(loss, expected)
    assert loss != classification_loss(log_probs, labels)


def test_averages_are_merged() -> None:
    """Of LoRA, A and B are averaged, and their product is what the kept matrices have."""
    classifier = make_classifier()
    pretrained = weights_of(classifier)
    lora = Lora(classifier, 3, 6.0, ("query",), seed=1)
    average = MovingAverage(trained([classifier, lora]), 0.5)
    method = Method(classifier, classification_loss, [average, lora])
    train_steps(method)
    with average.kept_weights():
        a, b = (dict(lora.named_parameters())[f"updates.1.{x}"].detach().clone() for x in "ab")
    name = "llama.layers.1.attention.compute_query.weight"
    with method.kept_weights():
        found = weights_of(classifier)[name]
    torch.testing.assert_close(found, pretrained[name] + 2 * b @ a, atol=1e-6, rtol=1e-6)
    assert b.any() and torch.equal(weights_of(classifier)[name], pretrained[name])


def test_rates_and_decay_reach_the_updates() -> None:
    """A and B are in the groups that are sorted by what comes after LoRA."""
    classifier = make_classifier()
    lora = Lora(classifier, 3, 6.0, ("query",), seed=1)
    rates = LearningRates(classifier, warmup=1.0)
    parts = [lora, WeightDecay(0.1), rates, GradientClipping(1.0)]
    matrices, others = Method(classifier, classification_loss, parts).parameter_groups()
    assert [tuple(p.shape) for p in matrices["params"]] == [(2, 48), *[(3, 48), (48, 3)] * 2]
    assert [tuple(p.shape) for p in others["params"]] == [(2,)]
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_both_passes_of_r_drop_smooth_labels(workplace: Path) -> None:
    """Without dropout the passes are equal, so the smoothed loss counts twice."""
    argv = [*FINETUNE, "--epochs", "1", "--dropout", "0", "--hidden_dropout_prob", "0"]
    argv += ["--lr", "0", "--label_smoothing", "0.3"]
    finetune_and_load(argv)
    one = read_curve("loss")
    finetune_and_load([*argv, "--r_drop", "1"])
    assert read_curve("loss") == pytest.approx([2 * loss for loss in one], rel=1e-6)


def test_flags_build_their_ingredients_in_order(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Method] = []
    init = Method.__init__

    def record(self: Method, *args: object) -> None:
        init(self, *args)  # type: ignore[arg-type]
        built.append(self)

    monkeypatch.setattr(Method, "__init__", record)
    finetune_and_load([*FINETUNE, "--epochs", "1"])
    finetune_and_load([*FINETUNE, "--epochs", "1", *METHODS["lora"]])
    finetune_and_load(
        [*FINETUNE, "--epochs", "1", *RATES, "--ema", "0.6", "--mixout", "0.5", "--r_drop", "1"]
    )
    rates = [WeightDecay, LearningRates, GradientClipping]
    kinds = [[type(ingredient) for ingredient in method.ingredients] for method in built]
    assert kinds == [
        [],
        [MovingAverage, Lora, ProximalPoint, *rates],
        [MovingAverage, RDrop, Mixout, *rates],  # mixout changes gradients first
    ]


def test_seeds_of_different_purposes_differ() -> None:
    seeds = {derive_seed(purpose, seed) for purpose in ("LoRA", "mixout") for seed in range(9)}
    assert len(seeds) == 18
    assert all(torch.Generator().manual_seed(seed) for seed in seeds)  # none is too large


def test_trained_parameters_of_a_frozen_backbone() -> None:
    classifier = make_classifier()
    frozen = FrozenBackbone(classifier)
    head = classifier.classifier_head
    assert_equal([id(p) for p in trained([classifier, frozen])], [id(p) for p in head.parameters()])
