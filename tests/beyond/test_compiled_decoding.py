"""The compiled step of one token: it computes what the eager one does, and its messages.

Compiling takes many seconds, so most tests run the function that would be compiled.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.exc import InductorError

from beyond import compiled_decoding
from beyond.ahead_of_time import Compiled
from beyond.compiled_decoding import CompiledStep
from beyond.decoding import DecodingLlama, Projection, prepare_for_decoding
from beyond.fast_decoding import matrix_shapes, prepare_fastest
from beyond.kv_cache import KVCache
from beyond.numpy_step import NumpyStep
from llama import Llama
from tests.conftest import ROOT, make_llama
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
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the modules that are called although they should be compiled."""
    called: list[str] = []

    def compile_ahead(module: nn.Module, example: tuple[Any, ...], *_: Any) -> Compiled:
        run = uncompiled_module(module, example)

        def compiled(tensors: list[Tensor]) -> list[Tensor]:
            called.append(type(module).__name__)
            return run(tensors)

        return compiled

    monkeypatch.setattr(compiled_decoding, "compile_ahead", compile_ahead)
    return called


def uncompiled_module(module: nn.Module, example: tuple[Any, ...], *_: Any) -> Compiled:
    """Do what `compile_ahead` does, without a compiler."""

    def run(tensors: list[Tensor]) -> list[Tensor]:
        parts = iter(tensors)
        args = [[next(parts) for _ in x] if isinstance(x, list) else next(parts) for x in example]
        results = module(*args)
        return list(results) if isinstance(results, tuple) else [results]

    return run


def make_pair(llama: Llama, dtype: torch.dtype, quantize: bool) -> list[DecodingLlama]:
    """Make an eager and a compiled model."""
    eager, compiled = (
        prepare_fastest(llama, dtype, quantize, False, compile_step, lambda note: None)
        for compile_step in (False, True)
    )
    assert isinstance(eager, DecodingLlama) and isinstance(compiled, DecodingLlama)
    assert isinstance(compiled.token_step, CompiledStep)
    return [eager, compiled]


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
    assert uncompiled.count("LayerStep") == 10 * len(eager.decoding_layers)
    assert uncompiled.count("HeadStep") == 12
    if dtype == torch.float32:
        torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
        expected = llama.generate(tokens[:, :1], 40, 0.0)
        assert torch.equal(compiled.generate(tokens[:, :1], 40, 0.0), expected)
    else:
        assert (logits[1] - logits[0]).std() < 0.05 * logits[0].std()


@STORED
def test_the_step_reads_the_weights_that_the_model_stores(
    uncompiled: list[str], dtype: torch.dtype, quantize: bool
) -> None:
    """A copy would take memory again, outside the huge pages, where reading it is slower."""
    llama = make_llama(causal=True)
    _, model = make_pair(llama, dtype, quantize)
    step, projection = model.token_step, model.output.projection
    assert isinstance(step, CompiledStep) and isinstance(projection, Projection)
    assert step.head[0].data_ptr() == projection.storage.stored.data_ptr()
    for layer, tensors in zip(model.decoding_layers, step.layers, strict=True):
        stored = [projection.storage.stored.data_ptr() for projection in layer.projections()]
        assert [tensor.data_ptr() for tensor in tensors[:: 2 if quantize else 1]] == stored


@pytest.mark.parametrize("name", ["columns", "8 column blocks"])
def test_only_rows_are_compiled(uncompiled: list[str], name: str) -> None:
    llama = make_llama(causal=True)
    choice = dict.fromkeys(matrix_shapes(llama.config), name)
    model = prepare_for_decoding(llama, torch.bfloat16, choice=choice)
    assert isinstance(model, DecodingLlama)
    with pytest.raises(ValueError, match="stored row by row"):
        CompiledStep(model)


