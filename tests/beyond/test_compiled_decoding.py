"""The compiled step of one token: it computes what the eager one does, and its messages.

Compiling takes many seconds, so most tests run the function that would be compiled.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from beyond.compiled_decoding import compile_for_decoding
from beyond.decoding import DecodingLlama, prepare_for_decoding
from llama import Llama
from tests.conftest import make_llama
from tests.test_run_llama import run

SHAPES: list[dict[str, Any]] = [
    {},
    {"n_heads": 4, "n_kv_heads": 1, "n_layers": 3, "dim": 64},
    {"tie_embeddings": False, "rope_theta": 500000.0},
]
STORED = pytest.mark.parametrize(
    ("dtype", "quantize"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["float32", "bfloat16", "int8"],
)
ARGV = ["--causal", "--temperature", "0", "--prompt", "A film", "--max_new_tokens", "30"]
LOW = "output/task_1/generated-sentence-temp-0.txt"


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of the functions that are called although they should be compiled."""
    called: list[str] = []

    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        def compiled(*args: Any) -> Any:
            called.append(function.__name__)
            return function(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_function)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return called


def make_pair(llama: Llama, dtype: torch.dtype, quantize: bool) -> list[DecodingLlama]:
    """Make an eager and a compiled model."""
    models = [prepare_for_decoding(llama, dtype, quantize) for _ in range(2)]
    assert isinstance(models[0], DecodingLlama) and isinstance(models[1], DecodingLlama)
    compile_for_decoding(models[1], lambda note: None)
    return [models[0], models[1]]


@STORED
@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_computes_what_the_eager_one_does(
    uncompiled: list[str], shape: dict[str, Any], dtype: torch.dtype, quantize: bool
) -> None:
    """Float32 logits to 1e-5; else up to the rounding of activations, which only one of them does.

    The plain loop is the oracle of the tokens, also beyond max_seq_len and after one token.
    """
    llama = make_llama(causal=True, **{**shape, "max_seq_len": 24})
    eager, compiled = make_pair(llama, dtype, quantize)
    uncompiled.clear()
    tokens = torch.randint(4, 320, (1, 12), generator=torch.Generator().manual_seed(0))
    logits = []
    for model in (eager, compiled):
        caches = model.new_caches(24)
        rows = [model.compute_hidden(tokens[:, :1], caches)]
        rows += [model.compute_hidden(tokens[:, i : i + 1], caches) for i in range(1, 12)]
        logits.append(torch.cat([model.output(row[:, 0]) for row in rows]))
    assert uncompiled.count("compute_layer") == 10 * len(eager.decoding_layers)
    assert uncompiled.count("product") == 12
    if dtype == torch.float32:
        torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
        expected = llama.generate(tokens[:, :1], 40, 0.0)
        assert torch.equal(compiled.generate(tokens[:, :1], 40, 0.0), expected)
    else:
        assert (logits[1] - logits[0]).std() < 0.05 * logits[0].std()


def test_several_rows_and_padding_are_not_compiled(uncompiled: list[str]) -> None:
    llama = make_llama(causal=True)
    _, compiled = make_pair(llama, torch.float32, False)
    uncompiled.clear()
    tokens = torch.randint(4, 320, (3, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(compiled.generate(tokens, 9, 0.0), llama.generate(tokens, 9, 0.0))
    assert uncompiled == []


def test_the_cost_and_the_gain_are_printed(
    workplace: Path, capsys: pytest.CaptureFixture[str], uncompiled: list[str]
) -> None:
    status, out, err = run([*ARGV, "--compile"], capsys)
    assert (status, err) == (0, "") and uncompiled
    pattern = r"compiled in \d+\.\d s: [\d.]+ ms a token instead of [\d.]+ ms, (pays off|no gain)"
    assert re.search(pattern, out)
    text = Path(LOW).read_text(encoding="utf-8")
    assert run(ARGV, capsys)[0] == 0 and Path(LOW).read_text(encoding="utf-8") == text


def test_only_a_causal_model_is_compiled(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(["--no-causal", "--compile"], capsys)
    assert status == 2 and err.count("\n") == 1
    assert "--compile: only for a causal model (--causal), on the CPU" in err


def test_without_a_compiler_the_model_decodes_eagerly(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says so, and the text is the same."""
    import torch._inductor.config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(workplace / "compiled"))
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        status, out, err = run([*ARGV, "--compile"], capsys)
    assert (status, err) == (0, "") and "Traceback" not in out
    [line] = [line for line in out.splitlines() if line.startswith("--compile: ")]
    assert "decodes without it, since PyTorch finds no C++ compiler" in line
    text = Path(LOW).read_text(encoding="utf-8")
    assert run(ARGV, capsys)[0] == 0 and Path(LOW).read_text(encoding="utf-8") == text


def test_results_of_the_compiler_are_kept_in_the_cache_folder(
    uncompiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepare_for_decoding(make_llama(causal=True))
    assert isinstance(model, DecodingLlama)
    compile_for_decoding(model, lambda note: None)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)  # the user's own choice
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compile_for_decoding(model, lambda note: None)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "min-llama/compiled")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    compile_for_decoding(model, lambda note: None)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


@pytest.mark.sweep
@STORED
def test_generated_code_gives_the_tokens_of_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, quantize: bool
) -> None:
    """In float32 also those of the plain loop; else the eager step rounds activations."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    llama = make_llama(causal=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda function: function)
        _, uncompiled = make_pair(llama, dtype, quantize)
    _, compiled = make_pair(llama, dtype, quantize)
    tokens = torch.randint(4, 320, (1, 7), generator=torch.Generator().manual_seed(0))
    actual = compiled.generate(tokens, 60, 0.0)
    assert torch.equal(actual, uncompiled.generate(tokens, 60, 0.0))
    if dtype == torch.float32:
        assert torch.equal(actual, llama.generate(tokens, 60, 0.0))
