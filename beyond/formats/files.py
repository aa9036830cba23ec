"""Which kind of checkpoint a path holds, and which files belong to it.

This module imports neither PyTorch nor NumPy, so that mistakes are answered at once.
"""

import hashlib
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from beyond.formats.huggingface_files import find_tokenizer, weight_files
from config import MAX_SIZE
from utils import fingerprint

Kind = Literal["pt", "llama2c", "meta", "huggingface"]

LLAMA2C_MAGIC = struct.pack("<I", 0x616B3432)  # of versions 1 and 2; version 0 has none
LLAMA2C_SIZES = 7  # int32 numbers at the start of version 0
META_CONFIG, META_WEIGHTS = "params.json", "consolidated.*.pth"
HUGGING_FACE_CONFIG = "config.json"
# Where the other kinds have their tokenizer, in their own folder; the first that exists is used.
TOKENIZERS: dict[Kind, tuple[str, ...]] = {
    "pt": ("tokenizer.model", "tokenizer.json", "tokenizer.bin"),
    "llama2c": ("tokenizer.bin", "tokenizer.model"),
    "meta": ("tokenizer.model",),
}


def kind_of(path: str | Path) -> Kind:
    """Return the kind of a checkpoint, judged by what it holds and never by its name.

    A file that is nothing else counts as a `.pt`, whose reader says what it is.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is a folder without a model, or one file of a Hugging Face folder.
    """
    path = Path(path)
    if path.is_dir():
        if (path / HUGGING_FACE_CONFIG).exists():
            return "huggingface"
        if (path / META_CONFIG).exists():
            return "meta"
        raise ValueError(
            f"{path}: is a folder with neither {HUGGING_FACE_CONFIG} (Hugging Face) nor "
            f"{META_CONFIG} (Meta); name a checkpoint"
        )
    if path.is_fifo():
        return "pt"  # looking into a named pipe would take its content away
    with path.open("rb") as file:
        head = file.read(4 * LLAMA2C_SIZES)
    if head[8:9] == b"{" and head[4:8] == bytes(4):  # the length of the header, then JSON
        raise ValueError(
            f"{path}: is the safetensors file of a Hugging Face model; name its folder, which also "
            f"holds {HUGGING_FACE_CONFIG}"
        )
    return "llama2c" if _is_llama2c(head) else "pt"


def _is_llama2c(head: bytes) -> bool:
    """Return whether the first bytes of a file are a header of llama2.c."""
    if head.startswith(LLAMA2C_MAGIC):
        return True
    if len(head) < 4 * LLAMA2C_SIZES:
        return False
    sizes = struct.unpack(f"<{LLAMA2C_SIZES}i", head)
    # Text, archives and pickles give far larger numbers.
    return all(1 <= abs(size) <= MAX_SIZE for size in sizes)


def model_files(path: str | Path) -> tuple[str, ...]:
    """Return the files that are read to make the model of a checkpoint; `path` if it is a file.

    Raises:
        ValueError: it is a folder without a model.
    """
    if not Path(path).is_dir():
        return (str(path),)
    folder, kind = Path(path), kind_of(path)
    if kind == "meta":
        return (str(folder / META_CONFIG), *map(str, sorted(folder.glob(META_WEIGHTS))))
    return (str(folder / HUGGING_FACE_CONFIG), *map(str, weight_files(folder)))


def model_fingerprint(path: str | Path) -> str:
    """Return the SHA-256 of a checkpoint; of a folder, that of its files' names and SHA-256s."""
    if not Path(path).is_dir():
        return fingerprint(path)
    lines = [f"{fingerprint(file)}  {Path(file).name}\n" for file in model_files(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextmanager
def hashing(path: str | Path) -> Iterator[None]:
    """Compute the fingerprint of a checkpoint in another thread, while the block reads it.

    `fingerprint` remembers it, so the files are read from the disk once. Errors are left to others.
    """

    def work() -> None:
        with suppress(OSError, ValueError):
            model_fingerprint(path)

    if Path(path).is_fifo():  # can be read only once
        yield
        return
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    thread.join()


def default_tokenizer(path: str | Path) -> str:
    """Return the path of a checkpoint's own tokenizer, whether it exists or not.

    Raises:
        FileNotFoundError: a Hugging Face folder has none.
        ValueError: as `kind_of`.
    """
    path = Path(path)
    kind = kind_of(path) if path.exists() else "pt"
    if kind == "huggingface":
        return str(find_tokenizer(path))
    folder = path if path.is_dir() else path.parent
    names = TOKENIZERS[kind]
    return str(folder / next((name for name in names if (folder / name).exists()), names[0]))
