"""The fuzzer finds no violation in the program, and finds those that are made for it.

The 20,000 inputs are a sweep; a few hundred of them, and what the fuzzer itself claims, are tests.
"""

import os
import random
import socket
import sys
import time
from pathlib import Path

import pytest

import run_llama
from beyond.options import TASKS, flags_of
from tests.sweeps import fuzz


@pytest.mark.parametrize(
    ("seed", "inputs", "least"),
    [(1, 500, 1), pytest.param(0, 20_000, 50, marks=pytest.mark.sweep)],
)
def test_hostile_input_ends_in_a_result_or_an_error(seed: int, inputs: int, least: int) -> None:
    """Each target ends in either, at least so many times."""
    tally = fuzz.fuzz(seed, range(inputs))
    print(tally.table())
    assert not tally.violations, "\n\n".join(tally.violations)
    assert tally.counts.total() == inputs
    for target in fuzz.TARGETS:
        for outcome in ("result", "error"):
            assert tally.counts[target, outcome] >= least, f"{target} ends too seldom in {outcome}"


def test_command_lines_have_every_flag_of_every_task() -> None:
    """And flags of other tasks, which are refused."""
    seen = set()
    for number in range(4000):
        argv = fuzz.arguments(random.Random(number), ["in.txt"], ["out.txt"])
        seen |= {(fuzz.task_of(argv), fuzz.flag_name(word)) for word in argv if word[:2] == "--"}
    for task, options in TASKS.items():
        own = {(task, name) for name in flags_of(options)} - {("generate", "option")}
        assert own <= seen
        assert {name for other, name in seen if other == task} - {name for _, name in own}


# Targets that do what none may do. The worker's process imports them from here.


def breaks(rng: random.Random) -> fuzz.Case:
    """A reader with a bug: the real target, whose parser raises what `main` does not expect."""
    case = fuzz.data_file(rng)
    Path("data.txt").write_text("0 ||| fine\n")

    def broken(*_: object) -> None:
        raise TypeError("a bug")

    def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
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
    "hangs": (hangs, "no end within 1.0 s"),
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
    tally = fuzz.fuzz(3, indices, targets, limit=1.0)
    assert tally.counts == {(name, "VIOLATION"): 1 for name in BAD}
    for index, violation in zip(indices, tally.violations, strict=True):
        name = fuzz.rng_of(3, index, targets)[1]
        assert violation.startswith(f"{name}: ") and BAD[name][1] in violation, violation
        assert violation.endswith(f"reproduce: python -m tests.sweeps.fuzz --seed 3 --only {index}")
