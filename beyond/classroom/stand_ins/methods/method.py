"""The interface of training loop and methods: the assignment's own recipe."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from beyond.options import FinetuneOptions
from classifier import LlamaEmbeddingClassifier

LossFn = Callable[[Tensor, Tensor], Tensor]  # from log-probabilities and labels, summed over rows


class Method(nn.Module):
    """What is trained: the classifier.

    A place for extra work: the training loop calls, in this order for each batch, `begin_step`,
    `forward`, `before_update`, the optimizer's `step`, and `after_update`. After each epoch the
    classifier is evaluated and saved within `kept_weights`.
    """

    def __init__(self, classifier: LlamaEmbeddingClassifier, loss_fn: LossFn) -> None:
        super().__init__()
        self.classifier = classifier
        self.loss_fn = loss_fn

    def forward(self, tokens: Tensor, lengths: Tensor, labels: Tensor, lines: Tensor) -> Tensor:
        """Return the loss of some rows, summed.

        Args:
            tokens: (rows, seq), int64, padded on the right.
            lengths: (rows,), the number of tokens in each row before padding.
            labels: (rows,).
            lines: (rows,), the number of each row's line in its file.
        """
        return self.loss_fn(self.classifier(tokens, lengths), labels)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups of the optimizer."""
        return [{"params": list(self.classifier.parameters())}]

    def begin_step(self, step: int, total_steps: int) -> None:
        """Prepare for a step, from 0 to total_steps - 1."""

    def before_update(self, optimizer: Optimizer) -> Tensor | None:
        """Change gradients or learning rates before the optimizer's step."""
        return None

    def after_update(self) -> None:
        """Follow the weights after the optimizer's step."""

    @contextmanager
    def kept_weights(self) -> Iterator[None]:
        """Let the classifier have the weights that are evaluated and saved, in the block."""
        yield


def sum_of_losses(method: nn.Module, *tensors: Tensor) -> Tensor:
    """Return the loss of some rows, summed; `tensors` are the arguments of `Method.forward`."""
    return method(*tensors)


def build_method(
    options: FinetuneOptions,
    classifier: LlamaEmbeddingClassifier,
    loss_fn: LossFn,
    prompt: str = "",
) -> Method:
    """Put together what is trained; `options` and `prompt` are for extra work."""
    return Method(classifier, loss_fn)
