"""Time llama2.c, a C program that generates with the same weights.

Source: karpathy/llama2.c at commit 350e04f: run.c computes in float32, runq.c in int8. They are
compiled as its Makefile's `runomp` does, in a temporary folder.

Both programs print how many tokens per second they have generated. They start the clock after the
first token, so reading the file and the first token do not count. They stop early when they
generate BOS. So the tokens have to be counted, and the vocabulary that they get here makes that
easy: each piece is printed as one character.
"""

import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.machine import peak_resident
from beyond.formats.llama2c import write_llama2c
from llama import Llama

COMPILE = ("gcc", "-Ofast", "-fopenmp", "-march=native")
PROGRAMS = {"float32": "run", "int8": "runq"}  # by the dtype of the weights
FLAG = "--llama2c"
FIRST_PIECES = (b" ", b"<s>", b"b")  # 1 is BOS; a prompt gets a space before it
PROMPT = "b"
TRIAL = 3  # tokens that a program generates to show that it works
POLL = 0.01  # seconds between two looks at a process's memory


def check(source: Path) -> None:
    """Check that llama2.c can be compiled here.

    Raises:
        FileNotFoundError: a source file or the compiler is missing.
    """
    for program in PROGRAMS.values():
        if not (path := source / f"{program}.c").is_file():
            raise FileNotFoundError(
                f"{FLAG}: {path}: no such file; name the folder of llama2.c's source"
            )
    if shutil.which(COMPILE[0]) is None:
        raise FileNotFoundError(
            f"{FLAG}: {COMPILE[0]} is not found; install it, or leave the flag out"
        )


@contextmanager
def build(source: Path, llama: Llama, threads: int) -> Iterator[Path]:
    """Compile llama2.c and write its model files, in a folder that is deleted at the end.

    Each program is tried once, so that mistakes show before anything is measured.

    Args:
        source: the folder with run.c and runq.c, as `check` wants it.
        llama: the model.
        threads: of the trial.

    Yields:
        The folder, for `generate`.

    Raises:
        ValueError: compiling fails, or a program does not work.
    """
    with tempfile.TemporaryDirectory(prefix="llama2c-") as name:
        folder = Path(name)
        (folder / "tokenizer.bin").write_bytes(make_vocabulary(llama.config.vocab_size))
        for dtype, program in PROGRAMS.items():
            compile_program(source / f"{program}.c", folder / program)
            write_llama2c(folder / f"{dtype}.bin", llama, quantize=dtype == "int8")
            generate(folder, dtype, TRIAL, threads)
        yield folder


def compile_program(source: Path, target: Path) -> None:
    """Compile one C file.

    Raises:
        ValueError: the compiler reports an error; its first one is in the message.
    """
    command = [*COMPILE, str(source), "-lm", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if " error: " in line] or lines or ["no message"]
        raise ValueError(f"{FLAG}: {' '.join(COMPILE)} cannot compile {source}: {errors[0]}")


def make_vocabulary(size: int) -> bytes:
    """Return a tokenizer.bin in which every piece but BOS is one character long."""
    pieces = [*FIRST_PIECES, *[b"a"] * (size - len(FIRST_PIECES))]
    longest = max(map(len, pieces))
    content = [struct.pack("<fi", 0.0, len(piece)) + piece for piece in pieces]
    return struct.pack("<i", longest) + b"".join(content)


def command_line(folder: Path, dtype: str, new_tokens: int) -> list[str]:
    """Return the command that continues a prompt greedily.

    The clock runs from the second position on, so that one position more is needed.
    """
    program, model, vocabulary = PROGRAMS[dtype], f"{dtype}.bin", "tokenizer.bin"
    paths = [str(folder / name) for name in (program, model, vocabulary)]
    return [*paths[:2], *("-z", paths[2], "-t", "0", "-n", str(new_tokens + 1), "-i", PROMPT)]


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a program that uses so many threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def generate(folder: Path, dtype: str, new_tokens: int, threads: int) -> float:
    """Run llama2.c; returns the seconds that `new_tokens` tokens have taken, without the first.

    Args:
        folder: from `build`.
        dtype: float32 or int8.
        new_tokens: how many tokens are timed.
        threads: as many as PyTorch's.

    Raises:
        ValueError: the program fails, or generates fewer tokens.
    """
    command = command_line(folder, dtype, new_tokens)
    done = subprocess.run(command, env=environment(threads), capture_output=True)
    name, messages = f"{FLAG}: {PROGRAMS[dtype]}", done.stderr.decode(errors="replace")
    rate = re.search(r"achieved tok/s: ([\d.]+)", messages)
    if done.returncode or rate is None:
        last = (messages.strip() or "no message").splitlines()[-1]
        raise ValueError(f"{name} failed with status {done.returncode}: {last}")
    # The first piece is the prompt's space, which is not printed after BOS; a line feed ends all.
    printed = len(done.stdout.removesuffix(b"\n"))
    if printed != new_tokens:
        raise ValueError(
            f"{name} generated {printed} tokens instead of {new_tokens}; it stops at BOS"
        )
    return new_tokens / float(rate[1])


def peak_memory(command: Sequence[str], threads: int) -> float | None:
    """Run a command; returns its peak resident memory in GiB, or None if it is not known."""
    quiet = subprocess.DEVNULL
    peak = None
    with subprocess.Popen(command, env=environment(threads), stdout=quiet, stderr=quiet) as process:
        while process.poll() is None:
            peak = peak_resident(process.pid) or peak
            time.sleep(POLL)
    return None if peak is None else peak / 2**10
