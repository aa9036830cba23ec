"""`LlamaZeroShotClassifier`: the scores of the label words, with our model inside."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond.classroom.adapters import find
from beyond.classroom.part import (
    Mistake,
    Observations,
    Observed,
    Part,
    Variant,
    expect_tensor,
)
from beyond.classroom.parts.sentences import (
    PADDED,
    UNPADDED,
    Words,
    last_real,
    make_model,
    pretrained,
)
from beyond.classroom.student import Student
from classifier import ClassifierConfig, LlamaZeroShotClassifier
from llama import Llama

WHERE = "classifier.py, LlamaZeroShotClassifier.forward"
TOLERANCE = 1e-4  # of sums of log-probabilities between -50 and 0
ONE_TOKEN = {"fair": [8], "poor": [12], "fine": [17], "dull": [5], "great": [10]}
SEVERAL_TOKENS = {"fair": [8, 15], "poor": [12], "lovely": [17, 5, 11]}
Make = Callable[[Llama, dict[str, list[int]]], nn.Module]


def make_with(cls: type[LlamaZeroShotClassifier]) -> Make:
    """Return a function that makes a classifier of a class of ours."""

    def make(model: Llama, labels: dict[str, list[int]]) -> nn.Module:
        config = ClassifierConfig(len(labels), "", 0.0, "finetune")
        return cls(config, cast(Any, Words(labels)), list(labels), model)

    return make


def adapt(student: Student) -> Make:
    """Return a function that makes the student's classifier, with our model inside."""
    cls = find(student, "classifier", "LlamaZeroShotClassifier")

    def make(model: Llama, labels: dict[str, list[int]]) -> nn.Module:
        config = SimpleNamespace(
            num_labels=len(labels),
            pretrained_model_path="stories42M.pt",
            hidden_dropout_prob=0.0,
            option="prompt",
        )
        with pretrained(student, model):
            return cls(config, Words(labels), list(labels))

    return make


def observe(make: Make) -> Observations:
    """Score labels of one and of several tokens, after rows without and with padding."""
    found = {}
    for kind, tokens in {"": UNPADDED, " of padded rows": PADDED}.items():
        for number, labels in {"one token": ONE_TOKEN, "several tokens": SEVERAL_TOKENS}.items():
            classifier = make(make_model(), labels).eval()
            scores = expect_tensor(classifier(tokens.clone()), "the scores")
            found[f"scores{kind}, labels of {number}"] = Observed(scores, TOLERANCE)
    frozen = not any(parameter.requires_grad for parameter in classifier.parameters())
    return found | {"all parameters are frozen": Observed(torch.tensor(frozen), 1e-3)}


class Steps(LlamaZeroShotClassifier):
    """The classifier in small steps, each of which a variant replaces; as it stands it is right."""

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        logits = self.llama(input_ids, input_ids)[0]  # of all columns
        log_probs = self.normalise(self.pick(logits, input_ids))  # (batch, vocab)
        scores = [self.score(log_probs[:, self.spell(ids)]) for ids in self.label_ids]
        return self.finish(torch.stack(scores, dim=-1))

    def pick(self, logits: Tensor, input_ids: Tensor) -> Tensor:
        return logits[:, -1]

    def normalise(self, logits: Tensor) -> Tensor:
        return F.log_softmax(logits, dim=-1)

    def spell(self, ids: list[int]) -> list[int]:
        return ids

    def score(self, log_probs: Tensor) -> Tensor:
        return log_probs.sum(dim=-1)

    def finish(self, scores: Tensor) -> Tensor:
        return scores


