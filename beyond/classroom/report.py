"""`sanity_check.py --of FOLDER`: a report of what is right and wrong in another implementation.

The exit status is 0 if all parts are ok, 1 if one is not, 2 for bad input, and 130 after Ctrl-C.
A part that is right in another edition of the course counts as ok and gets its points.
"""

import io
import json
import math
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from beyond.classroom.checker import check, require_folder
from beyond.classroom.part import Finding, Part, Status
from beyond.classroom.parts import PARTS
from beyond.program import exit_status
from utils import OneLineParser, open_atomically, prepare_output

PROGRAM = "sanity_check.py"
POINTS = Path(__file__).parent / "points.txt"
DESCRIPTION = """\
Without arguments: check this project's model against recorded values.
With --of: examine the implementation of the assignment in FOLDER, and name its mistakes. This runs
the code in FOLDER, in a process of its own with limits of time and memory."""
PASSED: tuple[Status, ...] = ("ok", "edition")
LABELS: dict[Status, str] = {  # as the report shows a status, in the order of its last line
    "mistake": "mistake",
    "unknown": "wrong",
    "error": "error",
    "todo": "todo",
    "edition": "edition",
    "ok": "ok",
}
PLURALS = {"mistake", "error"}  # labels that are nouns


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (None: the program's); returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    return exit_status(PROGRAM, lambda: run(argv))


def run(argv: Sequence[str] | None) -> int:
    """Check a folder, and print and write the reports; returns the exit status.

    Raises:
        ValueError, OSError: an argument is wrong.
    """
    parser = OneLineParser(prog=PROGRAM, description=DESCRIPTION)
    parser.add_argument(
        "--of", type=Path, metavar="FOLDER", help="the folder that holds rope.py, llama.py, ..."
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results for Gradescope to this file"
    )
    parser.add_argument(
        "--points",
        type=Path,
        default=POINTS,
        metavar="FILE",
        help="points of each part, in lines `part = points` (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    if options.of is None:
        raise ValueError("--json and --points need --of FOLDER")
    require_folder(options.of)
    points = read_points(options.points, PARTS)
    if options.json is not None:
        prepare_output(options.json)
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    first: dict[str, str] = {}  # error -> the first part that has it

    def tell(finding: Finding) -> None:
        if finding.status == "error":
            part = first.setdefault(finding.text, finding.part)
            if part != finding.part:
                finding = replace(finding, text=f"the same error as in {part}")
        say(show(finding, width))

    findings = check(options.of, PARTS, tell=tell)
    say(summarize(findings))
    if options.json is not None:
        with open_atomically(options.json) as file:
            json.dump(results(findings, points), file, indent=2)
            file.write("\n")
    return 0 if all(finding.status in PASSED for finding in findings) else 1


# ------------------------------------------------------------------------------------ for people


def say(text: str) -> None:
    """Print lines; nothing more is printed if the reader has gone, as with `| head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What is left in the buffer is flushed again when the program ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(finding: Finding, width: int = 100) -> str:
    """Show a finding: status, part and what is wrong; wrapped to this number of columns."""
    text = f"{LABELS[finding.status]:8} {finding.part}"
    if finding.text:
        text += f": {printable(finding.text)}"
    return textwrap.fill(
        text,
        max(width, 40),
        subsequent_indent=" " * 9,
        break_long_words=False,
        break_on_hyphens=False,
    )


def summarize(findings: Sequence[Finding]) -> str:
    """Count the parts that are ok and those that are not, in one line."""
    counts = Counter(finding.status for finding in findings)
    passed = sum(counts[status] for status in PASSED)
    text = f"{passed} of {len(findings)} parts are ok"
    if counts["edition"]:
        text += f", {counts['edition']} of them as in another edition of the course"
    failed = [
        f"{counts[status]} {label}{'s' * (counts[status] > 1 and label in PLURALS)}"
        for status, label in LABELS.items()
        if counts[status] and status not in PASSED
    ]
    return text + (f"; {', '.join(failed)}" if failed else "")


def printable(text: str) -> str:
    """Replace what would steer a terminal or cannot be encoded: the text may be a student's."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# --------------------------------------------------------------------------------- for Gradescope


def results(findings: Sequence[Finding], points: Mapping[str, float]) -> dict[str, Any]:
    """Return the results in Gradescope's form, with a test for each part."""
    tests = [
        {
            "name": finding.part,
            "score": points[finding.part] if finding.status in PASSED else 0,
            "max_score": points[finding.part],
            "output": printable(finding.text) or finding.status,
        }
        for finding in findings
    ]
    return {"score": round(sum(test["score"] for test in tests), 6), "tests": tests}  # type: ignore[misc]


def read_points(path: Path, parts: Sequence[Part]) -> dict[str, float]:
    """Read how many points each part gives: lines `part = points`; a part without a line gives 1.

    Raises:
        ValueError: a line is wrong.
        OSError: the file cannot be read.
    """
    points: dict[str, float] = dict.fromkeys((part.name for part in parts), 1)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected text in UTF-8") from None
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        name, equals, value = (word.strip().strip("\"'") for word in line.rpartition("="))
        if not equals:
            raise ValueError(f'{path}:{number}: expected "part = points", found "{line}"')
        if name not in points:
            raise ValueError(f'{path}:{number}: no part "{name}"; parts: {", ".join(points)}')
        if name in seen:
            raise ValueError(f'{path}:{number}: the part "{name}" has a line already')
        seen.add(name)
        points[name] = _parse_points(value, f"{path}:{number}")
    return points


def _parse_points(text: str, place: str) -> float:
    """Convert a number of points; whole numbers stay integers.

    Raises:
        ValueError: it is not a number, negative, or not finite.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f'{place}: expected points, a number from 0, found "{text}"')
    return int(value) if value.is_integer() else value
