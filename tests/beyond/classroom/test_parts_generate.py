"""`generate` of the catalogue: right solutions in all styles, and the probes' own claims."""

import math
from pathlib import Path

import pytest
import torch

from beyond.classroom.part import difference, expected_of, observe_seeded, variants_of
from beyond.classroom.parts.generate import ALONE, FREQUENCY, PART, ROWS, Fixed, share
from beyond.classroom.parts.generate_mistakes import Steps, make_with
from llama import Llama
from tests.beyond.classroom.styles import examine_with

GREEDY = "idx_next = torch.argmax(logits, dim=-1, keepdim=True)"
PROBS = "probs = F.softmax(logits / temperature, dim=-1)"
SAMPLE = "idx_next = torch.multinomial(probs, num_samples=1)"
CONTEXT = "context = idx[:, -self.params.max_seq_len :]"
LOGITS = "logits, _ = self(context)\n"
LINE = "\n                "
SLOW = ("row by row", "max for the argmax", "argmax of probabilities")  # the last two: topk is one
STYLES = {
    "topk for the argmax": (GREEDY, "_, idx_next = torch.topk(logits, k=1, dim=-1)"),
    "max for the argmax": (GREEDY, "idx_next = logits.max(dim=1, keepdim=True)[1]"),
    "argmax of probabilities": (GREEDY, "idx_next = logits.softmax(-1).argmax(1).unsqueeze(1)"),
    "a tiny temperature for 0": (
        GREEDY,
        "idx_next = torch.multinomial((logits / 1e-8).softmax(-1), 1)",
    ),
    "exponentials": (
        PROBS,
        f"probs = torch.exp(logits / temperature){LINE}probs = probs / probs.sum(-1, keepdim=True)",
    ),
    "exponentials that do not sum to 1": (PROBS, "probs = torch.exp(logits / temperature)"),
    "in place": (PROBS, f"logits /= temperature{LINE}probs = logits.softmax(dim=1)"),
    "Categorical of logits": (
        SAMPLE,
        "idx_next = torch.distributions.Categorical(logits=logits / temperature).sample()[:, None]",
    ),
    "Categorical of probabilities": (
        SAMPLE,
        "idx_next = torch.distributions.Categorical(probs).sample().unsqueeze(-1)",
    ),
    "Gumbel": (
        SAMPLE,
        f"noise = -torch.log(-torch.log(torch.rand_like(logits))){LINE}"
        "idx_next = (logits / temperature + noise).argmax(dim=-1, keepdim=True)",
    ),
    "cumulative sums": (
        SAMPLE,
        f"uniform = torch.rand(len(probs), 1){LINE}"
        "idx_next = (probs.cumsum(-1) < uniform)[:, :-1].sum(-1, keepdim=True)",
    ),
    "row by row": (
        SAMPLE,
        "idx_next = torch.stack([torch.multinomial(row, 1) for row in probs])",
    ),
    "context cropped only when needed": (
        CONTEXT,
        "context = idx if idx.size(1) <= self.params.max_seq_len "
        "else idx[:, -self.params.max_seq_len:]",
    ),
    "forward by name, all columns": (
        LOGITS,
        "logits, _ = self.forward(context, targets=context)\n",
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.sweep if name in SLOW else ()) for name in STYLES],
)
def test_a_right_solution_is_ok_in_every_style(name: str, tmp_path: Path) -> None:
    finding = examine_with(PART, tmp_path, "llama.py", *STYLES[name])
    assert (finding.status, finding.text) == ("ok", "")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (GREEDY, "raise NotImplementedError"),
        (SAMPLE, "raise NotImplementedError()"),
        (GREEDY, "idx_next = None"),
        ("        return idx\n", ""),
    ],
)
def test_what_is_not_written_is_todo(old: str, new: str, tmp_path: Path) -> None:
    assert examine_with(PART, tmp_path, "llama.py", old, new).status == "todo"


@pytest.mark.sweep
def test_two_mistakes_are_both_named(tmp_path: Path) -> None:
    old = f"{CONTEXT}\n            {LOGITS}"
    new = "logits, _ = self(idx)\n            temperature = temperature and 1 / temperature\n"
    text = examine_with(PART, tmp_path, "llama.py", old, new).text
    assert "temperature multiplied" in text
    assert "not cropped" in text


END = "            idx = torch.cat((idx, idx_next), dim=1)\n        return idx\n"


@pytest.mark.sweep
def test_a_stop_before_eos_and_a_lost_context_are_both_named(tmp_path: Path) -> None:
    new = "            if (idx_next == 2).all():\n                break\n" + END.replace(
        "return idx", "return idx[:, -max_new_tokens:]"
    )
    text = examine_with(PART, tmp_path, "llama.py", END, new).text
    assert "stops early, at EOS" in text
    assert "only the new tokens are returned" in text


def test_an_error_of_another_kind_at_temperature_0_is_shown(tmp_path: Path) -> None:
    finding = examine_with(PART, tmp_path, "llama.py", GREEDY, "idx_next = logits.argmax(dim=7)")
    assert finding.status == "error"
    assert finding.text.startswith("llama.py:")
    assert "Dimension out of range" in finding.text


def test_a_cache_is_refused_and_not_called_a_mistake(tmp_path: Path) -> None:
    new = "logits, _ = self(context, None, torch.ones_like(context))\n"
    finding = examine_with(PART, tmp_path, "llama.py", LOGITS, new)
    assert finding.status == "error"
    assert "more than tokens" in finding.text


def test_the_steps_of_the_variants_are_right_as_they_stand() -> None:
    outcome = observe_seeded(PART, make_with(Steps))
    assert difference(outcome, expected_of(PART))[0] <= 1


def test_shares_are_far_from_the_limit_of_what_counts_as_drawn() -> None:
    """The bound for false alarms needs probabilities below 0.4 % or above 2.5 %."""
    outcomes = [expected_of(PART), *(outcome for _, outcome in variants_of(PART))]
    for outcome in outcomes:
        for name, observed in outcome.items():
            if name.startswith("frequencies at") and observed.value.min() >= 0:
                is_far = (observed.value < 0.006) | (observed.value > 0.02)
                assert is_far.all(), (name, observed.value)


@pytest.mark.parametrize(
    ("rows", "is_batch", "bound"),
    [(ROWS, True, 0.036), pytest.param(ALONE, False, 0.08, marks=pytest.mark.sweep)],
)
def test_frequencies_lie_within_the_stated_bound_of_the_softmax(
    rows: int, is_batch: bool, bound: float
) -> None:
    logits = torch.tensor([0.3, 1.0, 0.1])
    torch.manual_seed(3)
    for temperature in (0.5, 1.0, 3.0):
        tokens = Fixed(make_with(Llama), logits, 3).draw(temperature, rows, is_batch)
        expected = torch.softmax(logits.double() / temperature, dim=-1)
        assert (share(tokens, 3) - expected).abs().max() < bound
    assert 2 * math.exp(-2 * rows * bound**2) < 2e-11
    assert FREQUENCY == pytest.approx(0.036 + 0.08)


@pytest.mark.sweep
def test_sampling_is_examined_row_by_row_if_several_rows_fail(tmp_path: Path) -> None:
    old = f"{PROBS}\n                {SAMPLE}"
    new = (
        "probs = F.softmax(logits[0] * temperature, dim=-1)\n                "
        "idx_next = torch.multinomial(probs, num_samples=1)[None]"
    )
    finding = examine_with(PART, tmp_path, "llama.py", old, new)
    assert (finding.status, finding.mistake) == ("mistake", "temperature multiplied")
    assert " Also: works for one row only above temperature 0" in finding.text
