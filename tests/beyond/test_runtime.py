"""Device, dtype and mode of a run: how they are found, printed, recorded, and used."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import run_llama
from base_llama import load_safely
from beyond import generation, pretraining, runtime
from beyond.options import GenerateOptions, ModelOptions
from beyond.runtime import (
    Runtime,
    allow_tf32,
    is_out_of_memory,
    load_model,
    prepare_model,
    resolve_device,
    resolve_runtime,
    to_device,
)
from classifier import ClassifierConfig, LlamaEmbeddingClassifier
from llama import Llama
from run_llama import get_args, main
from tests.conftest import make_llama, save_llama
from tests.test_run_llama import run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODES = {"reference": "reference mode (attention without a mask)", "causal": "causal mode"}
FINETUNE = ["--option", "finetune", "--epochs", "1", "--filepath", "out/a.pt"]
TASKS = {
    "generate": ["--max_new_tokens", "1", "--temperature", "0"],
    "prompt": ["--option", "prompt"],
    "finetune": FINETUNE,
}


@pytest.fixture
def causal_checkpoint(workplace: Path) -> str:
    """The path of a causal checkpoint."""
    save_llama(make_llama(causal=True), Path("causal.pt"))
    return "causal.pt"


# ------------------------------------------------------------------------------ the printed line


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("path", "flags", "dtype", "mode"),
    [
        ("stories42M.pt", [], "float32", "reference"),
        ("stories42M.pt", ["--no-causal"], "float32", "reference"),
        ("stories42M.pt", ["--causal"], "float32", "causal"),
        ("stories42M.pt", ["--dtype", "bfloat16"], "bfloat16", "reference"),
        ("causal.pt", [], "float32", "causal"),
        ("causal.pt", ["--no-causal"], "float32", "reference"),
        ("causal.pt", ["--dtype", "bfloat16"], "bfloat16", "causal"),
    ],
)
def test_each_run_says_once_how_it_computes(
    causal_checkpoint: str,
    capsys: pytest.CaptureFixture[str],
    task: str,
    path: str,
    flags: list[str],
    dtype: str,
    mode: str,
) -> None:
    """The mode comes from the checkpoint, unless a flag gives it."""
    argv = [*TASKS[task], "--pretrained-model-path", path, *flags]
    status, out, _ = run(argv, capsys)
    line = f"computes in {dtype} on cpu, in {MODES[mode]}\n"
    assert status == 0 and out.startswith(f"load model from {path}\n{line}")
    assert out.count("computes in") == 1


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_without_a_dtype_pretraining_uses_bfloat16_if_the_hardware_has_it(
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    has_bfloat16: bool,
) -> None:
    monkeypatch.setattr(runtime, "has_bfloat16", lambda device: has_bfloat16)
    for flags in ([], ["--causal"], ["--dtype", "float32"], ["--dtype", "bfloat16"]):
        options = get_args(["--option", "pretrain", *flags])
        chosen = resolve_runtime(options, causal=True)
        is_bfloat16 = "bfloat16" in flags or ("--dtype" not in flags and has_bfloat16)
        assert chosen == Runtime(CPU, torch.bfloat16 if is_bfloat16 else torch.float32, True)
        assert capsys.readouterr().out == f"{chosen}\n"


# ------------------------------------------------------------------------------ hyperparameters


def test_a_runtime_cannot_be_changed() -> None:
    runtime = Runtime(CPU, torch.float32, causal=False)
    for name in ("device", "dtype", "causal"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(runtime, name, getattr(runtime, name))
    assert runtime == Runtime(CPU, torch.float32, causal=False)


def test_hyperparameters_of_a_runtime_are_names_and_texts() -> None:
    assert Runtime(torch.device("cuda", 1), torch.bfloat16, causal=True).hyperparameters() == {
        "device": "cuda",
        "dtype": "bfloat16",
        "mode": "causal",
    }
    assert Runtime(CPU, torch.float32, causal=False).hyperparameters() == {
        "device": "cpu",
        "dtype": "float32",
        "mode": "reference",
    }


@pytest.mark.parametrize(
    ("argv", "module", "expected"),
    [
        (FINETUNE, run_llama, ("cpu", "float32", "reference")),
        ([*FINETUNE, "--causal", "--dtype", "bfloat16"], run_llama, ("cpu", "bfloat16", "causal")),
        (
            ["--option", "pretrain", "--epochs", "1", "--max_seq_len", "32"],
            pretraining,
            ("cpu", "bfloat16", "causal"),
        ),
    ],
)
def test_a_run_records_what_was_resolved_instead_of_the_flags(
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: Sequence[str],
    module: object,
    expected: tuple[str, str, str],
) -> None:
    """A flag that was left out is not recorded as None; the flags themselves are not recorded."""
    monkeypatch.setattr(runtime, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(module, "remove_training_checkpoint", lambda path: None)
    assert main([*argv, "--filepath", "out/a.pt"]) == 0
    recorded = load_safely("out/a.pt.state")["hyperparameters"]
    assert tuple(recorded[name] for name in ("device", "dtype", "mode")) == expected
    assert not {"causal", "use_gpu", "notes", "resume", "save_every"} & recorded.keys()
    assert all(isinstance(value, str) for value in recorded.values())


# ------------------------------------------------------------------------------- prepared models


def prepare(dtype: torch.dtype, causal: bool) -> tuple[LlamaEmbeddingClassifier, set[torch.dtype]]:
    """Prepare a classifier; the set gets the dtypes of the outputs of all linear layers."""
    config = ClassifierConfig(2, "", 0.0, "finetune")
    model = LlamaEmbeddingClassifier(config, make_llama(causal)).train()
    seen: set[torch.dtype] = set()
    for module in model.llama.layers.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    assert prepare_model(model, Runtime(CPU, dtype, causal), compile_layers=False) is model
    return model, seen


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prepared_model_computes_in_its_dtype_and_keeps_float32_parameters(
    dtype: torch.dtype, causal: bool
) -> None:
    model, seen = prepare(dtype, causal)
    tokens, lengths = torch.tensor([[1, 5, 9], [1, 7, 3]]), torch.tensor([3, 2])
    scores = model(tokens, lengths)
    assert seen == {dtype} and scores.dtype == torch.float32
    scores.sum().backward()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(grad is not None and grad.dtype == torch.float32 for grad in gradients)
    plain = LlamaEmbeddingClassifier(ClassifierConfig(2, "", 0.0, "finetune"), model.llama)
    plain.load_state_dict(model.state_dict())
    expected = plain(tokens, lengths)
    if dtype == torch.float32:
        assert torch.equal(scores, expected)
    else:
        assert 1e-4 < (scores - expected).abs().max() < 0.1


def test_autocast_ends_with_the_forward_pass() -> None:
    model, _ = prepare(torch.bfloat16, causal=True)
    model(torch.tensor([[1, 5, 9]]))
    assert not torch.is_autocast_enabled("cpu")
    with Runtime(CPU, torch.bfloat16, causal=True).autocast():
        assert torch.is_autocast_enabled("cpu")
    with Runtime(CPU, torch.float32, causal=True).autocast():
        assert not torch.is_autocast_enabled("cpu")


@pytest.fixture
def precisions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of each call of `torch.set_float32_matmul_precision`, which does nothing."""
    calls: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", calls.append)
    return calls


