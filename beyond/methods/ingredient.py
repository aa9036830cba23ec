"""The base class of ingredients: the hooks by which they change the plain recipe."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

LossFn = Callable[[Tensor, Tensor], Tensor]  # from log-probabilities and labels, summed over rows


class Rows(NamedTuple):
    """Some rows of a batch."""

    tokens: Tensor  # (rows, seq), int64, padded on the right
    lengths: Tensor  # (rows,), int64
    labels: Tensor  # (rows,), int64
    lines: Tensor  # (rows,), int64: of the training file, from 0


class Ingredient(nn.Module):
    """One addition to the plain recipe; what it does not override is left as it is.

    The training checkpoint has its parameters and buffers. Only the parameters of
    `parameter_groups` train.
    """

    def begin_step(self, step: int, total_steps: int) -> None:
        """Prepare for a step, from 0 to total_steps - 1."""

    def before_forward(self, rows: Rows) -> None:
        """Prepare for the plain forward pass of some rows."""

    def loss(self, loss: Tensor, classifier: nn.Module, rows: Rows, log_probs: Tensor) -> Tensor:
        """Return the loss to use instead of `loss`, summed over rows.

        Args:
            loss: so far, a scalar.
            classifier: maps tokens and lengths to log-probabilities.
            rows: of the batch, or of a micro-batch.
            log_probs: (rows, num_labels), of one forward pass.
        """
        return loss

    def parameter_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups to use instead of `groups`."""
        return groups

    def before_update(self, optimizer: Optimizer) -> Tensor | None:
        """Change gradients or learning rates before the optimizer's step.

        Returns:
            The norm of all gradients before they were changed, if it was computed.
        """
        return None

    def after_update(self) -> None:
        """Follow the weights after the optimizer's step."""

    @contextmanager
    def kept_weights(self) -> Iterator[None]:
        """Let the classifier have the weights that are evaluated and saved, in the block."""
        yield
