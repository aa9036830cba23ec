"""The starter: complete but for the bodies that students write, and without any answer.

Run with `uv run pytest tests/beyond/classroom/test_starter.py`.
"""

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import run_llama
from beyond import generation
from beyond.classroom import starter
from beyond.classroom.__main__ import main
from beyond.classroom.cutting import leave_to_student, replace_once, take_out, turn_off
from beyond.classroom.part import examine
from beyond.classroom.parts import PARTS
from beyond.classroom.stand_ins import decoding, fast_decoding
from beyond.classroom.stand_ins.methods.options import LACKS
from beyond.classroom.student import Student
from beyond.classroom.todos import ANSWERS_IN_CHECKS, EDITS, TODOS, Todo
from beyond.options import TASKS, flags_of
from tests.conftest import ROOT, SENTENCES

# What the course leaves to be written; the choice of the next token is a function of its own here.
WRITTEN_BY_STUDENTS = [
    ("rope.py", "apply_rotary_emb"),
    ("llama.py", "RMSNorm.norm"),
    ("llama.py", "Attention.compute_query_key_value_scores"),
    ("llama.py", "LlamaLayer.forward"),
    ("llama.py", "sample_next_token"),
    ("optimizer.py", "AdamW.step"),
    ("classifier.py", "LlamaEmbeddingClassifier.forward"),
]
SOLUTION = ("rope.py", "llama.py", "optimizer.py", "classifier.py")
# Lines, or parts of lines, that give an answer away.
TELLING = (
    *(
        "even * cos - odd * sin",
        "torch.outer(positions",
        ".unbind(-1)",
        "view_as_complex",
        "torch.polar",
    ),
    *("torch.rsqrt", ".pow(2).mean", "scaled_dot_product_attention", "vector_norm"),
    *("self.attention(self.attention_norm", "self.feed_forward(self.ffn_norm"),
    *("torch.multinomial(", "max_logits", "token_probabilities", "F.softmax"),
    *("torch._foreach", "1 - beta2**", "(1 - beta1) * g", "zeros_like(parameter)", "lerp"),
    "self.dropout(pooled",
)
DEMO = ["--pretrained-model-path", "data/demo/model.pt"]
GENERATE = ["--threads", "1", "--max_new_tokens", "12", "--seed", "3"]
FINETUNE = ["--threads", "1", "--option", "finetune", "--epochs", "1", "--batch_size", "4"]
FINETUNE += ["--lr", "1e-4", "--filepath", "output/a.pt", *DEMO]
FINETUNE += ["--label-names", "data/demo/label-mapping.json"]
for name in ("train", "dev", "test"):
    FINETUNE += [f"--{name}", f"few-{name}.txt"]
FINETUNE += ["--dev_out", "output/dev-finetuning-output.txt"]
FINETUNE += ["--test_out", "output/test-finetuning-output.txt"]


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the starter, as the command does."""
    folder = tmp_path_factory.mktemp("classroom") / "new" / "starter"
    assert main(["starter", str(folder)]) == 0
    return folder


def python(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run Python in a folder."""
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def sources(folder: Path) -> dict[str, str]:
    """Return the Python files of a folder, by their paths."""
    paths = [path for path in folder.rglob("*.py") if ".venv" not in path.parts]
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in paths}


def functions(source: str) -> dict[str, ast.FunctionDef]:
    """Return the functions of a source by their names, in classes with the class's name."""
    found: dict[str, ast.FunctionDef] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": method for method in methods}
    return found


# ---------------------------------------------------------------------------------- what it lacks


def test_exactly_the_bodies_of_the_assignment_raise(skeleton: Path) -> None:
    raising = [
        (file, name)
        for file, source in sources(skeleton).items()
        for name, function in functions(source).items()
        if "raise NotImplementedError" in ast.unparse(function)
    ]
    in_ours = [
        (file, name)
        for file in sources(skeleton)
        if (ROOT / file).exists()
        for name, function in functions((ROOT / file).read_text(encoding="utf-8")).items()
        if "raise NotImplementedError" in ast.unparse(function)
    ]
    assert in_ours == []
    assert sorted(raising) == sorted(WRITTEN_BY_STUDENTS)
    assert [(todo.file, todo.name) for todo in TODOS] == WRITTEN_BY_STUDENTS


