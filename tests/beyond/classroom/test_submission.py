"""The submission: its real files are found, checked, and packed as the course's packer wants them.

Run with `uv run pytest tests/beyond/classroom/test_submission.py`.
"""

import contextlib
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import run_llama
from beyond.classroom.__main__ import main
from beyond.classroom.submission import check_target
from beyond.demo import demo_folder
from beyond.records import describe_checkpoint, write_record
from tests.conftest import LABEL_NAMES, ROOT, SENTENCES, make_llama, save_llama

CODE = ["run_llama.py", "llama.py", "optimizer.py", "classifier.py", "rope.py"]
# Written out, as the course has them.
RESULTS = {
    "output/task_1": ["generated-sentence-temp-0.txt", "generated-sentence-temp-1.txt"],
    "output/task_2": [
        "sst-dev-prompting-output.txt",
        "sst-test-prompting-output.txt",
        "cfimdb-dev-prompting-output.txt",
        "cfimdb-test-prompting-output.txt",
    ],
    "output/task_3": [
        "sst-dev-finetuning-output.txt",
        "sst-test-finetuning-output.txt",
        "cfimdb-dev-finetuning-output.txt",
        "cfimdb-test-finetuning-output.txt",
    ],
}
ADVANCED = [
    "sst-dev-advanced-output.txt",
    "sst-test-advanced-output.txt",
    "cfimdb-dev-advanced-output.txt",
    "cfimdb-test-advanced-output.txt",
]
GREEDY = "output/task_1/generated-sentence-temp-0.txt"
SST_DEV = "output/task_2/sst-dev-prompting-output.txt"
TUNED = "output/task_3/cfimdb-dev-finetuning-output.txt"
FIVE_LABELS = '["awful", "bad", "average", "good", "excellent"]'
Submit = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture(scope="module")
def finished(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do the whole assignment with a tiny model, by the program itself."""
    folder = tmp_path_factory.mktemp("finished")
    save_llama(make_llama(causal=False), folder / "stories42M.pt")
    shutil.copy(tokenizer_path, folder / "tokenizer.model")
    (folder / "data").mkdir()
    for dataset, names in (("sst", FIVE_LABELS), ("cfimdb", LABEL_NAMES)):
        (folder / f"data/{dataset}-label-mapping.json").write_text(names)
        for number, split in enumerate(("train", "dev", "test")):  # 8, 7 and 6 lines
            lines = SENTENCES[number:]
            (folder / f"data/{dataset}-{split}.txt").write_text("\n".join(lines) + "\n")
    with contextlib.chdir(folder):
        assert run_llama.main(["--max_new_tokens", "3"]) == 0
        for dataset in ("sst", "cfimdb"):
            assert run_llama.main(["--option", "prompt", "--dataset", dataset]) == 0
            tune = ["--option", "finetune", "--dataset", dataset, "--epochs", "1"]
            assert run_llama.main(tune) == 0
    for name in CODE:
        shutil.copy(ROOT / name, folder)
    for path in folder.rglob("*.txt"):  # runs end after the code was written
        os.utime(path, (2e9, 2e9))
    return folder


@pytest.fixture
def work(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a copy of the finished work; the current folder is another one."""
    shutil.copytree(finished, tmp_path / "work")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "work"


@pytest.fixture
def submit(work: Path, capsys: pytest.CaptureFixture[str]) -> Submit:
    """Hand in the work as astudent; gives status, lines of output and lines of errors."""

    def run(student: str = "astudent", folder: Path = work) -> tuple[int, list[str], list[str]]:
        capsys.readouterr()
        status = main(["submission", student, str(folder)])
        out, err = capsys.readouterr()
        start = "beyond.classroom: "
        assert all(line.startswith(start) for line in err.splitlines())
        return status, out.splitlines(), [line[len(start) :] for line in err.splitlines()]

    return run


def contents(path: Path) -> dict[str, bytes]:
    """Return the files of a zip file, each once."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert len(archive.namelist()) == len(set(archive.namelist()))
        return {name: archive.read(name) for name in archive.namelist()}


def refused(submit: Submit) -> list[str]:
    """Hand in work that has to be refused; returns the error lines without `error: `."""
    status, out, err = submit()
    assert (status, out) == (2, [])
    assert not list(Path().iterdir())
    assert all(line.startswith("error: ") for line in err)
    return [line.removeprefix("error: ") for line in err]


# ------------------------------------------------------------------------------------ complete


def test_finished_work_is_packed_with_nothing_else(work: Path, submit: Submit) -> None:
    """The names are those of the course's packer, the contents those of the files."""
    status, out, err = submit()
    assert (status, err) == (0, [])
    expected = {f"astudent/{name}": (work / name).read_bytes() for name in CODE}
    for folder, names in RESULTS.items():
        expected |= {f"astudent/{name}": (work / folder / name).read_bytes() for name in names}
    assert contents(Path("astudent.zip")) == expected
    assert len(expected) == 15
    assert [path.name for path in Path().iterdir()] == ["astudent.zip"]
    assert out[-1] == "Wrote astudent.zip: 15 files."
    classifier = "output/task_3/cfimdb-finetune-1-2e-05.pt"
    assert "generated-sentence-temp-0.txt: made with stories42M.pt" in out
    assert f"cfimdb-dev-finetuning-output.txt: made with {classifier}, from stories42M.pt" in out
    assert len(out) == 11


def test_results_at_the_top_without_records_are_taken(work: Path, submit: Submit) -> None:
    """The course's own code writes them there, and no records."""
    for folder, names in RESULTS.items():
        for name in names:
            shutil.move(work / folder / name, work / name)
    shutil.rmtree(work / "output")
    status, out, err = submit()
    assert (status, err) == (0, [])
    assert [line.partition(": ")[2] for line in out[:-1]] == ["origin unknown"] * 10
    assert len(contents(Path("astudent.zip"))) == 15


def test_extra_work_is_packed_if_complete(work: Path, submit: Submit) -> None:
    for name in ADVANCED:
        shutil.copy(work / "output/task_3" / name.replace("advanced", "finetuning"), work / name)
    assert submit()[0] == 0
    assert {f"astudent/{name}" for name in ADVANCED} < contents(Path("astudent.zip")).keys()
    assert len(contents(Path("astudent.zip"))) == 19


def test_extra_work_is_packed_only_if_complete(work: Path, submit: Submit) -> None:
    shutil.copy(work / TUNED, work / "cfimdb-dev-advanced-output.txt")
    lines = refused(submit)
    assert [line.partition(":")[0] for line in lines] == [
        name for name in ADVANCED if name != "cfimdb-dev-advanced-output.txt"
    ]
    assert all(line.endswith("of these four files all or none are handed in") for line in lines)


def test_an_earlier_zip_file_is_replaced_and_that_is_said(work: Path, submit: Submit) -> None:
    submit()
    (work / "rope.py").write_text("# another\n")
    assert submit()[1][-1] == "Replaced astudent.zip: 15 files."
    assert contents(Path("astudent.zip"))["astudent/rope.py"] == b"# another\n"


def test_a_file_that_is_no_submission_is_not_replaced(submit: Submit) -> None:
    Path("astudent.zip").write_text("my diary")
    with zipfile.ZipFile("other.zip", "w") as archive:
        archive.writestr("someone/rope.py", "x")
    for student in ("astudent", "other"):
        before = Path(f"{student}.zip").read_bytes()
        status, _, err = submit(student)
        assert status == 2
        assert err == [
            f"error: {student}.zip: exists and is not a submission of {student}; move it away"
        ]
        assert Path(f"{student}.zip").read_bytes() == before
    assert not check_target(Path("new.zip"), "new")


def test_the_current_folder_is_the_default(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    assert main(["submission", "astudent"]) == 0
    assert len(contents(work / "astudent.zip")) == 15


def test_a_link_to_a_file_is_packed_as_a_file(work: Path, submit: Submit) -> None:
    (work / "llama.py").rename(work / "mine.py")
    (work / "llama.py").symlink_to("mine.py")
    assert submit()[0] == 0
    assert contents(Path("astudent.zip"))["astudent/llama.py"] == (work / "mine.py").read_bytes()


# -------------------------------------------------------------------------------------- refused


def test_everything_that_is_missing_is_listed(work: Path, submit: Submit) -> None:
    shutil.rmtree(work / "output")
    (work / "rope.py").unlink()
    assert refused(submit) == [
        f"{work}/rope.py: is missing",
        *(
            f"{name}: is missing in {work} and its output/task_*"
            for names in RESULTS.values()
            for name in names
        ),
    ]


def test_an_empty_folder_lacks_everything(tmp_path: Path, submit: Submit) -> None:
    (tmp_path / "empty").mkdir()
    status, _, err = submit(folder=tmp_path / "empty")
    assert (status, len(err)) == (2, 15)


def test_the_demos_results_do_not_count(work: Path, submit: Submit) -> None:
    """Named demo-..., as the program names them."""
    (work / GREEDY).rename(work / "output/task_1/demo-generated-sentence-temp-0.txt")
    (work / SST_DEV).rename(work / "output/task_2/demo-dev-prompting-output.txt")
    end = "is the demo's and does not count"
    assert refused(submit) == [
        f"generated-sentence-temp-0.txt: is missing in {work} and its output/task_*; "
        f"{work}/output/task_1/demo-generated-sentence-temp-0.txt {end}",
        f"sst-dev-prompting-output.txt: is missing in {work} and its output/task_*; "
        f"{work}/output/task_2/demo-dev-prompting-output.txt {end}",
    ]


def make_record(path: Path, checkpoint: str | Path) -> None:
    """Write the record of a result, with the program's own function."""
    run = {"command": "run_llama.py", "version": "0.1.0", "seed": 1337}
    write_record(path, {**run, **describe_checkpoint(str(checkpoint))})


def test_a_result_of_the_demos_model_is_refused(work: Path, submit: Submit) -> None:
    """Under any name, since its fingerprint is known."""
    demo = demo_folder() / "model.pt"
    shutil.copy(demo, work / "real.pt")
    make_record(work / GREEDY, work / "real.pt")
    make_record(work / SST_DEV, demo)
    assert refused(submit) == [
        f"{work / GREEDY}: was made with the demo ({work / 'real.pt'}); use the real model",
        f"{work / SST_DEV}: was made with the demo ({demo}); use the real model",
    ]


def test_a_classifier_made_from_the_demos_model_is_refused(work: Path, submit: Submit) -> None:
    """The record of the predictions names the classifier, whose record names the demo."""
    classifier = work / "output/task_3/cfimdb-finetune-1-2e-05.pt"
    make_record(classifier, demo_folder() / "model.pt")
    lines = refused(submit)
    assert len(lines) == 2
    assert lines[0].startswith(f"{work / TUNED}: was made with the demo (")


def test_a_classifier_named_after_the_demo_is_refused(work: Path, submit: Submit) -> None:
    other = work / "output/task_3/demo-finetune-5-2e-05.pt"
    shutil.copy(work / "stories42M.pt", other)
    make_record(work / TUNED, other)
    assert refused(submit) == [
        f"{work / TUNED}: was made with the demo ({other}); use the real model"
    ]


def test_a_result_changed_after_its_record_is_refused(work: Path, submit: Submit) -> None:
    path = work / SST_DEV
    path.write_text(path.read_text().replace(" .", " !", 1))
    assert refused(submit) == [
        f"{path}: was changed after its record was written; make it again, or delete the record "
        f"{path}.json"
    ]
    Path(f"{path}.json").unlink()
    assert submit()[0] == 0


@pytest.mark.parametrize(
    ("record", "origin"),
    [
        ("{", "origin unknown"),
        ("[1]", "origin unknown"),
        ('{"result": 1, "command": 2, "version": 3}', "origin unknown"),
        ('{"result": 1, "command": 2, "version": 3, "checkpoint": 4}', "origin unknown"),
        (
            '{"result": 1, "command": 2, "version": 3, "checkpoint": "/gone"}',
            "made with /gone",
        ),
        (  # a record that names itself
            f'{{"result": 1, "command": 2, "version": 3, "checkpoint": "{SST_DEV}"}}',
            f"made with {SST_DEV}",
        ),
    ],
)
def test_odd_records(work: Path, submit: Submit, record: str, origin: str) -> None:
    (work / f"{SST_DEV}.json").write_text(record)
    assert f"sst-dev-prompting-output.txt: {origin}" in submit()[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": is empty"),
        (b" \n\n", ": is empty"),
        (b"4 ||| a\n" * 6, ": has 6 lines, expected 7, one per sentence"),
        (b"4 ||| a\n" * 8, ": has 8 lines, expected 7, one per sentence"),
        (b"4 ||| a\n" * 6 + b"5 ||| a\n", ":7: label 5 is not among 0 to 4"),
        (b"-1 ||| a\n" * 7, ":1: label -1 is not among 0 to 4"),
        (b"0 ||| a\n4, a\n", ':2: expected "<label> ||| <sentence>", found "4, a"'),
        (b"good ||| a\n", ':1: expected a whole number as label, found "good"'),
        (b"1 ||| caf\xe9 .\n" * 7, ":1: not UTF-8 text: invalid continuation byte"),
    ],
)
def test_predictions_of_another_form_are_refused(
    work: Path, submit: Submit, content: bytes, message: str
) -> None:
    (work / SST_DEV).write_bytes(content)
    assert refused(submit) == [f"{work / SST_DEV}{message}"]


