"""What the checker examines: parts of the assignment, and the mistakes that are known of each.

A part is examined by observing it: it is run on fixed inputs, the probes, and what comes out is
kept under a name. The same probes are run on this project's own part and on wrong variants of it.
A student's part that gives the values of a variant has that variant's mistake.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from beyond.classroom.student import Student

Subject = Any  # an implementation of a part, with the interface that the part's probes use


class Observed(NamedTuple):
    """The outcome of one probe."""

    value: Tensor
    tolerance: float  # two values are the same if no element differs by more than this


Observations = Mapping[str, Observed]  # by the name of the probe


@dataclass(frozen=True)
class Mistake:
    """An entry of the catalogue."""

    name: str  # a few words, such as "rotates halves instead of pairs"
    where: str  # the file and the function
    why: str  # what it does, why it matters and how it is put right; one to three sentences
    seen: str = ""  # where it was seen; empty: thought of
    is_edition: bool = False  # right in another edition of the course, so not a mistake


@dataclass(frozen=True)
class Variant:
    """A mistake, and an implementation that makes it."""

    mistake: Mistake
    subject: Subject


@dataclass(frozen=True)
class Part:
    """A part of the assignment."""

    name: str  # as the report names it
    where: str  # the file and the function that a student writes
    ours: Subject
    variants: tuple[Variant, ...]
    observe: Callable[[Subject], Observations]
    adapt: Callable[[Student], Subject]  # the student's part, with what it calls replaced by ours


Status = Literal["ok", "todo", "mistake", "edition", "unknown", "error"]


@dataclass(frozen=True)
class Finding:
    """What was found of one part."""

    part: str
    status: Status
    text: str = ""  # for all but "ok"; begins with the mistake's name
    mistake: str | None = None  # the entry's name


def difference(found: Observations, expected: Observations) -> tuple[float, str, str]:
    """Compare two outcomes of the same probes.

    Returns:
        The largest difference in tolerances (0 to inf; up to 1 they are the same), the name of the
        probe where it is, and a description of the place and both values there.
    """
    raise NotImplementedError
