"""Write the starter: the assignment's skeleton, made from this project's own sources.

    uv run python -m beyond.classroom starter FOLDER

FOLDER is new or empty. It gets the ground floor without the bodies that students write, what
`run_llama.py` needs of `beyond/`, the checks, the demo, and a README for students. Rooms that show
answers are left out; modules of `stand_ins/` take their place and do the plain case.
"""

import ast
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from beyond.classroom.cutting import leave_to_student, replace_once, take_out, turn_off
from beyond.classroom.stand_ins.methods.options import LACKS
from beyond.classroom.todos import ANSWERS_IN_CHECKS, EDITS, TODOS
from utils import OneLineParser

ROOT = Path(__file__).resolve().parent.parent.parent
STAND_INS = ROOT / "beyond" / "classroom" / "stand_ins"
README = ROOT / "beyond" / "classroom" / "starter.md"
# Modules from which all others are found by their imports.
SCRIPTS = ("run_llama", "rope_test", "optimizer_test", "sanity_check")
# Rooms that show answers, or how answers are judged.
CLOSED = (
    "beyond.decoding",
    "beyond.fast_decoding",
    "beyond.formats",
    "beyond.methods",
    "beyond.classroom",
)
OTHER_FILES = (".gitignore", ".python-version", "LICENSE", "data/download.py", "output/.gitkeep")
FOLDERS = ("data/demo",)
LEFT_OUT_OF_PYPROJECT = ("[dependency-groups]", "[tool.mypy", "[tool.pytest")


def main(argv: Sequence[str]) -> int:
    """Run the command line after `starter`; returns the exit status.

    Raises:
        ValueError, OSError: the folder cannot be used.
    """
    lines = (__doc__ or "").split("\n")
    parser = OneLineParser(prog="python -m beyond.classroom starter", description=lines[0])
    parser.add_argument("folder", metavar="FOLDER", help="a new or empty folder")
    folder = Path(parser.parse_args(argv).folder)
    count = write_starter(folder)
    print(f"Wrote the starter to {folder}: {count} files, {len(TODOS)} bodies to write.")
    print("It lacks the flags " + ", ".join(f"--{name}" for name in LACKS) + ".")
    return 0


def write_starter(folder: Path) -> int:
    """Write the starter, completely or not at all; returns the number of files.

    Raises:
        ValueError: the folder is not empty, or is not a folder.
        OSError: it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder; choose another one")
    files = starter_files()
    target = folder.resolve()  # through a link
    target.parent.mkdir(parents=True, exist_ok=True)
    # Near the target, so that the complete starter only has to be renamed.
    place = target if target.exists() else target.parent
    with tempfile.TemporaryDirectory(prefix=".starter-", dir=place) as temporary:
        complete = Path(temporary) / "starter"
        for name, content in files.items():
            path = complete / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if place == target:  # it stays the same folder, for example someone's current one
            for path in complete.iterdir():
                path.rename(target / path.name)
        else:
            complete.rename(target)
    return len(files)


def starter_files() -> dict[str, bytes]:
    """Return the content of each of the starter's files, by its path in the folder.

    Raises:
        LookupError: the project's sources have changed, and `todos.py` or `stand_ins/` have not.
    """
    sources = needed_modules()
    for todo in TODOS:
        source = leave_to_student(sources[todo.file], todo)
        for helper in todo.helpers:
            source = take_out(source, helper, todo.file)
        sources[todo.file] = source
    for file, names in ANSWERS_IN_CHECKS.items():
        for name in names:
            sources[file] = take_out(sources[file], name, file)
    sources["beyond/options.py"] = turn_off(sources["beyond/options.py"], LACKS)
    sources["pyproject.toml"] = pyproject()
    for file, edits in EDITS.items():
        for old, new in edits:
            sources[file] = replace_once(sources[file], old, new, file)
    sources["README.md"] = readme()
    files = {name: text.encode() for name, text in sources.items()}
    copied = [*OTHER_FILES]
    for folder in FOLDERS:
        copied += sorted(f"{folder}/{path.name}" for path in (ROOT / folder).iterdir())
    return files | {name: (ROOT / name).read_bytes() for name in copied}


def needed_modules() -> dict[str, str]:
    """Return the sources, by path, that `SCRIPTS` need: found by following all imports.

    Raises:
        LookupError: a module of a closed room is imported, and nothing stands in for it.
    """
    sources: dict[str, str] = {}
    waiting = list(SCRIPTS)
    while waiting:
        module = waiting.pop()
        file, path = locate(module)
        if file not in sources:
            sources[file] = path.read_text(encoding="utf-8")
            waiting += imported_modules(sources[file])
    return sources


def locate(module: str) -> tuple[str, Path]:
    """Return a module's path in the starter, and the file that its source is taken from.

    Raises:
        LookupError: the module is in a closed room, and nothing stands in for it.
    """
    name = module.replace(".", "/")
    folder = ROOT
    if f"{module}.".startswith(tuple(f"{room}." for room in CLOSED)):
        name, folder = name.removeprefix("beyond/"), STAND_INS
    file = f"{name}.py" if (folder / f"{name}.py").exists() else f"{name}/__init__.py"
    if not (folder / file).exists():
        raise LookupError(f"the starter needs {module}; write it in {STAND_INS.name}/")
    return (f"beyond/{file}" if folder == STAND_INS else file), folder / file


def imported_modules(source: str) -> Iterator[str]:
    """Yield the project's modules and packages that a source imports."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            for end in range(1, len(parts) + 1):  # beyond, beyond.formats, beyond.formats.load
                module = "/".join(parts[:end])
                if (ROOT / f"{module}.py").exists() or (ROOT / module / "__init__.py").exists():
                    yield ".".join(parts[:end])


def pyproject() -> str:
    """Return `pyproject.toml` without the tables of tests and type checks."""
    text, is_kept = "", True
    for line in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("["):
            is_kept = not line.lstrip("[").startswith(
                tuple(table.lstrip("[") for table in LEFT_OUT_OF_PYPROJECT)
            )
        text += line if is_kept else ""
    return text.rstrip("\n") + "\n"


def readme() -> str:
    """Return the README for students, with the list of what to write and of what is lacking."""
    text = README.read_text(encoding="utf-8")
    todos = "\n".join(
        f"{number}. `{todo.file}`: `{todo.name}`" for number, todo in enumerate(TODOS, start=1)
    )
    lacks = ", ".join(f"`--{name}`" for name in LACKS)
    values = {"count": str(len(TODOS)), "todos": todos, "lacks": lacks}
    for name, value in values.items():
        text = replace_once(text, f"{{{name}}}", value, README.name)
    return text
