"""The part `Llama.forward`: its probes. The layers and the final norm are ours."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from beyond.classroom.adapters import make_model
from beyond.classroom.part import AdaptError, Observations, Observed, Part, expect_tensor
from beyond.classroom.parts.model_mistakes import VARIANTS, WHERE, Build, Forward, variant
from beyond.classroom.parts.probes import dropout_pattern, fill, gradients
from beyond.classroom.student import Student
from config import LlamaConfig
from llama import Llama

RATE = 0.25


class _Mix(nn.Module):
    """Stands for a layer: adds each feature's neighbour, so that a dropout before it shows."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x + x.roll(1, -1)


class _Same(nn.Module):
    """Stands for a layer that changes nothing."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


def make(rate: float = 0.0, train: bool = False, layer: nn.Module | None = None) -> Llama:
    """Make a small model; if `layer` is given, it stands for every layer, and there is no norm."""
    config = LlamaConfig(
        vocab_size=13, dim=16, n_layers=3, n_heads=2, hidden_dim=24, max_seq_len=16, dropout=rate
    )
    model = fill(Llama(config), 0.3)
    if layer is not None:
        model.layers = nn.ModuleList([layer] * 3)
        model.add_module("norm", nn.Identity())
    for module in model.children():
        module.eval()
    model.training = train
    model.dropout.train(train)
    return model


def observe(build: Build) -> Observations:
    """Run the model without and with targets, its dropout on the embeddings, and gradients."""
    tokens = torch.arange(15).reshape(3, 5) * 7 % 13

    def run(forward: Forward, tokens: Tensor, targets: Tensor | None = None) -> list[Tensor]:
        result = forward(tokens) if targets is None else forward(tokens, targets=targets)
        if result is None:
            raise NotImplementedError("Llama.forward returns None")
        if not isinstance(result, tuple | list) or len(result) < 2:
            raise AdaptError("Llama.forward does not return a pair, logits and hidden states")
        return [
            expect_tensor(result[0], "logits"),
            expect_tensor(result[1], "the hidden states"),
        ]

    def pattern(name: str, train: bool, layer: nn.Module) -> Observations:
        """Describe what the model's dropout did to the hidden states."""
        many = tokens.repeat(20, 1)
        dropped = run(build(make(RATE, train, layer)), many)[1]
        kept = run(build(make(0.0, False, layer)), many)[1]
        return dropout_pattern(name, dropped, kept, RATE)

    @cache
    def trained() -> tuple[Forward, dict[str, Any]]:
        """Make the model as in training; also returns the attributes of its embeddings.

        The embeddings have no matrix: `weight` is to be set.
        """
        model = make(train=True)
        forward = build(model)
        owner = forward if isinstance(forward, nn.Module) else model
        attributes = vars(owner.tok_embeddings)
        attributes["_parameters"].clear()
        return forward, attributes

    def call(embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model as in training, with these embeddings in the place of its own."""
        forward, attributes = trained()
        attributes["weight"] = embeddings
        return forward(tokens)[:2]

    embeddings = {"the embeddings": make().tok_embeddings.weight.detach()}
    logits, hidden = run(build(make()), tokens)
    return {
        "logits": Observed(logits, 1e-3),
        "hidden states": Observed(hidden, 1e-3),
        "logits with targets": Observed(run(build(make()), tokens, tokens)[0], 1e-3),
        **pattern("dropout in training", True, _Same()),
        **pattern("dropout in training, neighbours added", True, _Mix()),
        **pattern("dropout in evaluation", False, _Same()),
        **named("logits", gradients(lambda x: call(x)[:1], embeddings)),
        **named("hidden states", gradients(lambda x: call(x)[1:], embeddings)),
    }


def named(start: str, observations: Observations) -> Observations:
    return {f"{start}: {name}": observed for name, observed in observations.items()}


def adapt(student: Student) -> Build:
    return lambda ours: make_model(student, ours)


PART = Part("Llama.forward", WHERE, lambda model: model, VARIANTS, observe, adapt, variant)
