"""WiSE-FT: what is evaluated and kept lies between the pretrained and the fine-tuned weights.

Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv:2109.01903, eq. 1:

    theta = (1 - alpha) theta_0 + alpha theta_1

theta_0 is the zero-shot classifier, so the head has to be one: it needs `--head label_words`. A new
linear head is random before training, and a share of it would be noise. The training itself is not
changed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from beyond.methods.ingredient import Ingredient
from beyond.methods.weights import replaced, trained


class WiseFt(Ingredient):
    """Keeps a copy of the pretrained weights, and mixes them in.

    Args:
        classifier: not trained yet.
        alpha: the share of the fine-tuned weights, in [0, 1].
    """

    def __init__(self, classifier: nn.Module, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.fine_tuned = tuple(trained([classifier]))  # theta_1; a tuple is not saved
        # theta_0 is not saved either, since a resumed run starts from the same file.
        self.pretrained = tuple(parameter.detach().clone() for parameter in self.fine_tuned)

    @contextmanager
    def kept_weights(self) -> Iterator[None]:
        """Let the classifier have the mixed weights, in the block."""
        pairs = zip(self.pretrained, self.fine_tuned, strict=True)
        with torch.no_grad():
            mixed = [old.to(new.device).lerp(new, self.alpha) for old, new in pairs]
        with replaced(self.fine_tuned, mixed):
            yield
