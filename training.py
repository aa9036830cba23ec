"""What a training run needs beside its loss: many processes, signals, states to go on from, logs.

Fine-tuning and pretraining share it. In one process without signals all of it is as if not there.

Many processes: `torchrun` starts them, each sees every batch and computes its own rows of it, and
PyTorch's DistributedDataParallel (Li et al. 2020, arXiv:2006.15704) adds up the gradients. What is
written, printed or logged, the first process does alone.
"""

import itertools
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm import tqdm

from base_llama import is_plain, load_safely, write_checkpoint
from utils import LARGEST_INT, remove_leftovers, to_device

if TYPE_CHECKING:  # imported where it is used: it takes a second
    from torch.utils.tensorboard import SummaryWriter

SIGNALS = (signal.SIGINT, signal.SIGTERM)


# ----------------------------------------------------------------------------------- processes


def start_processes(use_gpu: bool) -> None:
    """Join the processes that `torchrun` has started; without it, there is one.

    All but the first print nothing from here on.
    """
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo")
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends


def end_processes() -> None:
    """Leave the group, once all have come to their ends."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End the program; one of several processes without Python's clean-up.

    In it a thread of the group that asks for the interpreter's lock is unwound, and aborts the
    process although all its work is done and written.
    """
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of the processes this one is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def gather[T](value: T) -> list[T]:
    """What all processes give, in their order, in all of them."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def from_first[T](make: Callable[[], T]) -> T:
    """What the first process makes, in all of them: the others may not see its files."""
    value: list[Any] = [make() if is_first() else None]
    if world_size() > 1:
        dist.broadcast_object_list(value)
    return cast(T, value[0])


def parallelise(model: nn.Module) -> nn.Module:
    """The model whose gradients are the mean of all processes'; itself where there is one.

    The first one's weights become all others'. From here on each draws other random numbers.
    """
    if world_size() == 1:
        return model
    if not is_first():
        torch.manual_seed(torch.initial_seed() + rank())
    return DistributedDataParallel(model)


def accumulate(
    loss_of: Callable[..., Tensor],
    model: nn.Module,
    batch: Sequence[Tensor],
    divisor: int,
    micro_batch_size: int | None,
    device: torch.device,
) -> Tensor:
    """Add the gradients of a batch's loss to the parameters', a few rows at a time.

    Each process takes its own rows; the batch was padded as a whole, so that a row is the same
    wherever it is computed.

    Args:
        loss_of: the sum of the losses of some rows.
        model: what `loss_of` calls, as `parallelise` returned it.
        batch: tensors with the rows on their first axis, the same in all processes.
        divisor: by what the sum is divided.
        micro_batch_size: rows at a time; None: all of them.
        device: where to compute.

    Returns:
        This process's part of the batch's loss, without a graph.
    """
    rows = [x[rank() :: world_size()] for x in batch]
    weight = world_size()  # the mean of the processes' gradients becomes their sum
    if len(rows[0]) == 0:  # fewer rows than processes; all have to take part, so one for nothing
        rows, weight = [x[:1] for x in batch], 0
    parts = list(zip(*(x.split(micro_batch_size or len(x)) for x in rows), strict=True))
    total = torch.zeros((), device=device)
    for number, part in enumerate(parts, start=1):
        alone = isinstance(model, DistributedDataParallel) and number < len(parts)
        with model.no_sync() if alone else nullcontext():  # type: ignore[operator]
            loss = loss_of(*(to_device(x, device) for x in part)) / divisor
            (loss * weight).backward()
        if weight:
            total += loss.detach()
    return total


def progress[T](batches: Iterable[T], **options: Any) -> Iterable[T]:
    """A progress bar on standard error, of the first process."""
    return tqdm(batches, leave=False, disable=not is_first(), **options)


def own_batches[T](batches: Iterable[T]) -> Iterator[T]:
    """This process's batches of an evaluation; stops between them, if asked."""
    for i, batch in enumerate(progress(batches, desc="eval")):
        if i % world_size() == 0:
            stop_if_asked()
        if i % world_size() == rank():
            yield batch


# ------------------------------------------------------------------------------------- signals


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM asked the program to end.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


_received: list[int] = []  # signals that are held back


