"""Tokenizer: the assignment's conventions, on a model trained here and on Llama's own."""

from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from tests.conftest import ROOT, SENTENCES
from tokenizer import Tokenizer, main, train_tokenizer

LLAMA_MODEL = ROOT / "tokenizer.model"


def test_bos_and_eos_surround_the_text(tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    plain = tokenizer.encode("A warm film", bos=False, eos=False)
    assert tokenizer.encode("A warm film", bos=True, eos=True) == [1, *plain, 2]
    assert tokenizer.encode("A warm film", bos=True, eos=False) == [1, *plain]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    assert tokenizer.n_words == 320


@pytest.mark.parametrize("max_len", [None, 3])
def test_a_batch_is_encoded_as_its_texts_are(tokenizer_path: Path, max_len: int | None) -> None:
    tokenizer = Tokenizer(max_len, tokenizer_path)
    texts = ["A warm film", "", "naïve 映画", "two  spaces"] * 3
    for bos, eos in ((True, False), (False, True)):
        expected = [tokenizer.encode(text, bos, eos) for text in texts]
        assert tokenizer.encode_batch(texts, bos, eos) == expected
    assert tokenizer.encode_batch([], True, True) == []


def test_max_len_counts_pieces_of_text_only(tokenizer_path: Path) -> None:
    plain = Tokenizer(None, tokenizer_path).encode("A dull story", bos=False, eos=False)
    assert len(plain) > 3
    assert Tokenizer(3, tokenizer_path).encode("A dull story", True, True) == [1, *plain[:3], 2]


def test_max_len_does_not_cut_label_words(tokenizer_path: Path) -> None:
    plain, short = Tokenizer(None, tokenizer_path), Tokenizer(1, tokenizer_path)
    tokens = short.label_tokens("wonderfully", "This movie is ")
    assert tokens == plain.encode("wonderfully", bos=False, eos=False) and len(tokens) > 1


@pytest.mark.parametrize("text", ["A warm film .", "naïve 映画 🎬", "two  spaces", ""])
def test_decode_returns_the_text(tokenizer_path: Path, text: str) -> None:
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    # SentencePiece's own normalisation folds white space
    assert tokenizer.decode(tokenizer.encode(text, True, True)) == " ".join(text.split())


def test_default_is_the_model_in_the_current_folder(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Tokenizer().n_words == 320


def test_llama_tokenizer_facts() -> None:
    """The trailing space of the prompt is a token of its own; the label words are one each."""
    if not LLAMA_MODEL.exists():
        pytest.skip("tokenizer.model is not here (data/download.py)")
    tokenizer = Tokenizer(tokenizer_model=LLAMA_MODEL)
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert tokenizer.pad_id == 3
    assert tokenizer.encode("This movie is ", bos=False, eos=False)[-1] == 29871
    for word in ("awful", "bad", "average", "good", "excellent"):
        ids = tokenizer.encode(word, bos=False, eos=False)
        assert len(ids) == 1 and tokenizer.sp_model.id_to_piece(ids[0]) == f"▁{word}"


def test_a_model_can_be_given_as_bytes(tokenizer_path: Path) -> None:
    content = tokenizer_path.read_bytes()
    given, read = Tokenizer(3, content), Tokenizer(3, tokenizer_path)
    assert given.content == read.content == content
    assert given.encode("A dull story", True, True) == read.encode("A dull story", True, True)
    for broken in (b"", b"<html></html>"):
        with pytest.raises(ValueError, match="the tokenizer: not a SentencePiece model"):
            Tokenizer(tokenizer_model=broken)


def test_other_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.model: no such tokenizer"):
        Tokenizer(tokenizer_model=tmp_path / "none.model")
    with pytest.raises(ValueError, match="is a folder"):
        Tokenizer(tokenizer_model=tmp_path)
    for content in (b"", b"<html></html>", bytes(range(256))):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ValueError, match="bad.model: not a SentencePiece model"):
            Tokenizer(tokenizer_model=tmp_path / "bad.model")


def test_broken_piece_is_an_error(tmp_path: Path, tokenizer_path: Path) -> None:
    """SentencePiece quotes it, in a message that is then no text itself."""
    model = tokenizer_path.read_bytes().replace(b"<0x41>", b"<0x\xfe\xfe>")
    (tmp_path / "bad.model").write_bytes(model)
    with pytest.raises(ValueError, match="bad.model: not a SentencePiece model"):
        Tokenizer(tokenizer_model=tmp_path / "bad.model")


def train_plain(folder: Path, **ids: Any) -> Path:
    """Train a model without byte pieces; `ids` are those of the special pieces, -1 for none."""
    (folder / "corpus.txt").write_text("a warm film and a dull film")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "plain"),
        vocab_size=15,
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,
    )
    return folder / "plain.model"


