"""What hostile inputs of all kinds are made of: broken bytes, odd values, other kinds of files."""

import math
import pickle
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

LONG = 1 << 16


class Case(NamedTuple):
    """One input, ready to be tried."""

    run: Callable[[], object]  # returns anything, or raises
    names: tuple[str, ...] = ()  # one of which an error must mention
    outputs: tuple[str, ...] = ()  # what the names of files that may be written begin with


Target = Callable[[random.Random], Case]
Targets = Mapping[str, tuple[int, Target]]  # by name: share of the inputs, and maker of one


def mutate(rng: random.Random, content: bytes) -> bytes:
    """Some bytes with a few random changes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + int(2 ** rng.uniform(0, 8)))
        kind = rng.randrange(8)
        if kind == 0 and start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[start:end] = rng.randbytes(end - start)
        elif kind == 2:
            del data[start:end]
        elif kind == 3:
            data[start:start] = data[start:end] * rng.choice((1, 2, 30))
        elif kind == 4:
            data[start:start] = rng.randbytes(end - start)
        elif kind == 5:
            data[start:end] = bytes([rng.choice((0, 1, 127, 128, 255))]) * (end - start)
        elif kind == 6:
            size = rng.choice((1, 2, 4, 8))
            data[start : start + size] = rng.choice((2**63, 2**31, -1, -2, 0)).to_bytes(
                16, "little", signed=True
            )[:size]
        else:
            del data[start:]
    return bytes(data)


def rarely(rng: random.Random, chance: float = 0.02) -> bool:
    return rng.random() < chance


def text(rng: random.Random) -> str:
    """A text that may hold anything that a text can, and lone surrogates."""
    words = ["warm", "dull", "film", "映画", "🎬", "e\u0301", "\0", "\x85", "\u2028", "\ufeff"]
    words += ["|||", "\r", "\t", "<s>", "</s>", "<0x00>", "▁", "%s", "{}", "\udcff", "\ud800", "--"]
    words += [chr(rng.randrange(0x110000)) for _ in range(3)]
    joined = rng.choice((" ", "")).join(rng.choices(words, k=rng.choice((0, 1, 3, 8))))
    return joined * rng.randrange(LONG >> 6) if rarely(rng) else joined


def put(path: str, content: bytes) -> str:
    Path(path).write_bytes(content)
    return path


def json_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind < 3:
        return text(rng)
    if kind == 6:
        return [json_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {text(rng): json_value(rng, depth + 1) for _ in range(rng.randrange(3))}
    return rng.choice((0, -1, 1.5, 10**25, math.nan, math.inf, True, None, ""))


def other_file(rng: random.Random) -> bytes:
    """A file of another kind."""
    magic = [b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80\x02", b"<html>", b"\x1f\x8b\x08"]
    magic += [b"(lp0\n.", b"model/" + bytes(251) + b"ustar\x00", b"\x93NUMPY", pickle.dumps([1])]
    return rng.choice(magic) + rng.randbytes(rng.choice((0, 3, 100, 2000)))


def proto_field(rng: random.Random) -> bytes:
    """A field of a protocol buffer that may mean anything."""
    number, wire = rng.choice((1, 1, 2, 3, 4, 5, 35, 40, 43)), rng.choice((0, 1, 2, 2, 5))

    def varint(value: int) -> bytes:
        parts = []
        while value > 127:
            parts.append(value & 127 | 128)
            value >>= 7
        return bytes([*parts, value])

    content = {
        0: varint(rng.choice((0, 1, 2**31, 2**63, 2**64 - 1))),
        1: rng.randbytes(8),
        5: rng.choice((rng.randbytes(4), struct.pack("<f", math.nan))),
    }.get(wire)
    if content is None:
        inner = rng.randbytes(rng.randrange(20))
        content = varint(rng.choice((len(inner), len(inner), 2**31, 2**40))) + inner
    return varint(number << 3 | wire) + content
