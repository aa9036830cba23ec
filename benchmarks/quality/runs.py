"""The runs of a plan: their command lines, and what identifies their results."""

import contextlib
import hashlib
import random
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path

from benchmarks.quality.plan import Checkpoint, Plan, Stage
from beyond.command_line import advise_on_missing, get_args
from beyond.demo import data_files
from beyond.formats.files import model_fingerprint
from beyond.methods.rule import apply_rule
from beyond.options import FinetuneOptions
from run_llama import build_prompt_suffix
from utils import check_readable, fingerprint, open_atomically, read_lines

FOLDER = Path("output/quality")  # of everything that runs write
DEV_ONLY = ("cfimdb",)  # its test labels are placeholders
DIGITS = 12  # of a hash
# Flags that say where a run reads and writes, or that change nothing but its speed.
NOT_RESOLVED = {"option", "dataset", "train", "dev", "test", "label_names", "seed", "seeds"}
NOT_RESOLVED |= {"pretrained_model_path", "tokenizer_path", "filepath", "dev_out", "test_out"}
NOT_RESOLVED |= {"threads", "use_gpu", "resume", "save_every"}


@dataclass(frozen=True)
class Run:
    """One fine-tuning.

    Attributes:
        checkpoint, data, method: names in the plan.
        checkpoint_hash, data_hash, test_hash: first digits of SHA-256s; empty if the files are not
            here, or if test is left unread.
        train_lines: which lines it trains on, in words.
        flags: all that differ from the defaults, besides dtype, epochs and lr, which are always
            there; recorded with the result.
        unknown_flags: what a recipe's rule sets, if the files that it needs are not here.
        seed: of the head, the data order and whatever the method draws.
        dev_only: whether the test file is left unread.
        options: of the run, without its seed and results.
        words: its command line, likewise.
    """

    checkpoint: str
    checkpoint_hash: str
    data: str
    data_hash: str
    test_hash: str
    train_lines: str
    method: str
    flags: str
    unknown_flags: tuple[str, ...]
    seed: int
    dev_only: bool
    options: FinetuneOptions = field(compare=False)
    words: tuple[str, ...] = field(compare=False)

    @property
    def name(self) -> str:
        """The run in a few words."""
        return f"{self.checkpoint}, {self.data}, {self.method}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Where the run writes; another run has another folder."""
        words = [*self.words, self.checkpoint_hash, self.data_hash, self.flags, str(self.seed)]
        return FOLDER / hashlib.sha256(shlex.join(words).encode()).hexdigest()[:DIGITS]

    def argv(self) -> list[str]:
        """Return the arguments of `run_llama.py`."""
        results = {"filepath": "classifier.pt"}
        results |= {f"{split}_out": f"{split}-finetuning-output.txt" for split in ("dev", "test")}
        argv = [*self.words, "--seed", str(self.seed)]
        for flag, name in results.items():
            argv += [f"--{flag}", str(self.folder / name)]
        return argv


def list_runs(plan: Plan, stage: Stage) -> list[Run]:
    """Return the runs of a stage, checked: all methods with the first seed, then with the next.

    So if the time does not suffice, all methods have the same seeds. Checkpoints and data files may
    be missing here, see `check_inputs`.

    Raises:
        ValueError: flags are unknown or contradict each other, or a file cannot be used.
    """
    first = [
        make_run(plan, stage, checkpoint, data, method)
        for checkpoint in stage.checkpoints
        for data in stage.data
        for method in stage.methods
    ]
    check_methods_differ(first, plan, stage)
    return [replace(run, seed=seed) for seed in stage.seeds for run in first]


def make_run(plan: Plan, stage: Stage, checkpoint: str, data: str, method: str) -> Run:
    """Return a run with the first seed of a stage; the errors are those of `list_runs`."""
    model = plan.checkpoints[checkpoint]
    dev_only = "test" not in stage.splits or data in DEV_ONLY
    words = command(plan, model, data, method, train_file(stage, data), dev_only)
    try:
        options = get_args(words)
    except ValueError as error:
        raise ValueError(
            f"{plan.path}: stage {stage.name}: {checkpoint}, {data}, {method}: {error}"
        ) from None
    assert isinstance(options, FinetuneOptions)
    try:
        write_subset(stage, data, options.train)
    except ValueError as error:
        raise ValueError(f"{plan.path}: {error}") from None
    model_here = all(Path(path).exists() for path in options.input_files[:1])
    files = [options.label_names, options.train, options.dev]
    data_here = all(map(is_file, files))
    if model_here and data_here:
        # `check_inputs` says which file is missing; a flag that does not fit the model or the data
        # fails the run alone, which says so.
        with contextlib.suppress(FileNotFoundError, ValueError):
            options = apply_rule(options, build_prompt_suffix, lambda line: None)
    return Run(
        checkpoint=checkpoint,
        checkpoint_hash=hash_model(model.path) if model_here else "",
        data=data,
        data_hash=hash_files(tuple(files)) if data_here else "",
        test_hash="" if dev_only or not is_file(options.test) else hash_files((options.test,)),
        train_lines=describe_lines(stage),
        method=method,
        flags=resolved_flags(options),
        unknown_flags=options.left_to_rule,
        seed=stage.seeds[0],
        dev_only=dev_only,
        options=options,
        words=tuple(words),
    )


