"""The printed catalogue: docs/mistakes.md agrees with the checker's parts."""

import re
from pathlib import Path

import pytest

from beyond.classroom.__main__ import main
from beyond.classroom.mistakes import PAGE, anchor, build_page, escape
from beyond.classroom.part import Mistake, Part, Variant
from beyond.classroom.parts import PARTS
from tests.conftest import ROOT

HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
ENTRY = re.compile(r"^- \*\*(.+?)\.\*\* ", re.MULTILINE)


def test_the_page_is_current() -> None:
    """If this fails: uv run python -m beyond.classroom mistakes."""
    assert PAGE.read_text(encoding="utf-8") == build_page(PARTS)


def test_the_page_has_each_entry_in_its_part() -> None:
    page = PAGE.read_text(encoding="utf-8").replace("\\", "")
    assert HEADING.findall(page) == [part.name for part in PARTS]
    sections = HEADING.split(page)[2::2]
    assert sum(len(part.variants) for part in PARTS) >= 40
    for part, section in zip(PARTS, sections, strict=True):
        assert ENTRY.findall(section) == [variant.mistake.name for variant in part.variants]
        for variant in part.variants:
            assert variant.mistake.why in section
            assert variant.mistake.seen.rstrip(".") in section


def test_the_table_links_to_the_parts() -> None:
    """GitHub names a heading after its letters, in lower case and with hyphens for spaces."""
    assert anchor("Llama.forward") == "llamaforward"
    assert anchor("zero-shot scores") == "zero-shot-scores"
    links = re.findall(r"^\| \[.+?\]\(#(.+?)\)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert links == [anchor(part.name) for part in PARTS]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("x * cos - y * sin, head_dim ** -0.5", "x * cos - y * sin, head_dim ** -0.5"),
        ("_norm or p.add_(1)", "\\_norm or p.add\\_(1)"),
        ("<s> | `x`", "\\<s> \\| \\`x\\`"),
    ],
)
def test_markup_is_escaped(text: str, escaped: str) -> None:
    assert escape(text) == escaped


def test_the_places_are_files_of_the_assignment() -> None:
    places = [part.where for part in PARTS]
    places += [variant.mistake.where for part in PARTS for variant in part.variants]
    assert {
        place.split(",")[0] for place in places if not (ROOT / place.split(",")[0]).exists()
    } == (set())


def test_editions_and_remarks_are_marked() -> None:
    entries = [
        Mistake("adds a mask", "llama.py, Attention", "It is causal.", "Spring 2026", True),
        Mistake("returns a tuple", "llama.py, Attention", "It may.", is_note=True),
        Mistake("scales by dim", "llama.py, Llama", "Use head_dim.", "one public fork."),
    ]
    variants = tuple(Variant(entry, None) for entry in entries)
    part = Part("attention", "llama.py, Attention", None, variants, lambda _: {}, lambda _: None)
    page = build_page([part])
    assert "has 3 entries: 1 mistakes, 1 editions and 1 remarks" in page
    assert "| [attention](#attention) | `llama.py`, `Attention` | 3 |" in page
    assert "\n- **adds a mask.** *Edition.* It is causal. *Seen in: Spring 2026.*\n" in page
    assert "\n- **returns a tuple.** *Remark.* It may.\n" in page
    assert "\n- **scales by dim.** Use head_dim. In `llama.py`, `Llama`." in page


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "page.md"
    assert main(["mistakes", "--output", str(path)]) == 0
    assert path.read_text(encoding="utf-8") == build_page(PARTS)
    assert main(["mistakes", "--of", "x"]) == 2
    assert "error: unrecognized arguments: --of x" in capsys.readouterr().err
