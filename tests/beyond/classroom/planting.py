"""Mistakes planted in copies of two finished implementations: the ground floor, and the course's.

Each is one replacement in one file. The tests assert what the checker says of the copy.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.beyond.classroom import course, course_training
from tests.conftest import ROOT

GROUND_FLOOR = ("rope", "llama", "optimizer", "classifier", "base_llama", "tokenizer", "utils")

MODEL = {"rope", "RMSNorm", "attention scores", "attention", "SwiGLU", "layer", "Llama.forward"}


class Plant(NamedTuple):
    dialect: str  # "ours" or "course"
    part: str
    entry: str  # the name that the catalogue has
    file: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.dialect}: {self.part}: {self.entry}"


def sources(dialect: str) -> dict[str, str]:
    """Return the files of an implementation without mistakes."""
    if dialect == "course":
        return {**course.FILES, **course_training.FILES}
    names = (f"{name}.py" for name in (*GROUND_FLOOR, "config"))
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in names}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def write_planted(folder: Path, *plants: Plant) -> Path:
    """Write a copy with mistakes; what each replaces must be there exactly once."""
    files = sources(plants[0].dialect)
    for plant in plants:
        text = files[plant.file]
        assert text.count(plant.old) == 1, f"{plant}: {text.count(plant.old)} times"
        files[plant.file] = text.replace(plant.old, plant.new)
    return write(folder, files)


Row = tuple[str, str, str]  # entry, old, new


def rows(dialect: str, part: str, file: str, rows: tuple[Row, ...]) -> Iterator[Plant]:
    for entry, old, new in rows:
        yield Plant(dialect, part, entry, file, old, new)