def command(
    plan: Plan, model: Checkpoint, data: str, method: str, train: str | None, dev_only: bool
) -> list[str]:
    """Return the arguments of a run, without its seed and its output files.

    With `dev_only` the program gets the dev file as its test file, so nothing reads the real one.
    """
    words = ["--option", "finetune", "--dataset", data, "--pretrained-model-path", model.path]
    words += ["--train", train] if train else []
    words += ["--test", data_files(data)["dev"]] if dev_only else []
    words += [*model.flags, *plan.data[data], *plan.methods[method]]
    return [*words, "--threads", str(plan.threads)]


def check_methods_differ(runs: list[Run], plan: Plan, stage: Stage) -> None:
    """Raise ValueError if two methods of a stage are the same: one of them has a mistake.

    A recipe's rule may make them the same for one checkpoint or data set, which is no mistake.
    """
    seen: dict[tuple[str, str, str, tuple[str, ...]], str] = {}
    for run in runs:
        options = get_args(run.words)
        assert isinstance(options, FinetuneOptions)
        key = (run.checkpoint, run.data, resolved_flags(options), options.left_to_rule)
        other = seen.setdefault(key, run.method)
        if other != run.method:
            raise ValueError(
                f"{plan.path}: stage {stage.name}: methods {other} and {run.method} have the same "
                f"flags on {run.data}; leave one out"
            )


def resolved_flags(options: FinetuneOptions) -> str:
    """Return the flags in force that may change a result, as `name=value name=value`."""
    values = {}
    for f in fields(FinetuneOptions):
        if "flag" not in f.metadata or f.name in NOT_RESOLVED or f.name in options.left_to_rule:
            continue
        value = getattr(options, f.name)
        if f.default is MISSING or value != f.default or f.name == "epochs":
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            values[f.name] = text
    return " ".join(f"{name}={values[name]}" for name in sorted(values))


def parse_resolved(text: str) -> Mapping[str, str]:
    """Return the flags of a text of `resolved_flags`, by name."""
    return dict(word.partition("=")[::2] for word in text.split())


# ------------------------------------------------------------------------------------------ files


def describe_lines(stage: Stage) -> str:
    """Say which training lines a stage uses."""
    if stage.train_lines is None:
        return "all"
    if stage.subset_seed is None:
        return f"first {stage.train_lines}"
    return f"{stage.train_lines} by seed {stage.subset_seed}"


def train_file(stage: Stage, data: str) -> str | None:
    """Return the file of a stage's training lines; None for the data set's own."""
    if stage.train_lines is None:
        return None
    return str(FOLDER / f"{data}-train-{describe_lines(stage).replace(' ', '-')}.txt")


def write_subset(stage: Stage, data: str, path: str) -> None:
    """Write the training lines of a stage, if it takes some only and the data set is here.

    Raises:
        ValueError: there are not that many lines.
    """
    source = Path(data_files(data)["train"])
    if stage.train_lines is None or not source.is_file():
        return
    lines, count = read_lines(source), stage.train_lines
    if count > len(lines):
        raise ValueError(
            f"stage {stage.name}: train_lines = {count}: {source} has only {len(lines)} lines"
        )
    chosen = list(range(count))
    if stage.subset_seed is not None:
        chosen = sorted(random.Random(stage.subset_seed).sample(range(len(lines)), count))
    content = "".join(f"{lines[i]}\n" for i in chosen)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if not is_file(path) or Path(path).read_text(encoding="utf-8") != content:
        with open_atomically(path) as file:
            file.write(content)


def check_inputs(run: Run) -> None:
    """Raise unless a run's inputs can be read; a missing file of the course comes with advice.

    Raises:
        OSError: one cannot be read.
    """
    # The data set's own training file comes before the one that is made of it.
    for path in (data_files(run.data)["train"], *run.options.input_files):
        try:
            check_readable(path)
        except FileNotFoundError:
            advice = advise_on_missing(path)
            if advice is None:
                raise
            raise FileNotFoundError(f"{path}: no such file; {advice}") from None


def is_file(path: str) -> bool:
    """Return whether a path names a file."""
    return Path(path).is_file()


def hash_model(path: str) -> str:
    """Return the first digits of a checkpoint's SHA-256."""
    return model_fingerprint(path)[:DIGITS]


def hash_files(paths: tuple[str, ...]) -> str:
    """Return the first digits of a SHA-256 of files."""
    joined = "".join(fingerprint(path) for path in paths)
    return hashlib.sha256(joined.encode()).hexdigest()[:DIGITS]
