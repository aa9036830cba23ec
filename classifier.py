"""Two ways to classify a sentence with a Llama: score the label words, or train a linear head.

Both use the model's output at one position of each sentence. In reference mode that is the last
column of the padded batch, as the assignment has it. In causal mode it is the sentence's own last
token, at position `lengths - 1`.
"""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base_llama import is_dense, load_strictly, parse_config, parse_weights, read_checkpoint
from config import MAX_SIZE
from llama import Llama, load_pretrained
from tokenizer import Tokenizer
from utils import LARGEST_INT, is_text


@dataclass
class ClassifierConfig:
    """The options that the classifiers need; any object with these attributes works."""

    num_labels: int
    pretrained_model_path: str
    hidden_dropout_prob: float  # in [0, 1); used by LlamaEmbeddingClassifier only
    option: str  # "finetune" trains all parameters that are used, anything else only the head


def last_positions(tokens: Tensor, lengths: Tensor | None, causal: bool) -> Tensor:
    """Return the position whose hidden state represents each row, (batch,).

    Args:
        tokens: (batch, seq), rows padded on the right.
        lengths: (batch,), the number of tokens in each row before padding; None: no padding.
        causal: whether to take each row's own last token, instead of the last column.
    """
    if not causal or lengths is None:
        # Faithful: in reference mode the last column is used, which for most rows is padding.
        return tokens.new_full((len(tokens),), tokens.shape[1] - 1)
    return lengths - 1


class LlamaZeroShotClassifier(nn.Module):
    """Scores each label by the log-probabilities of its word's tokens at one position.

    All parameters are frozen.

    Args:
        config: `num_labels` and `pretrained_model_path` are used.
        tokenizer: the checkpoint's.
        label_names: the label words.
        llama: the model; None: loaded from `config.pretrained_model_path`.
        prompt: the end of every prompt, which a label word follows; None: the words are tokenized
            alone.

    Raises:
        ValueError: there are not `num_labels` label names, or one has no tokens.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        tokenizer: Tokenizer,
        label_names: list[str],
        llama: Llama | None = None,
        prompt: str | None = None,
    ) -> None:
        super().__init__()
        if len(label_names) != config.num_labels:
            raise ValueError(f"{len(label_names)} label names for num_labels={config.num_labels}")
        self.llama = load_pretrained(config.pretrained_model_path) if llama is None else llama
        self.llama.requires_grad_(False)
        self.label_ids = [
            tokenizer.encode(name, bos=False, eos=False)
            if prompt is None
            else tokenizer.label_tokens(name, prompt)
            for name in label_names
        ]
        for name, ids in zip(label_names, self.label_ids, strict=True):
            if not ids:
                raise ValueError(f"the label name {name!r} has no tokens")

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute scores (batch, num_labels): sums of log-probabilities, so at most 0.

        Args:
            input_ids: (batch, seq), prompts padded on the right.
            lengths: (batch,), as in `last_positions`.
        """
        positions = last_positions(input_ids, lengths, self.llama.config.causal)
        last = self.llama.compute_hidden(input_ids, positions=positions)[:, 0]  # (batch, dim)
        # In float32: in bfloat16 different labels could get equal scores. It is cheap, since only
        # one position per sentence is computed.
        with torch.autocast(last.device.type, enabled=False):
            log_probs = F.log_softmax(self.llama.output(last.float()), dim=-1)  # (batch, vocab)
        # Faithful: all tokens of a label are scored at this one position.
        return torch.stack([log_probs[:, ids].sum(dim=-1) for ids in self.label_ids], dim=-1)


