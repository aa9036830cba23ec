"""Wrong variants of `apply_rotary_emb`: small changes of its angles or of its rotation."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from beyond.classroom.parts.probes import keep_changes

THETA, MAX_SEQ_LEN = 10000.0, 20  # of the probes
Rotate = Callable[[Tensor, Tensor, int, int, float], tuple[Tensor, Tensor]]
Angles = Callable[[int, int, float], Tensor]  # of (seq, head_dim, theta): (seq, head_dim / 2)
# Of query, key, and both rotated.
Result = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
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


def turn_pairs_by_halves(x: Tensor, angle: Tensor) -> Tensor:
    angle = torch.cat((angle, angle), dim=-1)[:, None]
    rotated = join(-x[..., 1::2], x[..., ::2])
    return x * angle.cos() + rotated * angle.sin()


def turn_halves_by_pairs(x: Tensor, angle: Tensor) -> Tensor:
    angle = angle.repeat_interleave(2, dim=-1)[:, None]
    real, imag = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat((-imag, real), dim=-1) * angle.sin()


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


def turn_second_sign(x: Tensor, angle: Tensor) -> Tensor:
    real, imag, cos, sin = split(x, angle)
    return join(real * cos - imag * sin, imag * cos - real * sin)


def turn_overwritten(x: Tensor, angle: Tensor) -> Tensor:
    real, imag, cos, sin = split(x, angle)
    real = real * cos - imag * sin
    return join(real, real * sin + imag * cos)


def turn_added(x: Tensor, angle: Tensor) -> Tensor:
    return turn(x, angle).unflatten(-1, (-1, 2)).sum(dim=-1)


def turn_along_heads(x: Tensor, angle: Tensor) -> Tensor:
    # The number of the head is taken for the position; there are fewer heads than positions.
    return turn(x.transpose(1, 2), angle[: x.shape[2]]).transpose(1, 2)


def turn_along_query_heads(x: Tensor, angle: Tensor) -> Tensor:
    if x.shape[2] != 4:  # the table has the size of the query's heads
        raise ValueError("the table does not fit the key's heads")
    return turn_along_heads(x, angle)


@keep_changes
def rotation(
    turn: Turn = turn,
    angles: Angles = angles,
    result: Result = lambda query, key, rotated, rotated_key: (rotated, rotated_key),
) -> Rotate:
    """Make a function like `apply_rotary_emb`, with one step changed; by default it is right."""

    def rotate(
        query: Tensor, key: Tensor, head_dim: int, max_seq_len: int, theta: float
    ) -> tuple[Tensor, Tensor]:
        angle = angles(query.shape[1], head_dim, theta)
        return result(query, key, turn(query, angle), turn(key, angle))

    return rotate


def after(result: Result) -> Rotate:
    """Rotate, then return something else."""
    return rotation(result=result)


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


def fixed_base(base: float) -> Rotate:
    return rotation(angles=lambda seq, head_dim, theta: angles(seq, head_dim, base))


def in_one(wrong: Turn) -> tuple[Rotate, Rotate]:
    """Rotate wrongly only the query, and only the key."""

    def make(turn_query: Turn, turn_key: Turn) -> Rotate:
        def rotate(
            query: Tensor, key: Tensor, head_dim: int, max_seq_len: int, theta: float
        ) -> tuple[Tensor, Tensor]:
            angle = angles(query.shape[1], head_dim, theta)
            return turn_query(query, angle), turn_key(key, angle)

        return rotate

    return make(wrong, turn), make(turn, wrong)


def key_of_both(mix: Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]]) -> Rotate:
    """Rotate a key from parts chosen of the query's and the key's: two for each line."""

    def rotate(
        query: Tensor, key: Tensor, head_dim: int, max_seq_len: int, theta: float
    ) -> tuple[Tensor, Tensor]:
        angle = angles(query.shape[1], head_dim, theta)
        query_parts, key_parts = split(query, angle)[:2], split(key, angle)
        real, imag, other_real, other_imag = mix(*query_parts, *key_parts[:2])
        cos, sin = key_parts[2:]
        mixed = join(real * cos - imag * sin, other_real * sin + other_imag * cos)
        return turn(query, angle), mixed

    return rotate


def last_rows(seq: int, head_dim: int, theta: float) -> Tensor:
    return angles(MAX_SEQ_LEN, head_dim, theta)[-seq:]


def exchanged(
    query: Tensor, key: Tensor, rotated: Tensor, rotated_key: Tensor
) -> tuple[Tensor, Tensor]:
    return rotated.transpose(1, 2), rotated_key.transpose(1, 2)


def exchanged_after_reshape(
    query: Tensor, key: Tensor, rotated: Tensor, rotated_key: Tensor
) -> tuple[Tensor, Tensor]:
    rotated, rotated_key = exchanged(query, key, rotated, rotated_key)
    return exchanged(query, key, rotated.reshape(query.shape), rotated_key.reshape(key.shape))


def key_like_query(
    query: Tensor, key: Tensor, rotated: Tensor, rotated_key: Tensor
) -> tuple[Tensor, Tensor]:
    return rotated, rotated_key.reshape(*query.shape[:3], -1)
