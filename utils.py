"""Small things that need no model: seeding, devices, files, errors, padding, scores."""

import argparse
import glob
import hashlib
import os
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

LARGEST_INT = 2**31 - 1  # of an argument; beyond it, tensors cannot take it
SEPARATOR = " ||| "  # between label and sentence
LABEL = re.compile(rf"^\s*[+-]?\d+{re.escape(SEPARATOR)}")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are exceptions, for a `main` to report in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def at_least_one(text: str) -> int:
    """Argument type: a whole number from 1 to `LARGEST_INT`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    if value > LARGEST_INT:
        raise argparse.ArgumentTypeError(f"{value} is above {LARGEST_INT}")
    return value


def describe_error(error: Exception) -> str:
    """What went wrong, in one line."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(message.split())


def is_text(value: object) -> bool:
    """Whether a value is a text that UTF-8 can hold: not a byte of the command line that is none.

    Python keeps such bytes, and JSON's escapes can write them, as lone surrogates.
    """
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def seed_everything(seed: int) -> None:
    """Seed the global random states of Python, NumPy and PyTorch, on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def compute_deterministically() -> None:
    """Let only operations run whose results are the same in every run on one machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)


def resolve_device(use_gpu: bool) -> torch.device:
    """The device of a run; of several processes on one machine each has its own GPU.

    Raises:
        ValueError: a GPU is asked for and PyTorch sees none, or fewer than there are processes.
    """
    if not use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "--use_gpu: PyTorch finds no CUDA device; leave the flag out to use the CPU"
        )
    number = int(os.environ.get("LOCAL_RANK", 0))
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"--use_gpu: PyTorch finds {torch.cuda.device_count()} CUDA devices on this machine, "
            "fewer than processes; start fewer (--nproc_per_node)"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, of a GPU or of the machine."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes products of bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The scope of a forward pass whose large products are of `dtype`, "float32" or "bfloat16".

    Parameters, the residual stream and RMSNorm stay in float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A batch's tensor on the device; to a GPU the copy runs beside what is computed there."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x


def check_readable(path: str | Path) -> None:
    """Raise unless `path` is a file that can be opened for reading.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is a folder, or it may not be read.
    """
    with open(path, "rb"):
        pass


def fingerprint(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(path: str | Path) -> None:
    """Make the folder of a result and raise unless a file can be written there.

    Raises:
        OSError: the folder cannot be made or written to, or `path` is there and no plain file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: cannot be written: it is there and no plain file")
    beside = _beside(path)
    beside.touch()
    beside.unlink()


def _beside(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(path: str | Path) -> None:
    """Delete what a killed process has left beside a file that it was writing."""
    for leftover in Path(path).parent.glob(f".{glob.escape(Path(path).name)}.*.tmp"):
        leftover.unlink(missing_ok=True)


@contextmanager
def open_atomically(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file for writing that takes its name only when all of it is on disk.

    Writes beside the target, flushes, renames; on any failure the old file, if any, stays whole.
    Text is UTF-8 with plain newlines on every system.
    """
    path = Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    beside = _beside(path)
    try:
        with open(beside, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename:  # as when the disk is full
            error.filename = str(path)
        raise


def read_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file, without their ends.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, or a line is not UTF-8.
    """
    lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()  # what follows the last line's end
    if not lines:
        raise ValueError(f"{path}: is empty")
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            texts.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 text: {error.reason}") from None
    return texts


def read_documents(path: str | Path) -> list[str]:
    """The texts of a file, one a line, plain or labelled (`label ||| text`): labels are dropped.

    Blank lines are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, or a line is not UTF-8.
    """
    texts = (LABEL.sub("", line, count=1).strip() for line in read_lines(path))
    return [text for text in texts if text]


def pad_batch(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right to the longest sequence.

    Returns:
        tokens: (batch, seq), int64.
        lengths: (batch,), int64; how many of a row's tokens are its own.
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    tokens = torch.full((len(sequences), int(lengths.max())), pad_id)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return tokens, lengths


def confusion_matrix(
    predictions: Sequence[int], labels: Sequence[int], num_labels: int
) -> np.ndarray:
    """Counts (num_labels, num_labels): row is the gold label, column the predicted one."""
    counts = np.zeros((num_labels, num_labels), dtype=np.int64)
    np.add.at(counts, (np.asarray(labels, int), np.asarray(predictions, int)), 1)
    return counts


def accuracy(confusion: np.ndarray) -> float:
    """Share of right predictions, in [0, 1]; NaN when there are none to judge."""
    total = confusion.sum()
    return float(np.trace(confusion) / total) if total else float("nan")


def macro_f1(confusion: np.ndarray) -> float:
    """Unweighted mean over classes of F1 = 2 TP / (2 TP + FP + FN), in [0, 1].

    Like scikit-learn's `f1_score(average="macro", zero_division=0)`: the classes are those that
    occur as a label or as a prediction. NaN when there is nothing to judge.
    """
    true_positives = np.diag(confusion)
    occurrences = confusion.sum(axis=0) + confusion.sum(axis=1)  # 2 TP + FP + FN
    occurs = occurrences > 0
    if not occurs.any():
        return float("nan")
    return float(np.mean(2 * true_positives[occurs] / occurrences[occurs]))
