"""An average of the weights over the steps (EMA), which is evaluated and kept.

Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging". Here the average is
exponential, so it forgets the first steps. After each step:

    theta_ema <- d theta_ema + (1 - d) theta

theta_ema begins at the weights before the first step, so it needs no bias correction. Training goes
on from theta; nothing of it changes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from beyond.methods.ingredient import Ingredient
from beyond.methods.weights import replaced


class MovingAverage(Ingredient):
    """Averages parameters; the training checkpoint has the averages too.

    They are parameters that do not train, not buffers: several processes would send each other all
    buffers in each step, and every process computes the same averages.

    Args:
        parameters: those that train. If there are low-rank updates, A and B are averaged, not their
            product.
        decay: d, per step, in [0, 1).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        super().__init__()
        self.parameters_of_run = tuple(parameters)  # a tuple is not saved
        self.decay = decay
        self.averages = nn.ParameterList(
            nn.Parameter(parameter.detach().clone(), requires_grad=False)
            for parameter in parameters
        )

    @torch.no_grad()
    def after_update(self) -> None:
        """Move the averages towards the weights."""
        torch._foreach_lerp_(list(self.averages), self.parameters_of_run, 1 - self.decay)

    @contextmanager
    def kept_weights(self) -> Iterator[None]:
        """Let the parameters have their averages, in the block."""
        with replaced(self.parameters_of_run, list(self.averages)):
            yield