def test_without_a_compiler_the_model_is_the_one_without_the_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has its storages and its step, and not those that the compiler would have needed."""

    def fail(*_: Any) -> Compiled:
        raise InductorError(RuntimeError("no g++"), None)

    monkeypatch.setattr(compiled_decoding, "compile_ahead", fail)
    llama = make_llama(causal=True)
    notes: list[str] = []
    model = prepare_fastest(llama, torch.float32, False, False, True, notes.append)
    assert isinstance(model, DecodingLlama) and isinstance(model.token_step, NumpyStep)
    assert not model.token_step.layers[0][0].flags.c_contiguous  # columns, the default
    assert len(notes) == 1 and "decodes without it" in notes[0] and "no g++" in notes[0]


@pytest.mark.parametrize("positions", [1, 2, 3])
def test_a_model_of_few_positions(uncompiled: list[str], positions: int) -> None:
    """The compiled step is for the third position and later ones."""
    llama = make_llama(causal=True, max_seq_len=positions)
    notes: list[str] = []
    model = prepare_fastest(llama, torch.float32, False, False, True, notes.append)
    assert ("so short" in notes[0]) == (positions < 3)
    tokens = torch.tensor([[5]])
    expected = llama.generate(tokens, 9, 0.0)
    uncompiled.clear()
    assert torch.equal(model.generate(tokens, 9, 0.0), expected)
    assert ("LayerStep" in uncompiled) == (positions == 3)


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


@pytest.mark.sweep
def test_without_a_compiler_the_model_decodes_eagerly(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says so, and the text is the same."""
    import torch._inductor.config

    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        status, out, err = run([*ARGV, "--compile"], capsys)
    assert (status, err) == (0, "") and "Traceback" not in out
    [line] = [line for line in out.splitlines() if line.startswith("--compile: ")]
    assert "decodes without it, since PyTorch finds no C++ compiler" in line
    text = Path(LOW).read_text(encoding="utf-8")
    assert run(ARGV, capsys)[0] == 0 and Path(LOW).read_text(encoding="utf-8") == text


@pytest.mark.sweep
def test_the_command_compiles_quietly_where_nothing_can_be_kept(workplace: Path) -> None:
    """PyTorch prints no warning of its own, and the text is the one without the flag."""
    (workplace / "cache").write_text("a file, not a folder")
    env = {**os.environ, "XDG_CACHE_HOME": str(workplace / "cache"), "OMP_NUM_THREADS": "1"}
    env["CUDA_HOME"] = "/nowhere"  # as if CUDA's tools were there, so that PyTorch would warn
    texts = []
    for flags in ([], ["--compile"]):
        argv = [sys.executable, str(ROOT / "run_llama.py"), *ARGV, "--threads", "1", *flags]
        done = subprocess.run(argv, capture_output=True, text=True, env=env)
        assert (done.returncode, done.stderr) == (0, "")
        texts.append(Path(LOW).read_text(encoding="utf-8"))
        Path(LOW).unlink()
    assert "compiled in" in done.stdout and texts[0] == texts[1]


def test_caches_of_another_size_are_refused(uncompiled: list[str]) -> None:
    """The generated code would read memory behind them."""
    _, compiled = make_pair(make_llama(causal=True), torch.float32, False)
    tokens = torch.arange(4, 9)[None]
    caches = [KVCache(20) for _ in compiled.decoding_layers]
    compiled.compute_hidden(tokens, caches)
    with pytest.raises(ValueError, match="takes caches for 128 positions, not for 20"):
        compiled.compute_hidden(tokens[:, :1], caches)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("dtype", "quantize", "shape"),
    [
        (torch.float32, False, {}),
        (torch.bfloat16, False, {}),
        (torch.bfloat16, True, {"dim": 40, "n_heads": 5, "n_kv_heads": 5}),
    ],
    ids=["float32", "bfloat16", "int8"],
)
def test_generated_code_gives_the_tokens_of_its_source(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    quantize: bool,
    shape: dict[str, Any],
) -> None:
    """In float32 also those of the plain loop; else the eager step rounds activations.

    A second model loads the files of the first one. A broken file is compiled anew.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    llama = make_llama(causal=True, **shape)
    with monkeypatch.context() as patch:
        patch.setattr(compiled_decoding, "compile_ahead", uncompiled_module)
        _, uncompiled = make_pair(llama, dtype, quantize)
    tokens = torch.randint(4, 320, (1, 7), generator=torch.Generator().manual_seed(0))
    expected = uncompiled.generate(tokens, 60, 0.0)

    def check() -> None:
        _, compiled = make_pair(llama, dtype, quantize)
        assert torch.equal(compiled.generate(tokens, 60, 0.0), expected)

    check()
    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "export", None)
        check()
    if dtype == torch.float32:
        first, second = (tmp_path / "min-llama/compiled").iterdir()
        first.write_bytes(first.read_bytes()[:1000])
        second.write_bytes(b"")
        check()
        assert min(first.stat().st_size, second.stat().st_size) > 10_000
        assert torch.equal(expected, llama.generate(tokens, 60, 0.0))
