"""llama2.c's tokenizer.bin: its ids and bytes, against its algorithm and its own files.

uv run pytest tests/beyond/formats/test_llama2c_tokenizer.py
"""

import hashlib
import io
import itertools
import json
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from beyond.formats.llama2c_tokenizer import (
    to_sentencepiece,
    to_tokenizer_bin,
    tokenizer_bin_notes,
)
from tests.conftest import ROOT, SENTENCES
from tokenizer import Tokenizer

Pieces = list[tuple[bytes, float]]  # text and score, as a tokenizer.bin stores them

many = settings(max_examples=200, deadline=None)
# llama2.c's texts end at a NUL; SentencePiece takes U+2581 for a space.
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"))
SPECIAL: Pieces = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
BYTES: Pieces = [(b"<0x%02X>" % byte, 0.0) for byte in range(256)]


def real_file(name: str, asset: str) -> Path:
    """Return a file that data/download.py fetches, or its copy among the assets, or skip."""
    for path in (ROOT / name, ROOT.parent / "shared" / "assets" / asset):
        if path.exists():
            return path
    pytest.skip(f"{name} is not here (data/download.py)")


def bin_of(pieces: Sequence[tuple[bytes, float]]) -> bytes:
    """Write a tokenizer.bin as its format is published."""
    content = struct.pack("<i", max((len(piece) for piece, _ in pieces), default=0))
    for piece, score in pieces:
        content += struct.pack("<fi", score, len(piece)) + piece
    return content


def pieces_of(content: bytes) -> Pieces:
    """Read a tokenizer.bin as its format is published."""
    stream, pieces = io.BytesIO(content[4:]), []
    while header := stream.read(8):
        score, length = struct.unpack("<fi", header)
        pieces.append((stream.read(length), score))
    return pieces


def encode(pieces: Pieces, sentence: str) -> list[int]:
    """Encode as llama2.c does: characters or bytes, then the best pair is merged, again and again.

    Ids are looked up by text; in run.c the ids of the byte pieces are fixed in the same way.
    """
    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    tokens = [ids[b" "]] if sentence else []
    for character in sentence:
        encoded = character.encode()
        tokens += [ids[encoded]] if encoded in ids else [byte + 3 for byte in encoded]
    while True:
        best = None  # (score, position, id) of the first pair with the highest score
        for position, (left, right) in enumerate(itertools.pairwise(tokens)):
            union = ids.get(pieces[left][0] + pieces[right][0])
            if union is not None and (best is None or pieces[union][1] > best[0]):
                best = (pieces[union][1], position, union)
        if best is None:
            return tokens
        tokens[best[1] : best[1] + 2] = [best[2]]


def decode(pieces: Pieces, tokens: Sequence[int]) -> str:
    """Decode as llama2.c prints: a space after BOS is left out, byte pieces are bytes."""
    printed = b""
    for previous, token in itertools.pairwise([1, *tokens]):
        piece = pieces[token][0]
        if 3 <= token < 259:
            piece = bytes([token - 3])
        printed += piece.removeprefix(b" ") if previous == 1 else piece
    return printed.decode()


def train(**options: Any) -> Tokenizer:
    """Train a SentencePiece model whose kind differs from Llama's in `options`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.split(" ||| ")[1] for line in SENTENCES),
        model_writer=model,
        minloglevel=2,
        **{
            "vocab_size": 330,
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            **options,
        },
    )
    return Tokenizer(tokenizer_model=model.getvalue())


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """A tokenizer that differs from Llama's in its vocabulary only."""
    return train()


# ------------------------------------------------------------------------------- round trips


def test_written_bytes_are_those_of_the_published_layout(trained: Tokenizer) -> None:
    sp = trained.sp_model
    pieces = [
        (sp.id_to_piece(number).replace("\u2581", " ").encode(), sp.get_score(number))
        for number in range(trained.n_words)
    ]
    pieces[:3] = SPECIAL
    assert to_tokenizer_bin(trained) == bin_of(pieces)


def test_ids_and_text_survive_the_round_trip(trained: Tokenizer) -> None:
    content = to_tokenizer_bin(trained)
    again = Tokenizer(tokenizer_model=to_sentencepiece(content, "t.bin"))
    assert to_tokenizer_bin(again) == content
    assert (again.bos_id, again.eos_id, again.pad_id, again.n_words) == (1, 2, 3, 330)
    for sentence in [
        *SENTENCES,
        "naïve 映画 🎬",
        " two  spaces ",
        "a\nb\t\r",
        "",
        " ",
        "<s> <0x41>",
    ]:
        ids = trained.encode_text(sentence)
        assert again.encode_text(sentence) == ids
        assert again.decode(ids) == trained.decode(ids) == sentence


