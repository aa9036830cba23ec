"""Mistakes planted in the training's parts are found under their own names; no other is blamed."""

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
