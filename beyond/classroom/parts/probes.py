"""Helpers of the probes: fixed inputs, weights, the pattern of a dropout, and gradients."""

import inspect
from collections.abc import Callable
from functools import partial, wraps

import torch
from torch import Tensor, nn

from beyond.classroom.part import Mistake, Observed, Subject, Variant, expect_tensor

STEP = 1e-3  # of a difference
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
        is_zero.float().mean().item() > 0.05,  # a few are zero by chance, or sums of zeros
        abs(is_zero.float().mean().item() - rate) < bound,
        bool(((others - 1 / (1 - rate)).abs() < 1e-3).all()),
        bool(((others - 1).abs() < 1e-3).all()),
        bool(((blocks - blocks[..., :1, :]).abs() < 1e-3).all()),
    )
    return {
        f"{name}: {statement}": Observed(torch.tensor(float(value)), 1e-3)
        for statement, value in zip(names, values, strict=True)
    }


def slope_of(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute the derivatives of a loss at x along two fixed directions, by central differences."""
    slopes = []
    for direction in (normal(*x.shape, seed=21), normal(*x.shape, seed=22)):
        after, before = (loss(x + step * direction).item() for step in (STEP, -STEP))
        slopes.append((after - before) / (2 * STEP))
    return torch.tensor(slopes)


def project(*outputs: Tensor) -> Tensor:
    """Compute a fixed linear function of what a part returned, in double precision."""
    terms = [
        (output.double() * normal(*output.shape, seed=31 + number)).sum()
        for number, output in enumerate(outputs)
    ]
    return torch.stack(terms).sum()


def judge_gradient(gradient: Tensor | None, loss: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Say whether a gradient is that of a loss at x: 1 or 0.

    The comparison is with differences of the same loss, so a wrong part has a right gradient
    unless something cuts it. The differences of float32 values are exact to about a percent; a cut
    changes a slope by about itself.
    """
    slopes = slope_of(loss, x)
    if not slopes.isfinite().all():
        return 1.0  # the values themselves are wrong
    found = torch.zeros(2)
    if gradient is not None:
        directions = (normal(*x.shape, seed=21), normal(*x.shape, seed=22))
        found = torch.stack([(gradient * direction).sum() for direction in directions])
    return float((found - slopes).norm() <= 0.1 * slopes.norm() + 0.01)


def gradients(
    run: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Tensor]
) -> dict[str, Observed]:
    """Observe whether the gradient of a part's output reaches each of its inputs.

    Args:
        run: the part, as in training, but without dropout; it is given copies of all inputs.
        inputs: by the name that the probe's name has.

    Returns:
        For each input 1 if its gradient is right, 0 if it is missing or wrong, and -1 for all if
        the backward pass raises an error.
    """
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    try:
        loss = project(*run(*(leaf.clone() for leaf in leaves)))
        if loss.requires_grad:
            loss.backward()
    except NotImplementedError:
        raise
    except Exception:
        values = [-1.0] * len(leaves)
    else:
        values = [
            judge_gradient(leaf.grad, partial(_loss_of, run, [*inputs.values()], number), x)
            for number, (leaf, x) in enumerate(zip(leaves, inputs.values(), strict=True))
        ]
    return {
        f"gradient of {name}": Observed(torch.tensor(value), 1e-3)
        for name, value in zip(inputs, values, strict=True)
    }


def _loss_of(
    run: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], number: int, x: Tensor
) -> Tensor:
    copies = [other.clone() for other in inputs]
    copies[number] = x.clone()
    return project(*run(*copies)).detach()


def broken(output: Tensor) -> Tensor:
    """Return a tensor whose backward pass raises an error: what it needs is changed in place."""
    saved = output.sigmoid()
    result = output + 0 * saved
    saved.mul_(1)
    return result


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


NO_GRADIENT = (
    "The result is right, but the gradient stops there, so training does not reach what lies "
    "before. Use no torch.no_grad(), .detach(), .data, .item(), .numpy() or torch.tensor(...) on "
    "the way."
)
BROKEN = (
    "The result is right, but the backward pass raises an error: an operation such as +=, *= or "
    "x[...] = changes a tensor that an earlier operation needs for its gradient. Make a new tensor "
    "instead: x = x + y."
)
