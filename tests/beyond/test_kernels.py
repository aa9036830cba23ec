"""How matrices are stored: what each storage computes, and how the choice is measured and kept."""

import json
import math
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from beyond import decoding, fast_decoding, kernels
from beyond.kernels import (
    DEFAULTS,
    STORAGES,
    BusyCheck,
    HugePages,
    choose_storages,
    fits,
    pick,
    read_results,
    result_key,
    results_file,
    store,
)
from run_llama import main

SHAPES = [(64, 24), (96, 40)]
LOW = "output/task_1/generated-sentence-temp-0.txt"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder, and measurements that take no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "MEASURED_BYTES", 1)
    monkeypatch.setattr(BusyCheck, "read", staticmethod(lambda: (0.0, 0.0)))  # not busy
    return tmp_path / "cache/min-llama/kernels.json"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes of each measurement, joined; the shorter a storage's name, the faster it is."""
    measured: list[tuple[int, int]] = []

    def measure(
        shapes: list[tuple[int, int]], dtype: torch.dtype, check: BusyCheck
    ) -> dict[tuple[int, int], dict[str, float]]:
        measured.extend(shapes)
        with check:
            return {
                shape: {name: 1 / len(name) for name in STORAGES if fits(name, shape, dtype)}
                for shape in shapes
            }

    monkeypatch.setattr(kernels, "measure", measure)
    return measured


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


# ----------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("system", ["with huge pages", "without", "not Linux"])
def test_copies_in_huge_pages_are_tensors_of_their_own(
    monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    """Of any dtype and size, also larger than a chunk; each begins at a multiple of 64 bytes."""
    if system == "not Linux":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    if system == "without":
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 10**6)  # not known to the system
    memory = HugePages()
    monkeypatch.setattr(memory, "CHUNK", 4096)
    tensors = [random(7, 3), random(5).bfloat16(), random(40, 50), random(9).char(), random(30, 30)]
    copies = [memory.copy(x) for x in tensors]
    copies.append(memory.copy(tensors[2].t()))
    assert copies[-1].is_contiguous()
    for x, copy in zip([*tensors, tensors[2].t()], copies, strict=True):
        assert torch.equal(x, copy) and copy.data_ptr() % 64 == 0
    copies[0].zero_()
    assert all(map(torch.equal, tensors[1:], copies[1:]))
    monkeypatch.setattr(memory, "PAGE", 4096)
    for shape in ((3, 7), (5, 7, 300)):  # smaller and larger than a page
        own = memory.alone(shape, torch.float32)
        assert own.fill_(2).sum() == 2 * math.prod(shape) and own.is_contiguous()
    assert all(map(torch.equal, tensors[1:], copies[1:]))


