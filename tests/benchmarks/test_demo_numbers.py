"""The two programs that compute numbers of `data/demo/README.md`."""

import math
import re
import signal
from pathlib import Path

import pytest
import torch

from benchmarks import bag_of_words, bits_per_byte
from run_llama import main
from tests.conftest import SENTENCES, make_llama, save_llama
from tokenizer import Tokenizer


@pytest.fixture
def text(workplace: Path) -> str:
    """The path of a text file."""
    sentences = [line.split(" ||| ")[1] for line in SENTENCES] * 4
    Path("text.txt").write_text("\n".join(sentences) + "\n")
    return "text.txt"


def test_a_model_that_finds_all_tokens_equally_likely_needs_the_vocabularys_bits(text: str) -> None:
    llama = make_llama(causal=True, max_seq_len=16)
    torch.nn.init.zeros_(llama.output.weight)
    save_llama(llama, Path("even.pt"))
    tokenizer = Tokenizer(tokenizer_model="tokenizer.model")
    lines = Path(text).read_text().splitlines()
    num_tokens = sum(len(tokenizer.encode(line, bos=True, eos=False)) for line in lines) - 1
    bits = math.log2(tokenizer.n_words) * num_tokens / sum(map(len, lines))  # all are ASCII
    assert bits_per_byte.bits_per_byte("even.pt", text) == pytest.approx(bits, rel=1e-6)


def test_bits_per_byte_are_those_that_pretraining_prints(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("train.txt").write_text("A film about nothing at all .\n" * 20)
    pretrain = "--option pretrain --epochs 1 --dim 16 --n_layers 1 --n_heads 2 --max_seq_len 16"
    pretrain += f" --tokenizer_path tokenizer.model --dev {text} --train train.txt"
    assert main([*pretrain.split(), "--filepath", "lm/m.pt"]) == 0
    found = re.search(r"bits per byte (\d\.\d{3})", capsys.readouterr().out)
    assert found is not None
    assert bits_per_byte.main(["lm/m.pt", text]) == 0
    assert capsys.readouterr().out.endswith(f"lm/m.pt: {found[1]} bits per byte\n")


def test_words_that_tell_the_label_are_found(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second word of dev and test decides; a word that training lacks says nothing."""
    words = ["xx", "yy"]
    train = [f"{label} ||| film {words[label]} {i}" for label in (0, 1) for i in "abcdef"]
    contents = {
        "train": "\n".join(train),
        "dev": "0 ||| film xx q\n1 ||| film yy q",
        "test": "0 ||| film xx q\n0 ||| film yy q",
    }
    for split, content in contents.items():
        Path(f"{split}.txt").write_text(f"{content}\n")
    assert bag_of_words.main([f"{split}.txt" for split in contents]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == ["dev acc :: 1.000, test acc :: 0.500"] * 3


def test_an_interruption_is_one_line(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bits_per_byte, "evaluate", lambda *_: signal.raise_signal(signal.SIGINT))
    assert bits_per_byte.main(["stories42M.pt", text]) == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "python -m benchmarks.bits_per_byte: interrupted; nothing is computed"


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("bits_per_byte", ["none.pt", "text.txt"], "none.pt: No such file"),
        ("bits_per_byte", ["stories42M.pt", "none.txt"], "none.txt: No such file"),
        ("bits_per_byte", ["stories42M.pt", "short.txt"], "short.txt: 2 tokens are fewer than"),
        ("bits_per_byte", ["stories42M.pt"], "the following arguments are required: text"),
        ("bag_of_words", ["none.txt"] * 3, "none.txt: No such file"),
        ("bag_of_words", ["empty.txt"] * 3, "empty.txt: is empty"),
        ("bag_of_words", ["two.txt"] * 3, "n_splits=5 greater than the number of samples"),
        ("bag_of_words", ["two.txt"], "expected three files, train, dev and test; found 1"),
    ],
)
def test_a_wrong_input_is_one_line(
    program: str,
    arguments: list[str],
    message: str,
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("short.txt").write_text("a\n")
    Path("empty.txt").write_text("")
    Path("two.txt").write_text("0 ||| a\n1 ||| b\n")
    module = {"bits_per_byte": bits_per_byte, "bag_of_words": bag_of_words}[program]
    assert module.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"python -m benchmarks.{program}: error: ") and message in error
