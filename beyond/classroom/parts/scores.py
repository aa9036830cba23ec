"""The part `Attention.compute_query_key_value_scores`: its probes."""

from typing import Any

import torch
from torch import Tensor

from beyond.classroom.adapters import is_course_style, make_attention, our_rope
from beyond.classroom.part import Observations, Observed, Part, expect_tensor
from beyond.classroom.parts.probes import dropout_pattern, fill, normal
from beyond.classroom.parts.scores_mistakes import VARIANTS, WHERE, Build, Scores, variant
from beyond.classroom.student import Student
from config import LlamaConfig
from llama import Attention

RATE = 0.25
SIZES: dict[str, Any] = {
    "dim": 48,
    "n_heads": 6,
    "vocab_size": 11,
    "n_layers": 1,
    "max_seq_len": 16,
}


def observe(build: Build) -> Observations:
    """Compute scores without and with grouped heads, then with dropout, training and not."""

    def run(
        batch: int, seq: int, n_kv_heads: int, rate: float = 0.0, train: bool = False
    ) -> Tensor:
        config = LlamaConfig(n_kv_heads=n_kv_heads, dropout=rate, **SIZES)
        scores = build(fill(Attention(config), 0.1).train(train))
        query = normal(batch, 6, seq, 8, seed=1)
        key, value = (normal(batch, n_kv_heads, seq, 8, seed=seed) for seed in (2, 3))
        if 2 * seq == 8:  # each value is a unit vector, twice: the output shows the weights
            value = torch.eye(seq).repeat(batch, n_kv_heads, 1, 2)
        return expect_tensor(scores(query, key, value), "the output")

    kept = run(256, 4, 6)
    trained, evaluated = run(256, 4, 6, RATE, train=True), run(256, 4, 6, RATE)
    return {
        "output": Observed(run(3, 5, 6), 1e-4),
        "output with grouped heads": Observed(run(3, 5, 3), 1e-4),
        "dropout in training": Observed(dropout_pattern(trained, kept, RATE, copies=2), 1e-3),
        "dropout in evaluation": Observed(dropout_pattern(evaluated, kept, RATE, copies=2), 1e-3),
    }


def adapt(student: Student) -> Build:
    """Return a student's function; keys and values are repeated before it, if its own are."""

    def build(ours: Attention) -> Scores:
        theirs: Any = make_attention(student, ours)
        repeats = ours.config.n_rep if expects_repeated(student) else 1
        compute = theirs.compute_query_key_value_scores

        def scores(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
            return compute(query, key, value)

        return scores

    return build


def expects_repeated(student: Student) -> bool:
    """Return whether a student's `Attention.forward` repeats keys and values for all heads.

    It is run, and what it hands to `compute_query_key_value_scores` is looked at. If it cannot be
    run, the dialect decides.
    """
    config = LlamaConfig(n_kv_heads=3, **SIZES)
    theirs = make_attention(student, fill(Attention(config), 0.1))
    given: list[Tensor] = []

    def record(query: Tensor, key: Tensor, *_: object, **__: object) -> Tensor:
        given.append(key)
        return query

    vars(theirs)["compute_query_key_value_scores"] = record
    try:
        with our_rope(student, config):
            theirs(normal(1, 5, 48, seed=1))
    except Exception:
        given.clear()
    if given and given[0].dim() == 4 and given[0].shape[1] in (3, 6):
        return given[0].shape[1] == 6
    return is_course_style(student)


PART = Part(
    "attention scores",
    WHERE,
    lambda ours: ours.compute_query_key_value_scores,
    VARIANTS,
    observe,
    adapt,
    variant,
)
