"""Wrong variants of `LlamaEmbeddingClassifier`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond.classroom.part import Mistake, Variant
from beyond.classroom.parts.sentences import PAD, last_real
from classifier import ClassifierConfig, LlamaEmbeddingClassifier
from llama import Llama

WHERE = "classifier.py, LlamaEmbeddingClassifier.forward"
WHERE_INIT = "classifier.py, LlamaEmbeddingClassifier.__init__"


class Steps(LlamaEmbeddingClassifier):
    """The classifier in small steps, each of which a variant replaces; as it stands it is right."""

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        hidden = self.choose(input_ids, *self.run(input_ids))  # (batch, dim)
        logits = self.classifier_head(self.activate(self.drop(hidden)))
        return self.normalise(self.drop_logits(logits))

    def run(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the hidden states of all columns."""
        return self.llama(input_ids, input_ids)

    def choose(self, input_ids: Tensor, logits: Tensor, hidden: Tensor) -> Tensor:
        return hidden[:, -1]

    def drop(self, hidden: Tensor) -> Tensor:
        return self.dropout(hidden)

    def activate(self, hidden: Tensor) -> Tensor:
        return hidden

    def drop_logits(self, logits: Tensor) -> Tensor:
        return logits

    def normalise(self, logits: Tensor) -> Tensor:
        return F.log_softmax(logits, dim=-1)


def _make_head_of_vocabulary(steps: Steps, config: ClassifierConfig, llama: Llama) -> None:
    Steps.__init__(steps, config, llama)
    steps.classifier_head = nn.Linear(llama.config.vocab_size, config.num_labels)


def _trains(
    llama: bool | None = None, head: bool = True, part: str = ""
) -> Callable[[ClassifierConfig, Llama], Steps]:
    """Return a function that makes a classifier which trains its model whatever the option says.

    Args:
        llama: whether the model is trained; None: as the option says.
        head: whether the head is trained.
        part: only parameters with this in their name are affected.
    """

    def make(config: ClassifierConfig, model: Llama) -> Steps:
        classifier = Steps(config, model)
        classifier.classifier_head.requires_grad_(head)
        for name, parameter in model.named_parameters():
            if llama is not None and part in name:
                parameter.requires_grad_(llama)
        return classifier

    return make


def _mean_of_real(steps: Steps, input_ids: Tensor, logits: Tensor, hidden: Tensor) -> Tensor:
    is_real = (input_ids != PAD)[..., None]
    return (hidden * is_real).sum(dim=1) / is_real.sum(dim=1)


