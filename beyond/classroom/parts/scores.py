"""The part `Attention.compute_query_key_value_scores`: its probes."""

from collections.abc import Mapping
from contextlib import suppress
from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beyond.classroom.adapters import (
    find,
    is_course_style,
    make_attention,
    make_config,
    our_rope,
    with_nones,
)
from beyond.classroom.part import Observations, Observed, Part, expect_tensor
from beyond.classroom.parts.probes import dropout_pattern, fill, gradients, normal
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
    """Compute scores without and with grouped heads, with dropout, then their gradients."""

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

    kept = run(64, 4, 6)
    trained, evaluated = run(64, 4, 6, RATE, train=True), run(64, 4, 6, RATE)
    scores = build(fill(Attention(LlamaConfig(n_kv_heads=6, **SIZES)), 0.1).train())
    return {
        "output": Observed(run(3, 5, 6), 1e-4),
        "output with grouped heads": Observed(run(3, 5, 3), 1e-4),
        **dropout_pattern("dropout in training", trained, kept, RATE, copies=2),
        **dropout_pattern("dropout in evaluation", evaluated, kept, RATE, copies=2),
        **gradients(
            lambda query, key, value: (scores(query, key, value),),
            {
                f"the {name}": normal(2, 6, 5, 8, seed=seed)
                for seed, name in enumerate(("query", "key", "value"), 1)
            },
        ),
    }


def adapt(student: Student) -> Build:
    """Return a student's function; it is given what the student's own modules give it."""

    def build(ours: Attention) -> Scores:
        theirs: Any = make_attention(student, ours)
        compute = with_nones(theirs.compute_query_key_value_scores, 3)
        given_for = cache(partial(find_given, student, ours))

        def scores(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            given = given_for(*query.shape[::2])
            if given.heads == query.shape[1]:
                key, value = (t.repeat_interleave(ours.config.n_rep, dim=1) for t in (key, value))
            return compute(query, key, value, *given.args, **given.options)

        return scores

    return build


class Given(NamedTuple):
    """What a student's scores are given by the student's `Attention.forward`."""

    heads: int  # of keys and values
    args: tuple[Any, ...] = ()  # besides query, key and value, such as a mask
    options: Mapping[str, Any] = MappingProxyType({})


def find_given(student: Student, ours: Attention, batch: int, seq: int) -> Given:
    """Run a student's model, or else its attention alone, and see what its scores are given.

    If neither can be run, the dialect decides, and nothing is given besides.
    """
    config = ours.config
    found: list[Given] = []

    def record(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        heads = (config.n_heads, config.n_kv_heads)
        if query.dim() == key.dim() == 4 and query.shape[1] == heads[0] and key.shape[1] in heads:
            found.append(Given(key.shape[1], args, options))
        return query

    def run_model() -> None:
        model = find(student, "llama", "Llama")(make_config(student, config))
        vars(model.layers[0].attention)["compute_query_key_value_scores"] = record
        model(torch.full((batch, seq), config.vocab_size - 1))

    def run_attention() -> None:
        attention = make_attention(student, ours)
        vars(attention)["compute_query_key_value_scores"] = record
        with_nones(attention.forward, 1)(normal(batch, seq, config.dim, seed=1))

    for run in (run_model, run_attention):
        with suppress(Exception), our_rope(student, config):  # other parts show their errors
            run()
        if found:
            return found[0]
    return Given(config.n_heads if is_course_style(student) else config.n_kv_heads)


PART = Part(
    "attention scores",
    WHERE,
    lambda ours: ours.compute_query_key_value_scores,
    VARIANTS,
    observe,
    adapt,
    variant,
)
