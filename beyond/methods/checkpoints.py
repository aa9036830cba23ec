"""Which classifier a run trains, and making it again from its checkpoint.

The checkpoint of a plain classifier is the assignment's. One of a `MethodClassifier` says how it
differs, under "method", so that the assignment's `load_classifier` refuses it and names that.
"""

import reprlib
from pathlib import Path

from beyond.formats.load import make_tokenizer
from beyond.methods.label_words import LabelWordClassifier, PromptTokenizer
from beyond.methods.options import POOLINGS, MethodOptions
from beyond.methods.pooling import PooledClassifier, cut_layers
from classifier import LlamaEmbeddingClassifier, load_classifier
from tokenizer import Tokenizer


def change_classifier(
    options: MethodOptions, plain: LlamaEmbeddingClassifier, prompt: str
) -> LlamaEmbeddingClassifier:
    """Return the classifier that the options ask for; the plain one without a flag.

    Args:
        options: of the run.
        plain: the classifier whose parts it takes over.
        prompt: the zero-shot prompt that follows a sentence, for `--head label_words`.

    Raises:
        ValueError: an option does not fit the model, its tokenizer or the label words.
    """
    if options.pool_layer is not None:
        cut_layers(plain.llama, options.pool_layer)
    if options.head == "label_words":
        return LabelWordClassifier(plain, prompt)
    if options.pooling != "last":
        return PooledClassifier(plain, options.pooling)
    return plain


def apply_method(
    plain: LlamaEmbeddingClassifier, method: object, path: str | Path
) -> LlamaEmbeddingClassifier:
    """Return the classifier of a checkpoint that differs from the plain one.

    Args:
        plain: the classifier whose parts it takes over.
        method: what the checkpoint holds under "method".
        path: of the checkpoint.

    Raises:
        ValueError: this program does not know the method, or it does not fit the other parts.
    """
    try:
        match method:
            case {"pooling": str(name), **more} if name in POOLINGS and name != "last" and not more:
                return PooledClassifier(plain, name)
            case {"head": "label_words", "prompt": str(prompt), **more} if not more:
                return LabelWordClassifier(plain, prompt)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    raise ValueError(
        f"{path}: was fine-tuned with {reprlib.repr(method)}, which this program does not know"
    )


def load_any_classifier(path: str | Path) -> LlamaEmbeddingClassifier:
    """Load the fine-tuned classifier of a checkpoint, plain or not, on the CPU, in eval mode.

    Its tokenizer may be of any kind. The errors are those of `load_classifier`.
    """
    return load_classifier(path, make_tokenizer, apply_method)


def input_tokenizer(classifier: LlamaEmbeddingClassifier, tokenizer: Tokenizer) -> Tokenizer:
    """Return what encodes sentences for a classifier: the tokenizer, with a prompt if it has one.

    Args:
        classifier: plain or not.
        tokenizer: of the model.
    """
    if isinstance(classifier, LabelWordClassifier):
        return PromptTokenizer(tokenizer, classifier.prompt)
    return tokenizer
