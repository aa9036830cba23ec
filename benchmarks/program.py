"""How the programs of this folder end: with an exit status, and one line if something is wrong."""

import sys
from collections.abc import Callable

from beyond.interrupts import Interrupted, signals_raise
from utils import describe_error


def exit_status(program: str, consequence: str, work: Callable[[], int]) -> int:
    """Do the work of a command line; an error or an interruption is one line on standard error.

    Args:
        program: how it was called.
        consequence: of an interruption, for the user.
        work: reads the command line, does what it says, and returns the exit status.

    Returns:
        The exit status: that of the work; 2 after an error; 128 + the signal's number after SIGINT
        or SIGTERM.
    """
    try:
        with signals_raise():
            return work()
    except Interrupted as interrupt:
        print(f"{program}: interrupted; {consequence}", file=sys.stderr)
        return 128 + interrupt.number
    except (ValueError, OSError) as error:
        print(f"{program}: error: {describe_error(error)}", file=sys.stderr)
        return 2
