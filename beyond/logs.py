"""TensorBoard: a run's files, its hyperparameters, and the curves of its training steps.

Only the main process writes. A run has two sub-runs, `train` and `dev`. All curves are drawn
against the global step: the number of optimizer steps that are done.
"""

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from beyond.batches import TrainingBatch
from beyond.methods.options import MethodOptions
from beyond.processes import is_main_process, world_size

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:  # imported where it is used, since it takes a second
    from torch.utils.tensorboard import SummaryWriter

# The settings by which runs are compared, most important first.
NUMBERS = ("lr", "batch_size", "epochs", "seed")
COMPARED = (*NUMBERS, "mode", "method", "dtype", "hidden_dropout_prob", "dropout")
# The first five of them that a run has are the columns with which the table of runs opens.
FIRST_COLUMNS = ("lr", "epochs", "seed", "mode", "method", "batch_size")
MORE_SETTINGS = ("device", "option", "dataset")  # come after them on the page
# The scores that the table of runs shows, by task; a run writes them under the same names.
SCORES = {
    "finetune": ("result/dev_accuracy", "result/test_accuracy"),
    "pretrain": ("result/dev_loss",),
}


class SilentWriter:
    """Takes the place of a `SummaryWriter` in the processes that write nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class RunWriters(NamedTuple):
    """The writers of a run: one for each of its sub-runs.

    TensorBoard draws curves of the same tag into one chart, so both sub-runs name a quantity alike.
    """

    train: "SummaryWriter"
    dev: "SummaryWriter"

    def flush(self) -> None:
        """Write everything to the files."""
        for writer in self:
            writer.flush()

    def close(self) -> None:
        """Write everything to the files and close them; the first error is raised at the end."""
        with ExitStack() as stack:
            for writer in self:
                stack.callback(writer.close)


def open_writers(folder: Path, first_train_step: int, first_dev_step: int) -> RunWriters:
    """Open the TensorBoard files of a run, in the folders `train` and `dev`.

    Args:
        folder: of this run alone; TensorBoard shows its name.
        first_train_step, first_dev_step: TensorBoard hides what an interrupted run wrote there for
            this step and later. Steps count from 1.
    """
    if not is_main_process():
        silent = cast("SummaryWriter", SilentWriter())
        return RunWriters(silent, silent)
    from torch.utils.tensorboard import SummaryWriter

    threading.excepthook = _ignore_os_errors
    train = SummaryWriter(str(folder / "train"), purge_step=purge_step(first_train_step))
    dev = SummaryWriter(str(folder / "dev"), purge_step=purge_step(first_dev_step))
    return RunWriters(train, dev)


def purge_step(first_step: int) -> int | None:
    """Return the purge step of a writer: None for a new run, which has nothing to hide."""
    return first_step if first_step > 1 else None


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


# ------------------------------------------------------------------------------- hyperparameters


def write_hyperparameters(writers: RunWriters, hyperparameters: Mapping[str, str]) -> None:
    """Write the run's settings for the tabs TEXT and HPARAMS."""
    names = sort_settings(hyperparameters)
    rows = [[name, f"`{hyperparameters[name]}`"] for name in names]
    writers.train.add_text("settings", markdown_table([["setting", "value"], *rows]))
    if is_main_process():
        experiment, session_start, _ = hparams_summaries(hyperparameters)
        for summary in (experiment, session_start):
            # Not `add_hparams`, which would write them to a run of their own. They are in `dev`,
            # because the table looks for a run's scores where its settings are.
            cast(Any, writers.dev.file_writer).add_summary(summary)


def write_completion(writers: RunWriters, hyperparameters: Mapping[str, str]) -> None:
    """Tell the tab HPARAMS that the run is complete."""
    if is_main_process():
        session_end = hparams_summaries(hyperparameters)[2]
        cast(Any, writers.dev.file_writer).add_summary(session_end)


def sort_settings(names: Iterable[str]) -> list[str]:
    """Sort the names of settings: those that are compared first, the hashes of files last."""
    order = [*COMPARED, *MORE_SETTINGS]

    def key(name: str) -> tuple[int, str]:
        if name in order:
            return order.index(name), name
        return len(order) + name.startswith("SHA-256"), name

    return sorted(names, key=key)


