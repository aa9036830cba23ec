"""The fuzzer finds nothing to object to in the program, and what it is to find it does find."""

import os
import random
import socket
import sys
import time
from pathlib import Path

from pytest import MonkeyPatch

import run_llama
from tests import fuzz

INPUTS = 20_000


def test_hostile_input_ends_in_a_result_or_an_error() -> None:
    tally = fuzz.fuzz(seed=0, indices=range(INPUTS))
    print(tally.table())
    assert not tally.violations, "\n\n".join(tally.violations)
    assert tally.counts.total() == INPUTS
    for target in fuzz.TARGETS:
        for outcome in ("result", "error"):
            assert tally.counts[target, outcome] >= 50, f"{target} ends too seldom in {outcome}"


# Targets that do what none may do. The worker's process imports them from here.


def breaks(rng: random.Random) -> fuzz.Case:
    """A reader with a bug: the real target, whose parser raises what `main` does not expect."""
    case = fuzz.data_file(rng)
    Path("data.txt").write_text("0 ||| fine\n")

    def broken(*_: object) -> None:
        raise TypeError("a bug")

    def run() -> None:
        with MonkeyPatch.context() as patch:
            patch.setattr(run_llama, "parse_example", broken)
            case.run()

    return case._replace(run=run)


def hangs(rng: random.Random) -> fuzz.Case:
    return fuzz.Case(lambda: time.sleep(60))


def dies(rng: random.Random) -> fuzz.Case:
    return fuzz.Case(lambda: os._exit(7))


def allocates(rng: random.Random) -> fuzz.Case:
    return fuzz.Case(lambda: bytearray(fuzz.MEMORY))


def writes_outside(rng: random.Random) -> fuzz.Case:
    return fuzz.Case(lambda: Path("../outside").write_text("x"))


def changes_its_input(rng: random.Random) -> fuzz.Case:
    path = Path(fuzz.put("data.txt", b"0 ||| fine"))
    return fuzz.Case(lambda: path.write_text("x"), outputs=("output/",))


def runs_code(rng: random.Random) -> fuzz.Case:
    return fuzz.Case(lambda: os.system("true"))


def asks_elsewhere(rng: random.Random) -> fuzz.Case:
    return fuzz.Case(lambda: socket.create_connection(("192.0.2.1", 80), timeout=0.1))


def names_no_place(rng: random.Random) -> fuzz.Case:
    return fuzz.Case(lambda: int("x"), names=("data.txt",))


def prints_a_traceback(rng: random.Random) -> fuzz.Case:
    def program(argv: list[str]) -> int:
        print("Traceback\nrun_llama.py: error: x", file=sys.stderr)
        return 2

    return fuzz.Case(lambda: fuzz.exit_status(program, [], "run_llama.py"))


BAD = {
    "breaks": (breaks, "TypeError: a bug"),
    "hangs": (hangs, "no end within 2.0 s"),
    "dies": (dies, "died: exit status 7"),
    "allocates": (allocates, "MemoryError"),
    "writes outside": (writes_outside, "did what no input may do: [\"open '../outside'\"]"),
    "changes its input": (changes_its_input, "changed the file data.txt"),
    "runs code": (runs_code, 'did what no input may do: ["os.system'),
    "asks elsewhere": (asks_elsewhere, 'did what no input may do: ["socket.connect'),
    "names no place": (names_no_place, "names none of ('data.txt',)"),
    "prints a traceback": (prints_a_traceback, "expected one line of error"),
}


def test_violations_are_found() -> None:
    """Each is reported with what reproduces it, and the others are tried nevertheless."""
    targets: fuzz.Targets = {name: (1, target) for name, (target, _) in BAD.items()}
    first: dict[str, int] = {}
    for index in range(200):
        first.setdefault(fuzz.rng_of(3, index, targets)[1], index)
    indices = sorted(first.values())
    tally = fuzz.fuzz(3, indices, targets, limit=2.0)
    assert tally.counts == {(name, "VIOLATION"): 1 for name in BAD}
    for index, violation in zip(indices, tally.violations, strict=True):
        name = fuzz.rng_of(3, index, targets)[1]
        assert violation.startswith(f"{name}: ") and BAD[name][1] in violation, violation
        assert violation.endswith(f"reproduce: python -m tests.fuzz --seed 3 --only {index}")
