"""The part `apply_rotary_emb`: its probes."""

import inspect

from torch import Tensor

from beyond.classroom.adapters import find
from beyond.classroom.part import AdaptError, Observations, Observed, Part, expect_tensor
from beyond.classroom.parts.probes import FAILED, attempt, gradients, normal
from beyond.classroom.parts.rope_mistakes import VARIANTS, WHERE
from beyond.classroom.parts.rope_variants import MAX_SEQ_LEN, THETA, Rotate, rotation
from beyond.classroom.student import Student
from rope import apply_rotary_emb

HEAD_DIM = 8


def observe(rotate: Rotate) -> Observations:
    """Rotate as many key heads as query heads, with another theta, fewer key heads, gradients."""

    def call(query: Tensor, key: Tensor, theta: float = THETA) -> tuple[Tensor, Tensor]:
        result = rotate(query, key, HEAD_DIM, MAX_SEQ_LEN, theta)
        if result is None:
            raise NotImplementedError("apply_rotary_emb returns None")
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise AdaptError("apply_rotary_emb does not return a pair, query and key")
        return result[0], result[1]

    def inputs(n_kv_heads: int) -> dict[str, Tensor]:
        return {
            "the query": normal(2, 13, 4, HEAD_DIM, seed=1),
            "the key": normal(2, 13, n_kv_heads, HEAD_DIM, seed=2),
        }

    def run(n_kv_heads: int, theta: float) -> tuple[Tensor, Tensor]:
        query, key = inputs(n_kv_heads).values()
        rotated, rotated_key = call(query, key, theta)
        return expect_tensor(rotated, "the query"), expect_tensor(rotated_key, "the key")

    query, key = run(4, THETA)
    fewer = attempt(lambda: run(2, THETA)[1], "the key")
    values = {
        "query": query,
        "key": key,
        "query with theta=100": attempt(lambda: run(4, 100.0)[0], "the query"),
        "key with fewer heads": fewer if fewer.shape == (2, 13, 2, HEAD_DIM) else FAILED,
    }
    found = {name: Observed(value, 1e-4) for name, value in values.items()}
    return found | gradients(call, inputs(4))


def adapt(student: Student) -> Rotate:
    """Return a student's function; theta is left out if it has no such parameter."""
    function = find(student, "rope", "apply_rotary_emb")
    names = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name == "theta" or parameter.default == THETA
    ]

    def rotate(
        query: Tensor, key: Tensor, head_dim: int, max_seq_len: int, theta: float
    ) -> tuple[Tensor, Tensor]:
        options = {name: theta for name in names[:1] if theta != THETA}
        return function(query, key, head_dim, max_seq_len, **options)

    return rotate


PART = Part("rope", WHERE, apply_rotary_emb, VARIANTS, observe, adapt, rotation)
