"""Check the files that are handed in, and pack them as the course wants them.

    uv run python -m beyond.classroom submission ID [FOLDER]

Makes `ID.zip` in the current folder, with one folder `ID/` that holds the files below and nothing
else. All that is missing or wrong is listed, and then nothing is written.

- run_llama.py, llama.py, optimizer.py, classifier.py and rope.py, in FOLDER;
- generated-sentence-temp-0.txt and -1.txt;
- {sst,cfimdb}-{dev,test}-{prompting,finetuning}-output.txt;
- for extra work {sst,cfimdb}-{dev,test}-advanced-output.txt, all four or none.

Results are looked for in FOLDER and in its output/task_1, output/task_2 and output/task_3. A result
that the demo's model has made is refused. A result without a record is of unknown origin, and is
taken.

The course runs the five files beside its own base_llama.py, config.py, tokenizer.py and utils.py.
If they import a further module of yours, move what they need of it into them. Files that were
written on this project's starter need the starter's files of these names, and its `beyond/`: hand
them in to a teacher who has the starter, or move the bodies into the course's own files.
"""

import argparse
import re
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from beyond.classroom.origins import origin_of
from beyond.classroom.submitted_files import (
    CODE,
    LINES,
    check_predictions,
    code_notes,
    parse_code,
    read_file,
)
from utils import OneLineParser, describe_error, open_atomically, prepare_output

RESULT_FOLDERS = ("", "output/task_1", "output/task_2", "output/task_3")
GENERATED = tuple(f"generated-sentence-temp-{temperature}.txt" for temperature in (0, 1))
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Packed:
    """A file of the submission."""

    name: str  # in the zip file
    path: Path
    content: bytes


def predictions(kind: str) -> tuple[str, ...]:
    """Return the names of the prediction files of a kind, such as prompting."""
    return tuple(f"{split}-{kind}-output.txt" for split in LINES)


REQUIRED_RESULTS = (*GENERATED, *predictions("prompting"), *predictions("finetuning"))
EXTRA_RESULTS = predictions("advanced")


# ------------------------------------------------------------------------------- command line


def main(argv: Sequence[str]) -> int:
    """Run the command line after `submission`; returns the exit status.

    Raises:
        ValueError, OSError: an argument cannot be used, or the zip file cannot be written.
    """
    usage, _, details = (__doc__ or "").partition("\n")
    parser = OneLineParser(
        prog="python -m beyond.classroom submission",
        description=usage,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("id", metavar="ID", help="your Andrew ID, which names the zip file")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", default=".", help="your work")
    arguments = parser.parse_args(argv)
    student, folder = arguments.id, Path(arguments.folder)
    if not ID.fullmatch(student):
        raise ValueError(
            f"ID {student!r}: expected letters, digits, - _ and . only, first a letter or a digit"
        )
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder")
    target = Path(f"{student}.zip")
    is_replaced = check_target(target, student)
    problems: list[str] = []
    packed, origins = collect(folder, problems)
    if problems:
        for problem in problems:
            say(f"error: {problem}")
        return 2
    for name, origin in origins.items():
        print(f"{name}: {origin}")
    for note in notes(packed, folder, student):
        say(f"note: {note}")
    write_zip(target, student, packed)
    print(f"{'Replaced' if is_replaced else 'Wrote'} {target}: {len(packed)} files.")
    return 0


def say(text: str) -> None:
    """Print a line on standard error."""
    print(f"beyond.classroom: {text}", file=sys.stderr)


# --------------------------------------------------------------------------------------- checks


def collect(folder: Path, problems: list[str]) -> tuple[list[Packed], dict[str, str]]:
    """Read and check all files of a submission.

    Args:
        folder: the student's work.
        problems: gets a line for each file that is missing or wrong.

    Returns:
        The files, and the origin of each result by its name.
    """
    packed: list[Packed] = []
    origins: dict[str, str] = {}
    extra = EXTRA_RESULTS if any(places(folder, name) for name in EXTRA_RESULTS) else ()
    for name in (*CODE, *REQUIRED_RESULTS, *extra):
        try:
            if name in CODE:
                path = folder / name
                content = read_file(path)
                parse_code(path, content)
            else:
                path = find_result(folder, name)
                content = read_file(path)
                if name not in GENERATED:
                    check_predictions(path, content, folder)
                origins[name] = origin_of(path, folder)
            packed.append(Packed(name, path, content))
        except (ValueError, OSError) as error:
            problems.append(describe_error(error))
    return packed, origins


def places(folder: Path, name: str) -> list[Path]:
    """Return where a result is, in `RESULT_FOLDERS`."""
    paths = (folder / place / name for place in RESULT_FOLDERS)
    return [path for path in paths if path.exists() or path.is_symlink()]


def find_result(folder: Path, name: str) -> Path:
    """Return the path of a result.

    Raises:
        ValueError: it is missing, or there are two that differ.
    """
    found = places(folder, name)
    if not found:
        demo = places(folder, f"demo-{name}") + places(folder, f"demo-{name.partition('-')[2]}")
        hint = f"; {demo[0]} is the demo's and does not count" if demo else ""
        hint += "; of these four files all or none are handed in" if name in EXTRA_RESULTS else ""
        raise ValueError(f"{name}: is missing in {folder} and its output/task_*{hint}")
    for other in found[1:]:
        if read_file(other) != read_file(found[0]):
            raise ValueError(f"{found[0]} and {other} differ; delete the one that is not meant")
    return found[0]


def check_target(target: Path, student: str) -> bool:
    """Return whether the zip file exists already.

    Raises:
        ValueError: it exists and is not a submission of this ID.
        OSError: it cannot be written.
    """
    prepare_output(target)
    if not target.exists():
        return False
    try:
        with zipfile.ZipFile(target) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        names = []
    if not names or not all(name.startswith(f"{student}/") for name in names):
        raise ValueError(f"{target}: exists and is not a submission of {student}; move it away")
    return True


# ---------------------------------------------------------------------------------------- notes


def notes(packed: Sequence[Packed], folder: Path, student: str) -> Iterator[str]:
    """Yield what the student should know about a complete submission."""
    for file in packed:
        if file.name in CODE:
            yield from code_notes(file.path, file.content)
    code = max((file for file in packed if file.name in CODE), key=changed)
    result = min((file for file in packed if file.name not in CODE), key=changed)
    if changed(code) > changed(result):
        yield (
            f"{code.path} was changed after {result.path} was written; run the task again if the "
            "change matters"
        )
    if (report := folder / f"{student}-report.pdf").exists():
        yield f"{report} is not packed; add it to the zip file if you hand in a report"


def changed(file: Packed) -> float:
    """Return when a file was changed last."""
    return file.path.stat().st_mtime


# ------------------------------------------------------------------------------------- zip file


def write_zip(target: Path, student: str, packed: Sequence[Packed]) -> None:
    """Write the zip file, completely or not at all."""
    with (
        open_atomically(target, "wb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for entry in packed:
            info = zipfile.ZipInfo(f"{student}/{entry.name}", time.localtime()[:6])
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16  # permissions
            archive.writestr(info, entry.content)
