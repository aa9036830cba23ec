"""The template of the tour's page.

Its places are:

    {{name}}                   a text from the run
    {{link module.Class.f}}    the name of a function, linked to its file
    {{code module.Class.f}}    its source, without the docstring
"""

import ast
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent.parent


def fill(template: str, places: dict[str, str]) -> str:
    """Fill in the places of a template; raises KeyError for one that is not known."""
    kinds: dict[str, Callable[[str], str]] = {"link": link, "code": source}

    def text_of(match: re.Match[str]) -> str:
        kind, _, symbol = match[1].partition(" ")
        return kinds[kind](symbol) if symbol else places[kind]

    return re.sub(r"\{\{(.+?)\}\}", text_of, template)


def link(symbol: str) -> str:
    """Return a link to the file of a function, such as llama.RMSNorm.norm, under its name."""
    module, _, name = symbol.partition(".")
    find(symbol)
    return f"[`{name}`](../{module}.py)"


def source(symbol: str) -> str:
    """Return the source of a function without its docstring."""
    text, node = find(symbol)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    docstring = node.body[0]
    if ast.get_docstring(node) is not None:
        del lines[docstring.lineno - first : (docstring.end_lineno or 0) - first + 1]
    return textwrap.dedent("\n".join(lines))


def find(symbol: str) -> tuple[str, ast.FunctionDef]:
    """Find a function by its name, such as llama.RMSNorm.norm; returns its file's text and itself.

    Raises:
        LookupError: there is none of this name.
    """
    module, *names = symbol.split(".")
    text = (ROOT / f"{module}.py").read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for name in names:
        children = getattr(node, "body", [])
        found = [child for child in children if getattr(child, "name", None) == name]
        if not found:
            raise LookupError(f"{symbol}: {module}.py has no {name}")
        node = found[0]
    assert isinstance(node, ast.FunctionDef), symbol
    return text, node
