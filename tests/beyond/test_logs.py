"""TensorBoard: the files of a run, its hyperparameters, and the curves of its steps."""

import json
import math
import re
import signal
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from beyond.batches import Batch
from beyond.command_line import get_args
from beyond.interrupts import Interrupted
from beyond.logs import (
    EpochTotals,
    StepLog,
    StepLoss,
    describe_method,
    hparams_summaries,
    markdown_table,
    peak_memory,
    sort_settings,
)
from beyond.methods.options import MethodOptions
from beyond.options import FinetuneOptions, flags_of
from beyond.run import TrainingRun
from run_llama import main
from tests.conftest import SENTENCES

FINETUNE = ["--option", "finetune", "--batch_size", "3", "--epochs", "2", "--lr", "1e-3"]


def read_texts(folder: str) -> dict[str, str]:
    """Return the last text of each tag in the sub-run `train` of the one run in a folder."""
    (run,) = [path for path in Path(folder).iterdir() if path.is_dir()]
    assert {path.name for path in run.iterdir()} == {"train", "dev"}
    events = EventAccumulator(str(run / "train")).Reload()
    texts = {tag: events.Tensors(tag)[-1].tensor_proto for tag in events.Tags()["tensors"]}
    return {tag: text.string_val[0].decode() for tag, text in texts.items()}


def read_settings(folder: str) -> dict[str, str]:
    """Return the rows of the table of hyperparameters, without the code marks."""
    head, rule, *rows = read_texts(folder)["settings/text_summary"].splitlines()
    assert (head, rule) == ("| setting | value |", "|---|---|")
    cells = [row.removeprefix("| ").removesuffix(" |").split(" | ") for row in rows]
    assert all(value[0] == value[-1] == "`" for _, value in cells)
    settings = {name: value[1:-1] for name, value in cells}
    assert len(settings) == len(rows)
    first = ["lr", "batch_size", "epochs", "seed", "mode", "dtype"]
    first += ["hidden_dropout_prob", "dropout", "device", "option", "dataset"]
    names = list(settings)
    assert names[: len(first)] == first and names[len(first)] == "bregman"
    hashes = [name.startswith("SHA-256 of ") for name in names]
    assert hashes == sorted(hashes)  # they are last
    return settings


# ------------------------------------------------------------------------------ hyperparameters


@pytest.mark.parametrize(
    ("flags", "dtype", "mode"),
    [([], "float32", "reference"), (["--causal", "--dtype", "bfloat16"], "bfloat16", "causal")],
)
def test_the_page_of_a_finetuning_has_its_own_settings_only(
    workplace: Path, flags: list[str], dtype: str, mode: str
) -> None:
    """Those that identify the run: no flag of another task, and none that leaves the result."""
    argv = [*FINETUNE, "--lr", "2e-5", *flags, "--hidden_dropout_prob", "0.25", "--save_every", "2"]
    assert main([*argv, "--micro_batch_size", "2"]) == 0
    settings = read_settings("output/task_3")
    expected = {
        "option": "finetune",
        "seed": "1337",
        "device": "cpu",
        "dtype": dtype,
        "mode": mode,
        "pretrained_model_path": "stories42M.pt",
        "tokenizer_path": "tokenizer.model",
        "max_sentence_len": "None",
        "batch_size": "3",
        "dataset": "cfimdb",
        "train": "data/cfimdb-train.txt",
        "dev": "data/cfimdb-dev.txt",
        "test": "data/cfimdb-test.txt",
        "label_names": "data/cfimdb-label-mapping.json",
        "dev_out": "output/task_3/cfimdb-dev-finetuning-output.txt",
        "test_out": "output/task_3/cfimdb-test-finetuning-output.txt",
        "deterministic": "False",
        "compile": "False",
        "epochs": "2",
        "lr": "2e-05",
        "dropout": "None",
        "hidden_dropout_prob": "0.25",
        "filepath": "output/task_3/cfimdb-finetune-2-2e-05.pt",
        **{field.name: str(field.default) for field in fields(MethodOptions)},
    }
    hashes = {name for name in settings if name.startswith("SHA-256 of ")}
    assert hashes == {
        f"SHA-256 of {expected[name]}"
        for name in ("pretrained_model_path", "tokenizer_path", "train", "dev", "test")
    } | {"SHA-256 of data/cfimdb-label-mapping.json"}
    assert {name: settings[name] for name in settings if name not in hashes} == expected
    hidden = {"stream", "top_k", "quantize", "notes", "resume", "seeds", "use_gpu", "causal"}
    hidden |= {"micro_batch_size", "save_every", "prompt", "n_layers"}
    assert not hidden & settings.keys()


