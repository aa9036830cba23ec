"""SMART's trust region: a step should not move the predictions far from those of averaged weights.

Jiang et al. 2020, "SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models
through Principled Regularized Optimization", arXiv:1911.03437, section 3.2: Bregman proximal point
optimization, in its variant with momentum (MBPP), eq. 3. With F(theta) the loss without this
penalty, step t is a step towards

    argmin_theta  F(theta) + mu D(theta, theta_avg)

where D is, for each sentence x,

    KL(f(x; theta) || f(x; theta_avg)) + KL(f(x; theta_avg) || f(x; theta))

and theta_avg, in which D has no gradient, is an average of the weights. It begins at the weights
before the first step, and after each step

    theta_avg <- beta theta_avg + (1 - beta) theta

The paper's F has the smoothness-inducing regulariser of `smart.py` too (`--smart`). Its ablation
has each of the two alone, so either flag works without the other. The weights that are evaluated
and kept are theta, not the average.

Differs from the paper in:
- beta is 0.99 in all steps; the paper's is 0.999 after the first tenth of them. With 0.999 the
  average would be nearly the untrained head for the first thousand steps, and many runs here are
  not longer;
- one step of AdamW stands for the argmin (the paper's Algorithm 1 with S = 1).

Both predictions have the same dropout masks, so the penalty measures the weights alone. A step
takes one more forward pass, without gradients. Memory: one copy of the weights that train.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from beyond.methods.averaging import WeightAverage
from beyond.methods.divergence import symmetric_kl
from beyond.methods.ingredient import Ingredient, Rows
from beyond.methods.randomness import preserve_random_state

DECAY = 0.99  # beta


class ProximalPoint(Ingredient):
    """Adds the penalty on how far the prediction is from that of the averaged weights.

    The averages are parameters of this module that do not train, so they are saved with the run.

    Args:
        classifier: the model.
        parameters: those that train.
        weight: mu, >= 0.
    """

    def __init__(
        self, classifier: nn.Module, parameters: Sequence[nn.Parameter], weight: float
    ) -> None:
        super().__init__()
        self.weight = weight
        self.average = WeightAverage(parameters)
        # Not the module itself, which would become a part of this one and be saved twice.
        self.predict = classifier.__call__
        self.average_log_probs: Tensor | None = None  # (rows, num_labels), of the current rows

    def before_forward(self, rows: Rows) -> None:
        """Predict with the averaged weights and the dropout masks of the plain pass."""
        with torch.no_grad(), preserve_random_state(), self.average.in_use():
            self.average_log_probs = self.predict(rows.tokens, rows.lengths)

    def loss(self, loss: Tensor, classifier: nn.Module, rows: Rows, log_probs: Tensor) -> Tensor:
        """Add mu times the divergence to the loss; see `Ingredient.loss`."""
        assert self.average_log_probs is not None
        divergence = symmetric_kl(log_probs, self.average_log_probs).sum()
        self.average_log_probs = None
        return loss + self.weight * divergence

    def after_update(self) -> None:
        """Move the averages towards the weights."""
        self.average.move(DECAY)
