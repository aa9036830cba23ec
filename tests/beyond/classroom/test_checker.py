"""beyond/classroom/checker.py: code that crashes, hangs, floods, forks or cheats harms nothing."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beyond.classroom.checker import Limits, check, require_folder
from beyond.classroom.part import Finding, Observed, Part
from beyond.classroom.student import Student

LIMITS = Limits(memory=512 << 20, output=1 << 20, processes=9)
SHORT = Limits(part=1.0)
NAMES = ("rope", "optimizer", "llama")
RIGHT = "def number():\n    return 7\n"
SLEEP = "4321.25"  # seconds, which tell the processes of these tests from all others


def part_of(module: str) -> Part:
    """A part that is right if the module's function `number` returns 7."""

    def adapt(student: Student) -> Callable[[], object]:
        return student.module(module).number

    def observe(subject: Callable[[], object]) -> dict[str, Observed]:
        return {"number": Observed(torch.tensor(subject()), 1e-6)}

    return Part(module, f"{module}.py", lambda: 7, (), observe, adapt)


PARTS = [part_of(name) for name in NAMES]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose three parts are right."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(RIGHT)
    return tmp_path


def sleepers() -> list[str]:
    """List the processes of these tests that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if SLEEP.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            pass
    return found


def children() -> list[str]:
    tasks = Path("/proc/self/task").glob("*/children")
    return [pid for task in tasks for pid in task.read_text().split()]


def check_with(folder: Path, code: str, limits: Limits = LIMITS) -> Finding:
    """Check the folder with this code as `optimizer.py`; returns the finding of that part."""
    (folder / "optimizer.py").write_text(code)
    before = children()
    findings = check(folder, PARTS, limits)
    assert [finding.part for finding in findings] == list(NAMES)
    assert [finding.status for finding in findings][::2] == ["ok", "ok"], findings
    assert children() == before
    assert sleepers() == []
    assert "\n" not in findings[1].text
    return findings[1]


def body(*lines: str) -> str:
    """A module whose function `number` runs these lines."""
    imports = "import ctypes, os, signal, subprocess, sys, threading, time\n"
    return imports + "def number():\n" + "".join(f"    {line}\n" for line in lines)


def test_a_right_folder_is_ok(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[Finding] = []
    (folder / "rope.py").write_text("import os\nprint('x')\nos.write(2, b'y')\n" + RIGHT)
    findings = check(folder, PARTS, LIMITS, told.append)
    assert findings == told == [Finding(name, "ok") for name in NAMES]
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{n}.py" for n in NAMES)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["while True: pass"], "no end within 1 s (optimizer.py:3)"),
        (["signal.pause()"], "no end within 1 s (optimizer.py:3)"),
        (
            ["ctypes.string_at(0)"],
            "the process was killed by SIGSEGV (optimizer.py:3)",
        ),
        (["os.kill(os.getpid(), 9)"], "the process was killed by SIGKILL"),
        (["os._exit(0)"], "the code ended the process (exit status 0)"),
        (["os.kill(os.getppid(), 9)", "time.sleep(9)"], "the code killed its parent"),
        (["os.closerange(0, 999)", "return 7"], "the code closed the checker's pipes"),
        (["while True: print('x' * 999)"], "more than 1 MiB of output"),
        (["while True: os.write(2, b'x' * 999)"], "more than 1 MiB of output"),
        (
            ["for i in range(9): os.fork() or time.sleep(9)", "time.sleep(9)"],
            "more than 9 processes",
        ),
        (["raise KeyboardInterrupt"], "optimizer.py:3: KeyboardInterrupt"),
    ],
)
def test_code_that_does_not_return_is_named(folder: Path, lines: list[str], text: str) -> None:
    finding = check_with(folder, body(*lines), SHORT if "no end" in text else LIMITS)
    assert (finding.status, finding.text) == ("error", text)


def test_code_that_goes_on_when_it_is_asked_where_it_is_blames_no_other_part(folder: Path) -> None:
    """A signal ends `signal.pause()`, so the next part's import begins before the worker ends."""
    (folder / "llama.py").write_text("import time\ntime.sleep(0.6)\n" + RIGHT)
    finding = check_with(folder, body("os.close(2)", "signal.pause()"), SHORT)
    assert (finding.status, finding.text) == ("error", "no end within 1 s")


def test_memory_is_limited_for_all_processes_together(folder: Path) -> None:
    hoard = "x = [bytes(b'x') * (120 << 20) for _ in range(2)]"
    finding = check_with(folder, body("for _ in range(2): os.fork()", hoard, "time.sleep(9)"))
    assert finding.text == "more than 0.5 GiB of memory"