def test_sentencepiece_fields_are_what_the_library_reads(trained: Tokenizer) -> None:
    """The package's own protobuf code reads the message; in a process of its own.

    (Its module cannot be imported together with transformers.)
    """
    code = """
import json, sys
from sentencepiece.sentencepiece_model_pb2 import ModelProto
content = sys.stdin.buffer.read()
model = ModelProto.FromString(content)
trainer, normalizer = model.trainer_spec, model.normalizer_spec
print(json.dumps([
    [[piece.piece, piece.score, piece.type] for piece in model.pieces],
    [trainer.model_type, trainer.vocab_size, trainer.byte_fallback, trainer.pad_id],
    [normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces],
    model.SerializeToString() == content,
]))
"""
    model = to_sentencepiece(to_tokenizer_bin(trained), "t.bin")
    output = subprocess.run([sys.executable, "-c", code], input=model, capture_output=True)
    pieces, trainer, normalizer, is_all = json.loads(output.stdout)
    sp = trained.sp_model
    kinds = [2, 3, 3, *[6] * 256, *[1] * (trained.n_words - 259)]
    assert pieces == [
        [sp.id_to_piece(number), sp.get_score(number), kind] for number, kind in enumerate(kinds)
    ]
    assert (trainer, normalizer, is_all) == ([2, 330, True, -1], ["identity", True, False], True)


@many
@given(sentence=text)
@example(sentence="\u00a0a  b\u3000")
def test_every_text_has_llama2c_ids(trained: Tokenizer, sentence: str) -> None:
    content = to_tokenizer_bin(trained)
    tokenizer = Tokenizer(tokenizer_model=to_sentencepiece(content, "t.bin"))
    ids = encode(pieces_of(content), sentence)
    assert tokenizer.encode_text(sentence) == ids
    assert tokenizer.decode(ids) == decode(pieces_of(content), ids) == sentence


@many
@given(st.data())
def test_every_vocabulary_has_llama2c_ids(data: st.DataObject) -> None:
    """Also if merges share a score, or a piece can only be reached in another order."""
    texts = data.draw(st.sets(st.text("abé ", min_size=2, max_size=5), max_size=30))
    scores = st.integers(-4, 4).map(float) | st.floats(-1e9, 1e9, width=32)
    scores = scores.map(lambda score: score + 0.0)  # SentencePiece prefers 0.0 to -0.0
    vocabulary = [(piece.encode(), data.draw(scores)) for piece in sorted(texts | set("abé "))]
    pieces = SPECIAL + BYTES + vocabulary
    tokenizer = Tokenizer(tokenizer_model=to_sentencepiece(bin_of(pieces), "t.bin"))
    for sentence in data.draw(st.lists(st.text("abé ", max_size=20), min_size=1, max_size=5)):
        assert tokenizer.encode_text(sentence) == encode(pieces, sentence)
    assert to_tokenizer_bin(tokenizer) == bin_of(pieces)


# ------------------------------------------------------------------------------- real files


def test_the_tokenizer_of_stories260k_is_read_and_written_again() -> None:
    path = real_file("stories260K/tokenizer.bin", "llama2c/tok512.bin")
    content = path.read_bytes()
    tokenizer = Tokenizer(tokenizer_model=to_sentencepiece(content, path))
    assert to_tokenizer_bin(tokenizer) == content
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)
    ids = [403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426]
    assert tokenizer.encode_text("Once upon a time, there was a little girl")[:5] == ids[:5]
    sentence = tokenizer.decode([1, *ids])
    assert sentence == decode(pieces_of(content), ids)
    for line in [sentence, *SENTENCES]:
        assert tokenizer.encode_text(line) == encode(pieces_of(content), line)


def test_llama_tokenizer_gives_llama2c_own_file() -> None:
    """Its bytes are those of the tokenizer.bin in llama2.c's repository."""
    path = real_file("tokenizer.model", "tokenizer.model")
    tokenizer = Tokenizer(tokenizer_model=path)
    content = to_tokenizer_bin(tokenizer)
    assert len(content) == 433_869
    published = "50a52ef822ee9e83de5ce9d0be0a025a773d019437f58b5ff9dcafb063ece361"
    assert hashlib.sha256(content).hexdigest() == published
    assert tokenizer_bin_notes(tokenizer) == []
    again = Tokenizer(tokenizer_model=to_sentencepiece(content, "t.bin"))
    for sentence in [*SENTENCES, "naïve 映画 🎬", "  three   spaces\n", "    x = 1000"]:
        assert again.encode_text(sentence) == tokenizer.encode_text(sentence)


# ----------------------------------------------------------------- what llama2.c cannot read


class OtherTokenizer(Tokenizer):
    """A tokenizer of another kind."""


