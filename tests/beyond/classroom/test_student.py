"""beyond/classroom/student.py: a folder's modules beside ours, whatever they import."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llama
import rope
from beyond.classroom.student import Student, StudentError


def write(folder: Path, **sources: str) -> Student:
    """Write modules into a folder."""
    folder.mkdir(exist_ok=True)
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    return Student(folder)


def error_of(student: Student, name: str) -> str:
    with pytest.raises(StudentError) as caught:
        student.module(name)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_folders_modules_are_beside_ours(tmp_path: Path) -> None:
    before = dict(sys.modules), sys.path.copy(), sys.meta_path.copy(), set(sys.path_importer_cache)
    student = write(
        tmp_path, rope="value = 1", llama="from rope import value\nimport helper", helper=""
    )
    theirs = student.module("llama")
    assert theirs is not llama and theirs.value == 1
    assert theirs.__file__ == str(tmp_path / "llama.py")
    assert student.module("llama") is theirs
    assert student.module("helper") is theirs.helper
    assert importlib.import_module("llama") is llama
    after = dict(sys.modules), sys.path, sys.meta_path, set(sys.path_importer_cache)
    assert after == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["helper.py", "llama.py", "rope.py"]


def test_late_imports_find_the_folders_modules_inside_names_only(tmp_path: Path) -> None:
    late = "def f():\n    import rope\n    return rope\n"
    student = write(tmp_path, rope="", llama=late)
    f = student.module("llama").f
    with student.names():
        theirs = f()
        assert sys.path[0] == str(tmp_path)
        with student.names():
            assert importlib.import_module("rope") is theirs
        assert importlib.import_module("rope") is theirs
    assert theirs is student.module("rope") is not rope
    assert f() is rope


def test_names_end_after_an_exception(tmp_path: Path) -> None:
    student = write(tmp_path, rope="")
    with pytest.raises(ZeroDivisionError), student.names():
        student.module("rope")
        raise ZeroDivisionError
    assert importlib.import_module("rope") is rope
    assert str(tmp_path) not in sys.path


def test_two_folders_do_not_mix(tmp_path: Path) -> None:
    source = "import helper\ndef f():\n    import late\n    return helper.value, late.value\n"
    first, second = (
        write(tmp_path / name, llama=source, helper=f"value = {name!r}", late=f"value = {name!r}")
        for name in ("first", "second")
    )
    calls = [(student, student.module("llama").f) for student in (first, second)]
    for (student, f), name in zip(calls, ("first", "second"), strict=True):
        with student.names():
            assert f() == (name, name)
    with first.names(), second.names():
        assert importlib.import_module("helper").value == "second"
    assert "helper" not in sys.modules


def test_a_folder_with_a_package_of_our_name(tmp_path: Path) -> None:
    """As in a copy of this project, or its starter."""
    (tmp_path / "beyond").mkdir()
    (tmp_path / "beyond" / "__init__.py").touch()
    (tmp_path / "beyond" / "options.py").write_text("value = 5")
    student = write(tmp_path, run_llama="from beyond.options import value")
    assert student.module("run_llama").value == 5
    assert not hasattr(importlib.import_module("beyond.options"), "value")
    assert list((tmp_path / "beyond").glob("**/*.pyc")) == []


def test_a_file_with_the_name_of_a_library_does_not_replace_it(tmp_path: Path) -> None:
    student = write(tmp_path, torch="", random="", rope="import torch\nx = torch.zeros(1)")
    assert student.module("rope").x == 0


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("x = 1\nif:", "rope.py:2: SyntaxError: invalid syntax"),
        ("x = 'a\0b'", "rope.py: SyntaxError: source code string cannot contain null bytes"),
        ("\n1 / 0", "rope.py:2: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit('no data')", "rope.py:2: the program ends itself (exit status no "),
        ("exit()", "rope.py:1: the program ends itself (exit status 0); remove exit()"),
        (
            "def f():\n    raise EOFError('EOF when reading a line')\nf()",
            "rope.py:2: input() has nothing to read here; remo",
        ),
        ("import bdb\nraise bdb.BdbQuit", "rope.py:2: the program stops in the debugger; remove "),
        ("import torch\ntorch.ones(1).cuda()", "rope.py:2: the code asks for a GPU, and there is"),
        ("x = 1\nassert x == 2", "rope.py:2: AssertionError: assert x == 2"),
        ("assert 1 == 2, 'no'", "rope.py:1: AssertionError: no"),
        (
            "import torch\ntorch.ones(2, 3) @ torch.ones(2, 3)",
            "(2x3 and 2x3) (the checker's model and inputs are small: the sizes are theirs)",
        ),
        (
            "def load():\n    open('no.pt')\n\nload()",
            '; line 4 of rope.py runs on import: put it under if __name__ == "__main__":',
        ),
        ("import llama", "rope.py:1: there is no llama.py in the folder"),
        ("from utils import *\nfrom helper import x", "rope.py:2: ImportError: cannot import name"),
        ("raise ValueError('a\\n' * 999)", "rope.py:1: ValueError: a a a"),
        (
            "class E(Exception):\n def __str__(self): 1 / 0\nraise E",
            "rope.py:3: E: (its message cannot be shown)",
        ),
        ("import torch.nothing.here\ntorch.nothing.here()", "rope.py:2: "),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(
    tmp_path: Path, source: str, text: str
) -> None:
    student = write(tmp_path, rope=source, utils="", helper="")
    message = error_of(student, "rope")
    assert text in message and len(message) < 400 and str(tmp_path) not in message
    assert error_of(student, "rope") == message
    assert importlib.import_module("rope") is rope


def test_the_encoding_of_a_file_is_named_if_it_is_utf_16(tmp_path: Path) -> None:
    """As some editors save it on Windows."""
    (tmp_path / "rope.py").write_text("x = 1\n", encoding="utf-16")
    assert error_of(Student(tmp_path), "rope") == "rope.py is saved as UTF-16; save it as UTF-8"


@pytest.mark.parametrize("source", [b"# caf\xe9\nx = 1\n", b"\n\nx = 'caf\xe9'\n"])
def test_a_file_in_another_encoding_is_taken_as_python_takes_it(
    tmp_path: Path, source: bytes
) -> None:
    (tmp_path / "rope.py").write_bytes(source)
    command = [sys.executable, "-Bc", "import rope"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    try:
        is_taken = bool(Student(tmp_path).module("rope"))
    except StudentError as error:
        assert "rope.py" in str(error)
        is_taken = False
    assert is_taken == (done.returncode == 0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert error_of(write(tmp_path), "rope") == "there is no rope.py in the folder"


def test_a_failure_that_is_known_is_not_tried_again(tmp_path: Path) -> None:
    write(tmp_path, rope="raise RuntimeError", llama="import rope", config="")
    student = Student(tmp_path, {"rope": "rope.py: no end"})
    assert error_of(student, "rope") == "rope.py: no end"
    assert error_of(student, "llama") == "rope.py: no end"
    assert student.module("config")


def test_imports_are_told(tmp_path: Path) -> None:
    told: list[str] = []
    write(tmp_path, rope="", llama="import rope\n1 / 0")
    student = Student(tmp_path, on_import=told.append)
    student.module("rope")
    error_of(student, "llama")
    assert told == ["rope", "", "llama", ""]


def test_a_module_cannot_change_what_other_parts_compute_with(tmp_path: Path) -> None:
    code = "import torch\ntorch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\n"
    student = write(tmp_path, rope=code, llama=code + "1 / 0")
    student.module("rope")
    error_of(student, "llama")
    assert torch.ones(1, requires_grad=True).exp().requires_grad
    assert torch.ones(1).dtype == torch.float32


# ------------------------------------------------------------------------- packages that are absent

ABSENT = """\
import absent_one
import absent_one.inner as inner
from absent_two import Lock, decorate, typed
from absent_two.errors import Error