def test_every_flag_of_a_finetuning_is_recorded_or_declared_not_to_be(workplace: Path) -> None:
    """Also with a value that has a | inside, which would end a cell of the table."""
    assert main([*FINETUNE, "--filepath", "out/a|b.pt", "--epochs", "1"]) == 0
    settings = read_settings("output/task_3")
    assert settings["filepath"] == "out/a\\|b.pt"
    flags = flags_of(FinetuneOptions)
    for name, flag in flags.items():
        assert (name in settings) == (flag.recorded or name == "dtype"), name
    others = settings.keys() - flags.keys()
    assert {name for name in others if not name.startswith("SHA-256 of ")} == {"device", "mode"}


def test_the_settings_that_matter_are_first_and_hashes_last() -> None:
    names = ["SHA-256 of a", "train", "lr", "dropout", "a_flag", "seed"]
    assert sort_settings(names) == ["lr", "seed", "dropout", "a_flag", "train", "SHA-256 of a"]


def test_the_table_of_runs_compares_settings_and_scores() -> None:
    settings = {"lr": "2e-05", "batch_size": "8", "epochs": "5", "seed": "1337"}
    settings |= {"mode": "causal", "dtype": "float32", "hidden_dropout_prob": "0.3"}
    settings |= {"dropout": "None", "option": "finetune", "filepath": "a.pt"}
    settings |= {"pooling": "mean", "linear_decay": "True", "warmup": "0.0", "recipe": "None"}
    experiment, start, end = (
        HParamsPluginData.FromString(summary.value[0].metadata.plugin_data.content)
        for summary in hparams_summaries(settings)
    )
    row = start.session_start_info.hparams
    numbers = {name: row[name].number_value for name in ("lr", "batch_size", "epochs", "seed")}
    assert numbers == {"lr": 2e-5, "batch_size": 8, "epochs": 5, "seed": 1337}
    words = {name: row[name].string_value for name in row if name not in numbers}
    assert words == {
        "mode": "causal",
        "method": "--pooling mean --linear_decay",
        "dtype": "float32",
        "hidden_dropout_prob": "0.3",
        "dropout": "of the checkpoint",
    }
    columns = experiment.experiment.hparam_infos
    assert {column.name for column in columns} == set(row)
    # TensorBoard shows five columns at first, and those that are marked come first.
    marked = {column.name for column in columns if column.differs}
    assert marked == {"lr", "epochs", "seed", "mode", "method"}
    scores = [metric.name.tag for metric in experiment.experiment.metric_infos]
    assert scores == ["result/dev_accuracy", "result/test_accuracy"]
    assert end.session_end_info.status == Status.Value("STATUS_SUCCESS")


def test_the_table_of_pretraining_runs_has_no_methods() -> None:
    settings = {"lr": "0.001", "batch_size": "8", "epochs": "5", "seed": "1337", "mode": "causal"}
    summary = hparams_summaries({**settings, "option": "pretrain", "dtype": "bfloat16"})[0]
    content = summary.value[0].metadata.plugin_data.content
    columns = HParamsPluginData.FromString(content).experiment.hparam_infos
    assert {column.name for column in columns} == {*settings, "dtype"}
    assert {column.name for column in columns if column.differs} == set(settings)


@pytest.mark.parametrize("method", ["--head label_words --wise_ft 0.5", "--ema 0.9", "plain"])
def test_a_method_is_described_by_its_flags(workplace: Path, method: str) -> None:
    flags = [] if method == "plain" else method.split()
    assert describe_method(get_args([*FINETUNE, *flags]).hyperparameters()) == method


def test_every_seed_is_a_row_of_the_table_of_runs(workplace: Path) -> None:
    """TensorBoard looks for the scores in the run that holds the settings."""
    argv = [*FINETUNE, "--seeds", "4,5,6", "--epochs", "1"]
    assert main(argv) == 0
    rows = {}
    for folder in Path("output/task_3").glob("*/*"):
        events = EventAccumulator(str(folder)).Reload()
        tags = events.summary_metadata
        if "_hparams_/session_start_info" in tags:
            content = tags["_hparams_/session_start_info"].plugin_data.content
            hparams = HParamsPluginData.FromString(content).session_start_info.hparams
            assert "_hparams_/experiment" in tags and "_hparams_/session_end_info" in tags
            scores = ("result/dev_accuracy", "result/test_accuracy")
            rows[hparams["seed"].number_value] = [events.Scalars(s)[-1].value for s in scores]
    (path,) = Path("output/task_3").glob("*.seeds.json")
    accuracies = json.loads(path.read_text())["accuracy"]
    assert {int(seed): pytest.approx(pair) for seed, pair in accuracies.items()} == rows
    assert sorted(rows) == [4, 5, 6]


