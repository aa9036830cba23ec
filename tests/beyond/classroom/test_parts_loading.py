"""`load_pretrained` of the catalogue: whose values the parameters have."""

from pathlib import Path

import pytest
import torch

from beyond.classroom.part import difference, expected_of, observe_seeded
from beyond.classroom.parts.loading import (
    FROM_FILE,
    PART,
    RANDOM,
    ROUNDED,
    WRONG,
    judge_parameter,
    load_like_the_course,
)
from beyond.classroom.report import show
from tests.beyond.classroom.styles import examine_with

READ = "contents = torch.load(checkpoint, map_location=device)"
MODEL = 'model = Llama(LlamaConfig(**contents["model_args"]))\n'
LOAD = "model.load_state_dict(weights, strict=False)"
HUB = "the Hub's names are not known"
RENAME = """\
names = {"wq": "compute_query", "wk": "compute_key", "wv": "compute_value", "wo": "compute_output"}
    for old, new in names.items():
        weights = {name.replace(f".{old}.", f".{new}."): w for name, w in weights.items()}
    """
STYLES = {
    "strict": (LOAD, "model.load_state_dict(weights)"),
    "renamed": (LOAD, RENAME + LOAD),
    "renamed and strict": (LOAD, RENAME + "model.load_state_dict(weights, strict=True)"),
    "assigned, then tied again": (
        LOAD,
        RENAME + "model.load_state_dict(weights, strict=False, assign=True)\n"
        "    model.tok_embeddings.weight = model.output.weight",
    ),
    "copied one by one": (
        LOAD,
        RENAME + "for name, p in model.named_parameters():\n        p.data.copy_(weights[name])",
    ),
    "refused aloud": (
        LOAD,
        f"missing = {LOAD}.missing_keys\n    if missing:\n        raise KeyError(missing)",
    ),
}


@pytest.mark.parametrize("name", STYLES)
def test_a_right_solution_is_ok_in_every_style(name: str, tmp_path: Path) -> None:
    finding = examine_with(PART, tmp_path, "llama.py", *STYLES[name])
    assert (finding.status, finding.text) == ("ok", "")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (READ, READ),
        (READ, READ.replace(")", ", weights_only=False)")),
        (MODEL, f"{MODEL}    model.eval()\n"),
    ],
)
def test_the_course_s_own_loader_is_ok_with_a_remark(old: str, new: str, tmp_path: Path) -> None:
    finding = examine_with(PART, tmp_path, "llama.py", old, new)
    assert (finding.status, finding.mistake) == ("ok", HUB)
    assert finding.text.startswith(f"{HUB} (llama.py): ")
    assert len(show(finding).split("\n")) == 1  # a right solution does not look faulted


def test_renamed_attributes_that_are_mapped_are_ok(tmp_path: Path) -> None:
    """A model with names of its own, whose loader knows them."""
    new = RENAME + (
        'model.add_module("head", model.output)\n    del model.output\n'
        '    weights["head.weight"] = weights.pop("output.weight")\n    '
    )
    finding = examine_with(PART, tmp_path, "llama.py", LOAD, new + LOAD)
    assert (finding.status, finding.text) == ("ok", "")


def test_a_remark_does_not_hide_a_mistake(tmp_path: Path) -> None:
    old = "        self.tok_embeddings.weight = self.output.weight\n"
    finding = examine_with(PART, tmp_path, "llama.py", old, "")
    assert (finding.status, finding.mistake) == ("mistake", "embeddings not tied")
    assert f" Also: {HUB}" in finding.text


@pytest.mark.parametrize("new", ["raise NotImplementedError", "return None"])
def test_what_is_not_written_is_todo(new: str, tmp_path: Path) -> None:
    assert examine_with(PART, tmp_path, "llama.py", READ, new).status == "todo"


def test_a_loader_that_returns_weights_is_said_to(tmp_path: Path) -> None:
    finding = examine_with(PART, tmp_path, "llama.py", READ, f"{READ}\n    return contents")
    assert finding.text == "load_pretrained returns dict, expected a model"


def test_the_loader_of_the_variants_is_the_course_s() -> None:
    variants = {variant.mistake.name: variant.subject for variant in PART.variants}
    outcome = observe_seeded(PART, load_like_the_course)
    assert difference(outcome, observe_seeded(PART, variants[HUB]))[0] == 0
    assert difference(outcome, expected_of(PART))[0] > 100


def test_codes_of_a_parameter() -> None:
    expected = torch.linspace(-1, 1, 6).view(2, 3)
    other, another = expected.flip(0), expected.flip(1)

    def code(first: torch.Tensor, second: torch.Tensor, name: str = "w1") -> float:
        return judge_parameter("w1", expected, {name: first}, {name: second})

    assert code(expected, expected) == FROM_FILE
    assert code(expected.bfloat16().float(), expected) == ROUNDED
    assert code(other, other) == WRONG
    assert code(other, another) == RANDOM
    assert code(expected, expected, name="gate") == FROM_FILE
    assert code(other, another, name="gate") == RANDOM
