"""The base class of the methods' classifiers, which are made from a plain one."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from classifier import LlamaEmbeddingClassifier


class MethodClassifier(LlamaEmbeddingClassifier):
    """A classifier that takes over the parts of a plain one, and reads or scores in another way.

    Its checkpoint says how it differs, under "method"; `checkpoints.py` makes it again from that.

    Args:
        plain: the classifier whose parts it takes over. Taking its head, instead of making
            another one, draws no random numbers.
        method: how it differs, as plain values.
    """

    def __init__(self, plain: LlamaEmbeddingClassifier, method: Mapping[str, str]) -> None:
        nn.Module.__init__(self)  # that of LlamaEmbeddingClassifier would draw another head
        self.num_labels = plain.num_labels
        self.label_names, self.tokenizer = plain.label_names, plain.tokenizer
        self.llama, self.dropout = plain.llama, plain.dropout
        self.classifier_head = plain.classifier_head
        self.method = method

    def to_checkpoint(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_any_classifier` rebuilds it."""
        checkpoint = super().to_checkpoint()
        checkpoint["classifier"]["method"] = dict(self.method)
        return checkpoint
