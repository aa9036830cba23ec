"""Classify new sentences with a fine-tuned classifier: a file, standard input, or a conversation.

    uv run python run_llama.py --option classify --filepath CHECKPOINT --input FILE

Standard output holds nothing but results; everything else goes to standard error.
"""

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from torch.nn.utils.rnn import pad_sequence

from beyond.batches import LengthBatchSampler
from beyond.formats.load import load_tokenizer, make_tokenizer
from beyond.interrupts import Interrupted
from beyond.methods.checkpoints import input_tokenizer, load_any_classifier
from beyond.options import ClassifyOptions
from beyond.processes import progress
from beyond.program import note
from beyond.records import tsv_line, write_record
from beyond.runtime import Runtime, check_vocabulary, prepare_model, resolve_runtime, to_device
from classifier import LlamaEmbeddingClassifier
from tokenizer import Tokenizer
from utils import (
    LABEL_PREFIX,
    accuracy,
    confusion_matrix,
    decode_lines,
    macro_f1,
    open_atomically,
    read_label_names,
)

STANDARD_INPUT = "standard input"
PROMPT = "sentence> "
NUM_MISTAKES = 10  # that the report shows
Write = Callable[[str], object]  # writes a line of the results


class Sentence(NamedTuple):
    """A line of the input."""

    text: str
    label: str | None  # the digits of its gold label, if it has one
    place: str  # such as reviews.txt:3, for messages


class Prediction(NamedTuple):
    """What the classifier says about a sentence."""

    label: int
    probabilities: list[float]  # by label

    @property
    def probability(self) -> float:
        """The probability of the predicted label."""
        return self.probabilities[self.label]


class Scores(NamedTuple):
    """How well the classifier predicts gold labels."""

    accuracy: float  # in [0, 1]
    macro_f1: float  # in [0, 1]


@dataclass(frozen=True)
class Classifier:
    """A classifier that is ready for sentences."""

    model: LlamaEmbeddingClassifier
    tokenizer: Tokenizer
    label_names: Sequence[str]
    runtime: Runtime

    def encode(self, sentence: Sentence) -> list[int]:
        """Convert a sentence to token ids.

        Raises:
            ValueError: it is empty or too long.
        """
        if not sentence.text:
            raise ValueError(f"{sentence.place}: the line has no sentence; write one or delete it")
        tokens = self.tokenizer.encode(sentence.text, bos=True, eos=False)
        limit = self.model.llama.config.max_seq_len
        if len(tokens) > limit:
            room = limit - len(self.tokenizer.encode("", bos=True, eos=False))
            advice = f" or use --max_sentence_len {room}" if room > 0 else ""
            raise ValueError(
                f"{sentence.place}: {len(tokens)} tokens are more than the classifier's {limit}; "
                f"shorten the sentence{advice}"
            )
        return tokens

    @torch.inference_mode()
    def predict(self, rows: Sequence[Sequence[int]], batch_size: int) -> list[Prediction]:
        """Predict the label of each row of token ids.

        In reference mode the batch size is 1, so that no prediction depends on other sentences.

        Raises:
            ValueError: a score is infinite or NaN.
        """
        lengths = [len(row) for row in rows]
        batches = list(LengthBatchSampler(lengths, batch_size if self.runtime.causal else 1))
        predictions: dict[int, Prediction] = {}
        for batch in progress(batches, desc="classify") if len(batches) > 1 else batches:
            tensors = [torch.tensor(rows[i]) for i in batch]
            tokens = pad_sequence(tensors, batch_first=True, padding_value=self.tokenizer.pad_id)
            device, sizes = self.runtime.device, torch.tensor([lengths[i] for i in batch])
            log_probs = self.model(to_device(tokens, device), to_device(sizes, device))
            if not log_probs.isfinite().all():
                raise ValueError("the classifier's scores are infinite or NaN; train it again")
            pairs = zip(log_probs.argmax(dim=-1).tolist(), log_probs.exp().tolist(), strict=True)
            predictions.update(zip(batch, (Prediction(*pair) for pair in pairs), strict=True))
        return [predictions[i] for i in range(len(rows))]

    def format(self, sentence: Sentence, prediction: Prediction, as_json: bool) -> str:
        """Return the line of a result: TSV, or JSON with the probabilities of all labels."""
        label = self.label_names[prediction.label]
        if not as_json:
            return tsv_line(label, f"{prediction.probability:.4f}", sentence.text)
        probabilities = [round(probability, 6) for probability in prediction.probabilities]
        values = {
            "label": label,
            "probability": probabilities[prediction.label],
            "probabilities": dict(zip(self.label_names, probabilities, strict=True)),
            "sentence": sentence.text,
        }
        return json.dumps(values, ensure_ascii=False) + "\n"


