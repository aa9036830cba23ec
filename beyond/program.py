"""From a command line to an exit status: signals, processes, and errors in one line."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from beyond.command_line import check_files, say
from beyond.interrupts import Interrupted, signals_raise
from beyond.options import FinetuneOptions, ModelOptions, Options, TrainingOptions
from beyond.processes import end_processes, is_lost_process, is_main_process, start_processes
from beyond.reports import print_next_commands
from beyond.runtime import is_compiler_error, is_out_of_memory, require_determinism, resolve_device
from utils import describe_error, lock_results


def run_program(get_options: Callable[[], Options], task: Callable[[Options], None]) -> int:
    """Run a task and report its errors.

    Args:
        get_options: reads the command line.
        task: called with the options, after the checks that need no model.

    Returns:
        The exit status: 0; 1 if another process is lost; 2 after an error; 128 + the signal's
        number after SIGINT or SIGTERM.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Line by line, so that a log file shows a run's progress. Characters that the terminal
        # cannot show are escaped.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    options = None
    with signals_raise():
        try:
            options = get_options()
            with started(options):
                task(options)
                print_next_commands(options)
            end_processes()
        except Interrupted as interrupt:
            if is_main_process():
                say("interrupted" + resume_hint(options))
            return 128 + interrupt.number
        except (ValueError, OSError) as error:
            say(f"error: {describe_error(error)}")
            return 2
        except Exception as error:
            if is_out_of_memory(error):
                say(f"error: {memory_advice(options)}")
                return 2
            if is_compiler_error(error):
                reason = str(error).split("\n")[0]
                say(
                    f"error: --compile: {reason}; install a C++ compiler such as g++, or leave "
                    "--compile out"
                )
                return 2
            if is_lost_process(error):
                say(f"error: lost another process: {describe_error(error)}")
                return 1
            raise
    return 0


def exit_status(program: str, work: Callable[[], int], consequence: str = "") -> int:
    """Do the work of a small program, and report its errors.

    Args:
        program: how it was called.
        work: reads the command line, does what it says, and returns the exit status.
        consequence: what the user should know after an interruption; may be empty.

    Returns:
        The exit status: that of the work; 2 after an error; 128 + the signal's number after SIGINT
        or SIGTERM.
    """
    with signals_raise():
        try:
            return work()
        except Interrupted as interrupt:
            text = f"interrupted; {consequence}" if consequence else "interrupted"
            print(f"{program}: {text}", file=sys.stderr)
            return 128 + interrupt.number
        except (ValueError, OSError) as error:
            print(f"{program}: error: {describe_error(error)}", file=sys.stderr)
            return 2
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            print(f"{program}: error: out of memory", file=sys.stderr)
            return 2


@contextmanager
def started(options: Options) -> Iterator[None]:
    """Check device and files, join torchrun's processes, lock the results, and print the notes."""
    resolve_device(options.use_gpu)
    check_files(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    start_processes(options.use_gpu)
    if isinstance(options, ModelOptions) and options.deterministic:
        require_determinism()
    with lock_results(options.results if is_main_process() else (), note):
        if is_main_process():
            for text in (*options.notes, *replaced_files(options)):
                note(text)
        yield


def replaced_files(options: Options) -> list[str]:
    """Return a note that names the results that exist and will be replaced, if there are any."""
    outputs = options.output_files
    if isinstance(options, FinetuneOptions) and options.seeds:
        outputs = tuple(path for run in options.per_seed() for path in run.output_files)
    existing = [path for path in outputs if Path(path).exists()]
    if not existing or (isinstance(options, TrainingOptions) and options.resume):
        return []
    return [f"replaces {', '.join(existing)}"]


def note(text: str) -> None:
    """Print a note on standard error."""
    say(f"note: {text}")


def resume_hint(options: Options | None) -> str:
    """Return how to resume, to be added to a message; empty if nothing can be resumed."""
    if not isinstance(options, TrainingOptions):
        return ""
    files = list(options.training_checkpoints)
    if isinstance(options, FinetuneOptions) and options.seeds:
        files.append(options.seeds_file)
    if not any(path.exists() for path in files):
        return ""
    return "; the same command with --resume continues where it stopped"


def memory_advice(options: Options | None) -> str:
    """Return what to do about too little memory."""
    if isinstance(options, TrainingOptions):
        return "out of memory; compute fewer rows at a time with --micro_batch_size"
    return "out of memory; try a smaller --batch_size"
