"""Small things that need no model: seeding, devices, files, errors, padding, scores, logs."""

import argparse
import math
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:  # imported where it is used: it takes a second
    from torch.utils.tensorboard import SummaryWriter

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


def resolve_device(use_gpu: bool) -> torch.device:
    """The device of a run.

    Raises:
        ValueError: a GPU is asked for and PyTorch sees none.
    """
    if use_gpu and not torch.cuda.is_available():
        raise ValueError(
            "--use_gpu: PyTorch finds no CUDA device; leave the flag out to use the CPU"
        )
    return torch.device("cuda" if use_gpu else "cpu")


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


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back an interrupt (Ctrl-C) until the block is done.

    TensorBoard's writer hands its events to a thread: an interrupt in the middle of that leaves the
    thread asleep, and closing the writer waits for it for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # interrupts are the main thread's
        return
    held: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


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
    except BaseException:
        beside.unlink(missing_ok=True)
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


class StepLog:
    """The curves that have a point per training step, written a few steps at a time.

    Reading a loss waits for the device, so losses are left there until `EVERY` have come together.

    Args:
        log: where they go.
        optimizer: whose learning rate is logged.
        device: where the losses are.
        first_step: number of the first step.

    Raises:
        ValueError: by any method: a loss is infinite or NaN.
    """

    EVERY = 10  # steps

    def __init__(
        self, log: "SummaryWriter", optimizer: Optimizer, device: torch.device, first_step: int = 0
    ) -> None:
        self.log = log
        self.optimizer = optimizer
        self.step = first_step
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.start_window()

    def start_window(self) -> None:
        """Forget the steps that are written."""
        self.losses: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.rates: list[float] = []
        self.tokens = 0
        self.start = time.perf_counter()

    def add(self, loss: Tensor, tokens: int, divisor: int) -> None:
        """Count a step.

        Args:
            loss: what was minimised.
            tokens: that it saw, padding not counted.
            divisor: by what the sum of its losses was divided.
        """
        self.losses.append(loss.detach())
        self.sums.append(loss.detach().double() * divisor)
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.tokens += tokens
        if len(self.losses) == self.EVERY:
            self.write()

    def write(self) -> None:
        """Write what has come together."""
        if not self.losses:
            return
        losses = torch.stack(self.losses)
        self.total += torch.stack(self.sums).sum()
        values = losses.tolist()  # waits for the device
        speed = self.tokens / (time.perf_counter() - self.start)
        for loss, rate in zip(values, self.rates, strict=True):
            if not math.isfinite(loss):
                raise ValueError(
                    f"step {self.step}: the loss is {loss} at a learning rate of {rate:.3g}; "
                    "try a lower --lr"
                )
            with uninterrupted():
                self.log.add_scalar("step/loss", loss, self.step)
                self.log.add_scalar("step/learning_rate", rate, self.step)
                self.log.add_scalar("step/tokens_per_second", speed, self.step)
            self.step += 1
        self.start_window()

    def loss_sum(self) -> float:
        """The sum of all losses, undivided."""
        self.write()
        return self.total.item()
