"""`LlamaEmbeddingClassifier`: evaluation, dropout, and what is trained, with our model inside.

Dropout is observed on 2,000 equal rows, with a head whose first label scores 2 times one feature of
the hidden state: without dropout that label is ahead by GAP, and where the feature is dropped by
BIAS. So any implementation of dropout can be judged, before or after pooling. By Hoeffding the
share of dropped rows is off by more than 0.08 with probability 2 exp(-2 n 0.08^2) = 2e-11, and 100
equal rows of an evaluation show a dropout, if there is one, unless with probability 0.7^100.
"""

from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from beyond.classroom.adapters import find
from beyond.classroom.part import AdaptError, Observations, Observed, Part, expect_tensor
from beyond.classroom.parts.classifier_mistakes import VARIANTS, WHERE, combine
from beyond.classroom.parts.probes import normal
from beyond.classroom.parts.sentences import CONFIG, PADDED, UNPADDED, make_model, pretrained
from beyond.classroom.student import Student
from classifier import ClassifierConfig, LlamaEmbeddingClassifier
from llama import Llama

LABELS = 4
RATE = 0.3
ROWS, EVALUATED = 2000, 100
EQUAL = torch.full((1, 5), 7)  # equal tokens have equal hidden states, whichever column is read
FEATURE = 5  # of the hidden state; the one that is observed
GAP, BIAS = 2.0, 0.4
TOLERANCE = 1e-4  # of log-probabilities between -10 and 0
Make = Callable[[Llama, str], nn.Module]  # a classifier with this model and option


def make_with(cls: type[LlamaEmbeddingClassifier]) -> Make:
    """Return a function that makes a classifier of a class of ours."""
    return lambda model, option: cls(ClassifierConfig(LABELS, "", RATE, option), model)


def adapt(student: Student) -> Make:
    """Return a function that makes the student's classifier, with our model inside."""
    cls = find(student, "classifier", "LlamaEmbeddingClassifier")

    def make(model: Llama, option: str) -> nn.Module:
        config = SimpleNamespace(
            num_labels=LABELS,
            pretrained_model_path="stories42M.pt",
            hidden_dropout_prob=RATE,
            option=option,
        )
        with pretrained(student, model):
            return cls(config)

    return make


def find_head(classifier: nn.Module, model: Llama) -> nn.Linear:
    """Return the one linear layer that is not the model's.

    Raises:
        AdaptError: there is none, or there are several.
    """
    inside = set(model.modules())
    found = [m for m in classifier.modules() if isinstance(m, nn.Linear) and m not in inside]
    if len(found) != 1:
        raise AdaptError(f"expected the classifier to have one linear layer, found {len(found)}")
    return found[0]


def make_filled(make: Make, option: str = "finetune") -> tuple[nn.Module, Llama, nn.Linear]:
    """Make a classifier whose head has fixed random weights; also returns its model and head."""
    model = make_model()
    classifier = make(model, option)
    head = find_head(classifier, model)
    with torch.no_grad():
        head.weight.copy_(normal(*head.weight.shape, seed=3))
        if head.bias is not None:
            head.bias.copy_(normal(LABELS, seed=4))
    if is_given_logits(classifier.eval(), head):
        weight = normal(LABELS, model.config.vocab_size, seed=3)
        head.weight = nn.Parameter(weight, head.weight.requires_grad)
    return classifier, model, head


@torch.no_grad()
def is_given_logits(classifier: nn.Module, head: nn.Linear) -> bool:
    """Say whether a head for hidden states is given the vocabulary's logits, which is an error.

    With a head that fits, the mistake is seen beside others, whether or not the head was made so.
    """
    sizes = []
    hook = head.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
    with suppress(Exception):  # it will come again where it is reported
        classifier(UNPADDED.clone())
    hook.remove()
    return sizes == [CONFIG.vocab_size] and head.in_features == CONFIG.dim


