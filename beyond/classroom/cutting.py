"""Cut functions and bodies out of Python source text; all other text stays as it is."""

import ast
from collections.abc import Iterable, Sequence

from beyond.classroom.todos import Todo

Definition = ast.FunctionDef | ast.ClassDef
LINE_LENGTH = 100  # as in pyproject.toml
TODO = "TODO: replace the error below with code for this."


def replace_once(text: str, old: str, new: str, file: str) -> str:
    """Replace a text that occurs exactly once.

    Raises:
        LookupError: it does not; `file` is named.
    """
    if (count := text.count(old)) != 1:
        raise LookupError(f"{file}: has {old!r} {count} times, expected once; see todos.py")
    return text.replace(old, new)


def find(source: str, name: str, file: str) -> Definition:
    """Return the function or class of a dotted name.

    Raises:
        LookupError: there is none; `file` is named.
    """
    body: Sequence[ast.stmt] = ast.parse(source).body
    for part in name.split("."):
        found = [node for node in body if isinstance(node, Definition) and node.name == part]
        if not found:
            raise LookupError(f"{file}: has no {name}; see todos.py")
        body = found[0].body
    return found[0]


def leave_to_student(source: str, todo: Todo) -> str:
    """Put the task and `raise NotImplementedError` in place of a function's body.

    The docstring stays, and so do the statements before the first use of a helper. A final
    `return NAME` stays if one of these statements sets NAME.

    Raises:
        LookupError: the function or a helper does not exist, or none of the helpers is used.
    """
    function = find(source, todo.name, todo.file)
    _, *statements = function.body  # the docstring comes first
    first = 0
    if todo.helpers:
        helpers = {helper.rpartition(".")[2] for helper in todo.helpers}
        users = [i for i, statement in enumerate(statements) if helpers & names_in(statement)]
        if not users:
            raise LookupError(f"{todo.file}: {todo.name} uses none of {todo.helpers}; see todos.py")
        first = users[0]
    kept, last = function.body[: first + 1], statements[-1]
    end = last.end_lineno or 0
    if isinstance(last, ast.Return) and isinstance(last.value, ast.Name):
        if last.value.id in {name for statement in kept for name in names_in(statement)}:
            end = last.lineno - 1
    indent = " " * last.col_offset
    task = [f"{indent}# {line}".rstrip() for line in (TODO, *todo.task.split("\n"))]
    lines = source.split("\n")
    lines[kept[-1].end_lineno or 0 : end] = [*task, f"{indent}raise NotImplementedError"]
    return drop_imports("\n".join(lines), used_in=source)


def take_out(source: str, name: str, file: str) -> str:
    """Take out a function, with its decorators and the comments and blank lines above it.

    Raises:
        LookupError: there is no such function.
    """
    node = find(source, name, file)
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    lines = source.split("\n")
    while lines[start - 1].lstrip().startswith("#"):
        start -= 1
    while not lines[start - 1]:
        start -= 1
    del lines[start : node.end_lineno]
    return drop_imports("\n".join(lines), used_in=source)


def turn_off(source: str, flags: Iterable[str]) -> str:
    """Turn fields that declare these flags into constants with the flags' defaults."""
    lines = source.split("\n")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.AnnAssign)]
    for node in sorted(nodes, key=lambda node: node.lineno, reverse=True):
        if ast.unparse(node.target) in flags and isinstance(node.value, ast.Call):
            target, type_, default = map(
                ast.unparse, (node.target, node.annotation, node.value.args[1])
            )
            text = f"{' ' * node.col_offset}{target}: ClassVar[{type_}] = {default}"
            lines[node.lineno - 1 : node.end_lineno] = [text]
    return drop_imports("\n".join(lines), used_in=source)


def drop_imports(source: str, used_in: str) -> str:
    """Drop the imported names that an earlier version of a source used, and this one does not."""
    unused = names_in(ast.parse(used_in)) - names_in(ast.parse(source))
    lines = source.split("\n")
    for node in reversed(ast.parse(source).body):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        kept = [alias for alias in node.names if (alias.asname or alias.name) not in unused]
        if len(kept) == len(node.names):
            continue
        start, end = node.lineno - 1, node.end_lineno or 0
        node.names = kept
        lines[start:end] = format_import(node) if kept else []
        if not kept and not lines[start - 1] and not lines[start]:
            del lines[start]  # one blank line is enough
    return "\n".join(lines)


def format_import(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Return the lines of an import statement."""
    line = ast.unparse(node)
    if len(line) <= LINE_LENGTH:
        return [line]
    head, _, names = line.partition(" import ")
    return [f"{head} import (", *(f"    {name}," for name in names.split(", ")), ")"]


def names_in(node: ast.AST) -> set[str]:
    """Return the names of variables, and of attributes, in a piece of code."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return names | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
