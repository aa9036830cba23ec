"""Make the model and the tokenizer of a checkpoint."""

from pathlib import Path

from llama import Llama, load_pretrained
from tokenizer import Tokenizer
from utils import open_atomically


def load_llama(
    path: str | Path,
    causal: bool | None = None,
    dropout: float | None = None,
    max_seq_len: int | None = None,
) -> Llama:
    """Load the model of a checkpoint, as `load_pretrained` does."""
    return load_pretrained(path, causal, dropout, max_seq_len)


def load_tokenizer(max_len: int | None, path: str | Path) -> Tokenizer:
    """Load a SentencePiece model; the arguments are those of `Tokenizer`."""
    return Tokenizer(max_len, path)


def make_tokenizer(max_len: int | None, content: bytes) -> Tokenizer:
    """Make a tokenizer from its `content`."""
    return Tokenizer(max_len, content)


def write_tokenizer(tokenizer: Tokenizer, checkpoint: str | Path) -> None:
    """Write a tokenizer into the folder of a checkpoint.

    Raises:
        ValueError: the folder holds another tokenizer.
    """
    for name, content in tokenizer.files().items():
        path = Path(checkpoint).parent / name
        if path.exists() and path.read_bytes() != content:
            raise ValueError(
                f"{path}: is another tokenizer than that of {checkpoint}; each checkpoint needs "
                "its own in its folder, so choose another folder"
            )
        with open_atomically(path, "wb") as file:
            file.write(content)
