"""What the tests of the methods share: a tokenizer that knows the label words."""

from pathlib import Path

import pytest
import sentencepiece

from tests.conftest import SENTENCES
from tokenizer import Tokenizer

WORDS = ["bad", "good"]
PROMPT = " Is this movie bad or good? This movie is"  # without its trailing space


@pytest.fixture(scope="session")
def word_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tokenizer that keeps all spaces, as Llama's does, and has the label words as pieces.

    Returns its path.
    """
    folder = tmp_path_factory.mktemp("words")
    texts = [line.split(" ||| ")[1] for line in SENTENCES]
    (folder / "corpus.txt").write_text("\n".join(texts + ["bad good"] * 50), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture
def word_tokenizer(word_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(None, word_tokenizer_path)


@pytest.fixture
def word_workplace(workplace: Path, word_tokenizer_path: Path) -> Path:
    """The current folder of a run, with the tokenizer that knows the label words."""
    (workplace / "tokenizer.model").write_bytes(word_tokenizer_path.read_bytes())
    return workplace
