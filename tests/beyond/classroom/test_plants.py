"""Planted mistakes are found under their own names, and nothing else is blamed.

In the suite each copy has one mistake in every part: each part is examined as if all others were
broken. The sweep has the copies in the course's dialect, and plants all mistakes one by one.
"""

from collections import Counter, defaultdict
from itertools import zip_longest
from pathlib import Path

import pytest

from beyond.classroom.part import Finding, Part, examine
from beyond.classroom.parts import PARTS
from beyond.classroom.student import Student
from tests.beyond.classroom.planting import MODEL, Plant, sources, write, write_planted
from tests.beyond.classroom.plants import PLANTS

MODEL_PARTS = tuple(part for part in PARTS if part.name in MODEL)


def findings(folder: Path, parts: tuple[Part, ...] = MODEL_PARTS) -> dict[str, Finding]:
    student = Student(folder)
    return {part.name: examine(part, student) for part in parts}


def choose() -> list[Plant]:
    """Choose one plant of each entry, about as many of both dialects in each part."""
    by_entry = defaultdict(list)
    for plant in PLANTS:
        by_entry[plant.part, plant.entry].append(plant)
    chosen: list[Plant] = []
    for plants in sorted(by_entry.values(), key=lambda plants: len({p.dialect for p in plants})):
        counts = Counter(plant.dialect for plant in chosen if plant.part == plants[0].part)
        chosen.append(min(plants, key=lambda plant: counts[plant.dialect]))
    return chosen


def rounds(dialect: str) -> list[tuple[Plant, ...]]:
    """Take one chosen plant of each part at a time, until all have been taken."""
    by_part = defaultdict(list)
    for plant in choose():
        if plant.dialect == dialect:
            by_part[plant.part].append(plant)
    return [
        tuple(plant for plant in plants if plant is not None)
        for plants in zip_longest(*by_part.values())
    ]


@pytest.mark.parametrize("dialect", ["ours", "course"])
def test_an_implementation_without_mistakes_is_ok(dialect: str, tmp_path: Path) -> None:
    found = findings(write(tmp_path, sources(dialect)))
    assert {name: finding.text for name, finding in found.items()} == dict.fromkeys(MODEL, "")
    assert {finding.status for finding in found.values()} == {"ok"}


@pytest.mark.parametrize(
    "plants",
    [*rounds("ours"), *(pytest.param(p, marks=pytest.mark.sweep) for p in rounds("course"))],
    ids=lambda plants: f"{plants[0].dialect}-{len(plants)}-{plants[0].entry}",
)
def test_one_planted_mistake_in_each_part_is_found(
    plants: tuple[Plant, ...], tmp_path: Path
) -> None:
    found = findings(write_planted(tmp_path, *plants))
    expected = dict.fromkeys(MODEL) | {plant.part: plant.entry for plant in plants}
    assert {name: finding.mistake for name, finding in found.items()} == expected
    unplanted = MODEL - {plant.part for plant in plants}
    assert {found[name].status for name in unplanted} <= {"ok"}


@pytest.mark.sweep
@pytest.mark.parametrize("plant", PLANTS, ids=str)
def test_a_planted_mistake_is_found_and_no_other_part_is_blamed(
    plant: Plant, tmp_path: Path
) -> None:
    found = findings(write_planted(tmp_path, plant))
    assert found.pop(plant.part).mistake == plant.entry
    assert {finding.status for finding in found.values()} == {"ok"}


def test_every_entry_is_planted() -> None:
    entries = {(part.name, v.mistake.name) for part in MODEL_PARTS for v in part.variants}
    assert {(plant.part, plant.entry) for plant in PLANTS} == entries