class LlamaEmbeddingClassifier(nn.Module):
    """A linear head on one hidden state: log_softmax(W dropout(h) + b).

    Args:
        config: all four attributes of `ClassifierConfig` are used.
        llama: the model; None: loaded from `config.pretrained_model_path`.
        label_names, tokenizer: the label words and the tokenizer that belong to the classifier, to
            be stored with it; None: not known.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        llama: Llama | None = None,
        label_names: Sequence[str] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        self.num_labels = config.num_labels
        self.label_names, self.tokenizer = label_names, tokenizer
        self.llama = load_pretrained(config.pretrained_model_path) if llama is None else llama
        self.llama.requires_grad_(config.option == "finetune")
        if not self.llama.config.tie_embeddings:
            self.llama.output.requires_grad_(False)  # the classifier does not use it
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier_head = nn.Linear(self.llama.config.dim, config.num_labels)

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute log-probabilities of the labels, (batch, num_labels).

        Args:
            input_ids: (batch, seq), sentences padded on the right.
            lengths: (batch,), as in `last_positions`.
        """
        pooled = self.pool(input_ids, lengths)  # (batch, dim)
        # In float32: in bfloat16 different labels could get equal scores.
        with torch.autocast(pooled.device.type, enabled=False):
            return F.log_softmax(self.classifier_head(self.dropout(pooled.float())), dim=-1)

    def pool(self, input_ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Compute the hidden state that represents each sentence, (batch, dim)."""
        positions = last_positions(input_ids, lengths, self.llama.config.causal)
        # `forward` would project to the vocabulary too.
        return self.llama.compute_hidden(input_ids, positions=positions)[:, 0]

    def to_checkpoint(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_classifier` rebuilds this classifier."""
        classifier: dict[str, Any] = {
            "num_labels": self.num_labels,
            "hidden_dropout_prob": self.dropout.p,
        }
        if self.label_names is not None:
            classifier["label_names"] = list(self.label_names)
        if self.tokenizer is not None:
            content = bytearray(self.tokenizer.content)
            classifier["tokenizer"] = torch.frombuffer(content, dtype=torch.uint8)
            classifier["max_sentence_len"] = self.tokenizer.max_len
        return {
            "model": self.state_dict(),
            "model_args": self.llama.config.to_model_args(),
            "classifier": classifier,
        }


def refuse_method(
    classifier: LlamaEmbeddingClassifier, method: object, path: str | Path
) -> LlamaEmbeddingClassifier:
    """Raise ValueError: a checkpoint's classifier differs from the assignment's."""
    raise ValueError(
        f"{path}: was fine-tuned with {reprlib.repr(method)}; load it with beyond.methods"
    )


def load_classifier(
    path: str | Path,
    make_tokenizer: Callable[[int | None, bytes], Tokenizer] = Tokenizer,
    apply_method: Callable[
        [LlamaEmbeddingClassifier, object, str | Path], LlamaEmbeddingClassifier
    ] = refuse_method,
) -> LlamaEmbeddingClassifier:
    """Load the fine-tuned classifier of a checkpoint, on the CPU, in eval mode.

    The pretrained checkpoint that it was made from is not needed. A checkpoint of the first version
    holds neither label words nor tokenizer, so these are None.

    Args:
        path: of the checkpoint.
        make_tokenizer: makes a tokenizer from `max_len` and its content.
        apply_method: changes the classifier if the checkpoint says that it differs from the
            assignment's, and how; called with the classifier, that description, and the path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a classifier's checkpoint, or a part of it does not fit, or it
            was fine-tuned with a method that is not known.
    """
    checkpoint = read_checkpoint(path)
    values = checkpoint.get("classifier")
    required = {"num_labels", "hidden_dropout_prob"}
    optional = {"label_names", "tokenizer", "max_sentence_len", "method"}
    if not isinstance(values, dict) or not required <= values.keys() <= required | optional:
        raise ValueError(f"{path}: does not hold a fine-tuned classifier")
    num_labels, dropout = parse_head(values, path)
    label_names = parse_label_names(values, num_labels, path)
    llama_config = parse_config(checkpoint, path)
    tokenizer = parse_tokenizer(values, llama_config.vocab_size, path, make_tokenizer)
    # The pretrained path is not used, since the model is passed.
    config = ClassifierConfig(num_labels, str(path), dropout, option="finetune")
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        model = LlamaEmbeddingClassifier(config, Llama(llama_config), label_names, tokenizer)
    if "method" in values:
        model = apply_method(model, values["method"], path)
    load_strictly(model, parse_weights(checkpoint, path), path)
    model.llama.tie_weights()  # loading gave each of the two names its own parameter
    return model.eval()


def parse_head(values: Mapping[str, Any], path: str | Path) -> tuple[int, float]:
    """Return the number of labels and the dropout probability of a checkpoint's classifier.

    Raises:
        ValueError: one of them is not valid.
    """
    num_labels, dropout = values["num_labels"], values["hidden_dropout_prob"]
    if type(num_labels) is not int or not 1 <= num_labels <= MAX_SIZE:
        raise ValueError(
            f"{path}: num_labels={reprlib.repr(num_labels)} is not a whole number from 1 to "
            f"{MAX_SIZE}"
        )
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(
            f"{path}: hidden_dropout_prob={reprlib.repr(dropout)} is not a number in [0, 1)"
        )
    return num_labels, dropout


def parse_label_names(
    values: Mapping[str, Any], num_labels: int, path: str | Path
) -> list[str] | None:
    """Return the label words of a checkpoint's classifier; None if it has none.

    Raises:
        ValueError: they are not `num_labels` different words.
    """
    names = values.get("label_names")
    if names is None:
        return None
    if not isinstance(names, list) or not all(is_text(name) and name.strip() for name in names):
        raise ValueError(f"{path}: label_names={reprlib.repr(names)} is not a list of words")
    if len(names) != num_labels or len(set(names)) < num_labels:
        raise ValueError(
            f"{path}: label_names={reprlib.repr(names)}: expected num_labels={num_labels} "
            "different words"
        )
    return names


def parse_tokenizer(
    values: Mapping[str, Any],
    vocab_size: int,
    path: str | Path,
    make_tokenizer: Callable[[int | None, bytes], Tokenizer],
) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint's classifier; None if it has none.

    Args:
        values: of the classifier.
        vocab_size: the model's.
        path: of the checkpoint; a tensor that claims more bytes than this file has is refused.
        make_tokenizer: as in `load_classifier`.

    Raises:
        ValueError: it is not a tokenizer of the model's vocabulary.
    """
    content, max_len = values.get("tokenizer"), values.get("max_sentence_len")
    if max_len is not None and (type(max_len) is not int or not 1 <= max_len <= LARGEST_INT):
        raise ValueError(
            f"{path}: max_sentence_len={reprlib.repr(max_len)} is not a whole number from 1 to "
            f"{LARGEST_INT}"
        )
    if content is None:
        return None
    file_size = Path(path).stat().st_size
    if not is_dense(content, (torch.uint8,)) or content.dim() != 1 or len(content) > file_size:
        raise ValueError(f"{path}: tokenizer is not a tensor of bytes")
    try:
        tokenizer = make_tokenizer(max_len, content.numpy().tobytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not tokenizer.fits(vocab_size):
        raise ValueError(
            f"{path}: the tokenizer has a vocabulary of {tokenizer.n_words}, but the model's is "
            f"{vocab_size}"
        )
    return tokenizer
