"""Check rope.py with the course's published values, an independent oracle, and two properties.

Run as `uv run python rope_test.py`; pytest collects it too.
"""

import torch
from torch import Tensor

from rope import apply_rotary_emb
from utils import refuse_arguments

BATCH, SEQ, N_HEADS, N_KV_HEADS, HEAD_DIM, MAX_SEQ_LEN = 5, 7, 6, 3, 8, 19


def random_query_key(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Draw a query (batch, seq, n_heads, head_dim) and a key (batch, seq, n_kv_heads, head_dim)."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, SEQ, N_HEADS, HEAD_DIM, generator=generator, dtype=dtype)
    key = torch.randn(BATCH, SEQ, N_KV_HEADS, HEAD_DIM, generator=generator, dtype=dtype)
    return query, key


def complex_oracle(x: Tensor, theta: float = 10000.0) -> Tensor:
    """Multiply features (2k, 2k+1), as a complex number, by e^(i m theta^(-2k/d)) in float64.

    Here i is the imaginary unit, k the pair, m the position and d the head_dim.
    """
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
    exponents = -2.0 * torch.arange(x.shape[-1] // 2, dtype=torch.float64) / x.shape[-1]
    positions = torch.arange(x.shape[1], dtype=torch.float64)
    angles = positions[:, None] * theta**exponents
    rotations = torch.polar(torch.ones_like(angles), angles)  # (seq, head_dim / 2)
    return torch.view_as_real(pairs * rotations[None, :, None, :]).flatten(-2)


def test_course_values() -> None:
    """Compare with the course's rotary_embedding_actual.data, whose input is constant."""
    query, key = 2 * torch.ones(1, 2, 2, 4), 3 * torch.ones(1, 2, 2, 4)
    query, key = apply_rotary_emb(query, key, head_dim=4, max_seq_len=20)
    expected_query = torch.tensor(
        [
            [2.0, 2.0, 2.0, 2.0],
            [-0.6023372411727905, 2.7635464668273926, 1.9799003601074219, 2.019899606704712],
        ]
    )
    expected_key = torch.tensor(
        [
            [3.0, 3.0, 3.0, 3.0],
            [-0.903505802154541, 4.145319938659668, 2.969850540161133, 3.0298495292663574],
        ]
    )
    for head in range(2):  # both heads have the same input; tolerances of the course
        torch.testing.assert_close(query[0, :, head], expected_query, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(key[0, :, head], expected_key, rtol=1e-5, atol=1e-8)


def test_complex_oracle() -> None:
    """Compare with complex multiplication in float64; all sizes of the random input differ."""
    query, key = random_query_key()
    for theta in (10000.0, 500.0):
        rotated = apply_rotary_emb(query, key, HEAD_DIM, MAX_SEQ_LEN, theta)
        for ours, x in zip(rotated, (query, key), strict=True):
            # float32 angles of up to 6 radians have an error of a few units in the last place
            torch.testing.assert_close(ours.double(), complex_oracle(x, theta), rtol=0, atol=3e-6)


def test_scores_depend_on_distance_only() -> None:
    """Check that query_m . key_n depends on m - n only: shifting both does not change it."""
    query, key = random_query_key()
    vectors = [x[:1, :1, :1].expand(1, MAX_SEQ_LEN, 1, HEAD_DIM) for x in (query, key)]
    rotated_query, rotated_key = apply_rotary_emb(vectors[0], vectors[1], HEAD_DIM, MAX_SEQ_LEN)
    scores = rotated_query[0, :, 0] @ rotated_key[0, :, 0].T  # (seq, seq)
    for distance in range(-SEQ, SEQ + 1):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert scores.std() > 0.1  # the scores do depend on the distance


def test_norms_are_kept() -> None:
    """Check that rotation keeps the norm of each vector, and changes nothing at position 0."""
    query, key = random_query_key()
    rotated = apply_rotary_emb(query, key, HEAD_DIM, MAX_SEQ_LEN)
    for ours, x in zip(rotated, (query, key), strict=True):
        torch.testing.assert_close(ours.norm(dim=-1), x.norm(dim=-1))
        torch.testing.assert_close(ours[:, 0], x[:, 0], rtol=0, atol=0)
        assert (ours[:, 1:] - x[:, 1:]).abs().max() > 0.1


def main() -> None:
    test_course_values()
    test_complex_oracle()
    test_scores_depend_on_distance_only()
    test_norms_are_kept()
    print(
        "Rotary embeddings match the course's values and complex multiplication, keep norms, "
        "and their scores depend on the distance only.\nRotary embedding test passed!"
    )


if __name__ == "__main__":
    refuse_arguments(__doc__)
    main()