@contextmanager
def _handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Let SIGINT and SIGTERM call `handler` in the block, unless they are ignored."""
    if threading.current_thread() is not threading.main_thread():  # signals are that thread's
        yield
        return
    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _raise(number: int, _: object) -> None:
    raise Interrupted(number)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise `Interrupted` wherever the program is."""
    with _handling(_raise):
        yield


@contextmanager
def signals_wait() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait for `stop_if_asked`, or for the end of the block.

    Not only steps are to be whole: TensorBoard's writer hands its events to a thread, and an
    exception in the middle of that leaves it asleep, with the writer's end waiting for it for ever.
    """
    try:
        with _handling(lambda number, _: _received.append(number)):
            yield
        if _received:
            raise Interrupted(_received[0])
    finally:
        _received.clear()


def stop_if_asked() -> None:
    """Raise `Interrupted`, in all processes, if a signal waits in any.

    All of them have to call it at the same point.
    """
    number = torch.tensor(max(_received, default=0))
    if world_size() > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    if number:
        raise Interrupted(int(number))


# --------------------------------------------------------------------------------- TensorBoard


class SilentLog:
    """Takes the place of a `SummaryWriter` where nothing is to be written."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def open_log(folder: Path, settings: Mapping[str, object], step: int) -> "SummaryWriter":
    """A run in TensorBoard, with its settings.

    Args:
        folder: the run's own; its name is the run's.
        settings: names and values.
        step: where it begins; what it holds from there on is replaced.
    """
    if not is_first():
        return cast("SummaryWriter", SilentLog())
    from torch.utils.tensorboard import SummaryWriter

    threading.excepthook = _leave_to_main_thread
    log = SummaryWriter(str(folder), purge_step=step or None)
    rows = [[name, f"`{value}`"] for name, value in sorted(settings.items())]
    log.add_text("settings", markdown_table([["setting", "value"], *rows]))
    return log


def _leave_to_main_thread(failure: threading.ExceptHookArgs) -> None:
    """Say nothing of a full disk: the writer's thread ends by it, and its next user is told."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def markdown_table(rows: Sequence[Sequence[object]]) -> str:
    """Rows as a Markdown table; the first one is the head."""
    lines = [
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


class StepLog:
    """The curves that have a point per training step, written a few steps at a time.

    Reading a loss waits for the device, so losses are left there until `EVERY` have come together.

    Args:
        log: where they go.
        optimizer: whose learning rate is logged.

    Attributes:
        step: number of the next step to be written.
        totals: of the epoch: "loss" (undivided), "tokens" (without padding), "cells" (with it).

    Raises:
        ValueError: by any method: a loss is infinite or NaN.
    """

    EVERY = 10  # steps

    def __init__(self, log: "SummaryWriter", optimizer: Optimizer) -> None:
        self.log = log
        self.optimizer = optimizer
        self.step = 0
        self.start_epoch()

    def start_epoch(self) -> None:
        """Forget the totals of the one before."""
        self.totals = {"loss": 0.0, "tokens": 0.0, "cells": 0.0}
        self.start_window()

    def start_window(self) -> None:
        """Forget the steps that are written."""
        self.losses: list[Tensor] = []
        self.divisors: list[int] = []
        self.rates: list[float] = []
        self.sources: list[Callable[[], str]] = []
        self.tokens = 0
        self.start = time.perf_counter()

    def add(
        self, loss: Tensor, divisor: int, tokens: int, cells: int, source: Callable[[], str]
    ) -> None:
        """Count a step.

        Args:
            loss: this process's part of what was minimised.
            divisor: by what the sum of the step's losses was divided.
            tokens: that the step saw, in all processes, padding not counted.
            cells: the same with padding.
            source: says what the batch is made of, should its loss be no number.
        """
        self.losses.append(loss.detach())
        self.divisors.append(divisor)
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.sources.append(source)
        self.tokens += tokens
        self.totals["tokens"] += tokens
        self.totals["cells"] += cells
        if len(self.losses) == self.EVERY:
            self.write()

    def write(self) -> None:
        """Write what has come together."""
        if not self.losses:
            return
        losses = torch.stack(self.losses).double()
        if world_size() > 1:
            dist.all_reduce(losses)
        values = losses.tolist()  # waits for the device
        speed = self.tokens / (time.perf_counter() - self.start)
        for i, (loss, rate) in enumerate(zip(values, self.rates, strict=True)):
            if not math.isfinite(loss):
                raise ValueError(
                    f"step {self.step}: the loss is {loss} at a learning rate of {rate:.3g} in "
                    f"{self.sources[i]()}; try a lower --lr"
                )
            self.totals["loss"] += loss * self.divisors[i]
            self.log.add_scalar("step/loss", loss, self.step)
            self.log.add_scalar("step/learning_rate", rate, self.step)
            self.log.add_scalar("step/tokens_per_second", speed, self.step)
            self.step += 1
        self.start_window()

    def loss_sum(self) -> float:
        """The sum of the epoch's losses, undivided."""
        self.write()
        return self.totals["loss"]