# ---------------------------------------------------------------------------------------- tables


def test_a_markdown_table_escapes_the_bars_in_its_cells() -> None:
    rows: list[list[object]] = [["a|b", "count"], ["x", 3], ["| |", 0.5]]
    assert markdown_table(rows) == ("| a\\|b | count |\n|---|---|\n| x | 3 |\n| \\| \\| | 0.5 |")


class Recorder:
    """Takes the place of a `SummaryWriter`."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def curve(self, tag: str) -> list[tuple[int, float]]:
        """Return steps and values of one curve."""
        return [(step, value) for name, value, step in self.scalars if name == tag]


def write(log: StepLog, recorder: Recorder) -> None:
    log.write(recorder)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------- curves of each step


def step_loss(value: float, divisor: int = 4, lines: Sequence[int] = (0, 1, 2)) -> StepLoss:
    """Make the loss of a batch with rows of 3 columns, and 2 tokens in each."""
    tokens, lengths = torch.ones(len(lines), 3, dtype=torch.long), torch.full((len(lines),), 2)
    batch = Batch(tokens, lengths, torch.zeros_like(lengths), torch.tensor(lines), "x.txt")
    return StepLoss(torch.tensor(value), divisor, batch)


def test_a_step_is_written_with_its_loss_learning_rate_and_speed() -> None:
    log, recorder = StepLog(), Recorder()
    for i in range(10):
        assert not log.is_full()
        log.add(7 + i, step_loss(i / 4), i / 8, gradient_norm=torch.tensor(i / 2))
    assert log.is_full() and log.totals == EpochTotals()
    write(log, recorder)
    assert not log.is_full()
    # Step 7 is the eighth, so 8 steps are done after it.
    assert recorder.curve("loss") == [(8 + i, i / 4) for i in range(10)]
    assert recorder.curve("learning_rate") == [(8 + i, i / 8) for i in range(10)]
    assert recorder.curve("gradient_norm") == [(8 + i, i / 2) for i in range(10)]
    for name, largest in (("tokens_per_second", math.inf), ("peak_memory", 1000)):
        curve = recorder.curve(name)
        assert [step for step, _ in curve] == list(range(8, 18))
        assert all(0 < value < largest for _, value in curve)
    assert log.last_loss == pytest.approx(4.5 / 4)  # their mean
    write(log, recorder)  # has nothing to write
    assert len(recorder.curve("loss")) == 10


def test_the_peak_memory_is_the_largest_resident_set_in_gib() -> None:
    """Linux says the same in `/proc`; a block that is freed again still counts."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system has no /proc")
    block = torch.ones(50_000_000)  # 0.19 GiB
    del block
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert peak_memory(torch.device("cpu")) == pytest.approx(int(kib) / 2**20, rel=0.05)


