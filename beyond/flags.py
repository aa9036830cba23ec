"""Declaring a flag: the types of arguments, and what a field of an options dataclass carries.

Like `options.py`, this module imports neither PyTorch nor NumPy.
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

from utils import at_least_one, whole_number

LARGEST_FLOAT32 = 3.4028234663852886e38


# ------------------------------------------------------------------------------- argument types


def number(text: str) -> float:
    """Convert an argument to a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None


def seed_number(text: str) -> int:
    """Convert an argument to an integer that every random generator takes as a seed."""
    value = whole_number(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is not in 0 to 2^32 - 1")
    return value


def seed_list(text: str) -> tuple[int, ...]:
    """Convert an argument such as 1,2,3 to two or more different seeds."""
    values = tuple(seed_number(part) for part in text.split(","))
    if len(values) < 2 or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text} is not a list of two or more different seeds")
    return values


def non_negative(text: str) -> float:
    """Convert an argument to a number from 0 to the largest float32."""
    value = number(text)
    if not 0 <= value <= LARGEST_FLOAT32:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and the largest float32")
    return value


def thread_count(text: str) -> int:
    """Convert an argument to a number of threads, at most one per CPU core."""
    value, cores = at_least_one(text), os.cpu_count() or 1
    if value > cores:
        raise argparse.ArgumentTypeError(f"{value} is above the number of CPU cores, {cores}")
    return value


def non_negative_int(text: str) -> int:
    """Convert an argument to an integer from 0 to the largest int32."""
    return at_least_one(text, lowest=0)


def positive_fraction(text: str) -> float:
    """Convert an argument to a number above 0, at most 1."""
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not in (0, 1]")
    return value


def dropout_probability(text: str) -> float:
    """Convert an argument to a probability below 1."""
    value = number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 1)")
    return value


# ----------------------------------------------------------------------------------------- flags


@dataclass(frozen=True)
class Flag:
    """How a field of an options dataclass is given on the command line.

    Attributes:
        help: what it means, with its unit; the default is added if it is a constant.
        recorded: whether it is a hyperparameter, so that `--resume` refuses another value.
        spelling: the assignment's, if it is not the field's name.
        parsing: further arguments for `ArgumentParser.add_argument`.
    """

    help: str
    recorded: bool = True
    spelling: str | None = None
    parsing: Mapping[str, Any] = field(default_factory=dict)

    def words(self, name: str, value: object) -> list[str]:
        """Return the words of a command line that give the flag a value; none for False or None.

        Args:
            name: of the field.
            value: as the dataclass holds it.
        """
        spelling = self.spelling or name
        if value is True:
            return [f"--{spelling}"]
        if value is False and self.parsing.get("action") is argparse.BooleanOptionalAction:
            return [f"--no-{spelling}"]
        if value is None or value is False:
            return []
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        return [f"--{spelling}", text]


def flag(
    help_text: str,
    default: Any = MISSING,
    *,
    recorded: bool = True,
    spelling: str | None = None,
    **parsing: Any,
) -> Any:
    """Declare a field that a flag sets; without a default, `get_args` works it out."""
    declared = Flag(help_text, recorded, spelling, parsing)
    return field(default=default, metadata={"flag": declared})


def switch(help_text: str, *, recorded: bool = True) -> Any:
    """Declare a field that is False unless its flag is given."""
    return flag(help_text, False, recorded=recorded, action="store_true")