@pytest.mark.parametrize(
    "ids, pad, piece",
    [({}, 2, "</s>"), ({"pad_id": 3}, 3, "<pad>"), ({"bos_id": -1, "eos_id": 1}, 1, "</s>")],
)
def test_padding_is_the_declared_piece_or_eos_where_there_are_no_byte_pieces(
    tmp_path: Path, ids: dict[str, int], pad: int, piece: str
) -> None:
    tokenizer = Tokenizer(tokenizer_model=train_plain(tmp_path, **ids))
    assert (tokenizer.pad_id, tokenizer.pad_piece) == (pad, piece)


def test_missing_bos_and_eos_are_left_out(tmp_path: Path) -> None:
    only_eos = Tokenizer(tokenizer_model=train_plain(tmp_path, bos_id=-1, eos_id=1))
    assert only_eos.bos_id is None and only_eos.boundary_id == 1 and only_eos.stop_ids == {1}
    words = only_eos.encode("a film", bos=False, eos=False)
    assert words and only_eos.encode("a film", bos=True, eos=True) == [*words, 1]
    only_pad = Tokenizer(tokenizer_model=train_plain(tmp_path, bos_id=-1, eos_id=-1, pad_id=1))
    assert only_pad.stop_ids == set()
    assert only_pad.encode("a film", bos=True, eos=True) == only_pad.encode_text("a film")
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        _ = only_pad.boundary_id


def test_model_without_a_piece_for_padding_is_an_error(tmp_path: Path) -> None:
    model = train_plain(tmp_path, bos_id=-1, eos_id=-1)
    with pytest.raises(ValueError, match="has no piece for padding: neither <0x00> nor EOS"):
        Tokenizer(tokenizer_model=model)


def test_max_len_below_one_is_an_error(tokenizer_path: Path) -> None:
    with pytest.raises(ValueError, match="max_len=0"):
        Tokenizer(0, tokenizer_path)


def train(*words: str) -> int:
    return main(["train", "--output", "new/tokenizer.model", *words])


def test_trained_tokenizer_is_of_llamas_kind(workplace: Path) -> None:
    """Labels are no text; special and byte pieces have Llama's ids; any text comes back."""
    assert train("--input", "data/cfimdb-train.txt", "--vocab_size", "300") == 0
    tokenizer = Tokenizer(tokenizer_model="new/tokenizer.model")
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        300,
        1,
        2,
        3,
    )
    pieces = [tokenizer.sp_model.id_to_piece(i) for i in range(300)]
    assert pieces[:4] == ["<unk>", "<s>", "</s>", "<0x00>"] and pieces[258] == "<0xFF>"
    assert not any("|" in piece or piece.isdigit() for piece in pieces)
    for text in ("A warm film .", "naïve 映画 🎬 ﬁ ①"):  # Unicode is left as it is
        assert tokenizer.decode(tokenizer.encode(text, True, True)) == text


def test_equal_text_gives_an_equal_tokenizer(workplace: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer(["data/cfimdb-train.txt"], 300, f"{name}.model")
    assert Path("a.model").read_bytes() == Path("b.model").read_bytes()


def test_long_documents_are_learnt_from(workplace: Path) -> None:
    """SentencePiece leaves out lines above 4192 bytes unless it is told otherwise."""
    Path("long.txt").write_text("\n".join(["zyzzyva " * 1000, *SENTENCES]), encoding="utf-8")
    assert train("--input", "long.txt", "--vocab_size", "300") == 0
    tokenizer = Tokenizer(tokenizer_model="new/tokenizer.model")
    assert len(tokenizer.encode("zyzzyva", bos=False, eos=False)) == 1


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--input", "no.txt", "--vocab_size", "300"], "no.txt: No such file or directory"),
        (["--input", "data", "--vocab_size", "300"], "data: Is a directory"),
        (["--input", "blank.txt", "--vocab_size", "300"], "blank.txt: holds no text"),
        (
            ["--input", "blank.txt", "--vocab_size", "many"],
            "--vocab_size: expected a whole number, found 'many'",
        ),
        (["--input", "data/cfimdb-dev.txt", "--vocab_size", "9999"], "Vocabulary size too high"),
        (["--input", "data/cfimdb-dev.txt", "--vocab_size", "20"], "smaller than required_chars"),
        (["--input", "data/cfimdb-dev.txt", "--vocab_size", "-1"], "--vocab_size: -1 is below 1"),
        (["--vocab_size", "300"], "the following arguments are required: --input"),
        (
            ["--input", "data/cfimdb-dev.txt", "--vocab_size", "300", "--output", "data"],
            "data: cannot be written",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    workplace: Path, capsys: pytest.CaptureFixture[str], words: list[str], pattern: str
) -> None:
    Path("blank.txt").write_text("1 ||| \n\n")
    assert train(*words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and not list(Path().glob("new/*"))
    assert err.startswith("tokenizer.py: error: ") and pattern in err
