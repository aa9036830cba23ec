"""The options of `run_llama.py`: each flag is declared once, in the dataclass that uses it.

Each task has a frozen dataclass. Flags that several tasks share are in its base classes. The parser
(`command_line.py`), the refusal of flags that a task does not use, and the hyperparameters that are
recorded all follow from these declarations.

Like `command_line.py`, this module imports neither PyTorch nor NumPy.
"""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

from beyond.flags import (
    Flag,
    dropout_probability,
    flag,
    non_negative,
    non_negative_int,
    positive_fraction,
    seed_list,
    seed_number,
    switch,
    thread_count,
)
from beyond.formats.files import model_files
from beyond.methods.options import MethodOptions, ZeroShotOptions
from beyond.methods.recipes import RECIPES, RULED
from config import LlamaConfig
from utils import at_least_one

TASK_NAMES = ("generate", "prompt", "finetune", "pretrain", "classify")
CHECKPOINT = "stories42M.pt"


# ------------------------------------------------------------------------------- shared flags


def split_metadata(split: str) -> dict[str, Flag]:
    """Declare the flag of a split: one file, or for pretrain one or more."""
    help_text = (
        f"UTF-8 lines `label ||| sentence` (default: data/cfimdb-{split}.txt); pretrain also "
        "takes plain text, and several files"
    )
    return {"flag": Flag(help_text, parsing={"nargs": "+", "metavar": "FILE"})}


TRAIN, DEV = split_metadata("train"), split_metadata("dev")
TOKENIZER_PATH = {
    "flag": Flag(
        "SentencePiece model, tokenizer.json or llama2.c's tokenizer.bin (default: the one in the "
        "checkpoint's folder; for classify: the one in the classifier's checkpoint)"
    )
}
LABEL_NAMES = {
    "flag": Flag(
        "JSON list of label words (default: data/cfimdb-label-mapping.json; for classify: those in "
        "the classifier's checkpoint)",
        spelling="label-names",
        parsing={"metavar": "FILE"},
    )
}
FILEPATH = {
    "flag": Flag(
        "result: the best classifier (default: output/task_3/<dataset>-finetune-<epochs>-<lr>.pt; "
        "with a recipe: output/task_3/<dataset>-finetune-<recipe>.pt) "
        "or language model (default: output/pretrain/<dataset>-<epochs>-<lr>/model.pt); for "
        "classify: the fine-tuned classifier"
    )
}


@dataclass(frozen=True, kw_only=True)
class TaskOptions(ABC):
    """Options of every task."""

    option: str = flag("the task", "generate", choices=TASK_NAMES)
    threads: int | None = flag(
        "CPU threads; fewer are faster if other programs use the machine (default: one per core)",
        None,
        recorded=False,
        type=thread_count,
    )
    use_gpu: bool = switch("run on CUDA; without a CUDA device this is an error", recorded=False)
    max_sentence_len: int | None = flag(
        "truncate each text to this many tokens, BOS not counted (default: do not truncate; for "
        "classify: as the classifier was fine-tuned)",
        None,
        type=at_least_one,
    )
    dtype: str | None = flag(  # None: bfloat16 if the hardware has it
        "dtype of the large matrix products (default: float32; with --quantize: bfloat16; "
        "for pretrain: bfloat16 if the hardware has it)",
        recorded=False,  # the dtype in force is recorded, see runtime.py
        choices=("float32", "bfloat16"),
    )
    batch_size: int = flag(
        "sentences per batch; for pretrain: blocks of max_seq_len tokens per batch",
        8,
        type=at_least_one,
    )
    notes: tuple[str, ...] = ()  # what the defaults do that the user should know; not a flag
    command: str = field(default="", compare=False)  # the command line; not a flag

    reads: ClassVar[tuple[str, ...]] = ()  # fields that name files that the task reads
    writes: ClassVar[tuple[str, ...]] = ()  # fields that name its results

    @property
    @abstractmethod
    def checkpoint(self) -> str | None:
        """The checkpoint that the task starts from; None: a new model."""

    @property
    @abstractmethod
    def input_files(self) -> tuple[str, ...]:
        """The files that the task reads."""

    @property
    def output_files(self) -> tuple[str, ...]:
        """The results of one run; with several seeds, each run has results of its own."""
        return tuple(getattr(self, name) for name in self.writes)

    @property
    def records(self) -> dict[str, str]:
        """The path of each result's record, by the path of the result."""
        return {path: record_path(path) for path in self.output_files}

    @property
    def results(self) -> tuple[str, ...]:
        """Results, records and training checkpoints, to be locked."""
        return (*self.output_files, *self.records.values())

    def hyperparameters(self) -> dict[str, str]:
        """Return the options that identify a run: one with other values is another run."""
        flags = flags_of(type(self))
        return {name: str(getattr(self, name)) for name in flags if flags[name].recorded}