@pytest.mark.sweep
def test_each_missing_body_raises_when_called(skeleton: Path) -> None:
    """And all other parts work: every other method here runs before the error comes."""
    code = """
import torch
from classifier import LlamaEmbeddingClassifier, ClassifierConfig
from config import LlamaConfig
from llama import Attention, FeedForward, Llama, LlamaLayer, RMSNorm, sample_next_token
from optimizer import AdamW
from rope import apply_rotary_emb

config = LlamaConfig(dim=8, n_layers=1, n_heads=2, vocab_size=9, max_seq_len=5)
x, tokens = torch.ones(1, 3, 8), torch.ones(1, 3, dtype=torch.long)
heads = torch.ones(1, 3, 2, 4)
classifier = LlamaEmbeddingClassifier(ClassifierConfig(2, "", 0.1, "finetune"), Llama(config))
parameter = torch.nn.Parameter(torch.ones(2))
parameter.grad = torch.ones(2)
for call in (
    lambda: apply_rotary_emb(heads, heads, 4, 5),
    lambda: RMSNorm(8, 1e-5)(x),
    lambda: Attention(config).compute_query_key_value_scores(heads, heads, heads),
    lambda: LlamaLayer(0, config)(x),
    lambda: sample_next_token(torch.ones(1, 9), 0.0),
    lambda: AdamW([parameter]).step(),
    lambda: classifier(tokens),
):
    try:
        call()
    except NotImplementedError:
        print("to do")
assert FeedForward(config)(x).shape == x.shape
assert AdamW([torch.nn.Parameter(torch.ones(1))]).defaults["lr"] == 1e-3
"""
    result = python(skeleton, "-c", code)
    assert (result.stdout, result.stderr) == ("to do\n" * 7, "")


def test_no_answer_is_left_anywhere(skeleton: Path) -> None:
    """Neither a telling line, nor any code line that was taken out, in any file."""
    texts = {
        path: path.read_bytes().decode("utf-8", "replace")
        for path in skeleton.rglob("*")
        if path.is_file() and path.suffix not in (".pt", ".model", ".pyc")
    }
    assert len(texts) > 45
    lines = {line.strip() for text in texts.values() for line in text.splitlines()}
    removed: set[str] = set()
    for todo in TODOS:
        ours = (ROOT / todo.file).read_text(encoding="utf-8")
        theirs = (skeleton / todo.file).read_text(encoding="utf-8")
        here = {line.strip() for line in theirs.splitlines()}
        removed |= {line.strip() for line in ours.splitlines() if line.strip() not in here}
    code = {line for line in removed if len(line) > 30 and not line.startswith(("#", "from"))}
    assert len(code) > 30
    assert {line for line in code if line in lines} == set()
    for part in TELLING:
        assert [path.name for path, text in texts.items() if part in without_tasks(text)] == []
    telling_in_ours = "".join((ROOT / file).read_text(encoding="utf-8") for file in SOLUTION)
    telling_in_ours += (ROOT / "rope_test.py").read_text(encoding="utf-8")
    telling_in_ours += (ROOT / "optimizer_test.py").read_text(encoding="utf-8")
    telling_in_ours += (ROOT / "beyond/decoding.py").read_text(encoding="utf-8")
    assert [part for part in TELLING if part not in telling_in_ours] == []


def without_tasks(text: str) -> str:
    """Return a text without the comments of our list."""
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def test_helpers_and_rooms_that_show_answers_are_gone(skeleton: Path) -> None:
    helpers = [helper.rpartition(".")[2] for todo in TODOS for helper in todo.helpers]
    helpers += [name for names in ANSWERS_IN_CHECKS.values() for name in names]
    assert {"_rotate", "rotary_tables", "_update", "token_probabilities", "pool"} < set(helpers)
    for source in sources(skeleton).values():
        assert not {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)} & {
            *helpers
        }
        assert not any(name.rpartition(".")[2] in helpers for name in functions(source))
    for file in ("beyond/decoding.py", "beyond/formats/load.py", "beyond/methods/method.py"):
        assert (skeleton / file).read_bytes() != (ROOT / file).read_bytes()
    assert not (skeleton / "beyond/methods/lora.py").exists()
    for folder in ("beyond/classroom", "tests", "benchmarks", "docs"):
        assert not (skeleton / folder).exists()


