"""Which files belong to a checkpoint: the starter reads `.pt` files only.

This module imports neither PyTorch nor NumPy, so that mistakes are answered at once.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from utils import fingerprint


def model_files(path: str | Path) -> tuple[str, ...]:
    """Return the files that are read to make the model of a checkpoint.

    Raises:
        ValueError: it is a folder.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; the starter reads .pt files only")
    return (str(path),)


def model_fingerprint(path: str | Path) -> str:
    """Return the SHA-256 of a checkpoint."""
    return fingerprint(path)


def hashing(path: str | Path) -> AbstractContextManager[None]:
    """Return a context that does nothing."""
    return nullcontext()


def default_tokenizer(path: str | Path) -> str:
    """Return the path of a checkpoint's own tokenizer, whether it exists or not."""
    return str(Path(path).parent / "tokenizer.model")
