"""Make the model and the tokenizer of a checkpoint of any kind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base_llama import read_checkpoint
from beyond.formats.files import TOKENIZERS, Kind, kind_of
from beyond.formats.huggingface import read_huggingface
from beyond.formats.huggingface_tokenizer import JsonTokenizer, read_tokenizer_json
from beyond.formats.llama2c import read_llama2c
from beyond.formats.llama2c_tokenizer import to_sentencepiece, to_tokenizer_bin
from beyond.formats.meta import read_meta
from llama import Llama
from tokenizer import Tokenizer
from utils import open_atomically

READERS = {"llama2c": read_llama2c, "meta": read_meta, "huggingface": read_huggingface}


def load_llama(
    path: str | Path,
    causal: bool | None = None,
    dropout: float | None = None,
    max_seq_len: int | None = None,
) -> Llama:
    """Load the model of a checkpoint of any kind, on the CPU, in eval mode.

    Args:
        path: a file or a folder. Of a fine-tuned classifier the head is left out.
        causal, dropout, max_seq_len: override the checkpoint's own values unless None. Models of
            llama2.c, Meta and Hugging Face were trained causally, so they are causal.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint, or a model that this project does not compute.
    """
    kind = kind_of(path)
    checkpoint = read_checkpoint(path) if kind == "pt" else READERS[kind](path)
    if "classifier" in checkpoint:
        checkpoint = take_backbone(checkpoint)
    return Llama.from_checkpoint(checkpoint, path, causal, dropout, max_seq_len)


def take_backbone(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checkpoint of the model in a fine-tuned classifier's checkpoint, without the head.

    So a classifier can be fine-tuned further, on other labels too.
    """
    prefix = "llama."
    weights = {
        name.removeprefix(prefix): weight
        for name, weight in checkpoint["model"].items()
        if str(name).startswith(prefix)
    }
    return {**checkpoint, "model": weights}


def load_tokenizer(max_len: int | None, path: str | Path) -> Tokenizer:
    """Load a tokenizer: a SentencePiece model, `tokenizer.json`, or llama2.c's `tokenizer.bin`.

    Args:
        max_len: as in `Tokenizer`.
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a tokenizer.
    """
    if not Path(path).is_file():
        return Tokenizer(max_len, path)  # says what is wrong
    content = Path(path).read_bytes()
    if _is_json(content):
        return JsonTokenizer(max_len, read_tokenizer_json(Path(path)), path)
    if len(content) > 4 and content[2:4] == bytes(2):  # the longest piece, a small int32
        return Tokenizer(max_len, to_sentencepiece(content, path))
    return Tokenizer(max_len, path)


def make_tokenizer(max_len: int | None, content: bytes) -> Tokenizer:
    """Make a tokenizer of any kind from its `content`.

    Raises:
        ValueError: it is not a tokenizer's.
    """
    return JsonTokenizer(max_len, content) if _is_json(content) else Tokenizer(max_len, content)


def _is_json(content: bytes) -> bool:
    return content.lstrip()[:1] == b"{"


def write_tokenizer(tokenizer: Tokenizer, checkpoint: str | Path, kind: Kind = "pt") -> list[Path]:
    """Write a tokenizer into the folder of a checkpoint, where `default_tokenizer` finds it.

    Args:
        tokenizer: of the checkpoint.
        checkpoint: path of the checkpoint, a file.
        kind: of the checkpoint.

    Returns:
        The files that were not there before.

    Raises:
        ValueError: the folder holds another tokenizer, or llama2.c cannot use this one.
    """
    folder, files = Path(checkpoint).parent, tokenizer.files()
    if kind == "llama2c":
        files = {"tokenizer.bin": to_tokenizer_bin(tokenizer)}
    order = TOKENIZERS[kind]
    preferred = order[: next(i for i, name in enumerate(order) if name in files)]
    for name in (*preferred, *files):
        other = folder / name
        if other.exists() and other.read_bytes() != files.get(name):
            raise ValueError(
                f"{other}: is another tokenizer than that of {checkpoint}; each checkpoint needs "
                "its own in its folder, so choose another folder"
            )
    new = [folder / name for name in files if not (folder / name).exists()]
    for path in new:
        with open_atomically(path, "wb") as file:
            file.write(files[path.name])
    return new
