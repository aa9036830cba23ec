"""The options: what each task has, what it refuses, and what identifies a run.

`uv run python -m tests.beyond.test_options` prints the README's table of flags by task.
"""

import re
import shlex
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

from beyond.command_line import get_args, parse
from beyond.methods.options import matrix_list
from beyond.options import (
    TASK_NAMES,
    TASKS,
    FinetuneOptions,
    GenerateOptions,
    PretrainOptions,
    PromptOptions,
    TaskOptions,
    dropout_probability,
    flags_of,
    seed_list,
    tasks_of,
)
from tests.conftest import ROOT

README = ROOT / "README.md"
HEADER = f"| flag | {' | '.join(TASK_NAMES)} |"
ALL_FLAGS = {name: flag for task in TASKS.values() for name, flag in flags_of(task).items()}


# -------------------------------------------------------------------------------------- README


def flag_table() -> str:
    """Return the README's table of flags by task, in the order of `--help`."""
    lines = [HEADER, "|---|" + ":-:|" * len(TASK_NAMES)]
    ordered: dict[tuple[str, ...], list[str]] = {}
    for name in ALL_FLAGS:
        ordered.setdefault(tasks_of(name), []).append(name)
    for tasks, names in ordered.items():
        marks = " | ".join("✓" if task in tasks else " " for task in TASK_NAMES)
        for name in names:
            lines.append(f"| `--{ALL_FLAGS[name].spelling or name}` | {marks} |")
    return "\n".join(lines) + "\n"


def test_readme_lists_the_flags_of_each_task() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert lines.count(HEADER) == 1, "python -m tests.beyond.test_options prints the table"
    rows = lines[lines.index(HEADER) :]
    length = next((i for i, row in enumerate(rows) if not row.startswith("|")), len(rows))
    assert rows[:length] == flag_table().splitlines()


