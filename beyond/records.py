"""Records: a small JSON file beside each result that says where it came from.

The record of `out/x.txt` is `out/x.txt.json`. This module also writes the predictions of
fine-tuning as tables beside the classifier's checkpoint.
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist

from beyond.formats.files import model_fingerprint
from beyond.options import FinetuneOptions, ModelOptions, TaskOptions, record_path
from utils import Evaluation, fingerprint, open_atomically, read_label_names

VERSION = "0.1.0"  # that of pyproject.toml
ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


def describe_run(options: TaskOptions, runtime: Mapping[str, str]) -> dict[str, Any]:
    """Return what the records of a run's results have in common.

    Args:
        options: of the run.
        runtime: device, dtype and mode, by name.
    """
    if not is_main_process():
        return {}  # only the main process writes records
    return {
        "command": options.command,
        "version": VERSION,
        **describe_checkpoint(options.checkpoint),
        **runtime,
        "seed": options.seed if isinstance(options, ModelOptions) else None,
        **describe_recipe(options),
    }


def describe_recipe(options: TaskOptions) -> dict[str, str]:
    """Return the name of the recipe and the flags that it stands for; nothing without one."""
    if not isinstance(options, FinetuneOptions) or options.recipe is None:
        return {}
    return {"recipe": options.recipe, "recipe flags": shlex.join(options.recipe_flags)}


def describe_checkpoint(path: str | None) -> dict[str, Any]:
    """Return the name and the SHA-256 of the checkpoint that a result was made with."""
    if path is None:
        return {"checkpoint": None, "checkpoint SHA-256": None}  # a new model
    return {"checkpoint": path, "checkpoint SHA-256": model_fingerprint(path)}


def write_record(path: str | Path, record: Mapping[str, Any], **scores: float) -> None:
    """Write the record of a result beside it, in the main process.

    Args:
        path: the result, complete.
        record: as `describe_run` returned it.
        scores: by name; NaN becomes null.
    """
    if not is_main_process():
        return
    values = {name: None if math.isnan(score) else score for name, score in scores.items()}
    content = {
        "result": Path(path).name,
        "result SHA-256": fingerprint(path),
        **record,
        "scores": values,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with open_atomically(record_path(path)) as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def record_classifier(
    path: str, epoch: int, dev_result: Evaluation, record: Mapping[str, Any]
) -> None:
    """Write the record of a classifier's checkpoint, with its scores on dev."""
    scores = {"dev_accuracy": dev_result.accuracy, "dev_macro_f1": dev_result.macro_f1}
    write_record(path, record, epoch=epoch, **scores)


def record_predictions(
    paths: Mapping[str, str], results: Mapping[str, Evaluation], record: Mapping[str, Any]
) -> None:
    """Write the records of prediction files, given by split, with their scores."""
    for split, path in paths.items():
        accuracy, macro_f1 = results[split].accuracy, results[split].macro_f1
        write_record(path, record, accuracy=accuracy, macro_f1=macro_f1)


def record_finetuning(
    options: FinetuneOptions,
    results: Mapping[str, Evaluation],
    label_names: Sequence[str] | None,
    record: Mapping[str, Any],
) -> None:
    """Write the tables of fine-tuning, and the records of its tables and prediction files.

    A recipe's predictions are also written under the names for extra work.

    Args:
        options: of the run.
        results: by split, predicted by the classifier that the run has written.
        label_names: the label words that the classifier's checkpoint holds, if it holds any.
        record: as `describe_run` returned it.
    """
    if not is_main_process():
        return
    # An earlier version stored no label words, and may have written the best epoch of this run.
    label_names = label_names or read_label_names(options.label_names)
    for split, path in options.tables.items():
        write_table(path, results[split], label_names)
    record = {**record, **describe_checkpoint(options.filepath)}
    record_predictions(options.prediction_files, results, record)
    record_predictions(options.tables, results, record)
    for split, path in options.advanced_files.items():
        with open_atomically(path, "wb") as file:
            file.write(Path(options.prediction_files[split]).read_bytes())
    record_predictions(options.advanced_files, results, record)


def write_table(path: str | Path, result: Evaluation, label_names: Sequence[str]) -> None:
    """Write predictions as TSV: gold label (empty if unknown), prediction, probability, sentence.

    The first line names the columns.
    """
    rows = zip(result.labels, result.predictions, result.confidences, result.sentences, strict=True)
    with open_atomically(path) as file:
        file.write(tsv_line("gold", "predicted", "probability", "sentence"))
        for label, prediction, confidence, sentence in rows:
            gold = label_names[label] if label >= 0 else ""
            file.write(tsv_line(gold, label_names[prediction], f"{confidence:.4f}", sentence))


def is_main_process() -> bool:
    """Return whether this is the process that writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def tsv_line(*cells: str) -> str:
    r"""Return a line of tab-separated values; tab, LF, CR and backslash become \t, \n, \r, \\."""
    return "\t".join(cell.translate(ESCAPES) for cell in cells) + "\n"
