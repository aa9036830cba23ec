"""Several processes: `torchrun` starts them; in training each computes its own rows of a batch.

PyTorch's DistributedDataParallel (Li et al. 2020, arXiv:2006.15704) averages the gradients. Only
the main process (rank 0) writes files and prints results. With one process nothing is shared or
averaged.
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from beyond.runtime import to_device


def start_processes(use_gpu: bool) -> None:
    """Join the processes that `torchrun` has started, if it has.

    From here on only the main process prints on standard output.
    """
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo")
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends


def end_processes() -> None:
    """Wait until every process has finished, then leave the group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def exit_program(status: int) -> NoReturn:
    """End the program; under `torchrun` without Python's shutdown.

    During the shutdown, a communication thread that waits for the interpreter's lock is killed and
    aborts a process that has already succeeded.
    """
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """Return whether this is the process that writes files and prints."""
    return rank() == 0


def is_lost_process(error: BaseException) -> bool:
    """Return whether an error says that another process is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def gather[T](value: T) -> list[T]:
    """Return the values of all processes, ordered by rank; every process gets the list."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast_object[T](make: Callable[[], T]) -> T:
    """Call `make` in the main process only, and return its result in all processes.

    The other processes may run on machines that do not have the main process's files.
    """
    value: list[Any] = [make() if is_main_process() else None]
    if world_size() > 1:
        dist.broadcast_object_list(value)
    return cast(T, value[0])


def parallelise(model: nn.Module) -> nn.Module:
    """Wrap a model so that gradients are averaged over processes; unchanged for a single process.

    All processes get the main process's weights. From here on each process draws different random
    numbers.
    """
    if world_size() == 1:
        return model
    if not is_main_process():
        torch.manual_seed(torch.initial_seed() + rank())
    return DistributedDataParallel(model)


def backward_in_micro_batches(
    loss_fn: Callable[..., Tensor],
    model: nn.Module,
    tensors: Sequence[Tensor],
    divisor: int,
    micro_batch_size: int | None = None,
) -> Tensor:
    """Add the gradient of a batch's loss to each parameter's `grad`, some rows at a time.

    Each process takes its own rows. The batch was padded as a whole, so a row is the same wherever
    it is computed.

    Args:
        loss_fn: called with the model and some rows of each tensor; returns the sum of their
            losses.
        model: as `parallelise` returned it.
        tensors: the batch, with its rows on the first axis; the same in all processes.
        divisor: the sum of the losses is divided by it.
        micro_batch_size: rows that are computed at a time; None: all of them.

    Returns:
        This process's part of the batch's loss, a scalar without a graph.
    """
    device = next(model.parameters()).device
    rows = [tensor[rank() :: world_size()] for tensor in tensors]
    weight = world_size()  # turns the mean of the processes' gradients into their sum
    if len(rows[0]) == 0:
        # Fewer rows than processes, but every process has to take part in the averaging: run one
        # dummy row with weight 0.
        rows, weight = [tensor[:1] for tensor in tensors], 0
    parts = list(zip(*(x.split(micro_batch_size or len(x)) for x in rows), strict=True))
    total = torch.zeros((), device=device)
    for number, part in enumerate(parts, start=1):
        delay_averaging = isinstance(model, DistributedDataParallel) and number < len(parts)
        with model.no_sync() if delay_averaging else nullcontext():  # type: ignore[operator]
            loss = loss_fn(model, *(to_device(x, device) for x in part)) / divisor
            (loss * weight).backward()
        if weight:
            total += loss.detach()
    return total


def progress(batches: Iterable[Any], **options: Any) -> tqdm:
    """Return the batches with a progress bar on standard error, in the main process."""
    return tqdm(batches, leave=False, disable=not is_main_process(), **options)
