"""`LlamaEmbeddingClassifier` of the catalogue: right solutions in all styles are `ok`."""

from pathlib import Path

import pytest
import torch

from beyond.classroom.part import difference, examine, expected_of, observe_seeded
from beyond.classroom.parts.classifier import PART, describe_dropout, make_with
from beyond.classroom.parts.classifier_mistakes import Steps
from beyond.classroom.student import Student
from tests.beyond.classroom.planting import sources, write
from tests.beyond.classroom.styles import examine_with

RUN = "_, hidden_states = self.llama(input_ids)\n"
LAST = "final_hidden = hidden_states[:, -1, :]"
DROP = "final_hidden = self.dropout(final_hidden)"
HEAD = "logits = self.classifier_head(final_hidden)\n"
RESULT = "return F.log_softmax(logits, dim=-1)\n"
INDENT = "\n        "
STYLES = {
    "the second result": (RUN, "hidden_states = self.llama(input_ids)[1]\n"),
    "last column kept as an axis": (
        f"{LAST}{INDENT}{DROP}",
        "final_hidden = self.dropout(hidden_states[:, -1:]).squeeze(1)",
    ),
    "last column by its number": (
        LAST,
        "final_hidden = hidden_states[:, input_ids.shape[1] - 1]",
    ),
    "dropout before pooling": (LAST, f"hidden_states = self.dropout(hidden_states){INDENT}{LAST}"),
    "functional dropout": (
        DROP,
        "final_hidden = F.dropout(final_hidden, p=self.dropout.p, training=self.training)",
    ),
    "own dropout": (
        DROP,
        f"if self.training:{INDENT}    keep = 1 - self.dropout.p"
        f"{INDENT}    mask = torch.bernoulli(torch.full_like(final_hidden, keep))"
        f"{INDENT}    final_hidden = final_hidden * mask / keep",
    ),
    "head by hand": (
        HEAD,
        "logits = final_hidden @ self.classifier_head.weight.T + self.classifier_head.bias\n",
    ),
    "LogSoftmax": (RESULT, "return torch.nn.LogSoftmax(dim=1)(logits)\n"),
    "logarithm of a softmax": (RESULT, "return logits.softmax(-1).log()\n"),
    "a gradient in training only": (
        RUN,
        f"with torch.set_grad_enabled(self.training):{INDENT}    {RUN}",
    ),
    "a model that is run without gradient in evaluation": (
        RUN,
        f"if not self.training:{INDENT}    with torch.no_grad():"
        f"{INDENT}        _, hidden_states = self.llama(input_ids)"
        f"{INDENT}else:{INDENT}    {RUN}",
    ),
    "a mask handed to the model": (
        RUN,
        "_, hidden_states = self.llama(input_ids, attention_mask=input_ids != 3)\n",
    ),
    "an option in the model's config": (
        "self.dropout = ",
        "self.llama.config.use_causal_mask = False; self.dropout = ",
    ),
    "a head by another name": (
        f"{HEAD}        {RESULT}",
        "return F.log_softmax([m for m in self.children()][-1](final_hidden), dim=-1)\n",
    ),
}


@pytest.mark.parametrize("name", STYLES)
def test_a_right_solution_is_ok_in_every_style(name: str, tmp_path: Path) -> None:
    old, new = STYLES[name]
    if name == "dropout before pooling":
        old, new = f"{old}{INDENT}{DROP}", new
    finding = examine_with(PART, tmp_path, "classifier.py", old, new)
    assert (finding.status, finding.text) == ("ok", "")


@pytest.mark.parametrize("new", ["raise NotImplementedError", "return None"])
def test_what_is_not_written_is_todo(new: str, tmp_path: Path) -> None:
    assert examine_with(PART, tmp_path, "classifier.py", RESULT, f"{new}\n").status == "todo"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            RESULT,
            "return F.log_softmax(logits, dim=-1).argmax(-1)\n",
            "expected (batch, num_labels)",
        ),
        (RESULT, "return {'logits': logits}\n", "found dict"),
        (
            "self.dropout = ",
            "self.extra = torch.nn.Linear(3, 3)\n        self.dropout = ",
            "found 2",
        ),
        ("class LlamaEmbeddingClassifier", "class Other", "defines no LlamaEmbeddingClassifier"),
    ],
)
def test_what_cannot_be_examined_is_said(old: str, new: str, message: str, tmp_path: Path) -> None:
    finding = examine_with(PART, tmp_path, "classifier.py", old, new)
    assert finding.status == "error"
    assert message in finding.text


def test_a_classifier_may_make_a_tokenizer_whose_file_is_not_here(tmp_path: Path) -> None:
    files = sources("course")
    files["tokenizer.py"] = "class Tokenizer:\n    def __init__(self):\n        open('no.model')\n"
    text = files["classifier.py"]
    text = text.replace("self.dropout =", "self.pad = Tokenizer().pad_id; self.dropout =")
    files["classifier.py"] = f"from tokenizer import Tokenizer\n{text}"
    assert examine(PART, Student(write(tmp_path, files))).status == "ok"


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        pytest.param(
            f"{LAST}{INDENT}{DROP}",
            "final_hidden = hidden_states[:, 0]",
            ("first column", "no dropout"),
            marks=pytest.mark.sweep,
        ),
        pytest.param(
            f"{LAST}{INDENT}{DROP}{INDENT}{HEAD}        {RESULT}",
            f"final_hidden = hidden_states[:, -2]{INDENT}{DROP}{INDENT}{HEAD}"
            "        return F.log_softmax(logits, dim=0)\n",
            ("column before the last", "softmax over the batch"),
            marks=pytest.mark.sweep,
        ),
        (
            f"{RUN}        {LAST}{INDENT}{DROP}",
            f"hidden_states, _ = self.llama(input_ids){INDENT}{LAST}",
            ("logits of the vocabulary", "no dropout"),
        ),
    ],
)
def test_two_mistakes_are_both_named(
    old: str, new: str, names: tuple[str, str], tmp_path: Path
) -> None:
    finding = examine_with(PART, tmp_path, "classifier.py", old, new)
    assert finding.status == "mistake"
    assert names[0] in finding.text
    assert names[1] in finding.text


def test_the_steps_of_the_variants_are_right_as_they_stand() -> None:
    outcome = observe_seeded(PART, make_with(Steps))
    assert difference(outcome, expected_of(PART))[0] <= 1


def test_a_dropout_is_described() -> None:
    """Leads of 0.4 where the feature is dropped; else 0.4 + 2 / 0.7 with a dropout of 0.3."""
    is_dropped = torch.arange(1000) % 10 < 3
    right = describe_dropout(torch.where(is_dropped, 0.4, 0.4 + 2 / 0.7))
    assert [value.tolist() for value in right.values()] == [True, True, True, True, [0, 1, 0]]
    none = describe_dropout(torch.full((1000,), 2.4))
    assert [value.tolist() for value in none.values()] == [False, False, False, True, [1, 0, 0]]
