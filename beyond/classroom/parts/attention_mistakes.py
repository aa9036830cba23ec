"""The mistakes that are known of `Attention.forward`."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from beyond.classroom.part import Variant
from beyond.classroom.parts.probes import BROKEN, NO_GRADIENT, broken, entry, keep_changes
from llama import Attention
from rope import apply_rotary_emb

WHERE = "llama.py, Attention.forward"
Build = Callable[[Attention], Callable[[Tensor], Tensor]]  # with this one's weights and mode
Pair = tuple[Tensor, Tensor]


def average(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute softmax(query key^T / sqrt(head_dim)) value; keys and values grouped or repeated."""
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def rotate(ours: Attention, query: Tensor, key: Tensor) -> Pair:
    """Rotate (batch, seq, heads, head_dim)."""
    config = ours.config
    return apply_rotary_emb(query, key, config.head_dim, config.max_seq_len, config.rope_theta)


def rotate_along_heads(ours: Attention, query: Tensor, key: Tensor) -> Pair:
    query, key = rotate(ours, query.transpose(1, 2), key.transpose(1, 2))
    return query.transpose(1, 2), key.transpose(1, 2)


def project(ours: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ours.compute_query(x), ours.compute_key(x), ours.compute_value(x)


def split(x: Tensor, head_dim: int) -> Tensor:
    """Split (batch, seq, features) into (batch, seq, heads, head_dim)."""
    return x.unflatten(-1, (-1, head_dim))


def move(x: Tensor) -> Tensor:
    """Turn (batch, seq, heads, head_dim) into (batch, heads, seq, head_dim)."""
    return x.transpose(1, 2)


def move_by_view(x: Tensor) -> Tensor:
    return x.reshape(len(x), x.shape[2], x.shape[1], -1)


def repeat(x: Tensor, times: int) -> Tensor:
    """Repeat the heads of (batch, heads, seq, head_dim)."""
    return x.repeat_interleave(times, dim=1)


def merge(x: Tensor) -> Tensor:
    """Merge (batch, heads, seq, head_dim) into (batch, seq, features)."""
    return x.transpose(1, 2).flatten(-2)


def finish(ours: Attention, output: Tensor, x: Tensor) -> Tensor:
    return ours.resid_dropout(ours.compute_output(output))


def drop_always(ours: Attention, output: Tensor, x: Tensor) -> Tensor:
    return F.dropout(ours.compute_output(output), ours.config.dropout)


def drop_input(ours: Attention, output: Tensor, x: Tensor) -> Tensor:
    return ours.compute_output(ours.resid_dropout(output))


@keep_changes
def variant(
    project: Callable[[Attention, Tensor], tuple[Tensor, Tensor, Tensor]] = project,
    rotate: Callable[[Attention, Tensor, Tensor], Pair] = rotate,
    rotate_value: Callable[[Attention, Tensor, Tensor], Pair] = lambda ours, query, key: (
        query,
        key,
    ),
    move: Callable[[Tensor], Tensor] = move,
    repeat: Callable[[Tensor, int], Tensor] = repeat,
    repeat_before: Callable[[Tensor, int], Tensor] = lambda x, times: x,
    merge: Callable[[Tensor], Tensor] = merge,
    finish: Callable[[Attention, Tensor, Tensor], Tensor] = finish,
) -> Build:
    """Make an attention with one step changed; by default it is right."""

    def build(ours: Attention) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            config = ours.config
            query, key, value = (split(t, config.head_dim) for t in project(ours, x))
            query, key = rotate(ours, query, key)
            value = rotate_value(ours, value, value)[0]
            key, value = (repeat_before(t, config.n_rep) for t in (key, value))
            query, key, value = (move(t) for t in (query, key, value))
            key, value = (repeat(t, config.n_rep) for t in (key, value))
            return finish(ours, merge(average(query, key, value)), x)

        return forward

    return build


def swapped_weights(ours: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if ours.config.n_rep > 1:
        raise ValueError("the projections have different numbers of features")
    query, key, value = project(ours, x)
    return key, query, value


VARIANTS: tuple[Variant, ...] = (
    entry(
        variant(rotate=lambda ours, query, key: (query, key)),
        WHERE,
        "RoPE without effect",
        "The scores do not depend on the positions: apply_rotary_emb is not called, or what it "
        "returns is not used, or it is called after transpose(1, 2), where it takes the number of "
        "the head for the position. Rotate (batch, seq, heads, head_dim), then transpose.",
        others=(variant(rotate=rotate_along_heads),),
    ),
    entry(
        variant(rotate=lambda ours, query, key: (rotate(ours, query, key)[0], key)),
        WHERE,
        "RoPE not applied to the key",
        "apply_rotary_emb returns both the query and the key; use both.",
    ),
    entry(
        variant(rotate=lambda ours, query, key: (query, rotate(ours, query, key)[1])),
        WHERE,
        "RoPE not applied to the query",
        "apply_rotary_emb returns both the query and the key; use both.",
    ),
    entry(
        variant(rotate_value=rotate),
        WHERE,
        "RoPE applied to the value too",
        "Only queries and keys are rotated: positions belong to the scores, not to the content.",
    ),
    entry(
        variant(rotate=lambda ours, query, key: rotate(ours, *rotate(ours, query, key))),
        WHERE,
        "RoPE applied twice",
        "The angles are doubled. Rotate queries and keys once.",
    ),
    entry(
        variant(project=swapped_weights),
        WHERE,
        "projections of query and key swapped",
        "The query comes from compute_query, the key from compute_key.",
    ),
    entry(
        variant(
            project=lambda ours, x: (
                ours.compute_query(x),
                ours.compute_key(x),
                ours.compute_key(x),
            )
        ),
        WHERE,
        "value computed by compute_key",
        "The value comes from compute_value.",
    ),
    entry(
        variant(
            project=lambda ours, x: (
                ours.compute_query(x),
                ours.compute_value(x),
                ours.compute_value(x),
            )
        ),
        WHERE,
        "key computed by compute_value",
        "The key comes from compute_key.",
    ),
    entry(
        variant(
            project=lambda ours, x: (
                ours.compute_query(x),
                ours.compute_value(x),
                ours.compute_key(x),
            )
        ),
        WHERE,
        "projections of key and value swapped",
        "The key comes from compute_key, the value from compute_value.",
    ),
    entry(
        variant(move=move_by_view),
        WHERE,
        "heads moved by view instead of transpose",
        "view(batch, n_heads, seq, head_dim) only cuts the numbers anew, and mixes positions and "
        "heads. Use transpose(1, 2).",
        others=(
            variant(
                move=move_by_view,
                repeat=lambda x, times: x,
                repeat_before=lambda x, times: x.repeat_interleave(times, dim=2),
            ),
        ),
    ),
    entry(
        variant(repeat=lambda x, times: x.repeat(1, times, 1, 1)),
        WHERE,
        "key/value heads tiled instead of repeated",
        "Query heads 0 and 1 share key head 0, heads 2 and 3 share key head 1, and so on: use "
        "repeat_interleave, not repeat. With as many key heads as query heads both are the same.",
    ),
    entry(
        variant(merge=lambda x: x.reshape(len(x), x.shape[2], -1)),
        WHERE,
        "heads not moved back before the output",
        "The output is (batch, n_heads, seq, head_dim); reshaped as it is, it mixes positions. "
        "Use transpose(1, 2) first.",
    ),
    entry(
        variant(merge=lambda x: x.permute(0, 2, 3, 1).flatten(-2)),
        WHERE,
        "heads and features merged in the wrong order",
        "The features of a head must stay together: (batch, seq, n_heads, head_dim), then flatten.",
    ),
    entry(
        variant(finish=lambda ours, output, x: ours.resid_dropout(output)),
        WHERE,
        "no output projection",
        "The merged heads go through compute_output.",
    ),
    entry(
        variant(finish=lambda ours, output, x: x + finish(ours, output, x)),
        WHERE,
        "input added inside the attention",
        "The residual connection belongs to the layer; here the input would be added twice.",
    ),
    entry(
        variant(finish=lambda ours, output, x: ours.compute_output(output)),
        WHERE,
        "no dropout on the output",
        "Apply self.resid_dropout to the result of compute_output.",
    ),
    entry(
        variant(finish=drop_always),
        WHERE,
        "dropout while evaluating",
        "F.dropout is active unless it is given training=self.training, so results are random. An "
        "nn.Dropout follows train() and eval() by itself.",
    ),
    entry(
        variant(finish=drop_input),
        WHERE,
        "dropout before the output projection",
        "Apply self.resid_dropout to the result of compute_output, not to its input.",
    ),
    entry(
        variant(finish=lambda ours, output, x: finish(ours, output, x).detach()),
        WHERE,
        "no gradient for the input, or only a part of it",
        NO_GRADIENT,
        others=(
            variant(finish=lambda ours, output, x: finish(ours, output.detach(), x)),
            variant(project=lambda ours, x: project(ours, x.detach())),
            variant(rotate=lambda ours, query, key: rotate(ours, query.detach(), key.detach())),
        ),
    ),
    entry(
        variant(finish=lambda ours, output, x: broken(finish(ours, output, x))),
        WHERE,
        "an in-place operation breaks the gradient",
        BROKEN,
    ),
)