def test_all_other_text_stays_as_it_is(skeleton: Path) -> None:
    """A file without a task is ours, byte for byte; one with a task has our lines, or `EDITS`'."""
    changed = {"rope_test.py", "optimizer_test.py", "sanity_check.py"}
    changed |= {"beyond/options.py", "beyond/command_line.py"}
    changed |= {todo.file for todo in TODOS}
    stand_ins = {
        f"beyond/{path.relative_to(starter.STAND_INS)}" for path in starter.STAND_INS.rglob("*.py")
    }
    for file, source in sources(skeleton).items():
        if file in stand_ins:
            continue
        ours = (ROOT / file).read_text(encoding="utf-8")
        assert (source != ours) == (file in changed), file
        if file in {todo.file for todo in TODOS}:
            for old, new in EDITS.get(file, ()):
                ours = ours.replace(old, new)
            added = [line for line in source.splitlines() if line not in ours.splitlines()]
            assert all(line.lstrip().startswith(("#", "raise Not")) for line in added), added


def test_each_task_has_equation_shapes_and_paper() -> None:
    for todo in TODOS:
        assert re.search(r"arXiv:\d{4}\.\d{5}", todo.task), todo.name
        assert "hape" in todo.task or "(..., dim)" in todo.task, todo.name
        assert all(len(line) <= 90 for line in todo.task.splitlines()), todo.name


# ------------------------------------------------------------------------------------ it is sound


def test_ruff_finds_nothing(skeleton: Path) -> None:
    for words in (["check"], ["format", "--check"]):
        result = python(skeleton, "-m", "ruff", *words, "--no-cache", ".")
        assert result.returncode == 0, result.stdout


def test_every_import_names_what_is_there(skeleton: Path) -> None:
    """Including names that only some tasks use."""
    files = sources(skeleton)
    defined = {file: names_defined(source) for file, source in files.items()}
    count = 0
    for file, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            path = node.module.replace(".", "/") + ".py"
            if path not in files:
                in_project = (ROOT / path).exists() or node.module.startswith("beyond")
                assert not in_project, f"{file}: {node.module}"
                continue
            for alias in node.names:
                assert alias.name in defined[path], f"{file}: {node.module}.{alias.name}"
                count += 1
    assert count > 150


def names_defined(source: str) -> set[str]:
    """Return the names that a module binds at its top level."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return names


@pytest.fixture(scope="module")
def imported(skeleton: Path) -> "subprocess.CompletedProcess[str]":
    """Import run_llama.py, print the files of all modules, then run sanity_check.py --of FOLDER."""
    code = """
import runpy, sys
sys.argv = ["run_llama.py", "--help"]
import run_llama
for module in list(sys.modules.values()):
    print(getattr(module, "__file__", None))
sys.argv = ["sanity_check.py", "--of", "."]
runpy.run_path("sanity_check.py", run_name="__main__")
"""
    return python(skeleton, "-c", code)


def test_all_that_run_llama_needs_is_there_and_no_more(
    skeleton: Path, imported: "subprocess.CompletedProcess[str]"
) -> None:
    """By Python's own count of what it imports, besides the checks and data/download.py."""
    folder = skeleton.resolve()
    loaded = {Path(line) for line in imported.stdout.splitlines() if line.startswith(str(folder))}
    names = {str(path.relative_to(folder)) for path in loaded}
    others = {"rope_test.py", "optimizer_test.py", "sanity_check.py", "data/download.py"}
    assert names == sources(skeleton).keys() - others


