"""The plan: which checkpoints are fine-tuned how, on what, and with which seeds.

A plan is a TOML file:

    threads = 2                     # CPU threads of each run

    [checkpoints]                   # name -> a checkpoint, or a table with flags of its own
    demo = "data/demo/model.pt"
    large = { path = "large.pt", flags = "--micro_batch_size 1" }

    [data]                          # sst, cfimdb or demo -> flags
    sst = "--batch_size 80"

    [methods]                       # name -> flags of `run_llama.py --option finetune`
    plain = ""
    mean = "--causal --pooling mean"

    [[stages]]                      # each checkpoint x data set x method x seed is a run
    name = "screen"
    checkpoints = ["demo"]
    data = ["sst"]
    methods = ["plain", "mean"]
    seeds = [1, 2]
    baseline = "plain"              # the method that the others are compared with (default: plain);
                                    # or a checkpoint: then the checkpoints are compared
    train_lines = 2000              # the first lines of the training file (default: all)
    subset_seed = 0                 # draw these lines by a seed instead
    splits = ["dev"]                # without it: dev and test

If a flag is given several times, that of the method counts, then that of the data set.
"""

import reprlib
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from utils import LARGEST_INT

DATA_SETS = ("sst", "cfimdb", "demo")
SPLITS = ("dev", "test")
NAME_LENGTH = 40  # characters
# What a run gets from the plan, so that no flag may set it.
OF_THE_PLAN = {"option", "dataset", "train", "dev", "test", "label_names", "seed", "seeds"}
OF_THE_PLAN |= {"pretrained_model_path", "filepath", "dev_out", "test_out", "resume"}
OF_THE_PLAN |= {"tokenizer_path", "threads", "use_gpu", "save_every", "help", "h"}


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained model, and flags that all runs with it have."""

    path: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """A group of runs: every combination of checkpoints, data sets, methods and seeds."""

    name: str
    checkpoints: tuple[str, ...]
    data: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str = "plain"
    train_lines: int | None = None  # None: all
    subset_seed: int | None = None  # None: the first lines
    splits: tuple[str, ...] = SPLITS

    @property
    def compares_checkpoints(self) -> bool:
        """Return whether checkpoints are compared, and not methods."""
        return self.baseline not in self.methods


@dataclass(frozen=True)
class Plan:
    """A plan; checkpoints, flags of data sets, and flags of methods are given by name."""

    path: Path
    threads: int
    checkpoints: Mapping[str, Checkpoint]
    data: Mapping[str, tuple[str, ...]]
    methods: Mapping[str, tuple[str, ...]]
    stages: tuple[Stage, ...]


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a plan; the message says where and why.
    """
    try:
        content = tomllib.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError and TOMLDecodeError
        raise ValueError(f"{path}: not a TOML file: {error}") from None
    try:
        return parse_plan(content, path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_plan(content: Mapping[str, Any], path: Path) -> Plan:
    """Make a plan of the content of a TOML file; the errors do not name the file."""
    check_keys(content, {"checkpoints", "data", "methods", "stages"}, {"threads"}, "the plan")
    tables = {name: content[name] for name in ("checkpoints", "data", "methods")}
    for name, table in tables.items():
        if not isinstance(table, dict) or not table:
            raise ValueError(f"[{name}]: expected a table of names, found {shown(table)}")
        for entry in table:
            check_name(entry, f"[{name}]")
    for name in tables["data"]:
        check_known(name, DATA_SETS, "[data]", "data set")
    if not isinstance(content["stages"], list) or not content["stages"]:
        raise ValueError(f"expected [[stages]], found stages = {shown(content['stages'])}")
    stages = tuple(parse_stage(values, i, tables) for i, values in enumerate(content["stages"]))
    check_different([stage.name for stage in stages], "[[stages]]: name")
    return Plan(
        path=path,
        threads=whole_number(content.get("threads", 1), "threads"),
        checkpoints={
            name: parse_checkpoint(value, f"checkpoints.{name}")
            for name, value in tables["checkpoints"].items()
        },
        data={name: parse_flags(text, f"data.{name}") for name, text in tables["data"].items()},
        methods={
            name: parse_flags(text, f"methods.{name}") for name, text in tables["methods"].items()
        },
        stages=stages,
    )


def parse_checkpoint(value: object, where: str) -> Checkpoint:
    """Make a checkpoint of its path, or of a table with path and flags."""
    table = {"path": value} if isinstance(value, str) else value
    if not isinstance(table, dict):
        raise ValueError(f"{where}: expected a path or a table, found {shown(value)}")
    check_keys(table, {"path"}, {"flags"}, where)
    path = table["path"]
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"{where}: expected a path, found {shown(path)}")
    return Checkpoint(path, parse_flags(table.get("flags", ""), where))


