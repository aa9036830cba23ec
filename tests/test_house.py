"""The house: which module may import which, how long its parts are, and what comes with an import.

The ground floor is the assignment, the upper floor (`beyond/`) everything else.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from beyond.methods.options import MethodOptions, ZeroShotOptions
from tests.conftest import ROOT

GROUND = {"rope", "llama", "optimizer", "classifier"}
GROUND |= {"base_llama", "tokenizer", "utils", "config"}
CHECKS = {"rope_test", "optimizer_test"}
SCRIPTS = {"run_llama", "sanity_check"}  # may import everything
FOLDERS = {"beyond", "data", "benchmarks", "tests"}
PATHS = {path.stem: path for path in ROOT.glob("*.py")}
# beyond.run, beyond.formats (its __init__.py), beyond.formats.load, ...
PATHS |= {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "beyond").rglob("*.py")
    if path != ROOT / "beyond" / "__init__.py"
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}
ROOMS = {name for name in PATHS if name.startswith("beyond.")}


def project_imports(node: ast.AST) -> Iterator[str]:
    """Yield the modules of the project that an import statement names; nothing for other nodes."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute"
        module = str(node.module)
        inner = [f"{module}.{alias.name}" for alias in node.names]
        names = [name if name in PATHS else module for name in inner]
    for name in names:
        if name.split(".")[0] in PATHS.keys() | FOLDERS:
            yield name


# Each module -> the modules of the project that it imports, wherever the statement stands.
IMPORTS = {
    name: {module for node in ast.walk(tree) for module in project_imports(node)}
    for name, tree in TREES.items()
}


def test_top_level_holds_the_modules_of_the_ground_floor_only() -> None:
    assert {name for name in PATHS if "." not in name} == GROUND | CHECKS | SCRIPTS


def test_imports_are_found() -> None:
    """The tests below would pass if none were."""
    assert IMPORTS["llama"] == {"base_llama", "config", "rope"}
    assert IMPORTS["run_llama"] >= {"llama", "classifier", "beyond.command_line", "beyond.run"}
    assert sum(map(len, IMPORTS.values())) > 80


@pytest.mark.parametrize("name", sorted(GROUND | CHECKS))
def test_ground_floor_imports_the_ground_floor_only(name: str) -> None:
    assert IMPORTS[name] <= GROUND


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_upper_floor_imports_no_script(name: str) -> None:
    assert IMPORTS[name] <= GROUND | ROOMS


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_scripts_do_not_import_each_other(name: str) -> None:
    assert IMPORTS[name] <= GROUND | ROOMS


def test_run_llama_names_no_method() -> None:
    """It asks `beyond.methods` for what the flags say, and reads none of these flags itself."""
    flags = {
        field.name for options in (MethodOptions, ZeroShotOptions) for field in fields(options)
    }
    assert {"recipe", "smart", "calibrate"} <= flags  # the fields are found
    nodes = ast.walk(TREES["run_llama"])
    assert {node.attr for node in nodes if isinstance(node, ast.Attribute)}.isdisjoint(flags)


def test_no_module_imports_itself_by_way_of_others() -> None:
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError


def test_project_modules_are_imported_at_the_top_of_a_file() -> None:
    """Except where run_llama.py, as a script, answers a command line before slower imports."""
    elsewhere = [
        (name, module)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if node not in tree.body
        for module in project_imports(node)
    ]
    assert elsewhere == [("run_llama", "beyond.command_line")]
    docstring, head, *_ = TREES["run_llama"].body
    assert isinstance(docstring, ast.Expr) and isinstance(head, ast.If)
    assert ast.unparse(head) == (
        "if __name__ == '__main__':\n"
        "    from beyond.command_line import answer_at_once\n"
        "    answer_at_once()"
    )


def test_functions_fit_on_a_screen() -> None:
    lengths = {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name in {"run_llama", "llama"} | ROOMS
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(lengths) > 150
    assert {name: length for name, length in lengths.items() if length > 60} == {}


@pytest.mark.parametrize(("name", "limit"), [("run_llama", 450), ("llama", 300)])
def test_the_longest_modules_stay_short(name: str, limit: int) -> None:
    assert len(PATHS[name].read_text(encoding="utf-8").splitlines()) <= limit


def test_what_comes_with_an_import(tmp_path: Path) -> None:
    """Options and helpers come without PyTorch and NumPy, the model without what it does not use.

    So `--help` and mistakes are answered at once, `llama.py` can be used by itself, and the first
    token comes soon after PyTorch. Some of PyTorch's functions import SymPy or the compiler.
    """
    code = """
import sys
for modules, others in (
    ("utils", {"torch", "numpy", "sentencepiece", "tensorboard"}),
    ("beyond.options, beyond.command_line", {"torch", "numpy", "sentencepiece", "tensorboard"}),
    ("llama", {"sentencepiece", "tensorboard"}),
):
    exec(f"import {modules}")
    print(modules, sorted(others & sys.modules.keys()))
import run_llama
slow = {"sympy", "torch._dynamo", "torch._inductor", "tensorboard", "tokenizers", "safetensors"}
files = [f"--generated_sentence_{name}_temp_out={sys.argv[1]}/{name}" for name in ("low", "high")]
model = ["--pretrained-model-path", "data/demo/model.pt", "--max_new_tokens", "1"]
for mode in ("--causal", "--no-causal"):
    run_llama.main([*model, *files, mode])
print("generate", sorted(slow & sys.modules.keys()))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = output.stdout.splitlines()
    assert [*lines[:3], lines[-1]] == [
        "utils []",
        "beyond.options, beyond.command_line []",
        "llama []",
        "generate []",
    ], output.stderr