class Unmoved(nn.Module):
    """A model whose `to` only remembers the device, so that it can be one that is not there."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def to(self, *args: object, **_: object) -> "Unmoved":
        self.device = args[0]
        return self


@pytest.mark.parametrize(
    ("device", "causal", "expected"),
    [(CUDA, True, ["high"]), (CUDA, False, []), (CPU, True, []), (CPU, False, [])],
)
def test_only_a_causal_model_on_cuda_may_use_tf32(
    precisions: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    device: torch.device,
    causal: bool,
    expected: list[str],
) -> None:
    """Faithful: reference mode has to give float32 numbers."""
    chosen = Runtime(device, torch.float32, causal)
    allow_tf32(chosen)
    assert precisions == expected
    assert capsys.readouterr().out == "float32 matrix products use TF32\n" * len(expected)
    model = prepare_model(Unmoved(), chosen, compile_layers=False)
    assert model.device == device and precisions == expected * 2
    monkeypatch.setattr(Llama, "to", lambda self, *_: self)
    options = get_args([])
    assert isinstance(options, GenerateOptions)
    generation.prepare_to_generate(make_llama(causal), chosen, options)
    assert precisions == expected * 3


# ------------------------------------------------------------------------------ device and files


def test_the_device_is_the_cpu_without_use_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device(False) == CPU


def test_use_gpu_without_cuda_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="^--use_gpu: PyTorch finds no CUDA device; leave the fla"):
        resolve_device(True)


def test_each_process_of_a_machine_gets_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert resolve_device(True) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device(True) == torch.device("cuda", 1)
    assert chosen == [0, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"^--use_gpu: PyTorch finds 2 CUDA devices .* fewer than"):
        resolve_device(True)
    assert chosen == [0, 1]


def test_load_model_returns_model_tokenizer_and_runtime(
    causal_checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--pretrained-model-path", causal_checkpoint, "--dtype", "bfloat16"]
    options = get_args([*argv, "--max_sentence_len", "5"])
    assert isinstance(options, ModelOptions)
    llama, tokenizer, found = load_model(options, dropout=0.25, max_seq_len=64)
    assert found == Runtime(CPU, torch.bfloat16, causal=True)
    config = llama.config
    assert (config.causal, config.dropout, config.max_seq_len) == (True, 0.25, 64)
    assert all(parameter.dtype == torch.float32 for parameter in llama.parameters())
    assert len(tokenizer.encode("A warm film about nothing", bos=True, eos=False)) == 6
    assert capsys.readouterr().out == f"load model from causal.pt\n{found}\n"


def test_a_tokenizer_of_another_vocabulary_is_an_error(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_llama(make_llama(causal=False, vocab_size=99), Path("vocab.pt"))
    message = (
        "^tokenizer.model: has a vocabulary of 320, but that of vocab.pt is 99; use the "
        r"checkpoint's own tokenizer \(--tokenizer_path\)$"
    )
    options = get_args(["--pretrained-model-path", "vocab.pt"])
    assert isinstance(options, ModelOptions)
    with pytest.raises(ValueError, match=message):
        load_model(options)
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------- memory


def test_a_batch_on_the_cpu_is_not_copied() -> None:
    x = torch.ones(3)
    assert to_device(x, CPU) is x


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
)
def test_too_little_memory_is_recognised(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_a_tensor_that_no_machine_holds_is_too_little_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    assert is_out_of_memory(caught.value)
