"""The step of one token in NumPy, against the plain model."""

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

from beyond.decoding import DecodingLlama, prepare_for_decoding
from beyond.fast_decoding import matrix_shapes
from beyond.numpy_step import NumpyStep
from llama import Llama
from tests.conftest import ROOT, make_llama

SHAPES: list[dict[str, Any]] = [
    {},
    {"n_heads": 4, "n_kv_heads": 1, "n_layers": 3, "dim": 64},
    {"n_heads": 6, "n_kv_heads": 6, "tie_embeddings": False, "rope_theta": 500000.0},
]


def prepare(llama: Llama, **options: Any) -> DecodingLlama:
    model = prepare_for_decoding(llama, **options)
    assert isinstance(model, DecodingLlama)
    return model


@pytest.mark.parametrize("storage", ["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_single_tokens_have_the_logits_of_the_plain_model(
    shape: dict[str, Any], storage: str
) -> None:
    llama = make_llama(causal=True, max_seq_len=24, **shape)
    model = prepare(llama, choice=dict.fromkeys(matrix_shapes(llama.config), storage))
    assert isinstance(model.token_step, NumpyStep)
    matrices = [model.token_step.head, *(x for layer in model.token_step.layers for x in layer)]
    assert all(x.flags.c_contiguous == (storage == "rows") for x in matrices)
    tokens = torch.randint(4, 320, (1, 20), generator=torch.Generator().manual_seed(0))
    expected = llama(tokens, targets=tokens)[0][0]  # (20, vocab)
    caches = model.new_caches(20)
    hidden = [model.compute_hidden(tokens[:, :2], caches)]
    hidden += [model.compute_hidden(tokens[:, i : i + 1], caches) for i in range(2, 20)]
    logits = torch.cat([model.output(x[0, -1:]) for x in hidden])
    torch.testing.assert_close(logits, expected[1:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="21 positions do not fit a cache of 20"):
        model.compute_hidden(tokens[:, :1], caches)


def test_large_activations_are_an_error_and_no_warning() -> None:
    """The exponential of SiLU overflows long before the result does."""
    llama = make_llama(causal=True)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer in llama.layers:
            layer.feed_forward.w1.weight *= 1000  # type: ignore[union-attr,operator]
        expected = llama.generate(tokens, 9, 0.0)
        assert torch.equal(prepare(llama).generate(tokens, 9, 0.0), expected)
        llama.output.weight[3] = float("inf")
        with pytest.raises(ValueError, match="the logits are infinite or NaN"):
            prepare(llama).generate(tokens, 9, 0.0)


def test_it_is_for_float32_only() -> None:
    llama = make_llama(causal=True)
    for options in ({"dtype": torch.bfloat16}, {"quantize": True}):
        model = prepare(llama, **options)
        assert model.token_step is None and model.output.compute_logits is None


@pytest.mark.parametrize("threads", [1, 2])
def test_numpy_uses_as_many_threads_as_pytorch(threads: int) -> None:
    """In a process of its own, since NumPy reads the number when it is imported."""
    code = (
        "import sys; from beyond.command_line import answer_at_once; answer_at_once(); "
        "assert 'numpy' not in sys.modules; import numpy; "
        "from threadpoolctl import threadpool_info; "
        "print([p['num_threads'] for p in threadpool_info() if p['user_api'] == 'blas'])"
    )
    argv = [sys.executable, "-c", code, "--threads", str(threads)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] in (f"[{threads}]", "[]")  # []: Apple's
