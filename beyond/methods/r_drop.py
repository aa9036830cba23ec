"""R-Drop: two forward passes with different dropout should predict the same.

Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks", arXiv:2106.14448, eq. 2 to 4.
With the predictions P1 and P2 of the two passes, the loss of a sentence is

    NLL(P1) + NLL(P2) + alpha / 2 [KL(P1 || P2) + KL(P2 || P1)]

Both terms of the likelihood are added, not averaged, as in the paper. Without dropout the passes
are equal, so the loss and its gradient are those of plain fine-tuning times two. AdamW hardly
notices the factor (only through its eps), but clipping of gradients and the printed loss do.

The first pass is the plain one, with the dropout masks of plain fine-tuning. The masks of the
second depend on the seed, the step and the first line of the rows. A step takes twice the time of
a plain one, and twice the memory for activations.
"""

import torch
from torch import Tensor, nn

from beyond.methods.divergence import symmetric_kl
from beyond.methods.ingredient import Ingredient, LossFn, Rows
from beyond.methods.randomness import derive_seed, preserve_random_state


class RDrop(Ingredient):
    """Adds the second forward pass's loss, and the penalty on how much the passes differ.

    Args:
        loss_fn: the loss of one pass.
        alpha: weight of the penalty, >= 0.
        seed: of the second pass's dropout.
    """

    def __init__(self, loss_fn: LossFn, alpha: float, seed: int) -> None:
        super().__init__()
        self.loss_fn = loss_fn
        self.alpha = alpha
        self.seed = seed
        self.step = 0

    def begin_step(self, step: int, total_steps: int) -> None:
        """Remember the step, on which the second pass's dropout depends."""
        self.step = step

    def loss(self, loss: Tensor, classifier: nn.Module, rows: Rows, log_probs: Tensor) -> Tensor:
        """Add the second pass's loss and alpha times the divergence; see `Ingredient.loss`."""
        first_line = int(rows.lines[0])  # other processes and micro-batches have other masks
        with preserve_random_state():
            torch.manual_seed(derive_seed("r_drop", self.seed, self.step, first_line))
            again = classifier(rows.tokens, rows.lengths)
        divergence = symmetric_kl(log_probs, again).sum() / 2
        return loss + self.loss_fn(again, rows.labels) + self.alpha * divergence
