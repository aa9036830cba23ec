"""The model's parts: every entry of the catalogue is found, and told from every other."""

from itertools import combinations
from typing import Any

import pytest

from beyond.classroom.part import (
    Observations,
    Part,
    difference,
    expected_of,
    judge,
    observe_seeded,
    variants_of,
)
from beyond.classroom.parts import PARTS

parts = pytest.mark.parametrize("part", PARTS, ids=[part.name for part in PARTS])


@pytest.mark.sweep
@parts
def test_every_two_entries_differ_by_100_tolerances(part: Part) -> None:
    outcomes = [("ours", expected_of(part))]
    outcomes += [(mistake.name, outcome) for mistake, outcome in variants_of(part)]
    close = [
        (name, other)
        for (name, left), (other, right) in combinations(outcomes, 2)
        if name != other and not is_far(left, right)
    ]
    assert close == []


def is_far(left: Observations, right: Observations) -> bool:
    """Say whether a probe differs by 100 tolerances; stops at the first."""
    return any(difference(left, {probe: right[probe]})[0] >= 100 for probe in right)


@pytest.mark.sweep
@parts
def test_every_entry_is_found_under_its_own_name(part: Part) -> None:
    for mistake, outcome in variants_of(part):
        finding = judge(part, outcome)
        assert finding.mistake == mistake.name
        status = "edition" if mistake.is_edition else "ok" if mistake.is_note else "mistake"
        assert finding.status == status
        assert finding.text.startswith(mistake.name)
    assert judge(part, expected_of(part)).status == "ok"


@parts
def test_names_are_unique_and_texts_complete(part: Part) -> None:
    mistakes = [variant.mistake for variant in part.variants]
    assert len({mistake.name for mistake in mistakes}) == len(mistakes) >= 5
    assert all(mistake.why.endswith(".") and mistake.where for mistake in mistakes)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("rope", "rotates halves instead of pairs", "positions start at 1"),
        ("rope", "rotates by minus theta", "key not rotated"),
        ("RMSNorm", "mean over the whole tensor", "no gain"),
        ("layer", "no norm before the feed-forward network", "no residual connection around the"),
        *(
            pytest.param(*row, marks=pytest.mark.sweep)
            for row in (
                ("RMSNorm", "sum instead of mean", "eps outside the root"),
                ("attention scores", "scores not scaled", "causal mask"),
                ("attention scores", "softmax over the queries", "scores divided by dim"),
                ("attention", "RoPE without effect", "no output projection"),
                ("Llama.forward", "only the first layer", "final norm left out"),
            )
        ),
    ],
)
def test_two_mistakes_at_once_are_both_named(name: str, first: str, second: str) -> None:
    part = next(part for part in PARTS if part.name == name)
    assert part.combine is not None
    changes: dict[str, dict[str, Any]] = {}
    for variant in part.variants:
        if variant.mistake.name.startswith((first, second)):
            changes |= {variant.mistake.name: variant.subject.changes}
    one, other = list(changes.values())[:2]
    finding = judge(part, observe_seeded(part, part.combine(**one, **other)))
    assert finding.status == "mistake"
    assert first in finding.text and second in finding.text


def test_what_is_not_in_the_catalogue_is_unknown_with_the_place() -> None:
    part = next(part for part in PARTS if part.name == "RMSNorm")
    outcome = dict(expected_of(part))
    gain = outcome["output with a gain"]
    outcome["output with a gain"] = gain._replace(value=gain.value + 1)
    finding = judge(part, outcome)
    assert finding.status == "unknown" and finding.mistake is None
    assert "output with a gain[" in finding.text and "found" in finding.text
    assert "closest" not in finding.text  # no entry has the same value where it differs from ours


def test_the_closest_entry_is_the_same_in_most_probes_that_differ() -> None:
    part = next(part for part in PARTS if part.name == "RMSNorm")
    outcome = dict(
        next(found for mistake, found in variants_of(part) if mistake.name.startswith("sum"))
    )
    gain = outcome["output with a gain"]
    outcome["output with a gain"] = gain._replace(value=gain.value + 1)
    finding = judge(part, outcome)
    assert finding.text.endswith(
        "; closest: sum instead of mean (the same in 5 of 6 probes that differ)"
    )
    outcome["output with a gain"] = gain._replace(value=gain.value[0])
    assert "closest" not in judge(part, outcome).text
