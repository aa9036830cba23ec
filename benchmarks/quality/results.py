"""The results: one line of a CSV file for each run that is complete."""

import csv
import io
import math
import subprocess
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.quality.runs import Run, parse_resolved
from utils import open_atomically

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Result:
    """One line of the file: which run it was, where it ran, and what came out."""

    date: str  # of its end, UTC
    commit: str  # of this repository, with + if files differed; a resumed run may have several
    machine: str  # the processor
    threads: int
    checkpoint: str
    checkpoint_hash: str
    data: str
    data_hash: str  # of label words, training and dev file
    test_hash: str  # of the test file; empty if it was left unread
    train_lines: str
    method: str
    flags: str
    seed: int
    dev: float  # accuracy of the best epoch, in [0, 1]
    test: float  # likewise; NaN if the test file was left unread
    best_epoch: int  # from 0
    steps: int
    seconds: float  # of the whole process, evaluation included
    memory_mib: float  # peak resident memory; NaN if it is not known

    @property
    def has_test(self) -> bool:
        """Return whether the test file was read."""
        return not math.isnan(self.test)


COLUMNS = [f.name for f in fields(Result)]
TYPES = [f.type for f in fields(Result)]


def is_result_of(result: Result, run: Run) -> bool:
    """Return whether a result is that of a run.

    They match if everything that decides the accuracy is equal: checkpoint, data, lines, method,
    flags and seed. Commit, machine and threads are recorded, but another commit, such as one that
    changes a comment, does not ask for all runs again. To repeat a run, delete its line. Values
    that need a missing file are not compared.
    """
    return (
        result.seed == run.seed
        and has_names_of(result, run)
        and has_inputs_of(result, run)
        and has_flags_of(result, run)
        and (run.dev_only or (result.has_test and run.test_hash in ("", result.test_hash)))
    )


def has_names_of(result: Result, run: Run) -> bool:
    """Return whether a result has a run's names: checkpoint, data, training lines and method."""
    names = ("checkpoint", "data", "train_lines", "method")
    return all(getattr(result, name) == getattr(run, name) for name in names)


def has_inputs_of(result: Result, run: Run) -> bool:
    """Return whether a result has a run's checkpoint and data, as far as these are here."""
    same_checkpoint = run.checkpoint_hash in ("", result.checkpoint_hash)
    return same_checkpoint and run.data_hash in ("", result.data_hash)


def has_flags_of(result: Result, run: Run) -> bool:
    """Return whether a result has a run's flags, as far as these are known."""
    flags = dict(parse_resolved(result.flags))
    for name in run.unknown_flags:
        flags.pop(name, None)
    return flags == parse_resolved(run.flags)


def find_result(results: Sequence[Result], run: Run) -> Result | None:
    """Return the newest result of a run, or None."""
    found = [result for result in results if is_result_of(result, run)]
    return found[-1] if found else None


def read_results(path: Path) -> list[Result]:
    """Read the results, oldest first; none if there is no file.

    Raises:
        ValueError: a line is not that of a result.
    """
    if not path.exists():
        return []
    try:
        rows = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8")), strict=True))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file: {error}") from None
    if not rows or rows[0] != COLUMNS:
        raise ValueError(f"{path}:1: expected the columns {','.join(COLUMNS)}")
    return [parse_row(row, f"{path}:{number}") for number, row in enumerate(rows[1:], start=2)]


def parse_row(row: Sequence[str], where: str) -> Result:
    """Make a result of the cells of a line."""
    if len(row) != len(COLUMNS):
        raise ValueError(f"{where}: expected {len(COLUMNS)} cells, found {len(row)}")
    values: list[Any] = []
    for name, kind, cell in zip(COLUMNS, TYPES, row, strict=True):
        try:
            values.append(float(cell or "nan") if kind is float else kind(cell))  # type: ignore[operator]
        except ValueError:
            raise ValueError(f"{where}: {name}: expected a number, found {cell!r}") from None
    result = Result(*values)
    for name in ("dev", "test") if result.has_test else ("dev",):
        if not 0 <= getattr(result, name) <= 1:
            found = getattr(result, name)
            raise ValueError(f"{where}: {name}: expected an accuracy from 0 to 1, found {found}")
    for name in ("seconds", "steps", "memory_mib"):
        value = getattr(result, name)
        if value <= 0 or (math.isnan(value) and name != "memory_mib"):
            raise ValueError(f"{where}: {name}: expected a number above 0, found {value}")
    return result


def add_result(path: Path, result: Result) -> None:
    """Add a result to the file, completely or not at all; the other lines stay as they are."""
    text = io.StringIO()
    if not path.exists():
        csv.writer(text, lineterminator="\n").writerow(COLUMNS)
    csv.writer(text, lineterminator="\n").writerow(map(show_cell, astuple(result)))
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        content += b"\n"
    with open_atomically(path, "wb") as file:
        file.write(content + text.getvalue().encode())


def show_cell(value: object) -> str:
    """Return a cell of the file; NaN is an empty one."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def current_commit() -> str:
    """Return the commit of this repository, with + if its Python files differ from it."""
    commit = _git("rev-parse", "--short=10", "HEAD")
    if not commit:
        return "unknown"
    return commit + ("+" if _git("status", "--porcelain", "--", "*.py") else "")


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
