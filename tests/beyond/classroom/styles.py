"""Finished implementations with one piece of code written in another way."""

from pathlib import Path

from beyond.classroom.part import Finding, Part, examine
from beyond.classroom.student import Student
from tests.beyond.classroom.planting import sources, write


def examine_with(part: Part, folder: Path, file: str, old: str, new: str) -> Finding:
    """Examine a part of the course's implementation after one replacement."""
    files = sources("course")
    assert files[file].count(old) == 1, old
    files[file] = files[file].replace(old, new)
    return examine(part, Student(write(folder, files)))
