"""Another implementation of the assignment, in a folder of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


class Student:
    """The modules of a folder, imported beside this project's modules of the same names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def module(self, name: str) -> ModuleType:
        """Return the folder's module, such as "rope"; it is imported at the first call."""
        raise NotImplementedError

    @contextmanager
    def names(self) -> Iterator[None]:
        """Let imports inside the folder's functions find the folder's modules."""
        raise NotImplementedError
