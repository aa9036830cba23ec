"""Decoding, the plain case: each new token computes the whole context anew.

This stands in for the project's own module, which shows answers. It has no key/value cache, no int8
weights, no top-k and no top-p.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama import Llama


class DecodingLlama(Llama):
    """A model that is prepared for decoding; the starter makes none."""

    dtype: torch.dtype
    error: float


def prepare_for_decoding(
    llama: Llama,
    dtype: torch.dtype = torch.float32,
    quantize: bool = False,
    exact_head: bool = False,
) -> Llama:
    """Return the model itself, converted to dtype unless its logits have to be exact."""
    return llama if exact_head else llama.to(dtype)


def prepare_fastest(
    llama: Llama,
    dtype: torch.dtype,
    quantize: bool,
    measure: bool,
    compile_step: bool,
    note: Callable[[str], None],
) -> Llama:
    """Return the model itself, converted to dtype.

    Raises:
        ValueError: it has to be compiled.
    """
    if compile_step:
        raise ValueError("the starter lacks --compile for --option generate")
    return llama.to(dtype)


@dataclass(frozen=True)
class Sampler:
    """How to choose the next token of each row; `top_k` and `top_p` are not used."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    generators: Sequence[torch.Generator] = ()  # one for each row


def stream(
    llama: Llama,
    idx: Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    padding: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the tokens, (1, 1) each, that continue a context idx (1, seq); never stops early."""
    [generator] = sampler.generators
    for _ in range(max_new_tokens):
        idx = llama.generate(idx, 1, sampler.temperature, generator)  # (1, seq + 1)
        yield idx[:, -1:]
