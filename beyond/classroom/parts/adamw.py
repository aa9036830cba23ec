"""`AdamW`: short trajectories that separate the forms of Adam that are in use.

One thing at a time: gradients near 1 make eps invisible, gradients near eps show where it is added.
Weight decay is observed with betas of 0, where the moments are the gradient and its square and no
bias needs a correction, and with gradients of 0. A wrong form shows in as few probes as possible.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from beyond.classroom.adapters import find
from beyond.classroom.part import Observations, Observed, Part
from beyond.classroom.parts.adamw_mistakes import VARIANTS, WHERE, combine
from beyond.classroom.parts.probes import attempt, normal
from beyond.classroom.student import Student
from optimizer import AdamW

Make = Callable[..., Optimizer]  # with the arguments of our AdamW
SHAPE = (2, 3)
# Float32 rounds to 1e-7 of values near 1, in another place for every way of writing the update.
TOLERANCE = 2e-5
BETAS = (0.8, 0.9)  # near each other, so that the sixth step still depends on both corrections


def adapt(student: Student) -> Make:
    """Return the student's class; it calls nothing that could be replaced."""
    return find(student, "optimizer", "AdamW")


def parameters(number: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Make parameters with values near 1."""
    return [nn.Parameter(1 + normal(*SHAPE, seed=i, scale=0.3).to(dtype)) for i in range(number)]


def trajectory(
    make: Make,
    groups: Sequence[Mapping[str, Any]] = ({},),
    scale: float = 1.0,
    skipped: Sequence[tuple[int, ...]] = ((),),
    steps: int = 4,
    **options: Any,
) -> Tensor:
    """Take some steps and return the parameters after each, (steps, parameters, *SHAPE).

    Args:
        groups: the options of each group; there is one parameter in each, two in a single group
            whose gradients are skipped.
        scale: the size of the gradients.
        skipped: for each step in turn, the numbers of the parameters without a gradient.
        options: of the optimizer.
    """
    number = max(len(groups), 1 + (len(skipped) > 1))
    held = parameters(number)
    if len(groups) == number:
        divided = [{"params": [one], **group} for one, group in zip(held, groups, strict=True)]
    else:
        divided = [{"params": held, **groups[0]}]
    optimizer = make(divided, **{"lr": 0.1, "betas": BETAS, "eps": 1e-6, **options})
    values = []
    for step, without in zip(range(steps), cycle(skipped), strict=False):
        for i, parameter in enumerate(held):
            gradient = normal(*SHAPE, seed=100 + 10 * step + i, scale=scale)
            # Not near 0, where eps would matter.
            gradient = gradient + gradient.sign() * scale / 2
            parameter.grad = None if i in without else gradient
        try:
            optimizer.step()
        except ZeroDivisionError:  # where tensors instead of numbers would give NaN
            return torch.full((steps, number, *SHAPE), torch.nan)
        values.append(torch.stack([parameter.detach().clone() for parameter in held]))
    return torch.stack(values)


def require_body(make: Make) -> None:
    """Raise NotImplementedError if a step changes nothing and keeps nothing."""
    (parameter,) = parameters(1)
    before = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter)
    optimizer = make([parameter], lr=0.1)
    with suppress(ZeroDivisionError):
        optimizer.step()
        if torch.equal(parameter, before) and not kept_tensors(optimizer):
            raise NotImplementedError("AdamW.step does nothing")


def is_gradient_kept(make: Make) -> Tensor:
    """Say whether a step leaves the gradient as it was."""
    (parameter,) = parameters(1)
    gradient = normal(*SHAPE, seed=9)
    parameter.grad = gradient.clone()
    with suppress(ZeroDivisionError):
        make([parameter], lr=0.1).step()
    return torch.tensor(torch.equal(parameter.grad, gradient))


def fits_state(make: Make, parameter: nn.Parameter) -> bool:
    """Say whether what the optimizer keeps of a parameter has its device and dtype.

    The step itself may fail, because an operation is missing for this device or dtype.
    """
    parameter.grad = torch.ones_like(parameter)
    optimizer = make([parameter], lr=0.1)
    with suppress(Exception):
        optimizer.step()
    return all(
        (tensor.device, tensor.dtype) == (parameter.device, parameter.dtype)
        for tensor in kept_tensors(optimizer)
    )


def kept_tensors(optimizer: Optimizer) -> list[Tensor]:
    """List what an optimizer keeps that has a parameter's shape, in `state` or elsewhere."""
    return [
        tensor
        for name, value in vars(optimizer).items()
        if name not in ("param_groups", "defaults")
        for tensor in tensors_in(value)
        if tensor.shape == SHAPE and not isinstance(tensor, nn.Parameter)
    ]


def tensors_in(value: object, depth: int = 4) -> Iterator[Tensor]:
    """Find tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple) and depth:
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(inner, depth - 1)


def observe(make: Make) -> Observations:
    """Take steps with all kinds of gradients and options."""
    require_body(make)
    (wide,) = parameters(1, torch.float64)
    on_meta = nn.Parameter(torch.ones(SHAPE, device="meta"))
    found = {
        "one step": trajectory(make, steps=1),
        "six steps": trajectory(make, steps=6),
        "six steps with gradients near eps": trajectory(make, scale=1e-6, steps=6),
        "steps with weight decay": trajectory(make, weight_decay=0.5, betas=(0.0, 0.0)),
        "steps with weight decay and gradients of 0": trajectory(make, weight_decay=0.5, scale=0.0),
        "steps without bias correction": attempt(
            lambda: trajectory(make, correct_bias=False), "a parameter"
        ),
        "two groups with their own lr and betas": trajectory(
            make, ({"lr": 0.1}, {"lr": 0.3, "betas": (0.5, 0.7)})
        ),
        "two parameters": trajectory(make, skipped=((), ())),
        "parameters without gradient in some steps": attempt(
            lambda: trajectory(make, skipped=((), (1,), (0, 1), (1,)), steps=6), "a parameter"
        ),
    }
    flags = {
        "the gradient is left as it was": is_gradient_kept(make),
        "the state has the parameter's dtype": torch.tensor(fits_state(make, wide)),
        "the state has the parameter's device": torch.tensor(fits_state(make, on_meta)),
    }
    values = {name: Observed(value, TOLERANCE) for name, value in found.items()}
    return values | {name: Observed(value, 1e-3) for name, value in flags.items()}


PART = Part("AdamW", WHERE, AdamW, VARIANTS, observe, adapt, combine)
