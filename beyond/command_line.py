"""The command line of `run_llama.py`: parsing, the defaults that depend on each other, and checks.

This module imports neither PyTorch nor NumPy, which take seconds, so that `--help` and mistakes are
answered at once.
"""

import argparse
import contextlib
import io
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, cast

from beyond.demo import EPOCHS, LEARNING_RATE, data_files, demo_folder, stand_in_note
from beyond.formats.files import default_tokenizer
from beyond.methods.options import MethodOptions
from beyond.methods.recipes import RECIPES, RULED
from beyond.options import (
    CHECKPOINT,
    TASKS,
    ClassifyOptions,
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
    lock_results,
    prepare_output,
)

TOKENIZER = "tokenizer.model"
# Options that name a model, data or results.
FILE_OPTIONS = (
    *("dataset", "train", "dev", "test", "label_names", "dev_out", "test_out", "filepath"),
    *("pretrained_model_path", "tokenizer_path", *PretrainOptions.shape_names),
    *("generated_sentence_low_temp_out", "generated_sentence_high_temp_out"),
)
PROMPT = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. "
    "Keanu Reeves, playing the hero John Wick, is"
)


def answer_at_once() -> None:
    """End the program if its command line asks for help or has a mistake.

    First it opens closed standard streams, and lets Ctrl-C end the program with one line.

    Under torchrun all processes end. Only rank 0 prints, except that the first process of each
    machine also reports a file error, since the file may be missing on that machine only.
    """
    open_closed_streams()
    answer_interrupts()
    is_main = environment("RANK") == 0
    quiet = contextlib.nullcontext() if is_main else contextlib.redirect_stdout(io.StringIO())
    try:
        with quiet:  # --help prints and raises SystemExit
            options = get_args()
            check_files(options)
    except (ValueError, OSError) as error:
        is_first_of_machine = os.environ.get("LOCAL_RANK") == "0"
        if is_main or (isinstance(error, OSError) and is_first_of_machine):
            say(f"error: {describe_error(error)}")
        else:
            time.sleep(1)  # torchrun stops all processes after the first; let that print its line
        sys.exit(2)
    if options.threads is not None:
        set_blas_threads(options.threads)


def set_blas_threads(threads: int) -> None:
    """Let NumPy's BLAS use so many threads; NumPy must not have been imported yet.

    `NumpyStep` computes with it. By default it has one for each core, as PyTorch has.
    """
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        os.environ[name] = str(threads)


def open_closed_streams() -> None:
    """Connect each standard stream that is closed (as by `2>&-`) to the null device.

    Otherwise the next file that is opened would get its number, and messages of C++ code would go
    into that file.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is given to a new file: this one, since they come in order.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))


def answer_interrupts() -> None:
    """Let Ctrl-C end the program with one line and status 130, until other handlers are set."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end_on_interrupt)


def _end_on_interrupt(number: int, _: object) -> None:
    if environment("RANK") == 0:
        say("interrupted")
    os._exit(128 + number)


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
        description="Llama 2: generate text, classify it zero-shot, train a classifier and use it.",
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
            default = f" (default: {declared.words(f.name, f.default)[-1]})" if is_constant else ""
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
            each other, or one is missing.
    """
    words = sys.argv[1:] if argv is None else argv
    values, command = parse(words), shlex.join(["run_llama.py", *words])
    task = values.get("option", "generate")
    if task == "classify":
        fill_in_classification(values)
        return ClassifyOptions(**values, command=command)
    notes = choose_demo(values, task)
    fill_in_model(values)
    if task != "generate":
        fill_in_data(values, task)
    if task == "generate":
        fill_in_generation(values, is_demo=bool(notes))
    elif task == "pretrain":
        fill_in_pretraining(values)
    else:
        if task == "finetune":
            notes += fill_in_recipe(values)
        fill_in_evaluation(values, task)
    return TASKS[task](**values, notes=notes, command=command)


def choose_demo(values: dict[str, Any], task: str) -> tuple[str, ...]:
    """Fill in the whole demo if no file is named and a default file is missing.

    Also fills in the demo's model if `--dataset demo` is given without a model. The demo's model is
    fine-tuned on the demo's reviews with a learning rate and epochs of its own.

    Returns:
        A note that the demo stands in; empty if it does not.
    """
    demo_model = str(demo_folder() / "model.pt")
    if any(name in values for name in FILE_OPTIONS):
        has_model = "pretrained_model_path" in values or new_model_flags(values)
        if values.get("dataset") == "demo" and not has_model:
            values["pretrained_model_path"] = demo_model
            fill_in_demo_training(values, task)
        return ()
    data = data_files("cfimdb")
    defaults = [CHECKPOINT, TOKENIZER, *(data[name] for name in data if name in TASKS[task].reads)]
    missing = [path for path in defaults if not Path(path).exists()]
    if not missing:
        return ()
    values["pretrained_model_path"] = demo_model
    if task != "generate":
        values["dataset"] = "demo"
    fill_in_demo_training(values, task)
    return (stand_in_note(missing[0]),)


def fill_in_demo_training(values: dict[str, Any], task: str) -> None:
    """Fill in the demo's own learning rate and epochs, unless a recipe sets them."""
    if task == "finetune" and "recipe" not in values:
        values.setdefault("lr", LEARNING_RATE)
        values.setdefault("epochs", EPOCHS)