def test_line_ends_and_odd_characters_count_as_in_the_data(work: Path, submit: Submit) -> None:
    """U+2028 and U+0085 are no line ends, Windows' line ends are."""
    (work / f"{SST_DEV}.json").unlink()
    lines = ["0 ||| a\u2028b \x85 c"] * 7
    (work / SST_DEV).write_bytes("\r\n".join(lines).encode())
    assert submit()[0] == 0


def test_without_data_the_courses_numbers_of_lines_hold(work: Path, submit: Submit) -> None:
    shutil.rmtree(work / "data")
    assert [line.partition(": ")[2] for line in refused(submit)] == [
        f"has {found} lines, expected {expected}, one per sentence"
        for _ in ("prompting", "finetuning")
        for found, expected in ((7, 1101), (6, 2210), (7, 245), (6, 488))
    ]


def test_two_files_that_differ_are_refused(work: Path, submit: Submit) -> None:
    (work / Path(GREEDY).name).write_text("another text")
    assert refused(submit) == [
        f"{work / Path(GREEDY).name} and {work / GREEDY} differ; delete the one that is not meant"
    ]
    shutil.copy(work / GREEDY, work / Path(GREEDY).name)
    assert submit()[0] == 0


def test_what_is_no_file_is_refused(work: Path, submit: Submit) -> None:
    for name in ("llama.py", "rope.py", "optimizer.py", "classifier.py", GREEDY):
        (work / name).unlink()
    (work / "llama.py").mkdir()
    (work / "rope.py").symlink_to("nowhere.py")
    os.mkfifo(work / "optimizer.py")
    with (work / "classifier.py").open("wb") as file:
        file.truncate(20_000_000_000)  # sparse
    (work / GREEDY).symlink_to("loop")
    (work / "output/task_1/loop").symlink_to("loop")
    end = "is a link to a file that does not exist"
    assert refused(submit) == [
        f"{work}/llama.py: is not a regular file",
        f"{work}/optimizer.py: is not a regular file",
        f"{work}/classifier.py: has more than 10,000,000 bytes, too many for a file of this name",
        f"{work}/rope.py: {end}",
        f"{work / GREEDY}: {end}",
    ]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\ndef f(:\n", ":2: is not valid Python: invalid syntax"),
        ("x = '\\0'\n\0", ": is not valid Python: source code string cannot contain null bytes"),
    ],
)
def test_code_that_is_not_python_is_refused(
    work: Path, submit: Submit, code: str, message: str
) -> None:
    (work / "rope.py").write_text(code)
    assert refused(submit) == [f"{work}/rope.py{message}"]


