"""Two ways to let a Llama judge a sentence: ask it for the label word, or train a head on it.

Both read one column of the model's output for each sentence. In reference mode that is the last
column of the padded batch, as the assignment has it; in causal mode it is the sentence's own last
token, which the caller's `lengths` tell.
"""

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base_llama import load_strictly, parse_config, parse_weights, read_checkpoint
from config import MAX_SIZE
from llama import Llama, load_pretrained
from tokenizer import Tokenizer


@dataclass
class ClassifierConfig:
    """What the classifiers read of the object that configures them; any with these will do."""

    num_labels: int
    pretrained_model_path: str
    hidden_dropout_prob: float  # in [0, 1); the embedding classifier's
    option: str  # "finetune" trains all parameters, anything else only the head


def read_out(hidden: Tensor, lengths: Tensor | None, causal: bool) -> Tensor:
    """The hidden state that stands for each row.

    Args:
        hidden: (batch, seq, dim), rows padded on the right.
        lengths: (batch,), tokens of each row that are no padding; None: all of them.
        causal: whether to read each row at its own last token.

    Returns:
        (batch, dim).
    """
    if not causal or lengths is None:
        # Faithful: without causal mode the last column is read, for most rows a pad.
        return hidden[:, -1]
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


class LlamaZeroShotClassifier(nn.Module):
    """Scores each label by how likely its words are as the prompt's continuation; all frozen.

    Args:
        config: `num_labels` and `pretrained_model_path` are read.
        tokenizer: the checkpoint's.
        label_names: the label words.
        llama: the model; None: loaded from `config.pretrained_model_path`.

    Raises:
        ValueError: there are not `num_labels` label names, or one has no tokens.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        tokenizer: Tokenizer,
        label_names: list[str],
        llama: Llama | None = None,
    ) -> None:
        super().__init__()
        if len(label_names) != config.num_labels:
            raise ValueError(f"{len(label_names)} label names for num_labels={config.num_labels}")
        self.llama = load_pretrained(config.pretrained_model_path) if llama is None else llama
        self.llama.requires_grad_(False)
        self.label_ids = [tokenizer.encode(name, bos=False, eos=False) for name in label_names]
        for name, ids in zip(label_names, self.label_ids, strict=True):
            if not ids:
                raise ValueError(f"the label name {name!r} has no tokens")

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Scores (batch, num_labels): sums of log-probabilities, so at most 0.

        Args:
            input_ids: (batch, seq), prompts padded on the right.
            lengths: (batch,), as in `read_out`.
        """
        hidden = self.llama.compute_hidden(input_ids)
        last = read_out(hidden, lengths, self.llama.config.causal)  # (batch, dim)
        # In bfloat16, scores would tie; one row a sentence costs little.
        with torch.autocast(last.device.type, enabled=False):
            log_probs = F.log_softmax(self.llama.output(last.float()), dim=-1)  # (batch, vocab)
        # Faithful: all tokens of a label are scored at this one position.
        return torch.stack([log_probs[:, ids].sum(dim=-1) for ids in self.label_ids], dim=-1)


class LlamaEmbeddingClassifier(nn.Module):
    """A linear head on one hidden state: log_softmax(W dropout(h) + b).

    Args:
        config: all four attributes of `ClassifierConfig` are read.
        llama: the model; None: loaded from `config.pretrained_model_path`.
    """

    def __init__(self, config: ClassifierConfig, llama: Llama | None = None) -> None:
        super().__init__()
        self.llama = load_pretrained(config.pretrained_model_path) if llama is None else llama
        self.llama.requires_grad_(config.option == "finetune")
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier_head = nn.Linear(self.llama.config.dim, config.num_labels)

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Log-probabilities of the labels, (batch, num_labels).

        Args:
            input_ids: (batch, seq), sentences padded on the right.
            lengths: (batch,), as in `read_out`.
        """
        hidden = self.llama.compute_hidden(input_ids)  # no vocabulary projection
        last = read_out(hidden, lengths, self.llama.config.causal)  # (batch, dim)
        with torch.autocast(last.device.type, enabled=False):  # as above
            return F.log_softmax(self.classifier_head(self.dropout(last.float())), dim=-1)

    def to_checkpoint(self) -> dict[str, Any]:
        """Tensors and plain values from which `load_classifier` rebuilds this classifier."""
        return {
            "model": self.state_dict(),
            "model_args": self.llama.config.to_model_args(),
            "classifier": {
                "num_labels": self.classifier_head.out_features,
                "hidden_dropout_prob": self.dropout.p,
            },
        }


def load_classifier(path: str | Path) -> LlamaEmbeddingClassifier:
    """The fine-tuned classifier of a checkpoint, on the CPU, in eval mode.

    It is whole without the pretrained checkpoint that it was made from.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such checkpoint, or its weights do not fit.
    """
    checkpoint = read_checkpoint(path)
    try:
        config = ClassifierConfig(
            pretrained_model_path=str(path), option="finetune", **checkpoint["classifier"]
        )
    except (KeyError, TypeError):
        raise ValueError(f"{path}: holds no fine-tuned classifier") from None
    num_labels, dropout = config.num_labels, config.hidden_dropout_prob
    if type(num_labels) is not int or not 1 <= num_labels <= MAX_SIZE:
        raise ValueError(f"{path}: num_labels={reprlib.repr(num_labels)} is no number of labels")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(
            f"{path}: hidden_dropout_prob={reprlib.repr(dropout)} is not a number in [0, 1)"
        )
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        model = LlamaEmbeddingClassifier(config, Llama(parse_config(checkpoint, path)))
    load_strictly(model, parse_weights(checkpoint, path), path)
    model.llama.tie_weights()
    return model.eval()
