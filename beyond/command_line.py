"""The command line of `run_llama.py`: parsing, the defaults that depend on each other, and checks.

This module imports neither PyTorch nor NumPy, which take seconds, so that `--help` and mistakes are
answered at once.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, cast

from beyond.demo import data_files, demo_folder, stand_in_note
from beyond.options import (
    CHECKPOINT,
    TASKS,
    EvaluationOptions,
    FinetuneOptions,
    GenerateOptions,
    Options,
    PretrainOptions,
    TrainingOptions,
    as_tuple,
    flags_of,
    tasks_of,
)
from utils import (
    OneLineParser,
    check_readable,
    describe_error,
    is_text,
    prepare_output,
)

PROMPT = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. "
    "Keanu Reeves, playing the hero John Wick, is"
)


def answer_at_once() -> None:
    """End the program if its command line asks for help or has a mistake.

    Under torchrun all processes end. Only rank 0 prints, except that the first process of each
    machine also reports a file error, since the file may be missing on that machine only.
    """
    is_main = environment("RANK") == 0
    quiet = contextlib.nullcontext() if is_main else contextlib.redirect_stdout(io.StringIO())
    try:
        with quiet:  # --help prints and raises SystemExit
            check_files(get_args())
    except (ValueError, OSError) as error:
        is_first_of_machine = os.environ.get("LOCAL_RANK") == "0"
        if is_main or (isinstance(error, OSError) and is_first_of_machine):
            say(f"error: {describe_error(error)}")
        sys.exit(2)


def environment(name: str) -> int:
    """Return a number that torchrun sets for each process; 0 without torchrun."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0


def say(message: str) -> None:
    """Print a line on standard error, under torchrun with the rank."""
    rank = f"rank {environment('RANK')}: " if environment("WORLD_SIZE") > 1 else ""
    print(f"run_llama.py: {rank}{message}", file=sys.stderr)


