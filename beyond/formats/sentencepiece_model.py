"""The content of a SentencePiece model, a protobuf message.

Sources: `sentencepiece_model.proto` of google/sentencepiece; protobuf.dev, "Encoding". The fields
that are used:

| message | field |
|---|---|
| ModelProto | 1 pieces, 2 trainer_spec, 3 normalizer_spec |
| SentencePiece | 1 piece, 2 score, 3 type |
| TrainerSpec | 3 model_type, 24 treat_whitespace_as_suffix, 35 byte_fallback |
| NormalizerSpec | 1 name, 2 precompiled_charsmap, 3 add_dummy_prefix |
| | 4 remove_extra_whitespaces, 5 escape_whitespaces |

A message is a sequence of fields. A field is a key, which is 8 times the field's number plus its
kind, and a value:

| kind | value |
|---|---|
| 0 | an integer: groups of 7 bits, the lowest first; the highest bit of a byte: another follows |
| 1, 5 | 8 or 4 bytes, little-endian; in SentencePiece's messages a float |
| 2 | a length, then bytes: a text or a message |

SentencePiece's own module for its messages cannot be imported in one program with transformers,
which has a copy of it under the same name.
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple

Value = int | float | bytes  # of a field

SPACE = "\u2581"  # stands for a space in a piece
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
TYPE_NAMES = (None, "normal", "unknown", "control", "user-defined", "unused", "byte")
BPE = 2  # a type of models


class Piece(NamedTuple):
    """A piece of the vocabulary."""

    text: str
    score: float
    kind: int  # one of the types above


@dataclass(frozen=True)
class SentencePieceModel:
    """What a SentencePiece model says about how it tokenizes.

    Attributes:
        pieces: in the order of their ids.
        model_type: such as BPE.
        Others: the proto's fields of the same name; `normalizer` is the normalizer's name.
    """

    pieces: list[Piece]
    model_type: int
    treat_whitespace_as_suffix: bool
    byte_fallback: bool
    normalizer: str
    precompiled_charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def parse_model(content: bytes) -> SentencePieceModel:
    """Parse the content of a model that the SentencePiece library has accepted.

    Raises:
        ValueError: a field is of a kind that such models do not have.
    """
    model = parse_message(content)
    trainer, normalizer = (parse_message(last_value(model, number, b"")) for number in (2, 3))
    pieces = []
    for message in model.get(1, []):
        fields = parse_message(message) if isinstance(message, bytes) else {}
        text, score = last_value(fields, 1, b"").decode(), last_value(fields, 2, 0.0)
        pieces.append(Piece(text, score, last_value(fields, 3, NORMAL)))
    return SentencePieceModel(
        pieces=pieces,
        model_type=last_value(trainer, 3, 1),
        treat_whitespace_as_suffix=bool(last_value(trainer, 24, 0)),
        byte_fallback=bool(last_value(trainer, 35, 0)),
        normalizer=last_value(normalizer, 1, b"").decode(),
        precompiled_charsmap=last_value(normalizer, 2, b""),
        add_dummy_prefix=bool(last_value(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(last_value(normalizer, 4, 1)),
        escape_whitespaces=bool(last_value(normalizer, 5, 1)),
    )


def count_pieces(content: bytes) -> int:
    """Count the pieces of a SentencePiece model; 0 if the content is something else."""
    try:
        return len(parse_message(content).get(1, []))
    except (ValueError, IndexError, struct.error):
        return 0


def encode_field(number: int, value: Value) -> bytes:
    """Encode a field: an integer (>= 0) or bool, a float in 4 bytes, or bytes."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    """Encode an integer >= 0."""
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def parse_message(message: bytes) -> dict[int, list[Value]]:
    """Return the values of each field of a message, by the field's number.

    Raises:
        ValueError: a field is truncated, or of another kind.
        IndexError, struct.error: a key, a length or a number is truncated.
    """
    fields: dict[int, list[Value]] = {}
    position = 0
    while position < len(message):
        key, position = _parse_varint(message, position)
        value: Value
        if key & 7 == 0:
            value, position = _parse_varint(message, position)
        elif key & 7 == 2:
            length, position = _parse_varint(message, position)
            value, position = message[position : position + length], position + length
            if len(value) < length:
                raise ValueError(f"the tokenizer: field {key >> 3} of a message is truncated")
        elif key & 7 in (1, 5):
            kind = "<d" if key & 7 == 1 else "<f"
            (value,) = struct.unpack_from(kind, message, position)
            position += struct.calcsize(kind)
        else:
            raise ValueError(f"the tokenizer: field {key >> 3} of a message is of kind {key & 7}")
        fields.setdefault(key >> 3, []).append(value)
    return fields


def _parse_varint(message: bytes, position: int) -> tuple[int, int]:
    """Return the number that begins at a position, and the position after it."""
    number = shift = 0
    while True:
        byte = message[position]
        position += 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number, position


def last_value[V: Value](fields: dict[int, list[Value]], number: int, default: V) -> V:
    """Return a field's value, the last one if it is repeated; `default` gives its type."""
    values = [value for value in fields.get(number, []) if type(value) is type(default)]
    return values[-1] if values else default