def parse_flags(text: object, where: str) -> tuple[str, ...]:
    """Split flags into words; those that the plan itself sets are refused."""
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected flags in one string, found {shown(text)}")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{where}: {shown(text)}: {error}") from None
    for word in words:
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        if word.startswith("-") and name in OF_THE_PLAN:
            raise ValueError(f"{where}: {word}: the plan sets this itself; leave it out")
    return tuple(words)


def parse_stage(values: object, number: int, tables: Mapping[str, Any]) -> Stage:
    """Make a stage of its table; names have to be among those of the other tables."""
    where = f"stages[{number}]"
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a table, found {shown(values)}")
    required = {"name", "checkpoints", "data", "methods", "seeds"}
    check_keys(values, required, {f.name for f in fields(Stage)} - required, where)
    where = f"stage {check_name(values['name'], where)}"
    chosen: dict[str, Any] = {}
    for key, kind in (("checkpoints", "checkpoint"), ("data", "data set"), ("methods", "method")):
        chosen[key] = parse_list(values[key], f"{where}: {key}")
        for name in chosen[key]:
            check_known(name, tuple(tables[key]), where, kind)
    baseline = values.get("baseline", "plain")
    known = (*chosen["methods"], *chosen["checkpoints"])
    check_known(baseline, known, f"{where}: baseline", "method or checkpoint of this stage")
    splits = parse_list(values.get("splits", [*SPLITS]), f"{where}: splits")
    if splits not in (SPLITS, SPLITS[:1]):
        raise ValueError(f'{where}: splits: expected ["dev"] or ["dev", "test"]')
    lines, subset_seed = values.get("train_lines"), values.get("subset_seed")
    if lines is None and subset_seed is not None:
        raise ValueError(f"{where}: subset_seed needs train_lines")
    return Stage(
        name=values["name"],
        seeds=tuple(
            parse_seed(s, f"{where}: seeds") for s in parse_list(values["seeds"], f"{where}: seeds")
        ),
        baseline=baseline,
        train_lines=None if lines is None else whole_number(lines, f"{where}: train_lines"),
        subset_seed=None
        if subset_seed is None
        else parse_seed(subset_seed, f"{where}: subset_seed"),
        splits=splits,
        **chosen,
    )


def parse_list(value: object, where: str) -> tuple[Any, ...]:
    """Return a list of different values as a tuple."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: expected a list with at least one entry, found {shown(value)}")
    check_different(value, where)
    return tuple(value)


def whole_number(value: object, where: str, lowest: int = 1, highest: int = LARGEST_INT) -> int:
    """Return a whole number within limits."""
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(
            f"{where}: expected a whole number from {lowest} to {highest}, found {shown(value)}"
        )
    return value


def parse_seed(value: object, where: str) -> int:
    """Return a seed that every random generator takes."""
    return whole_number(value, where, 0, 2**32 - 1)


def check_keys(
    table: Mapping[str, Any], required: set[str], optional: set[str], where: str
) -> None:
    """Raise ValueError unless a table has all required keys and no unknown one."""
    for key in table:
        if key not in required | optional:
            known = ", ".join(sorted(required | optional))
            raise ValueError(f"{where}: unknown key {shown(key)}; the keys are {known}")
    for key in sorted(required):
        if key not in table:
            raise ValueError(f"{where}: lacks {key}")


def check_name(name: object, where: str) -> str:
    """Return a name, or raise ValueError if it would break a table or a file name."""
    allowed = set("-_. +()")
    if (
        not isinstance(name, str)
        or not 0 < len(name) <= NAME_LENGTH
        or not all(c.isalnum() or c in allowed for c in name)
        or name != name.strip()
    ):
        raise ValueError(
            f"{where}: name {shown(name)}: use up to {NAME_LENGTH} letters, digits, spaces and "
            "any of - _ . + ( )"
        )
    return name


def check_known(name: object, known: Sequence[str], where: str, kind: str) -> None:
    """Raise ValueError unless a name is among those that are known."""
    if name not in known:
        raise ValueError(f"{where}: unknown {kind} {shown(name)}; known: {', '.join(known)}")


def check_different(values: Sequence[object], where: str) -> None:
    """Raise ValueError if a value occurs twice."""
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{where}: {shown(value)} occurs twice")


def shown(value: object) -> str:
    """Return a value as a short text, for a message in one line."""
    return reprlib.repr(value)