@pytest.mark.parametrize(
    "student", ["", ".", "..", "a/b", "../a", "/a", "a b", "_a", ".a", "a\n", "é", "a\\b"]
)
def test_an_id_that_is_no_name_is_refused(submit: Submit, student: str) -> None:
    status, _, err = submit(student)
    assert (status, len(err)) == (2, 1)
    assert err[0].startswith(f"error: ID {student!r}: expected letters, digits")
    assert not list(Path().iterdir())


@pytest.mark.parametrize("student", ["a", "astudent", "A.Student_7-b", "2x"])
def test_ids(submit: Submit, student: str) -> None:
    assert submit(student)[0] == 0
    assert {name.split("/")[0] for name in contents(Path(f"{student}.zip"))} == {student}


def test_a_folder_that_does_not_exist(work: Path, submit: Submit) -> None:
    assert submit(folder=work / "gone") == (2, [], [f"error: {work}/gone: is not a folder"])
    assert submit(folder=work / "rope.py") == (2, [], [f"error: {work}/rope.py: is not a folder"])


# ---------------------------------------------------------------------------------------- notes


def test_code_that_needs_more_than_is_handed_in_is_noted(work: Path, submit: Submit) -> None:
    (work / "beyond").mkdir()
    assert submit()[2] == [
        f"note: {work}/run_llama.py imports beyond, which is not handed in: it cannot run beside "
        "the course's own files alone; see --help"
    ]