# -------------------------------------------------------------------------------------- states


def random_states() -> dict[str, Any]:
    """The states of all global sources of random numbers, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.tensor(keys.tolist()), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Go on with what `random_states` returned."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys.tolist(), dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def state_path(filepath: str | Path) -> Path:
    """Where a run keeps its state, beside its result."""
    return Path(f"{filepath}.state")


class TrainingRun:
    """A training run that can be interrupted between any two steps, and gone on with.

    Used as a context, in which signals wait: an interrupt saves the state and then raises
    `Interrupted`. The state is also saved after every `save_every` steps, or after each epoch. A
    run that goes on computes bit by bit what it would have computed.

    Args:
        model: what is trained.
        optimizer: with the state per parameter of this project's `AdamW`.
        shuffle: source of the data's order.
        filepath: of the run's result; the state is kept beside it.
        settings: names and values of what makes the run what it is; no state of another is taken.
        epochs: how many there are.
        save_every: steps; None: after each epoch.
        log_folder: where TensorBoard finds the runs.
        resume: whether to go on from the state.

    Attributes:
        epoch: the current one, from 0.
        done: its steps that are done.
        best: the score of the best epoch so far, or None.
        log, steps: TensorBoard's writer, and the curves of each step; inside the context.

    Raises:
        FileNotFoundError, ValueError: there is no state to go on from, or it is another run's.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        shuffle: torch.Generator,
        filepath: str | Path,
        settings: Mapping[str, str],
        epochs: int,
        save_every: int | None,
        log_folder: Path,
        resume: bool,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.shuffle = shuffle
        self.filepath = filepath
        self.path = state_path(filepath)
        self.settings = settings
        self.last_epoch = epochs
        self.save_every = save_every
        self.epoch = self.done = self.step = 0
        self.best: float | None = None
        self.order = shuffle.get_state()  # at the start of the epoch
        self.random: dict[str, Any] | None = None  # after the last step of the epoch
        self.restored: dict[str, Any] | None = None  # to be set before the next step
        self.totals: dict[str, float] | None = None  # of the steps that are done
        self.log_folder = log_folder / f"{Path(filepath).stem}-{datetime.now():%Y%m%d-%H%M%S}"
        if resume:
            self.restore(from_first(lambda: read_state(self.path, settings)))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `save` has written."""
        try:
            self.epoch, self.done, self.step = (int(state[k]) for k in ("epoch", "done", "step"))
            places = (self.epoch, self.done, self.step)
            if not all(0 <= place <= LARGEST_INT for place in places):
                raise ValueError("no such step")
            self.best = state["best"] if state["best"] is None else float(state["best"])
            if self.best is not None and is_first() and not Path(self.filepath).exists():
                raise ValueError(f"{self.filepath}, the best epoch's result, is gone")
            self.totals = {key: float(state["totals"][key]) for key in ("loss", "tokens", "cells")}
            self.order = state["order"]
            self.shuffle.set_state(self.order)
            self.restored = dict(enumerate(state["random"])).get(rank())
            if self.restored:
                set_random_states(self.restored)
            if not state["log"].startswith(f"{Path(self.filepath).stem}-"):
                raise ValueError("no log of this run")
            self.log_folder = self.log_folder.with_name(state["log"])
            for name, tensor in self.model.state_dict().items():
                check_fit(state["model"][name], tensor)
            self.model.load_state_dict(state["model"])
            self.restore_optimizer(state["optimizer"])
        except Exception as error:  # anything may be wrong in a file that somebody has changed
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.path}: is no state of this run: {reason}") from None
        if is_first():
            remove_leftovers(self.path)
            remove_leftovers(self.filepath)

    def restore_optimizer(self, states: Mapping[int, Any]) -> None:
        """Take over steps and moments, by number of the parameter; all else is a setting."""
        groups = self.optimizer.state_dict()["param_groups"]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        checked = {}
        for number, own in states.items():
            for key in ("exp_avg", "exp_avg_sq"):
                check_fit(own[key], parameters[number])
            if type(own["step"]) is not int or not 1 <= own["step"] <= LARGEST_INT:
                raise ValueError("the optimizer has taken no such step")
            checked[number] = {
                "step": own["step"],
                "exp_avg": own["exp_avg"].contiguous(),  # and so not one number in many places
                "exp_avg_sq": own["exp_avg_sq"].contiguous(),
            }
        self.optimizer.load_state_dict({"state": checked, "param_groups": groups})

    def __enter__(self) -> "TrainingRun":
        with ExitStack() as stack:
            stack.enter_context(signals_wait())
            self.log = open_log(self.log_folder, self.settings, self.step)
            stack.callback(self.log.close)
            self.steps = StepLog(self.log, self.optimizer)
            self.steps.step = self.step
            self.steps.totals = self.totals or self.steps.totals
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        with self.stack:
            if kind is not None and issubclass(kind, Interrupted):
                self.save()

    def epochs(self) -> Iterator[int]:
        """The epochs that are left to do, from the current one on."""
        while self.epoch < self.last_epoch:
            yield self.epoch
            self.epoch, self.done, self.random = self.epoch + 1, 0, None
            self.order = self.shuffle.get_state()
            self.steps.start_epoch()
            if self.save_every is None or self.epoch == self.last_epoch:
                self.save()

    def batches[T](self, batches: Iterable[T]) -> Iterator[T]:
        """The batches of the epoch that are left to do; each is done when the next is asked for."""
        if not self.done:
            self.restore_random()
        iterator = iter(batches)  # may draw a random number
        for _ in itertools.islice(iterator, self.done):
            pass
        self.restore_random()
        for batch in iterator:
            yield batch
            self.done += 1
            self.step += 1
            if self.save_every and self.step % self.save_every == 0:
                self.save()
            stop_if_asked()
        self.random = random_states()  # since what follows may draw some, and be interrupted

    def restore_random(self) -> None:
        """Before the first step after an interruption, set the random states it had left."""
        if self.restored:
            set_random_states(self.restored)
            self.restored = None

    def save(self) -> None:
        """Write the state, whole or not at all.

        Raises:
            ValueError: a loss or a weight is no number; the last good state stays.
        """
        self.steps.write()
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise ValueError(f"step {self.step - 1}: made weights that are NaN; try a lower --lr")
        states = gather(self.random or random_states())
        if is_first():
            state = {
                "settings": dict(self.settings),
                "epoch": self.epoch,
                "done": self.done,
                "step": self.step,
                "best": self.best,
                "totals": self.steps.totals,
                "order": self.order,
                "random": states,
                "log": self.log_folder.name,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict()["state"],
            }
            write_checkpoint(self.path, state)


def read_state(path: Path, settings: Mapping[str, str]) -> dict[str, Any]:
    """The state of a run with these settings.

    Raises:
        FileNotFoundError, ValueError: there is none, or the file holds another run's or none.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: there is no such state; start without --resume (a run's state is gone once "
            "the run is complete)"
        )
    state = load_safely(path)
    saved = state.get("settings") if isinstance(state, dict) else None
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: is no state of a training run")
    check_settings(saved, settings, path)
    return state


def check_fit(tensor: object, like: Tensor) -> None:
    """Raise ValueError unless a tensor of a file can take the place of another."""
    if not is_plain(tensor) or cast(Tensor, tensor).shape != like.shape:
        raise ValueError("a tensor is none, or of another shape")


def check_settings(saved: Mapping[Any, Any], settings: Mapping[str, str], path: Path) -> None:
    """Raise unless what was saved in `path` is of a run with these settings.

    Raises:
        ValueError: names the settings that differ.
    """
    others = [
        f"{name}={saved.get(name)}, now {settings.get(name)}"
        for name in sorted(saved.keys() | settings.keys(), key=str)
        if str(saved.get(name)) != str(settings.get(name))
    ]
    if others:
        raise ValueError(f"--resume: {path} is of a run with other settings: {'; '.join(others)}")
