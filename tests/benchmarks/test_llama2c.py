"""llama2.c as a peer: compiled, given the same weights, counted, and refused in one line.

Its source cannot be here, so a small C program of our own prints what it prints.
"""

import shutil
import struct
from pathlib import Path

import pytest
import torch

from benchmarks import llama2c
from benchmarks.__main__ import main
from benchmarks.machine import peak_resident
from beyond.formats.llama2c import read_llama2c
from llama import Llama
from tests.conftest import make_llama

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")

# It takes run.c's arguments, does as many steps as asked for, less MISSING, and reports a rate. Of
# each step but the first it prints one character, since the first piece is a space after BOS.
STAND_IN = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int main(int argc, char *argv[]) {
    int steps = 0;
    char *threads = getenv("OMP_NUM_THREADS");
    for (int i = 2; i < argc; i += 2)
        if (!strcmp(argv[i], "-n")) steps = atoi(argv[i + 1]);
    if (!fopen(argv[1], "rb") || !threads || strcmp(threads, "1")) return 9;
    for (int i = 1; i < steps - MISSING; i++) printf("a");
    printf("\\n");
    fprintf(stderr, "achieved tok/s: %f\\n", 25.0);
    return STATUS;
}
"""


def write_source(folder: Path, missing: str = "0", status: str = "0") -> Path:
    """Write the stand-in for both programs; returns the folder."""
    source = STAND_IN.replace("MISSING", missing).replace("STATUS", status)
    for name in ("run.c", "runq.c"):
        (folder / name).write_text(source)
    return folder


@pytest.fixture
def causal_llama() -> Llama:
    """A tiny model, with rows that int8 groups of 16 divide."""
    return make_llama(causal=True)


@needs_gcc
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_seconds_follow_from_the_rate_that_it_prints(
    tmp_path: Path, causal_llama: Llama, dtype: str
) -> None:
    with llama2c.build(write_source(tmp_path), causal_llama, threads=1) as folder:
        assert llama2c.generate(folder, dtype, 200, threads=1) == 200 / 25
    assert not folder.exists()


@needs_gcc
def test_it_gets_the_same_weights(tmp_path: Path, causal_llama: Llama) -> None:
    with llama2c.build(write_source(tmp_path), causal_llama, threads=1) as folder:
        exact = read_llama2c(folder / "float32.bin")["model"]
        rounded = read_llama2c(folder / "int8.bin")["model"]
    weights = causal_llama.state_dict()
    assert exact.keys() == rounded.keys() == weights.keys() - {"output.weight"}  # tied
    for name in exact:
        weight = weights[name]
        assert torch.equal(exact[name], weight), name
        # Each group's step is 1/127 of its largest weight, and rounding errs by half a step.
        assert (rounded[name] - weight).abs().max() <= weight.abs().max() / 127 * 0.51, name


@needs_gcc
def test_fewer_tokens_are_noticed(tmp_path: Path, causal_llama: Llama) -> None:
    """It stops at BOS, and its rate would be that of a shorter context."""
    with pytest.raises(ValueError, match="^--llama2c: run generated 2 tokens instead of 3; it"):
        with llama2c.build(write_source(tmp_path, missing="1"), causal_llama, threads=1):
            pass


@needs_gcc
def test_a_program_that_fails_is_reported(tmp_path: Path, causal_llama: Llama) -> None:
    with pytest.raises(ValueError, match="^--llama2c: run failed with status 3: achieved tok/s"):
        with llama2c.build(write_source(tmp_path, status="3"), causal_llama, threads=1):
            pass


@needs_gcc
@pytest.mark.skipif(peak_resident() is None, reason="the system does not tell the memory")
def test_its_memory_is_that_of_the_program(tmp_path: Path) -> None:
    """Not of Python, which starts it; half of 64 MiB at least, since the last look is earlier."""
    source = tmp_path / "memory.c"
    source.write_text(
        "#include <stdlib.h>\n#include <string.h>\n#include <unistd.h>\nint main(void) "
        "{ char *p = malloc(1 << 26); memset(p, 1, 1 << 26); usleep(500000); return p[5] - 1; }\n"
    )
    llama2c.compile_program(source, tmp_path / "memory")
    peak = llama2c.peak_memory([str(tmp_path / "memory")], threads=1)
    assert peak is not None and 64 / 2**10 < peak < 80 / 2**10


def test_every_piece_is_one_character() -> None:
    """So that the printed characters are the tokens."""
    content = llama2c.make_vocabulary(300)
    pieces, at = [], 4
    while at < len(content):
        _, length = struct.unpack_from("<fi", content, at)
        pieces.append(content[at + 8 : at + 8 + length])
        at += 8 + length
    assert len(pieces) == 300 and struct.unpack_from("<i", content)[0] == max(map(len, pieces))
    assert [i for i, piece in enumerate(pieces) if len(piece) != 1] == [1]  # BOS is never printed
    # The prompt's pieces are found by their text, so they occur once.
    assert pieces.count(b" ") == pieces.count(llama2c.PROMPT.encode()) == 1


# ----------------------------------------------------------------------------------------- mistakes


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the one line that a refused command line prints."""
    assert main(argv) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.count("\n") == 1
    return error.removeprefix("python -m benchmarks: error: ").rstrip("\n")


def test_a_folder_without_source_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = f"--llama2c: {tmp_path / 'run.c'}: no such file; name the folder of llama2.c's source"
    assert error_of(capsys, "--llama2c", str(tmp_path)) == message


def test_a_missing_compiler_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    message = "--llama2c: gcc is not found; install it, or leave the flag out"
    assert error_of(capsys, "--llama2c", str(tmp_path)) == message


@needs_gcc
def test_an_error_of_the_compiler_is_one_line(tmp_path: Path, causal_llama: Llama) -> None:
    (write_source(tmp_path) / "runq.c").write_text("int main(void) { return unknown; }\nint;;;")
    with pytest.raises(ValueError) as caught:
        with llama2c.build(tmp_path, causal_llama, threads=1):
            pass
    start = "--llama2c: gcc -Ofast -fopenmp -march=native cannot compile "
    assert str(caught.value).startswith(start) and "unknown" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "0"], "argument --rounds: 0 is below 1"),
        (["--llama2c"], "argument --llama2c: expected one argument"),
        (["--llama2c", "x", "--use_gpu"], "--llama2c: llama2.c computes on the CPU; leave out "),
        (["--smollm2", "nowhere"], "--smollm2: nowhere: "),
        (["x"], "unrecognized arguments: x"),
    ],
)
def test_bad_flags_are_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(capsys, *argv).startswith(message)
