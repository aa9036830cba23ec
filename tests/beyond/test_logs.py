"""TensorBoard: the hyperparameters, the curves of each step, and tables."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from beyond.batches import Batch
from beyond.logs import EpochTotals, StepLog, StepLoss, log_confusion, markdown_table
from beyond.options import FinetuneOptions, flags_of
from run_llama import main
from tests.conftest import SENTENCES

FINETUNE = ["--option", "finetune", "--batch_size", "3", "--epochs", "2", "--lr", "1e-3"]


def read_texts(folder: str) -> dict[str, str]:
    """Return the last text of each tag of the one TensorBoard run in a folder."""
    (run,) = [path for path in Path(folder).iterdir() if path.is_dir()]
    events = EventAccumulator(str(run)).Reload()
    texts = {tag: events.Tensors(tag)[-1].tensor_proto for tag in events.Tags()["tensors"]}
    return {tag: text.string_val[0].decode() for tag, text in texts.items()}


def read_settings(folder: str) -> dict[str, str]:
    """Return the rows of the table of hyperparameters, without the code marks."""
    head, rule, *rows = read_texts(folder)["settings/text_summary"].splitlines()
    assert (head, rule) == ("| setting | value |", "|---|---|")
    cells = [row.removeprefix("| ").removesuffix(" |").split(" | ") for row in rows]
    assert all(value[0] == value[-1] == "`" for _, value in cells)
    settings = {name: value[1:-1] for name, value in cells}
    assert list(settings) == sorted(settings) and len(settings) == len(rows)
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
    argv = [*FINETUNE, *flags, "--hidden_dropout_prob", "0.25", "--save_every", "2"]
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
        "lr": "0.001",
        "dropout": "None",
        "hidden_dropout_prob": "0.25",
        "filepath": "output/task_3/cfimdb-finetune-2-0.001.pt",
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


# ---------------------------------------------------------------------------------------- tables


def test_a_markdown_table_escapes_the_bars_in_its_cells() -> None:
    rows: list[list[object]] = [["a|b", "count"], ["x", 3], ["| |", 0.5]]
    assert markdown_table(rows) == ("| a\\|b | count |\n|---|---|\n| x | 3 |\n| \\| \\| | 0.5 |")


class Recorder:
    """Takes the place of a `SummaryWriter`."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: list[tuple[str, str, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts.append((tag, text, step))

    def curve(self, tag: str) -> list[tuple[int, float]]:
        """Return steps and values of one curve."""
        return [(step, value) for name, value, step in self.scalars if name == tag]


def write(log: StepLog, recorder: Recorder) -> None:
    log.write(recorder)  # type: ignore[arg-type]


def test_a_confusion_matrix_has_a_row_per_gold_label() -> None:
    recorder: Any = Recorder()
    log_confusion(recorder, 4, [[5, 1], [2, 7]], ["bad", "good"])
    table = (
        "| gold \\ predicted | bad | good |\n|---|---|---|\n"
        "| **bad** | 5 | 1 |\n| **good** | 2 | 7 |"
    )
    assert recorder.texts == [("dev confusion (best epoch)", f"epoch 4\n\n{table}", 4)]


# ----------------------------------------------------------------------------- curves of each step


def step_loss(value: float, divisor: int = 4, lines: Sequence[int] = (0, 1, 2)) -> StepLoss:
    """Make the loss of a batch with rows of 3 columns, and 2 tokens in each."""
    tokens, lengths = torch.ones(len(lines), 3, dtype=torch.long), torch.full((len(lines),), 2)
    batch = Batch(tokens, lengths, torch.zeros_like(lengths), list(lines), "x.txt")
    return StepLoss(torch.tensor(value), divisor, batch)


def test_a_step_is_written_with_its_loss_learning_rate_and_speed() -> None:
    log, recorder = StepLog(), Recorder()
    for i in range(10):
        assert not log.is_full()
        log.add(7 + i, step_loss(i / 4), learning_rate=i / 8)
    assert log.is_full() and log.totals == EpochTotals()
    write(log, recorder)
    assert not log.is_full()
    assert recorder.curve("step/loss") == [(7 + i, i / 4) for i in range(10)]
    assert recorder.curve("step/learning_rate") == [(7 + i, i / 8) for i in range(10)]
    speeds = recorder.curve("step/tokens_per_second")
    assert [step for step, _ in speeds] == list(range(7, 17))
    assert all(0 < speed < math.inf for _, speed in speeds)
    write(log, recorder)  # has nothing to write
    assert len(recorder.curve("step/loss")) == 10


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
    assert recorder.curve("step/loss") == [(20, 1.0), (21, 2.0)]