def _run_without_gradient(steps: Steps, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return Steps.run(steps, input_ids)


def _not_rescaled(steps: Steps, hidden: Tensor) -> Tensor:
    return hidden * (torch.rand_like(hidden) > steps.dropout.p) if steps.training else hidden


def _entry(
    name: str,
    why: str,
    seen: str = "",
    is_note: bool = False,
    cls: Callable[[ClassifierConfig, Llama], nn.Module] | None = None,
    where: str = WHERE,
    **methods: Any,
) -> Variant:
    made = _make_with(cls) if cls else combine(**methods)
    return Variant(Mistake(name, where, why, seen, is_note=is_note), made)


def _make_with(cls: Callable[[ClassifierConfig, Llama], nn.Module]) -> Callable[..., nn.Module]:
    def make(model: Llama, option: str, num_labels: int = 4, rate: float = 0.3) -> nn.Module:
        return cls(ClassifierConfig(num_labels, "", rate, option), model)

    return make


def combine(**methods: Any) -> Callable[..., nn.Module]:
    """Return a function that makes a classifier with other methods than `Steps`."""
    make: Any = _make_with(type("Variant", (Steps,), methods))
    make.changes = methods
    return make


VARIANTS = (
    _entry(
        "probabilities instead of log-probabilities",
        "The loss, nll_loss, takes log-probabilities; with probabilities it is minus the "
        "probability of the label, whose gradient is weak where the model is most wrong. Use "
        "log_softmax.",
        normalise=lambda _, logits: F.softmax(logits, dim=-1),
    ),
    _entry(
        "raw logits",
        "The loss, nll_loss, takes log-probabilities; with logits it falls without end. Use "
        "log_softmax.",
        normalise=lambda _, logits: logits,
    ),
    _entry(
        "log-sigmoid instead of log-softmax",
        "The labels exclude each other, so their probabilities must sum to 1. Use log_softmax.",
        normalise=lambda _, logits: F.logsigmoid(logits),
    ),
    _entry(
        "softmax over the batch",
        "Each sentence's result depends on the others in its batch. Use dim=-1, the labels.",
        normalise=lambda _, logits: F.log_softmax(logits, dim=0),
    ),
    _entry(
        "first column",
        "The hidden state of BOS is classified. Use the last column, hidden[:, -1].",
        "U1ltra",
        choose=lambda _, input_ids, logits, hidden: hidden[:, 0],
    ),
    _entry(
        "second column",
        "The hidden state of the first word is classified. Use the last column, hidden[:, -1].",
        "yanaida25",
        choose=lambda _, input_ids, logits, hidden: hidden[:, 1],
    ),
    _entry(
        "column before the last",
        "The hidden state is read one column too early. Use the last column, hidden[:, -1].",
        "zhulenghan",
        choose=lambda _, input_ids, logits, hidden: hidden[:, -2],
    ),
    _entry(
        "mean of all columns",
        "The mean over all columns, padding included, is classified. The assignment takes the "
        "last column.",
        choose=lambda _, input_ids, logits, hidden: hidden.mean(dim=1),
    ),
    _entry(
        "mean of the real tokens",
        "The mean over the tokens that are not padding is classified. It is a good choice, but "
        "the assignment takes the last column.",
        "Linhcodelinhtinh",
        choose=_mean_of_real,
    ),
    _entry(
        "maximum over all columns",
        "The largest value of each feature is classified. The assignment takes the last column.",
        choose=lambda _, input_ids, logits, hidden: hidden.amax(dim=1),
    ),
    _entry(
        "last real token instead of the last column",
        "The token before the padding is classified. That is a good reading of 'the final token', "
        "but the course's reference results take the last column of the padded batch.",
        "yanaida25",
        is_note=True,
        choose=lambda _, input_ids, logits, hidden: hidden[
            torch.arange(len(hidden)), last_real(input_ids)
        ],
    ),
    _entry(
        "logits of the vocabulary instead of the hidden state",
        "The head classifies 32,000 scores of next tokens instead of the hidden state of size "
        "dim, or ends in an error, because it is made for dim. The model returns logits, hidden: "
        "use the second, self.llama(input_ids)[1].",
        __init__=_make_head_of_vocabulary,
        choose=lambda _, input_ids, logits, hidden: logits[:, -1],
    ),
    _entry(
        "ReLU before the head",
        "Half of the hidden state is set to 0 before the head, which is a linear layer of the "
        "hidden state itself.",
        activate=lambda _, hidden: hidden.relu(),
    ),
    _entry(
        "tanh before the head",
        "The hidden state is squashed, as BERT's pooler does. The head is a linear layer of the "
        "hidden state itself.",
        activate=lambda _, hidden: hidden.tanh(),
    ),
    _entry(
        "ReLU after the head",
        "Negative logits become 0, so labels that the head rules out are tied and get no "
        "gradient. Use log_softmax of the logits.",
        drop_logits=lambda _, logits: logits.relu(),
    ),
    _entry(
        "no dropout",
        "self.dropout is not used, so fine-tuning overfits more. Apply it to the hidden state, "
        "before the head.",
        drop=lambda _, hidden: hidden,
    ),
    _entry(
        "dropout after the head",
        "Whole logits are set to 0 at random, which is noise in the labels. Apply dropout to the "
        "hidden state, before the head.",
        drop=lambda _, hidden: hidden,
        drop_logits=lambda steps, logits: steps.dropout(logits),
    ),
    _entry(
        "dropout twice",
        "The hidden state goes through dropout two times, so half of it is dropped instead of "
        "0.3. Apply it once.",
        drop=lambda steps, hidden: steps.dropout(steps.dropout(hidden)),
    ),
    _entry(
        "dropout while evaluating",
        "Predictions are random. F.dropout(x, p) drops in eval mode too; use self.dropout, or "
        "F.dropout(x, p, self.training).",
        drop=lambda steps, hidden: F.dropout(hidden, steps.dropout.p),
    ),
    _entry(
        "dropout only while evaluating",
        "The mode is inverted: training has no dropout and predictions are random.",
        drop=lambda steps, hidden: F.dropout(hidden, steps.dropout.p, not steps.training),
    ),
    _entry(
        "dropout rate ignored",
        "The rate is not config.hidden_dropout_prob, so that option has no effect.",
        where=WHERE_INIT,
        drop=lambda steps, hidden: F.dropout(hidden, 0.1, steps.training),
    ),
    _entry(
        "dropout without rescaling",
        "What is kept is not divided by 1 - p, so training and evaluation see hidden states of "
        "different sizes.",
        drop=_not_rescaled,
    ),
    _entry(
        "frozen parameters trained",
        "With option 'pretrain' only the head is to be trained, but the model's parameters ask "
        "for gradients too. Set requires_grad to False.",
        cls=_trains(llama=True),
        where=WHERE_INIT,
    ),
    _entry(
        "model frozen while fine-tuning",
        "With option 'finetune' all parameters are to be trained, but the model's have "
        "requires_grad False.",
        cls=_trains(llama=False),
        where=WHERE_INIT,
    ),
    _entry(
        "only a part of the model fine-tuned",
        "With option 'finetune' all parameters are to be trained, but some of the model's have "
        "requires_grad False.",
        cls=_trains(llama=False, part="layers.0."),
        where=WHERE_INIT,
    ),
    _entry(
        "no gradient for the model",
        "The model runs under no_grad or its hidden state is detached, so fine-tuning trains the "
        "head only.",
        run=_run_without_gradient,
    ),
    _entry(
        "head frozen",
        "The head's weights are random and are not trained. Leave their requires_grad True.",
        cls=_trains(head=False),
        where=WHERE_INIT,
    ),
)
