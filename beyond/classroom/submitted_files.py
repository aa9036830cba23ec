"""Check the files of a submission one by one: code, and predictions.

The names and numbers are the course's.
"""

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

from utils import decode_lines, parse_example, read_lines

CODE = ("run_llama.py", "llama.py", "optimizer.py", "classifier.py", "rope.py")
COURSE_MODULES = ("base_llama", "config", "tokenizer", "utils")  # the course adds its own
LINES = {"sst-dev": 1101, "sst-test": 2210, "cfimdb-dev": 245, "cfimdb-test": 488}
NUM_LABELS = {"sst": 5, "cfimdb": 2}
MAX_SIZE = 10_000_000  # bytes of one file; real ones have less than 1 MB


def read_file(path: Path) -> bytes:
    """Return the content of a regular file, or of a link to one.

    Raises:
        ValueError: it is missing, is something else, is empty, or is too large.
        OSError: it cannot be read.
    """
    if not path.exists():
        what = "is a link to a file that does not exist" if path.is_symlink() else "is missing"
        raise ValueError(f"{path}: {what}")
    if not path.is_file():
        raise ValueError(f"{path}: is not a regular file")
    if path.stat().st_size > MAX_SIZE:
        raise ValueError(
            f"{path}: has more than {MAX_SIZE:,} bytes, too many for a file of this name"
        )
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"{path}: is empty")
    return content


def parse_code(path: Path, content: bytes) -> ast.Module:
    """Parse a Python file.

    Raises:
        ValueError: it is not one.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of its strings
            return ast.parse(content)
    except SyntaxError as error:
        place = path if error.lineno is None else f"{path}:{error.lineno}"
        raise ValueError(f"{place}: is not valid Python: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path}: is not valid Python: {error}") from None


def code_notes(path: Path, content: bytes) -> Iterator[str]:
    """Yield what is noticeable in a Python file."""
    tree, folder = parse_code(path, content), path.parent
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node):
            yield f"{path}:{node.lineno}: raises NotImplementedError; is a body missing?"
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module.partition(".")[0])
    for module in sorted(modules - {Path(name).stem for name in CODE} - set(COURSE_MODULES)):
        if (folder / f"{module}.py").exists() or (folder / module).is_dir():
            yield (
                f"{path} imports {module}, which is not handed in: it cannot run beside the "
                "course's own files alone; see --help"
            )


def check_predictions(path: Path, content: bytes, folder: Path) -> None:
    """Raise ValueError unless a prediction file has its number of lines and valid labels."""
    dataset, split, *_ = path.name.split("-")
    lines, num_labels = decode_lines(content, path), NUM_LABELS[dataset]
    for number, line in enumerate(lines, start=1):
        label, _ = parse_example(line, path, number)
        if not 0 <= label < num_labels:
            raise ValueError(f"{path}:{number}: label {label} is not among 0 to {num_labels - 1}")
    data = folder / "data" / f"{dataset}-{split}.txt"
    expected = len(read_lines(data)) if data.exists() else LINES[f"{dataset}-{split}"]
    if len(lines) != expected:
        raise ValueError(f"{path}: has {len(lines)} lines, expected {expected}, one per sentence")