def hparams_summaries(hyperparameters: Mapping[str, str]) -> tuple[Any, Any, Any]:
    """Return what the tab HPARAMS reads: which columns there are, this run's row, and its end."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    known = dict(hyperparameters)
    if "pooling" in known:  # so the task has methods
        known["method"] = describe_method(hyperparameters)
    values = {name: known[name] for name in COMPARED if name in known}
    row = {name: float(v) if name in NUMBERS else v for name, v in values.items()}
    if row.get("dropout") == "None":
        row["dropout"] = "of the checkpoint"
    scores = SCORES.get(hyperparameters.get("option", ""), ())
    experiment, session_start, session_end = hparams(row, dict.fromkeys(scores, 0.0))
    # The table opens with five columns of settings: those that are marked as different, in
    # alphabetical order.
    data = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(data.content)
    first = [name for name in FIRST_COLUMNS if name in values][:5]
    for info in content.experiment.hparam_infos:
        info.differs = info.name in first
    data.content = content.SerializeToString()
    return experiment, session_start, session_end


def describe_method(hyperparameters: Mapping[str, str]) -> str:
    """Return the flags of a method that differ from the defaults; "plain" if none does."""
    words = []
    for f in fields(MethodOptions):
        value = hyperparameters.get(f.name, str(f.default))
        if value != str(f.default):
            words.append(f"--{f.name}" if value == "True" else f"--{f.name} {value}")
    return " ".join(words) or "plain"


# --------------------------------------------------------------------------------- training steps


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


class PendingStep(NamedTuple):
    """A training step that is not written yet."""

    number: int  # from 0
    loss: StepLoss
    learning_rate: float
    gradient_norm: Tensor | None  # a scalar on the device


class StepLog:
    """The curves that have a point per training step, written a few steps at a time.

    Reading a loss waits for the device, so losses stay there until `STEPS_PER_WRITE` are collected.

    Attributes:
        totals: sums over the steps of this epoch that are written.
        last_loss: the mean loss of the steps that were written last; None before the first.
    """

    STEPS_PER_WRITE = 10

    def __init__(self) -> None:
        self.last_loss: float | None = None
        self.start_epoch()

    def start_epoch(self) -> None:
        """Forget the totals of the previous epoch."""
        self.totals = EpochTotals()
        self.pending: list[PendingStep] = []
        self.last_write = time.perf_counter()

    def add(
        self, step: int, loss: StepLoss, learning_rate: float, gradient_norm: Tensor | None = None
    ) -> None:
        """Collect a step, whose number counts over all epochs, from 0."""
        self.pending.append(PendingStep(step, loss, learning_rate, gradient_norm))

    def is_full(self) -> bool:
        """Return whether it is time to write."""
        return len(self.pending) >= self.STEPS_PER_WRITE

    def write(self, writer: "SummaryWriter") -> None:
        """Write the steps that are collected; a step's point is at the number of steps then done.

        Raises:
            ValueError: a loss is infinite or NaN.
        """
        if not self.pending:
            return
        losses = torch.stack([step.loss.value for step in self.pending]).double()
        if world_size() > 1:
            dist.all_reduce(losses)
        values = losses.tolist()  # waits for the device
        tokens = sum(step.loss.batch.num_tokens for step in self.pending)
        speed = tokens / (time.perf_counter() - self.last_write)
        memory = peak_memory(losses.device)
        for value, (number, loss, learning_rate, norm) in zip(values, self.pending, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"step {number}: the loss is {value} at a learning rate of {learning_rate:.3g} "
                    f"in {loss.batch.describe()}; try a lower --lr"
                )
            self.totals.loss += value * loss.divisor
            self.totals.tokens += loss.batch.num_tokens
            self.totals.padded_tokens += loss.batch.num_padded_tokens
            curves = {"loss": value, "learning_rate": learning_rate, "tokens_per_second": speed}
            if norm is not None:
                curves["gradient_norm"] = norm.item()
            if memory is not None:
                curves["peak_memory"] = memory
            for tag, point in curves.items():
                writer.add_scalar(tag, point, number + 1)
        self.last_loss = sum(values) / len(values)
        self.pending = []
        self.last_write = time.perf_counter()


def peak_memory(device: torch.device) -> float | None:
    """Return the most memory that the process has used so far, in GiB; None if it is not known.

    That is PyTorch's memory on a GPU, else the process's resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