@pytest.mark.sweep
def test_memory_that_the_checker_no_longer_shares_is_not_the_folders(folder: Path) -> None:
    """The worker is a fork of the checker; when one of both writes, it gets pages of its own."""
    shared, is_over = bytearray(b"x") * (400 << 20), threading.Event()

    def write() -> None:
        while not is_over.wait(1.5):  # after the worker has begun
            shared[::4096] = bytes(len(shared) // 4096)

    thread = threading.Thread(target=write)
    limits = replace(LIMITS, memory=100 << 20)
    thread.start()
    try:
        assert check_with(folder, body("time.sleep(2.5)", "return 7"), limits).status == "ok"
    finally:
        is_over.set()
        thread.join()


def test_an_allocation_beyond_the_limit_fails(folder: Path) -> None:
    finding = check_with(folder, body("return len(bytes(1 << 40))"))
    assert "MemoryError" in finding.text


@pytest.mark.parametrize(
    "lines",
    [
        ["subprocess.Popen(SLEEP)", "return 7"],
        ["subprocess.Popen(SLEEP, start_new_session=True)", "return 7"],
        ["os.fork() or (os.setsid(), os.fork() or os.execvp('sleep', SLEEP), os._exit(0))"]
        + ["time.sleep(0.2)", "return 7"],
        ["threading.Thread(target=time.sleep, args=[9]).start()", "return 7"],
        ["os.fork()", "return 7"],
        ["if not os.fork():", " os.setsid()", " end = time.monotonic() + 9"]
        + [" while time.monotonic() < end: os.fork() and os._exit(0)", " os._exit(0)", "return 7"],
    ],
)
def test_no_process_is_left(folder: Path, lines: list[str]) -> None:
    lines = [line.replace("SLEEP", f"['sleep', '{SLEEP}']") for line in lines]
    assert check_with(folder, body(*lines)).status == "ok"


def test_a_result_cannot_be_forged_by_printing(folder: Path) -> None:
    forged = '{"finding": {"part": "optimizer", "status": "ok"}}'
    write = f"os.write(pipe, b'\\n{forged}\\n')"
    finding = check_with(
        folder,
        body("for pipe in range(1, 99):", f" try: {write}", " except OSError: pass", "return 8"),
    )
    assert finding.status == "unknown"


def test_a_flooded_pipe_ends_the_worker(folder: Path) -> None:
    code = body(
        "pipe = max(map(int, os.listdir('/proc/self/fd')))",
        "while True: os.write(pipe, b'x' * 9999)",
    )
    assert check_with(folder, code).text == "the code writes into the checker's pipes"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("while True: pass", "while optimizer.py was imported: no end within 1 s"),
        ("import os; os._exit(3)", "while optimizer.py was imported: the code ended the process"),
    ],
)
def test_a_module_that_never_returns_is_imported_once(folder: Path, code: str, text: str) -> None:
    """Another part that needs the module is told so at once."""
    (folder / "optimizer.py").write_text(code)
    (folder / "llama.py").write_text("import optimizer\n" + RIGHT)
    right, *findings = check(folder, [*PARTS, *PARTS[1:]], Limits(part=1.0, total=3.9))
    assert right.status == "ok"
    assert len(findings) == 4
    assert all(text in finding.text for finding in findings), findings


def test_all_parts_together_are_limited(folder: Path) -> None:
    for name in NAMES:
        (folder / f"{name}.py").write_text(body("while True: pass"))
    findings = check(folder, PARTS, Limits(part=9, total=0.5))
    assert [finding.text for finding in findings][1:] == [
        "not examined: the parts before took 0.5 s"
    ] * 2


def test_code_may_delete_the_folder_that_it_runs_in(folder: Path) -> None:
    lines = ["import shutil", "shutil.rmtree(os.path.dirname(os.getcwd()))", "os._exit(0)"]
    assert "ended the process" in check_with(folder, body(*lines)).text


def test_standard_input_is_empty_and_the_folder_is_another(folder: Path) -> None:
    lines = ["assert sys.stdin.read() == '' and os.listdir('.') == []", "return 7"]
    assert check_with(folder, body(*lines)).status == "ok"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.touch(), "expected a folder, found a file"),
        (lambda path: path.mkdir(), "holds none of rope.py"),
        (lambda path: ((path / "in").mkdir(parents=True), (path / "in" / "llama.py").touch()),
         "did you mean .*given/in?"),
    ],
)  # fmt: skip
def test_a_folder_without_the_assignment_is_refused(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "given")
    with pytest.raises((OSError, ValueError), match=message):
        require_folder(tmp_path / "given")
