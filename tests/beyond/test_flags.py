"""Every flag arrives: for each task and flag a test that fails if the flag is ignored.

Most flags change what a run writes or prints, so a run with the flag is compared with one without
it. The others (`SPECIAL`) have a test of their own, here or in another file.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import beyond.compiled_decoding
import beyond.generation
import beyond.pretraining
import beyond.run
import run_llama
from base_llama import load_safely
from beyond.options import TASKS, flags_of
from llama import Llama
from run_llama import main
from tests.beyond.test_compiled_decoding import uncompiled_module
from tests.conftest import SENTENCES, make_llama, save_llama
from tests.test_run_llama import run
from tokenizer import Tokenizer, train_tokenizer
from utils import confusion_matrix

# Small runs of each task; 8 sentences, in three batches.
BASE = {
    "generate": ["--max_new_tokens", "9", "--prompt", "A warm film"],
    "prompt": ["--option", "prompt", "--batch_size", "3"],
    "finetune": [
        *("--option", "finetune", "--batch_size", "3", "--epochs", "1", "--lr", "1e-2"),
        *("--filepath", "out/a.pt"),
    ],
    "pretrain": [
        *("--option", "pretrain", "--batch_size", "2", "--epochs", "1", "--dtype", "float32"),
        *("--filepath", "out/a.pt", "--max_seq_len", "16"),
    ],
}
NEW = ["--tokenizer_path", "tokenizer.model", "--dim", "32", "--n_layers", "1", "--n_heads", "4"]
LORA = ["--lora_rank", "2"]

# Flags whose value changes the results of a run, by task: what to add to `BASE`.
CHANGES: dict[tuple[str, str], list[str]] = {
    ("generate", "seed"): ["--seed", "7"],
    ("generate", "pretrained_model_path"): ["--pretrained-model-path", "other.pt"],
    ("generate", "tokenizer_path"): ["--tokenizer_path", "other.model"],
    ("generate", "max_sentence_len"): ["--max_sentence_len", "2"],
    ("generate", "causal"): ["--causal"],
    ("generate", "dtype"): ["--dtype", "bfloat16"],
    ("generate", "prompt"): ["--prompt", "No"],
    ("generate", "max_new_tokens"): ["--max_new_tokens", "5"],
    ("generate", "temperature"): ["--temperature", "0.3"],
    ("generate", "num_samples"): ["--num_samples", "2"],
    ("generate", "quantize"): ["--causal", "--quantize", "int8"],
    ("prompt", "pretrained_model_path"): ["--pretrained-model-path", "other.pt"],
    ("prompt", "tokenizer_path"): ["--tokenizer_path", "other.model"],
    ("prompt", "max_sentence_len"): ["--max_sentence_len", "2"],
    ("prompt", "causal"): ["--causal"],
    ("prompt", "dtype"): ["--dtype", "bfloat16"],
    ("prompt", "batch_size"): ["--batch_size", "1"],  # faithful: reference mode depends on it
    ("prompt", "dataset"): ["--dataset", "sst"],
    ("prompt", "dev"): ["--dev", "data/sst-dev.txt"],
    ("prompt", "test"): ["--test", "data/sst-test.txt"],
    ("prompt", "label_names"): ["--label-names", "words.json"],
    ("prompt", "calibrate"): ["--calibrate"],
    ("finetune", "seed"): ["--seed", "7"],
    ("finetune", "pretrained_model_path"): ["--pretrained-model-path", "other.pt"],
    ("finetune", "tokenizer_path"): ["--tokenizer_path", "other.model"],
    ("finetune", "max_sentence_len"): ["--max_sentence_len", "2"],
    ("finetune", "causal"): ["--causal"],
    ("finetune", "dtype"): ["--dtype", "bfloat16"],
    ("finetune", "batch_size"): ["--batch_size", "4"],
    ("finetune", "dataset"): ["--dataset", "sst"],
    ("finetune", "train"): ["--train", "data/sst-train.txt"],
    ("finetune", "dev"): ["--dev", "data/sst-dev.txt"],
    ("finetune", "test"): ["--test", "data/sst-test.txt"],
    ("finetune", "label_names"): ["--label-names", "three.json"],
    ("finetune", "epochs"): ["--epochs", "2"],
    ("finetune", "lr"): ["--lr", "1e-3"],
    ("finetune", "dropout"): ["--dropout", "0.5"],
    ("finetune", "hidden_dropout_prob"): ["--hidden_dropout_prob", "0.9"],
    ("finetune", "recipe"): ["--recipe", "better"],
    ("finetune", "pooling"): ["--pooling", "mean"],
    ("finetune", "pool_layer"): ["--pool_layer", "1"],
    ("finetune", "head"): ["--head", "label_words", "--label-names", "short.json"],
    ("finetune", "label_smoothing"): ["--label_smoothing", "0.3"],
    ("finetune", "warmup"): ["--warmup", "1"],
    ("finetune", "linear_decay"): ["--linear_decay"],
    ("finetune", "layer_decay"): ["--layer_decay", "0.5"],
    ("finetune", "weight_decay"): ["--weight_decay", "1"],
    ("finetune", "max_grad_norm"): ["--max_grad_norm", "1e-3"],
    ("finetune", "ema"): ["--ema", "0.5"],
    ("finetune", "freeze_backbone"): ["--freeze_backbone"],
    ("finetune", "lora_rank"): ["--lora_rank", "2"],
    ("finetune", "lora_alpha"): [*LORA, "--lora_alpha", "4"],
    ("finetune", "lora_matrices"): [*LORA, "--lora_matrices", "output"],
    ("finetune", "smart"): ["--smart", "1"],
    ("finetune", "bregman"): ["--bregman", "1"],
    ("finetune", "r_drop"): ["--r_drop", "1"],
    ("finetune", "mixout"): ["--mixout", "0.5"],
    ("pretrain", "seed"): ["--seed", "7"],
    ("pretrain", "pretrained_model_path"): ["--pretrained-model-path", "other.pt"],
    ("pretrain", "tokenizer_path"): ["--tokenizer_path", "other.model"],
    ("pretrain", "max_sentence_len"): ["--max_sentence_len", "4"],
    ("pretrain", "dtype"): ["--dtype", "bfloat16"],
    ("pretrain", "batch_size"): ["--batch_size", "3"],
    ("pretrain", "dataset"): ["--dataset", "sst"],
    ("pretrain", "train"): ["--train", "data/sst-train.txt"],
    ("pretrain", "dev"): ["--dev", "data/sst-dev.txt"],
    ("pretrain", "epochs"): ["--epochs", "2"],
    ("pretrain", "lr"): ["--lr", "1e-2"],
    ("pretrain", "dropout"): ["--dropout", "0.5"],
    ("pretrain", "max_seq_len"): ["--max_seq_len", "8"],
    ("pretrain", "store_dtype"): ["--store_dtype", "float16"],
    ("pretrain", "dim"): [*NEW, "--dim", "64"],
    ("pretrain", "n_layers"): [*NEW, "--n_layers", "2"],
    ("pretrain", "n_heads"): [*NEW, "--n_heads", "2"],
    ("pretrain", "n_kv_heads"): [*NEW, "--n_kv_heads", "2"],
}
# Flags with a test of their own, below or in the file that is named.
OUTPUTS: tuple[str, ...] = ("dev_out", "test_out", "filepath")
OUTPUTS += ("generated_sentence_low_temp_out", "generated_sentence_high_temp_out")
CLASSIFY = {"filepath", "input", "output", "json", "label_names", "tokenizer_path"}
CLASSIFY |= {"max_sentence_len", "batch_size", "dtype"}
SPECIAL: dict[str, str] = {
    "option": "every test",
    "use_gpu": "test_command_line.py",
    "threads": "test_program.py",
    "train": "prompting does not read it",
    "top_k": "test_filters_reach_the_sampler",
    "top_p": "test_filters_reach_the_sampler",
    "stop_at_eos": "test_generation.py",
    "stream": "test_generation.py",
    "seed": "prompting draws nothing that its results depend on",
    "batch_size": "test_batch_size_of_generate",
    "deterministic": "test_deterministic",
    "compile": "test_compile",
    "causal": "test_command_line.py: pretraining is always causal",
    "micro_batch_size": "test_micro_batch_size",
    "save_every": "test_save_every",
    "resume": "test_run.py",
    "patience": "test_run.py",
    "wise_ft": "methods/test_wise_ft.py",
    "seeds": "test_seeds.py",
    "no_trailing_space": "methods/test_zero_shot.py: the tokenizer here drops that space",
    **dict.fromkeys(OUTPUTS, "test_outputs_are_written_where_the_flags_say"),
}


def test_every_flag_has_a_test() -> None:
    """Those of classify are in test_classify.py, but for the ones that it shares."""
    for task, options in TASKS.items():
        for name in flags_of(options):
            if task == "classify" and name in CLASSIFY:
                continue
            assert (task, name) in CHANGES or name in SPECIAL, f"--{name} of {task}"


@pytest.fixture
def place(workplace: Path) -> Path:
    """A workplace with a second model, tokenizer, data set and label words."""
    save_llama(make_llama(causal=False, seed=1), Path("other.pt"))
    words = "A warm and wonderful film , dull and lifeless jokes fall flat , honest sisters".split()
    Path("text.txt").write_text("\n".join(word * 3 for word in words) + "\n", encoding="utf-8")
    train_tokenizer(["text.txt"], 320, "other.model")
    for split in ("train", "dev", "test"):
        lines = [f"{i % 2} ||| Number {i} is a film ." for i in range(12)]
        Path(f"data/sst-{split}.txt").write_text("\n".join(lines) + "\n")
    shutil.copy("data/cfimdb-label-mapping.json", "data/sst-label-mapping.json")
    Path("words.json").write_text('["dull", "warm"]')
    Path("three.json").write_text('["bad", "good", "odd"]')
    Path("short.json").write_text('["a", "and"]')  # each is one token
    return workplace


def outcome(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Run a command line; returns what it printed, and hashes of its scores and results."""
    shutil.rmtree("out", ignore_errors=True)
    shutil.rmtree("output", ignore_errors=True)
    scores = hashlib.sha256()
    prepare = run_llama.prepare_model

    def recording(model: Any, *more: Any) -> Any:
        model = prepare(model, *more)
        forward = model.forward

        def record(*inputs: torch.Tensor) -> torch.Tensor:
            output = forward(*inputs)
            scores.update(output.detach().numpy().tobytes())
            return output

        model.forward = record
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_llama, "prepare_model", recording)
        status, out, err = run([*argv], capsys)
    assert status == 0, err
    # Without what depends on the time: speeds, seconds, and the names of curves.
    printed = re.sub(r"tokens/s.*|^  (?:\d|time|curves).*", "", out, flags=re.MULTILINE)
    found = {"printed": printed, "scores": scores.hexdigest()}
    for path in [*Path().glob("output/**/*.txt"), *Path().glob("out/**/*.pt")]:
        content = path.read_bytes()
        if path.suffix == ".pt":
            weights = load_safely(path)["model"]
            content = b"".join(w.float().numpy().tobytes() for w in weights.values())
            content += str([w.dtype for w in weights.values()]).encode()
        found[path.name] = hashlib.sha256(content).hexdigest()
    return found