def classify(classifier: nn.Module, tokens: Tensor) -> Tensor:
    """Return what a classifier computes, (batch, LABELS)."""
    result = expect_tensor(classifier(tokens.clone()), "the result of the classifier")
    if result.shape != (len(tokens), LABELS):
        raise AdaptError(
            f"the classifier returns {tuple(result.shape)}, expected (batch, num_labels) = "
            f"{(len(tokens), LABELS)}"
        )
    return result


def observe(make: Make) -> Observations:
    """Evaluate, train with dropout, and see which parameters would be trained."""
    leads = {mode: measure_leads(make, mode == "training") for mode in ("training", "evaluation")}
    is_steady = bool((leads["evaluation"] - leads["evaluation"][0]).abs().max() < 1e-3)
    found = {}
    for kind, tokens in {"": UNPADDED, " of padded rows": PADDED}.items():
        value = classify(make_filled(make)[0], tokens)
        value = value if is_steady else torch.full_like(value, -1.0)
        found[f"log-probabilities{kind}"] = Observed(value, TOLERANCE)
    steady = {"evaluation is not random": torch.tensor(is_steady)}
    flags = steady | describe_dropout(leads["training"]) | observe_training(make)
    return found | {name: Observed(value, 1e-3) for name, value in flags.items()}


@torch.no_grad()
def measure_leads(make: Make, is_training: bool) -> Tensor:
    """Return by how much the first label is ahead of the second in each of many equal rows."""
    classifier, model, head = make_filled(make)
    feature = model.compute_hidden(EQUAL)[0, -1, FEATURE]
    head.weight.zero_()
    head.weight[0, FEATURE] = GAP / feature
    if head.bias is not None:
        head.bias.copy_(torch.tensor([BIAS, 0.0, 0.3, 0.7]))
    rows = EQUAL.repeat(ROWS if is_training else EVALUATED, 1)
    out = classify(classifier.train(is_training), rows)
    return out[:, 0] - out[:, 1]


def describe_dropout(leads: Tensor) -> dict[str, Tensor]:
    """Describe what dropout did to the lead of the first label, in words."""

    def is_near(value: float) -> Tensor:
        return (leads - value).abs() < 1e-2

    is_dropped = is_near(BIAS)
    share = float(is_dropped.double().mean())
    kept = leads[~is_dropped]
    # GAP / (1 - RATE)^k for no dropout or one without rescaling, one dropout, and two.
    scaled = [bool((is_near(BIAS + GAP / (1 - RATE) ** k) | is_dropped).all()) for k in range(3)]
    return {
        "training is random": torch.tensor(bool((leads - leads[0]).abs().max() > 1e-3)),
        "hidden features are dropped": torch.tensor(share > 0.01),
        "they are dropped at the given rate": torch.tensor(abs(share - RATE) < 0.08),
        "the others are all equal": torch.tensor(
            len(kept) > 0 and bool((kept - kept.median()).abs().max() < 1e-2)
        ),
        "the others are rescaled: not, once, twice": torch.tensor(scaled),
    }


def observe_training(make: Make) -> dict[str, Tensor]:
    """See which parameters ask for a gradient, and whether the model's get one."""
    found = {}
    for option in ("pretrain", "finetune"):
        _, model, head = make_filled(make, option)
        trained = [parameter.requires_grad for parameter in model.parameters()]
        found[f"option {option}: all, some of the model, and the head, are trained"] = torch.tensor(
            [all(trained), any(trained), head.weight.requires_grad]
        )
    classifier, model, head = make_filled(make)
    result = classifier.train()(UNPADDED.clone())  # an evaluation needs no gradient
    if result.requires_grad:
        result.square().sum().backward()
    grads = [model.tok_embeddings.weight.grad, head.weight.grad]
    found["the loss has a gradient for the model, the head"] = torch.tensor(
        [grad is not None and bool((grad != 0).any()) for grad in grads]
    )
    return found


PART = Part(
    "embedding classifier",
    WHERE,
    make_with(LlamaEmbeddingClassifier),
    VARIANTS,
    observe,
    adapt,
    combine,
)
