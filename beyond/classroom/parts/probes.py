"""Helpers of the probes: fixed inputs, weights, and the pattern of a dropout."""

import inspect
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor, nn

from beyond.classroom.part import Mistake, Observed, Subject, Variant, expect_tensor

FAILED = torch.empty(0)  # what is observed of a probe that raised an error


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Draw normally distributed numbers, always the same for the same arguments."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill[M: nn.Module](module: M, scale: float, seed: int = 7) -> M:
    """Give a module fixed random weights, matrices around 0 and gains around 1; in eval mode."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            center = 1.0 if parameter.dim() < 2 else 0.0
            parameter.copy_(center + normal(*parameter.shape, seed=seed + number, scale=scale))
    return module.eval()


def attempt(function: Callable[[], object], what: str) -> Tensor:
    """Return the tensor that a function returns, or FAILED if it raises an error.

    For inputs that some students never meet. NotImplementedError is raised, as it means todo.
    """
    try:
        return expect_tensor(function(), what)
    except NotImplementedError:
        raise
    except Exception:
        return FAILED


def dropout_pattern(
    name: str, found: Tensor, kept: Tensor, rate: float, copies: int = 1
) -> dict[str, Observed]:
    """Describe how a dropout changed a tensor, whatever random numbers it used.

    Args:
        name: begins the names of the probes.
        found: the tensor after a dropout.
        kept: the same tensor without dropout.
        rate: the probability that an element is set to zero.
        copies: number of equal blocks in the last axis of `kept`.

    Returns:
        Five statements, each 0 or 1. A right dropout has its share of zeros within 6 standard
        deviations of the rate, or it is reported by mistake once in 500 million times.
    """
    names = (
        "some elements are set to zero",
        f"a share of {rate:g} is set to zero",
        f"the others are divided by {1 - rate:g}",
        "the others are as they were",
        "equal elements are treated alike",
    )
    if found.shape != kept.shape:
        return {f"{name}: {statement}": Observed(FAILED, 1e-3) for statement in names}
    is_used = kept.abs() > 1e-6
    ratios = torch.where(is_used, found / kept, 0.0)
    is_zero = (ratios.abs() < 1e-3)[is_used]
    others = ratios[is_used][~is_zero]
    bound = 6 * (rate * (1 - rate) / max(1, is_used.sum().item() // copies)) ** 0.5
    blocks = ratios.unflatten(-1, (copies, -1))
    values = (
        bool(is_zero.any()),
        abs(is_zero.float().mean().item() - rate) < bound,
        bool(((others - 1 / (1 - rate)).abs() < 1e-3).all()),
        bool(((others - 1).abs() < 1e-3).all()),
        bool(((blocks - blocks[..., :1, :]).abs() < 1e-3).all()),
    )
    return {
        f"{name}: {statement}": Observed(torch.tensor(float(value)), 1e-3)
        for statement, value in zip(names, values, strict=True)
    }


def keep_changes[**P](make: Callable[P, Subject]) -> Callable[P, Subject]:
    """Let a function that makes variants of its arguments keep these with each of them.

    So two variants that change different things can be combined.
    """

    @wraps(make)
    def wrapper(*args: P.args, **changes: P.kwargs) -> Subject:
        subject = make(*args, **changes)
        subject.changes = inspect.signature(make).bind(*args, **changes).arguments
        return subject

    return wrapper


def entry(
    subject: Subject,
    where: str,
    name: str,
    why: str,
    seen: str = "",
    is_edition: bool = False,
    is_note: bool = False,
    others: tuple[Subject, ...] = (),
) -> Variant:
    """Make an entry of the catalogue."""
    return Variant(Mistake(name, where, why, seen, is_edition, is_note), subject, others)
