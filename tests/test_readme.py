"""The English and the Japanese README name the same commands, flags, figures and files."""

import re
import shlex
from collections import Counter

import pytest

from tests.conftest import ROOT

FOLDER = ROOT  # the folder of both READMEs
NAMES = ("README.md", "README.ja.md")
FLAG = re.compile(r"--[a-z][a-z0-9_-]*")
FIGURE = re.compile(r"(?<![A-Za-z0-9_.])\d*\.\d+(?![A-Za-z0-9_.])")  # .414 or 0.460
LINK = re.compile(r"!?\[[^]]*\]\(\s*<?([^)\s>]+)|<[^>]*\b(?:src|href|srcset)=[\"']([^\"']+)")
WEB = re.compile(r"[a-z][a-z0-9+.-]*:")  # https:, mailto:


def read(name: str) -> str:
    """Read a README."""
    return (FOLDER / name).read_text(encoding="utf-8")


def commands_of(text: str) -> list[list[str]]:
    """Return the words of each command in the bash blocks, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def tables_of(text: str) -> list[str]:
    """Return the rows of all tables."""
    return [line for line in text.splitlines() if line.startswith("|")]


def flag_table_of(text: str) -> list[str]:
    """Return the rows of the flag table, with the names of the tasks as the first row."""
    rows = tables_of(text)
    places = [i for i, row in enumerate(rows) if row.startswith("| `--")]
    assert places, "found no row of a flag"
    header = rows[places[0] - 2].split("|", 2)[2]  # without its first cell, which is translated
    return [header, *(rows[i] for i in places)]


def figures_of(text: str) -> Counter[str]:
    """Count the figures in all tables."""
    return Counter(FIGURE.findall("\n".join(tables_of(text))))


def paths_of(text: str) -> list[str]:
    """Return the paths in the repository that a text links to or shows as images."""
    targets = [markdown or html for markdown, html in LINK.findall(text)]
    paths = [target.split("#")[0] for target in targets if not WEB.match(target)]
    return [path for path in paths if path]


def test_readmes_name_the_same_commands() -> None:
    english, japanese = map(commands_of, map(read, NAMES))
    assert len(english) > 20
    assert japanese == english


def test_readmes_name_the_same_flags() -> None:
    english, japanese = (set(FLAG.findall(read(name))) for name in NAMES)
    assert len(english) > 50
    assert japanese == english


def test_readmes_have_the_same_flag_table() -> None:
    english, japanese = map(flag_table_of, map(read, NAMES))
    assert len(english) > 45
    assert japanese == english


def test_readmes_have_the_same_figures() -> None:
    english, japanese = map(figures_of, map(read, NAMES))
    assert english.total() > 12
    assert japanese == english


@pytest.mark.parametrize("name", NAMES)
def test_paths_of_a_readme_exist(name: str) -> None:
    paths = paths_of(read(name))
    assert len(paths) >= 2  # its pictures
    assert [path for path in paths if not (FOLDER / path).exists()] == []
