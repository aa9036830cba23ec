"""The part `FeedForward`: its probes, and its mistakes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond.classroom.adapters import make_feed_forward, refuse_unwritten
from beyond.classroom.part import Observations, Observed, Part, Variant, expect_tensor
from beyond.classroom.parts.probes import (
    BROKEN,
    NO_GRADIENT,
    broken,
    dropout_pattern,
    entry,
    fill,
    gradients,
    normal,
)
from beyond.classroom.student import Student
from config import LlamaConfig
from llama import FeedForward

WHERE = "llama.py, FeedForward"
RATE = 0.25
# An implementation with the weights and the mode of the first, and the sizes of the second.
Build = Callable[[FeedForward, LlamaConfig], Callable[[Tensor], Tensor]]


def observe(build: Build) -> Observations:
    """Run the network, with dropout, training and not, and gradients."""

    def make(rate: float, train: bool) -> Callable[[Tensor], Tensor]:
        config = LlamaConfig(dim=16, n_heads=2, hidden_dim=24, multiple_of=4, dropout=rate)
        return build(fill(FeedForward(config), 0.3).train(train), config)

    def run(batch: int, rate: float = 0.0, train: bool = False) -> Tensor:
        return expect_tensor(make(rate, train)(normal(batch, 5, 16, seed=1)), "the output")

    kept = run(64)
    trained, evaluated = run(64, RATE, train=True), run(64, RATE)
    return {
        "output": Observed(run(3), 1e-4),
        **dropout_pattern("dropout in training", trained, kept, RATE),
        **dropout_pattern("dropout in evaluation", evaluated, kept, RATE),
        **gradients(lambda x: (make(0.0, True)(x),), {"the input": normal(2, 5, 16, seed=1)}),
    }


def adapt(student: Student) -> Build:
    def build(ours: FeedForward, config: LlamaConfig) -> nn.Module:
        theirs = make_feed_forward(student, ours, config)
        refuse_unwritten(getattr(theirs, "SwiGLU", None), torch.ones(1, 1, config.dim))
        return theirs

    return build


# --------------------------------------------------------------------- wrong variants


def hidden(formula: Callable[[Tensor, Tensor], Tensor]) -> Build:
    """Make a network with another formula of gate = w1 x and up = w3 x."""
    return lambda ours, config: lambda x: ours.dropout(ours.w2(formula(ours.w1(x), ours.w3(x))))


def drop_always(ours: FeedForward, config: LlamaConfig) -> Callable[[Tensor], Tensor]:
    return lambda x: F.dropout(ours.w2(ours.SwiGLU(x)), config.dropout)


VARIANTS: tuple[Variant, ...] = (
    entry(
        hidden(lambda gate, up: gate * F.silu(up)),
        WHERE,
        "gate and up swapped",
        "silu is applied to w3 x. w1 is the gate: silu(w1 x) * (w3 x). A model trained from "
        "scratch would not mind, but the checkpoint's weights do.",
    ),
    entry(
        hidden(lambda gate, up: gate * up),
        WHERE,
        "no activation",
        "Without silu the hidden layer is only a product of two linear maps.",
    ),
    entry(
        hidden(lambda gate, up: F.gelu(gate) * up),
        WHERE,
        "GELU instead of SiLU",
        "That is GEGLU. Llama uses SwiGLU: silu(w1 x) * (w3 x).",
        others=(hidden(lambda gate, up: F.gelu(gate, approximate="tanh") * up),),
    ),
    entry(
        hidden(lambda gate, up: F.relu(gate) * up),
        WHERE,
        "ReLU instead of SiLU",
        "That is ReGLU. Llama uses SwiGLU: silu(w1 x) * (w3 x).",
    ),
    entry(
        hidden(lambda gate, up: gate.sigmoid() * up),
        WHERE,
        "sigmoid instead of SiLU",
        "That is the GLU. silu(x) is x * sigmoid(x): the factor x is missing.",
    ),
    entry(
        hidden(lambda gate, up: gate.tanh() * up),
        WHERE,
        "tanh instead of SiLU",
        "Llama uses SwiGLU: silu(w1 x) * (w3 x).",
    ),
    entry(
        hidden(lambda gate, up: F.silu(gate) + up),
        WHERE,
        "sum instead of product",
        "The gate multiplies: silu(w1 x) * (w3 x).",
    ),
    entry(
        hidden(lambda gate, up: F.silu(gate * up)),
        WHERE,
        "SiLU of the product",
        "Only the gate goes through silu: silu(w1 x) * (w3 x).",
    ),
    entry(
        hidden(lambda gate, up: F.silu(gate) * F.silu(up)),
        WHERE,
        "SiLU on both factors",
        "Only the gate goes through silu: silu(w1 x) * (w3 x).",
    ),
    entry(
        hidden(lambda gate, up: F.silu(gate)),
        WHERE,
        "no up projection",
        "w3 is not used. The gate multiplies it: silu(w1 x) * (w3 x).",
    ),
    entry(
        lambda ours, config: ours.SwiGLU,
        WHERE,
        "no down projection",
        "The hidden layer is returned. w2 maps it back to dim features.",
    ),
    entry(
        lambda ours, config: lambda x: x + ours(x),
        WHERE,
        "input added inside the feed-forward network",
        "The residual connection belongs to the layer; here the input would be added twice.",
    ),
    entry(
        lambda ours, config: lambda x: ours.w2(ours.SwiGLU(x)),
        WHERE,
        "no dropout",
        "Apply self.dropout to the result of w2.",
    ),
    entry(
        drop_always,
        WHERE,
        "dropout while evaluating",
        "F.dropout is active unless it is given training=self.training, so results are random. An "
        "nn.Dropout follows train() and eval() by itself.",
    ),
    entry(
        lambda ours, config: lambda x: ours.w2(ours.dropout(ours.SwiGLU(x))),
        WHERE,
        "dropout on the hidden layer",
        "Apply self.dropout to the result of w2, not to its input.",
    ),
    entry(
        lambda ours, config: lambda x: ours(x).detach(),
        WHERE,
        "no gradient for the input, or only a part of it",
        NO_GRADIENT,
        others=(
            hidden(lambda gate, up: F.silu(gate).detach() * up),
            hidden(lambda gate, up: F.silu(gate) * up.detach()),
        ),
    ),
    entry(
        lambda ours, config: lambda x: broken(ours(x)),
        WHERE,
        "an in-place operation breaks the gradient",
        BROKEN,
    ),
)

PART = Part("SwiGLU", WHERE, lambda ours, config: ours, VARIANTS, observe, adapt)
