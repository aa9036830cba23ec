"""The mistakes that are known of `apply_rotary_emb`."""

from functools import partial

from beyond.classroom.part import Variant
from beyond.classroom.parts.probes import BROKEN, NO_GRADIENT, broken, entry
from beyond.classroom.parts.rope_variants import (
    after,
    angles,
    exchanged,
    exchanged_after_reshape,
    exponents,
    fixed_base,
    fixed_theta,
    in_one,
    integer_angles,
    integer_frequencies,
    key_like_query,
    key_of_both,
    last_rows,
    rotation,
    transposed_angles,
    turn_added,
    turn_along_heads,
    turn_along_query_heads,
    turn_back,
    turn_concatenated,
    turn_halves,
    turn_halves_by_pairs,
    turn_overwritten,
    turn_pairs_by_halves,
    turn_products_only,
    turn_second_sign,
    turn_sine_for_cosine,
    turn_swapped,
    turn_swapped_output,
    turn_without_minus,
    turn_zeroed,
)

WHERE = "rope.py, apply_rotary_emb"

VARIANTS: tuple[Variant, ...] = (
    entry(
        rotation(turn_halves),
        WHERE,
        "rotates halves instead of pairs",
        "Features i and i + head_dim / 2 are rotated together, as in Hugging Face's Llama. The "
        "course's checkpoint was trained with features 2i and 2i + 1 as a pair, so its queries and "
        "keys no longer match. Split with reshape(..., -1, 2).",
    ),
    entry(
        rotation(turn_pairs_by_halves),
        WHERE,
        "features rotated in pairs, by angles in the order of halves",
        "torch.cat((angles, angles)) belongs to the rotation of halves. For pairs, each angle is "
        "needed twice in a row: angles.repeat_interleave(2, dim=-1).",
    ),
    entry(
        rotation(turn_halves_by_pairs),
        WHERE,
        "features rotated as halves, by angles in the order of pairs",
        "torch.cat((-second half, first half)) is Hugging Face's rotation of halves. For pairs, "
        "stack (-imaginary, real) on a new last axis and flatten.",
    ),
    entry(
        rotation(turn_swapped),
        WHERE,
        "real and imaginary parts swapped",
        "The second feature of each pair is used as the real part. Lengths are kept and training "
        "runs, but the checkpoint's attention is destroyed. Unbind gives the real part first.",
        "Yousefbahr/MinLlama",
    ),
    entry(
        rotation(turn_swapped_output),
        WHERE,
        "rotated parts joined in the wrong order",
        "The imaginary part comes first in each pair of the result. Stack (real, imaginary) in "
        "this order, then flatten.",
    ),
    entry(
        rotation(turn_zeroed),
        WHERE,
        "sines and cosines set to zero on alternate positions",
        "Every other position keeps only its sines, the rest only its cosines, so what is computed "
        "is no rotation. The zeros in the paper's matrix separate the pairs; they are not in the "
        "tables.",
    ),
    entry(
        rotation(partial(turn_zeroed, is_added=True)),
        WHERE,
        "sines and cosines zeroed on alternate positions, and parts added",
        "Every other row of the tables is set to zero, and the real and the imaginary part of the "
        "result are added, which leaves half of the features. Keep the tables whole, and stack the "
        "two parts.",
        "chernovssss/minllama-assignment",
    ),
    entry(
        rotation(turn_added),
        WHERE,
        "real and imaginary parts added instead of interleaved",
        "The sum has head_dim / 2 features. Stack the two parts on a new last axis, then flatten.",
    ),
    entry(
        rotation(turn_concatenated),
        WHERE,
        "real and imaginary parts concatenated instead of interleaved",
        "The result holds all real parts, then all imaginary parts. Scores between a query and a "
        "key survive it, but the order is not that of the input. Stack on a new last axis, then "
        "flatten.",
    ),
    entry(
        rotation(turn_back),
        WHERE,
        "rotates by minus theta",
        "Real and imaginary part get the sine with opposite signs: real * cos - imag * sin, and "
        "real * sin + imag * cos. Scores only depend on the difference of two positions, so the "
        "direction shows only against a reference.",
    ),
    entry(
        rotation(turn_second_sign),
        WHERE,
        "wrong sign in the imaginary part",
        "The second feature of each pair becomes real * sin + imag * cos, with a plus; only the "
        "first has a minus.",
        others=in_one(turn_second_sign),
    ),
    entry(
        rotation(turn_overwritten),
        WHERE,
        "second line reads what the first has overwritten",
        "The real parts are written into the input, of which query_real is a view, so the "
        "imaginary parts are computed from rotated values. Write into new tensors, or take copies "
        "with clone() first.",
        others=in_one(turn_overwritten),
    ),
    entry(
        rotation(turn_without_minus),
        WHERE,
        "no minus sign",
        "The real part is real * cos - imag * sin. With a plus it is no rotation, and lengths "
        "change with the position.",
    ),
    entry(
        rotation(turn_sine_for_cosine),
        WHERE,
        "sine and cosine swapped",
        "Cosine and sine are exchanged, so position 0 is turned by a quarter circle instead of "
        "not at all.",
    ),
    entry(
        rotation(turn_products_only),
        WHERE,
        "multiplies real by cosine and imaginary by sine only",
        "Each output needs both parts: real * cos - imag * sin, and real * sin + imag * cos.",
    ),
    entry(
        rotation(turn_along_heads),
        WHERE,
        "positions counted along the heads",
        "The angles are broadcast over the wrong axis: they follow the head's number and not the "
        "token's position. The tensors are (batch, seq, heads, head_dim), so the tables must be "
        "(1, seq, 1, head_dim / 2).",
        others=(rotation(turn_along_query_heads),),
    ),
    entry(
        rotation(angles=transposed_angles),
        WHERE,
        "table of angles transposed, then reshaped",
        "The outer product has the axes (head_dim / 2, seq), and view or reshape only cuts it "
        "anew. Compute outer(positions, frequencies), or use transpose.",
    ),
    entry(
        rotation(angles=partial(angles, first=1)),
        WHERE,
        "positions start at 1",
        "Positions start at 0, so the first token is not rotated. Scores depend on differences "
        "only, so the model's text is the same, but the values are not the reference's.",
    ),
    entry(
        rotation(angles=last_rows),
        WHERE,
        "uses the last rows of the table",
        "The table has max_seq_len rows; the first seq of them belong to the sequence.",
    ),
    entry(
        rotation(angles=integer_frequencies),
        WHERE,
        "frequencies cast to integer",
        "All frequencies but the first are below 1 and become 0, so one pair of features rotates "
        "and all others never do. Compute them in float32.",
    ),
    entry(
        rotation(angles=integer_angles),
        WHERE,
        "angles cast to integer",
        "The angles are rounded down, so neighbouring positions get equal angles. Use float32.",
    ),
    entry(
        rotation(angles=fixed_theta),
        WHERE,
        "ignores theta",
        "The angles are those of theta = 10000 even when theta is something else: it is not used, "
        "or tables of another theta are used again. The course's model has this value, so its "
        "results are right.",
        "alpotekhin/minllama-assignment",
        is_note=True,
    ),
    entry(
        fixed_base(1000.0),
        WHERE,
        "fixed base that is not 10000",
        "The base of the frequencies is theta, 10000 unless the argument says otherwise. Use "
        "theta.",
        others=tuple(fixed_base(base) for base in (10.0, 100.0, 1e5, 5e5, 1e6)),
    ),
    entry(
        exponents(lambda pairs, d: -pairs / d),
        WHERE,
        "wrong exponent: the factor 2 is missing",
        "The frequency of pair i is theta^(-2i / head_dim).",
    ),
    entry(
        exponents(lambda pairs, d: -4 * pairs / d),
        WHERE,
        "wrong exponent: the factor 2 is there twice",
        "The frequency of pair i is theta^(-2i / head_dim). arange(0, head_dim, 2) already "
        "counts in steps of 2, so divide it by head_dim and not by half of it.",
    ),
    entry(
        exponents(lambda pairs, d: 2 * pairs / d),
        WHERE,
        "wrong exponent: the minus sign is missing",
        "The frequency of pair i is theta^(-2i / head_dim); it falls from 1 to nearly 0.",
    ),
    entry(
        exponents(lambda pairs, d: -2 * (pairs + 1) / d),
        WHERE,
        "wrong exponent: pairs counted from 1",
        "The paper counts pairs from 1 and uses i - 1 in the exponent. Counted from 0, the first "
        "pair has the frequency 1.",
    ),
    entry(
        exponents(lambda pairs, d: 0 * pairs),
        WHERE,
        "wrong exponent: integer division",
        "2i // head_dim is 0 for every pair, so all frequencies are 1. Divide with /.",
    ),
    entry(
        after(lambda query, key, rotated, rotated_key: (rotated, key)),
        WHERE,
        "key not rotated",
        "Scores depend on the difference of two positions only if both query and key are rotated.",
    ),
    entry(
        after(lambda query, key, rotated, rotated_key: (query, rotated_key)),
        WHERE,
        "query not rotated",
        "Scores depend on the difference of two positions only if both query and key are rotated.",
    ),
    entry(
        after(lambda query, key, *_: (query, key)),
        WHERE,
        "nothing rotated",
        "Query and key come back as they are, so the model knows no order of the tokens.",
    ),
    entry(
        after(lambda query, key, rotated, rotated_key: (rotated, rotated)),
        WHERE,
        "rotated query returned as the key",
        "The key is computed from the query's parts, so attention compares the query with itself.",
    ),
    entry(
        after(lambda query, key, rotated, rotated_key: (rotated_key, rotated)),
        WHERE,
        "query and key returned in the wrong order",
        "The function returns the query first, then the key.",
    ),
    entry(
        key_of_both(lambda qr, qi, kr, ki: [kr, ki, kr, qi]),
        WHERE,
        "key computed from the query's parts too",
        "One of the key's lines uses query_real or query_imag. Both lines take key_real and "
        "key_imag.",
        others=(
            key_of_both(lambda qr, qi, kr, ki: [kr, ki, qr, ki]),
            key_of_both(lambda qr, qi, kr, ki: [kr, qi, kr, ki]),
            key_of_both(lambda qr, qi, kr, ki: [qr, ki, kr, ki]),
            key_of_both(lambda qr, qi, kr, ki: [kr, ki, qr, qi]),
            key_of_both(lambda qr, qi, kr, ki: [qr, qi, kr, ki]),
        ),
    ),
    entry(
        after(lambda q, k, *rotated: tuple(t.unflatten(-1, (-1, 2)) for t in rotated)),
        WHERE,
        "pairs stacked but not flattened",
        "torch.stack(..., dim=-1) makes a new last axis of size 2. Flatten it, with flatten(-2) or "
        "reshape(query.shape), so that the shape is the input's.",
    ),
    entry(
        after(exchanged),
        WHERE,
        "heads and positions exchanged in the result",
        "The result is (batch, heads, seq, head_dim). It must have the shape of the input, as "
        "Attention.forward moves the heads itself. The course's check has as many heads as "
        "positions, so it passes.",
        "U1ltra/minllama-assignment",
        others=(after(exchanged_after_reshape),),
    ),
    entry(
        after(key_like_query),
        WHERE,
        "works only with as many key heads as query heads",
        "The key has n_kv_heads heads, in grouped-query attention fewer than the query. Take each "
        "tensor's own shape. The course's checkpoint has equal numbers, so its checks pass.",
        "madflytep/minllama-assignment, Sho-Shoo/minllama-assignment",
        is_note=True,
    ),
    entry(
        after(lambda q, k, rotated, rotated_key: (rotated.detach(), rotated_key.detach())),
        WHERE,
        "no gradient for query and key",
        NO_GRADIENT + " Here compute_query and compute_key are never trained.",
    ),
    entry(
        after(lambda q, k, rotated, rotated_key: (rotated.detach(), rotated_key)),
        WHERE,
        "no gradient for the query",
        NO_GRADIENT + " Here compute_query is never trained.",
    ),
    entry(
        after(lambda q, k, rotated, rotated_key: (rotated, rotated_key.detach())),
        WHERE,
        "no gradient for the key",
        NO_GRADIENT + " Here compute_key is never trained.",
    ),
    entry(
        after(lambda q, k, rotated, rotated_key: (broken(rotated), broken(rotated_key))),
        WHERE,
        "an in-place operation breaks the gradient",
        BROKEN,
    ),
)
