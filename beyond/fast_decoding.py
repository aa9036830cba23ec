"""Decoding as fast as this machine can: chosen kernels, and the step of one token compiled.

`decoding.py` computes the same without looking at the machine.
"""

from collections.abc import Callable

import torch

from beyond.compiled_decoding import compile_for_decoding, seconds_per_token
from beyond.decoding import DecodingLlama, prepare_for_decoding
from beyond.kernels import Shape, choose_storages
from config import LlamaConfig
from llama import Llama

LARGE = 8_000_000  # weights; a smaller model stays in the processor's cache
SHORTEST = 3  # positions; the compiled step is for the third one and later ones


def prepare_fastest(
    llama: Llama,
    dtype: torch.dtype,
    quantize: bool,
    measure: bool,
    compile_step: bool,
    note: Callable[[str], None],
) -> Llama:
    """Do what `prepare_for_decoding` does, and choose what is fastest on this machine.

    Args:
        llama, dtype, quantize: as in `prepare_for_decoding`.
        measure: whether measurements choose how the matrices of a large model are stored on the
            CPU; else the defaults do.
        compile_step: whether to compile the step of one token.
        note: called with a line for each choice.

    Raises:
        ValueError: the model cannot be quantized or compiled: it is not causal, or not on the CPU.
    """
    config, on_cpu = llama.config, llama.output.weight.device.type == "cpu"
    if compile_step and not (config.causal and on_cpu):
        raise ValueError("--compile: only for a causal model (--causal), on the CPU")
    if not (config.causal and on_cpu):
        return prepare_for_decoding(llama, dtype, quantize)
    shapes = matrix_shapes(config)
    choice = None
    if measure and not quantize and sum(out * size for out, size in shapes) >= LARGE:
        choice = choose_storages(shapes, dtype, note)
    model = prepare_for_decoding(llama, dtype, quantize, choice=choice)
    if compile_step and config.max_seq_len < SHORTEST:
        note(f"--compile: decodes without it, since max_seq_len={config.max_seq_len} is so short")
    elif compile_step:
        assert isinstance(model, DecodingLlama)
        eager = seconds_per_token(model)
        del model  # so that the weights are not in memory twice
        model = prepare_for_decoding(llama, dtype, quantize, choice=dict.fromkeys(shapes, "rows"))
        assert isinstance(model, DecodingLlama)
        if not compile_for_decoding(model, eager, note):
            model = prepare_for_decoding(llama, dtype, quantize, choice=choice)
    return model


def matrix_shapes(config: LlamaConfig) -> list[Shape]:
    """Return (out, in) of each matrix of a `DecodingLlama`."""
    dim, hidden_dim = config.dim, config.hidden_dim
    num_heads = config.n_heads + 2 * config.n_kv_heads
    layer = [(num_heads * config.head_dim, dim), (dim, dim), (2 * hidden_dim, dim)]
    return [*[*layer, (dim, hidden_dim)] * config.n_layers, (config.vocab_size, dim)]
