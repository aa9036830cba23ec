"""Preparing a model to generate, the plain case: it stays as it is.

This stands in for the project's own module, which leads to the answers in `decoding.py`.
"""

from collections.abc import Callable

import torch

from llama import Llama


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