def test_a_run_writes_every_ten_steps_and_at_the_end_of_an_epoch(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a loss waits for the device, so nothing is written in between."""
    sizes: list[int] = []
    write_steps = StepLog.write

    def recording(self: StepLog, writer: Any) -> None:
        if self.pending:
            sizes.append(len(self.pending))
        write_steps(self, writer)

    monkeypatch.setattr(StepLog, "write", recording)
    text = "\n".join(SENTENCES * 3) + "\n"
    Path("data/cfimdb-train.txt").write_text(text, encoding="utf-8")
    assert main([*FINETUNE, "--batch_size", "1", "--epochs", "2"]) == 0
    assert sizes == [10, 10, 4] * 2  # 24 steps per epoch


def test_the_totals_are_sums_over_the_steps_of_the_epoch() -> None:
    """A step's loss was divided by its divisor; tokens are counted without and with padding."""
    log, recorder = StepLog(), Recorder()
    log.add(0, step_loss(1.5, divisor=4), 0.1)
    log.add(1, step_loss(2.0, divisor=3, lines=(5, 6)), 0.1)
    assert log.totals == EpochTotals()
    write(log, recorder)
    assert log.totals == EpochTotals(loss=1.5 * 4 + 2.0 * 3, tokens=10, padded_tokens=15)
    log.add(2, step_loss(1.0, divisor=1), 0.1)
    write(log, recorder)
    assert log.totals == EpochTotals(loss=13.0, tokens=16, padded_tokens=24)
    log.start_epoch()
    assert log.totals == EpochTotals()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_of_nan_names_step_learning_rate_and_lines(value: float) -> None:
    """The steps before it are written, and those after it are not."""
    log, recorder = StepLog(), Recorder()
    log.add(20, step_loss(1.0), 0.5)
    log.add(21, step_loss(2.0), 0.5)
    log.add(22, step_loss(value, lines=(3, 11)), 1e-3)
    log.add(23, step_loss(4.0), 0.5)
    message = (
        f"^step 22: the loss is {value} at a learning rate of 0.001 in lines 4, 12 of x.txt; "
        "try a lower --lr$"
    )
    with pytest.raises(ValueError, match=message):
        write(log, recorder)
    assert recorder.curve("loss") == [(21, 1.0), (22, 2.0)]


# -------------------------------------------------------------------------------- resumed runs


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    """Run until a signal arrives in a step."""
    done = 0

    def stop() -> None:
        nonlocal done
        done += 1
        if done == steps:
            raise Interrupted(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("beyond.run.stop_if_asked", stop)
        assert main(argv) == 130


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(e.step, e.value) for e in EventAccumulator(str(folder)).Reload().Scalars(tag)]


@pytest.mark.parametrize(
    ("task", "steps", "flags"),
    [
        ("finetune", 1, []),
        ("finetune", 3, []),  # the epoch's evaluation is still to come
        ("finetune", 4, ["--save_every", "1"]),
        ("finetune", 6, []),
        ("pretrain", 3, ["--save_every", "1"]),
    ],
)
def test_a_resumed_run_continues_its_own_curves(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, task: str, steps: int, flags: list[str]
) -> None:
    """With the points of an uninterrupted run, each once; also if it stops at an epoch's end."""
    argv = [*FINETUNE, "--filepath", "out/a.pt", "--dev_out", "out/dev-finetuning-output.txt"]
    if task == "pretrain":
        argv = ["--option", "pretrain", "--epochs", "2", "--batch_size", "4", "--dim", "16"]
        argv += ["--n_layers", "1", "--n_heads", "2", "--max_seq_len", "16", "--filepath"]
        argv += ["out/a.pt", "--tokenizer_path", "tokenizer.model"]
    assert main(argv) == 0
    (whole,) = Path("out").glob("*/")
    whole.rename("whole")
    interrupt_after(steps, monkeypatch, [*argv, *flags])
    assert main([*argv, *flags, "--resume"]) == 0
    (resumed,) = Path("out").glob("*/")
    tags = {"train": ["loss", "learning_rate", "gradient_norm"], "dev": ["loss"]}
    if task == "finetune":
        tags["train"] += ["accuracy", "macro_f1"]
        tags["dev"] += ["accuracy", "f1/bad", "result/dev_accuracy", "result/test_accuracy"]
    for name in tags:
        for tag in tags[name]:
            points = curve(resumed / name, tag)
            assert points == curve(Path("whole") / name, tag), (name, tag)
            assert points


@pytest.mark.parametrize("save_every", ["1", "2"])
def test_what_is_repeated_after_a_crash_has_one_point(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, save_every: str
) -> None:
    """The run crashes behind an epoch's evaluation, and resumes before it or a step earlier."""
    argv = [*FINETUNE, "--filepath", "out/a.pt", "--dev_out", "out/dev-finetuning-output.txt"]

    def crash(run: TrainingRun[Any]) -> None:
        run.writers.flush()
        raise OSError("crash")

    with monkeypatch.context() as patch:
        patch.setattr("beyond.reports.print_epoch_end", crash)
        assert main([*argv, "--save_every", save_every]) == 2
    assert main([*argv, "--save_every", save_every, "--resume"]) == 0
    (folder,) = Path("out").glob("*/")
    for tag in ("loss", "accuracy", "f1/good"):
        assert [step for step, _ in curve(folder / "dev", tag)] == [3, 6]
    assert [step for step, _ in curve(folder / "train", "loss")] == [1, 2, 3, 4, 5, 6]
