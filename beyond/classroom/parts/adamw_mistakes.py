"""Wrong variants of `AdamW`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from beyond.classroom.part import Mistake, Variant
from beyond.classroom.parts.adamw_loop import Group, Loop

WHERE = "optimizer.py, AdamW.step"


# Of the steps that these methods are, two mistakes are looked for together.
COMBINED = {"correct", "always_corrects", "divisor", "change_gradient", "decay", "finish"}


def combine(**methods: Any) -> type[Loop]:
    """Make an optimizer with other methods than `Loop`."""
    changes = {"changes": methods} if methods.keys() <= COMBINED else {}
    return type("Variant", (Loop,), {**methods, **changes})


def _corrected_both(loop: Loop, v: Tensor, group: Group, t: int) -> Tensor:
    """Correct both moments, besides the step size."""
    if not group["correct_bias"]:
        return v.sqrt() + group["eps"]
    return _always_corrected_both(loop, v, group, t)


def _always_corrected_both(loop: Loop, v: Tensor, group: Group, t: int) -> Tensor:
    beta1, beta2 = group["betas"]
    return (v / (1 - beta2**t)).sqrt().add(group["eps"]) * (1 - beta1**t)


def _eps_after_correction(loop: Loop, v: Tensor, group: Group, t: int) -> Tensor:
    correction = (1 - group["betas"][1] ** t) ** 0.5 if group["correct_bias"] else 1.0
    return v.sqrt() + group["eps"] * correction


def _always_corrected(loop: Loop, v: Tensor, group: Group, t: int) -> Tensor:
    correction = 1.0 if group["correct_bias"] else (1 - group["betas"][1] ** t) ** 0.5
    return (v.sqrt() + group["eps"]) / correction


def _update_swapped(loop: Loop, parameter: Tensor, grad: Tensor, state: Any, group: Group) -> None:
    Loop.update(loop, parameter, grad, state, {**group, "betas": group["betas"][::-1]})


def _count_in(state: Any, name: str = "count") -> int:
    state[name] = state.get(name, 0) + 1
    return state[name]


def _safe_correct(loop: Loop, beta1: float, beta2: float, t: int) -> float:
    """Correct for a step that is counted from 0, as dividing a tensor by 0 does."""
    return Loop.correct(loop, beta1, beta2, t) if t else float("nan")


def _descend(loop: Loop, parameter: Tensor, grad: Tensor, state: Any, group: Group) -> None:
    parameter.sub_(group["lr"] * grad)
    loop.decay(parameter, parameter, group["lr"], group)


def _corrected_lr(loop: Loop, parameter: Tensor, group: Group) -> float:
    t = loop.state[parameter]["step"]
    return group["lr"] / (1 - group["betas"][0] ** t if group["correct_bias"] else 1.0)


def _fail_if_false(loop: Loop, group: Group) -> Group:
    if not group["correct_bias"]:
        raise UnboundLocalError
    return group


def _entry(
    name: str,
    why: str,
    seen: str = "",
    is_note: bool = False,
    others: Sequence[dict[str, Any]] = (),
    **methods: Any,
) -> Variant:
    """Make an entry whose variants have other methods than `Loop`.

    If the bias correction is wrong, so is one that is made whatever group["correct_bias"] says.
    """
    if "correct" in methods:
        others = [*others, {**methods, "always_corrects": True}]
    subjects = [combine(**changes) for changes in (methods, *others)]
    return Variant(
        Mistake(name, WHERE, why, seen, is_note=is_note), subjects[0], tuple(subjects[1:])
    )


INVISIBLE = "The course's test does not see it, because its weight decay is 1e-4."

VARIANTS = (
    _entry(
        "no bias correction",
        "The moments start at zero, so the first steps are too large, by a factor of 3 with the "
        "default betas. Multiply lr by sqrt(1 - beta2^t) / (1 - beta1^t).",
        correct=lambda *_: 1.0,
    ),
    _entry(
        "bias corrected twice (both forms mixed)",
        "The moments are divided by 1 - beta^t and the step size is corrected too. Use one form: "
        "the assignment asks for the efficient one, which corrects the step size only.",
        "alpotekhin",
        others=[
            {"divisor": _always_corrected_both},
            {"divisor": _always_corrected_both, "always_corrects": True},
        ],
        divisor=_corrected_both,
    ),
    _entry(
        "only the first moment's bias corrected",
        "The factor sqrt(1 - beta2^t) of the step size is missing, so the first steps are up to "
        "30 times too large.",
        correct=lambda loop, beta1, beta2, t: 1 / (1 - beta1**t),
    ),
    _entry(
        "only the second moment's bias corrected",
        "The divisor 1 - beta1^t of the step size is missing, so the first steps are too small.",
        correct=lambda loop, beta1, beta2, t: (1 - beta2**t) ** 0.5,
    ),
    _entry(
        "no root in the bias correction",
        "The step size has 1 - beta2^t instead of its square root.",
        correct=lambda loop, beta1, beta2, t: (1 - beta2**t) / (1 - beta1**t),
    ),
    _entry(
        "bias correction upside down",
        "The step size is multiplied by (1 - beta1^t) / sqrt(1 - beta2^t), the inverse of the "
        "correction.",
        correct=lambda loop, beta1, beta2, t: (1 - beta1**t) / (1 - beta2**t) ** 0.5,
    ),
    _entry(
        "correct_bias=False has no effect",
        "The bias is corrected whatever the option says. Correct only if group['correct_bias']. "
        "The course's own programs leave the option at True.",
        "Yousefbahr, vktrbr, steffichern, chernovssss",
        is_note=True,
        always_corrects=True,
    ),
    _entry(
        "correct_bias=False ends in an error",
        "Something is defined only if group['correct_bias'] is True and used in any case; the "
        "course's own programs leave the option at True.",
        "epguo",
        is_note=True,
        options=_fail_if_false,
    ),
    _entry(
        "correct_bias=False corrects the second moment",
        "Only the first moment's correction depends on group['correct_bias']. The course's own "
        "programs leave the option at True.",
        "SandeepChatterjee66",
        is_note=True,
        divisor=_always_corrected,
    ),
    _entry(
        "eps added after the bias correction",
        "This is Adam's plain form, m_hat / (sqrt(v_hat) + eps), as in torch.optim.AdamW. The "
        "assignment asks for the efficient form, where eps is added to sqrt(v). They differ for "
        "tiny gradients only; the course's test accepts both.",
        is_note=True,
        divisor=_eps_after_correction,
    ),
    _entry(
        "eps inside the root",
        "sqrt(v + eps) instead of sqrt(v) + eps: with eps = 1e-6 gradients below 1e-3 hardly move "
        "their parameters.",
        divisor=lambda loop, v, group, t: (v + group["eps"]).sqrt(),
    ),
    _entry(
        "no eps",
        "The update divides by sqrt(v), which is 0 / 0 for a parameter whose gradients are 0.",
        divisor=lambda loop, v, group, t: v.sqrt(),
    ),
    _entry(
        "no square root of the second moment",
        "The update divides by v instead of sqrt(v), so small gradients give large steps.",
        divisor=lambda loop, v, group, t: v + group["eps"],
    ),
    _entry(
        "second moment without the square",
        "v averages the gradients instead of their squares; the root of a negative one is NaN.",
        second=lambda loop, grad, beta2: (1 - beta2) * grad,
    ),
    _entry(
        "first moment without 1 - beta1",
        "m sums the gradients, as SGD with momentum does; the average is beta1 m + (1 - beta1) g.",
        first=lambda loop, grad, beta1: grad,
    ),
    _entry(
        "second moment without 1 - beta2",
        "v sums the squares, so steps shrink; the average is beta2 v + (1 - beta2) g^2.",
        second=lambda loop, grad, beta2: grad**2,
    ),
    _entry(
        "betas swapped",
        "The first moment averages with beta2 and the second with beta1. betas is "
        "(beta1, beta2): of the gradient, of its square.",
        update=_update_swapped,
    ),
    _entry(
        "moments not kept between steps",
        "Every step starts from zero moments, so they are no averages. Store m and v in "
        "self.state[p], and make them zero only if the state is empty: the first time.",
        others=[{"finish": lambda loop, grad, state: state.clear()}],  # the step's number too
        finish=lambda loop, grad, state: (state["m"].zero_(), state["v"].zero_()),
    ),
    _entry(
        "plain gradient descent",
        "The update is lr * gradient, without moments, so every parameter has the same step size. "
        "Adam's is lr * m / (sqrt(v) + eps).",
        others=[{"update": _descend, "decay": lambda *_: None}],
        update=_descend,
    ),
    _entry(
        "step never counted on",
        "The bias correction uses t = 1 in all steps. Add 1 to state['step'] in every step.",
        count=lambda *_: 1,
    ),
    _entry(
        "step counted from 0",
        "The first step has t = 0, so 1 - beta^t is 0 and the parameters become NaN or infinite. "
        "Add 1 before the bias correction.",
        count=lambda loop, state, group: state["step"] - 1,
        correct=_safe_correct,
    ),
    _entry(
        "step counted from 2",
        "The first step has t = 2, so the first steps are corrected too little. Start at 0 and "
        "add 1 once per step.",
        count=lambda loop, state, group: state["step"] + 1,
    ),
    _entry(
        "step counted for all parameters together",
        "A parameter that had no gradient in some steps is corrected as if it had. Count in "
        "self.state[p], not in the group or the optimizer.",
        begin=lambda loop: _count_in(loop.shared),
        count=lambda loop, state, group: loop.shared["count"],
    ),
    _entry(
        "group's step counted at every parameter",
        "The count of the group grows by the number of its parameters in each step, so the bias "
        "correction ends too soon. Count in self.state[p].",
        count=lambda loop, state, group: _count_in(group),
    ),
    _entry(
        "one step counted at every parameter of all groups",
        "One count grows by the number of parameters in each step, so the bias correction ends "
        "too soon. Count in self.state[p].",
        count=lambda loop, state, group: _count_in(loop.shared),
    ),
    _entry(
        "state shared between parameters",
        "All parameters use the same moments, so each is moved by the others' gradients. Use "
        "self.state[p], one dict for each parameter.",
        find_state=lambda loop, parameter: loop.shared,
    ),
    _entry(
        "options of the group ignored",
        "All groups use the optimizer's own options. Read lr, betas, eps and weight_decay from "
        "the group.",
        options=lambda loop, group: loop.defaults,
    ),
    _entry(
        "fails for a parameter without a gradient",
        "A parameter that was not used has p.grad None, for example a frozen one. Skip it.",
        skips_none=False,
    ),
    _entry(
        "parameters not changed",
        "p = p - ... makes a new tensor and leaves the model's parameter as it was. Change it in "
        "place: p.data.add_(...), or p.data = ....",
        apply=lambda loop, parameter, change: None,
        decay=lambda *_: None,
    ),
    _entry(
        "update added instead of subtracted",
        "The parameters move along the gradient, so the loss grows. Subtract the update.",
        apply=lambda loop, parameter, change: parameter.add_(change),
    ),
    _entry(
        "no weight decay",
        f"weight_decay has no effect. After the update: p -= lr * weight_decay * p. {INVISIBLE}",
        decay=lambda *_: None,
    ),
    _entry(
        "weight decay before the update",
        "The decay uses the parameter before the update, as torch.optim.AdamW does. The assignment "
        f"decays the updated parameter. {INVISIBLE}",
        decay=lambda loop, parameter, before, step_size, group: parameter.sub_(
            group["lr"] * group["weight_decay"] * before
        ),
    ),
    _entry(
        "weight decay inside the gradient (L2)",
        "The decay is added to the gradient and goes through the moments: that is Adam with L2 "
        "regularisation, which decays parameters with large gradients less. AdamW decays the "
        "parameter itself (decoupled).",
        change_gradient=lambda loop, parameter, grad, group: (
            grad + group["weight_decay"] * parameter
        ),
        decay=lambda *_: None,
    ),
    _entry(
        "weight decay twice",
        "The decay is added to the gradient (L2), and the parameter is decayed too. Leave the "
        "gradient as it is.",
        "U1ltra",
        change_gradient=lambda loop, parameter, grad, group: (
            grad + group["weight_decay"] * parameter
        ),
    ),
    _entry(
        "weight decay times lr / (1 - beta1^t)",
        "The decay is multiplied by lr with the first moment's correction, so it is too strong in "
        f"the first steps. Multiply it by lr. {INVISIBLE}",
        "SandeepChatterjee66",
        decay=lambda loop, parameter, before, step_size, group: parameter.sub_(
            _corrected_lr(loop, parameter, group) * group["weight_decay"] * parameter
        ),
    ),
    _entry(
        "weight decay not times lr",
        "The parameter loses weight_decay of itself per step instead of lr * weight_decay: with "
        "lr = 1e-3 a thousand times too much.",
        decay=lambda loop, parameter, before, step_size, group: parameter.sub_(
            group["weight_decay"] * parameter
        ),
    ),
    _entry(
        "weight decay times the corrected step size",
        "The decay is multiplied by lr with the bias correction, so it is wrong in the first "
        f"steps. Multiply it by lr. {INVISIBLE}",
        "seanxuxx",
        decay=lambda loop, parameter, before, step_size, group: parameter.sub_(
            step_size * group["weight_decay"] * parameter
        ),
    ),
    _entry(
        "weight decay with the wrong sign",
        f"The parameters grow instead of shrinking. Subtract lr * weight_decay * p. {INVISIBLE}",
        decay=lambda loop, parameter, before, step_size, group: parameter.add_(
            group["lr"] * group["weight_decay"] * parameter
        ),
    ),
    _entry(
        "state without the parameter's device and dtype",
        "torch.zeros(p.shape) is on the CPU and float32 whatever the parameter is, so training on "
        "a GPU fails. Use torch.zeros_like(p).",
        "Sho-Shoo/minllama-assignment",
        zeros=lambda loop, parameter: torch.zeros(parameter.shape),
    ),
    _entry(
        "state without the parameter's device",
        "The moments are made on the CPU, so training on a GPU fails. Use torch.zeros_like(p).",
        zeros=lambda loop, parameter: torch.zeros(parameter.shape, dtype=parameter.dtype),
    ),
    _entry(
        "state without the parameter's dtype",
        "The moments are float32 whatever the parameter is, so float64 loses digits. "
        "torch.zeros_like(p) keeps its dtype and device.",
        is_note=True,
        zeros=lambda loop, parameter: torch.zeros(parameter.shape, device=parameter.device),
    ),
    _entry(
        "gradient changed in place",
        "p.grad is changed during the step (p.grad.data is the same tensor), so what reads it "
        "later, gradient accumulation or a log, gets other numbers. Use operations without _.",
        is_note=True,
        finish=lambda loop, grad, state: grad.mul_(grad),
    ),
)
