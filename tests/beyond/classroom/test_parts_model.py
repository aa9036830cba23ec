"""The model's parts: every entry of the catalogue is found, and told from every other."""

from itertools import combinations

import pytest

from beyond.classroom.part import Part, difference, expected_of, judge, variants_of
from beyond.classroom.parts import PARTS

parts = pytest.mark.parametrize("part", PARTS, ids=[part.name for part in PARTS])


@parts
def test_every_two_entries_differ_by_100_tolerances(part: Part) -> None:
    outcomes = [("ours", expected_of(part))]
    outcomes += [(mistake.name, outcome) for mistake, outcome in variants_of(part)]
    close = {
        (name, other): difference(left, right)[0]
        for (name, left), (other, right) in combinations(outcomes, 2)
        if name != other
    }
    assert {pair: size for pair, size in close.items() if size < 100} == {}


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
