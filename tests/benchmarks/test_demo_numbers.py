"""The two programs that compute numbers of `data/demo/README.md`."""

import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import bits_per_byte, counting_words
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


def test_words_that_tell_the_label_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second word of dev and test decides; a word that training lacks gives nothing."""
    train = [
        f"{label} ||| film {word} {i}"
        for label, word in enumerate("xx yy".split())
        for i in "abcdef"
    ]
    (tmp_path / "train.txt").write_text("\n".join(train) + "\n")
    (tmp_path / "dev.txt").write_text("0 ||| film xx q\n1 ||| film yy q\n")
    (tmp_path / "test.txt").write_text("0 ||| film xx q\n0 ||| film yy q\n")
    assert counting_words.main(["--data", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == ["dev acc :: 1.000, test acc :: 0.500"] * 3


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("bits_per_byte", ["none.pt", "text.txt"], "none.pt: No such file"),
        ("bits_per_byte", ["stories42M.pt", "none.txt"], "none.txt: No such file"),
        ("bits_per_byte", ["stories42M.pt", "short.txt"], "short.txt: 2 tokens are fewer than"),
        ("bits_per_byte", ["stories42M.pt"], "the following arguments are required: text"),
        ("counting_words", ["--data", "none"], "none/train.txt: No such file"),
        ("counting_words", ["--data", "empty"], "empty/train.txt: is empty"),
        ("counting_words", ["--data", "one"], "n_splits=5 greater than the number of samples"),
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
    for folder, content in (("empty", ""), ("one", "0 ||| a\n1 ||| b\n")):
        Path(folder).mkdir()
        for split in ("train", "dev", "test"):
            Path(folder, f"{split}.txt").write_text(content)
    module = {"bits_per_byte": bits_per_byte, "counting_words": counting_words}[program]
    assert module.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"python -m benchmarks.{program}: error: ") and message in error
