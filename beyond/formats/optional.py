"""The optional libraries safetensors and tokenizers: importing them, and their errors."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def import_library(name: str, path: str | Path) -> Any:
    """Import `safetensors` or `tokenizers`, which are optional.

    Raises:
        ValueError: it is not installed; the message begins with `path`, which needs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"{path}: reading and writing Hugging Face folders needs safetensors and tokenizers; "
            "install them with: uv sync --group formats"
        ) from None


@contextmanager
def library_errors(path: str | Path) -> Iterator[None]:
    """Turn errors of the library `tokenizers`, which are plain Exceptions, into ValueError."""
    try:
        yield
    except BaseException as error:
        # A panic of Rust code is not an Exception; other BaseExceptions are interruptions.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: the library tokenizers refuses it: {reason}") from None


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Drop what the block writes to file descriptor 2, where a panic of Rust prints its stack."""
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