# --------------------------------------------------------------------------------------- parsing


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of all flags; it stores only those that are given."""
    parser = OneLineParser(
        prog="run_llama.py",
        description="Llama 2: generate text, classify it zero-shot, or fine-tune a classifier.",
        epilog="Flags may be written with - or _ inside.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups: dict[tuple[str, ...], Any] = {}
    for options in TASKS.values():
        for f in fields(options):
            if "flag" not in f.metadata or options is not TASKS[tasks_of(f.name)[0]]:
                continue  # not a flag, or added already
            tasks, declared = tasks_of(f.name), f.metadata["flag"]
            if tasks not in groups:
                title = "every task" if len(tasks) == len(TASKS) else ", ".join(tasks)
                groups[tasks] = parser.add_argument_group(title)
            is_constant = not any(f.default is value for value in (MISSING, None, False, ()))
            default = f" (default: {f.default})" if is_constant else ""
            groups[tasks].add_argument(
                f"--{declared.spelling or f.name}",
                dest=f.name,
                help=(declared.help + default).replace("%", "%%"),
                **declared.parsing,
            )
    return parser


def parse(argv: Sequence[str]) -> dict[str, Any]:
    """Parse the words of a command line into the options that are given.

    Raises:
        ValueError: an argument is unknown, out of bounds, or not for this task.
    """
    parser = build_parser()
    # A flag may be written with - or _ inside.
    known = {word.replace("_", "-"): word for word in parser._option_string_actions}
    words = []
    for word in argv:
        if not is_text(word):
            raise ValueError(f"the argument {word!r} is not UTF-8 text")
        name, equals, value = word.partition("=")
        words.append(known.get(name.replace("_", "-"), name) + equals + value)
    given = vars(parser.parse_args(words))
    task = given.get("option", "generate")
    for name in given:
        if name not in flags_of(TASKS[task]):
            raise ValueError(f"--{name} is for --option {', '.join(tasks_of(name))} only")
    return given


def get_args(argv: Sequence[str] | None = None) -> Options:
    """Return the options of a command line (None: the program's), complete and checked.

    Raises:
        ValueError: an argument is unknown, out of bounds, or not for this task, or two contradict
            each other.
    """
    values = parse(sys.argv[1:] if argv is None else argv)
    task = values.get("option", "generate")
    notes = [*fill_in_model(values), *(fill_in_data(values, task) if task != "generate" else [])]
    if task == "generate":
        fill_in_generation(values)
    elif task == "pretrain":
        fill_in_pretraining(values)
    else:
        fill_in_evaluation(values, task)
    return TASKS[task](**values, notes=tuple(notes))


def fill_in_model(values: dict[str, Any]) -> list[str]:
    """Fill in the checkpoint and its tokenizer; returns notes on what the demo stands in for.

    Raises:
        ValueError: the flags contradict each other.
    """
    notes = []
    given_sizes = [name for name in PretrainOptions.shape_names if name in values]
    if given_sizes:
        if "pretrained_model_path" in values:
            raise ValueError(
                f"--{given_sizes[0]} starts a new model, --pretrained-model-path trains an old "
                "one further; leave one of them out"
            )
        if "tokenizer_path" not in values:
            raise ValueError("a new model needs a tokenizer; name one with --tokenizer_path")
        values["pretrained_model_path"] = None
    elif "pretrained_model_path" not in values:
        values["pretrained_model_path"] = CHECKPOINT
        if not Path(CHECKPOINT).exists():
            values["pretrained_model_path"] = str(demo_folder() / "model.pt")
            notes.append(stand_in_note(CHECKPOINT, values["pretrained_model_path"]))
    if "tokenizer_path" not in values:
        beside = Path(values["pretrained_model_path"]).with_name("tokenizer.model")
        values["tokenizer_path"] = str(beside)
    return notes


def fill_in_data(values: dict[str, Any], task: str) -> list[str]:
    """Fill in the data files; returns notes on what the demo stands in for.

    Raises:
        ValueError: several files are given, and the task takes one.
    """
    notes = []
    # data_files has the same names for every data set.
    names = [name for name in data_files("cfimdb") if name in flags_of(TASKS[task])]
    if not any(name in values for name in ("dataset", *names)):
        needed = [name for name in names if name in TASKS[task].reads]
        files = data_files("cfimdb")
        missing = [files[name] for name in needed if not Path(files[name]).exists()]
        if missing:
            values["dataset"] = "demo"
            notes.append(stand_in_note(missing[0], str(demo_folder())))
    for name, path in data_files(values.get("dataset", "cfimdb")).items():
        if name in names:
            values.setdefault(name, path)
    for name in names:
        paths = as_tuple(values[name]) if isinstance(values[name], str) else tuple(values[name])
        if task != "pretrain" and len(paths) > 1:
            raise ValueError(
                f"--{name} {' '.join(paths[:2])}: only pretrain takes more than one file"
            )
        # PretrainOptions takes a tuple of files, the other tasks take one file.
        values[name] = paths if task == "pretrain" else paths[0]
    # Without --dataset, results are named after the dev file.
    values.setdefault("dataset", Path(as_tuple(values["dev"])[0]).stem.removesuffix("-dev"))
    return notes


def fill_in_generation(values: dict[str, Any]) -> None:
    """Fill in the prompt, the dtype and the output files."""
    values["prompt"] = tuple(values.get("prompt", (PROMPT,)))
    values.setdefault("dtype", "bfloat16" if "quantize" in values else "float32")
    beginning = "output/task_1/generated-sentence-temp"
    high = values.get("temperature") or 1.0
    values.setdefault("generated_sentence_low_temp_out", f"{beginning}-0.txt")
    values.setdefault("generated_sentence_high_temp_out", f"{beginning}-{high:g}.txt")


def fill_in_evaluation(values: dict[str, Any], task: str) -> None:
    """Fill in dtype, learning rate and results of prompting or fine-tuning."""
    options = cast(type[EvaluationOptions], TASKS[task])
    values.setdefault("dtype", "float32")
    folder, dataset = options.results_folder, values["dataset"]
    for split in ("dev", "test"):
        values.setdefault(f"{split}_out", f"{folder}/{dataset}-{options.ending(split)}")
    if task == "finetune":
        lr = values.setdefault("lr", 2e-5)
        epochs = values.get("epochs", FinetuneOptions.epochs)
        values.setdefault("filepath", f"output/task_3/{dataset}-finetune-{epochs}-{lr}.pt")


def fill_in_pretraining(values: dict[str, Any]) -> None:
    """Fill in mode, dtype, learning rate and result of pretraining."""
    values.setdefault("causal", True)
    values.setdefault("dtype", None)
    lr = values.setdefault("lr", 1e-4 if values["pretrained_model_path"] else 1e-3)
    epochs = values.get("epochs", PretrainOptions.epochs)
    values.setdefault("filepath", f"output/pretrain/{values['dataset']}-{epochs}-{lr}/model.pt")


# ----------------------------------------------------------------------------------------- files


def check_files(options: Options) -> None:
    """Check, before any work, that all inputs exist and all outputs can be written.

    Under torchrun only the main process writes, so only that one checks the outputs.

    Raises:
        OSError: for the first file that is missing or cannot be written.
        ValueError: generate runs under torchrun, a dev file is a training file, or the training
            checkpoint of an unfinished run exists.
    """
    if isinstance(options, GenerateOptions) and environment("WORLD_SIZE") > 1:
        raise ValueError("--option generate runs in one process; start it without torchrun")
    for path in options.input_files:
        check_readable(path)
    if isinstance(options, PretrainOptions):
        check_held_out(options.train, options.dev)
    if isinstance(options, TrainingOptions):
        for checkpoint in options.training_checkpoints:
            if checkpoint.exists() and not options.resume:
                raise ValueError(
                    f"{checkpoint}: is the training checkpoint of an interrupted run; resume the "
                    "run with --resume, or delete the file to start again"
                )
    if environment("RANK") == 0:
        for path in options.output_files:
            prepare_output(path)


def check_held_out(train: Sequence[str], dev: Sequence[str]) -> None:
    """Raise ValueError if a dev file is a training file too."""
    for path in dev:
        if any(os.path.samefile(path, other) for other in train):
            raise ValueError(
                f"--dev {path}: is also a training file; its loss would not be a held-out loss"
            )