class Trainable(Steps):
    """Does not freeze its model."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.requires_grad_(True)


def _pick_real(logits: Tensor, input_ids: Tensor, offset: int) -> Tensor:
    return logits[torch.arange(len(logits)), last_real(input_ids) - offset]


def _entry(name: str, why: str, seen: str = "", is_note: bool = False, **methods: Any) -> Variant:
    cls = methods.pop("cls", None) or type("Variant", (Steps,), methods)
    return Variant(Mistake(name, WHERE, why, seen, is_note=is_note), make_with(cls))


VARIANTS: tuple[Variant, ...] = (
    _entry(
        "label score averaged",
        "The mean over a label's tokens favours labels of many tokens; the score is the sum of "
        "their log-probabilities. Labels of one token, as SST's, do not show it.",
        score=lambda _, log_probs: log_probs.mean(dim=-1),
    ),
    _entry(
        "probabilities instead of log-probabilities",
        "Probabilities are added where log-probabilities should be: a label of two tokens is a "
        "product of probabilities, not a sum. Use log_softmax.",
        normalise=lambda _, logits: F.softmax(logits, dim=-1),
    ),
    _entry(
        "exponentiated scores",
        "The scores are probabilities, exp of the sum of log-probabilities. The predictions are "
        "the same, but tiny ones become 0.",
        is_note=True,
        finish=lambda _, scores: scores.exp(),
    ),
    _entry(
        "first token of a label only",
        "All but the first token of a label are left out, so labels that begin alike get the same "
        "score. Add the log-probabilities of all its tokens.",
        spell=lambda _, ids: ids[:1],
    ),
    _entry(
        "last token of a label only",
        "All but the last token of a label are left out. Add the log-probabilities of all.",
        spell=lambda _, ids: ids[-1:],
    ),
    _entry(
        "log-probabilities multiplied",
        "The product of log-probabilities changes its sign with the number of tokens. Their sum "
        "is the logarithm of the product of probabilities.",
        score=lambda _, log_probs: log_probs.prod(dim=-1),
    ),
    _entry(
        "no softmax",
        "Logits are added where log-probabilities should be; for labels of different lengths they "
        "cannot be compared. Apply log_softmax over the vocabulary first.",
        normalise=lambda _, logits: logits,
    ),
    _entry(
        "softmax over the batch",
        "Each row's score depends on the other rows, and a single row gets 0 for every label. "
        "Use dim=-1, the vocabulary.",
        normalise=lambda _, logits: F.log_softmax(logits, dim=0),
    ),
    _entry(
        "softmax over the labels",
        "The scores are normalised over the labels. The predictions are the same, but the numbers "
        "are no log-probabilities of the label words.",
        is_note=True,
        finish=lambda _, scores: F.log_softmax(scores, dim=-1),
    ),
    _entry(
        "negated scores",
        "The scores are losses: the best label has the lowest, and argmax picks the worst.",
        finish=lambda _, scores: -scores,
    ),
    _entry(
        "first column",
        "The scores are read after the first token, BOS, so all sentences get the same. Read the "
        "last column.",
        pick=lambda _, logits, input_ids: logits[:, 0],
    ),
    _entry(
        "mean of all columns",
        "The logits of all columns are averaged; the label follows the last one.",
        pick=lambda _, logits, input_ids: logits.mean(dim=1),
    ),
    _entry(
        "column before the last",
        "The scores are read one column too early.",
        pick=lambda _, logits, input_ids: logits[:, -2],
    ),
    _entry(
        "last real token instead of the last column",
        "The scores are read before the padding. That is the better place, but the assignment "
        "reads the last column of the padded batch, and its published accuracies depend on it.",
        "yanaida25",
        is_note=True,
        pick=lambda _, logits, input_ids: _pick_real(logits, input_ids, 0),
    ),
    _entry(
        "token before the last real one instead of the last column",
        "The scores are read before the prompt's last space, which is a token of its own. That "
        "is the better place, but the assignment reads the last column of the padded batch, and "
        "its published accuracies depend on it.",
        "zhulenghan, BrOccoli716, Mingowzm",
        is_note=True,
        pick=lambda _, logits, input_ids: _pick_real(logits, input_ids, 1),
    ),
    _entry(
        "labels with BOS",
        "Each label's score includes the log-probability of BOS. The predictions are the same. "
        "Encode labels with bos=False, eos=False.",
        is_note=True,
        spell=lambda _, ids: [1, *ids],
    ),
    _entry(
        "parameters not frozen",
        "Scoring needs no training, but all parameters ask for gradients, which cost memory. Set "
        "requires_grad to False.",
        is_note=True,
        cls=Trainable,
    ),
)

PART = Part(
    "zero-shot scores", WHERE, make_with(LlamaZeroShotClassifier), tuple(VARIANTS), observe, adapt
)
PART = Part(
    "zero-shot scores",
    WHERE,
    make_with(LlamaZeroShotClassifier),
    VARIANTS,
    observe,
    adapt,
)
