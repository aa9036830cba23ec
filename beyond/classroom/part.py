"""What the checker examines: parts of the assignment, and the mistakes that are known of each.

A part is examined by observing it: it is run on fixed inputs, the probes, and what comes out is
kept under a name. The same probes are run on this project's own part and on wrong variants of it.
A student's part that gives the values of a variant has that variant's mistake.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from beyond.classroom.student import Student, StudentError

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
    others: tuple[Subject, ...] = ()  # that make the same mistake in other ways


@dataclass(frozen=True)
class Part:
    """A part of the assignment."""

    name: str  # as the report names it
    where: str  # the file and the function that a student writes
    ours: Subject
    variants: tuple[Variant, ...]
    observe: Callable[[Subject], Observations]
    adapt: Callable[[Student], Subject]  # the student's part, with what it calls replaced by ours
    combine: Callable[..., Subject] | None = None  # makes a variant of the changes of two


Status = Literal["ok", "todo", "mistake", "edition", "unknown", "error"]


@dataclass(frozen=True)
class Finding:
    """What was found of one part."""

    part: str
    status: Status
    text: str = ""  # begins with the mistake's name; for "ok" empty, or the remark of a note
    mistake: str | None = None  # the entry's name


class AdaptError(StudentError):
    """A student's part lacks the interface that the checker needs; the message says what."""


def examine(part: Part, student: Student) -> Finding:
    """Run one part of a student's folder on the probes, and name what is wrong with it.

    Nothing is raised for what the student's code does, except KeyboardInterrupt.
    """
    try:
        with student.names():
            found = observe_seeded(part, part.adapt(student))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        text = student.describe(error)
        # PyTorch raises the same error where an operation lacks a dtype.
        if isinstance(error, NotImplementedError) and "not implemented for '" not in text:
            place = text.partition("NotImplementedError")[0].removesuffix(": ")
            return Finding(part.name, "todo", f"not written yet: {place or part.where}")
        return Finding(part.name, "error", text)
    return judge(part, found)


def judge(part: Part, found: Observations) -> Finding:
    """Compare what was observed with our own part, with each variant, and with pairs of them."""
    ours = expected_of(part)
    if not disagreement(found, ours):
        return Finding(part.name, "ok")
    variants = variants_of(part)
    for mistake, outcome in variants:
        if agrees(found, outcome):
            return _finding(part, (mistake,))
    pair = _find_separate(part, found) or _find_combination(part, found)
    if pair:
        return _finding(part, pair)
    text = f"wrong in a way that is not in the catalogue: {difference(found, ours)[2]}"
    return Finding(part.name, "unknown", text + _closest(part, found))


def _closest(part: Part, found: Observations) -> str:
    """Name the entry that is like what was found in most of the probes that tell them from ours.

    Only an entry that is the same in more than half of them is named, and none if a shape is wrong.
    """
    ours = expected_of(part)
    differing = disagreement(found, ours)
    if any(found[probe].value.shape != ours[probe].value.shape for probe in differing):
        return ""
    best = (0.5, 0, "")
    for mistake, outcome in variants_of(part):
        telling = differing | disagreement(outcome, ours)
        same = telling - disagreement(found, outcome)
        if len(same) / len(telling) > best[0]:
            best = (len(same) / len(telling), len(telling), mistake.name)
    share, number, name = best
    if not name:
        return ""
    return f"; closest: {name} (the same in {round(share * number)} of {number} probes that differ)"


def _find_separate(part: Part, found: Observations) -> tuple[Mistake, ...]:
    """Find two or three mistakes that show in different probes and explain all that differs."""
    ours = expected_of(part)
    differing = disagreement(found, ours)
    matching = [
        (changed, mistake)
        for mistake, outcome in variants_of(part)
        if not (changed := disagreement(outcome, ours)) & disagreement(found, outcome)
    ]
    for number in (2, 3):
        for chosen in combinations(matching, number):
            probes = [probe for changed, _ in chosen for probe in changed]
            if len(probes) == len(set(probes)) and set(probes) == differing:
                return tuple(mistake for _, mistake in chosen)
    return ()


