"""A training run that can be interrupted between any two steps, and resumed bit for bit.

Its training checkpoint lies beside its result, in `<filepath>.state`. It is written after every
`save_every` steps or after each epoch, and when a signal asks the program to end.
"""

import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from base_llama import is_dense_float, load_safely, write_checkpoint
from beyond.batches import Loader, TrainingBatch
from beyond.interrupts import Interrupted, signals_wait, stop_if_asked
from beyond.logs import (
    EpochTotals,
    RunWriters,
    StepLog,
    StepLoss,
    open_writers,
    write_hyperparameters,
)
from beyond.options import RunOptions
from beyond.processes import (
    backward_in_micro_batches,
    broadcast_object,
    gather,
    is_main_process,
    parallelise,
    progress,
    rank,
)
from beyond.runtime import Runtime, ThreadWatch
from utils import LARGEST_INT, fingerprint, remove_leftovers


@dataclass(frozen=True)
class Position:
    """How far a run has come: `step` steps of epoch `epoch` are done. Both count from 0."""

    epoch: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        if not all(0 <= number <= LARGEST_INT for number in (self.epoch, self.step)):
            raise ValueError(f"there is no step {self.step} of epoch {self.epoch}")


class TrainingRun[B: TrainingBatch]:
    """The state of a training run, and its loops over epochs and batches.

    `start_run` makes one.

    Args:
        model: what is trained.
        optimizer: of the model's parameters, with the state of this project's `AdamW`.
        loader: the batches of an epoch, in a new order for each.
        generator: the loader's source of randomness.
        options: how many epochs, where the result is, when to save, and what identifies the run.

    Attributes:
        position: how far the run has come.
        best: the best score so far, or None.
        best_epoch: the epoch that has it, or None.
        started, epoch_started: when this process began the run and its current epoch, in seconds.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loader: Loader[B],
        generator: torch.Generator,
        options: RunOptions,
    ) -> None:
        self.model = model
        self.parallel_model = parallelise(model)
        self.optimizer = optimizer
        self.loader = loader
        self.generator = generator
        self.options = options
        self.position = Position()
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.started = self.epoch_started = time.perf_counter()
        self.step_log = StepLog()
        on_cpu = next(model.parameters()).device.type == "cpu"
        self.thread_watch = ThreadWatch(enabled=on_cpu and is_main_process())
        self.log_name = f"{Path(options.filepath).stem}-{datetime.now():%Y%m%d-%H%M%S}"
        self.epoch_start_generator_state = generator.get_state()
        # The random state to continue from at `position`; None: PyTorch's current state.
        self.random_state: dict[str, Any] | None = None

    @property
    def step(self) -> int:
        """The number of steps that are done in all epochs."""
        return self.position.epoch * len(self.loader) + self.position.step

    @property
    def total_steps(self) -> int:
        """The number of steps of all epochs."""
        return self.options.epochs * len(self.loader)

    @property
    def has_patience(self) -> bool:
        """Return whether training should go on, by early stopping.

        It ends after `patience` epochs in a row without a better accuracy on dev; the best epoch is
        kept in any case (Goodfellow, Bengio & Courville 2016, "Deep Learning", Algorithm 7.1, with
        an evaluation after each epoch). A patience of 0 never ends it.
        """
        patience, best = self.options.patience, self.best_epoch
        return not patience or best is None or self.position.epoch - 1 - best < patience

    @property
    def log_folder(self) -> Path:
        """The folder of this run's TensorBoard files."""
        return self.options.log_folder / self.log_name

    @cached_property
    def writers(self) -> RunWriters:
        """TensorBoard's writers; opened at their first use, which comes after resuming."""
        # The evaluation after an epoch's last step is repeated if the run was saved before it.
        is_before_evaluation = self.position.step == len(self.loader)
        first_dev_step = self.step if is_before_evaluation else self.step + 1
        return open_writers(self.log_folder, self.step + 1, first_dev_step)

    @property
    def is_best_epoch(self) -> bool:
        """Return whether the current epoch is the best so far."""
        return self.best_epoch == self.position.epoch

    @property
    def best_step(self) -> int:
        """The number of steps at the end of the best epoch, or so far if that is not known."""
        return self.step if self.best_epoch is None else (self.best_epoch + 1) * len(self.loader)

    @contextmanager
    def logging(self) -> Iterator[RunWriters]:
        """Open TensorBoard's writers, and close them at the end of the block.

        Signals wait in the block, since they would disturb the writers.
        """
        with signals_wait(), closing(self.writers):
            try:
                yield self.writers
            finally:
                vars(self).pop("writers", None)

    def epochs(self) -> Iterator[int]:
        """Yield the epochs that are still to do, from the current one on."""
        while self.position.epoch < self.options.epochs and self.has_patience:
            self.epoch_started = time.perf_counter()
            yield self.position.epoch
            self.position = Position(self.position.epoch + 1)
            self.epoch_start_generator_state = self.generator.get_state()
            self.random_state = None
            self.step_log.write(self.writers.train)
            self.step_log.start_epoch()
            is_last = self.position.epoch == self.options.epochs or not self.has_patience
            if self.options.save_every is None or is_last:
                self.save()
        if self.position.epoch < self.options.epochs:
            print(f"stop: none of the last {self.options.patience} epochs was the best on dev")

    def batches(self) -> Iterator[B]:
        """Yield the batches of the epoch that are still to do.

        A batch counts as done when the next one is asked for. After each, the run may be saved and
        interrupted.
        """
        self.parallel_model.train()
        # Making the iterator may draw from PyTorch's global generator. A run that is resumed at an
        # epoch's start repeats that draw, so the saved random state is set before it. A run that
        # is resumed in mid-epoch was saved after that draw, so the state is set after it.
        if self.position.step == 0:
            self._restore_random_state()
        batches = iter(self.loader)
        for _ in itertools.islice(batches, self.position.step):
            pass
        self._restore_random_state()
        epoch, done = self.position.epoch, self.position.step
        self.thread_watch.restart()
        bar = progress(batches, desc=f"train-{epoch}", total=len(self.loader), initial=done)
        for batch in bar:
            yield batch
            if self.step_log.last_loss is not None:
                bar.set_postfix_str(f"loss {self.step_log.last_loss:.3f}", refresh=False)
            self.position = Position(epoch, self.position.step + 1)
            self.thread_watch.step()
            if self.options.save_every and self.step % self.options.save_every == 0:
                self.save()
            stop_if_asked()
        # If the evaluation that follows is interrupted, the saved run repeats it from this state.
        self.random_state = get_random_state()

    def _restore_random_state(self) -> None:
        if self.random_state is not None:
            set_random_state(self.random_state)
            self.random_state = None

    def backward(self, loss_fn: Callable[..., Tensor], batch: B, divisor: int) -> StepLoss:
        """Add the gradient of a batch's loss to each parameter's `grad`.

        With one process and without micro-batches this is
        `(loss_fn(model, *batch.tensors) / divisor).backward()`.

        Args:
            loss_fn: returns the sum of the losses of some rows, as a scalar.
            batch: the current batch.
            divisor: the sum of all rows' losses is divided by it.
        """
        value = backward_in_micro_batches(
            loss_fn, self.parallel_model, batch.tensors, divisor, self.options.micro_batch_size
        )
        return StepLoss(value, divisor, batch)

    def log(self, loss: StepLoss, gradient_norm: Tensor | None = None) -> None:
        """Collect the loss of a step; every few steps, write the collected losses to TensorBoard.

        Args:
            loss: as `backward` returned it.
            gradient_norm: of all parameters together; computed here unless given.

        Raises:
            ValueError: one of the last losses is infinite or NaN.
        """
        if gradient_norm is None and is_main_process():
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            gradient_norm = nn.utils.get_total_norm(gradients)
        rate = self.optimizer.param_groups[0]["lr"]
        self.step_log.add(self.step, loss, rate, gradient_norm)
        if self.step_log.is_full():
            self.step_log.write(self.writers.train)

    def epoch_totals(self) -> EpochTotals:
        """Return the sums over the steps of this epoch.

        Raises:
            ValueError: one of the last losses is infinite or NaN.
        """
        self.step_log.write(self.writers.train)
        return self.step_log.totals

    def is_best(self, score: float) -> bool:
        """Return whether an epoch's score is the highest so far, and remember it if it is."""
        if self.best is not None and score <= self.best:
            return False
        self.best, self.best_epoch = score, self.position.epoch
        return True

    def save(self) -> None:
        """Write the training checkpoint, completely or not at all.

        Raises:
            ValueError: a loss or a weight is infinite or NaN; the last good checkpoint stays.
        """
        self.step_log.write(self.writers.train)
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise ValueError(
                f"step {self.step - 1}: made weights that are infinite or NaN; try a lower --lr"
            )
        state = self.state_dict()  # all processes take part
        if is_main_process():
            write_checkpoint(self.options.training_checkpoint, state)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_state_dict` resumes the run."""
        return {
            "hyperparameters": dict(self.options.hyperparameters),
            "position": asdict(self.position),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "totals": asdict(self.step_log.totals),
            "order": self.epoch_start_generator_state,
            "random": gather(self.random_state or get_random_state()),  # by rank
            "log": self.log_name,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            Exception: of any kind, since a file may hold anything; `resume` catches it.
        """
        position, totals = state["position"], state["totals"]
        self.position = Position(int(position["epoch"]), int(position["step"]))
        self.step_log.totals = EpochTotals(*(float(totals[f.name]) for f in fields(EpochTotals)))
        self.best = None if state["best"] is None else float(state["best"])
        if self.best is not None and is_main_process() and not Path(self.options.filepath).exists():
            raise ValueError(f"{self.options.filepath}, the best epoch's result, is missing")
        # An earlier version did not save it.
        self.best_epoch = None if state["best_epoch"] is None else int(state["best_epoch"])
        if self.best_epoch is not None and not 0 <= self.best_epoch <= self.position.epoch:
            raise ValueError(f"epoch {self.best_epoch} cannot be the best one so far")
        self.epoch_start_generator_state = state["order"]
        self.generator.set_state(self.epoch_start_generator_state)
        # None if the saved run had fewer processes: this one keeps its own random state.
        self.random_state = dict(enumerate(state["random"])).get(rank())
        if self.random_state is not None:
            set_random_state(self.random_state)  # raises if it is not valid
        # The log's name is checked exactly: with "../" in it, it would lead to another folder.
        stem = re.escape(Path(self.options.filepath).stem)
        if not re.fullmatch(rf"{stem}-[0-9]{{8}}-[0-9]{{6}}", state["log"]):
            raise ValueError(f"{state['log']!r} is not a log of this run")
        self.log_name = state["log"]
        for name, tensor in self.model.state_dict().items():
            check_fit(state["model"][name], tensor, name)
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])


@contextmanager
def start_run[B: TrainingBatch](
    model: nn.Module,
    optimizer: Optimizer,
    make_loader: Callable[[int, torch.Generator], Loader[B]],
    options: RunOptions,
    runtime: Runtime,
) -> Iterator[TrainingRun[B]]:
    """Start a training run, or resume it if the options say so.

    In the context signals wait until a step is complete; then the run is saved and `Interrupted`
    is raised.

    Args:
        model, optimizer: what is trained, and how.
        make_loader: called with the batch size and a source of randomness.
        options: of the run.
        runtime: recorded with the hyperparameters.

    Raises:
        FileNotFoundError, ValueError: there is no training checkpoint to resume from, or it is the
            one of another run.
    """
    hashes = {f"SHA-256 of {path}": fingerprint(path) for path in options.input_files}
    known = {**options.hyperparameters, **runtime.hyperparameters(), **hashes}
    generator = torch.Generator().manual_seed(options.seed)
    loader = make_loader(options.batch_size, generator)
    run = TrainingRun(model, optimizer, loader, generator, replace(options, hyperparameters=known))
    if options.resume:
        resume(run)
    with run.logging() as writers:
        write_hyperparameters(writers, known)
        try:
            yield run
        except Interrupted:
            run.save()
            raise


def resume(run: TrainingRun[Any]) -> None:
    """Load the training checkpoint of an interrupted run.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is the one of another run.
    """
    path = run.options.training_checkpoint
    state = broadcast_object(lambda: read_training_checkpoint(path, run.options.hyperparameters))
    try:
        run.load_state_dict(state)
    except Exception as error:  # anything may be wrong in a file that somebody has changed
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot resume: {reason}") from None
    if is_main_process():
        for output in (str(path), *run.options.output_files):
            remove_leftovers(output)


def read_training_checkpoint(path: Path, hyperparameters: Mapping[str, str]) -> dict[str, Any]:
    """Read the training checkpoint of a run with these hyperparameters.

    Raises:
        FileNotFoundError, ValueError: there is no file, or it is not a training checkpoint, or it
            is the one of another run.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: there is no training checkpoint; start without --resume (it is deleted once "
            "a run is complete)"
        )
    state = load_safely(path)
    saved = state.get("hyperparameters") if isinstance(state, dict) else None
    if not isinstance(saved, dict):
        if isinstance(state, dict) and "settings" in state:
            raise ValueError(
                f"{path}: an earlier version of this program wrote this training checkpoint; "
                "finish the run with that version, or delete the file and start again"
            )
        raise ValueError(f"{path}: is not a training checkpoint")
    check_hyperparameters(saved, hyperparameters, path)
    return state


def check_hyperparameters(
    saved: Mapping[Any, Any], hyperparameters: Mapping[str, str], path: Path
) -> None:
    """Raise ValueError unless the run that wrote `path` has these hyperparameters.

    The message names those that differ.
    """
    different = [
        f"{name}={saved.get(name)}, now {hyperparameters.get(name)}"
        for name in sorted(saved.keys() | hyperparameters.keys(), key=str)
        if str(saved.get(name)) != str(hyperparameters.get(name))
    ]
    if different:
        raise ValueError(
            f"--resume: {path} belongs to a run with other settings: {'; '.join(different)}"
        )


def remove_training_checkpoint(path: Path) -> None:
    """Delete the training checkpoint of a complete run."""
    if is_main_process():
        path.unlink(missing_ok=True)


def get_random_state() -> dict[str, Any]:
    """Return the states of PyTorch's global generators, the only ones that training draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the states that `get_random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def load_optimizer_state(optimizer: Optimizer, states: Mapping[int, Any]) -> None:
    """Load steps and moments by parameter number; everything else is a hyperparameter.

    Raises:
        ValueError: they do not fit the parameters.
    """
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    checked = {}
    for number, state in states.items():
        for key in ("exp_avg", "exp_avg_sq"):
            check_fit(state[key], parameters[number], f"{key} of parameter {number}")
        if type(state["step"]) is not int or not 1 <= state["step"] <= LARGEST_INT:
            raise ValueError(f"the optimizer's step {state['step']!r} is not a number of steps")
        # An expanded tensor has several elements in one place in memory; contiguous() gives each
        # its own, since the optimizer changes them one by one.
        moments = {key: state[key].contiguous() for key in ("exp_avg", "exp_avg_sq")}
        checked[number] = {"step": state["step"], **moments}
    optimizer.load_state_dict({"state": checked, "param_groups": groups})


def check_fit(value: object, expected: Tensor, name: str) -> None:
    """Raise ValueError unless a value of a file is a tensor of the expected shape."""
    if not is_dense_float(value):
        raise ValueError(f"{name} is not a tensor of floating-point numbers")
    shape, expected_shape = tuple(cast(Tensor, value).shape), tuple(expected.shape)
    if shape != expected_shape:
        raise ValueError(f"{name} has shape {shape}, expected {expected_shape}")
