"""What a training run reports besides the assignment's lines: on the console and to TensorBoard."""

import html
import math
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from beyond.logs import write_completion
from beyond.options import FinetuneOptions, Options, PretrainOptions
from beyond.pictures import MAX_LABELS, draw_confusion
from beyond.processes import is_main_process
from beyond.run import TrainingRun
from utils import f1_scores

NUM_MISTAKES = 10
LONGEST_SENTENCE = 400  # characters of a sentence that are shown
MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+.!|-])")  # what Markdown may take for its own marks


class Result(Protocol):
    """An evaluation, as `run_llama.model_eval` returns it."""

    @property
    def accuracy(self) -> float: ...
    @property
    def macro_f1(self) -> float: ...
    @property
    def loss(self) -> float: ...
    @property
    def predictions(self) -> Sequence[int]: ...
    @property
    def labels(self) -> Sequence[int]: ...
    @property
    def sentences(self) -> Sequence[str]: ...
    @property
    def log_probs(self) -> Sequence[Sequence[float]]: ...
    @property
    def confusion(self) -> Sequence[Sequence[int]]: ...


# ------------------------------------------------------------------------------------- fine-tuning


def report_epoch(
    run: TrainingRun[Any], train: Result, dev: Result, label_names: Sequence[str]
) -> None:
    """Write an epoch's evaluation to TensorBoard, and print how long the epoch took."""
    if is_main_process():
        writers, step = run.writers, run.step
        for writer, result in zip(writers, (train, dev), strict=True):
            writer.add_scalar("accuracy", result.accuracy, step)
            writer.add_scalar("macro_f1", result.macro_f1, step)
        writers.dev.add_scalar("loss", dev.loss, step)  # that of `train` has a point per step
        for name, f1 in zip(label_names, f1_scores(dev.confusion), strict=True):
            if not math.isnan(f1):
                writers.dev.add_scalar(f"f1/{name}", f1, step)
        if len(label_names) <= MAX_LABELS:
            picture = draw_confusion(dev.confusion, label_names)
            writers.dev.add_image("confusion", picture, step, dataformats="HWC")
        if run.is_best_epoch:
            writers.dev.add_scalar("result/dev_accuracy", dev.accuracy, step)
            text = describe_mistakes(dev, label_names, run.position.epoch)
            writers.dev.add_text("mistakes", text, step)
        writers.flush()
    print_epoch_end(run)


def report_results(
    run: TrainingRun[Any], results: Mapping[str, Result], files: Sequence[str]
) -> None:
    """Write the result on test to TensorBoard, and print a table of all results.

    Args:
        run: has done all epochs.
        results: of the best epoch, by split.
        files: that the task has written.
    """
    with run.logging() as writers:
        for name in ("accuracy", "macro_f1"):
            score = getattr(results["test"], name)
            if not math.isnan(score):  # the test file has gold labels
                writers.dev.add_scalar(f"result/test_{name}", score, run.best_step)
        write_completion(writers, run.options.hyperparameters)
    scores = [
        (split, f"accuracy {show(r.accuracy)}, macro-F1 {show(r.macro_f1)}, loss {show(r.loss)}")
        for split, r in results.items()
    ]
    print_summary(run, scores, files)


class Mistake(NamedTuple):
    """A sentence whose predicted label is not its gold label."""

    probability: float  # of the predicted label
    gold: int
    predicted: int
    sentence: str


def most_confident_mistakes(result: Result, number: int = NUM_MISTAKES) -> list[Mistake]:
    """Return the mistakes with the highest probabilities, highest first."""
    rows = zip(result.log_probs, result.labels, result.predictions, result.sentences, strict=True)
    mistakes = [
        Mistake(math.exp(log_probs[predicted]), gold, predicted, sentence)
        for log_probs, gold, predicted, sentence in rows
        if gold >= 0 and predicted != gold
    ]
    return sorted(mistakes, key=lambda mistake: -mistake.probability)[:number]


def describe_mistakes(result: Result, label_names: Sequence[str], epoch: int) -> str:
    """Return a page in Markdown with the most confident mistakes."""
    total = sum(g >= 0 and g != p for g, p in zip(result.labels, result.predictions, strict=True))
    lines = [
        f"1. predicted **{escape_markdown(label_names[mistake.predicted])}** "
        f"({mistake.probability:.3f}), gold **{escape_markdown(label_names[mistake.gold])}**: "
        f"{escape_markdown(mistake.sentence)}"
        for mistake in most_confident_mistakes(result)
    ]
    if not lines:
        return f"epoch {epoch}: no mistakes on dev"
    title = f"epoch {epoch}: the {len(lines)} most confident of {total} mistakes on dev"
    return "\n".join([title, "", *lines])


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is, in one line, shortened if it is very long."""
    if len(text) > LONGEST_SENTENCE:
        text = text[:LONGEST_SENTENCE] + " ..."
    return MARKDOWN.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))


# ----------------------------------------------------------------------------------------- console


def print_epoch_end(run: TrainingRun[Any]) -> None:
    """Print how long the current epoch took in this process, and whether it is the best so far."""
    seconds = show_seconds(time.perf_counter() - run.epoch_started)
    print(f"  {seconds}{', the best epoch so far' if run.is_best_epoch else ''}")


def print_summary(
    run: TrainingRun[Any], scores: Sequence[tuple[str, str]], files: Sequence[str]
) -> None:
    """Print a table of what a complete run has reached and written.

    Args:
        run: has done all epochs.
        scores: a split and what was measured on it, in words.
        files: that the task has written.
    """
    last = run.position.epoch - 1  # --patience may have ended the run early
    best = "unknown" if run.best_epoch is None else f"{run.best_epoch} (of 0 to {last})"
    names = ["files", *[""] * (len(files) - 1)]
    rows = [
        ("best epoch", best),
        *scores,
        ("time", show_seconds(time.perf_counter() - run.started)),
        *zip(names, files, strict=True),
        ("curves", str(run.log_folder)),
    ]
    for name, text in rows:
        print(f"  {name:<12}{text}")


def print_next_commands(options: Options) -> None:
    """At a terminal, print the commands that use what a training run has written."""
    if not isinstance(options, FinetuneOptions | PretrainOptions) or not sys.stdout.isatty():
        return
    run_llama = ["uv", "run", "python", "run_llama.py", "--option"]
    if isinstance(options, PretrainOptions):
        use = [*run_llama, "generate", "--pretrained-model-path", options.filepath]
    else:
        first = options.per_seed()[0] if options.seeds else options
        use = [*run_llama, "classify", "--filepath", first.filepath]
    show_curves = ["uv", "run", "tensorboard", "--logdir", str(options.log_folder)]
    for name, command in (("curves:", show_curves), ("use it:", use)):
        print(f"{name} {shlex.join(command)}")


def show(score: float) -> str:
    """Return a score with three decimals."""
    return "n/a" if math.isnan(score) else f"{score:.3f}"


def show_seconds(seconds: float) -> str:
    """Return a duration in seconds, with minutes and hours if it is long."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
