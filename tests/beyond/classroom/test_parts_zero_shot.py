"""`LlamaZeroShotClassifier` of the catalogue: right solutions in all styles are `ok`."""

from pathlib import Path

import pytest

from beyond.classroom.part import difference, expected_of, observe_seeded
from beyond.classroom.parts.zero_shot import PART, Steps, make_with
from tests.beyond.classroom.styles import examine_with

FORWARD = "logits, _ = self.llama(input_ids)"
LOG = "log_probabilities = F.log_softmax(logits, dim=-1)"
TOTAL = "scores[:, i] = torch.sum(log_probabilities[:, 0, ids], axis=-1)"
FROZEN = (
    "for param in self.llama.parameters():\n            param.requires_grad = False\n        assert"
)
ALL = f"{FORWARD}\n        {LOG}\n"
STYLES = {
    "all columns": (FORWARD, "logits = self.llama(input_ids, input_ids)[0][:, -1:]"),
    "logarithm of a softmax": (LOG, "log_probabilities = torch.log(logits.softmax(dim=2))"),
    "logsumexp": (LOG, "log_probabilities = logits - logits.logsumexp(-1, keepdim=True)"),
    "a loop over tokens": (
        TOTAL,
        "for j in ids:\n                scores[:, i] += log_probabilities[:, -1, j]",
    ),
    "no_grad": (ALL, f"with torch.no_grad():\n            {FORWARD}\n        {LOG}\n"),
    "frozen at once": (FROZEN, "self.llama.requires_grad_(False).eval()\n        assert"),
    "a mask handed to the model": (FORWARD, "logits, _ = self.llama(input_ids, mask=input_ids)"),
    "pads looked for under a wrong number": (
        f"{FORWARD}\n",
        "last = (input_ids != 0).sum(dim=1) - 1\n"
        "        logits = self.llama(input_ids, input_ids)[0]\n"
        "        logits = logits[torch.arange(len(logits)), last][:, None]\n",
    ),
}


@pytest.mark.parametrize("name", STYLES)
def test_a_right_solution_is_ok_in_every_style(name: str, tmp_path: Path) -> None:
    finding = examine_with(PART, tmp_path, "classifier.py", *STYLES[name])
    assert (finding.status, finding.text) == ("ok", "")


def test_a_broken_model_is_not_blamed_on_the_classifier(tmp_path: Path) -> None:
    old = "return F.silu(self.w1(x)) * self.w3(x)"
    finding = examine_with(PART, tmp_path, "llama.py", old, "raise RuntimeError")
    assert finding.status == "ok"


def test_what_is_not_written_is_todo(tmp_path: Path) -> None:
    finding = examine_with(PART, tmp_path, "classifier.py", FORWARD, "raise NotImplementedError")
    assert finding.status == "todo"


def test_the_steps_of_the_variants_are_right_as_they_stand() -> None:
    outcome = observe_seeded(PART, make_with(Steps))
    assert difference(outcome, expected_of(PART))[0] <= 1
