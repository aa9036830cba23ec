"""A frozen backbone: what trains, what it computes, and what it does not."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from beyond.methods.frozen_backbone import FrozenBackbone
from beyond.methods.method import Method
from beyond.methods.schedules import Groups, LearningRates, split
from llama import load_pretrained
from optimizer import AdamW
from run_llama import classification_loss
from tests.beyond.methods.helpers import (
    finetune_and_load,
    make_classifier,
    make_rows,
    train_steps,
    weights_of,
)
from tests.beyond.runs import FINETUNE, assert_equal

FREEZE = [*FINETUNE, "--freeze_backbone"]


def test_only_the_head_trains(workplace: Path) -> None:
    pretrained = load_pretrained("stories42M.pt").state_dict()
    weights, plain = finetune_and_load(FREEZE), finetune_and_load(FINETUNE)
    for name, weight in pretrained.items():
        assert torch.equal(weights[f"llama.{name}"], weight)
    assert weights.keys() == plain.keys()
    untrained = finetune_and_load([*FREEZE, "--lr", "0"])
    head = "classifier_head.weight"
    assert not torch.equal(weights[head], untrained[head])
    assert not torch.equal(weights[head], plain[head])


def test_head_trains_as_on_stored_hidden_states() -> None:
    """A linear layer that knows nothing of a model, on its last hidden states."""
    rows, classifier = make_rows(), make_classifier()
    last = classifier.llama.compute_hidden(rows.tokens).detach()[torch.arange(7), rows.lengths - 1]
    head = nn.Linear(48, 2)
    head.load_state_dict(classifier.classifier_head.state_dict())
    optimizer = AdamW(head.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (F.cross_entropy(head(last), rows.labels, reduction="sum") / 8).backward()
        optimizer.step()
    method = Method(classifier, classification_loss, [FrozenBackbone(classifier)])
    train_steps(method)
    for ours, theirs in zip(
        classifier.classifier_head.parameters(), head.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_limit_case_is_plain_fine_tuning_bit_for_bit() -> None:
    """It is a plain run in which the backbone has a learning rate of 0."""
    plain, frozen = make_classifier(), make_classifier()
    head = {id(parameter) for parameter in plain.classifier_head.parameters()}

    class HeadOnly(LearningRates):
        def parameter_groups(self, groups: Groups) -> Groups:
            parts = split(groups, lambda parameter: int(id(parameter) not in head))
            return [{**group, "lr_factor": 1.0 - kind} for kind, group in parts]

    train_steps(Method(plain, classification_loss, [HeadOnly(plain)]))
    train_steps(Method(frozen, classification_loss, [FrozenBackbone(frozen)]))
    assert_equal(weights_of(frozen), weights_of(plain))
    changed = [
        name
        for name, w in weights_of(make_classifier()).items()
        if (w != weights_of(plain)[name]).any()
    ]
    assert changed == ["classifier_head.weight", "classifier_head.bias"]


def test_backbone_uses_no_dropout(workplace: Path) -> None:
    """And draws no random numbers for it, so the dropout before the head is the same too."""
    first, second = (finetune_and_load([*FREEZE, "--dropout", dropout]) for dropout in ("0", "0.5"))
    assert all(torch.equal(second[name], weight) for name, weight in first.items())
    still = finetune_and_load([*FREEZE, "--hidden_dropout_prob", "0"])
    assert not torch.equal(still["classifier_head.weight"], first["classifier_head.weight"])


def test_no_graph_is_recorded_in_the_backbone() -> None:
    classifier = make_classifier(dropout=0.1)
    method = Method(classifier, classification_loss, [FrozenBackbone(classifier)]).train()
    method.begin_step(0, 1)
    rows = make_rows()
    stored: list[torch.Tensor] = []

    def store(tensor: torch.Tensor) -> torch.Tensor:
        stored.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        loss = method(*rows)
    assert loss.requires_grad and not classifier.pool(rows.tokens, rows.lengths).requires_grad
    # Of the dropout, the head and the loss: nothing is longer than the rows times their features.
    assert 0 < max(tensor.numel() for tensor in stored) <= 7 * 48


def test_optimizer_holds_whatever_is_not_the_backbone() -> None:
    """Also what a classifier has besides, such as a learned pooling."""
    classifier = make_classifier()
    classifier.query = nn.Parameter(torch.ones(48))
    before = weights_of(classifier)
    method = Method(classifier, classification_loss, [FrozenBackbone(classifier)])
    (group,) = method.parameter_groups()
    head = classifier.classifier_head
    assert {id(p) for p in group["params"]} == {id(classifier.query), *map(id, head.parameters())}
    train_steps(method)
    changed = {
        name for name, w in weights_of(classifier).items() if not torch.equal(w, before[name])
    }
    assert changed == {"classifier_head.weight", "classifier_head.bias"}
    optimizer = AdamW(method.parameter_groups(), lr=1e-2)
    method(*make_rows()).backward()
    optimizer.step()
    assert len(optimizer.state) == 2