def test_a_body_that_is_missing_is_noted(work: Path, submit: Submit) -> None:
    (work / "rope.py").write_text("def rotate():\n    raise NotImplementedError\n")
    status, _, err = submit()
    assert status == 0
    assert err == [
        f"note: {work}/rope.py:2: raises NotImplementedError; is a body missing?",
    ]


def test_code_that_is_newer_than_a_result_is_noted(work: Path, submit: Submit) -> None:
    os.utime(work / SST_DEV, (1e9, 1e9))
    os.utime(work / "optimizer.py", (1.9e9, 1.9e9))
    assert submit()[2] == [
        f"note: {work}/optimizer.py was changed after {work / SST_DEV} was written; run the task "
        "again if the change matters"
    ]


def test_a_report_is_noted(work: Path, submit: Submit) -> None:
    (work / "astudent-report.pdf").write_bytes(b"%PDF-1.4")
    assert submit()[2] == [
        f"note: {work}/astudent-report.pdf is not packed; add it to the zip file if you hand in a "
        "report"
    ]
    assert len(contents(Path("astudent.zip"))) == 15


# ------------------------------------------------------------------------------------- commands


def test_a_command_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["frobnicate"], ["submission"], ["submission", "a", "b", "c"]):
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("beyond.classroom: error: ") and err.count("\n") == 1
