"""Tokenizer files of llama2.c (`tokenizer.bin`) from and to SentencePiece models.

Source: karpathy/llama2.c at commit 350e04f: `Tokenizer.export` in tokenizer.py, `build_tokenizer`,
`encode` and `decode` in run.c. All numbers are little-endian.

| bytes | |
|---|---|
| 4 | length of the longest piece in bytes, uint32 |
| then for each piece, in the order of the ids: | |
| 4 | score, float32 |
| 4 | its length in bytes, uint32 |
| length | the piece, UTF-8, with plain spaces where SentencePiece has U+2581 |

The number of pieces and their kinds are not stored: piece 0 is `<unk>`, 1 is BOS and 2 is EOS (both
with a line feed before and after them), 3 to 258 are the byte pieces `<0x00>` to `<0xFF>`.
llama2.c's encoder puts a space before every text, takes each character or, if that is no piece, its
bytes, and then merges the adjacent pair whose union has the highest score, the first one of equal
ones, while there is any. That is SentencePiece's BPE, without normalization.
"""

import math
import struct
from pathlib import Path

from beyond.formats.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    TYPE_NAMES,
    UNKNOWN,
    encode_field,
    parse_model,
)
from tokenizer import Tokenizer

UNKNOWN_ID, BOS_ID, EOS_ID = 0, 1, 2
SPECIAL_PIECES = ("<unk>", "<s>", "</s>")
FIXED_PIECES = (*SPECIAL_PIECES, *(f"<0x{byte:02X}>" for byte in range(256)))
LOWEST_SCORE = -1e10  # llama2.c merges no pair with a score as low as this

Piece = tuple[str, float]  # text, with plain spaces, and score


# ------------------------------------------------------------------- tokenizer.bin to SentencePiece


def to_sentencepiece(content: bytes, path: str | Path) -> bytes:
    """Convert the content of a tokenizer.bin to a SentencePiece BPE model.

    Both give the same ids for every text without U+2581, which SentencePiece takes for a space.

    Args:
        content: the whole file.
        path: of the file, for error messages.

    Raises:
        ValueError: it is damaged, or has pieces that llama2.c cannot use.
    """
    pieces = _parse_pieces(content, path)
    _check_pieces(pieces, path)
    messages = []
    for number, (text, score) in enumerate(pieces):
        name = text.replace(" ", SPACE).encode()
        fields = encode_field(1, name) + encode_field(2, score)
        messages.append(fields + encode_field(3, _type_of(number)))
    trainer = encode_field(3, BPE) + encode_field(4, len(pieces)) + encode_field(35, True)
    normalizer = encode_field(1, b"identity") + encode_field(3, True) + encode_field(4, False)
    model = b"".join(encode_field(1, message) for message in messages)
    return model + encode_field(2, trainer) + encode_field(3, normalizer)


def _type_of(number: int) -> int:
    """Return the type of a piece, by its id."""
    if number >= len(FIXED_PIECES):
        return NORMAL
    return BYTE if number > EOS_ID else UNKNOWN if number == UNKNOWN_ID else CONTROL


def _parse_pieces(content: bytes, path: str | Path) -> list[Piece]:
    """Return the pieces of a tokenizer.bin; the special ones without their line feeds."""
    pieces: list[Piece] = []
    longest, position = 0, 4
    while position < len(content):
        where = f"{path}: piece {len(pieces)}"
        if len(content) < position + 8:
            raise ValueError(f"{where}: the file ends inside it; download it again")
        score, length = struct.unpack_from("<fI", content, position)
        position += 8
        if not 0 < length <= len(content) - position:
            raise ValueError(
                f"{where}: its length is {length:,}, but {len(content) - position:,} bytes are "
                "left; download it again"
            )
        try:
            text = content[position : position + length].decode()
        except UnicodeDecodeError:
            raise ValueError(f"{where}: is not UTF-8 text") from None
        pieces.append((text.strip("\n") if len(pieces) in (BOS_ID, EOS_ID) else text, score))
        longest = max(longest, length)
        position += length
    if int.from_bytes(content[:4], "little") != longest or not pieces:
        raise ValueError(
            f"{path}: the first number is not the length of the longest of {len(pieces)} pieces "
            f"({longest}): not a complete tokenizer.bin of llama2.c"
        )
    return pieces


