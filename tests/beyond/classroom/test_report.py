"""beyond/classroom/report.py: the report for people, the results for Gradescope, and the points."""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from beyond.classroom import report
from beyond.classroom.part import Finding
from beyond.classroom.parts import PARTS
from beyond.classroom.report import POINTS, main, read_points, results, show, summarize
from tests.beyond.classroom.test_checker import PARTS as LIGHT_PARTS
from tests.beyond.classroom.test_checker import RIGHT, SLEEP, sleepers
from tests.conftest import ROOT

FINDINGS = [
    Finding("rope", "ok"),
    Finding("RMSNorm", "edition", "LayerNorm: right in Fall 2025", "LayerNorm"),
    Finding("scores", "mistake", "not scaled (llama.py): " + "scores grow " * 9, "not scaled"),
    Finding("layer", "unknown", "wrong in a way"),
    Finding("AdamW", "todo", "not written yet"),
    Finding("loading", "error", "\x1b[31mred\udc80"),
]


@pytest.fixture
def light(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program examine three parts that cost nothing, a point each."""
    (tmp_path / "no-points").touch()
    monkeypatch.setattr(report, "PARTS", LIGHT_PARTS)
    monkeypatch.setattr(report, "POINTS", tmp_path / "no-points")


def test_a_finding_is_shown_in_lines_of_the_width() -> None:
    assert show(FINDINGS[0]) == "ok       rope"
    lines = show(FINDINGS[2], width=60).split("\n")
    assert lines[0].startswith("mistake  scores: not scaled (llama.py): scores grow")
    assert len(lines) == 3 and all(len(line) <= 60 for line in lines)
    assert all(line.startswith(" " * 9 + "scores") or line[9:13] == "grow" for line in lines[1:])


def test_what_a_student_wrote_cannot_steer_the_terminal() -> None:
    assert show(FINDINGS[5]) == "error    loading: ?[31mred?"


def test_the_last_line_counts_all_parts() -> None:
    assert summarize(FINDINGS) == (
        "2 of 6 parts are ok, 1 of them as in another edition of the course; "
        "1 mistake, 1 wrong, 1 error, 1 todo"
    )
    assert summarize(FINDINGS[:1]) == "1 of 1 parts are ok"
    assert (
        summarize(FINDINGS[2:] * 2) == "0 of 8 parts are ok; 2 mistakes, 2 wrong, 2 errors, 2 todo"
    )


def test_results_have_the_shape_that_gradescope_reads() -> None:
    points = {finding.part: 0.1 for finding in FINDINGS} | {"AdamW": 3}
    found = results(FINDINGS, points)
    assert found.keys() == {"score", "tests"}
    assert found["score"] == 0.2
    assert found["tests"][0] == {"name": "rope", "score": 0.1, "max_score": 0.1, "output": "ok"}
    assert found["tests"][4] == {
        "name": "AdamW", "score": 0, "max_score": 3, "output": "not written yet",
    }  # fmt: skip
    assert [test["score"] for test in found["tests"]] == [0.1, 0.1, 0, 0, 0, 0]


def test_the_table_of_points_names_every_part() -> None:
    lines = POINTS.read_text(encoding="utf-8").splitlines()
    names = [line.partition(" = ")[0] for line in lines if not line.startswith("#")]
    assert names == [part.name for part in PARTS]


def test_points_may_be_fractions_and_need_not_name_every_part(tmp_path: Path) -> None:
    (tmp_path / "points").write_text('rope = 2.5  # hard\n\n"llama"=0\n', encoding="utf-8-sig")
    points = read_points(tmp_path / "points", LIGHT_PARTS)
    assert points == {"rope": 2.5, "optimizer": 1, "llama": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rope 2", ':1: expected "part = points", found "rope 2"'),
        ("\nrope = two", ':2: expected points, a number from 0, found "two"'),
        ("rope = -1", ':1: expected points, a number from 0, found "-1"'),
        ("rope = nan", ':1: expected points, a number from 0, found "nan"'),
        ("rope = inf", ':1: expected points, a number from 0, found "inf"'),
        ("rape = 1", ':1: no part "rape"; parts: rope, optimizer, llama'),
        ("rope = 1\nrope = 2", ':2: the part "rope" has a line already'),
        (b"\xff\xfe", ": expected text in UTF-8"),
    ],
)
@pytest.mark.usefixtures("light")
def test_wrong_points_are_refused_before_any_code_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes, message: str
) -> None:
    path = tmp_path / "points"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "rope.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert main(["--of", str(tmp_path), "--points", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"sanity_check.py: error: {path}{message}\n")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--of", "nowhere"], "nowhere: no such folder"),
        (["--of", "."], "holds none of rope.py"),
        (["--json", "x.json"], "need --of FOLDER"),
        (["--of", "right", "--points", "nowhere"], "nowhere: No such file"),
        (["--of", "right", "--json", "right"], "not a regular file"),
        (["--of", "right", "more"], "unrecognized arguments: more"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "right").mkdir()
    (tmp_path / "right" / "rope.py").write_text(RIGHT)
    assert main(options) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


@pytest.mark.usefixtures("light")
def test_a_half_finished_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One part is right, one is missing, one stops; the other files are as they were."""
    (tmp_path / "rope.py").write_text(RIGHT)
    (tmp_path / "llama.py").write_text("def number():\n    raise NotImplementedError\n")
    target = tmp_path / "out" / "results.json"
    assert main(["--of", str(tmp_path), "--json", str(target)]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "ok       rope",
        "error    optimizer: there is no optimizer.py in the folder",
        "todo     llama: not written yet: llama.py:2",
        "1 of 3 parts are ok; 1 error, 1 todo",
    ]
    assert err == ""
    found = json.loads(target.read_text(encoding="utf-8"))
    assert [test["score"] for test in found["tests"]] == [1, 0, 0] and found["score"] == 1
    assert sorted(path.name for path in target.parent.iterdir()) == ["results.json"]


def test_our_own_folder_is_ok(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All real parts, in a real process."""
    for name in ("rope", "llama", "optimizer", "classifier", "base_llama", "config", "utils"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copy(ROOT / "tokenizer.py", tmp_path)
    assert main(["--of", str(tmp_path)]) == 0, capsys.readouterr().out
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [f"ok       {part.name}" for part in PARTS]
    assert last == f"{len(PARTS)} of {len(PARTS)} parts are ok"


@pytest.mark.usefixtures("light")
def test_an_error_of_several_parts_is_shown_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradescope shows the parts one by one, so each has the whole error there."""
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "rope.py").write_text("import llama\n" + RIGHT)
    (tmp_path / "llama.py").write_text("def load():\n    open('no.pt')\n\nload()\n")
    target = tmp_path / "results.json"
    assert main(["--of", str(tmp_path), "--json", str(target)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert " ".join(line.strip() for line in out[:3]) == (
        "error    rope: llama.py:2: FileNotFoundError: [Errno 2] No such file or directory: "
        "'no.pt'; line 4 of llama.py runs on import: put it under if __name__ == \"__main__\": "
        "error    optimizer: there is no optimizer.py in the folder"
    )
    assert out[3:] == ["error    llama: the same error as in rope", "0 of 3 parts are ok; 3 errors"]
    tests = json.loads(target.read_text(encoding="utf-8"))["tests"]
    assert tests[2]["output"] == tests[0]["output"] != "the same error as in rope"


@pytest.mark.usefixtures("light")
def test_a_reader_that_has_gone_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in `sanity_check.py --of FOLDER | head -1`; the results are written all the same."""
    (tmp_path / "rope.py").write_text(RIGHT)
    target = tmp_path / "results.json"
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["--of", str(tmp_path), "--json", str(target)]) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == ""
    assert len(json.loads(target.read_text(encoding="utf-8"))["tests"]) == 3


@pytest.mark.usefixtures("light")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # the fork needs none
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """A fork runs the program; the folder's code has started a process, and hangs."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    start = f"subprocess.Popen(['sleep', '{SLEEP}'], start_new_session=True)"
    (tmp_path / "rope.py").write_text(f"import subprocess\n{start}\nwhile True: pass\n")
    target = tmp_path / "results.json"
    program = Fork(lambda: main(["--of", str(tmp_path), "--json", str(target)]))
    try:
        end = time.monotonic() + 60
        while not sleepers():
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        os.kill(program.process, number)
        status, text = program.wait()
    assert (status, text) == (128 + number, "sanity_check.py: interrupted\n")
    assert sleepers() == []
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not target.exists()


class Fork:
    """A fork of this process that runs a function."""

    def __init__(self, run: Callable[[], int]) -> None:
        self.reader, writer = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            status = 70
            try:
                text = io.StringIO()
                with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
                    status = run()
                os.write(writer, text.getvalue().encode())
            finally:
                os._exit(status)
        os.close(writer)

    def wait(self) -> tuple[int, str]:
        """Return its status and what it printed."""
        with open(self.reader) as file:
            text = file.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1]), text
