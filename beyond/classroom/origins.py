"""Which checkpoint has made a result: what the records beside results say.

Neither PyTorch nor NumPy is imported.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from beyond.command_line import is_record
from beyond.options import record_path
from utils import fingerprint

DEMO = Path(__file__).resolve().parent.parent.parent / "data" / "demo" / "model.pt"
UNKNOWN = "origin unknown"


def origin_of(result: Path, folder: Path) -> str:
    """Return which checkpoint has made a result, and which one that was made from.

    Args:
        result: a file; without a record its origin is unknown.
        folder: where the run was started; paths in records are relative to it.

    Raises:
        ValueError: the demo has made the result, or it was changed after its record was written.
    """
    record = read_record(result)
    if record is None:
        return UNKNOWN
    if record.get("result SHA-256") not in (None, fingerprint(result)):
        raise ValueError(
            f"{result}: was changed after its record was written; make it again, or delete the "
            f"record {record_path(result)}"
        )
    names: list[str] = []
    while True:  # from a classifier to the model that it was made from, and so on
        path, sha256 = record.get("checkpoint"), record.get("checkpoint SHA-256")
        if not isinstance(path, str) or path in names:  # a new model, or an odd record
            break
        if is_demo(path, sha256):
            raise ValueError(f"{result}: was made with the demo ({path}); use the real model")
        names.append(path)
        checkpoint = folder / path
        record = (read_record(checkpoint) if checkpoint.is_file() else None) or {}
        if record.get("result SHA-256") != sha256:
            break  # no record, or that of another checkpoint of this name
    return "made with " + ", from ".join(names) if names else UNKNOWN


def read_record(result: Path) -> dict[str, Any] | None:
    """Return the record of a result; None if it has none that can be read."""
    path = record_path(result)
    try:
        if Path(path).is_file() and is_record(path):
            return json.loads(Path(path).read_bytes())
    except OSError:
        pass
    return None


def is_demo(path: str, sha256: object) -> bool:
    """Return whether a checkpoint is the demo's, or was made by a run on the demo."""
    parts = Path(path).parts
    named = parts[-1:] != () and (parts[-1].startswith("demo-") or parts[-3:-1] == ("data", "demo"))
    return named or sha256 == _demo_fingerprint()


@cache
def _demo_fingerprint() -> str:
    return fingerprint(DEMO)
