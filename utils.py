"""Small helpers that need neither a model nor PyTorch: text files, safe writing, errors, scores."""

import argparse
import codecs
import errno
import glob
import hashlib
import json
import math
import os
import re
import reprlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

LARGEST_INT = 2**31 - 1  # int32; the upper limit of every integer flag except seeds
SEPARATOR = " ||| "  # between label and sentence
# What `flock` answers on a file system without locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
SECONDS_UNTIL_SURE = 2.0  # the clocks of all common file systems tick at least that often
_fingerprints: dict[tuple[int, ...], str] = {}  # by device, inode, size and time of change
LINE_END = re.compile(rb"\r\n|\r")  # besides "\n"
LABEL_PREFIX = re.compile(rf"^\s*([+-]?\d+){re.escape(SEPARATOR)}")


# ---------------------------------------------------------------------------------- command line


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises ValueError, for a `main` to report in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def refuse_arguments(description: str | None) -> None:
    """Answer `--help`, and end a script that takes no arguments if it is given one."""
    parser = OneLineParser(description=(description or "").split("\n")[0])
    try:
        parser.parse_args()
    except ValueError as error:
        print(f"{parser.prog}: error: {error}; this script takes no arguments", file=sys.stderr)
        sys.exit(2)


def whole_number(text: str) -> int:
    """Convert an argument to an integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None


def at_least_one(text: str, lowest: int = 1) -> int:
    """Convert an argument to an integer from `lowest` to `LARGEST_INT`."""
    value = whole_number(text)
    if value < lowest:
        raise argparse.ArgumentTypeError(f"{value} is below {lowest}")
    if value > LARGEST_INT:
        raise argparse.ArgumentTypeError(f"{value} is above {LARGEST_INT}")
    return value


def describe_error(error: Exception) -> str:
    """Describe an error in one line."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(message.split())


def is_text(value: object) -> bool:
    """Return whether a value is a string that UTF-8 can encode (has no lone surrogate).

    Lone surrogates come from command-line bytes that are not UTF-8, and from JSON escapes.
    """
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


# ----------------------------------------------------------------------------------------- files


def check_readable(path: str | Path) -> None:
    """Raise unless `path` is a file that can be opened for reading.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is a folder, or reading it is not permitted.
    """
    if Path(path).is_fifo() and os.access(path, os.R_OK):
        return  # opening and closing a named pipe would end the program that writes into it
    with open(path, "rb"):
        pass


def prepare_output(path: str | Path) -> None:
    """Make the folder of a result, and raise unless a file can be written there.

    Raises:
        OSError: the folder cannot be made or written to, or `path` exists and is not a regular
            file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: cannot be written: it exists and is not a regular file")
    temporary = _temporary_path(path)
    try:
        temporary.touch()
    finally:  # also if a signal interrupts this
        temporary.unlink(missing_ok=True)


def _temporary_path(path: Path) -> Path:
    """Return where a file is written until it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(path: str | Path) -> None:
    """Delete the temporary files of killed processes that were writing `path`."""
    for leftover in Path(path).parent.glob(f".{glob.escape(Path(path).name)}.*.tmp"):
        leftover.unlink(missing_ok=True)