def _find_combination(part: Part, found: Observations) -> tuple[Mistake, Mistake] | None:
    """Find two mistakes of different steps that together give what was observed.

    A pair is tried only if each probe that one of the two changes alone shows its values, but for
    one where the other may have an effect too, and each that neither changes shows ours.
    """
    if part.combine is None:
        return None
    ours = expected_of(part)
    subjects = [s for variant in part.variants for s in (variant.subject, *variant.others)]
    known = [
        (mistake, subject.changes, disagreement(outcome, ours), disagreement(found, outcome))
        for subject, (mistake, outcome) in zip(subjects, variants_of(part), strict=True)
        if hasattr(subject, "changes")
    ]
    differing = disagreement(found, ours)
    for (mistake, changes, first, unlike), (other, more, second, unlike_other) in combinations(
        known, 2
    ):
        is_possible = (
            differing <= first | second
            and len((first - second) & unlike) <= 1
            and len((second - first) & unlike_other) <= 1
        )
        if changes.keys() & more.keys() or not is_possible:
            continue
        try:
            outcome = observe_seeded(part, part.combine(**changes, **more))
        except Exception:
            continue  # the two do not go together
        if agrees(found, outcome):
            return mistake, other
    return None


def _finding(part: Part, mistakes: tuple[Mistake, ...]) -> Finding:
    """Report entries of the catalogue: mistakes first, then editions, then remarks."""
    mistakes = tuple(sorted(mistakes, key=lambda mistake: (mistake.is_note, mistake.is_edition)))
    text = " Also: ".join(
        f"{mistake.name} ({mistake.where}): {mistake.why}" for mistake in mistakes
    )
    status: Status = "mistake"
    if mistakes[0].is_edition or mistakes[0].is_note:
        status = "edition" if mistakes[0].is_edition else "ok"
    return Finding(part.name, status, text, mistakes[0].name)


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
def variants_of(part: Part) -> tuple[tuple[Mistake, Observations], ...]:
    """Run the probes on every variant; once in a process. A mistake may have several."""
    return tuple(
        (variant.mistake, observe_seeded(part, subject))
        for variant in part.variants
        for subject in (variant.subject, *variant.others)
    )


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
    if found.shape != expected.value.shape and found.shape == (0,):
        return float("inf"), f"{probe}: an error, or a wrong shape"
    if found.shape != expected.value.shape:
        shapes = f"found {tuple(found.shape)}, expected {tuple(expected.value.shape)}"
        return float("inf"), f"{probe} has another shape: {shapes}"
    if torch.equal(found, expected.value):
        return 0.0, ""
    left, right = found.double().flatten(), expected.value.double().flatten()
    same = (left == right) | (left.isnan() & right.isnan())
    # A difference with NaN in it is NaN, and counts as infinite.
    sizes = torch.where(same, 0.0, (left - right).abs() / expected.tolerance).nan_to_num(
        nan=float("inf"), posinf=float("inf")
    )
    if not len(sizes):
        return 0.0, ""
    worst = int(sizes.argmax())
    index = [int(i) for i in np.unravel_index(worst, found.shape)]  # PyTorch's imports SymPy
    place = f"{probe}{index if index else ''}"
    values = f"found {left[worst]:.6g}, expected {right[worst]:.6g}"
    return float(sizes[worst]), f"{place}: {values}"


def disagreement(found: Observations, expected: Observations) -> frozenset[str]:
    """Return the names of the probes that differ."""
    return frozenset(
        probe for probe in expected if _compare(found[probe].value, expected[probe], probe)[0] > 1
    )


def agrees(found: Observations, expected: Observations) -> bool:
    """Say whether all probes are the same."""
    return all(_compare(found[probe].value, expected[probe], probe)[0] <= 1 for probe in expected)


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
