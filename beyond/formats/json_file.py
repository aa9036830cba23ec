"""Reading a JSON object from a file that may hold anything."""

import json
import reprlib
from pathlib import Path
from typing import Any, NoReturn

MAX_JSON = 2**22  # bytes; parsing can take 25 times as much memory, and real files are smaller


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too large, not UTF-8, or not a JSON object; or it holds NaN or Infinity,
            which are not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if (size := path.stat().st_size) > MAX_JSON:
        raise ValueError(f"{path}: {size:,} bytes are too many for this JSON file")
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"), parse_constant=_refuse)
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply") from None
    except ValueError as error:  # also a number with too many digits, and bytes that are not UTF-8
        raise ValueError(f"{path}: is not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {reprlib.repr(content)}")
    return content


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")
