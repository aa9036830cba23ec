"""sanity_check.py: its recorded numbers are right, and a broken model fails it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import base_llama
import llama
import rope
import sanity_check
from llama import Llama, load_pretrained
from tests.conftest import make_llama, save_llama
from tests.oracle import hugging_face_forward


@pytest.mark.parametrize("causal", [False, True])
def test_recorded_numbers_are_those_of_hugging_face(causal: bool) -> None:
    model = sanity_check.fixture_model(causal).double()
    output = hugging_face_forward(model, torch.tensor(sanity_check.FIXTURE_TOKENS))
    logits, hidden = sanity_check.excerpt(*output)
    recorded_logits = torch.tensor(sanity_check.FIXTURE_LOGITS[causal], dtype=torch.float64)
    recorded_hidden = torch.tensor(sanity_check.FIXTURE_HIDDEN[causal], dtype=torch.float64)
    # recorded with seven decimals
    torch.testing.assert_close(logits, recorded_logits, atol=1e-7, rtol=0)
    torch.testing.assert_close(hidden, recorded_hidden, atol=2e-7, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_recorded_numbers_of_the_demo_are_those_of_hugging_face(causal: bool) -> None:
    model = load_pretrained(sanity_check.DEMO, causal).double()
    output = hugging_face_forward(model, torch.tensor(sanity_check.DEMO_TOKENS))
    logits, hidden = sanity_check.excerpt(*output)
    recorded_logits = torch.tensor(sanity_check.DEMO_LOGITS[causal], dtype=torch.float64)
    recorded_hidden = torch.tensor(sanity_check.DEMO_HIDDEN[causal], dtype=torch.float64)
    # recorded with six decimals
    torch.testing.assert_close(logits, recorded_logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(hidden, recorded_hidden, atol=1e-6, rtol=0)


def swapped_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Hugging Face's pairs (i, i + head_dim / 2) in the place of ours."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def always_causal(break_it: pytest.MonkeyPatch) -> None:
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    break_it.setattr(
        llama.F,
        "scaled_dot_product_attention",
        lambda *args, **options: attend(*args[:5], True, **options),  # the sixth is is_causal
    )


def swap_rope_pairs(break_it: pytest.MonkeyPatch) -> None:
    break_it.setattr(rope, "_rotate", swapped_pairs)


def wrong_eps(break_it: pytest.MonkeyPatch) -> None:
    shape = {**sanity_check.FIXTURE_SHAPE, "layer_norm_eps": 1e-6}
    break_it.setattr(sanity_check, "FIXTURE_SHAPE", shape)


def missing_weight(break_it: pytest.MonkeyPatch) -> None:
    weights = sanity_check.fixture_weights

    def without_one(model: Llama) -> dict[str, Tensor]:
        state_dict = weights(model)
        del state_dict["layers.1.attention.compute_key.weight"]
        return state_dict

    break_it.setattr(sanity_check, "fixture_weights", without_one)


def weight_left_random(break_it: pytest.MonkeyPatch) -> None:
    """What `load_state_dict(strict=False)` does silently when a file lacks a weight."""
    fixture = sanity_check.fixture_model

    def with_one_random(causal: bool) -> Llama:
        model = fixture(causal)
        torch.nn.init.normal_(
            model.get_parameter("layers.1.attention.compute_key.weight"), std=0.02
        )
        return model

    break_it.setattr(sanity_check, "fixture_model", with_one_random)


@pytest.mark.parametrize(
    "mistake", [always_causal, swap_rope_pairs, wrong_eps, missing_weight, weight_left_random]
)
def test_a_mistake_fails_the_check(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sanity_check.test_fixture()
    mistake(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        sanity_check.test_fixture()


def test_course_check_compares_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the course's two files: right numbers pass, a causal model's do not."""
    model = make_llama(causal=False, vocab_size=18000)
    save_llama(model, tmp_path / "stories42M.pt")
    monkeypatch.setattr(sanity_check, "CHECKPOINT", tmp_path / "stories42M.pt")
    monkeypatch.setattr(sanity_check, "EXPECTED", tmp_path / "sanity_check.data")
    with torch.inference_mode():
        logits, hidden = model(torch.tensor(sanity_check.COURSE_TOKENS))
    torch.save({"logits": logits, "hidden_states": hidden}, tmp_path / "sanity_check.data")
    sanity_check.test_course_values()

    def always_causally(path: Path, causal: bool | None = None) -> Llama:
        checkpoint = base_llama.read_checkpoint(path)
        broken = Llama(replace(base_llama.parse_config(checkpoint, path), causal=True))
        broken.load_state_dict(checkpoint["model"])
        return broken.eval()

    monkeypatch.setattr(sanity_check, "load_pretrained", always_causally)
    with pytest.raises(AssertionError):
        sanity_check.test_course_values()
