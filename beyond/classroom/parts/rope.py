"""The part `apply_rotary_emb`: probes, and wrong variants."""

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from beyond.classroom.adapters import find
from beyond.classroom.part import AdaptError, Observations, Observed, Part, Variant, expect_tensor
from beyond.classroom.parts.probes import FAILED, attempt, entry, normal
from beyond.classroom.student import Student
from rope import apply_rotary_emb

HEAD_DIM, MAX_SEQ_LEN, THETA = 8, 20, 10000.0
Rotate = Callable[[Tensor, Tensor, int, int, float], tuple[Tensor, Tensor]]
where = "rope.py, apply_rotary_emb"


def observe(rotate: Rotate) -> Observations:
    """Rotate as many key heads as query heads, then with another theta, then fewer key heads."""

    def run(n_kv_heads: int, theta: float) -> tuple[Tensor, Tensor]:
        query = normal(2, 13, 4, HEAD_DIM, seed=1)
        key = normal(2, 13, n_kv_heads, HEAD_DIM, seed=2)
        result = rotate(query, key, HEAD_DIM, MAX_SEQ_LEN, theta)
        if result is None:
            raise NotImplementedError("apply_rotary_emb returns None")
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise AdaptError("apply_rotary_emb does not return a pair, query and key")
        rotated, rotated_key = result
        return expect_tensor(rotated, "the query"), expect_tensor(rotated_key, "the key")

    query, key = run(4, THETA)
    fewer = attempt(lambda: run(2, THETA)[1], "the key")
    values = {
        "query": query,
        "key": key,
        "query with theta=100": attempt(lambda: run(4, 100.0)[0], "the query"),
        "key with fewer heads": fewer if fewer.shape == (2, 13, 2, HEAD_DIM) else FAILED,
    }
    return {name: Observed(value, 1e-4) for name, value in values.items()}


def adapt(student: Student) -> Rotate:
    """Return a student's function; theta is left out if it has no such parameter."""
    function = find(student, "rope", "apply_rotary_emb")

    def rotate(
        query: Tensor, key: Tensor, head_dim: int, max_seq_len: int, theta: float
    ) -> tuple[Tensor, Tensor]:
        parameters = inspect.signature(function).parameters
        options = {"theta": theta} if "theta" in parameters and theta != THETA else {}
        return function(query, key, head_dim, max_seq_len, **options)

    return rotate


# --------------------------------------------------------------------- wrong variants

Angles = Callable[[int, int, float], Tensor]  # of (seq, head_dim, theta): (seq, head_dim / 2)
Turn = Callable[[Tensor, Tensor], Tensor]  # of x (batch, seq, heads, head_dim) and the angles