def test_its_project_file_is_ours_without_our_tools(skeleton: Path) -> None:
    ours, theirs = (
        tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
        for folder in (ROOT, skeleton)
    )
    assert theirs["project"].pop("description") != ours["project"].pop("description")
    assert theirs["project"] == ours["project"]
    assert theirs["tool"] == {name: ours["tool"][name] for name in ("uv", "ruff")}
    assert theirs.keys() == {"project", "tool"}
    for name in (".python-version", ".gitignore", "LICENSE", "data/demo/model.pt"):
        assert (skeleton / name).read_bytes() == (ROOT / name).read_bytes()


# -------------------------------------------------------------------------------- what it can do


def test_flags_are_ours_without_those_that_it_says_it_lacks(skeleton: Path) -> None:
    ours = {name for task in TASKS.values() for name in flags_of(task)}
    code = """
from beyond.options import TASKS, flags_of
print(*{name for task in TASKS.values() for name in flags_of(task)})
"""
    result = python(skeleton, "-c", code)
    assert set(result.stdout.split()) == ours - set(LACKS)
    assert set(LACKS) < ours
    readme = (skeleton / "README.md").read_text(encoding="utf-8")
    assert all(f"`--{name}`" in readme for name in LACKS)


def test_help_and_refusal_of_what_it_lacks(skeleton: Path) -> None:
    text = python(skeleton, "run_llama.py", "--help").stdout
    assert "--epochs" in text and "--option" in text
    assert re.findall("|".join(f"--{name}\\b" for name in LACKS), text) == []
    assert "llama2.c" not in text and "Hugging Face" not in text
    for words in (["--lora-rank", "4"], ["--top_k=3"], ["--option", "prompt", "--calibrate"]):
        result = python(skeleton, "run_llama.py", *words)
        flag = words[-1] if len(words) == 3 else words[0].partition("=")[0]
        assert result.returncode == 2
        assert result.stderr == (
            f"run_llama.py: error: the starter lacks {flag.replace('-rank', '_rank')}\n"
        )


def test_the_readmes_commands_are_accepted(skeleton: Path) -> None:
    readme = (skeleton / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^uv run python run_llama\.py (--option .*)$", readme, re.MULTILINE)
    assert len(commands) == 5
    code = "from beyond.command_line import get_args\nimport sys, json\n"
    code += "for words in json.loads(sys.argv[1]): print(get_args(words).option)"
    words = repr([shlex.split(command) for command in commands]).replace("'", '"')
    result = python(skeleton, "-c", code, words)
    assert result.stdout.split() == ["generate", "prompt", "prompt", "finetune", "finetune"]
    for file in re.findall(r"uv run python (\S+\.py)", readme):
        assert (skeleton / file).exists()
    assert not re.search(r"{[a-z]+}", readme)


def few_sentences(folder: Path) -> None:
    """Write small data files."""
    for number, split in enumerate(("train", "dev", "test")):
        (folder / f"few-{split}.txt").write_text("\n".join(SENTENCES[number:]) + "\n")


def results(folder: Path) -> dict[str, bytes]:
    """Return the results of runs that do not depend on time or place."""
    paths = sorted((folder / "output").rglob("*"))
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in paths if p.suffix in (".txt", ".tsv")
    }


def without_times(out: str) -> str:
    """Return what was printed without durations, speeds and dates."""
    return re.sub(r"\d+\.?\d* s\b|\d+ tokens/s|\d{8}-\d{6}", "", out)


