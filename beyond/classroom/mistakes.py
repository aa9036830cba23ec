"""The catalogue of mistakes as a page, `docs/mistakes.md`.

The page is written from the checker's own parts, so it cannot disagree with the checker.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from beyond.classroom.part import Mistake, Part
from beyond.classroom.parts import PARTS
from utils import OneLineParser, open_atomically, prepare_output

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "mistakes.md"
INTRODUCTION = """# The catalogue of mistakes

The checker knows these mistakes and names them when it finds one:

```bash
uv run python sanity_check.py --of FOLDER
```

**How it decides.** Each part of the assignment is examined alone. What the part calls is replaced
by this project's own code, and it gets this project's inputs and weights. So an error in RoPE does
not make attention look wrong. The part is run on fixed inputs, the *probes*. So are this project's
own part, and a wrong variant of it for each entry below.

| the part's values | the report says |
|---|---|
| those of this project's own part | `ok`, whatever the code looks like |
| those of a wrong variant | `mistake`, and the entry below |
| those of two or three mistakes together | `mistake`, and each entry, if it recognises them |
| others | `wrong`: where the difference is largest, and which variant is closest |
| none, because it is not written yet | `todo` |

Any two entries of a part differ clearly on the probes (a test makes sure), so only one can fit.
Sampling is compared by frequencies instead of values.

**Two kinds of entries are not mistakes.** An *edition* is right in another year of the course and
counts as right. A *remark* differs from the course's own code, but the course's checks accept it:
the part is `ok`, with the remark beside it.

"""


def main(argv: Sequence[str]) -> int:
    """Run the command `mistakes`; returns the exit status.

    Raises:
        ValueError, OSError: a bad argument, or the page cannot be written.
    """
    parser = OneLineParser(
        prog="python -m beyond.classroom mistakes",
        description="Write the page of the mistakes that the checker knows.",
    )
    parser.add_argument(
        "--output", type=Path, default=PAGE, help="the page (default: docs/mistakes.md)"
    )
    path = parser.parse_args(argv).output
    prepare_output(path)
    with open_atomically(path) as file:
        file.write(build_page(PARTS))
    print(f"Wrote {path}.")
    return 0


def build_page(parts: Sequence[Part]) -> str:
    """Write the page: the introduction, a table of the parts, and the entries of each part."""
    entries = [variant.mistake for part in parts for variant in part.variants]
    editions = sum(entry.is_edition for entry in entries)
    remarks = sum(entry.is_note for entry in entries)
    count = (
        f"The catalogue has {len(entries)} entries: {len(entries) - editions - remarks} mistakes, "
        f"{editions} editions and {remarks} remarks.\n\n"
    )
    rows = [
        f"| [{part.name}](#{anchor(part.name)}) | {code(part.where)} | {len(part.variants)} |"
        for part in parts
    ]
    table = "\n".join(["| part | where | entries |", "|---|---|---|", *rows])
    return INTRODUCTION + count + table + "\n" + "".join(map(describe_part, parts))


def describe_part(part: Part) -> str:
    """Write the section of a part: a list of its entries."""
    entries = "\n".join(describe_entry(variant.mistake, part.where) for variant in part.variants)
    return f"\n## {part.name}\n\nIn {code(part.where)}.\n\n{entries}\n"


def describe_entry(entry: Mistake, where: str) -> str:
    """Write an entry; its place only if that is another one than the part's."""
    kind = "*Edition.* " * entry.is_edition + "*Remark.* " * entry.is_note
    text = f"- **{escape(entry.name)}.** {kind}{escape(entry.why)}"
    if entry.where != where:
        text += f" In {code(entry.where)}."
    if entry.seen:
        text += f" *Seen in: {escape(entry.seen.rstrip('.'))}.*"
    return text


def escape(text: str) -> str:
    """Escape what Markdown would take for markup; underscores inside a name are none."""
    return re.sub(r"[\\`<|]|(?<!\w)[_*](?=\w)|(?<=\w)[_*](?!\w)", r"\\\g<0>", text)


def anchor(title: str) -> str:
    """Return the name by which a page of GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def code(where: str) -> str:
    """Write a place in the program, such as "rope.py, apply_rotary_emb", as code."""
    return ", ".join(f"`{word}`" for word in where.split(", "))
