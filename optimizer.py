"""AdamW: Adam with decoupled weight decay.

Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1, with the efficient bias correction given at the end
of section 2.
Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2, for the weight decay.

Differs from `torch.optim.AdamW` in:
- eps is added to the square root of the second moment before bias correction (the "epsilon hat" of
  Kingma & Ba);
- the weight decay is applied after the Adam update, to the updated parameter.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class AdamW(Optimizer):
    """Adam with the efficient bias correction and decoupled weight decay.

    The `torch._foreach_*` functions update all parameters in a few calls, which is faster than a
    loop that makes these calls for one parameter after the other. Parameters are grouped by step
    count, because the bias correction depends on it and a parameter counts only the steps in which
    it had a gradient.

    Args:
        params: parameters, or parameter groups (dicts) with their own options.
        lr: learning rate (alpha in the papers), >= 0.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the square root of the second moment, >= 0.
        weight_decay: >= 0; each step multiplies the updated parameter by 1 - lr * weight_decay.
        correct_bias: whether to correct the bias of the moments, which start at zero.

    Raises:
        ValueError: an option is out of bounds.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be finite and >= 0")
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{i}]={beta} must be in [0, 1)")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: called before the update; computes the gradients and returns the loss.

        Returns:
            The loss that the closure returned, or None if there is no closure.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # A parameter that had no gradient in some steps has a smaller step count.
            parameters_by_step: dict[int, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError(
                        "AdamW does not support sparse gradients; use dense ones, for example "
                        "nn.Embedding with sparse=False"
                    )
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                parameters_by_step.setdefault(state["step"], []).append(parameter)
            for step, parameters in parameters_by_step.items():
                self._update(parameters, step, group)
        return loss

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        """Do one step of Algorithm 1 for parameters with the same step count `step` (from 1)."""
        beta1, beta2 = group["betas"]
        # No gradient is None here, since `step` skips such parameters; the `if` is for mypy.
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        exp_avgs = [self.state[parameter]["exp_avg"] for parameter in parameters]
        exp_avg_sqs = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]

        # m_t = beta1 m_{t-1} + (1 - beta1) g_t
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        # v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)

        # alpha_t = alpha sqrt(1 - beta2^t) / (1 - beta1^t)
        step_size = group["lr"]
        if group["correct_bias"]:
            step_size *= (1 - beta2**step) ** 0.5 / (1 - beta1**step)

        # theta_t = theta_{t-1} - alpha_t m_t / (sqrt(v_t) + eps)
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(parameters, exp_avgs, denominators, -step_size)

        # Decoupled weight decay: theta_t <- (1 - alpha lambda) theta_t
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
