"""The command line: parsing, defaults, the demo's stand-in, and quick answers to every mistake."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from beyond import command_line
from beyond.command_line import build_parser, get_args
from beyond.options import (
    TASK_NAMES,
    EvaluationOptions,
    FinetuneOptions,
    GenerateOptions,
    PretrainOptions,
    PromptOptions,
    TrainingOptions,
)
from tests.conftest import ROOT
from tests.test_run_llama import FINETUNE, PROMPT, run
from utils import describe_error

PRETRAIN = ["--option", "pretrain"]


def evaluation_args(argv: list[str]) -> EvaluationOptions:
    args = get_args(argv)
    assert isinstance(args, EvaluationOptions)
    return args


# ------------------------------------------------------------------------------------- defaults


def test_assignments_defaults(workplace: Path) -> None:
    model = {
        "pretrained_model_path": "stories42M.pt",
        "tokenizer_path": "tokenizer.model",
        "max_sentence_len": None,
        "seed": 1337,
        "batch_size": 8,
        "use_gpu": False,
        "causal": None,
        "dtype": "float32",
        "notes": (),
    }
    generate = {
        **model,
        "option": "generate",
        "max_new_tokens": 75,
        "prompt": (command_line.PROMPT,),
        "generated_sentence_low_temp_out": "output/task_1/generated-sentence-temp-0.txt",
        "generated_sentence_high_temp_out": "output/task_1/generated-sentence-temp-1.txt",
    }
    evaluate = {
        **model,
        "dataset": "cfimdb",
        "train": "data/cfimdb-train.txt",
        "dev": "data/cfimdb-dev.txt",
        "test": "data/cfimdb-test.txt",
        "label_names": "data/cfimdb-label-mapping.json",
    }
    prompt = {
        **evaluate,
        "option": "prompt",
        "dev_out": "output/task_2/cfimdb-dev-prompting-output.txt",
        "test_out": "output/task_2/cfimdb-test-prompting-output.txt",
    }
    finetune = {
        **evaluate,
        "option": "finetune",
        "epochs": 5,
        "lr": 2e-5,
        "hidden_dropout_prob": 0.3,
        "dev_out": "output/task_3/cfimdb-dev-finetuning-output.txt",
        "test_out": "output/task_3/cfimdb-test-finetuning-output.txt",
        "filepath": "output/task_3/cfimdb-finetune-5-2e-05.pt",
    }
    commands: list[tuple[list[str], type, dict[str, Any]]] = [
        ([], GenerateOptions, generate),
        (["--option", "generate"], GenerateOptions, generate),
        (["--option", "prompt"], PromptOptions, prompt),
        (["--option", "finetune"], FinetuneOptions, finetune),
    ]
    for argv, task, expected in commands:
        args = get_args(argv)
        assert type(args) is task
        assert {key: getattr(args, key) for key in expected} == expected


def test_dataset_sets_inputs_and_outputs(workplace: Path) -> None:
    args = evaluation_args(["--option", "finetune", "--dataset", "sst", "--dev", "mine.txt"])
    assert (args.train, args.dev, args.test) == (
        "data/sst-train.txt",
        "mine.txt",
        "data/sst-test.txt",
    )
    assert args.label_names == "data/sst-label-mapping.json"
    assert args.dev_out == "output/task_3/sst-dev-finetuning-output.txt"
    assert args.test_out == "output/task_3/sst-test-finetuning-output.txt"
    assert isinstance(args, FinetuneOptions)
    assert args.filepath == "output/task_3/sst-finetune-5-2e-05.pt"


def test_results_are_named_after_the_data(workplace: Path) -> None:
    """So that two data sets do not overwrite each other's results."""
    args = get_args(["--option", "finetune", "--dev", "x/sst-dev.txt"])
    assert isinstance(args, FinetuneOptions)
    assert args.filepath == "output/task_3/sst-finetune-5-2e-05.pt"
    assert args.dev_out == "output/task_3/sst-dev-finetuning-output.txt"
    args = get_args([*PRETRAIN, "--train", "a.txt", "--dev", "x/b-dev.txt", "c.txt"])
    assert isinstance(args, PretrainOptions)
    assert args.filepath == "output/pretrain/a-5-0.0001/model.pt"  # after what it has learned
    assert (args.train, args.dev) == (("a.txt",), ("x/b-dev.txt", "c.txt"))


