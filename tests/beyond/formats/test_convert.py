"""`python -m beyond.formats`: from any kind of checkpoint to any other, and back."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import run_llama
from base_llama import write_checkpoint
from beyond.formats.__main__ import main
from beyond.formats.load import load_llama, load_tokenizer
from beyond.methods.pooling import PooledClassifier
from classifier import ClassifierConfig, LlamaEmbeddingClassifier
from llama import Llama
from tests.conftest import ROOT, make_llama, save_llama
from tokenizer import Tokenizer

PLAIN_TEXTS = ("A warm film", "", "naïve — 映画 🎬")
TEXTS = (*PLAIN_TEXTS, "  two  spaces", "line\nbreak", "ﬁlm")  # which SentencePiece normalizes


@pytest.fixture
def source(tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> Llama:
    """Make source/model.pt, a causal model, with its tokenizer; returns the model."""
    monkeypatch.chdir(tmp_path)
    Path("source").mkdir()
    Path("source/tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    model = make_llama(causal=True)
    save_llama(model, Path("source/model.pt"))
    return model


def convert(*words: str) -> int:
    return main(list(words))


def weights_of(path: str) -> dict[str, torch.Tensor]:
    return load_llama(path).state_dict()


def assert_equal_weights(path: str, model: Llama) -> None:
    found, expected = weights_of(path), model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("way", [["b.bin"], ["hub"], ["b.bin", "hub"], ["hub", "b.bin"]])
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_every_weight_and_text_is_the_same(
    source: Llama, tokenizer_path: Path, way: list[str], tied: bool
) -> None:
    model = source if tied else make_llama(causal=True, tie_embeddings=False)
    save_llama(model, Path("source/model.pt"))
    steps = ["source/model.pt", *(f"{i}/{name}" for i, name in enumerate(way)), "back/model.pt"]
    for start, end in zip(steps, steps[1:], strict=False):
        assert convert(start, end) == 0
        assert_equal_weights(end, model)
        assert load_llama(end).config.causal and load_llama(end).config.tie_embeddings is tied
    back, own = load_tokenizer(None, "back/tokenizer.model"), Tokenizer(None, tokenizer_path)
    for text in PLAIN_TEXTS if "b.bin" in way else TEXTS:
        ids = own.encode(text, bos=True, eos=True)
        assert back.encode(text, bos=True, eos=True) == ids and back.decode(ids) == own.decode(ids)


def test_the_converted_model_generates_the_same_text(
    source: Llama, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line, which finds the tokenizer of each kind."""
    assert convert("source/model.pt", "c/model.bin") == 0
    assert convert("source/model.pt", "hub") == 0
    texts = []
    for number, path in enumerate(("source/model.pt", "c/model.bin", "hub")):
        out = f"out/{number}.txt"
        words = ["--pretrained-model-path", path, "--prompt", "A warm", "--temperature", "0"]
        words += ["--generated_sentence_low_temp_out", out, "--max_new_tokens", "20"]
        assert run_llama.main(words) == 0
        texts.append(Path(out).read_text())
        record = json.loads(Path(f"{out}.json").read_text())
        assert record["checkpoint"] == path and record["mode"] == "causal"
    assert len(set(texts)) == 1 and len(texts[0]) > 10


