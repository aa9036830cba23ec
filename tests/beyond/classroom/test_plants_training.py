"""Mistakes planted in the training's parts are found under their own names; no other is blamed.

In the suite each copy has one mistake in every part: each part is examined as if all others were
broken. The sweep has the copies in the course's dialect, and plants all mistakes one by one.
"""

from collections import defaultdict
from itertools import zip_longest
from pathlib import Path

import pytest

from beyond.classroom.part import examine
from beyond.classroom.parts import PARTS
from beyond.classroom.student import Student
from tests.beyond.classroom.planting import Plant, sources, write, write_planted
from tests.beyond.classroom.plants_training import PLANTS

TRAINING = ("generate", "AdamW", "zero-shot scores", "embedding classifier", "loading")
# The parts that a file of either dialect can change; the model's parts have tests of their own.
AFFECTED = {
    "llama.py": {"Llama.forward", "generate", "loading"},
    "base_llama.py": {"generate", "loading"},
    "optimizer.py": {"AdamW"},
    "classifier.py": {"zero-shot scores", "embedding classifier"},
}
# The course's own loader, which the course-style copies have too.
REMARK = ("course", "loading", "the Hub's names are not known")

# Running all its mistakes takes 6 s in each process; test_parts_generate.py has some of them.
SLOW = "generate"


def findings(folder: Path, dialect: str, names: set[str]) -> dict[str, str]:
    """Return the entry, or the text, of each part but those that are `ok` as expected."""
    student = Student(folder)
    found = {}
    for part in PARTS:
        if part.name in names:
            finding = examine(part, student)
            remark = (dialect, part.name, finding.mistake)
            if finding.status != "ok" or remark != REMARK and finding.text:
                found[part.name] = finding.mistake or finding.text
    return found


@pytest.mark.parametrize("dialect", ["ours", "course"])
def test_an_implementation_without_mistakes_is_ok(dialect: str, tmp_path: Path) -> None:
    write(tmp_path, sources(dialect))
    assert findings(tmp_path, dialect, set(TRAINING)) == {}


def rounds() -> list[tuple[Plant, ...]]:
    """Take the first plant of each entry; one of each part at a time, until all have been taken."""
    first: dict[tuple[str, str], Plant] = {}
    for plant in PLANTS:
        first.setdefault((plant.part, plant.entry), plant)
    by_part: dict[str, dict[str, list[Plant]]] = defaultdict(lambda: defaultdict(list))
    for plant in first.values():
        if plant.part != SLOW:
            by_part[plant.dialect][plant.part].append(plant)
    return [
        tuple(plant for plant in plants if plant is not None)
        for parts in by_part.values()
        for plants in zip_longest(*parts.values())
    ]


@pytest.mark.parametrize(
    "plants",
    [
        pytest.param(p, marks=pytest.mark.sweep if p[0].dialect == "course" else ())
        for p in rounds()
    ],
    ids=lambda plants: f"{len(plants)}-{plants[0].entry}",
)
def test_one_planted_mistake_in_each_part_is_found(
    plants: tuple[Plant, ...], tmp_path: Path
) -> None:
    folder = write_planted(tmp_path, *plants)
    expected = {plant.part: plant.entry for plant in plants}
    assert findings(folder, plants[0].dialect, set(expected)) == expected


@pytest.mark.sweep
@pytest.mark.parametrize("plant", PLANTS, ids=str)
def test_a_planted_mistake_is_found_and_no_other_part_is_blamed(
    plant: Plant, tmp_path: Path
) -> None:
    folder = write_planted(tmp_path, plant)
    found = findings(folder, plant.dialect, AFFECTED[plant.file])
    assert found == {plant.part: plant.entry}


def test_every_entry_is_planted_in_a_copy_of_the_ground_floor_or_of_the_course_s() -> None:
    entries = {(p.name, v.mistake.name) for p in PARTS if p.name in TRAINING for v in p.variants}
    assert {(plant.part, plant.entry) for plant in PLANTS} == entries
