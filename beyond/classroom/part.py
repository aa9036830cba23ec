"""What the checker examines: parts of the assignment, and the mistakes that are known of each.

A part is examined by observing it: it is run on fixed inputs, the probes, and what comes out is
kept under a name. The same probes are run on this project's own part and on wrong variants of it.
A student's part that gives the values of a variant has that variant's mistake.
"""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
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
    is_note: bool = False  # the course's own checks accept it: `ok` with a remark, no points lost


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
    text: str = ""  # begins with the mistake's name; for "ok" empty, or the remark of a note
    mistake: str | None = None  # the entry's name


class AdaptError(ValueError):
    """A student's part lacks the interface that the checker needs; the message says what."""


def examine(part: Part, student: Student) -> Finding:
    """Run one part of a student's folder on the probes, and name what is wrong with it.

    Nothing is raised for what the student's code does, except KeyboardInterrupt.
    """
    try:
        with student.names():
            found = observe_seeded(part, part.adapt(student))
    except NotImplementedError as error:
        if "not implemented for '" not in str(error):  # PyTorch: an operation lacks a dtype
            return Finding(part.name, "todo", _place(error, student.folder) + "not written yet")
        return Finding(part.name, "error", _describe(error, student.folder))
    except (Exception, SystemExit) as error:
        return Finding(part.name, "error", _describe(error, student.folder))
    return judge(part, found)


def judge(part: Part, found: Observations) -> Finding:
    """Compare what was observed with our own part and with each variant."""
    size, probe, place = difference(found, expected_of(part))
    if size <= 1:
        return Finding(part.name, "ok")
    variants = variants_of(part)
    for variant, outcome in variants:
        if difference(found, outcome)[0] <= 1:
            mistake = variant.mistake
            text = f"{mistake.name} ({mistake.where}): {mistake.why}"
            status: Status = "mistake"
            if mistake.is_edition or mistake.is_note:
                status = "edition" if mistake.is_edition else "ok"
            return Finding(part.name, status, text, mistake.name)
    text = f"wrong in a way that is not in the catalogue: {place}"
    if variants:
        ranked = [(*_disagreement(found, outcome), i) for i, (_, outcome) in enumerate(variants)]
        probes, _, closest = min(ranked)
        if probes < len(found):
            name = variants[closest][0].mistake.name
            agreeing = len(found) - probes
            text += f"; closest: {name} (same in {agreeing} of {len(found)} probes)"
    return Finding(part.name, "unknown", text)


def observe_seeded(part: Part, subject: Subject) -> Observations:
    """Run the probes of a part with fixed random numbers; PyTorch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return part.observe(subject)


@cache
def expected_of(part: Part) -> Observations:
    """Run the probes on our own part; once in a process."""
    return observe_seeded(part, part.ours)


@cache
def variants_of(part: Part) -> tuple[tuple[Variant, Observations], ...]:
    """Run the probes on every variant; once in a process."""
    return tuple((variant, observe_seeded(part, variant.subject)) for variant in part.variants)


def difference(found: Observations, expected: Observations) -> tuple[float, str, str]:
    """Compare two outcomes of the same probes.

    Returns:
        The largest difference in tolerances (0 to inf; up to 1 they are the same), the name of the
        probe where it is, and a description of the place and both values there.
    """
    largest = (0.0, "", "")
    for probe in expected:
        size, place = _compare(found[probe].value, expected[probe], probe)
        if size > largest[0]:
            largest = (size, probe, place)
    return largest


def _compare(found: Tensor, expected: Observed, probe: str) -> tuple[float, str]:
    """Return the largest difference of one probe, in tolerances, and its description."""
    if found.shape != expected.value.shape:
        shapes = f"found {tuple(found.shape)}, expected {tuple(expected.value.shape)}"
        return float("inf"), f"{probe} has another shape: {shapes}"
    left, right = found.double().flatten(), expected.value.double().flatten()
    same = (left == right) | (left.isnan() & right.isnan())
    # A difference with NaN in it is NaN, and counts as infinite.
    sizes = torch.where(same, 0.0, (left - right).abs() / expected.tolerance).nan_to_num(
        nan=float("inf"), posinf=float("inf")
    )
    if not len(sizes):
        return 0.0, ""
    worst = int(sizes.argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), found.shape)]
    place = f"{probe}{index if index else ''}"
    values = f"found {left[worst]:.6g}, expected {right[worst]:.6g}"
    return float(sizes[worst]), f"{place}: {values}"


def _disagreement(found: Observations, expected: Observations) -> tuple[int, float]:
    """Return the number of probes that differ, and the largest difference."""
    sizes = [_compare(found[probe].value, expected[probe], probe)[0] for probe in expected]
    return sum(size > 1 for size in sizes), max(sizes)


def expect_tensor(value: object, what: str) -> Tensor:
    """Return a copy of a tensor that a student's part returned, without its graph.

    Raises:
        NotImplementedError: it is None or Ellipsis, as of a body that has not been written.
        AdaptError: it is something else.
    """
    if value is None or value is ...:
        raise NotImplementedError(f"{what} is {value}")
    if not isinstance(value, Tensor):
        raise AdaptError(f"expected {what} to be a tensor, found {type(value).__name__}")
    return value.detach().clone()


def _describe(error: BaseException, folder: Path) -> str:
    """Write an exception as one line, with the place in the student's folder where it is known."""
    message = " ".join(str(error).split())[:300]
    if isinstance(error, SyntaxError):  # the message repeats the place
        message = str(error.msg)
    if isinstance(error, AdaptError):
        return message
    name = type(error).__name__
    return f"{_place(error, folder)}{name}: {message}" if message else _place(error, folder) + name


def _place(error: BaseException, folder: Path) -> str:
    """Return "file:line: " of the innermost line in the student's folder, or nothing."""
    root = folder.resolve()
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno))
    for filename, line in reversed(frames):
        path = Path(filename).resolve()
        if path.is_relative_to(root):
            return f"{path.relative_to(root)}:{line}: "
    return ""