OUTCOMES: dict[tuple[str, ...], dict[str, str]] = {}


def base_outcome(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return the outcome of a run without further flags, which every repetition gives."""
    if argv not in OUTCOMES:
        OUTCOMES[argv] = outcome(argv, capsys)
        assert outcome(argv, capsys) == OUTCOMES[argv]
    return OUTCOMES[argv]


@pytest.mark.parametrize(("task", "name"), CHANGES)
def test_a_flag_changes_the_results(
    place: Path, capsys: pytest.CaptureFixture[str], task: str, name: str
) -> None:
    """Texts, scores, predictions or weights differ, and nothing but the flag makes them differ."""
    base, added = BASE[task], CHANGES[task, name]
    for needed in (NEW, LORA):  # flags that the flag needs
        if len(added) > len(needed) and added[: len(needed)] == needed:
            base, added = [*base, *needed], added[len(needed) :]
    first, changed = base_outcome(tuple(base), capsys), outcome([*base, *added], capsys)
    first = {**first}
    if (task, name) != ("pretrain", "dev"):  # with one epoch, dev decides nothing
        del first["printed"], changed["printed"]
    assert first != changed


def texts() -> list[str]:
    """The texts of the last generation, at temperature 0 and above."""
    paths = sorted(Path("output/task_1").glob("*.txt"))
    return [path.read_text(encoding="utf-8") for path in paths]


@pytest.mark.parametrize("mode", ["--causal", "--no-causal"])
@pytest.mark.parametrize("filters", [["--top_k", "1"], ["--top_p", "1e-9"]])
def test_filters_reach_the_sampler(workplace: Path, filters: list[str], mode: str) -> None:
    """With only the likeliest token left, sampling gives the greedy text."""
    argv = [*BASE["generate"], mode]
    assert main(argv) == 0
    low, high = texts()
    assert low != high
    assert main([*argv, *filters]) == 0
    assert texts() == [low, low]


def test_batch_size_of_generate(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that are continued together."""
    sizes, stream = [], beyond.generation.stream

    def recording(llama: Llama, idx: torch.Tensor, *more: Any) -> Any:
        sizes.append(len(idx))
        return stream(llama, idx, *more)

    monkeypatch.setattr(beyond.generation, "stream", recording)
    argv = [*BASE["generate"], "--causal", "--temperature", "1", "--num_samples", "5"]
    assert main([*argv, "--batch_size", "2"]) == 0
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize("task", ["generate", "prompt", "finetune", "pretrain"])
def test_deterministic(workplace: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", calls.append)
    assert main(BASE[task]) == 0 and calls == []
    assert main([*BASE[task], "--deterministic"]) == 0 and calls == [True]


@pytest.mark.parametrize("task", ["generate", "prompt", "finetune", "pretrain"])
def test_compile(workplace: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    """The compiled function is the one that computes."""
    used: list[str] = []

    def compile_model(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def compiled(*inputs: Any, **options: Any) -> Any:
            used.append("compiled")
            return function(*inputs, **options)

        return compiled

    def compile_ahead(*args: Any) -> Callable[..., Any]:
        return compile_model(uncompiled_module(*args))

    monkeypatch.setattr(torch, "compile", compile_model)
    monkeypatch.setattr(beyond.compiled_decoding, "compile_ahead", compile_ahead)  # generate
    argv = [*BASE[task], "--causal"]
    assert main(argv) == 0 and not used
    assert main([*argv, "--compile"]) == 0 and used


@pytest.mark.parametrize(("task", "size"), [("finetune", 3), ("pretrain", 2)])
def test_micro_batch_size(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, task: str, size: int
) -> None:
    """The most rows that a loss is computed of."""
    module, name = {
        "finetune": (run_llama, "sum_of_losses"),
        "pretrain": (beyond.pretraining, "sum_of_losses"),
    }[task]
    sizes, loss = [], getattr(module, name)

    def recording(model: Any, rows: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return loss(model, rows, *more)

    monkeypatch.setattr(module, name, recording)
    assert main(BASE[task]) == 0 and max(sizes) == size
    sizes.clear()
    assert main([*BASE[task], "--micro_batch_size", "1"]) == 0 and max(sizes) == 1


@pytest.mark.parametrize("task", ["finetune", "pretrain"])
def test_save_every(workplace: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    """The steps after which the training checkpoint is written."""
    steps, save = [], beyond.run.TrainingRun.save

    def recording(self: Any) -> None:
        steps.append(self.step)
        save(self)

    monkeypatch.setattr(beyond.run.TrainingRun, "save", recording)
    assert main(BASE[task]) == 0
    (last,) = steps
    assert last >= 3
    steps.clear()
    assert main([*BASE[task], "--save_every", "1"]) == 0
    assert steps == [*range(1, last + 1), last]


@pytest.mark.parametrize("task", BASE)
def test_outputs_are_written_where_the_flags_say(workplace: Path, task: str) -> None:
    kind = {"prompt": "prompting", "finetune": "finetuning"}.get(task)
    names = {f"--{split}_out": f"new/{split}-{kind}-output.txt" for split in ("dev", "test")}
    if task == "generate":
        names = {f"--generated_sentence_{t}_temp_out": f"new/{t}.txt" for t in ("low", "high")}
    elif task == "pretrain":
        names = {"--filepath": "new/model.pt"}
    elif task == "finetune":
        names["--filepath"] = "new/classifier.pt"
    argv = [word for pair in names.items() for word in pair]
    assert main([*BASE[task], *argv]) == 0
    assert all(Path(path).stat().st_size for path in names.values())
    assert not Path("output").exists() and not Path("out").exists()


# -------------------------------------------------------- faithful details, where they are used


def test_the_prompts_trailing_space_is_tokenized(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All published zero-shot accuracies depend on it."""
    encoded: list[str] = []
    encode_text, encode_texts = Tokenizer.encode_text, Tokenizer.encode_texts

    def recording(self: Tokenizer, text: str) -> list[int]:
        encoded.append(text)
        return encode_text(self, text)

    def recording_all(self: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        encoded.extend(texts)
        return encode_texts(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_text", recording)
    monkeypatch.setattr(Tokenizer, "encode_texts", recording_all)
    assert main(BASE["prompt"]) == 0
    sentences = [line.split(" ||| ")[1] for line in SENTENCES]
    prompts = [f"{sentence} Is this movie bad or good? This movie is " for sentence in sentences]
    assert encoded == [*prompts, *prompts, "bad", "good"]  # dev, test, label words


def test_pretraining_clips_gradients(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a norm of 1 over all parameters, before each step."""
    norms: list[float] = []

    class Recording(beyond.pretraining.AdamW):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(torch.nn.utils.get_total_norm(grads).item())
            super().step(closure)

    monkeypatch.setattr(beyond.pretraining, "AdamW", Recording)
    assert main([*BASE["pretrain"], "--epochs", "3"]) == 0
    assert norms and max(norms) <= 1 + 1e-4
    monkeypatch.setattr(beyond.pretraining, "MAX_GRAD_NORM", 1e9)
    norms.clear()
    assert main([*BASE["pretrain"], "--epochs", "3"]) == 0
    assert max(norms) > 2  # it is the clipping that keeps them at 1


def test_confusion_leaves_out_unknown_labels() -> None:
    assert confusion_matrix([1, 0, 1], [1, -1, 0], 2) == [[0, 1], [0, 1]]
