"""A frozen backbone: only the head trains, on the hidden states of the pretrained model.

Alain & Bengio 2016, "Understanding intermediate layers using linear classifier probes",
arXiv:1610.01644: with a linear head, this measures what the hidden states already hold.

Conventions:
- the backbone computes in eval mode, without dropout, so a sentence always has the same hidden
  states (in reference mode with the same padding); the dropout before the head stays;
- whatever is not the backbone trains: the head, and a learned pooling.
"""

from typing import Any

from beyond.methods.ingredient import Ingredient
from beyond.methods.weights import only_trained
from classifier import LlamaEmbeddingClassifier


class FrozenBackbone(Ingredient):
    """Trains only what is not the backbone.

    No parameter of the backbone requires a gradient, so PyTorch records nothing of its forward pass
    and runs no backward pass through it.

    Args:
        classifier: its backbone is frozen here.
    """

    def __init__(self, classifier: LlamaEmbeddingClassifier) -> None:
        super().__init__()
        classifier.llama.requires_grad_(False)
        # Not the module itself, which would become a part of this one and be saved twice.
        self.use_eval_mode = classifier.llama.eval

    def begin_step(self, step: int, total_steps: int) -> None:
        """Set eval mode again, since each epoch begins with train mode for the whole method."""
        self.use_eval_mode()

    def parameter_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the groups without the backbone."""
        return only_trained(groups)