def new_model_flags(values: dict[str, Any]) -> list[str]:
    """Return the flags that are given and ask for a new model."""
    return [name for name in PretrainOptions.shape_names if name in values]


def fill_in_model(values: dict[str, Any]) -> None:
    """Fill in the checkpoint and its tokenizer.

    Raises:
        ValueError: the flags contradict each other.
    """
    if sizes := new_model_flags(values):
        if "pretrained_model_path" in values:
            raise ValueError(
                f"--{sizes[0]} starts a new model, --pretrained-model-path trains an old one "
                "further; leave one of them out"
            )
        if "tokenizer_path" not in values:
            raise ValueError("a new model needs a tokenizer; name one with --tokenizer_path")
        values["pretrained_model_path"] = None
        return
    path = values.setdefault("pretrained_model_path", CHECKPOINT)
    if "tokenizer_path" not in values:
        values["tokenizer_path"] = default_tokenizer(path)


def fill_in_data(values: dict[str, Any], task: str) -> None:
    """Fill in the data files.

    Raises:
        ValueError: several files are given, and the task takes one.
    """
    # data_files has the same names for every data set.
    names = [name for name in data_files("cfimdb") if name in flags_of(TASKS[task])]
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
    # Without --dataset, results are named after a data file.
    split = "train" if task == "pretrain" else "dev"
    stem = Path(as_tuple(values[split])[0]).stem
    values.setdefault("dataset", stem.removesuffix(f"-{split}"))


def fill_in_generation(values: dict[str, Any], is_demo: bool) -> None:
    """Fill in the prompt, the dtype and the output files."""
    values["prompt"] = tuple(values.get("prompt", (PROMPT,)))
    values.setdefault("dtype", "bfloat16" if "quantize" in values else "float32")
    beginning = f"output/task_1/{'demo-' if is_demo else ''}generated-sentence-temp"
    high = values.get("temperature") or 1.0
    values.setdefault("generated_sentence_low_temp_out", f"{beginning}-0.txt")
    values.setdefault("generated_sentence_high_temp_out", f"{beginning}-{high:g}.txt")


def fill_in_recipe(values: dict[str, Any]) -> tuple[str, ...]:
    """Fill in the flags of a recipe that are not given.

    A flag of the recipe that contradicts those that are given is left out.

    Returns:
        A note for each flag that is left out.

    Raises:
        ValueError: the flags that are given contradict each other.
    """
    recipe = values.get("recipe")
    if recipe is None:
        return ()
    given = set(values)
    own = {f.name for f in fields(MethodOptions)}
    method = {name: value for name, value in values.items() if name in own}
    check_given(method, {name: RECIPES[recipe][name] for name in own & RECIPES[recipe].keys()})
    notes = []
    for name, value in RECIPES[recipe].items():
        if name in values:
            continue
        if name in own:
            try:
                MethodOptions(**method, **{name: value}).check_method()
            except ValueError:
                notes.append(
                    f"--recipe {recipe}: leaves out --{name}, as other flags contradict it"
                )
                continue
            method[name] = value
        values[name] = value
    # The rule sets what has no value yet, and may change what the recipe has just set.
    left = [name for name in RULED if name not in values or name in RECIPES[recipe]]
    values["left_to_rule"] = tuple(name for name in left if name not in given)
    return tuple(notes)


