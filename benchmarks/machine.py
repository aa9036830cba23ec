"""What machine this is, and how much memory a process has used."""

import platform
import re
from pathlib import Path


def processor() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return models[0].strip() if models else platform.machine()


def peak_resident(process: int | str = "self") -> float | None:
    """Return the peak resident memory of a process that runs, in MiB; None if it is not known.

    It is not getrusage's maximum, since on Linux a child process starts with its parent's maximum.

    Args:
        process: its number, or "self".
    """
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None  # the process has ended, or the system is not Linux
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(found[1]) / 2**10 if found else None
