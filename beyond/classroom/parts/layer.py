"""The part `LlamaLayer.forward`: its probes, and its mistakes. The modules inside are ours."""

from collections.abc import Callable

from torch import Tensor

from beyond.classroom.adapters import make_layer
from beyond.classroom.part import Observations, Observed, Part, Variant, expect_tensor
from beyond.classroom.parts.probes import (
    NO_GRADIENT,
    entry,
    fill,
    gradients,
    keep_changes,
    normal,
)
from beyond.classroom.student import Student
from config import LlamaConfig
from llama import LlamaLayer

WHERE = "llama.py, LlamaLayer.forward"
# An implementation with the modules of the first, and the sizes of the second.
Build = Callable[[LlamaLayer, LlamaConfig], Callable[[Tensor], Tensor]]


def observe(build: Build) -> Observations:
    """Run one layer, forward and backward."""
    config = LlamaConfig(dim=16, n_heads=2, hidden_dim=24, multiple_of=4, max_seq_len=16)
    x = normal(3, 5, 16, seed=1)
    layer = build(fill(LlamaLayer(0, config), 0.3), config)
    output = expect_tensor(layer(x.clone()), "the output")
    trained = build(fill(LlamaLayer(0, config), 0.3).train(), config)
    return {
        "output": Observed(output, 1e-4),
        **gradients(lambda x: (trained(x),), {"the input": x}),
    }


def adapt(student: Student) -> Build:
    return lambda ours, config: make_layer(student, ours, config)


# --------------------------------------------------------------------- wrong variants

MISREAD = (
    "Two lines are the whole layer: h = x + attention(attention_norm(x)), then "
    "h + feed_forward(ffn_norm(h))."
)


class State:
    """The values of one run: x, n, a and h of the first half, m, f and y of the second."""

    x: Tensor
    n: Tensor  # what the attention is fed
    a: Tensor  # its output
    h: Tensor
    m: Tensor  # what the feed-forward network is fed
    f: Tensor  # its output
    y: Tensor

    def __init__(self, layer: LlamaLayer, x: Tensor) -> None:
        self.x = x
        self.attention_norm, self.ffn_norm = layer.attention_norm, layer.ffn_norm


Step = Callable[[State], Tensor]


@keep_changes
def variant(
    first_input: Step = lambda s: s.attention_norm(s.x),
    first_sum: Step = lambda s: s.x + s.a,
    second_input: Step = lambda s: s.ffn_norm(s.h),
    second_sum: Step = lambda s: s.h + s.f,
    finish: Step = lambda s: s.y,
) -> Build:
    """Make a layer with one step changed; by default it is right."""

    def build(layer: LlamaLayer, config: LlamaConfig) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            s = State(layer, x)
            s.n = first_input(s)
            s.a = layer.attention(s.n)
            s.h = first_sum(s)
            s.m = second_input(s)
            s.f = layer.feed_forward(s.m)
            s.y = second_sum(s)
            return finish(s)

        return forward

    return build


def feed_first(layer: LlamaLayer, config: LlamaConfig) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        h = x + layer.feed_forward(layer.ffn_norm(x))
        return h + layer.attention(layer.attention_norm(h))

    return forward


