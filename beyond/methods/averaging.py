"""An average of the weights over the steps (EMA), which is evaluated and kept.

Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging". Here the average is
exponential, so it forgets the first steps. After step t, from 0:

    theta_ema <- d_t theta_ema + (1 - d_t) theta, with d_t = min(d, (1 + t) / (10 + t))

theta_ema begins as the weights before the first step. If d_t were d in all steps, these would be a
large part of it after a short run: with d = 0.99 still half after 69 steps. So the decay begins
low, as in TensorFlow's ExponentialMovingAverage, and theta_ema is the average of about the last
tenth of the steps, until d_t reaches d (0.99 at step 890). The training itself is not changed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from beyond.methods.ingredient import Ingredient
from beyond.methods.weights import replaced


class WeightAverage(nn.Module):
    """An exponential average of parameters; the training checkpoint has it too.

    The averages are parameters that do not train, not buffers: several processes would send each
    other all buffers in each step, and every process computes the same averages.

    Args:
        parameters: those that train, and where the average begins. If there are low-rank updates,
            A and B are averaged, not their product.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.parameters_of_run = tuple(parameters)  # a tuple is not saved
        self.averages = nn.ParameterList(
            nn.Parameter(parameter.detach().clone(), requires_grad=False)
            for parameter in parameters
        )

    @torch.no_grad()
    def move(self, decay: float) -> None:
        """Move the averages towards the parameters: decay * average + (1 - decay) * parameter."""
        torch._foreach_lerp_(list(self.averages), self.parameters_of_run, 1 - decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the parameters have their averages, in the block."""
        with replaced(self.parameters_of_run, list(self.averages)):
            yield


class MovingAverage(Ingredient):
    """Keeps the average instead of the weights of the last step.

    Args:
        parameters: those that train.
        decay: d, per step, in [0, 1).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        super().__init__()
        self.average = WeightAverage(parameters)
        self.decay = decay
        self.step_decay = 0.0  # of the current step

    def begin_step(self, step: int, total_steps: int) -> None:
        """Compute the decay of a step, from 0 to total_steps - 1."""
        self.step_decay = min(self.decay, (1 + step) / (10 + step))

    def after_update(self) -> None:
        """Move the averages towards the weights."""
        self.average.move(self.step_decay)

    @contextmanager
    def kept_weights(self) -> Iterator[None]:
        """Let the classifier have the averages, in the block."""
        with self.average.in_use():
            yield