def _check_pieces(pieces: list[Piece], path: str | Path) -> None:
    """Raise ValueError unless llama2.c can use the pieces."""
    for number, expected in enumerate(FIXED_PIECES):
        found = pieces[number][0] if number < len(pieces) else "nothing"
        if found != expected:
            raise ValueError(
                f"{path}: piece {number} is {found[:20]!r}, but llama2.c expects {expected!r}"
            )
    numbers: dict[str, int] = {}
    for number, (text, score) in enumerate(pieces):
        if not LOWEST_SCORE < score < math.inf:
            raise ValueError(f"{path}: piece {number}: its score is {score}")
        if "\0" in text or SPACE in text:
            raise ValueError(f"{path}: piece {number}: {text[:20]!r} holds U+0000 or U+2581")
        if text in numbers:
            raise ValueError(f"{path}: pieces {numbers[text]} and {number} are both {text[:20]!r}")
        numbers[text] = number
    for number, text in enumerate(list(numbers)[len(FIXED_PIECES) :], start=len(FIXED_PIECES)):
        if missing := next((character for character in text if character not in numbers), None):
            # llama2.c would never use the piece, but SentencePiece would.
            raise ValueError(
                f"{path}: piece {number}: {text[:20]!r} holds {missing!r}, which is not a piece "
                "itself; llama2.c cannot use it"
            )
    if " " not in numbers:
        raise ValueError(f"{path}: no piece is a space, which llama2.c puts before every text")


# ------------------------------------------------------------------- SentencePiece to tokenizer.bin


def to_tokenizer_bin(tokenizer: Tokenizer) -> bytes:
    """Convert a SentencePiece tokenizer to the content of a tokenizer.bin, as llama2.c does.

    `tokenizer_bin_notes` tells what the result does not do.

    Raises:
        ValueError: llama2.c would not give the tokenizer's ids: it is not a SentencePiece BPE
            model, or lacks the pieces and ids that llama2.c expects.
    """
    other = "choose another format than llama2.c's"
    if type(tokenizer) is not Tokenizer:
        raise ValueError(f"the tokenizer is not a SentencePiece model; {other}")
    model = parse_model(tokenizer.content)
    if model.model_type != BPE:
        raise ValueError(f"the tokenizer is not a BPE model; {other}")
    if not model.add_dummy_prefix or model.treat_whitespace_as_suffix:
        raise ValueError(f"the tokenizer puts no space before a text, but llama2.c does; {other}")
    pieces: list[Piece] = []
    for number, (text, score, kind) in enumerate(model.pieces):
        if kind != (expected := _type_of(number)):
            raise ValueError(
                f"the tokenizer: piece {number} ({text[:20]!r}) is of type {TYPE_NAMES[kind]}, but "
                f"in llama2.c {TYPE_NAMES[expected]}; {other}"
            )
        pieces.append((text.replace(SPACE, " "), score))
    _check_pieces(pieces, "the tokenizer")
    for number in (BOS_ID, EOS_ID):
        text, score = pieces[number]
        pieces[number] = (f"\n{text}\n", score)
    encoded = [(text.encode(), score) for text, score in pieces]
    longest = struct.pack("<I", max(len(text) for text, _ in encoded))
    return longest + b"".join(
        struct.pack("<fI", score, len(text)) + text for text, score in encoded
    )


def tokenizer_bin_notes(tokenizer: Tokenizer) -> list[str]:
    """Return what a SentencePiece tokenizer does to a text and llama2.c does not, as sentences."""
    model, notes = parse_model(tokenizer.content), []
    if model.precompiled_charsmap:
        notes.append(f"the tokenizer normalizes Unicode ({model.normalizer}); llama2.c does not")
    if model.remove_extra_whitespaces:
        notes.append("the tokenizer removes extra spaces; llama2.c does not")
    return notes