@contextmanager
def open_atomically(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file for writing that replaces `path` only when it is complete and on disk.

    It is written in the same folder under a temporary name, flushed, and renamed; after any
    failure the old file, if any, is unchanged. Text is UTF-8 with "\\n" as line end.
    """
    path = Path(path)
    text_options = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    temporary = _temporary_path(path)
    try:
        with open(temporary, mode, **text_options) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename:  # such as a full disk
            error.filename = str(path)
        raise


@contextmanager
def lock_results(paths: Iterable[str | Path], note: Callable[[str], None]) -> Iterator[None]:
    """Lock each result while the block runs, so that no other process writes it.

    Args:
        paths: the results; their folders exist. They are locked in sorted order, so that two
            programs cannot wait for each other.
        note: called once with a message if the file system has no locks.

    Raises:
        OSError: another process holds one of the locks.
    """
    have_locks = True
    with ExitStack() as stack:
        for path in sorted({os.path.realpath(path) for path in paths}):
            if not stack.enter_context(_lock(path)) and have_locks:
                have_locks = False
                note(
                    f"{os.path.dirname(path)}: this file system has no locks, so do not start two "
                    "programs with the same results"
                )
        yield


@contextmanager
def _lock(path: str) -> Iterator[bool]:
    """Lock a result while the block runs; yields whether the file system has locks.

    The lock is a `flock` on a hidden file in the same folder, `.<name>.lock`, which holds the
    process's number. It is not on the result itself, since that is replaced by renaming. The system
    releases it when the process ends, however it ends.
    """
    folder, name = os.path.split(path)
    lock_path = os.path.join(folder, f".{name}.lock")
    while True:
        with open(lock_path, "a+") as file:
            have_locks = _flock(file, path)
            if have_locks and not _is_same_file(file, lock_path):
                continue  # the last owner has deleted this file after it was opened here
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield have_locks
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(lock_path)
            return


def _flock(file: IO[str], path: str) -> bool:
    """Lock an open file; returns whether the file system has locks.

    Raises:
        OSError: another process holds the lock on the result `path`.
    """
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return False
    except BlockingIOError:
        file.seek(0)
        raise OSError(
            f"{path}: process {file.read() or '?'} is writing this file; wait until it ends, or "
            "choose another name"
        ) from None
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def _is_same_file(file: IO[str], path: str) -> bool:
    """Return whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def fingerprint(path: str | Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits; an unchanged file is read once."""
    found = os.stat(path)
    key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    if key in _fingerprints:
        return _fingerprints[key]
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # A file that changes twice within a tick of the file system's clock keeps its time.
    if time.time() - found.st_mtime > SECONDS_UNTIL_SURE:
        _fingerprints[key] = digest
    return digest


def read_lines(path: str | Path) -> list[str]:
    r"""Read the lines of a UTF-8 text file, without their line ends.

    A line ends with "\n", "\r\n" or "\r", as in `open(newline=None)`. Other separators, such as
    U+2028, are part of the text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, or a line is not UTF-8.
    """
    return decode_lines(Path(path).read_bytes(), path)


def decode_lines(content: bytes, path: str | Path) -> list[str]:
    """Split UTF-8 bytes into lines, as `read_lines` does; `path` names them in error messages."""
    content = content.removeprefix(codecs.BOM_UTF8)
    lines = LINE_END.sub(b"\n", content).split(b"\n")
    if not lines[-1]:
        lines.pop()  # the file ends with a line end
    if not lines:
        raise ValueError(f"{path}: is empty")
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            texts.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 text: {error.reason}") from None
    return texts


def parse_example(line: str, path: str | Path, line_number: int) -> tuple[int, str]:
    """Split a line `label ||| sentence` at its first separator into label and sentence.

    Raises:
        ValueError: the line does not have this form.
    """
    label, separator, sentence = line.partition(SEPARATOR)
    sentence = sentence.strip()
    if not separator or not sentence:
        shown = line if len(line) <= 40 else f"{line[:40]}..."
        raise ValueError(
            f'{path}:{line_number}: expected "<label> ||| <sentence>", found {json.dumps(shown)}'
        )
    try:
        return int(label), sentence
    except ValueError:
        raise ValueError(
            f"{path}:{line_number}: expected a whole number as label, found {json.dumps(label)}"
        ) from None


def read_documents(path: str | Path) -> list[str]:
    """Read one text per line, without its label if it has one (`label ||| text`).

    Blank lines are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, or a line is not UTF-8.
    """
    texts = (LABEL_PREFIX.sub("", line, count=1).strip() for line in read_lines(path))
    return [text for text in texts if text]


def read_label_names(path: str | Path) -> list[str]:
    """Read the label words of a JSON file; a label is an index into them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold a list of two or more different words.
    """
    try:
        names = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(names, list) or not all(is_text(name) and name.strip() for name in names):
        raise ValueError(f'{path}: expected a JSON list of words such as ["bad", "good"]')
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"{path}: expected two or more different label words, found {reprlib.repr(names)}"
        )
    return names


# ---------------------------------------------------------------------------------------- scores


class Evaluation(NamedTuple):
    """What a classifier predicts for a data set; lists are in the order of the file."""

    accuracy: float  # in [0, 1], over the examples with a gold label; NaN if none has one
    macro_f1: float  # likewise
    predictions: list[int]
    labels: list[int]
    sentences: list[str]
    confusion: list[list[int]]  # row: gold label, column: predicted label
    log_probs: list[list[float]]  # of each label, for each example
    loss: float  # mean negative log-likelihood of the gold labels; NaN if there is none

    @property
    def confidences(self) -> list[float]:
        """The probabilities of the predicted labels, in [0, 1]."""
        pairs = zip(self.predictions, self.log_probs, strict=True)
        return [math.exp(row[prediction]) for prediction, row in pairs]

    def split(self, sizes: Iterable[int]) -> "list[Evaluation]":
        """Split the evaluation of several data sets, one after the other, into one of each.

        Args:
            sizes: the number of examples of each data set.
        """
        parts, start = [], 0
        for size in sizes:
            part, start = slice(start, start + size), start + size
            labels, sentences = self.labels[part], self.sentences[part]
            parts.append(summarise(self.predictions[part], labels, sentences, self.log_probs[part]))
        return parts


def summarise(
    predictions: list[int], labels: list[int], sentences: list[str], log_probs: list[list[float]]
) -> Evaluation:
    """Compute the scores of predictions; the arguments are as in `Evaluation`, at least one."""
    confusion = confusion_matrix(predictions, labels, num_labels=len(log_probs[0]))
    acc, f1, loss = accuracy(confusion), macro_f1(confusion), mean_loss(log_probs, labels)
    return Evaluation(acc, f1, predictions, labels, sentences, confusion, log_probs, loss)


def confusion_matrix(
    predictions: Sequence[int], labels: Sequence[int], num_labels: int
) -> list[list[int]]:
    """Count the pairs: the row is the gold label, the column the predicted one.

    A negative label means that no gold label is known; such examples are not counted.
    """
    counts = [[0] * num_labels for _ in range(num_labels)]
    for prediction, label in zip(predictions, labels, strict=True):
        if label >= 0:
            counts[label][prediction] += 1
    return counts


def accuracy(confusion: Sequence[Sequence[int]]) -> float:
    """Return the fraction of right predictions, in [0, 1]; NaN if no example was counted."""
    total = sum(map(sum, confusion))
    correct = sum(row[label] for label, row in enumerate(confusion))
    return correct / total if total else float("nan")


def f1_scores(confusion: Sequence[Sequence[int]]) -> list[float]:
    """Return F1 = 2 TP / (2 TP + FP + FN) of each class, in [0, 1].

    NaN for a class that occurs neither as a label nor as a prediction.
    """
    scores = []
    for label, row in enumerate(confusion):
        occurrences = sum(row) + sum(other[label] for other in confusion)  # 2 TP + FP + FN
        scores.append(2 * row[label] / occurrences if occurrences else float("nan"))
    return scores


def macro_f1(confusion: Sequence[Sequence[int]]) -> float:
    """Return the unweighted mean of the classes' F1, in [0, 1].

    Equals scikit-learn's `f1_score(average="macro", zero_division=0)`: a class counts if it occurs
    as a label or as a prediction. NaN if no example was counted.
    """
    scores = [score for score in f1_scores(confusion) if not math.isnan(score)]
    return sum(scores) / len(scores) if scores else float("nan")


def mean_loss(log_probs: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    """Return the mean negative log-likelihood of the labels, in nats.

    Args:
        log_probs: of each label, for each example.
        labels: a negative one means that no gold label is known; such examples are not counted.

    Returns:
        The mean; NaN without a gold label.
    """
    pairs = zip(log_probs, labels, strict=True)
    losses = [-row[label] for row, label in pairs if label >= 0]
    return math.fsum(losses) / len(losses) if losses else float("nan")
