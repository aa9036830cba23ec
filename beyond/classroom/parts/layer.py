"""The part `LlamaLayer.forward`: its probes, and its mistakes. The modules inside are ours."""

from collections.abc import Callable

from torch import Tensor

from beyond.classroom.adapters import make_layer
from beyond.classroom.part import Observations, Observed, Part, Variant, expect_tensor
from beyond.classroom.parts.probes import entry, fill, normal
from beyond.classroom.student import Student
from config import LlamaConfig
from llama import LlamaLayer

WHERE = "llama.py, LlamaLayer.forward"
# An implementation with the modules of the first, and the sizes of the second.
Build = Callable[[LlamaLayer, LlamaConfig], Callable[[Tensor], Tensor]]


def observe(build: Build) -> Observations:
    """Run one layer."""
    config = LlamaConfig(dim=16, n_heads=2, hidden_dim=24, multiple_of=4, max_seq_len=16)
    layer = build(fill(LlamaLayer(0, config), 0.3), config)
    return {"output": Observed(expect_tensor(layer(normal(3, 5, 16, seed=1)), "the output"), 1e-4)}


def adapt(student: Student) -> Build:
    return lambda ours, config: make_layer(student, ours, config)


# --------------------------------------------------------------------- wrong variants

Formula = Callable[[LlamaLayer, Tensor], Tensor]
MISREAD = (
    "Two lines are the whole layer: h = x + attention(attention_norm(x)), then "
    "h + feed_forward(ffn_norm(h))."
)


def formula(compute: Formula) -> Build:
    return lambda ours, config: lambda x: compute(ours, x)


def attend(layer: LlamaLayer, x: Tensor) -> Tensor:
    """Compute the first half, as it is right."""
    return x + layer.attention(layer.attention_norm(x))


def feed(layer: LlamaLayer, h: Tensor) -> Tensor:
    """Compute the second half, as it is right."""
    return h + layer.feed_forward(layer.ffn_norm(h))


def post_norm(layer: LlamaLayer, x: Tensor) -> Tensor:
    h = layer.attention_norm(x + layer.attention(x))
    return layer.ffn_norm(h + layer.feed_forward(h))


def branch_norms(layer: LlamaLayer, x: Tensor) -> Tensor:
    h = x + layer.attention_norm(layer.attention(x))
    return h + layer.ffn_norm(layer.feed_forward(h))


def swapped_norms(layer: LlamaLayer, x: Tensor) -> Tensor:
    h = x + layer.attention(layer.ffn_norm(x))
    return h + layer.feed_forward(layer.attention_norm(h))


def attention_norm_twice(layer: LlamaLayer, x: Tensor) -> Tensor:
    h = attend(layer, x)
    return h + layer.feed_forward(layer.attention_norm(h))


def no_second_norm(layer: LlamaLayer, x: Tensor) -> Tensor:
    h = attend(layer, x)
    return h + layer.feed_forward(h)


def without_stream(layer: LlamaLayer, x: Tensor) -> Tensor:
    attended = layer.attention(layer.attention_norm(x))
    return x + attended + layer.feed_forward(layer.ffn_norm(attended))


def normalized_output(layer: LlamaLayer, x: Tensor) -> Tensor:
    h = first_from_normalized(layer, x)
    return layer.ffn_norm(h + layer.feed_forward(layer.attention_norm(h)))


def no_norms(layer: LlamaLayer, x: Tensor) -> Tensor:
    h = x + layer.attention(x)
    return h + layer.feed_forward(h)


def no_residuals(layer: LlamaLayer, x: Tensor) -> Tensor:
    return layer.feed_forward(layer.ffn_norm(layer.attention(layer.attention_norm(x))))


def first_from_normalized(layer: LlamaLayer, x: Tensor) -> Tensor:
    x = layer.attention_norm(x)
    return x + layer.attention(x)


def second_from_normalized(layer: LlamaLayer, h: Tensor) -> Tensor:
    h = layer.ffn_norm(h)
    return h + layer.feed_forward(h)


def output_residual(layer: LlamaLayer, x: Tensor) -> Tensor:
    attended = layer.attention(layer.attention_norm(x))
    return attended + layer.feed_forward(layer.ffn_norm(x + attended))


def parallel(layer: LlamaLayer, x: Tensor) -> Tensor:
    return attend(layer, x) + layer.feed_forward(layer.ffn_norm(x))


def parallel_one_norm(layer: LlamaLayer, x: Tensor) -> Tensor:
    return attend(layer, x) + layer.feed_forward(layer.attention_norm(x))


