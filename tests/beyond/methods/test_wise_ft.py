"""WiSE-FT against its equation, and its two ends."""

import shutil
from pathlib import Path

import pytest
import torch

from beyond.methods.averaging import MovingAverage
from beyond.methods.method import Method
from beyond.methods.weights import trained
from beyond.methods.wise_ft import WiseFt
from llama import load_pretrained
from run_llama import classification_loss, main
from tests.beyond.methods.helpers import (
    add_ingredient,
    finetune_and_load,
    load_weights,
    make_classifier,
    train_steps,
    weights_of,
)
from tests.beyond.runs import FINETUNE, assert_equal, interrupt, run


def test_kept_weights_match_the_equation() -> None:
    """(1 - alpha) theta_0 + alpha theta_1, in float64; then theta_1 again."""
    classifier = make_classifier()
    pretrained = weights_of(classifier)
    method = Method(classifier, classification_loss, [WiseFt(classifier, 0.3)])
    train_steps(method)
    fine_tuned = weights_of(classifier)
    with method.kept_weights():
        mixed = weights_of(classifier)
    for name, weight in mixed.items():
        expected = 0.7 * pretrained[name].double() + 0.3 * fine_tuned[name].double()
        torch.testing.assert_close(weight.double(), expected, atol=1e-6, rtol=1e-6)
        assert not torch.equal(weight, fine_tuned[name])
    assert_equal(weights_of(classifier), fine_tuned)


def test_averages_are_mixed() -> None:
    """With a moving average before it, theta_1 is the average."""
    classifier = make_classifier()
    pretrained = weights_of(classifier)
    average = MovingAverage(trained([classifier]), 0.5)
    method = Method(classifier, classification_loss, [average, WiseFt(classifier, 0.3)])
    train_steps(method)
    fine_tuned = weights_of(classifier)
    with average.kept_weights():
        averages = weights_of(classifier)
    with method.kept_weights():
        mixed = weights_of(classifier)
    for name, weight in mixed.items():
        expected = 0.7 * pretrained[name] + 0.3 * averages[name]
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-6)
    assert_equal(weights_of(classifier), fine_tuned)


def test_alpha_one_is_plain_fine_tuning_bit_for_bit(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = finetune_and_load(FINETUNE)
    add_ingredient(monkeypatch, lambda classifier: WiseFt(classifier, 1.0))
    assert_equal(finetune_and_load(FINETUNE), plain)


def test_alpha_zero_keeps_the_pretrained_weights_bit_for_bit(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained = load_pretrained("stories42M.pt").state_dict()
    add_ingredient(monkeypatch, lambda classifier: WiseFt(classifier, 0.0))
    weights = finetune_and_load(FINETUNE)
    for name, weight in pretrained.items():
        assert torch.equal(weights[f"llama.{name}"], weight), name


@pytest.mark.parametrize("steps", [2, 8])
def test_a_resumed_run_mixes_in_the_pretrained_weights(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Not those that the training had reached when it was interrupted."""
    add_ingredient(monkeypatch, lambda classifier: WiseFt(classifier, 0.5))
    expected = finetune_and_load(FINETUNE)
    shutil.rmtree("out")
    assert interrupt(FINETUNE, steps) == 130
    assert main([*FINETUNE, "--resume"]) == 0
    assert_equal(load_weights(Path()), expected)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            ["--wise_ft", "0.5"],
            "--wise_ft 0.5: needs --head label_words, because it mixes with the zero-shot "
            "classifier",
        ),
        (
            ["--wise_ft", "0.5", "--lora_rank", "2", "--head", "label_words"],
            "--wise_ft and --lora_rank: LoRA freezes the weights that WiSE-FT would mix; leave "
            "one out",
        ),
        (
            ["--wise_ft", "0.5", "--lora_rank", "2", "--recipe", "better"],
            "--wise_ft and --lora_rank: LoRA freezes the weights that WiSE-FT would mix; leave "
            "one out",
        ),
    ],
)
def test_bad_flags_are_one_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], flags: list[str], reason: str
) -> None:
    status, _, err = run([*FINETUNE, *flags], capsys)
    assert (status, err) == (2, f"run_llama.py: error: {reason}\n")
