"""The tour: docs/tour.md agrees with a new run, and its code with the program's."""

import ast
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

from beyond.classroom.__main__ import main
from beyond.classroom.stops.layer import open_layer
from beyond.classroom.stops.tasks import question, step_by_hand
from beyond.classroom.stops.template import fill, find
from beyond.classroom.stops.walk import layers_of
from beyond.classroom.tour import build_tour
from run_llama import build_prompt_suffix
from tests.conftest import ROOT, make_llama

FILES = ("tour.md", "tour/angles.svg", "tour/attention.svg", "tour/silu.svg")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SYMBOL = re.compile(r"\[`([\w.]+)`\]\(\.\./(\w+)\.py\)")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    """Take the tour once."""
    return build_tour()


def read(name: str) -> str:
    """Read a file of docs/."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def unit(number: str) -> float:
    """Return what a number's last digit counts; 0 for an integer."""
    mantissa, _, exponent = number.partition("e")
    digits = mantissa.partition(".")[2]
    return 10.0 ** (int(exponent or 0) - len(digits)) if digits else 0.0


def differences(old: str, new: str) -> Iterator[tuple[str, str]]:
    """Yield the numbers that differ by more than one unit of the last digit, and all other words.

    On the page that is 1e-3 or less: numbers have three decimals or more. Another processor may
    round a number the other way.
    """
    words = (NUMBER.sub("#", old).splitlines(), NUMBER.sub("#", new).splitlines())
    yield from ((a, b) for a, b in zip(*words, strict=False) if a != b)
    if len(words[0]) != len(words[1]):
        yield f"{len(words[0])} lines", f"{len(words[1])} lines"
    for a, b in zip(NUMBER.findall(old), NUMBER.findall(new), strict=False):
        if abs(float(a) - float(b)) > 1.001 * min(unit(a), unit(b)):
            yield a, b


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("x 0.123, -0.500", "x 0.124, -0.501", True),
        ("x 0.123", "x 0.125", False),
        ("x 0.100", "x -0.100", False),
        ("-0.000", "0.000", True),
        ("2.000e-05", "2.001e-05", True),
        ("2.000e-05", "2.002e-05", False),
        ("2.000e-05", "2.000e-04", False),
        ("id 755", "id 756", False),
        ("a 0.1", "b 0.1", False),
        ("a", "a\na", False),
    ],
)
def test_differences_are_found(old: str, new: str, same: bool) -> None:
    assert (list(differences(old, new)) == []) == same


@pytest.mark.parametrize("name", FILES)
def test_the_files_agree_with_a_new_run(name: str, files: dict[str, str]) -> None:
    """If this fails: uv run python -m beyond.classroom tour."""
    assert set(files) == set(FILES)
    assert list(differences(read(name), files[name])) == []


def test_the_functions_that_the_page_names_exist() -> None:
    symbols = SYMBOL.findall(read("tour.md"))
    assert len(symbols) > 20
    for name, module in symbols:
        value = import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
        assert callable(value)


def bodies(text: str) -> set[str]:
    """Return the code of each function of a source text, without its docstring and layout."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                del node.body[0]
            if node.body:
                found.add(ast.unparse(node))
    return found


def test_the_code_on_the_page_is_the_program_s() -> None:
    modules = {module for _, module in SYMBOL.findall(read("tour.md"))}
    functions = set[str]()
    for module in modules:
        functions |= bodies((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    snippets = CODE.findall(read("tour.md"))
    assert len(snippets) > 8
    for snippet in snippets:
        assert bodies(snippet) <= functions
        assert len(bodies(snippet)) == 1


def test_a_function_that_does_not_exist_is_refused() -> None:
    with pytest.raises(LookupError, match="llama.py has no rms_norm"):
        find("llama.RMSNorm.rms_norm")
    with pytest.raises(KeyError, match="unknown"):
        fill("{{unknown}}", {})


@pytest.mark.parametrize("causal", [False, True])
def test_a_layer_is_opened_up(causal: bool) -> None:
    """With grouped heads, which the demo model may not have."""
    layer, x = layers_of(make_llama(causal))[1], torch.randn(5, 48)
    with torch.no_grad():
        opened = open_layer(layer, x)
    assert opened.weights.shape == (6, 5, 5)
    torch.testing.assert_close(opened.weights.sum(-1), torch.ones(6, 5))
    assert bool((opened.weights.triu(1) == 0).all()) == causal


def test_a_layer_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layers_of(make_llama(causal=True))[0]
    monkeypatch.setattr(layer.feed_forward, "SwiGLU", lambda x: layer.feed_forward.w3(x))
    with pytest.raises(AssertionError, match="not close"), torch.no_grad():
        open_layer(layer, torch.randn(5, 48))


def test_a_step_that_differs_is_refused() -> None:
    assert "2.000e-05" in step_by_hand(0.5, -0.25, 0.50002)
    with pytest.raises(AssertionError):
        step_by_hand(0.5, -0.25, 0.50004)


def test_the_question_is_the_program_s() -> None:
    names = ["awful", "bad", "average", "good", "excellent"]
    assert question(names) == build_prompt_suffix(names)


def test_the_pictures_show_the_weights_and_both_themes() -> None:
    for name in FILES[1:]:
        assert ET.fromstring(read(name)).tag == f"{SVG}svg"
        assert "prefers-color-scheme: dark" in read(name)
    labels = [element.text or "" for element in ET.fromstring(read(FILES[2])).iter(f"{SVG}text")]
    weights = [float(label) for label in labels if re.fullmatch(r"[01]\.\d\d", label)]
    seq = (len(labels) - 2 - len(weights)) // 4  # two titles; each piece is there four times
    assert len(weights) == seq**2 + seq * (seq + 1) // 2
    sums = [sum(weights[i * seq : (i + 1) * seq]) for i in range(seq)]
    masked = weights[seq**2 :]
    sums += [sum(masked[i * (i + 1) // 2 : (i + 1) * (i + 2) // 2]) for i in range(seq)]
    assert sums == pytest.approx([1.0] * 2 * seq, abs=0.005 * seq)  # each is rounded


def test_the_tour_takes_another_sentence(tmp_path: Path) -> None:
    sentence = "A dull story"
    assert main(["tour", "--sentence", sentence, "--output", str(tmp_path / "new")]) == 0
    page = (tmp_path / "new" / "tour.md").read_text(encoding="utf-8")
    assert f"> {sentence}\n" in page
    assert "{{" not in page
    assert all((tmp_path / "new" / name).stat().st_size > 1000 for name in FILES)


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        ("", "has 1 tokens with BOS; the tour needs 3 to 12"),
        ("good " * 20, "has 21 tokens"),
        ("two\nlines", "expected one line of UTF-8 text"),
    ],
)
def test_a_bad_sentence_is_one_line(
    sentence: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tour", "--sentence", sentence, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