def angles(
    seq: int,
    head_dim: int,
    theta: float,
    exponents: Callable[[Tensor, int], Tensor] = lambda pairs, d: -2 * pairs / d,
    first: int = 0,
) -> Tensor:
    """Compute position times frequency; the exponent of theta and the first position may vary."""
    pairs = torch.arange(head_dim // 2).float()
    return torch.outer(
        torch.arange(first, seq + first).float(), theta ** exponents(pairs, head_dim)
    )


def split(x: Tensor, angle: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return real and imaginary parts, and cosine and sine (seq, 1, head_dim / 2)."""
    real, imag = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return real, imag, angle.cos()[:, None], angle.sin()[:, None]


def join(real: Tensor, imag: Tensor) -> Tensor:
    return torch.stack((real, imag), dim=-1).flatten(-2)


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate as it is right."""
    real, imag, cos, sin = split(x, angle)
    return join(real * cos - imag * sin, real * sin + imag * cos)


def turn_halves(x: Tensor, angle: Tensor) -> Tensor:
    real, imag = x.chunk(2, dim=-1)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat((real * cos - imag * sin, real * sin + imag * cos), dim=-1)


def turn_swapped(x: Tensor, angle: Tensor) -> Tensor:
    real, imag, cos, sin = split(x, angle)
    return join(imag * cos - real * sin, imag * sin + real * cos)


def turn_swapped_output(x: Tensor, angle: Tensor) -> Tensor:
    real, imag, cos, sin = split(x, angle)
    return join(real * sin + imag * cos, real * cos - imag * sin)


def turn_back(x: Tensor, angle: Tensor) -> Tensor:
    return turn(x, -angle)


def turn_without_minus(x: Tensor, angle: Tensor) -> Tensor:
    real, imag, cos, sin = split(x, angle)
    return join(real * cos + imag * sin, real * sin + imag * cos)


def turn_sine_for_cosine(x: Tensor, angle: Tensor) -> Tensor:
    real, imag, cos, sin = split(x, angle)
    return join(real * sin - imag * cos, real * cos + imag * sin)


def turn_products_only(x: Tensor, angle: Tensor) -> Tensor:
    real, imag, cos, sin = split(x, angle)
    return join(real * cos, imag * sin)


def turn_concatenated(x: Tensor, angle: Tensor) -> Tensor:
    return turn(x, angle).unflatten(-1, (-1, 2)).transpose(-2, -1).flatten(-2)


def turn_zeroed(x: Tensor, angle: Tensor, is_added: bool = False) -> Tensor:
    real, imag, cos, sin = split(x, angle)
    sin[1::2], cos[0::2] = 0, 0
    real, imag = real * cos - imag * sin, real * sin + imag * cos
    return real + imag if is_added else join(real, imag)


def turn_added(x: Tensor, angle: Tensor) -> Tensor:
    return turn(x, angle).unflatten(-1, (-1, 2)).sum(dim=-1)


def turn_along_heads(x: Tensor, angle: Tensor) -> Tensor:
    heads = angles(x.shape[2], x.shape[-1], THETA)  # the number of the head as the position
    return turn(x.transpose(1, 2), heads).transpose(1, 2)


def rotation(turn: Turn = turn, angles: Angles = angles) -> Rotate:
    """Make a function like `apply_rotary_emb`."""

    def rotate(
        query: Tensor, key: Tensor, head_dim: int, max_seq_len: int, theta: float
    ) -> tuple[Tensor, Tensor]:
        angle = angles(query.shape[1], head_dim, theta)
        return turn(query, angle), turn(key, angle)

    return rotate


def after(change: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Rotate:
    """Rotate, then return something else, of query, key, and both rotated."""

    def rotate(
        query: Tensor, key: Tensor, head_dim: int, max_seq_len: int, theta: float
    ) -> tuple[Tensor, Tensor]:
        return change(query, key, *apply_rotary_emb(query, key, head_dim, max_seq_len, theta))

    return rotate


def exponents(formula: Callable[[Tensor, int], Tensor]) -> Rotate:
    return rotation(angles=partial(angles, exponents=formula))


def integer_frequencies(seq: int, head_dim: int, theta: float) -> Tensor:
    frequencies = angles(2, head_dim, theta)[1].long()
    return torch.outer(torch.arange(seq), frequencies).float()


def integer_angles(seq: int, head_dim: int, theta: float) -> Tensor:
    return angles(seq, head_dim, theta).long().float()


def transposed_angles(seq: int, head_dim: int, theta: float) -> Tensor:
    return angles(seq, head_dim, theta).T.reshape(seq, head_dim // 2)


def fixed_theta(seq: int, head_dim: int, theta: float) -> Tensor:
    return angles(seq, head_dim, THETA)


def last_rows(seq: int, head_dim: int, theta: float) -> Tensor:
    return angles(MAX_SEQ_LEN, head_dim, theta)[-seq:]


def key_like_query(
    query: Tensor, key: Tensor, rotated: Tensor, rotated_key: Tensor
) -> tuple[Tensor, Tensor]:
    return rotated, rotated_key.reshape(*query.shape[:3], -1)


VARIANTS: tuple[Variant, ...] = (
    entry(
        rotation(turn_halves),
        where,
        "rotates halves instead of pairs",
        "Features i and i + head_dim / 2 are rotated together, as in Hugging Face's Llama. The "
        "course's checkpoint was trained with features 2i and 2i + 1 as a pair, so its queries and "
        "keys no longer match. Split with reshape(..., -1, 2).",
    ),
    entry(
        rotation(turn_swapped),
        where,
        "real and imaginary parts swapped",
        "The second feature of each pair is used as the real part. Lengths are kept and training "
        "runs, but the checkpoint's attention is destroyed. Unbind gives the real part first.",
        "Yousefbahr/MinLlama",
    ),
    entry(
        rotation(turn_swapped_output),
        where,
        "rotated parts joined in the wrong order",
        "The imaginary part comes first in each pair of the result. Stack (real, imaginary) in "
        "this order, then flatten.",
    ),
    entry(
        rotation(turn_zeroed),
        where,
        "sines and cosines set to zero on alternate positions",
        "Every other position keeps only its sines, the rest only its cosines, so what is computed "
        "is no rotation. The zeros in the paper's matrix separate the pairs; they are not in the "
        "tables.",
    ),
    entry(
        rotation(partial(turn_zeroed, is_added=True)),
        where,
        "sines and cosines zeroed on alternate positions, and parts added",
        "Every other row of the tables is set to zero, and the real and the imaginary part of the "
        "result are added, which leaves half of the features. Keep the tables whole, and stack the "
        "two parts.",
        "chernovssss/minllama-assignment",
    ),
    entry(
        rotation(turn_added),
        where,
        "real and imaginary parts added instead of interleaved",
        "The sum has head_dim / 2 features. Stack the two parts on a new last axis, then flatten.",
    ),
    entry(
        rotation(turn_concatenated),
        where,
        "real and imaginary parts concatenated instead of interleaved",
        "The result holds all real parts, then all imaginary parts. Scores between a query and a "
        "key survive it, but the order is not that of the input. Stack on a new last axis, then "
        "flatten.",
    ),
    entry(
        rotation(turn_back),
        where,
        "rotates by minus theta",
        "Real and imaginary part get the sine with opposite signs: real * cos - imag * sin, and "
        "real * sin + imag * cos. Scores only depend on the difference of two positions, so the "
        "direction shows only against a reference.",
    ),
    entry(
        rotation(turn_without_minus),
        where,
        "no minus sign",
        "The real part is real * cos - imag * sin. With a plus it is no rotation, and lengths "
        "change with the position.",
    ),
    entry(
        rotation(turn_sine_for_cosine),
        where,
        "sine and cosine swapped",
        "Cosine and sine are exchanged, so position 0 is turned by a quarter circle instead of "
        "not at all.",
    ),
    entry(
        rotation(turn_products_only),
        where,
        "multiplies real by cosine and imaginary by sine only",
        "Each output needs both parts: real * cos - imag * sin, and real * sin + imag * cos.",
    ),
    entry(
        rotation(turn_along_heads),
        where,
        "positions counted along the heads",
        "The angles are broadcast over the wrong axis: they follow the head's number and not the "
        "token's position. The tensors are (batch, seq, heads, head_dim), so the tables must be "
        "(1, seq, 1, head_dim / 2).",
    ),
    entry(
        rotation(angles=transposed_angles),
        where,
        "table of angles transposed, then reshaped",
        "The outer product has the axes (head_dim / 2, seq), and view or reshape only cuts it "
        "anew. Compute outer(positions, frequencies), or use transpose.",
    ),
    entry(
        rotation(angles=partial(angles, first=1)),
        where,
        "positions start at 1",
        "Positions start at 0, so the first token is not rotated. Scores depend on differences "
        "only, so the model's text is the same, but the values are not the reference's.",
    ),
    entry(
        rotation(angles=last_rows),
        where,
        "uses the last rows of the table",
        "The table has max_seq_len rows; the first seq of them belong to the sequence.",
    ),
    entry(
        rotation(angles=integer_frequencies),
        where,
        "frequencies cast to integer",
        "All frequencies but the first are below 1 and become 0, so one pair of features rotates "
        "and all others never do. Compute them in float32.",
    ),
    entry(
        rotation(angles=integer_angles),
        where,
        "angles cast to integer",
        "The angles are rounded down, so neighbouring positions get equal angles. Use float32.",
    ),
    entry(
        rotation(angles=fixed_theta),
        where,
        "ignores theta",
        "The base of the frequencies is always 10000. The course's model uses this value, but "
        "others do not; use the argument.",
        "alpotekhin/minllama-assignment",
    ),
    entry(
        exponents(lambda pairs, d: -pairs / d),
        where,
        "wrong exponent: the factor 2 is missing",
        "The frequency of pair i is theta^(-2i / head_dim).",
    ),
    entry(
        exponents(lambda pairs, d: -4 * pairs / d),
        where,
        "wrong exponent: the factor 2 is there twice",
        "The frequency of pair i is theta^(-2i / head_dim). arange(0, head_dim, 2) already "
        "counts in steps of 2, so divide it by head_dim and not by half of it.",
    ),
    entry(
        exponents(lambda pairs, d: 2 * pairs / d),
        where,
        "wrong exponent: the minus sign is missing",
        "The frequency of pair i is theta^(-2i / head_dim); it falls from 1 to nearly 0.",
    ),
    entry(
        exponents(lambda pairs, d: -2 * (pairs + 1) / d),
        where,
        "wrong exponent: pairs counted from 1",
        "The paper counts pairs from 1 and uses i - 1 in the exponent. Counted from 0, the first "
        "pair has the frequency 1.",
    ),
    entry(
        after(lambda query, key, rotated, rotated_key: (rotated, key)),
        where,
        "key not rotated",
        "Scores depend on the difference of two positions only if both query and key are rotated.",
    ),
    entry(
        after(lambda query, key, rotated, rotated_key: (query, rotated_key)),
        where,
        "query not rotated",
        "Scores depend on the difference of two positions only if both query and key are rotated.",
    ),
    entry(
        after(lambda query, key, *_: (query, key)),
        where,
        "nothing rotated",
        "Query and key come back as they are, so the model knows no order of the tokens.",
    ),
    entry(
        after(lambda query, key, rotated, rotated_key: (rotated, rotated)),
        where,
        "rotated query returned as the key",
        "The key is computed from the query's parts, so attention compares the query with itself.",
    ),
    entry(
        after(lambda query, key, rotated, rotated_key: (rotated_key, rotated)),
        where,
        "query and key returned in the wrong order",
        "The function returns the query first, then the key.",
    ),
    entry(
        after(key_like_query),
        where,
        "works only with as many key heads as query heads",
        "The key has n_kv_heads heads, in grouped-query attention fewer than the query. Take each "
        "tensor's own shape. The course's checkpoint has equal numbers, so its checks pass.",
        "madflytep/minllama-assignment",
    ),
)

PART = Part("rope", where, apply_rotary_emb, VARIANTS, observe, adapt)