@dataclass(frozen=True, kw_only=True)
class ModelOptions(TaskOptions):
    """Options of the tasks that start from a pretrained or a new model."""

    seed: int = flag("random seed", 1337, type=seed_number)
    pretrained_model_path: str | None = flag(  # None: pretraining starts with a new model
        f"checkpoint: a .pt file, llama2.c's .bin, or a folder of Hugging Face or Meta (default: "
        f"{CHECKPOINT}; if that is missing, the demo's)",
        spelling="pretrained-model-path",
    )
    tokenizer_path: str = field(metadata=TOKENIZER_PATH)
    causal: bool | None = flag(  # None: the checkpoint decides
        "causal attention, and classify from each sentence's last token (default: from the "
        "checkpoint; on for llama2.c's .bin and for folders; off if a .pt does not say)",
        None,
        recorded=False,  # the mode in force is recorded, see runtime.py
        action=argparse.BooleanOptionalAction,
    )
    deterministic: bool = switch(
        "use deterministic operations only: runs on the same machine give the same numbers, on "
        "CUDA too, where it takes longer; for generate also without measured kernels"
    )
    compile: bool = switch("compile the model's layers: starts slowly, then runs faster")

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint that the task starts from; None: a new model."""
        return self.pretrained_model_path

    @property
    def input_files(self) -> tuple[str, ...]:
        """The files that the task reads."""
        data = [path for name in self.reads for path in as_tuple(getattr(self, name))]
        model = () if self.checkpoint is None else model_files(self.checkpoint)
        return (*model, self.tokenizer_path, *data)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions):
    """Options of `--option generate`."""

    prompt: tuple[str, ...] = flag(
        "text to continue, - for standard input; may be repeated (default: the assignment's)",
        action="append",
    )
    max_new_tokens: int = flag("number of tokens to generate", 75, type=at_least_one)
    temperature: float | None = flag(
        "divides the logits before the softmax; 0: always the token with the highest logit "
        "(default: one text at 0 and one at 1)",
        None,
        type=non_negative,
    )
    top_k: int = flag("sample from the k likeliest tokens; 0: from all", 0, type=non_negative_int)
    top_p: float = flag(
        "nucleus sampling: sample from the smallest set of tokens with this total probability",
        1.0,
        type=positive_fraction,
    )
    num_samples: int = flag("texts per prompt", 1, type=at_least_one)
    stop_at_eos: bool = switch("end a text at EOS or BOS")
    stream: bool = switch("print each text while it is generated")
    quantize: str | None = flag(
        "store the weight matrices as int8 (causal mode on the CPU)", None, choices=("int8",)
    )
    generated_sentence_low_temp_out: str = flag(
        "file of the text at temperature 0 (default: output/task_1/generated-sentence-temp-0.txt)"
    )
    generated_sentence_high_temp_out: str = flag(
        "file of the text at temperature 1, or --temperature (default: "
        "output/task_1/generated-sentence-temp-<temperature>.txt)"
    )

    def __post_init__(self) -> None:
        if self.quantize and self.dtype == "float32":
            raise ValueError("--quantize int8 computes in bfloat16, not in --dtype float32")
        if self.prompt.count("-") > 1:
            raise ValueError("--prompt -: standard input can be read only once")

    @property
    def outfiles(self) -> dict[float, str]:
        """The output file of each temperature."""
        low, high = self.generated_sentence_low_temp_out, self.generated_sentence_high_temp_out
        if self.temperature is None:
            return {0.0: low, 1.0: high}
        return {self.temperature: high if self.temperature else low}

    @property
    def output_files(self) -> tuple[str, ...]:
        """The files that the task writes."""
        return tuple(self.outfiles.values())

    @property
    def exceeds_assignment(self) -> bool:
        """Return whether the texts need more than the assignment's own loop, `Llama.generate`."""
        names = ("top_k", "top_p", "num_samples", "stop_at_eos", "stream")
        return any(getattr(self, name) != getattr(GenerateOptions, name) for name in names)