def test_default_learning_rate(workplace: Path) -> None:
    pretrain = [*PRETRAIN, "--tokenizer_path", "tokenizer.model"]
    for argv, lr in (
        (["--option", "finetune"], 2e-5),
        ([*pretrain, "--dim", "32"], 1e-3),
        (pretrain, 1e-4),
        ([*pretrain, "--lr", "0.5"], 0.5),
    ):
        args = get_args(argv)
        assert isinstance(args, TrainingOptions) and args.lr == lr


@pytest.mark.parametrize(
    ("argv", "dtype"),
    [
        ([], "float32"),
        (["--quantize", "int8"], "bfloat16"),
        (PROMPT, "float32"),
        (FINETUNE, "float32"),
        (PRETRAIN, None),  # bfloat16 if the hardware has it, which only PyTorch knows
        ([*PRETRAIN, "--dtype", "float32"], "float32"),
        ([*PROMPT, "--dtype", "bfloat16"], "bfloat16"),
        (["--option", "classify", "--filepath", "x.pt"], "float32"),
    ],
)
def test_default_dtype(workplace: Path, argv: list[str], dtype: str | None) -> None:
    assert get_args(argv).dtype == dtype


def test_pretraining_is_causal_unless_told_otherwise(workplace: Path) -> None:
    args = get_args(PRETRAIN)
    assert isinstance(args, PretrainOptions) and args.causal is True
    with pytest.raises(ValueError, match="--no-causal: pretraining needs causal attention"):
        get_args([*PRETRAIN, "--no-causal"])


def test_temperature_chooses_the_output_file(workplace: Path) -> None:
    folder = "output/task_1/generated-sentence-temp"
    low, high = {0.0: f"{folder}-0.txt"}, {1.0: f"{folder}-1.txt"}
    for argv, expected in (
        ([], low | high),
        (["--temperature", "0"], low),
        (["--temperature", "1"], high),
        (["--temperature", "0.75"], {0.75: f"{folder}-0.75.txt"}),
        (["--temperature", "2", "--generated_sentence_high_temp_out", "x.txt"], {2.0: "x.txt"}),
    ):
        args = get_args(argv)
        assert isinstance(args, GenerateOptions) and args.outfiles == expected


DEFAULTS = {  # the default files that each task reads
    "generate": ("stories42M.pt", "tokenizer.model"),
    "prompt": ("stories42M.pt", "tokenizer.model", "data/cfimdb-dev.txt"),
    "finetune": ("stories42M.pt", "tokenizer.model", "data/cfimdb-train.txt"),
    "pretrain": ("stories42M.pt", "tokenizer.model", "data/cfimdb-train.txt"),
}


def combinations_of_missing_files() -> list[tuple[str, tuple[str, ...]]]:
    """Each task with each selection of its default files."""
    return [
        (task, missing)
        for task, files in DEFAULTS.items()
        for count in range(len(files) + 1)
        for missing in itertools.combinations(files, count)
    ]


def remove(paths: Sequence[str]) -> None:
    for path in paths:
        Path(path).unlink()


@pytest.mark.parametrize(("task", "missing"), combinations_of_missing_files())
def test_the_whole_demo_stands_in_if_nothing_is_named(
    workplace: Path, task: str, missing: tuple[str, ...]
) -> None:
    """Whichever default file is missing: model, data and names of results are the demo's."""
    remove(missing)
    demo = os.path.relpath(ROOT / "data" / "demo")
    args = get_args(["--option", task])
    assert all(path.startswith(demo) == bool(missing) for path in args.input_files)
    for path in args.output_files:
        named = "demo" in (Path(path).name if task != "pretrain" else path)
        assert named == bool(missing), path
    if missing:
        (note,) = args.notes
        assert note.startswith(f"there is no {missing[0]}, so the demo in {demo} stands in")
        assert note.endswith("get the real files with: uv run python data/download.py")
    else:
        assert args.notes == ()


NAMED = {  # something that names a model, data or results
    "generate": ["--generated_sentence_low_temp_out", "x.txt"],
    "prompt": ["--dataset", "cfimdb"],
    "finetune": ["--filepath", "x.pt"],
    "pretrain": ["--filepath", "x/model.pt"],
}


