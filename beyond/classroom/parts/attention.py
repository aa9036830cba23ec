"""The part `Attention.forward`: its probes. The scores and RoPE inside are ours."""

from collections.abc import Callable

from torch import Tensor, nn

from beyond.classroom.adapters import make_attention, our_rope, with_nones
from beyond.classroom.part import Observations, Observed, Part, expect_tensor
from beyond.classroom.parts.attention_mistakes import VARIANTS, WHERE, Build, average, variant
from beyond.classroom.parts.probes import attempt, dropout_pattern, fill, gradients, normal
from beyond.classroom.student import Student
from config import LlamaConfig
from llama import Attention

RATE = 0.25


def observe(build: Build) -> Observations:
    """Run attention without and with grouped heads, with dropout, then backward."""

    def make(n_kv_heads: int, rate: float, train: bool) -> Callable[[Tensor], Tensor]:
        config = LlamaConfig(
            vocab_size=11,
            n_layers=1,
            dim=48,
            n_heads=6,
            n_kv_heads=n_kv_heads,
            max_seq_len=16,
            dropout=rate,
        )
        return build(fill(Attention(config), 0.2).train(train))

    def run(batch: int, n_kv_heads: int, rate: float = 0.0, train: bool = False) -> Tensor:
        attention = make(n_kv_heads, rate, train)
        return expect_tensor(attention(normal(batch, 5, 48, seed=1)), "the output")

    kept = run(32, 6)
    trained, evaluated = run(32, 6, RATE, train=True), run(32, 6, RATE)
    return {
        "output": Observed(run(3, 6), 1e-4),
        "output with grouped heads": Observed(attempt(lambda: run(3, 3), "the output"), 1e-4),
        **dropout_pattern("dropout in training", trained, kept, RATE),
        **dropout_pattern("dropout in evaluation", evaluated, kept, RATE),
        **gradients(lambda x: (make(6, 0.0, True)(x),), {"the input": normal(2, 5, 48, seed=1)}),
    }


def isolate(attention: nn.Module) -> nn.Module:
    """Replace the scores of an attention by ours, without dropout on the weights."""
    if isinstance(dropout := getattr(attention, "attn_dropout", None), nn.Dropout):
        dropout.p = 0.0  # in case the scores are computed elsewhere
    vars(attention)["compute_query_key_value_scores"] = lambda query, key, value, *_, **__: average(
        query, key, value
    )
    return attention


def adapt(student: Student) -> Build:
    def build(ours: Attention) -> nn.Module:
        theirs = isolate(make_attention(student, ours))
        forward = with_nones(theirs.forward, 1)

        def with_our_rope(x: Tensor) -> Tensor:
            with our_rope(student, ours.config):
                return forward(x)

        vars(theirs)["forward"] = with_our_rope
        return theirs

    return build


PART = Part("attention", WHERE, isolate, VARIANTS, observe, adapt, variant)