@dataclass(frozen=True, kw_only=True)
class DataOptions(ModelOptions):
    """Options of the tasks that read data files."""

    dataset: str = flag(
        "sets the data files and the names of all results", choices=("sst", "cfimdb", "demo")
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(DataOptions):
    """Options of the tasks that classify labelled sentences."""

    train: str = field(metadata=TRAIN)
    dev: str = field(metadata=DEV)
    test: str = flag(
        "UTF-8 lines `label ||| sentence`, with label -1 if it is not known "
        "(default: data/cfimdb-test.txt)",
        metavar="FILE",
    )
    label_names: str = field(metadata=LABEL_NAMES)
    dev_out: str = flag(
        "dev predictions, in a file named ...dev-prompting-output.txt or "
        "...dev-finetuning-output.txt (default: output/task_{2,3}/<dataset>-dev-...)"
    )
    test_out: str = flag(
        "test predictions, in a file named ...test-prompting-output.txt or "
        "...test-finetuning-output.txt (default: output/task_{2,3}/<dataset>-test-...)"
    )

    results_folder: ClassVar[str]  # where the prediction files go by default
    results_kind: ClassVar[str]  # the word in their names

    def __post_init__(self) -> None:
        for name, path in (("dev_out", self.dev_out), ("test_out", self.test_out)):
            ending = self.ending(name.removesuffix("_out"))
            if not path.endswith(ending):
                raise ValueError(f"--{name} {path}: must end in {ending}")

    @property
    def data_files(self) -> dict[str, str]:
        """The data file of each split that the task reads."""
        splits = ("train", "dev", "test")
        return {split: getattr(self, split) for split in splits if split in self.reads}

    @property
    def prediction_files(self) -> dict[str, str]:
        """The files of the predictions, by split."""
        return {"dev": self.dev_out, "test": self.test_out}

    @classmethod
    def ending(cls, split: str) -> str:
        """Return how the name of a prediction file has to end."""
        return f"{split}-{cls.results_kind}-output.txt"


@dataclass(frozen=True, kw_only=True)
class PromptOptions(EvaluationOptions, ZeroShotOptions):
    """Options of `--option prompt`."""

    reads = ("label_names", "dev", "test")
    writes = ("dev_out", "test_out")
    results_folder, results_kind = "output/task_2", "prompting"


@dataclass(frozen=True)
class RunOptions:
    """What a training run needs to know besides its model, optimizer and data."""

    filepath: str  # of the result
    log_folder: Path  # where TensorBoard finds the runs
    input_files: tuple[str, ...]
    output_files: tuple[str, ...]
    hyperparameters: Mapping[str, str]
    seed: int  # of the order of the data
    epochs: int
    batch_size: int
    micro_batch_size: int | None  # rows that are computed at a time; None: all
    save_every: int | None  # steps; None: after each epoch
    resume: bool
    patience: int = 0  # epochs without a better score after which the run ends; 0: never

    @property
    def training_checkpoint(self) -> Path:
        """Where the run is saved until it is complete."""
        return training_checkpoint(self.filepath)


def training_checkpoint(filepath: str) -> Path:
    """Return where a run is saved, beside its result."""
    return Path(f"{filepath}.state")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(DataOptions):
    """Options of the tasks that train."""

    epochs: int = flag("passes over the training data", 5, type=at_least_one)
    lr: float = flag(
        "learning rate of AdamW (default: 2e-5); for pretrain its peak (default: 1e-3 for a new "
        "model, else 1e-4)",
        type=non_negative,
    )
    dropout: float | None = flag(
        "dropout probability on embeddings and inside the layers (default: the checkpoint's; 0 "
        "for a new model)",
        None,
        type=dropout_probability,
    )
    filepath: str = field(metadata=FILEPATH)
    micro_batch_size: int | None = flag(
        "compute this many rows of a batch at a time, which takes less memory (default: all)",
        None,
        recorded=False,
        type=at_least_one,
    )
    save_every: int | None = flag(
        "steps between two training checkpoints (default: one after each epoch)",
        None,
        recorded=False,
        type=at_least_one,
    )
    resume: bool = switch("resume the interrupted run of this --filepath", recorded=False)

    @property
    def log_folder(self) -> Path:
        """The folder in which TensorBoard finds the runs."""
        return Path(self.filepath).parent

    @property
    def run(self) -> RunOptions:
        """The part of the options that a training run needs."""
        return RunOptions(
            filepath=self.filepath,
            log_folder=self.log_folder,
            input_files=self.input_files,
            output_files=self.output_files,
            hyperparameters=self.hyperparameters(),
            seed=self.seed,
            epochs=self.epochs,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            save_every=self.save_every,
            resume=self.resume,
        )

    @property
    def training_checkpoints(self) -> tuple[Path, ...]:
        """Where the task's runs are saved until they are complete."""
        return (training_checkpoint(self.filepath),)

    @property
    def results(self) -> tuple[str, ...]:
        """Results, records and training checkpoints, to be locked."""
        return (*super().results, *map(str, self.training_checkpoints))


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(EvaluationOptions, TrainingOptions, MethodOptions):
    """Options of `--option finetune`."""

    hidden_dropout_prob: float = flag(
        "dropout probability before the classifier's head", 0.3, type=dropout_probability
    )
    seeds: tuple[int, ...] = flag(
        "finetune once with each of these seeds, such as 1,2,3; writes mean and standard deviation",
        (),
        recorded=False,
        type=seed_list,
    )

    left_to_rule: tuple[str, ...] = ()  # flags that a recipe's rule has still to set; not a flag

    reads = ("label_names", "dev", "test", "train")
    writes = ("dev_out", "test_out", "filepath")
    results_folder, results_kind = "output/task_3", "finetuning"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_method()

    @property
    def tables(self) -> dict[str, str]:
        """The tables of the predictions, by split: beside the checkpoint, with its name."""
        path = Path(self.filepath)
        # In a name such as a-0.001 the ending is a part of a number.
        stem = path.stem if path.suffix[1:2].isalpha() else path.name
        return {split: str(path.with_name(f"{stem}.{split}.tsv")) for split in ("dev", "test")}

    @property
    def output_files(self) -> tuple[str, ...]:
        """The results of one run; with several seeds, each run has results of its own."""
        return (*super().output_files, *self.tables.values(), *self.advanced_files.values())

    @property
    def advanced_files(self) -> dict[str, str]:
        """The predictions under the names that the course takes for extra work, by split.

        There are none without a recipe.
        """
        files = self.prediction_files if self.recipe else {}
        return {
            split: f"{path.removesuffix(self.ending(split))}{split}-advanced-output.txt"
            for split, path in files.items()
        }

    @property
    def recipe_flags(self) -> list[str]:
        """The flags that the recipe stands for, with the values in force, as a command has them."""
        names = dict.fromkeys([*RECIPES[self.recipe], *RULED] if self.recipe else [])
        declared = flags_of(type(self))
        return [w for name in names for w in declared[name].words(name, getattr(self, name))]

    @property
    def log_folder(self) -> Path:
        """The folder in which TensorBoard finds the runs."""
        return Path(self.dev_out).parent

    @property
    def run(self) -> RunOptions:
        """The part of the options that a training run needs."""
        assert not self.left_to_rule, "the recipe's rule has not been applied"
        return replace(super().run, patience=self.patience)

    @property
    def seeds_file(self) -> Path:
        """Where the accuracies of several seeds are written."""
        return Path(self.filepath).with_suffix(".seeds.json")

    def per_seed(self) -> "list[FinetuneOptions]":
        """Return the options of one run per seed, each with results of its own."""
        return [self.for_seed(seed) for seed in self.seeds]

    def for_seed(self, seed: int) -> "FinetuneOptions":
        """Return the options of the run with one of several seeds."""
        path = Path(self.filepath)
        filepath = str(path.with_name(f"{path.stem}-seed-{seed}{path.suffix}"))

        def name(split: str, path: str) -> str:
            ending = self.ending(split)
            return f"{path.removesuffix(ending)}seed-{seed}-{ending}"

        return replace(
            self,
            seed=seed,
            seeds=(),
            filepath=filepath,
            dev_out=name("dev", self.dev_out),
            test_out=name("test", self.test_out),
            resume=self.resume and training_checkpoint(filepath).exists(),
        )

    @property
    def training_checkpoints(self) -> tuple[Path, ...]:
        """Where the task's runs are saved until they are complete."""
        runs = self.per_seed() if self.seeds else [self]
        return tuple(training_checkpoint(run.filepath) for run in runs)

    @property
    def results(self) -> tuple[str, ...]:
        """Results, records and training checkpoints, to be locked."""
        if not self.seeds:
            return super().results
        runs = [path for run in self.per_seed() for path in run.results]
        return (*runs, str(self.seeds_file))


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(TrainingOptions):
    """Options of `--option pretrain`."""

    train: tuple[str, ...] = field(metadata=TRAIN)
    dev: tuple[str, ...] = field(metadata=DEV)
    dim: int | None = flag(
        f"starts a new model: its hidden size (default: {LlamaConfig.dim})", None, type=at_least_one
    )
    n_layers: int | None = flag(
        f"starts a new model: its layers (default: {LlamaConfig.n_layers})", None, type=at_least_one
    )
    n_heads: int | None = flag(
        f"starts a new model: its query heads (default: {LlamaConfig.n_heads})",
        None,
        type=at_least_one,
    )
    n_kv_heads: int | None = flag(
        "starts a new model: its key/value heads (default: as many as query heads)",
        None,
        type=at_least_one,
    )
    max_seq_len: int | None = flag(
        "tokens per block, and the longest sequence that the model takes (default: the "
        f"checkpoint's; {LlamaConfig.max_seq_len} for a new model)",
        None,
        type=at_least_one,
    )
    store_dtype: str = flag(
        "dtype of the weights in the result", "float32", choices=("float32", "bfloat16", "float16")
    )

    reads = ("train", "dev")
    writes = ("filepath",)
    shape_names: ClassVar[tuple[str, ...]] = ("dim", "n_layers", "n_heads", "n_kv_heads")

    def __post_init__(self) -> None:
        if self.causal is False:
            raise ValueError(
                "--no-causal: pretraining needs causal attention; without the mask the model "
                "would see the tokens that it has to predict"
            )

    @property
    def shape(self) -> dict[str, int]:
        """The sizes of a new model that were given; empty if a checkpoint is trained further."""
        sizes = {name: getattr(self, name) for name in self.shape_names}
        return {name: size for name, size in sizes.items() if size is not None}


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions(TaskOptions):
    """Options of `--option classify`."""

    filepath: str = field(metadata=FILEPATH)
    tokenizer_path: str | None = field(default=None, metadata=TOKENIZER_PATH)
    label_names: str | None = field(default=None, metadata=LABEL_NAMES)
    input: str | None = flag(
        "sentences, one a line, or lines `label ||| sentence` (default: standard input)",
        None,
        metavar="FILE",
    )
    output: str | None = flag(
        "file of the results (default: standard output)", None, metavar="FILE"
    )
    json: bool = switch("write JSON lines with the probabilities of all labels, instead of TSV")

    seed: ClassVar[int] = 0  # not a flag, since classifying draws no random numbers
    reads = ("filepath", "tokenizer_path", "label_names", "input")
    writes = ("output",)

    @property
    def checkpoint(self) -> str:
        """The classifier's checkpoint."""
        return self.filepath

    @property
    def input_files(self) -> tuple[str, ...]:
        """The files that the task reads."""
        paths = (getattr(self, name) for name in self.reads)
        return tuple(path for path in paths if path is not None)

    @property
    def output_files(self) -> tuple[str, ...]:
        """The file that the task writes, if it writes one."""
        return () if self.output is None else (self.output,)


Options = GenerateOptions | PromptOptions | FinetuneOptions | PretrainOptions | ClassifyOptions
TASKS: dict[str, type[Options]] = {
    "generate": GenerateOptions,
    "prompt": PromptOptions,
    "finetune": FinetuneOptions,
    "pretrain": PretrainOptions,
    "classify": ClassifyOptions,
}


def as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return one path or several as a tuple."""
    return (value,) if isinstance(value, str) else value


def record_path(path: str | Path) -> str:
    """Return where the record of a result is written, see `records.py`."""
    return f"{path}.json"


@cache  # asked for once for each flag and task
def flags_of(task: type[TaskOptions]) -> Mapping[str, Flag]:
    """Return the flags of a task by the names of their fields."""
    return {f.name: f.metadata["flag"] for f in fields(task) if "flag" in f.metadata}


def tasks_of(name: str) -> tuple[str, ...]:
    """Return the tasks that have a flag."""
    return tuple(task for task, options in TASKS.items() if name in flags_of(options))