VARIANTS: tuple[Variant, ...] = tuple(
    entry(formula(compute), WHERE, name, why)
    for compute, name, why in (
        (
            post_norm,
            "norm after the residual connection (post-norm)",
            "That is the block of the original Transformer. Llama normalises what goes into "
            "attention and feed-forward network, and never the residual stream itself.",
        ),
        (
            branch_norms,
            "norms after attention and feed-forward network",
            "The norms belong before them: attention(attention_norm(x)), and "
            "feed_forward(ffn_norm(h)).",
        ),
        (
            no_norms,
            "no norms",
            "Neither attention_norm nor ffn_norm is applied. " + MISREAD,
        ),
        (
            lambda layer, x: feed(layer, x + layer.attention(x)),
            "no norm before the attention",
            "The attention is fed the residual stream as it is. " + MISREAD,
        ),
        (
            no_second_norm,
            "no norm before the feed-forward network",
            "The feed-forward network is fed the residual stream as it is. " + MISREAD,
        ),
        (
            attention_norm_twice,
            "attention_norm used twice",
            "The feed-forward network has a norm of its own, ffn_norm. In a new model both are the "
            "same; a trained checkpoint shows the difference.",
        ),
        (
            lambda layer, x: feed(layer, x + layer.attention(layer.ffn_norm(x))),
            "ffn_norm used twice",
            "The attention has a norm of its own, attention_norm. In a new model both are the "
            "same; a trained checkpoint shows the difference.",
        ),
        (
            swapped_norms,
            "the two norms swapped",
            "attention_norm comes before the attention, ffn_norm before the feed-forward network. "
            "In a new model both are the same; a trained checkpoint shows the difference.",
        ),
        (
            lambda layer, x: feed(layer, layer.attention(layer.attention_norm(x))),
            "no residual connection around the attention",
            "The input x is not added to the attention's output. " + MISREAD,
        ),
        (
            lambda layer, x: layer.feed_forward(layer.ffn_norm(attend(layer, x))),
            "no residual connection around the feed-forward network",
            "h is not added to the feed-forward network's output. " + MISREAD,
        ),
        (
            no_residuals,
            "no residual connections",
            "Neither x nor h is added. " + MISREAD,
        ),
        (
            lambda layer, x: x + layer.feed_forward(layer.ffn_norm(attend(layer, x))),
            "second residual connection from the layer's input",
            "x is added at the end instead of h, so the attention's output is lost from the "
            "residual stream. " + MISREAD,
        ),
        (
            lambda layer, x: x + feed(layer, attend(layer, x)),
            "input added twice",
            "x is part of h already. " + MISREAD,
        ),
        (
            output_residual,
            "second residual connection from the attention's output",
            "The attention's output is added at the end without x. " + MISREAD,
        ),
        (
            lambda layer, x: feed(layer, first_from_normalized(layer, x)),
            "first residual connection from the normalized input",
            "attention_norm(x) is added instead of x. Keep x as it is. " + MISREAD,
        ),
        (
            lambda layer, x: second_from_normalized(layer, attend(layer, x)),
            "second residual connection from the normalized input",
            "ffn_norm(h) is added instead of h. Keep h as it is. " + MISREAD,
        ),
        (
            lambda layer, x: second_from_normalized(layer, first_from_normalized(layer, x)),
            "both residual connections from the normalized input",
            "The norms' outputs are added instead of x and h. " + MISREAD,
        ),
        (
            without_stream,
            "feed-forward network without the residual stream",
            "ffn_norm is applied to the attention's output alone, without x. " + MISREAD,
        ),
        (
            parallel,
            "attention and feed-forward network in parallel",
            "The feed-forward network is fed the layer's input instead of h, as in GPT-J and PaLM. "
            + MISREAD,
        ),
        (
            parallel_one_norm,
            "attention and feed-forward network in parallel, with one norm",
            "The feed-forward network is fed the normalized input of the attention. " + MISREAD,
        ),
        (
            lambda layer, x: attend(layer, feed(layer, x)),
            "feed-forward network before the attention",
            "The attention comes first. " + MISREAD,
        ),
        (
            attend,
            "no feed-forward network",
            "Only the first half is computed. " + MISREAD,
        ),
        (
            feed,
            "no attention",
            "Only the second half is computed. " + MISREAD,
        ),
    )
)
VARIANTS += (
    entry(
        formula(normalized_output),
        WHERE,
        "ffn_norm applied to the layer's output, attention_norm to the rest",
        "The input is replaced by its norm, the feed-forward network gets attention_norm instead "
        "of ffn_norm, and ffn_norm is applied at the end. " + MISREAD,
        seen="epguo/11711-assignment1-minllama",
    ),
)

PART = Part("layer", WHERE, lambda ours, config: ours, VARIANTS, observe, adapt)