def commands_of(text: str) -> list[list[str]]:
    """Return the arguments of each run_llama.py command in the code blocks of a Markdown text."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if "run_llama.py" in line]
    return [words[words.index("run_llama.py") + 1 :] for words in commands]


def test_assignments_commands_parse(workplace: Path) -> None:
    """Each gives what its flags say, and the results that --dataset alone would give."""
    (section,) = re.findall(
        r"^## The assignment.*?(?=^## |\Z)", README.read_text(encoding="utf-8"), re.M | re.DOTALL
    )
    commands = commands_of(section)
    found = []
    for argv in commands:
        args = get_args(argv)
        given = parse(argv)
        # The parser does not know yet whether the task takes several files.
        given |= {name: given[name][0] for name in ("train", "dev") if name in given}
        assert {name: getattr(args, name) for name in given} == given
        found.append((args.option, getattr(args, "dataset", None)))
        if isinstance(args, FinetuneOptions | PromptOptions):
            name = Path(args.dev).stem.removesuffix("-dev")
            sizes = ["--batch_size", str(args.batch_size)]
            assert args == get_args(["--option", args.option, "--dataset", name, *sizes])
    assert set(found) >= {
        ("generate", None),
        *((task, data) for task in ("prompt", "finetune") for data in ("sst", "cfimdb")),
    }


def test_every_command_of_the_readme_parses(workplace: Path) -> None:
    commands = commands_of(README.read_text(encoding="utf-8"))
    assert {get_args(argv).option for argv in commands} == set(TASK_NAMES)


# ------------------------------------------------------------------------- which task has which


def words_of(name: str) -> list[str]:
    """Return a flag with a valid value: its default if that is a constant."""
    flag = ALL_FLAGS[name]
    word = f"--{flag.spelling or name}"
    if "action" in flag.parsing and flag.parsing["action"] != "append":
        return [word]
    defaults = [f.default for task in TASKS.values() for f in fields(task) if f.name == name]
    if isinstance(defaults[0], int | float | str):
        return [word, str(defaults[0])]
    if "choices" in flag.parsing:
        return [word, flag.parsing["choices"][0]]
    examples: dict[object, str] = {seed_list: "1,2", matrix_list: "key", dropout_probability: "0.5"}
    return [word, examples.get(flag.parsing.get("type"), "1")]


def test_a_flag_of_another_task_is_refused_whatever_its_value() -> None:
    """Each flag is taken by its own tasks, and refused by the others even with its default."""
    refused = 0
    for task in TASK_NAMES:
        for name in ALL_FLAGS.keys() - {"option"}:
            argv = ["--option", task, *words_of(name)]
            if task in tasks_of(name):
                assert parse(argv).keys() == {"option", name}
            else:
                refused += 1
                message = f"--{name} is for --option {', '.join(tasks_of(name))} only"
                with pytest.raises(ValueError) as caught:
                    get_args(argv)
                assert str(caught.value) == message
    assert refused > 60


def test_the_tasks_have_the_flags_that_they_use() -> None:
    """A few that are easily given to a task that ignores them."""
    expected = {
        "dropout": ("finetune", "pretrain"),
        "hidden_dropout_prob": ("finetune",),
        "filepath": ("finetune", "pretrain", "classify"),
        "label_names": ("prompt", "finetune", "classify"),
        "tokenizer_path": TASK_NAMES,
        "pretrained_model_path": TASK_NAMES[:-1],  # classify: the one that was fine-tuned
        "train": ("prompt", "finetune", "pretrain"),  # prompt: the assignment's command names it
        "test": ("prompt", "finetune"),
        "max_new_tokens": ("generate",),
        "compile": TASK_NAMES[:-1],
        "seed": TASK_NAMES[:-1],  # classify draws no random numbers
        "causal": TASK_NAMES[:-1],  # classify: as the classifier was fine-tuned
        "dtype": TASK_NAMES,
        "input": ("classify",),
    }
    assert {name: tasks_of(name) for name in expected} == expected


# --------------------------------------------------------------------------------- frozen values


def all_options() -> list[TaskOptions]:
    required = {"classify": ["--filepath", "best.pt"]}
    return [get_args(["--option", task, *required.get(task, [])]) for task in TASK_NAMES]


def test_options_are_frozen(workplace: Path) -> None:
    for args in all_options():
        for name in (*flags_of(type(args)), "notes", "new"):
            with pytest.raises(FrozenInstanceError):
                setattr(args, name, 1)
        other = replace(args, batch_size=7)
        assert (other.batch_size, args.batch_size) == (7, 8) and type(other) is type(args)
        assert replace(other, batch_size=8) == args
    run = get_args(["--option", "finetune"])
    assert isinstance(run, FinetuneOptions)
    with pytest.raises(FrozenInstanceError):
        run.run.seed = 1  # type: ignore[misc]


def test_replace_checks_the_options_again(workplace: Path) -> None:
    args = get_args(["--option", "finetune"])
    assert isinstance(args, FinetuneOptions)
    with pytest.raises(ValueError, match="--dev_out x.txt: must end in"):
        replace(args, dev_out="x.txt")
    with pytest.raises(ValueError, match="--no-causal"):
        pretrain = get_args(["--option", "pretrain"])
        assert isinstance(pretrain, PretrainOptions)
        replace(pretrain, causal=False)


# ------------------------------------------------------------------------------- hyperparameters

# Options that may change when a run is resumed. The mode and dtype in force are recorded instead
# of the flags (`runtime.py`), and each of several seeds is a run of its own.
NOT_RECORDED = {
    "threads",
    "use_gpu",
    "causal",
    "dtype",
    "micro_batch_size",
    "save_every",
    "resume",
    "seeds",
}


def test_hyperparameters_are_those_of_the_task(workplace: Path) -> None:
    for args in all_options():
        recorded = args.hyperparameters()
        assert recorded.keys() == flags_of(type(args)).keys() - NOT_RECORDED
        assert all(value == str(getattr(args, name)) for name, value in recorded.items())


def test_hyperparameters_of_a_finetuning_leave_out_what_does_not_change_it(workplace: Path) -> None:
    base = ["--option", "finetune"]
    recorded = get_args(base).hyperparameters()
    others = {"stream", "top_k", "quantize", "resume", "save_every", "micro_batch_size", "notes"}
    assert not recorded.keys() & others
    assert {"lr", "epochs", "batch_size", "seed", "train", "dropout"} <= recorded.keys()
    same = ["--resume", "--save_every", "3", "--micro_batch_size", "2"]
    assert get_args([*base, *same]).hyperparameters() == recorded
    assert get_args([*base, "--lr", "1"]).hyperparameters() == {
        **recorded,
        "lr": "1.0",
        "filepath": "output/task_3/cfimdb-finetune-5-1.0.pt",
    }


# --------------------------------------------------------------------------------- several seeds


def test_each_seed_is_a_run_with_its_own_files(workplace: Path) -> None:
    args = get_args(["--option", "finetune", "--seeds", "3,1", "--resume"])
    assert isinstance(args, FinetuneOptions)
    folder = "output/task_3/cfimdb"
    (workplace / "output/task_3").mkdir(parents=True)
    Path(f"{folder}-finetune-5-2e-05-seed-1.pt.state").touch()
    three, one = args.per_seed()
    assert (three.seed, one.seed) == (3, 1) and three.seeds == one.seeds == ()
    assert three.filepath == f"{folder}-finetune-5-2e-05-seed-3.pt"
    assert three.dev_out == f"{folder}-seed-3-dev-finetuning-output.txt"
    assert three.test_out == f"{folder}-seed-3-test-finetuning-output.txt"
    assert (three.resume, one.resume) == (False, True)  # only one has been interrupted
    assert args.training_checkpoints == three.training_checkpoints + one.training_checkpoints
    assert str(args.seeds_file) == f"{folder}-finetune-5-2e-05.seeds.json"
    assert (
        replace(
            one,
            seed=3,
            resume=False,
            **{name: getattr(three, name) for name in ("filepath", "dev_out", "test_out")},
        )
        == three
    )


# --------------------------------------------------------------------------- files and the rest


def test_input_and_output_files(workplace: Path) -> None:
    model = ("stories42M.pt", "tokenizer.model")
    words, train, dev, test = (
        f"data/cfimdb-{name}" for name in ("label-mapping.json", "train.txt", "dev.txt", "test.txt")
    )
    generate, prompt, finetune, pretrain, classify = all_options()
    assert generate.input_files == model
    assert prompt.input_files == (*model, words, dev, test)
    assert finetune.input_files == (*model, words, dev, test, train)
    assert pretrain.input_files == (*model, train, dev)
    beginning = "output/task_1/generated-sentence-temp"
    assert generate.output_files == (f"{beginning}-0.txt", f"{beginning}-1.txt")
    assert prompt.output_files == tuple(
        f"output/task_2/cfimdb-{split}-prompting-output.txt" for split in ("dev", "test")
    )
    assert finetune.output_files == (
        "output/task_3/cfimdb-dev-finetuning-output.txt",
        "output/task_3/cfimdb-test-finetuning-output.txt",
        "output/task_3/cfimdb-finetune-5-2e-05.pt",
        "output/task_3/cfimdb-finetune-5-2e-05.dev.tsv",
        "output/task_3/cfimdb-finetune-5-2e-05.test.tsv",
    )
    assert (classify.input_files, classify.output_files) == (("best.pt",), ())
    files = [
        "--input",
        "in.txt",
        "--output",
        "x.tsv",
        "--label-names",
        "w",
        "--tokenizer_path",
        "t",
    ]
    classify = get_args(["--option", "classify", "--filepath", "best.pt", *files])
    assert classify.input_files == ("best.pt", "t", "w", "in.txt")
    assert classify.output_files == ("x.tsv",)
    assert classify.results == ("x.tsv", "x.tsv.json")  # to be locked
    assert pretrain.output_files == ("output/pretrain/cfimdb-5-0.0001/model.pt",)
    new = get_args(["--option", "pretrain", "--dim", "32", "--tokenizer_path", "t.model"])
    assert new.input_files == ("t.model", train, dev)
    assert isinstance(new, PretrainOptions) and new.shape == {"dim": 32}


def test_which_texts_need_more_than_the_assignments_own_loop(workplace: Path) -> None:
    for argv, needed in (
        ([], False),
        (["--prompt", "A", "--prompt", "B", "--max_new_tokens", "3", "--seed", "2"], False),
        (["--temperature", "0.5"], False),
        (["--top_k", "3"], True),
        (["--top_p", "0.9"], True),
        (["--num_samples", "2"], True),
        (["--stop_at_eos"], True),
        (["--stream"], True),
    ):
        args = get_args(argv)
        assert isinstance(args, GenerateOptions) and args.exceeds_assignment == needed


if __name__ == "__main__":
    print(flag_table(), end="")
