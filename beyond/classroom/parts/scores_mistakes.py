"""The mistakes that are known of `Attention.compute_query_key_value_scores`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from beyond.classroom.part import Variant
from beyond.classroom.parts.probes import BROKEN, NO_GRADIENT, broken, entry, keep_changes
from llama import Attention

WHERE = "llama.py, Attention.compute_query_key_value_scores"
Scores = Callable[[Tensor, Tensor, Tensor], Tensor]
Build = Callable[[Attention], Scores]  # an implementation with this one's sizes, rate and mode
Change = Callable[[Tensor], Tensor]
Drop = Callable[[Attention, Tensor], Tensor]


def root_of_head_dim(ours: Attention) -> float:
    return ours.config.head_dim**0.5


def softmax(scores: Tensor) -> Tensor:
    return scores.softmax(dim=-1)


def same(x: Tensor) -> Tensor:
    return x


def drop(ours: Attention, x: Tensor) -> Tensor:
    return F.dropout(x, ours.config.dropout, ours.training)


def keep(ours: Attention, x: Tensor) -> Tensor:
    return x


@keep_changes
def variant(
    divisor: Callable[[Attention], float] = root_of_head_dim,
    mask: Change = same,
    soften: Change = softmax,
    drop: Drop = drop,
    drop_scores: Drop = keep,
    drop_output: Drop = keep,
    average: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda weights, key, value: (
        weights @ value
    ),
    repeat: Callable[[Tensor, int], Tensor] = lambda x, times: x.repeat_interleave(times, dim=1),
) -> Build:
    """Make softmax(query key^T / divisor) value with one step changed; by default it is right."""

    def build(ours: Attention) -> Scores:
        def scores(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            times = query.shape[1] // key.shape[1]
            key, value = repeat(key, times), repeat(value, times)
            logits = mask(query @ key.transpose(-2, -1) / divisor(ours))
            weights = drop(ours, soften(drop_scores(ours, logits)))
            return drop_output(ours, average(weights, key, value))

        return scores

    return build


def tile(x: Tensor, times: int) -> Tensor:
    return x.repeat(1, times, 1, 1)


def square(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool)


def hide_future(scores: Tensor) -> Tensor:
    return scores.masked_fill(square(scores).triu(1), float("-inf"))


def hide_past(scores: Tensor) -> Tensor:
    return scores.masked_fill(square(scores).tril(-1), float("-inf"))


def hide_own(scores: Tensor) -> Tensor:
    return scores.masked_fill(square(scores).triu(0), float("-inf"))


def drop_always(ours: Attention, x: Tensor) -> Tensor:
    return F.dropout(x, ours.config.dropout)


def drop_rest(ours: Attention, x: Tensor) -> Tensor:
    return F.dropout(x, 1 - ours.config.dropout, ours.training and ours.config.dropout > 0)


def drop_unscaled(ours: Attention, x: Tensor) -> Tensor:
    return drop(ours, x) * (1 - ours.config.dropout if ours.training else 1)


VARIANTS: tuple[Variant, ...] = (
    entry(
        variant(mask=hide_future),
        WHERE,
        "causal mask",
        "Each position attends to itself and to earlier ones only. Llama is trained like that, and "
        "the edition of Spring 2026 wants it, but the other editions compute their reference "
        "values, sanity_check.data among them, without a mask.",
        "sasilver75, Dingkwan and ggrantrichards (minllama-assignment), Alva789ro/Min-Llama2",
        is_edition=True,
    ),
    entry(
        variant(mask=hide_past),
        WHERE,
        "mask hides the past instead of the future",
        "The triangle is inverted: each position attends to itself and to later ones. This "
        "assignment has no mask; a causal mask would hide triu(diagonal=1).",
    ),
    entry(
        variant(mask=hide_own),
        WHERE,
        "mask hides the own position too",
        "The first position then attends to nothing, and softmax gives NaN. This assignment has no "
        "mask; a causal mask would hide triu(diagonal=1).",
    ),
    entry(
        variant(mask=torch.tril),
        WHERE,
        "mask sets scores to 0 instead of minus infinity",
        "A score of 0 still gets weight from the softmax. This assignment has no mask; a causal "
        "mask would fill with float('-inf').",
    ),
    entry(
        variant(soften=lambda scores: softmax(scores).tril()),
        WHERE,
        "mask after the softmax",
        "The weights that are left no longer add up to 1. This assignment has no mask; a causal "
        "mask would fill the scores with float('-inf') before the softmax.",
    ),
    entry(
        variant(divisor=lambda ours: 1.0),
        WHERE,
        "scores not scaled",
        "The scores are not divided by the root of head_dim, so the softmax is too sharp.",
    ),
    entry(
        variant(divisor=lambda ours: ours.config.head_dim),
        WHERE,
        "scores divided by head_dim instead of its root",
        "Divide by math.sqrt(head_dim); otherwise the attention is nearly uniform.",
    ),
    entry(
        variant(divisor=lambda ours: ours.config.head_dim**-0.5),
        WHERE,
        "scores multiplied by the root of head_dim",
        "Divide by math.sqrt(head_dim), or multiply by head_dim ** -0.5.",
    ),
    entry(
        variant(divisor=lambda ours: ours.config.dim**0.5),
        WHERE,
        "scores divided by the root of dim",
        "Each head compares vectors of head_dim features, so divide by the root of head_dim.",
    ),
    entry(
        variant(divisor=lambda ours: ours.config.dim),
        WHERE,
        "scores divided by dim",
        "Each head compares vectors of head_dim features, so divide by the root of head_dim.",
    ),
    entry(
        variant(divisor=lambda ours: ours.config.n_heads**0.5),
        WHERE,
        "scores divided by the root of the number of heads",
        "Axis 1 of query is the heads, the last axis head_dim; divide by the root of the latter.",
    ),
    entry(
        variant(divisor=lambda ours: 1.0, mask=lambda scores: scores / scores.shape[-1] ** 0.5),
        WHERE,
        "scores divided by the root of the sequence's length",
        "Divide by the root of head_dim, the last axis of query, whatever the length.",
    ),
    entry(
        variant(divisor=lambda ours: 1.0, soften=lambda scores: softmax(scores) / 8**0.5),
        WHERE,
        "scaled after the softmax",
        "The weights no longer add up to 1, and the softmax is too sharp. Divide the scores by the "
        "root of head_dim before the softmax.",
    ),
    entry(
        variant(soften=lambda scores: scores.softmax(dim=-2)),
        WHERE,
        "softmax over the queries",
        "The weights of one query must add up to 1 over the keys: dim=-1.",
    ),
    entry(
        variant(soften=lambda scores: scores.softmax(dim=1)),
        WHERE,
        "softmax over the heads",
        "The weights of one query must add up to 1 over the keys: dim=-1.",
    ),
    entry(
        variant(soften=lambda scores: scores.softmax(dim=0)),
        WHERE,
        "softmax over the batch",
        "The weights of one query must add up to 1 over the keys: dim=-1.",
    ),
    entry(
        variant(soften=same),
        WHERE,
        "no softmax",
        "The scores are used as weights as they are. Apply softmax over the keys.",
    ),
    entry(
        variant(soften=torch.sigmoid),
        WHERE,
        "sigmoid instead of softmax",
        "The weights of one query must add up to 1 over the keys; those of the sigmoid do not. Use "
        "softmax(dim=-1).",
    ),
    entry(
        variant(soften=lambda scores: scores.log_softmax(dim=-1)),
        WHERE,
        "log_softmax instead of softmax",
        "The weights must be probabilities; their logarithms are at most 0.",
    ),
    entry(
        variant(average=lambda weights, key, value: weights),
        WHERE,
        "values not used",
        "The weights themselves are returned. Multiply them by value.",
    ),
    entry(
        variant(average=lambda weights, key, value: value),
        WHERE,
        "values returned as they are",
        "Query and key are not used, so no position sees another. Multiply the weights, the "
        "softmax of the scaled scores, by value.",
    ),
    entry(
        variant(average=lambda weights, key, value: weights @ key),
        WHERE,
        "keys averaged instead of values",
        "Multiply the weights by value.",
    ),
    entry(
        variant(average=lambda weights, key, value: weights.transpose(-2, -1) @ value),
        WHERE,
        "weights transposed",
        "The weights are (queries, keys); multiply them by value as they are.",
    ),
    entry(
        variant(mask=lambda scores: scores.transpose(-2, -1)),
        WHERE,
        "query and key swapped",
        "Rows of the scores must be queries, columns keys: query @ key.transpose(-2, -1).",
    ),
    entry(
        variant(repeat=tile),
        WHERE,
        "key/value heads tiled instead of repeated",
        "Query heads 0 and 1 share key head 0, heads 2 and 3 share key head 1, and so on: use "
        "repeat_interleave, not repeat. With as many key heads as query heads both are the same.",
    ),
    entry(
        variant(drop=keep),
        WHERE,
        "no dropout on the attention weights",
        "Apply self.attn_dropout after the softmax and before the product with the values. Without "
        "it only training differs.",
        "Alva789ro/Min-Llama2, vktrbr/minllama-assignment",
    ),
    entry(
        variant(drop=drop_always),
        WHERE,
        "dropout while evaluating",
        "F.dropout is active unless it is given training=self.training, so results are random. An "
        "nn.Dropout follows train() and eval() by itself.",
    ),
    entry(
        variant(drop=keep, drop_output=drop),
        WHERE,
        "dropout on the output instead of the weights",
        "The paper drops attention weights, so a whole position is left out. Apply dropout before "
        "the product with the values.",
    ),
    entry(
        variant(drop=keep, drop_scores=drop),
        WHERE,
        "dropout before the softmax",
        "A score of 0 still gets weight. Apply dropout to the weights, after the softmax.",
        "yule44ka/MinLlama",
    ),
    entry(
        variant(drop=drop_rest),
        WHERE,
        "dropout with the rate 1 - p",
        "PyTorch's dropout takes the probability of setting an element to zero.",
    ),
    entry(
        variant(drop=drop_unscaled),
        WHERE,
        "dropout without dividing by 1 - p",
        "What is kept must be divided by 1 - p, so that its mean is the same as in evaluation.",
    ),
    entry(
        variant(average=lambda weights, key, value: weights.detach() @ value),
        WHERE,
        "no gradient for the weights",
        NO_GRADIENT + " Here compute_query and compute_key are never trained.",
    ),
    entry(
        variant(average=lambda weights, key, value: weights @ value.detach()),
        WHERE,
        "no gradient for the values",
        NO_GRADIENT,
    ),
    entry(
        variant(average=lambda weights, key, value: (weights @ value).detach()),
        WHERE,
        "no gradient",
        NO_GRADIENT,
    ),
    entry(
        variant(average=lambda weights, key, value: broken(weights @ value)),
        WHERE,
        "an in-place operation breaks the gradient",
        BROKEN,
    ),
)