def test_another_kind_of_tokenizer_cannot_be_written(trained: Tokenizer) -> None:
    other = OtherTokenizer(tokenizer_model=trained.content)
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        to_tokenizer_bin(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "not a BPE model"),
        ({"add_dummy_prefix": False}, "puts no space before a text"),
        ({"treat_whitespace_as_suffix": True}, "puts no space before a text"),
        (
            {"byte_fallback": False, "vocab_size": 60},
            "piece 3 .* is of type normal, but in llama2.c byte",
        ),
        ({"user_defined_symbols": ["film"]}, r"piece 3 \('film'\) is of type user-defined"),
        ({"pad_id": 3}, r"piece 3 \('<pad>'\) is of type control"),
        ({"bos_id": 2, "eos_id": 1}, "piece 1 is '</s>', but llama2.c expects '<s>'"),
        ({"bos_id": -1}, "piece 1 .* is of type byte, but in llama2.c control"),
    ],
)
def test_models_that_llama2c_would_misread_cannot_be_written(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        to_tokenizer_bin(train(**options))


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        ({}, []),
        ({"remove_extra_whitespaces": True}, ["the tokenizer removes extra spaces"]),
        ({"normalization_rule_name": "nfkc"}, ["the tokenizer normalizes Unicode (nfkc)"]),
    ],
)
def test_notes_tell_what_is_lost(options: dict[str, Any], notes: list[str]) -> None:
    tokenizer = train(**options)
    to_tokenizer_bin(tokenizer)  # it can be written
    assert tokenizer_bin_notes(tokenizer) == [f"{note}; llama2.c does not" for note in notes]


# ------------------------------------------------------------------------------ damaged files


def damage(number: int, piece: bytes, score: float = 0.0) -> bytes:
    """Return a tokenizer.bin one of whose pieces is another one."""
    pieces = [*SPECIAL, *BYTES, (b" ", -1.0), (b"a", -2.0)]
    pieces[number] = (piece, score)
    return bin_of(pieces)


GOOD = damage(260, b"b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a complete tokenizer.bin"),
        (b"\7\0\0", "not a complete tokenizer.bin"),
        (bin_of([]), "not a complete tokenizer.bin"),
        (GOOD[:-1], "piece 260: its length is 1, but 0 bytes are left"),
        (GOOD[:-5], "piece 260: the file ends inside it"),
        (GOOD + b"\0", "piece 261: the file ends inside it"),
        (GOOD[:4] + struct.pack("<fi", 0, 2**31 - 1) + GOOD[12:], "length is 2,147,483,647"),
        (GOOD[:4] + struct.pack("<fi", 0, -1) + GOOD[12:], "length is 4,294,967,295"),
        (GOOD[:4] + struct.pack("<fi", 0, 0) + GOOD[12:], "piece 0: its length is 0"),
        (b"\5" + GOOD[1:], r"the longest of 261 pieces \(6\)"),
        (b"\xff\xff\xff\xff" + GOOD[4:], r"the longest of 261 pieces \(6\)"),
        (bin_of([*SPECIAL, *BYTES[:-1]]), "piece 258 is 'nothing', but .* '<0xFF>'"),
        (bin_of([*SPECIAL, *BYTES, (b"a", 0.0)]), "no piece is a space"),
        (damage(0, b"<pad>"), "piece 0 is '<pad>', but llama2.c expects '<unk>'"),
        (damage(1, b"<|begin_of_text|>"), "piece 1 is .* expects '<s>'"),
        (damage(68, b"<0x61>"), "piece 68 is '<0x61>', but llama2.c expects '<0x41>'"),
        (damage(260, b" "), "pieces 259 and 260 are both ' '"),
        (damage(260, b"<s>"), "pieces 1 and 260 are both '<s>'"),
        (damage(260, b"\xff"), "piece 260: is not UTF-8 text"),
        (damage(260, b"a\0b"), "piece 260: .* holds U.0000 or U.2581"),
        (damage(260, "\u2581a".encode()), "piece 260: .* holds U.0000 or U.2581"),
        (damage(260, b" b"), "piece 260: ' b' holds 'b', which is not a piece itself"),
        (damage(260, b"b", float("nan")), "piece 260: its score is nan"),
        (damage(260, b"b", float("inf")), "piece 260: its score is inf"),
        (damage(260, b"b", -1e10), "piece 260: its score is -1"),
    ],
)
def test_damaged_files_are_errors(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^t.bin: .*{message}"):
        to_sentencepiece(content, "t.bin")


def test_truncated_files_are_errors() -> None:
    for length in [*range(64), *range(len(GOOD) - 40, len(GOOD))]:
        if length == len(GOOD) - 9:  # before the last piece; only the model's vocabulary tells
            continue
        with pytest.raises(ValueError, match="^t.bin: "):
            to_sentencepiece(GOOD[:length], "t.bin")


@many
@given(st.data())
def test_any_bytes_are_a_tokenizer_or_one_line(data: st.DataObject) -> None:
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.sampled_from([0, 4, 8, 12, len(content) - 9, len(content) - 1]))
        start = data.draw(st.just(max(start, 0)) | st.integers(0, len(content)))
        end = start + data.draw(st.integers(0, 12))
        content[start:end] = data.draw(st.binary(max_size=12))
    for damaged in (bytes(content), data.draw(st.binary(max_size=80))):
        try:
            model = to_sentencepiece(damaged, "t.bin")
        except ValueError as error:
            assert str(error).startswith("t.bin: ") and "\n" not in str(error)
        else:
            tokenizer = Tokenizer(tokenizer_model=model)  # SentencePiece accepts it
            assert to_tokenizer_bin(tokenizer) == damaged
