"""Load a fine-tuned classifier."""

from pathlib import Path

from classifier import LlamaEmbeddingClassifier, load_classifier
from tokenizer import Tokenizer


def load_any_classifier(path: str | Path) -> LlamaEmbeddingClassifier:
    """Load the fine-tuned classifier of a checkpoint, on the CPU, in eval mode.

    The errors are those of `load_classifier`.
    """
    return load_classifier(path, apply_method=refuse_method)


def refuse_method(
    plain: LlamaEmbeddingClassifier, method: object, path: str | Path
) -> LlamaEmbeddingClassifier:
    """Raise ValueError: a checkpoint's classifier differs from the assignment's."""
    raise ValueError(f"{path}: was fine-tuned with a method that the starter lacks: {method!r:.80}")


def input_tokenizer(classifier: LlamaEmbeddingClassifier, tokenizer: Tokenizer) -> Tokenizer:
    """Return what encodes sentences for a classifier: the tokenizer itself."""
    return tokenizer