# --------------------------------------------------------------------------------------- storages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 24), (33, 7), (1, 5)])
@pytest.mark.parametrize("name", STORAGES)
def test_a_storage_computes_the_product(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """For one vector and for several, against a float64 product."""
    weight, x = random(*shape).to(dtype), random(5, shape[1], 1)[:, :, 0].to(dtype)
    storage = store(name, weight)
    assert torch.equal(storage.matrix, weight)
    expected = x.double() @ weight.double().T
    tolerance = 1e-5 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(storage.multiply(x).double(), expected, atol=tolerance, rtol=0)
    out = torch.full(shape[:1], float("nan"), dtype=dtype)
    storage.multiply_vector(x[0], out)
    torch.testing.assert_close(out.double(), expected[0], atol=tolerance, rtol=0)


def test_each_storage_is_another_layout() -> None:
    layouts = {store(name, random(128, 24).bfloat16()).stored.stride() for name in STORAGES}
    assert len(layouts) == len(STORAGES)


@pytest.mark.parametrize("name", STORAGES)
def test_sums_in_bfloat16_are_rounded_once(name: str) -> None:
    """A sum of a thousand products that is rounded after each addition is much further off."""
    weight, x = random(128, 1024).bfloat16(), random(1024, 1)[:, 0].bfloat16()
    out = torch.empty(128).bfloat16()
    store(name, weight).multiply_vector(x, out)
    expected = weight.double() @ x.double()
    scale = (weight.double().abs() @ x.double().abs()).max()
    errors = (out.double() - expected).abs()
    assert (errors <= 0.008 * expected.abs() + 2e-4 * scale).all()


# ----------------------------------------------------------------------------------------- choice


def test_another_storage_must_be_clearly_faster_than_the_default() -> None:
    assert pick({"rows": 10.0, "columns": 10.9}, "rows") == "rows"
    assert pick({"rows": 10.0, "columns": 11.1}, "rows") == "columns"
    assert pick({"columns": 1.0}, "rows") == "columns"  # the default does not fit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measurements_are_made_once_and_kept(cache: Path, dtype: torch.dtype) -> None:
    """All storages are really measured; a second run reads the file, and chooses the same."""
    notes: list[str] = []
    first = choose_storages(SHAPES, dtype, notes.append)
    rates = json.loads(cache.read_text(encoding="utf-8"))
    fitting = [{name for name in STORAGES if fits(name, shape, dtype)} for shape in SHAPES]
    assert [set(values) for values in rates.values()] == fitting
    assert len(fitting[0]) == (2 if dtype == torch.float32 else 5)
    written = cache.stat().st_mtime_ns
    assert choose_storages([*SHAPES, *SHAPES], dtype, notes.append) == first
    assert cache.stat().st_mtime_ns == written
    assert set(first) == set(SHAPES) and len(notes) == 2
    assert "measured in" in notes[0] and "measured in" not in notes[1]
    for note in notes:
        assert f"kept in {cache}" in note and f"64x24 {first[64, 24]}" in note


def test_only_what_is_missing_is_measured(cache: Path, measured: list[tuple[int, int]]) -> None:
    """Another shape, dtype, number of threads or version is another measurement."""
    for shapes in (SHAPES[:1], SHAPES):
        choice = choose_storages(shapes, torch.float32, lambda note: None)
        assert choice[64, 24] == "rows"  # not the default
    assert measured == [SHAPES[0], *SHAPES]  # whole models, but what is known is kept
    choose_storages(SHAPES[:1], torch.bfloat16, lambda note: None)
    torch.set_num_threads(2)
    try:
        choose_storages(SHAPES[:1], torch.float32, lambda note: None)
    finally:
        torch.set_num_threads(1)
    assert measured == [SHAPES[0], *SHAPES, SHAPES[0], SHAPES[0]]
    assert len(read_results(cache)) == 4


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[1]",
        b"[" * 100_000,
        b'{"a": 1, "b": {}, "c": {"rows": "9"}, "d": {"rows": -1.0}, "e": {"no": 1.0}}',
        b'{"a": {"rows": NaN, "columns": 1.0}}',
    ],
)
def test_a_broken_file_is_measured_anew(
    cache: Path, measured: list[tuple[int, int]], content: bytes
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    choose_storages(SHAPES, torch.float32, lambda note: None)
    assert measured == SHAPES and len(read_results(cache)) == 2


def test_a_broken_measurement_leaves_the_others(
    cache: Path, measured: list[tuple[int, int]]
) -> None:
    choose_storages(SHAPES, torch.float32, lambda note: None)
    content = json.loads(cache.read_bytes())
    content[result_key(SHAPES[0], torch.float32)] = None
    cache.write_text(json.dumps(content), encoding="utf-8")
    choose_storages(SHAPES, torch.float32, lambda note: None)
    assert measured == [*SHAPES, *SHAPES]


@pytest.mark.parametrize("kind", ["a file", "no home"])
def test_without_a_place_to_keep_them_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[tuple[int, int]], kind: str
) -> None:
    """A second run could choose otherwise, and then differ in the last bits."""
    if kind == "a file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)
    notes: list[str] = []
    assert choose_storages(SHAPES, torch.float32, notes.append) == {} and measured == []
    assert len(notes) == 1 and notes[0].startswith("kernels: the defaults, since")


def test_a_disk_that_is_full_after_the_measurement_gives_the_defaults(
    cache: Path, measured: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, results: dict[str, dict[str, float]]) -> None:
        if results:
            raise OSError("No space left on device")

    monkeypatch.setattr(kernels, "write_results", write)
    notes: list[str] = []
    assert choose_storages(SHAPES, torch.float32, notes.append) == {} and measured == SHAPES
    assert len(notes) == 1 and notes[0].endswith("cannot be kept: No space left on device")


@pytest.mark.parametrize(
    ("end", "is_busy"),
    [
        ((12.0, 5.09), False),
        ((12.0, 5.11), True),  # of 2 seconds
    ],
)
def test_measurements_on_a_busy_machine_are_not_used(
    cache: Path,
    measured: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    end: tuple[float, float],
    is_busy: bool,
) -> None:
    readings = iter([(10.0, 5.0), end])
    monkeypatch.setattr(BusyCheck, "read", staticmethod(lambda: next(readings)))
    notes: list[str] = []
    choice = choose_storages(SHAPES, torch.float32, notes.append)
    assert measured == SHAPES and (choice == {}) == is_busy == (read_results(cache) == {})
    assert ("since other programs use this machine" in notes[0]) == is_busy
    assert ("measured in " in notes[0]) != is_busy


