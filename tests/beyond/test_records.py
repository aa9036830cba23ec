"""Records beside the results, and the tables of fine-tuning."""

import hashlib
import json
import math
import shlex
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import run_llama
from base_llama import read_checkpoint, write_checkpoint
from beyond import records
from beyond.command_line import get_args
from beyond.options import FinetuneOptions
from beyond.records import VERSION, tsv_line, write_record, write_table
from beyond.runtime import load_model
from run_llama import main
from tests.conftest import ROOT, SENTENCES
from tests.test_run_llama import FINETUNE, PROMPT, predicted, run
from utils import Evaluation

PRETRAIN = ["--option", "pretrain", "--epochs", "1", "--max_seq_len", "16"]
# It could be a record, but for its length.
LONG_RECORD = b'{"result": 1, "command": 2, "version": 3}' + b" " * 10**6
GENERATE = ["--max_new_tokens", "2"]


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_record(path: str | Path) -> dict[str, Any]:
    """Read the record of a result, and check what all records have in common."""
    record = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
    assert list(record) == [
        *("result", "result SHA-256", "command", "version", "checkpoint", "checkpoint SHA-256"),
        *("device", "dtype", "mode", "seed", "scores", "time"),
    ]
    assert record["result"] == Path(path).name
    assert record["result SHA-256"] == sha256(path)
    assert record["version"] == VERSION
    age = datetime.now(UTC) - datetime.fromisoformat(record["time"])
    assert timedelta() <= age < timedelta(minutes=5)
    return record


def assert_record(path: str | Path, argv: list[str], checkpoint: str | None, **more: Any) -> None:
    """Check a record of a run on the CPU in float32; `more` is what else it holds."""
    record = read_record(path)
    assert record["command"] == shlex.join(["run_llama.py", *argv])
    assert record["checkpoint"] == checkpoint
    assert record["checkpoint SHA-256"] == (None if checkpoint is None else sha256(checkpoint))
    defaults = {"device": "cpu", "dtype": "float32", "mode": "reference", "seed": 1337}
    for name, value in {**defaults, **more}.items():
        assert record[name] == value, name


def scores_of(path: str) -> dict[str, Any]:
    return read_record(path)["scores"]


# ------------------------------------------------------------------------------- by task


def test_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == VERSION


def test_generated_texts_have_records(workplace: Path) -> None:
    argv = [*GENERATE, "--seed", "5", "--causal", "--prompt", "A film's end"]
    assert main(argv) == 0
    for temperature in (0, 1):
        path = f"output/task_1/generated-sentence-temp-{temperature}.txt"
        scores = {"temperature": temperature}
        assert_record(path, argv, "stories42M.pt", seed=5, mode="causal", scores=scores)


def test_zero_shot_predictions_have_records(workplace: Path) -> None:
    argv = [*PROMPT, "--dtype", "bfloat16"]
    assert main(argv) == 0
    for split in ("dev", "test"):
        path = f"output/task_2/cfimdb-{split}-prompting-output.txt"
        assert_record(path, argv, "stories42M.pt", dtype="bfloat16")
        correct = [
            label == int(line[0]) for label, line in zip(predicted(path), SENTENCES, strict=True)
        ]
        assert scores_of(path)["accuracy"] == sum(correct) / 8
        assert 0 <= scores_of(path)["macro_f1"] <= 1


