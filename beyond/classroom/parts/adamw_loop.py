"""AdamW as a loop of small steps, from which the wrong variants are made."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Group = dict[str, Any]


class Loop(Optimizer):
    """AdamW in small steps, each of which a variant replaces; as it stands it is right."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        names = ("lr", "betas", "eps", "weight_decay", "correct_bias")
        values = (lr, betas, eps, weight_decay, correct_bias)
        super().__init__(params, dict(zip(names, values, strict=True)))
        self.shared: dict[str, Any] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.begin()
        for group in self.param_groups:
            self.begin_group(group)
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None and self.skips_none:
                    continue
                state = self.find_state(parameter)
                if not state:
                    state.update(step=0, m=self.zeros(parameter), v=self.zeros(parameter))
                state["step"] += 1
                self.update(parameter, grad, state, self.options(group))

    skips_none = True
    changes: dict[str, Any]  # of a variant that can be combined with others

    def begin(self) -> None:
        pass

    def begin_group(self, group: Group) -> None:
        pass

    def find_state(self, parameter: Tensor) -> Any:
        return self.state[parameter]

    def zeros(self, parameter: Tensor) -> Tensor:
        return torch.zeros_like(parameter)

    def options(self, group: Group) -> Group:
        return group

    def update(self, parameter: Tensor, grad: Tensor, state: Any, group: Group) -> None:
        beta1, beta2 = group["betas"]
        kept = grad
        grad = self.change_gradient(parameter, grad, group)
        state["m"].mul_(beta1).add_(self.first(grad, beta1))
        state["v"].mul_(beta2).add_(self.second(grad, beta2))
        step_size = group["lr"]
        t = self.count(state, group)
        if group["correct_bias"] or self.always_corrects:
            step_size *= self.correct(beta1, beta2, t)
        before = parameter.clone()
        change = step_size * state["m"] / self.divisor(state["v"], group, t)
        self.apply(parameter, change)
        self.decay(parameter, before, step_size, group)
        self.finish(kept, state)

    always_corrects = False

    def change_gradient(self, parameter: Tensor, grad: Tensor, group: Group) -> Tensor:
        return grad

    def first(self, grad: Tensor, beta1: float) -> Tensor:
        return (1 - beta1) * grad

    def second(self, grad: Tensor, beta2: float) -> Tensor:
        return (1 - beta2) * grad**2

    def count(self, state: Any, group: Group) -> int:
        return state["step"]

    def correct(self, beta1: float, beta2: float, t: int) -> float:
        return (1 - beta2**t) ** 0.5 / (1 - beta1**t)

    def divisor(self, v: Tensor, group: Group, t: int) -> Tensor:
        return v.sqrt() + group["eps"]

    def apply(self, parameter: Tensor, change: Tensor) -> None:
        parameter.sub_(change)

    def decay(self, parameter: Tensor, before: Tensor, step_size: float, group: Group) -> None:
        parameter.sub_(group["lr"] * group["weight_decay"] * parameter)

    def finish(self, grad: Tensor, state: Any) -> None:
        pass