@pytest.mark.parametrize(("task", "missing"), combinations_of_missing_files())
def test_a_missing_default_is_an_error_if_something_is_named(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    task: str,
    missing: tuple[str, ...],
) -> None:
    """No result is made with the demo under a name that the user or the assignment chose."""
    remove(missing)
    argv = ["--option", task, *NAMED[task]]
    args = get_args(argv)
    demo = os.path.relpath(ROOT / "data" / "demo")
    assert not any(path.startswith(demo) for path in args.input_files)
    if missing:
        status, out, err = run(argv, capsys)
        advice = "get it with: uv run python data/download.py"
        if not missing[0].startswith("data/"):
            advice += f"; or use the demo's model: --pretrained-model-path {demo}/model.pt"
        assert (status, out) == (2, "")
        assert err == f"run_llama.py: error: {missing[0]}: no such file; {advice}\n"


@pytest.mark.parametrize("task", ["prompt", "finetune", "pretrain"])
def test_dataset_demo_is_the_whole_demo(workplace: Path, task: str) -> None:
    """Its model too, unless another one is named; without a note, since it was asked for."""
    demo = os.path.relpath(ROOT / "data" / "demo")
    args = get_args(["--option", task, "--dataset", "demo"])
    assert args.notes == () and all(path.startswith(demo) for path in args.input_files)
    assert all("demo" in path for path in args.output_files)
    model = ["--pretrained-model-path", "stories42M.pt"]
    args = get_args(["--option", task, "--dataset", "demo", *model])
    assert args.input_files[:2] == ("stories42M.pt", "tokenizer.model")


def test_the_demo_is_fine_tuned_at_a_rate_of_its_own(workplace: Path) -> None:
    """Only the demo's model on the demo's reviews, and not what a flag or a recipe sets."""
    demo = ["--option", "finetune", "--dataset", "demo"]
    args = get_args(demo)
    assert isinstance(args, FinetuneOptions) and (args.lr, args.epochs) == (2e-4, 4)
    model = ["--pretrained-model-path", "stories42M.pt"]
    args = get_args([*demo, *model])
    assert isinstance(args, FinetuneOptions) and (args.lr, args.epochs) == (2e-5, 5)
    args = get_args([*demo, "--lr", "1e-3", "--epochs", "1"])
    assert isinstance(args, FinetuneOptions) and (args.lr, args.epochs) == (1e-3, 1)
    args = get_args([*demo, "--recipe", "better"])
    assert isinstance(args, FinetuneOptions) and "lr" in args.left_to_rule
    assert "epochs" in args.left_to_rule
    remove(["stories42M.pt"])
    args = get_args(["--option", "finetune"])
    assert isinstance(args, FinetuneOptions) and (args.lr, args.epochs) == (2e-4, 4)