def test_a_finetuning_has_records(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The classifier comes from the pretrained model, and the predictions from the classifier."""
    status, out, _ = run(FINETUNE, capsys)
    assert status == 0
    path = "output/task_3/cfimdb-finetune-2-0.001.pt"
    assert_record(path, FINETUNE, "stories42M.pt")
    (dev_accuracy,) = {line.split()[-1] for line in out.splitlines() if line[:7] == "dev acc"}
    scores = scores_of(path)
    assert list(scores) == ["epoch", "dev_accuracy", "dev_macro_f1"]
    assert f"{scores['dev_accuracy']:.3f}" == dev_accuracy and scores["epoch"] in (0, 1)
    for split in ("dev", "test"):
        predictions = f"output/task_3/cfimdb-{split}-finetuning-output.txt"
        table = f"output/task_3/cfimdb-finetune-2-0.001.{split}.tsv"
        assert_record(predictions, FINETUNE, path)
        assert_record(table, FINETUNE, path)
        assert scores_of(predictions) == scores_of(table)
        assert f"{scores_of(table)['accuracy']:.3f}" == dev_accuracy


def test_each_seed_has_its_own_records(workplace: Path) -> None:
    argv = [*FINETUNE, "--epochs", "1", "--seeds", "1,2", "--filepath", "out/a.pt"]
    assert main(argv) == 0
    for seed in (1, 2):
        path = f"out/a-seed-{seed}.pt"
        assert_record(path, argv, "stories42M.pt", seed=seed)
        assert_record(f"out/a-seed-{seed}.dev.tsv", argv, path, seed=seed)


def test_a_language_model_has_a_record(workplace: Path) -> None:
    argv = [*PRETRAIN, "--dtype", "float32", "--filepath", "lm/model.pt"]
    data = Path("data/cfimdb-train.txt")
    data.write_text(data.read_text() * 2)
    assert main(argv) == 0
    assert_record("lm/model.pt", argv, "stories42M.pt", mode="causal")
    scores = scores_of("lm/model.pt")
    assert list(scores) == ["epoch", "dev_loss"] and 0 < scores["dev_loss"] < 20
    shape = ["--dim", "16", "--n_layers", "1", "--n_heads", "2", "--tokenizer_path"]
    argv = [*argv, *shape, "tokenizer.model"]
    assert main(argv) == 0
    assert_record("lm/model.pt", argv, None, mode="causal")  # there is no checkpoint before it


def test_classified_sentences_have_a_record(workplace: Path) -> None:
    assert main([*FINETUNE, "--epochs", "1", "--filepath", "a.pt"]) == 0
    argv = ["--option", "classify", "--filepath", "a.pt", "--output", "out/x.tsv"]
    assert main([*argv, "--input", "data/cfimdb-dev.txt"]) == 0
    argv += ["--input", "data/cfimdb-dev.txt"]
    assert_record("out/x.tsv", argv, "a.pt", seed=None)
    assert list(scores_of("out/x.tsv")) == ["accuracy", "macro_f1"]
    Path("plain.txt").write_text("A film\n")
    assert main([*argv[:-1], "plain.txt"]) == 0
    assert scores_of("out/x.tsv") == {}  # the record of the run before is replaced


def test_an_unknown_score_is_null(workplace: Path) -> None:
    """As where no gold label is known: JSON has no NaN."""
    Path("x.txt").write_text("x")
    write_record("x.txt", {}, accuracy=math.nan)
    assert json.loads(Path("x.txt.json").read_text())["scores"] == {"accuracy": None}


def test_only_the_main_process_writes_records(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the others are played by this process."""
    monkeypatch.setattr(records.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(records.dist, "get_rank", lambda: 1)
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    args = get_args(FINETUNE)
    assert isinstance(args, FinetuneOptions)
    assert records.describe_run(args, {}) == {}
    write_record("stories42M.pt", {})
    records.record_finetuning(args, {}, ["a", "b"], {})
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


# --------------------------------------------------------------------- what they may replace


@pytest.mark.parametrize("content", [b"{}", b"", b"[1]", b"\xff", b"[" * 10**5, LONG_RECORD])
@pytest.mark.parametrize(
    ("argv", "record"),
    [
        (PROMPT, "output/task_2/cfimdb-dev-prompting-output.txt.json"),
        (FINETUNE, "output/task_3/cfimdb-finetune-2-0.001.test.tsv.json"),
        ([*GENERATE, "--generated_sentence_low_temp_out", "a"], "a.json"),
        ([*PRETRAIN, "--filepath", "data/cfimdb-label-mapping"], "data/cfimdb-label-mapping.json"),
    ],
)
def test_a_record_replaces_nothing_but_a_record(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    record: str,
    content: bytes,
) -> None:
    """It is refused before any work."""
    Path(record).parent.mkdir(parents=True, exist_ok=True)
    Path(record).write_bytes(content)
    status, out, err = run(argv, capsys)
    assert (status, out) == (2, "")
    assert err == (
        f"run_llama.py: error: {record}: the record of {record.removesuffix('.json')} would "
        "replace this file; choose another name for the result\n"
    )
    assert Path(record).read_bytes() == content


def test_a_record_does_not_replace_another_result(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low, high = "--generated_sentence_low_temp_out", "--generated_sentence_high_temp_out"
    status, out, err = run([*GENERATE, low, "x/a", high, "./x/a.json"], capsys)
    assert (status, out) == (2, "")
    assert err.startswith("run_llama.py: error: x/a.json: the record of x/a would replace")


def test_a_folder_in_the_place_of_a_record_is_an_error(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.json").mkdir()
    argv = [*GENERATE, "--generated_sentence_low_temp_out", "a"]
    status, out, err = run(argv, capsys)
    assert (status, out) == (2, "")
    assert err.startswith("run_llama.py: error: a.json: cannot be written: it exists")


def test_results_and_records_are_locked(workplace: Path) -> None:
    folder = "output/task_3/cfimdb"
    args = get_args(["--option", "finetune"])
    results = [
        *(f"{folder}-dev-finetuning-output.txt", f"{folder}-test-finetuning-output.txt"),
        f"{folder}-finetune-5-2e-05.pt",
        *(f"{folder}-finetune-5-2e-05.dev.tsv", f"{folder}-finetune-5-2e-05.test.tsv"),
    ]
    records = [f"{path}.json" for path in results]
    assert set(args.results) == {*results, *records, f"{folder}-finetune-5-2e-05.pt.state"}
    seeds = set(get_args(["--option", "finetune", "--seeds", "1,2"]).results)
    assert f"{folder}-finetune-5-2e-05-seed-2.dev.tsv.json" in seeds


# ------------------------------------------------------------------------------------ tables


def test_a_table_has_gold_prediction_probability_and_sentence(tmp_path: Path) -> None:
    sentences = ["a\tb", "c\\d\r", "映画"]
    probabilities = [[0.5, 0.5], [0.00004, 0.99996], [0.25, 0.75]]
    log_probs = [[math.log(p) for p in row] for row in probabilities]
    result = Evaluation(1.0, 1.0, [0, 1, 1], [0, -1, 0], sentences, [], log_probs, 0.7)
    write_table(tmp_path / "x.tsv", result, ["bad", "very\tgood"])
    assert (tmp_path / "x.tsv").read_bytes().decode() == (
        "gold\tpredicted\tprobability\tsentence\n"
        "bad\tbad\t0.5000\ta\\tb\n"
        "\tvery\\tgood\t1.0000\tc\\\\d\\r\n"
        "bad\tvery\\tgood\t0.7500\t映画\n"
    )


def test_tables_hold_the_predictions_of_the_assignments_files(workplace: Path) -> None:
    """With the label words instead of numbers; a second run at another rate has its own."""
    test = Path("data/cfimdb-test.txt")
    test.write_text(test.read_text().replace("0 |||", "-1 |||"))
    assert main(FINETUNE) == 0
    first = Path("output/task_3/cfimdb-finetune-2-0.001.test.tsv")
    rows = [line.split("\t") for line in first.read_text().splitlines()]
    assert rows[0] == ["gold", "predicted", "probability", "sentence"]
    labels = predicted("output/task_3/cfimdb-test-finetuning-output.txt")
    for row, label, line in zip(rows[1:], labels, SENTENCES, strict=True):
        assert row[0] == ("good" if line[0] == "1" else "")
        assert row[1] == ["bad", "good"][label] and row[3] == line.split(" ||| ")[1]
        assert 0.5 <= float(row[2]) <= 1
    before = first.read_bytes()
    assert main([*FINETUNE, "--lr", "1e-4"]) == 0
    assert Path("output/task_3/cfimdb-finetune-2-0.0001.test.tsv").exists()
    assert first.read_bytes() == before


def test_a_run_of_the_version_before_is_completed(workplace: Path) -> None:
    """Its best epoch may have been written without label words, and --resume predicts with it."""
    argv = [*FINETUNE, "--filepath", "out/a.pt"]
    assert main(argv) == 0
    expected = Path("out/a.dev.tsv").read_bytes()
    checkpoint = read_checkpoint("out/a.pt")
    del checkpoint["classifier"]["label_names"]
    write_checkpoint("out/a.pt", checkpoint)
    args = get_args(argv)
    assert isinstance(args, FinetuneOptions)
    llama, tokenizer, runtime = load_model(args)
    run_llama.test(args, run_llama.load_data(args.data_files, 2, llama, tokenizer), runtime)
    assert Path("out/a.dev.tsv").read_bytes() == expected


@pytest.mark.parametrize(
    ("filepath", "table"),
    [
        ("x/a.pt", "x/a.dev.tsv"),
        ("a.b.pt", "a.b.dev.tsv"),
        ("a", "a.dev.tsv"),
        ("x-0.001", "x-0.001.dev.tsv"),  # the ending is a part of a number
        ("x-2e-05.pt", "x-2e-05.dev.tsv"),
    ],
)
def test_tables_are_named_after_the_checkpoint(filepath: str, table: str) -> None:
    args = get_args(["--option", "finetune", "--filepath", filepath])
    assert isinstance(args, FinetuneOptions) and args.tables["dev"] == table


def test_tsv_lines_hold_no_line_end_of_a_cell() -> None:
    assert tsv_line("a\r\n", "\t", "\\t", "\u2028") == "a\\r\\n\t\\t\t\\\\t\t\u2028\n"
