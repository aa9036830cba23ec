"""Locks on results, and scripts that take no arguments."""

import hashlib
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import utils
from tests.conftest import ROOT
from utils import fingerprint, lock_results

HOLD = """
import sys
from utils import lock_results
with lock_results(sys.argv[1:], print):
    print("locked", flush=True)
    sys.stdin.read()
"""


def hold(*paths: Path) -> subprocess.Popen[str]:
    """Start a process that holds locks until its standard input ends."""
    command = [sys.executable, "-c", HOLD, *map(str, paths)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = hold(tmp_path / "b.pt", tmp_path / "a.pt")
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("name", ["a.pt", "b.pt", "link.pt"])
def test_a_second_process_is_refused(
    tmp_path: Path, holder: subprocess.Popen[str], name: str
) -> None:
    """The message names file and process; another name for the same file is no way around it."""
    (tmp_path / "link.pt").symlink_to(tmp_path / "a.pt")
    with pytest.raises(OSError) as caught, lock_results([tmp_path / name], print):
        pass
    path = str(tmp_path / name).replace("link", "a")
    assert str(caught.value).startswith(f"{path}: process {holder.pid} is writing this file; ")


def test_other_files_are_free(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with lock_results([tmp_path / "c.pt"], print):
        pass


def test_a_killed_process_holds_no_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    with lock_results([tmp_path / "a.pt", tmp_path / "b.pt"], print):
        pass
    assert list(tmp_path.iterdir()) == []  # the hidden files are gone too


def test_a_lock_file_that_was_deleted_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking it, the last owner may have deleted it."""
    flock = utils._flock
    deleted: list[str] = []

    def flock_after_deletion(file, path):  # type: ignore[no-untyped-def]
        if not deleted:
            os.unlink(file.name)
            deleted.append(file.name)
        return flock(file, path)

    monkeypatch.setattr(utils, "_flock", flock_after_deletion)
    with lock_results([tmp_path / "a.pt"], print):
        assert deleted and Path(deleted[0]).read_text() == str(os.getpid())
        with pytest.raises(OSError, match=f"process {os.getpid()} is writing"):
            lock_results([tmp_path / "a.pt"], print).__enter__()


def test_a_file_system_without_locks_gets_one_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(utils.NO_LOCKS[0], "no locks")

    monkeypatch.setattr("fcntl.flock", fail)
    notes: list[str] = []
    with lock_results([tmp_path / "a.pt", tmp_path / "b.pt"], notes.append):
        pass
    (note,) = notes
    assert note.startswith(f"{tmp_path}: this file system has no locks")


# ------------------------------------------------------------------------ scripts without flags


@pytest.mark.parametrize("script", ["rope_test.py", "optimizer_test.py", "sanity_check.py"])
@pytest.mark.parametrize("argument", ["--bogus", "x", "--help"])
def test_a_script_without_arguments_refuses_them(
    script: str,
    argument: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before it checks anything, in one line; --help is answered."""
    monkeypatch.setattr(sys, "argv", [script, argument])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    out, err = capsys.readouterr()
    if argument == "--help":
        assert caught.value.code == 0 and err == "" and f"usage: {script}" in out
    else:
        assert (caught.value.code, out) == (2, "")
        assert err.startswith(f"{script}: error: unrecognized arguments: {argument}")
        assert err.count("\n") == 1


def test_a_check_that_a_signal_interrupts_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come right after the file was made that shows that the folder is writable."""
    touch = Path.touch

    def interrupted(path: Path) -> None:
        touch(path)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Path, "touch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        utils.prepare_output(tmp_path / "result.txt")
    assert list(tmp_path.iterdir()) == []


def test_an_unchanged_file_is_hashed_once(tmp_path: Path) -> None:
    """But one that was changed a moment ago could change again and keep its time."""

    def change(content: bytes, seconds_ago: float) -> None:
        path.write_bytes(content)
        os.utime(path, (start - seconds_ago, start - seconds_ago))

    path, start = tmp_path / "x", time.time()
    hashes = {content: hashlib.sha256(content).hexdigest() for content in (b"a", b"b")}
    for seconds_ago, content, expected in (
        (1000, b"a", b"a"),
        (1000, b"b", b"a"),  # as if unchanged
        (900, b"b", b"b"),
        (0, b"a", b"a"),
        (0, b"b", b"b"),
    ):
        change(content, seconds_ago)
        assert fingerprint(path) == hashes[expected]