def test_int8_is_for_llama2c_only(source: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("source/model.pt", "c/model.bin", "--dtype", "int8") == 0
    exact, rounded = source.state_dict(), weights_of("c/model.bin")
    errors = {name: (rounded[name] - exact[name]).abs().max().item() for name in exact}
    assert 0 < max(errors.values()) < 0.02 and errors["norm.weight"] == 0
    for target in ("x.pt", "folder"):
        assert convert("source/model.pt", target, "--dtype", "int8") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error == (
            f"beyond.formats: error: --dtype int8: {target} can store float32, float16 or bfloat16"
        )
        assert not Path(target).exists()
    assert convert("source/model.pt", "x.bin", "--dtype", "float16") == 2
    assert "x.bin can store float32 or int8" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["half.pt", "half"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_can_be_stored_in_half_precision(
    source: Llama, target: str, dtype: torch.dtype
) -> None:
    assert convert("source/model.pt", target, "--dtype", str(dtype).removeprefix("torch.")) == 0
    for name, tensor in weights_of(target).items():
        assert torch.equal(tensor, source.state_dict()[name].to(dtype).float()), name
    size = sum(path.stat().st_size for path in Path(".").glob(f"{target}*/*.safetensors"))
    size = size or Path(target).stat().st_size
    assert size < Path("source/model.pt").stat().st_size * 0.6


@pytest.mark.parametrize("target", ["model.bin", "hub"])
def test_reference_mode_is_said_to_get_lost(
    source: Llama, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    save_llama(make_llama(causal=False), Path("source/model.pt"))
    assert convert("source/model.pt", target) == 0
    assert "note: " in (err := capsys.readouterr().err) and "is in reference mode" in err
    assert load_llama(target).config.causal


def test_what_llama2c_does_not_do_to_a_text_is_said(
    source: Llama, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer of the tests normalizes Unicode and spaces, which tokenizer.bin cannot say."""
    assert convert("source/model.pt", "c/model.bin") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if ": note: " in line]
    assert len(notes) == 2 and "Unicode (nmt_nfkc)" in notes[0] and "extra spaces" in notes[1]


def test_reference_mode_stays_in_a_pt(source: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    save_llama(make_llama(causal=False), Path("source/model.pt"))
    assert convert("source/model.pt", "b/model.pt") == 0
    assert not load_llama("b/model.pt").config.causal and "note" not in capsys.readouterr().err


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_classifiers_head_is_said_to_be_left_out(
    source: Llama, tokenizer_path: Path, capsys: pytest.CaptureFixture[str], pooling: str
) -> None:
    config = ClassifierConfig(2, "", 0.3, "finetune")
    tokenizer = Tokenizer(7, tokenizer_path)  # max_len belongs to the classifier, not to the model
    classifier = LlamaEmbeddingClassifier(config, source, ["bad", "good"], tokenizer)
    if pooling != "last":
        classifier = PooledClassifier(classifier, pooling)
    write_checkpoint("best.pt", classifier.to_checkpoint())
    assert convert("best.pt", "hub") == 0
    assert "note: the head of the classifier best.pt is left out" in capsys.readouterr().err
    assert_equal_weights("hub", source)
    assert len(load_tokenizer(None, "hub/tokenizer.model").encode("a film " * 9, False, False)) > 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.pt", "x.pt"], "missing.pt: "),
        (["source/model.pt", "source/model.pt"], "source/model.pt: is the source"),
        (["source/../source/model.pt", "source/model.pt"], "is the source"),
        (["source", "x.pt"], "source: is a folder with neither config.json"),
        (["source/tokenizer.model", "x.pt"], "source/tokenizer.model: expected tensors"),
        (["source/model.pt", "x.pt", "--tokenizer_path", "none.model"], "none.model: "),
        (["source/model.pt", "x.pt", "--dtype", "int4"], "argument --dtype: invalid choice"),
        (["source/model.pt"], "the following arguments are required: TARGET"),
        (["source/model.pt", "full"], "full: "),
    ],
)
def test_mistakes_are_one_line(
    source: Llama, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    assert convert(*words) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1, err
    assert err.startswith("beyond.formats: error: ") and message in err
    assert sorted(os.listdir()) == ["full", "source"] and os.listdir("full") == ["mine.txt"]


def test_another_tokenizer_in_the_targets_folder_is_not_replaced(
    source: Llama, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("b").mkdir()
    Path("b/tokenizer.model").write_bytes(b"another")
    assert convert("source/model.pt", "b/model.pt") == 2
    assert "b/tokenizer.model: is another tokenizer than that of" in capsys.readouterr().err
    assert os.listdir("b") == ["tokenizer.model"]
    assert Path("b/tokenizer.model").read_bytes() == b"another"


def test_what_llama2c_does_not_know_is_named(
    source: Llama, capsys: pytest.CaptureFixture[str]
) -> None:
    save_llama(make_llama(causal=True, rope_theta=500000.0), Path("source/model.pt"))
    assert convert("source/model.pt", "c/model.bin") == 2
    assert "rope_theta" in capsys.readouterr().err
    assert os.listdir("c") == []  # no tokenizer either


INTERRUPTED = "beyond.formats: interrupted"


@pytest.mark.parametrize("target", ["c/model.bin", "c/hub", "c/model.pt"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_nothing(
    source: Llama,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: str,
    number: signal.Signals,
) -> None:
    """A real signal, while the first tensor is written."""

    def interrupted(tensors: Any, *_: Any) -> Any:
        signal.raise_signal(number)
        return tensors

    monkeypatch.setattr("beyond.formats.__main__.bar", interrupted)
    monkeypatch.setattr(torch, "save", interrupted)
    assert convert("source/model.pt", target) == 128 + number
    assert capsys.readouterr().err.splitlines()[-1] == INTERRUPTED
    assert [path.name for path in Path("c").rglob("*") if path.is_file()] == []


@pytest.mark.sweep
def test_an_interrupted_process_ends_with_one_line(source: Llama) -> None:
    code = """
import os, signal, sys
import beyond.formats.__main__ as program
program.bar = lambda tensors: os.kill(os.getpid(), signal.SIGTERM)
sys.exit(program.main(["source/model.pt", "c/hub"]))
"""
    env: Any = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, f"{INTERRUPTED}\n")
    assert os.listdir("c") == []


def test_what_a_killed_conversion_left_is_removed(source: Llama) -> None:
    Path("c/.hub.123.tmp").mkdir(parents=True)
    Path("c/.hub.123.tmp/model.safetensors").write_bytes(b"half")
    Path("c/.other.123.tmp").mkdir()
    assert convert("source/model.pt", "c/hub") == 0
    assert sorted(os.listdir("c")) == [".other.123.tmp", "hub"]


def test_a_target_is_replaced_when_it_is_complete(source: Llama) -> None:
    Path("b").mkdir()
    Path("b/model.pt").write_bytes(b"old")
    assert convert("source/model.pt", "b/model.pt") == 0
    assert_equal_weights("b/model.pt", source)
    first = hashlib.sha256(Path("b/tokenizer.model").read_bytes()).digest()
    assert first == hashlib.sha256(Path("source/tokenizer.model").read_bytes()).digest()