def test_the_demos_model_can_be_used_on_purpose(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the advice says, with one's own data; the results have their usual names."""
    remove(["stories42M.pt"])
    model = os.path.relpath(ROOT / "data" / "demo" / "model.pt")
    status, out, err = run([*PROMPT, "--pretrained-model-path", model], capsys)
    assert (status, err) == (0, "") and f"load model from {model}\n" in out
    assert Path("output/task_2/cfimdb-dev-prompting-output.txt").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["--pretrained-model-path", "no.pt"],
        [*PROMPT, "--dev", "no.txt"],
        [*FINETUNE, "--train", "no.txt"],
        ["--option", "generate", "--tokenizer_path", "no.model"],
    ],
)
def test_a_named_file_is_never_replaced(
    workplace: Path, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    remove(["tokenizer.model"] if "--pretrained-model-path" in argv else [])
    status, _, err = run(argv, capsys)
    assert status == 2 and err.count("\n") == 1
    assert re.search(r"error: no\.\w+: No such file", err), err


# -------------------------------------------------------------------------------------- parsing


def test_flags_take_hyphens_and_underscores(workplace: Path) -> None:
    for argv in (
        ["--pretrained_model_path", "a.pt", "--max-new-tokens=3", "--no_causal"],
        ["--pretrained-model-path=a.pt", "--max_new_tokens", "3", "--no-causal"],
    ):
        args = get_args(argv)
        assert isinstance(args, GenerateOptions)
        assert (args.pretrained_model_path, args.max_new_tokens, args.causal) == ("a.pt", 3, False)
    args = get_args(["--prompt", "use-gpu_x"])
    assert isinstance(args, GenerateOptions) and args.prompt == ("use-gpu_x",)  # values stay


FLAGS = [flag for action in build_parser()._actions for flag in action.option_strings]
words = st.sampled_from(
    [*FLAGS, "generate", "prompt", "finetune", "pretrain", "classify", "sst", "-"]
)
numerals = st.integers().map(str) | st.floats().map(str)
argument = words | words.map("{}=1".format) | numerals | st.text()


@settings(max_examples=200, deadline=None)
@given(st.lists(argument, max_size=8))
@example(["--prompt", "\udcff"])
@example(["--batch_size", "9" * 5000])
@example(["--option=finetune", "--lr=1"])
@example(["--option=pretrain", "--epochs=1"])
@example(["--option=classify", "--filepath=1"])
def test_any_arguments_are_options_or_an_error(argv: list[str]) -> None:
    try:
        args = get_args(argv)
    except ValueError as error:
        assert len(describe_error(error).splitlines()) == 1
    except SystemExit as stop:
        assert stop.code == 0 and {"-h", "--help"} & set(argv)
    else:
        assert args.option in TASK_NAMES
        assert args.batch_size >= 1
        if isinstance(args, GenerateOptions):
            assert min(args.max_new_tokens, args.num_samples) >= 1 and args.outfiles
        if isinstance(args, TrainingOptions):
            assert args.epochs >= 1 and math.isfinite(args.lr) and args.lr >= 0


# ------------------------------------------------------------------------------------- refusals


def refusals() -> dict[str, tuple[list[str], str]]:
    """Name -> arguments and a pattern of the error."""
    low, high = "--generated_sentence_low_temp_out", "--generated_sentence_high_temp_out"
    return {
        "missing checkpoint": (["--pretrained-model-path", "no.pt"], "no.pt: No such file"),
        "missing tokenizer": (["--tokenizer_path", "no.model"], "no.model: No such file"),
        "missing data": ([*PROMPT, "--dev", "no.txt"], "no.txt: No such file"),
        "missing label words": ([*PROMPT, "--label-names", "no.json"], "no.json: No such file"),
        "missing training data": ([*FINETUNE, "--train", "no.txt"], "no.txt: No such file"),
        "folder as checkpoint": (
            ["--pretrained-model-path", "data"],
            "data: is a folder with neither config.json",
        ),
        "folder as data": ([*PROMPT, "--test", "data"], "data: Is a directory"),
        "name of dev_out": (
            [*PROMPT, "--dev_out", "x.txt"],
            "must end in dev-prompting-output.txt",
        ),
        "name of test_out": ([*FINETUNE, "--test_out", "test-prompting-output.txt"], "must end in"),
        "other task's name": (
            [*FINETUNE, "--dev_out", "x/dev-prompting-output.txt"],
            "must end in dev-finetuning-output.txt",
        ),
        "batch size": ([*PROMPT, "--batch_size", "0"], "--batch_size: 0 is below 1"),
        "epochs": ([*FINETUNE, "--epochs", "-1"], "--epochs: -1 is below 1"),
        "max_new_tokens": (["--max_new_tokens", "0"], "--max_new_tokens: 0 is below 1"),
        "max_sentence_len": (["--max_sentence_len", "0"], "--max_sentence_len: 0 is below 1"),
        "no number": ([*FINETUNE, "--lr", "fast"], "--lr: expected a number, found 'fast'"),
        "NaN": ([*FINETUNE, "--lr", "nan"], "--lr: nan is not between 0 and the largest float32"),
        "dropout": (
            [*FINETUNE, "--hidden_dropout_prob", "1"],
            "--hidden_dropout_prob: 1.0 is not in",
        ),
        "top_p": (["--top_p", "0"], r"--top_p: 0.0 is not in \(0, 1\]"),
        "top_k": (["--top_k", "-1"], "--top_k: -1 is below 0"),
        "one seed": ([*FINETUNE, "--seeds", "1"], "--seeds: 1 is not a list of two or more"),
        "equal seeds": ([*FINETUNE, "--seeds", "1,1"], "--seeds: 1,1 is not a list of two or more"),
        "seed": (["--seed", "-5"], "--seed: -5 is not in 0 to"),
        "vast learning rate": ([*FINETUNE, "--lr", "1e39"], r"--lr: 1e\+39 is not between 0 and"),
        "vast batch size": ([*PROMPT, "--batch_size", "9" * 30], "--batch_size: 9* is above"),
        "vast top_k": (["--top_k", "9" * 30], "--top_k: 9* is above 2147483647"),
        "no UTF-8": (["--prompt", "caf\udce9"], r"the argument 'caf\\udce9' is not UTF-8 text"),
        "name too long": ([low, "b" * 250], "File name too long"),
        "unknown option": (["--option", "dance"], "--option: invalid choice: 'dance'"),
        "unknown flag": (["--speed", "9"], "unrecognized arguments: --speed 9"),
        "abbreviation": (["--epoch", "9"], "unrecognized arguments: --epoch 9"),
        "file as folder": (
            [low, "stories42M.pt/x.txt"],
            "stories42M.pt.*: (File exists|Not a directory)",
        ),
        "folder as output": ([high, "data"], "data: cannot be written"),
        "device as output": ([low, "/dev/null"], "it exists and is not a regular file"),
        "unwritable folder": ([low, "/proc/x/y.txt"], "/proc/x"),
        "int8 in float32": (
            ["--quantize", "int8", "--dtype", "float32"],
            "--quantize int8 computes in bfloat16, not in --dtype float32",
        ),
        "standard input twice": (["--prompt", "-", "--prompt", "-"], "can be read only once"),
        "two training files": (
            [*FINETUNE, "--train", "a.txt", "b.txt"],
            "--train a.txt b.txt: only pretrain takes more than one file",
        ),
        "two test files": ([*PROMPT, "--test", "a.txt", "b.txt"], "unrecognized arguments: b.txt"),
        "new model beside an old one": (
            [*PRETRAIN, "--dim", "32", "--pretrained-model-path", "stories42M.pt"],
            "--dim starts a new model, --pretrained-model-path trains an old one further",
        ),
        "new model without a tokenizer": (
            [*PRETRAIN, "--dim", "32"],
            "a new model needs a tokenizer",
        ),
        "dev file that is a training file": (
            [*PRETRAIN, "--train", "data/cfimdb-dev.txt"],
            "--dev data/cfimdb-dev.txt: is also a training file",
        ),
    }


@pytest.mark.parametrize("flag", ["--train", "--dev", "--test", "--tokenizer_path"])
@pytest.mark.parametrize("recipe", [[], ["--recipe", "better"]], ids=["plain", "recipe"])
def test_training_refuses_a_pipe(
    workplace: Path, capsys: pytest.CaptureFixture[str], flag: str, recipe: list[str]
) -> None:
    """It reads each file more than once, so it would wait for ever."""
    os.mkfifo("pipe")
    status, _, err = run([*FINETUNE, *recipe, flag, "pipe"], capsys)
    assert (status, err) == (
        2,
        "run_llama.py: error: pipe: is a pipe, which can be read only once; training reads its "
        "files more than once, so give a file\n",
    )


@pytest.mark.parametrize("name", refusals())
def test_a_mistake_is_one_line_and_status_2(
    workplace: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    argv, pattern = refusals()[name]
    status, out, err = run(argv, capsys)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"run_llama\.py: error: .*{pattern}.*\n", err), err
    assert not [path for path in workplace.rglob("output/**/*") if path.is_file()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_use_gpu_without_cuda(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(["--use_gpu"], capsys)
    assert status == 2 and "--use_gpu: PyTorch finds no CUDA device" in err and err.count("\n") == 1


# -------------------------------------------------------------------------------- quick answers

MISTAKES = {
    "unknown flag": ["--bogus"],
    "flag of another task": ["--option", "prompt", "--top_k", "5"],
    "contradiction": ["--quantize", "int8", "--dtype", "float32"],
    "missing file": ["--option", "prompt", "--pretrained-model-path", "no.pt"],
    "output name": ["--option", "prompt", "--dev_out", "x.txt"],
    "bad value": ["--batch_size", "0"],
}
ONE_PROCESS = {"generate": [], "classify": ["--option", "classify", "--filepath", "no.pt"]}
TORCHRUN = {  # name -> RANK, LOCAL_RANK, WORLD_SIZE
    "alone": (),
    "variables of another program": ("", "x", ""),
    "rank 0": ("0", "0", "2"),
    "rank 1": ("1", "1", "2"),
    "rank 2, first of its machine": ("2", "0", "4"),
}
# Runs run_llama.py as a script for each command line of standard input, in one process, and prints
# what each has answered and which slow modules have been imported by then.
ANSWERS = """
import contextlib, io, json, os, runpy, sys, time
time.sleep = lambda seconds: None  # a second process waits until the first one has printed
sys.path.insert(0, os.path.dirname(sys.argv[1]))
script, answers = sys.argv[1], []
for argv, ranks in json.load(sys.stdin):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), ranks))
    sys.argv = [script, *argv]
    out, err, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            status = stop.code
    slow = sorted({"torch", "numpy"} & sys.modules.keys())
    answers.append((status, out.getvalue(), err.getvalue(), slow))
json.dump(answers, sys.stdout)
"""
Answer = tuple[int, str, str, list[str]]  # status, stdout, stderr, which slow modules are imported


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Answer]:
    """Answers to --help and to all mistakes, alone and under torchrun, by the names of both."""
    folder = tmp_path_factory.mktemp("answers")
    commands = MISTAKES | {"help": ["--help"]}
    cases = {
        (name, ranks): (argv, variables)
        for name, argv in commands.items()
        for ranks, variables in TORCHRUN.items()
    }
    for name, argv in ONE_PROCESS.items():
        cases |= {(name, ranks): (argv, TORCHRUN[ranks]) for ranks in ("rank 0", "rank 1")}
    command = [sys.executable, "-c", ANSWERS, str(ROOT / "run_llama.py")]
    done = subprocess.run(
        command, input=json.dumps(list(cases.values())), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []  # nothing is written, not even a folder of results
    return dict(zip(cases, map(tuple, json.loads(done.stdout)), strict=True))


def test_answers_come_before_pytorch_and_numpy(answers: dict[tuple[str, str], Answer]) -> None:
    assert {case: slow for case, (*_, slow) in answers.items() if slow} == {}


@pytest.mark.parametrize("ranks", ["alone", "variables of another program"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_in_one_line(
    answers: dict[tuple[str, str], Answer], name: str, ranks: str
) -> None:
    status, out, err, _ = answers[name, ranks]
    assert (status, out) == (2, "")
    assert re.fullmatch(r"run_llama\.py: error: [^\n]+\n", err)


@pytest.mark.parametrize("name", MISTAKES)
def test_only_the_main_process_answers_a_mistake(
    answers: dict[tuple[str, str], Answer], name: str
) -> None:
    """A missing file is also reported by the first process of each other machine."""
    _, _, alone, _ = answers[name, "alone"]
    status, out, err, _ = answers[name, "rank 0"]
    assert (status, out) == (2, "")
    assert err == alone.replace("run_llama.py: ", "run_llama.py: rank 0: ")
    assert answers[name, "rank 1"][:3] == (2, "", "")
    status, out, err, _ = answers[name, "rank 2, first of its machine"]
    assert (status, out) == (2, "")
    if name == "missing file":
        assert err == alone.replace("run_llama.py: ", "run_llama.py: rank 2: ")
    else:
        assert err == ""


@pytest.mark.parametrize("task", ["generate", "classify"])
def test_some_tasks_are_for_one_process(answers: dict[tuple[str, str], Answer], task: str) -> None:
    status, out, err, _ = answers[task, "rank 0"]
    assert (status, out) == (2, "") and err == (
        f"run_llama.py: rank 0: error: --option {task} runs in one process; start it without "
        "torchrun\n"
    )
    assert answers[task, "rank 1"][:3] == (2, "", "")


def test_only_the_main_process_answers_help(answers: dict[tuple[str, str], Answer]) -> None:
    for ranks in ("alone", "rank 0"):
        status, out, err, _ = answers["help", ranks]
        assert (status, err) == (0, "") and out.startswith("usage: run_llama.py")
        assert all(flag in out for flag in FLAGS)
    for ranks in ("rank 1", "rank 2, first of its machine"):
        assert answers["help", ranks][:3] == (0, "", "")


def test_a_real_process_answers_a_mistake(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "run_llama.py"), "--bogus"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "run_llama.py: error: unrecognized arguments: --bogus\n"