VARIANTS: tuple[Variant, ...] = tuple(
    entry(subject, WHERE, name, why)
    for subject, name, why in (
        (
            variant(
                lambda s: s.x,
                lambda s: s.attention_norm(s.x + s.a),
                lambda s: s.h,
                lambda s: s.ffn_norm(s.h + s.f),
            ),
            "norm after the residual connection (post-norm)",
            "That is the block of the original Transformer. Llama normalises what goes into "
            "attention and feed-forward network, and never the residual stream itself.",
        ),
        (
            variant(
                lambda s: s.x,
                lambda s: s.x + s.attention_norm(s.a),
                lambda s: s.h,
                lambda s: s.h + s.ffn_norm(s.f),
            ),
            "norms after attention and feed-forward network",
            "The norms belong before them: attention(attention_norm(x)), and "
            "feed_forward(ffn_norm(h)).",
        ),
        (
            variant(first_input=lambda s: s.x, second_input=lambda s: s.h),
            "no norms",
            "Neither attention_norm nor ffn_norm is applied. " + MISREAD,
        ),
        (
            variant(first_input=lambda s: s.x),
            "no norm before the attention",
            "The attention is fed the residual stream as it is. " + MISREAD,
        ),
        (
            variant(second_input=lambda s: s.h),
            "no norm before the feed-forward network",
            "The feed-forward network is fed the residual stream as it is. " + MISREAD,
        ),
        (
            variant(second_input=lambda s: s.attention_norm(s.h)),
            "attention_norm used twice",
            "The feed-forward network has a norm of its own, ffn_norm. In a new model both are the "
            "same; a trained checkpoint shows the difference.",
        ),
        (
            variant(first_input=lambda s: s.ffn_norm(s.x)),
            "ffn_norm used twice",
            "The attention has a norm of its own, attention_norm. In a new model both are the "
            "same; a trained checkpoint shows the difference.",
        ),
        (
            variant(
                first_input=lambda s: s.ffn_norm(s.x),
                second_input=lambda s: s.attention_norm(s.h),
            ),
            "the two norms swapped",
            "attention_norm comes before the attention, ffn_norm before the feed-forward network. "
            "In a new model both are the same; a trained checkpoint shows the difference.",
        ),
        (
            variant(first_sum=lambda s: s.a),
            "no residual connection around the attention",
            "The input x is not added to the attention's output. " + MISREAD,
        ),
        (
            variant(second_sum=lambda s: s.f),
            "no residual connection around the feed-forward network",
            "h is not added to the feed-forward network's output. " + MISREAD,
        ),
        (
            variant(first_sum=lambda s: s.a, second_sum=lambda s: s.f),
            "no residual connections",
            "Neither x nor h is added. " + MISREAD,
        ),
        (
            variant(second_sum=lambda s: s.x + s.f),
            "second residual connection from the layer's input",
            "x is added at the end instead of h, so the attention's output is lost from the "
            "residual stream. " + MISREAD,
        ),
        (
            variant(second_sum=lambda s: s.x + s.h + s.f),
            "input added twice",
            "x is part of h already. " + MISREAD,
        ),
        (
            variant(second_sum=lambda s: s.a + s.f),
            "second residual connection from the attention's output",
            "The attention's output is added at the end without x. " + MISREAD,
        ),
        (
            variant(first_sum=lambda s: s.n + s.a),
            "first residual connection from the normalized input",
            "attention_norm(x) is added instead of x. Keep x as it is. " + MISREAD,
        ),
        (
            variant(second_sum=lambda s: s.m + s.f),
            "second residual connection from the normalized input",
            "ffn_norm(h) is added instead of h. Keep h as it is. " + MISREAD,
        ),
        (
            variant(first_sum=lambda s: s.n + s.a, second_sum=lambda s: s.m + s.f),
            "both residual connections from the normalized input",
            "The norms' outputs are added instead of x and h. " + MISREAD,
        ),
        (
            variant(second_input=lambda s: s.ffn_norm(s.a)),
            "feed-forward network without the residual stream",
            "ffn_norm is applied to the attention's output alone, without x. " + MISREAD,
        ),
        (
            variant(second_input=lambda s: s.ffn_norm(s.x)),
            "attention and feed-forward network in parallel",
            "The feed-forward network is fed the layer's input instead of h, as in GPT-J and PaLM. "
            + MISREAD,
        ),
        (
            variant(second_input=lambda s: s.n),
            "attention and feed-forward network in parallel, with one norm",
            "The feed-forward network is fed the normalized input of the attention. " + MISREAD,
        ),
        (
            feed_first,
            "feed-forward network before the attention",
            "The attention comes first. " + MISREAD,
        ),
        (
            variant(second_sum=lambda s: s.h),
            "no feed-forward network",
            "Only the first half is computed. " + MISREAD,
        ),
        (
            variant(first_sum=lambda s: s.x),
            "no attention",
            "Only the second half is computed. " + MISREAD,
        ),
    )
)
VARIANTS += (
    entry(
        variant(finish=lambda s: s.ffn_norm(s.y)),
        WHERE,
        "ffn_norm applied to the layer's output too",
        "The residual stream itself is never normalised. " + MISREAD,
    ),
    entry(
        variant(
            first_sum=lambda s: s.n + s.a,
            second_input=lambda s: s.attention_norm(s.h),
            finish=lambda s: s.ffn_norm(s.y),
        ),
        WHERE,
        "ffn_norm applied to the layer's output, attention_norm to the rest",
        "The input is replaced by its norm, the feed-forward network gets attention_norm instead "
        "of ffn_norm, and ffn_norm is applied at the end. " + MISREAD,
        seen="epguo/11711-assignment1-minllama",
    ),
    entry(
        variant(finish=lambda s: s.y.detach()),
        WHERE,
        "no gradient for the input, or only a part of it",
        NO_GRADIENT,
        others=(
            variant(first_sum=lambda s: s.x + s.a.detach()),
            variant(second_sum=lambda s: s.h + s.f.detach()),
            variant(first_sum=lambda s: s.x.detach() + s.a),
            variant(second_sum=lambda s: s.h.detach() + s.f),
        ),
    ),
    entry(
        variant(
            first_sum=lambda s: s.x.add_(s.a),
            second_sum=lambda s: s.h.add_(s.f),
        ),
        WHERE,
        "an in-place addition breaks the gradient",
        "x += attention(attention_norm(x)) changes x, which attention_norm needs for its gradient, "
        "so the result is right but the backward pass raises an error. Make a new tensor: "
        "h = x + attention(attention_norm(x)).",
    ),
)

PART = Part("layer", WHERE, lambda ours, config: ours, VARIANTS, observe, adapt, variant)