def classify(options: ClassifyOptions) -> None:
    """Classify the sentences of a file or of standard input; at a terminal, one after the other."""
    stdout = sys.stdout
    with redirect_stdout(sys.stderr):
        is_conversation = options.input is None and sys.stdin.isatty()
        sentences = [] if is_conversation else read_sentences(options.input)
        classifier = load(options)
        if not classifier.runtime.causal:
            note(
                "in reference mode a prediction depends on its batch, so each sentence is "
                "classified alone and may get another label than within a batch"
            )
        scores = None
        if is_conversation:
            with open_results(options.output, stdout) as write:
                converse(classifier, options, write)
        else:
            scores = classify_all(classifier, sentences, options, stdout)
        if options.output:
            print(f"Wrote the results to {options.output}.")
            values = scores._asdict() if scores else {}
            write_record(options.output, classifier.runtime.record, **values)


def read_sentences(path: str | None) -> list[Sentence]:
    """Read the sentences of a file, or of standard input for None, one a line.

    A label at the start of a line (`label ||| sentence`) is taken off.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, or a line is not UTF-8.
    """
    content = sys.stdin.buffer.read() if path is None else Path(path).read_bytes()
    name = STANDARD_INPUT if path is None else path
    lines = decode_lines(content, name)
    return [parse_line(line, f"{name}:{number}") for number, line in enumerate(lines, start=1)]


def parse_line(line: str, place: str) -> Sentence:
    """Split a line into its label, if it has one, and its sentence."""
    match = LABEL_PREFIX.match(line)
    text = line[match.end() :] if match else line
    return Sentence(text.strip(), match[1] if match else None, place)


def load(options: ClassifyOptions) -> Classifier:
    """Load the classifier with its label words and its tokenizer; choose device, dtype and mode.

    Raises:
        FileNotFoundError, ValueError: a file cannot be used, or the parts do not fit each other.
    """
    path = options.filepath
    given_names = None if options.label_names is None else read_label_names(options.label_names)
    model = load_any_classifier(path)
    names, tokenizer = given_names or model.label_names, model.tokenizer
    missing = []
    if names is None:
        missing.append(("label words", "--label-names"))
    if tokenizer is None and options.tokenizer_path is None:
        missing.append(("tokenizer", "--tokenizer_path"))
    if missing:
        raise ValueError(
            f"{path}: an earlier version wrote this classifier, without its "
            f"{' and '.join(what for what, _ in missing)}; add "
            f"{' and '.join(f'{flag} FILE' for _, flag in missing)}"
        )
    assert names is not None
    if len(names) != model.num_labels:
        raise ValueError(
            f"{options.label_names}: has {len(names)} label words, but {path} has "
            f"{model.num_labels} labels; use the label words of its training data"
        )
    max_len = options.max_sentence_len or (tokenizer.max_len if tokenizer else None)
    if options.tokenizer_path is not None:
        tokenizer = load_tokenizer(max_len, options.tokenizer_path)
        check_vocabulary(tokenizer, options.tokenizer_path, model.llama, path)
    else:
        assert tokenizer is not None
        tokenizer = make_tokenizer(max_len, tokenizer.content)
    print(f"load model from {path}")
    tokenizer = input_tokenizer(model, tokenizer)
    runtime = resolve_runtime(options, model.llama.config.causal)
    return Classifier(prepare_model(model, runtime, False), tokenizer, names, runtime)


def classify_all(
    classifier: Classifier,
    sentences: Sequence[Sentence],
    options: ClassifyOptions,
    stdout: TextIO,
) -> Scores | None:
    """Classify sentences, write the results in their order, and report on the gold labels.

    Returns:
        The scores, if there are gold labels.
    """
    labels = gold_labels(sentences, len(classifier.label_names))
    rows = [classifier.encode(sentence) for sentence in sentences]
    predictions = classifier.predict(rows, options.batch_size)
    with open_results(options.output, stdout) as write:
        for sentence, prediction in zip(sentences, predictions, strict=True):
            write(classifier.format(sentence, prediction, options.json))
    if labels is None or max(labels) < 0:
        return None
    return report(sentences, labels, predictions, classifier.label_names)


