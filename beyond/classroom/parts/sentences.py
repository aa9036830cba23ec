"""What the probes of both classifiers share: a model, sentences, and a way to hand them over."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from beyond.classroom.adapters import replaced
from beyond.classroom.parts.probes import fill
from beyond.classroom.student import Student
from config import LlamaConfig
from llama import Llama

CONFIG = LlamaConfig(vocab_size=19, dim=12, n_layers=2, n_heads=3, n_kv_heads=1, hidden_dim=10)
PAD = 3  # the tokenizer's <0x00>
UNPADDED = torch.tensor(
    [[1, 7, 9, 14, 5], [1, 12, 18, 6, 10], [1, 5, 5, 13, 17], [1, 16, 8, 11, 7]]
)
# Padded on the right, as the course's batches are; the last one has no padding.
PADDED = torch.tensor([[1, 7, 9, 3, 3], [1, 12, 18, 6, 3], [1, 6, 3, 3, 3], [1, 16, 8, 11, 7]])


class LenientLlama(Llama):
    """Our model; takes no notice of further arguments, such as a mask."""

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *_: Any, **__: Any) -> Any:
        return super().forward(tokens, targets)


@cache
def _filled_model() -> LenientLlama:
    return fill(LenientLlama(CONFIG), scale=0.5)


def make_model() -> LenientLlama:
    """Make a small model of ours with fixed weights."""
    model = deepcopy(_filled_model())
    model.tie_weights()
    # A config that takes further attributes, as the course's does.
    names = (*asdict(CONFIG), "head_dim", "n_rep")
    config = SimpleNamespace(**{name: getattr(CONFIG, name) for name in names})
    vars(model)["config"] = config
    return model


def last_real(tokens: Tensor) -> Tensor:
    """Return the index of each row's last token that is not padding."""
    return (tokens != PAD).sum(dim=-1) - 1


class Words:
    """A tokenizer that knows only the labels."""

    bos_id, eos_id, pad_id, n_words = 1, 2, PAD, CONFIG.vocab_size

    def __init__(self, ids: dict[str, list[int]]) -> None:
        self.ids = ids

    def encode(self, text: str, bos: bool = False, eos: bool = False, **_: object) -> list[int]:
        """Return a label's ids, with BOS and EOS if asked for."""
        return [self.bos_id] * bos + self.ids[text.strip()] + [self.eos_id] * eos


@contextmanager
def pretrained(student: Student, model: Llama) -> Iterator[None]:
    """Let a student's `load_pretrained` give our model, and `Tokenizer` need no file."""

    def load(*_: object, **__: object) -> Llama:
        return model

    modules = [student.module("classifier"), student.module("llama")]
    original: Callable[..., Any] | None = getattr(modules[1], "load_pretrained", None)
    original = getattr(modules[0], "load_pretrained", original)
    tokenizer = getattr(modules[0], "Tokenizer", None)
    with (
        replaced(modules[0], original, load),
        replaced(modules[1], original, load),
        replaced(modules[0], tokenizer, lambda *_, **__: Words({})) if tokenizer else nullcontext(),
    ):
        yield
