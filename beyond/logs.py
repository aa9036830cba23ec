"""TensorBoard: curves, hyperparameters and confusion matrix, written by the main process."""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from beyond.batches import TrainingBatch
from beyond.processes import is_main_process, world_size

if TYPE_CHECKING:  # imported where it is used, since it takes a second
    from torch.utils.tensorboard import SummaryWriter


class SilentWriter:
    """Takes the place of a `SummaryWriter` in the processes that write nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def open_writer(
    folder: Path, hyperparameters: Mapping[str, object], first_step: int
) -> "SummaryWriter":
    """Open a TensorBoard run and write its hyperparameters.

    Args:
        folder: of this run alone; TensorBoard shows its name.
        hyperparameters: names and values.
        first_step: TensorBoard hides what an interrupted run wrote here for this step and later.
    """
    if not is_main_process():
        return cast("SummaryWriter", SilentWriter())
    from torch.utils.tensorboard import SummaryWriter

    threading.excepthook = _ignore_os_errors
    writer = SummaryWriter(str(folder), purge_step=first_step or None)
    rows = [[name, f"`{value}`"] for name, value in sorted(hyperparameters.items())]
    writer.add_text("settings", markdown_table([["setting", "value"], *rows]))
    return writer


def _ignore_os_errors(failure: threading.ExceptHookArgs) -> None:
    """Print nothing about an OSError such as a full disk.

    It ends the writer's thread, and the next call of the writer raises it.
    """
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def markdown_table(rows: Sequence[Sequence[object]]) -> str:
    """Format rows as a Markdown table; the first row is the head."""
    lines = [
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


class Scores(Protocol):
    """The scores of an evaluation."""

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""

    @property
    def macro_f1(self) -> float:
        """In [0, 1]."""


def log_evaluation(writer: "SummaryWriter", epoch: int, train: Scores, dev: Scores) -> None:
    """Write the curves of fine-tuning that have a point per epoch."""
    for split, scores in (("train", train), ("dev", dev)):
        writer.add_scalar(f"accuracy/{split}", scores.accuracy, epoch)
        writer.add_scalar(f"macro_f1/{split}", scores.macro_f1, epoch)
    writer.flush()


def log_confusion(
    writer: "SummaryWriter",
    epoch: int,
    confusion: Sequence[Sequence[int]],
    label_names: Sequence[str],
) -> None:
    """Write the confusion matrix of a dev result as a table of counts."""
    rows = [[f"**{name}**", *row] for name, row in zip(label_names, confusion, strict=True)]
    table = markdown_table([["gold \\ predicted", *label_names], *rows])
    writer.add_text("dev confusion (best epoch)", f"epoch {epoch}\n\n{table}", epoch)


class StepLoss(NamedTuple):
    """The loss of one training step."""

    value: Tensor  # this process's part, a scalar without a graph
    divisor: int  # the sum of the examples' losses was divided by it
    batch: TrainingBatch


@dataclass
class EpochTotals:
    """Sums over the steps of an epoch that are written to the log."""

    loss: float = 0.0  # of all examples or tokens, in nats, not divided
    tokens: float = 0.0  # without padding
    padded_tokens: float = 0.0  # with padding


class StepLog:
    """The curves that have a point per training step, written a few steps at a time.

    Reading a loss waits for the device, so losses stay there until `STEPS_PER_WRITE` are collected.

    Attributes:
        totals: sums over the steps of this epoch that are written.
    """

    STEPS_PER_WRITE = 10

    def __init__(self) -> None:
        self.start_epoch()

    def start_epoch(self) -> None:
        """Forget the totals of the previous epoch."""
        self.totals = EpochTotals()
        self.pending: list[tuple[int, StepLoss, float]] = []  # step, loss, learning rate
        self.last_write = time.perf_counter()

    def add(self, step: int, loss: StepLoss, learning_rate: float) -> None:
        """Collect a step, whose number counts over all epochs."""
        self.pending.append((step, loss, learning_rate))

    def is_full(self) -> bool:
        """Return whether it is time to write."""
        return len(self.pending) >= self.STEPS_PER_WRITE

    def write(self, writer: "SummaryWriter") -> None:
        """Write the steps that are collected.

        Raises:
            ValueError: a loss is infinite or NaN.
        """
        if not self.pending:
            return
        losses = torch.stack([loss.value for _, loss, _ in self.pending]).double()
        if world_size() > 1:
            dist.all_reduce(losses)
        values = losses.tolist()  # waits for the device
        tokens = sum(loss.batch.num_tokens for _, loss, _ in self.pending)
        speed = tokens / (time.perf_counter() - self.last_write)
        for value, (step, loss, learning_rate) in zip(values, self.pending, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"step {step}: the loss is {value} at a learning rate of {learning_rate:.3g} "
                    f"in {loss.batch.describe()}; try a lower --lr"
                )
            self.totals.loss += value * loss.divisor
            self.totals.tokens += loss.batch.num_tokens
            self.totals.padded_tokens += loss.batch.num_padded_tokens
            writer.add_scalar("step/loss", value, step)
            writer.add_scalar("step/learning_rate", learning_rate, step)
            writer.add_scalar("step/tokens_per_second", speed, step)
        self.pending = []
        self.last_write = time.perf_counter()