def gold_labels(sentences: Sequence[Sentence], num_labels: int) -> list[int] | None:
    """Return the gold labels (-1: not known) if every sentence has one.

    Raises:
        ValueError: one of them is not a label of the classifier.
    """
    texts = [sentence.label for sentence in sentences if sentence.label is not None]
    if len(texts) < len(sentences):
        if texts:
            note(f"only {len(texts)} of {len(sentences)} lines have a label, so none is used")
        return None
    labels = []
    for sentence, text in zip(sentences, texts, strict=True):
        label = int(text) if len(text) < 20 else num_labels
        if not -1 <= label < num_labels:
            shown = text if len(text) < 20 else f"{text[:20]}..."
            raise ValueError(
                f"{sentence.place}: label {shown} is not among 0 to {num_labels - 1}, the labels "
                "of the classifier (-1: not known)"
            )
        labels.append(label)
    return labels


def report(
    sentences: Sequence[Sentence],
    labels: Sequence[int],
    predictions: Sequence[Prediction],
    label_names: Sequence[str],
) -> Scores:
    """Print the scores, the confusion matrix and the most confident mistakes; return the scores."""
    predicted = [prediction.label for prediction in predictions]
    confusion = confusion_matrix(predicted, labels, len(label_names))
    scores = Scores(accuracy(confusion), macro_f1(confusion))
    known = sum(label >= 0 for label in labels)
    print(f"acc :: {scores.accuracy:.3f}, macro F1 :: {scores.macro_f1:.3f}, on {known} labels")
    if known > 1 and not any(labels):
        note(f"every label of {sentences[0].place.rpartition(':')[0]} is 0, perhaps a placeholder")
    print("confusion matrix (rows: gold label, columns: predicted label)")
    print("\n".join(format_table(["", *label_names], confusion, label_names)))
    mistakes = [i for i, label in enumerate(labels) if label >= 0 and label != predicted[i]]
    mistakes.sort(key=lambda i: -predictions[i].probability)
    if mistakes:
        print(f"wrong predictions: {len(mistakes)}; the most confident ones:")
    for i in mistakes[:NUM_MISTAKES]:
        prediction, sentence = predictions[i], sentences[i]
        print(
            f"{prediction.probability:.4f} predicted {label_names[prediction.label]}, gold "
            f"{label_names[labels[i]]}, {sentence.place}: {tsv_line(sentence.text)}",
            end="",
        )
    return scores


def format_table(
    head: Sequence[str], counts: Sequence[Sequence[int]], names: Sequence[str]
) -> list[str]:
    """Return the lines of a table of counts; the first cell of each row is a name."""
    rows = [head, *([name, *map(str, row)] for name, row in zip(names, counts, strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def converse(classifier: Classifier, options: ClassifyOptions, write: Write) -> None:
    """Ask for a sentence, answer, and ask for the next, until the end of input or Ctrl-C."""
    print("Type a sentence and press Enter. Ctrl-D ends.")
    try:
        while line := ask():
            try:
                sentence = parse_line(decode_lines(line, STANDARD_INPUT)[0], STANDARD_INPUT)
                if not sentence.text:
                    continue
                (prediction,) = classifier.predict([classifier.encode(sentence)], 1)
            except ValueError as error:
                note(str(error))
                continue
            answer = classifier.format(sentence, prediction, options.json)
            write(answer)
            if options.output:
                print(answer, end="")
    except Interrupted as interrupt:
        if interrupt.number != signal.SIGINT:
            raise
    print()  # after the prompt


def ask() -> bytes:
    """Ask for a line; returns it with its line end, or nothing at the end of input."""
    print(PROMPT, end="", flush=True)
    return sys.stdin.buffer.readline()


@contextmanager
def open_results(path: str | None, stdout: TextIO) -> Iterator[Write]:
    """Open the results: a file, which is written completely or not at all, or standard output.

    Yields:
        A function that writes a line. If the reader of standard output has gone, it does nothing.
    """
    if path is not None:
        with open_atomically(path) as file:
            yield file.write
        return
    if isinstance(stdout, io.TextIOWrapper) and not stdout.isatty():
        stdout.reconfigure(encoding="utf-8", errors="strict", newline="\n")
    yield lambda line: write_to_stdout(line, stdout)


def write_to_stdout(line: str, stdout: TextIO) -> None:
    """Write a line and flush it; do nothing more if the reader has gone.

    Raises:
        OSError: such as for a full disk.
    """
    try:
        stdout.write(line)
        stdout.flush()
    except OSError as error:
        # What is left in the buffer is flushed again when the program ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise OSError(f"standard output: {error.strerror}") from None