@pytest.mark.parametrize("system", ["Linux", "another"])
def test_the_busy_check_sees_that_the_process_waits(
    monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    """Only in the blocks, which count together. With a thread for each processor, and one more."""
    if system == "another":
        monkeypatch.setattr(Path, "glob", lambda path, pattern: iter(()))
    check = BusyCheck()
    assert not check.is_busy
    with check:
        pass
    processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not processors:
        pytest.skip("a process cannot be kept on one processor here")
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for pid in (0, other.pid):
            os.sched_setaffinity(pid, processors[:1])
        end = time.perf_counter() + 0.6
        while time.perf_counter() < end:
            with check:
                sum(range(10_000))
    finally:
        other.kill()
        other.wait()
        os.sched_setaffinity(0, processors)
    assert check.is_busy and 0.05 < check.waited <= check.wall < 60


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert results_file() == tmp_path / ".cache/min-llama/kernels.json"


# ----------------------------------------------------------------------------------- in a program


def record_matrices(monkeypatch: pytest.MonkeyPatch) -> list[dict[tuple[int, int], str]]:
    """Return the choices that models are prepared with."""
    choices: list[dict[tuple[int, int], str]] = []
    prepare: Callable[..., Any] = decoding.prepare_for_decoding

    def recording(*args: Any, choice: Any = None, **options: Any) -> Any:
        choices.append(choice)
        return prepare(*args, choice=choice, **options)

    monkeypatch.setattr(fast_decoding, "prepare_for_decoding", recording)
    return choices


ARGV = ["--causal", "--temperature", "0", "--prompt", "A film", "--max_new_tokens", "12"]


def test_a_large_model_uses_the_measured_kernels(
    workplace: Path,
    cache: Path,
    measured: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Measured once; then equal runs compute equal bits."""
    choices = record_matrices(monkeypatch)
    monkeypatch.setattr(fast_decoding, "LARGE", 1)
    texts = []
    for _ in range(2):
        assert main(ARGV) == 0
        texts.append(Path(LOW).read_bytes())
        assert "kernels: " in capsys.readouterr().out
    assert len(measured) == 4 * 2 + 1 and choices[0] == choices[1] and texts[0] == texts[1]
    assert set(choices[0].values()) == {"rows"}  # not the default


@pytest.mark.parametrize(
    "flags", [["--deterministic"], ["--no-causal"], ["--quantize", "int8"], []]
)
def test_other_runs_use_the_defaults(
    workplace: Path,
    cache: Path,
    measured: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
) -> None:
    """Also those of a small model (no flags)."""
    choices = record_matrices(monkeypatch)
    if flags:
        monkeypatch.setattr(fast_decoding, "LARGE", 1)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    assert main([*ARGV, *flags]) == 0
    assert choices == [None] and measured == [] and not cache.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STORAGES)
def test_two_runs_with_any_choice_compute_equal_bits(name: str, dtype: torch.dtype) -> None:
    """Logits of the prompt and of single tokens."""
    from tests.conftest import make_llama

    llama, tokens = make_llama(causal=True), torch.arange(9)[None] + 4
    shapes = fast_decoding.matrix_shapes(llama.config)
    results = []
    for _ in range(2):
        model = decoding.prepare_for_decoding(llama, dtype, choice=dict.fromkeys(shapes, name))
        assert isinstance(model, decoding.DecodingLlama)
        storages = {type(p.storage) for layer in model.decoding_layers for p in layer.projections()}
        assert {type(store(name, torch.empty(64, 8, dtype=dtype)))} <= storages
        caches = model.new_caches(12)
        hidden = [model.compute_hidden(tokens, caches)]
        hidden += [model.compute_hidden(tokens[:, i : i + 1], caches) for i in range(3)]
        results.append(model.output(torch.cat(hidden, dim=1)[0]))
    assert torch.equal(*results)
    expected = llama(torch.cat((tokens, tokens[:, :3]), dim=1), targets=tokens)[0][0]
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(results[0], expected, atol=tolerance, rtol=1e-4)
    assert set(DEFAULTS.values()) <= set(STORAGES)
