"""Tools for students and teachers.

    uv run python -m beyond.classroom COMMAND ...

Each command is a module of this package with `main(argv)`, which returns the exit status; it is
imported only when it is used. `COMMAND --help` describes the command.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from utils import OneLineParser, describe_error

COMMANDS = {  # the name of the module, and what it does
    "starter": "write the assignment's skeleton, made from this project's sources",
    "submission": "check the files that are handed in, and pack them",
    "tour": "write docs/tour.md, which follows one sentence through the demo model",
    "mistakes": "write docs/mistakes.md, the mistakes that the checker knows",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (None: the program's); returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = OneLineParser(
        prog="python -m beyond.classroom",
        description=(__doc__ or "").split("\n")[0],
        epilog="commands: " + "; ".join(f"{name}: {text}" for name, text in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS, help="the tool; COMMAND --help describes it")
    try:
        command = parser.parse_args(words[:1]).command
        return import_module(f"beyond.classroom.{command}").main(words[1:])
    except (ValueError, OSError) as error:
        print(f"beyond.classroom: error: {describe_error(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("beyond.classroom: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