@pytest.mark.sweep
def test_with_our_bodies_it_gives_what_ours_gives(
    skeleton: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Texts at both temperatures, predictions, and what is printed, in both modes."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    shutil.copytree(skeleton, theirs)
    for file in SOLUTION:
        shutil.copy(ROOT / file, theirs / file)
    runs = [[*GENERATE, *DEMO], FINETUNE, [*FINETUNE, "--no-causal"]]
    (ours / "data").mkdir(parents=True)
    shutil.copytree(ROOT / "data/demo", ours / "data/demo")
    code = f"import run_llama\nfor argv in {runs!r}: assert run_llama.main(argv) == 0"
    for folder in (theirs, ours):
        few_sentences(folder)
    result = python(theirs, "-c", code)
    assert result.returncode == 0, result.stderr
    monkeypatch.chdir(ours)
    capsys.readouterr()
    for argv in runs:
        assert run_llama.main(argv) == 0
    out = capsys.readouterr().out
    assert without_times(result.stdout) == without_times(out)
    assert results(theirs) == results(ours)
    assert len(results(ours)) == 6


@pytest.mark.parametrize(
    "words",
    [
        ["--prompt", "A", "--prompt", "The film", "--num_samples", "2", "--stop_at_eos"],
        pytest.param(
            ["--prompt", "A", "--stream", "--temperature", "0.7", "--causal"],
            marks=pytest.mark.sweep,
        ),
    ],
)
def test_the_plain_room_for_decoding_gives_what_ours_gives(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in, tried on our own model in this process."""
    argv = [*GENERATE, *words, "--pretrained-model-path", str(ROOT / "data/demo/model.pt")]
    monkeypatch.chdir(tmp_path)
    assert run_llama.main(argv) == 0
    ours = results(tmp_path)
    for name in ("DecodingLlama", "Sampler", "stream"):
        monkeypatch.setattr(generation, name, getattr(decoding, name))
    monkeypatch.setattr(generation, "prepare_fastest", fast_decoding.prepare_fastest)
    assert run_llama.main(argv) == 0
    assert results(tmp_path) == ours and ours


# ---------------------------------------------------------------------------------- the checker

# The parts whose bodies the starter lacks.
TO_DO = {
    "rope",
    "RMSNorm",
    "attention scores",
    "layer",
    "generate",
    "AdamW",
    "embedding classifier",
}


def test_the_checker_says_todo_for_exactly_the_missing_bodies(skeleton: Path) -> None:
    student = Student(skeleton)
    found = {part.name: examine(part, student).status for part in PARTS}
    assert found == {name: "todo" if name in TO_DO else "ok" for name in found}
    assert len(TO_DO) == len(TODOS) and TO_DO < found.keys()


def test_the_checker_is_content_with_our_bodies(skeleton: Path, tmp_path: Path) -> None:
    shutil.copytree(skeleton, tmp_path / "done")
    for file in SOLUTION:
        shutil.copy(ROOT / file, tmp_path / "done" / file)
    student = Student(tmp_path / "done")
    findings = [examine(part, student) for part in PARTS]
    assert [finding for finding in findings if finding.status != "ok" or finding.text] == []


@pytest.mark.sweep
@pytest.mark.parametrize("todo", TODOS, ids=lambda todo: todo.name)
def test_each_body_alone_is_one_todo_less(skeleton: Path, tmp_path: Path, todo: Todo) -> None:
    """Our source with only this body taken out: one part is to do, all others are ok."""
    shutil.copytree(skeleton, tmp_path / "work")
    for file in SOLUTION:
        shutil.copy(ROOT / file, tmp_path / "work" / file)
    source = leave_to_student((ROOT / todo.file).read_text(encoding="utf-8"), todo)
    (tmp_path / "work" / todo.file).write_text(source, encoding="utf-8")
    student = Student(tmp_path / "work")
    found = {part.name: examine(part, student).status for part in PARTS}
    assert sorted(found.values()) == ["ok"] * (len(PARTS) - 1) + ["todo"]
    assert [name for name, status in found.items() if status == "todo"][0] in TO_DO


def test_the_checker_is_not_in_the_starter(
    skeleton: Path, imported: "subprocess.CompletedProcess[str]"
) -> None:
    assert [file for file, text in sources(skeleton).items() if "classroom" in text] == []
    assert imported.returncode == 2
    assert imported.stderr == (
        "sanity_check.py: error: unrecognized arguments: --of .; this script takes no arguments\n"
    )
    assert "It is not in this folder" in (skeleton / "README.md").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------- the folder


def test_a_folder_that_is_not_empty_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        capsys.readouterr()
        assert main(["starter", str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err == (
            f"beyond.classroom: error: {tmp_path / name}: exists and is not an empty folder; "
            "choose another one\n"
        )
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]


def test_an_empty_folder_and_a_link_to_one_are_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty2").mkdir()
    (tmp_path / "link").symlink_to("empty2")
    inode = (tmp_path / "empty").stat().st_ino
    for name in ("empty", "link"):
        assert main(["starter", str(tmp_path / name)]) == 0
        assert (tmp_path / name / "rope.py").is_file()
    assert (tmp_path / "empty").stat().st_ino == inode  # the same folder, filled
    names = {path.name for path in (tmp_path / "empty").iterdir()}
    assert {name for name in names if name.startswith(".")} == {".gitignore", ".python-version"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "empty2", "link"]
    assert (tmp_path / "link").is_symlink()


def test_nothing_is_left_if_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> dict[str, bytes]:
        return {"a.py": b"", "a.py/b.py": b""}  # cannot be both a file and a folder

    monkeypatch.setattr(starter, "starter_files", fail)
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        assert main(["starter", str(tmp_path / name)]) == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    (tmp_path / "file").touch()
    assert main(["starter", str(tmp_path / "file/new")]) == 2
    assert capsys.readouterr().err.count("\n") == 3


# ------------------------------------------------------------------------------------ the list


SOURCE = '''"""Doc."""

from functools import lru_cache

import os
from typing import Any, cast


def first(x: int) -> int:
    """Return y."""
    check = x + 1
    # explains the next line
    y = helper(cast(Any, x))
    return y + check


# above the helper


# of the helper
@lru_cache(maxsize=1)
def helper(x: int) -> int:
    return x


def last() -> str:  # stays
    """Return it."""
    loss = None  # stays
    for name in os.environ:
        helper(len(name))
    return loss
'''


def test_a_body_is_cut_from_the_first_use_of_a_helper_on() -> None:
    cut = leave_to_student(SOURCE, Todo("a.py", "first", "x\n\ny", helpers=("helper",)))
    cut = leave_to_student(cut, Todo("a.py", "last", "z", helpers=("helper",)))
    todo = "# TODO: replace the error below with code for this."
    assert take_out(cut, "helper", "a.py") == (
        f'''"""Doc."""


def first(x: int) -> int:
    """Return y."""
    check = x + 1
    {todo}
    # x
    #
    # y
    raise NotImplementedError


# above the helper


def last() -> str:  # stays
    """Return it."""
    loss = None  # stays
    {todo}
    # z
    raise NotImplementedError
    return loss
'''
    )


def test_a_body_without_helpers_is_cut_whole() -> None:
    cut = leave_to_student(SOURCE, Todo("a.py", "first", "x"))
    assert '"""Return y."""\n    # TODO' in cut
    assert "check" not in cut and "cast" not in cut and "lru_cache" in cut


def drift(todo: Todo) -> Callable[[], object]:
    """Return a call that cuts our own source by an entry of another time."""
    return lambda: leave_to_student((ROOT / todo.file).read_text(encoding="utf-8"), todo)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (drift(replace(TODOS[0], name="rotate")), "rope.py: has no rotate"),
        (drift(replace(TODOS[1], name="RMSNorm._norm")), "llama.py: has no RMSNorm._norm"),
        (drift(replace(TODOS[0], helpers=("gone",))), "rope.py: apply_rotary_emb uses none of"),
        (lambda: take_out(SOURCE, "gone", "a.py"), "a.py: has no gone"),
        (lambda: replace_once("aa", "a", "b", "a.py"), "a.py: has 'a' 2 times"),
        (lambda: replace_once("aa", "b", "a", "a.py"), "a.py: has 'b' 0 times"),
        (lambda: starter.locate("beyond.methods.lora"), "the starter needs beyond.methods.lora"),
        (lambda: starter.locate("beyond.classroom.part"), "the starter needs beyond.classroom"),
    ],
)
def test_a_list_that_has_fallen_behind_fails_loudly(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises(LookupError, match=re.escape(message)):
        call()


def test_a_flag_becomes_a_constant() -> None:
    source = (
        "class A:\n    a: int = flag(\n        'x', 3, type=int\n    )\n    b: int = flag('y', 4)\n"
    )
    expected = "class A:\n    a: ClassVar[int] = 3\n    b: int = flag('y', 4)\n"
    assert turn_off(source, ["a"]) == expected