def check_given(method: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Raise ValueError if the flags that are given contradict each other, even with a recipe's."""
    try:
        MethodOptions(**method).check_method()
    except ValueError as error:
        with contextlib.suppress(ValueError):  # the recipe may have what a flag needs
            MethodOptions(**{**recipe, **method}).check_method()
            return
        raise error


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
        # The rate and the epochs of a recipe are not known yet.
        kind = values.get("recipe") or f"{epochs}-{lr}"
        values.setdefault("filepath", f"output/task_3/{dataset}-finetune-{kind}.pt")


def fill_in_pretraining(values: dict[str, Any]) -> None:
    """Fill in mode, dtype, learning rate and result of pretraining."""
    values.setdefault("causal", True)
    values.setdefault("dtype", None)
    lr = values.setdefault("lr", 1e-4 if values["pretrained_model_path"] else 1e-3)
    epochs = values.get("epochs", PretrainOptions.epochs)
    values.setdefault("filepath", f"output/pretrain/{values['dataset']}-{epochs}-{lr}/model.pt")


def fill_in_classification(values: dict[str, Any]) -> None:
    """Fill in the dtype; `-` names standard input or output.

    Raises:
        ValueError: no classifier is named.
    """
    if "filepath" not in values:
        raise ValueError(
            "--option classify needs a classifier; name one with --filepath, such as the "
            "checkpoint that --option finetune has written to output/task_3/"
        )
    values.setdefault("dtype", "float32")
    for name in ("input", "output"):
        if values.get(name) == "-":
            del values[name]


# ----------------------------------------------------------------------------------------- files


def check_files(options: Options) -> None:
    """Check, before any work, that all inputs exist and all outputs can be written.

    Under torchrun only the main process writes, so only that one checks the outputs.

    Raises:
        OSError: for the first file that is missing, cannot be written, or is being written by
            another process.
        ValueError: generate or classify runs under torchrun, training would read a pipe, a dev file
            is a training file, the result is an input, or the training checkpoint of an unfinished
            run exists.
    """
    if isinstance(options, GenerateOptions | ClassifyOptions) and environment("WORLD_SIZE") > 1:
        raise ValueError(
            f"--option {options.option} runs in one process; start it without torchrun"
        )
    for path in options.input_files:
        try:
            check_readable(path)
        except FileNotFoundError:
            if (advice := advise_on_missing(path)) is None:
                raise
            raise FileNotFoundError(f"{path}: no such file; {advice}") from None
        if isinstance(options, TrainingOptions) and Path(path).is_fifo():
            raise ValueError(
                f"{path}: is a pipe, which can be read only once; training reads its files more "
                "than once, so give a file"
            )
    if isinstance(options, PretrainOptions):
        check_held_out(options.train, options.dev)
    if isinstance(options, ClassifyOptions):
        check_not_an_input(options)
    if environment("RANK") == 0:
        for path, record in options.records.items():
            prepare_output(path)
            prepare_record(record, path, options.output_files)
        with lock_results(options.results, lambda note: None):
            pass  # only a check: program.py locks them for the whole run
    if isinstance(options, TrainingOptions):
        for checkpoint in options.training_checkpoints:
            if checkpoint.exists() and not options.resume:
                raise ValueError(
                    f"{checkpoint}: is the training checkpoint of an interrupted run; resume the "
                    "run with --resume, or delete the file to start again"
                )


def advise_on_missing(path: str) -> str | None:
    """Return how to get one of the course's files, or a tokenizer; None for another file."""
    course = {CHECKPOINT, TOKENIZER, *data_files("sst").values(), *data_files("cfimdb").values()}
    if path not in course:
        is_tokenizer = Path(path).name == TOKENIZER
        return "name the model's tokenizer with --tokenizer_path" if is_tokenizer else None
    advice = "get it with: uv run python data/download.py"
    if path in (CHECKPOINT, TOKENIZER):
        advice += f"; or use the demo's model: --pretrained-model-path {demo_folder()}/model.pt"
    return advice


def prepare_record(record: str, result: str, results: Sequence[str]) -> None:
    """Raise unless the record of a result can be written, and replaces nothing but a record.

    Raises:
        OSError: it cannot be written.
        ValueError: a file of this name is another result, or exists and is not a record.
    """
    prepare_output(record)
    is_result = os.path.realpath(record) in map(os.path.realpath, results)
    if is_result or (Path(record).exists() and not is_record(record)):
        raise ValueError(
            f"{record}: the record of {result} would replace this file; choose another name for "
            "the result"
        )


def is_record(path: str) -> bool:
    """Return whether a file is the record of a result."""
    if Path(path).stat().st_size > 1_000_000:
        return False
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= {"result", "command", "version"}


def check_not_an_input(options: ClassifyOptions) -> None:
    """Raise ValueError if the result would replace a file that is read."""
    for path in options.output_files:
        for other in options.input_files:
            if os.path.realpath(path) == os.path.realpath(other):
                raise ValueError(f"--output {path}: is also an input; choose another name")


def check_held_out(train: Sequence[str], dev: Sequence[str]) -> None:
    """Raise ValueError if a dev file is a training file too."""
    for path in dev:
        if any(os.path.samefile(path, other) for other in train):
            raise ValueError(
                f"--dev {path}: is also a training file; its loss would not be a held-out loss"
            )