__version = absent_one.version.parse("1.0") >= absent_one.version.parse("0.9")

class Locked(Lock, dict):
    pass

@decorate
def plain(x: typed[int, "a b"] | None) -> int:
    return x + 1

@decorate(option=1)
@absent_one.inner.more
class Whole:
    pass

def use():
    return inner.compute(1)

def make():
    return Locked()

def check(x):
    try:
        return isinstance(x, Lock)
    except Error:
        return None
"""


def test_code_that_does_not_need_an_absent_package_works(tmp_path: Path) -> None:
    student = write(
        tmp_path, utils=ABSENT, llama="from utils import *\nfrom absent_two import Lock"
    )
    utils = student.module("llama")
    assert student.absent == {"absent_one", "absent_two"}
    assert utils.plain(1) == 2
    assert utils.Whole.__name__ == "Whole"
    assert utils.check(3) is False
    assert not any(name.startswith("absent") for name in sys.modules)


def test_using_an_absent_package_says_so(tmp_path: Path) -> None:
    utils = write(tmp_path, utils=ABSENT).module("utils")
    with pytest.raises(StudentError, match="absent_one.inner.compute is used, but absent_one is"):
        utils.use()
    with pytest.raises(StudentError, match="absent_two.Lock is used, but absent_two is not inst"):
        utils.make()


def test_code_that_can_do_without_a_package_does(tmp_path: Path) -> None:
    """A stand-in would make the first branch succeed."""
    source = "try:\n    import absent_one\n    fast = True\nexcept ImportError:\n    fast = False\n"
    assert write(tmp_path, llama=source).module("llama").fast is False


def test_importlib_metadata_is_python_s_own_module(tmp_path: Path) -> None:
    source = "import importlib_metadata\nversion = importlib_metadata.version('torch')\n"
    version = write(tmp_path, utils=source).module("utils").version
    assert version.startswith("2.")
