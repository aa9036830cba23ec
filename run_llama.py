"""The assignment's three tasks behind one command.

    uv run python run_llama.py --option generate   continue a sentence, greedily and by sampling
    uv run python run_llama.py --option prompt     classify reviews zero-shot, by label words
    uv run python run_llama.py --option finetune   train a classifier on reviews

Results go to files, scores to standard output, progress and errors to standard error. Bad input
ends the program with one line and exit status 2. What the assignment does not have (two more
tasks, flags and checks, interrupted runs, several processes, curves) is in the package `beyond`.
"""

if __name__ == "__main__":
    # Importing PyTorch takes seconds, so --help and mistakes are answered before that.
    from beyond.command_line import answer_at_once

    answer_at_once()

import math
import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from base_llama import write_checkpoint
from beyond.batches import Batch, LengthBatchSampler, encode_all, evaluate_splits, shard_batches
from beyond.classify import classify
from beyond.command_line import get_args
from beyond.decoding import prepare_for_decoding
from beyond.generation import DIVIDER, generate_texts, prepare_to_generate, read_prompt
from beyond.methods.checkpoints import input_tokenizer, load_any_classifier
from beyond.methods.method import Method, build_method, sum_of_losses
from beyond.methods.zero_shot import build_scorer, prompt_suffix
from beyond.options import FinetuneOptions, GenerateOptions, Options, PromptOptions
from beyond.pretraining import pretrain
from beyond.processes import broadcast_object, exit_program, gather, is_main_process
from beyond.program import run_program
from beyond.records import record_classifier, record_finetuning, record_predictions, write_record
from beyond.reports import report_epoch, report_results
from beyond.run import TrainingRun, remove_training_checkpoint, start_run
from beyond.runtime import Runtime, load_model, prepare_model, to_device
from beyond.seeds import run_seeds
from classifier import ClassifierConfig, LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from llama import Llama
from optimizer import AdamW
from tokenizer import Tokenizer
from utils import (
    SEPARATOR,
    Evaluation,
    open_atomically,
    parse_example,
    read_label_names,
    read_lines,
    summarise,
)

NO_LABEL = -1  # in a test file: the gold label is not known


def seed_everything(seed: int) -> None:
    """Seed the global random generators of Python, NumPy and PyTorch, on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ---------------------------------------------------------------------------------------- data


class Example(NamedTuple):
    """One line of a data file."""

    sentence: str
    label: int  # index into the label words, or NO_LABEL
    tokens: Sequence[int]  # with BOS and the prompt's suffix, without EOS
    line: int  # in the file, from 0
    path: str  # of the file


class LlamaDataset(Dataset[Example]):
    """The examples of a file, and how to make batches of them.

    Args:
        examples: in the order of their file.
        pad_id: fills up the shorter rows of a batch.
        group_by_length: whether to put sentences of similar length into the same batch. In causal
            mode that saves most of the padding and changes no prediction.
    """

    def __init__(
        self, examples: Sequence[Example], pad_id: int, group_by_length: bool = False
    ) -> None:
        self.examples = examples
        self.pad_id = pad_id
        self.group_by_length = group_by_length

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def collate_fn(self, examples: Sequence[Example]) -> Batch:
        """Make a batch, padded on the right to its longest row."""
        rows = [torch.tensor(example.tokens, dtype=torch.int64) for example in examples]
        tokens = pad_sequence(rows, batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(row) for row in rows])
        labels = torch.tensor([example.label for example in examples])
        lines = torch.tensor([example.line for example in examples])
        return Batch(tokens, lengths, labels, lines, examples[0].path)

    def loader(
        self, batch_size: int, generator: torch.Generator | None = None
    ) -> "DataLoader[Example]":
        """Return batches in file order, or by length if grouped; with a generator: shuffled."""
        if self.group_by_length:
            lengths = [len(example.tokens) for example in self.examples]
            sampler = LengthBatchSampler(lengths, batch_size, generator)
            return DataLoader(self, batch_sampler=sampler, collate_fn=self.collate_fn)
        shuffle = generator is not None
        return DataLoader(
            self, batch_size, shuffle, generator=generator, collate_fn=self.collate_fn
        )


def create_data(
    filename: str | Path,
    tokenizer: Tokenizer,
    num_labels: int,
    max_seq_len: int,
    prompt_suffix: str = "",
    allow_unlabelled: bool = False,
) -> list[Example]:
    """Read the examples of a file and tokenize each once.

    Args:
        filename: UTF-8 lines `label ||| sentence`.
        tokenizer: puts BOS before each text.
        num_labels: labels are 0 to num_labels - 1.
        max_seq_len: the model's limit, in tokens, BOS included.
        prompt_suffix: is added to each sentence before it is tokenized.
        allow_unlabelled: whether a label may be NO_LABEL, as in test files.

    Raises:
        FileNotFoundError, ValueError: the file cannot be used; the message says where and why.
    """
    lowest = NO_LABEL if allow_unlabelled else 0
    parsed, examples = [], []
    for number, line in enumerate(read_lines(filename), start=1):
        label, sentence = parse_example(line, filename, number)
        if not lowest <= label < num_labels:
            raise ValueError(
                f"{filename}:{number}: label {label} is not among {lowest} to {num_labels - 1}"
            )
        parsed.append((sentence, label))
    texts = [sentence + prompt_suffix for sentence, _ in parsed]
    for number, tokens in enumerate(encode_all(tokenizer, texts, filename, bos=True), start=1):
        if len(tokens) > max_seq_len:
            room = max_seq_len - len(tokenizer.encode("", bos=True, eos=False))
            # With a suffix, --max_sentence_len would cut off the question.
            advice = "" if prompt_suffix or room < 1 else f" or use --max_sentence_len {room}"
            raise ValueError(
                f"{filename}:{number}: {len(tokens)} tokens are more than the model's "
                f"{max_seq_len}; shorten the sentence{advice}"
            )
        # An array needs 4 bytes for each token, a list 40.
        example = Example(*parsed[number - 1], array("i", tokens), number - 1, str(filename))
        examples.append(example)
    print(f"load {len(examples)} data from {filename}")
    return examples


def load_data(
    paths: Mapping[str, str], num_labels: int, llama: Llama, tokenizer: Tokenizer, suffix: str = ""
) -> dict[str, LlamaDataset]:
    """Read data files, given by split; only the test file may have unknown labels."""
    max_seq_len, causal = llama.config.max_seq_len, llama.config.causal
    data = {}
    for split, path in paths.items():
        is_test = split == "test"
        examples = create_data(path, tokenizer, num_labels, max_seq_len, suffix, is_test)
        # Faithful: in reference mode a prediction depends on its batch, so there evaluation keeps
        # the file's order.
        data[split] = LlamaDataset(examples, tokenizer.pad_id, group_by_length=causal)
    return data


# ---------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def model_eval(
    dataloader: "DataLoader[Example]", model: nn.Module, device: torch.device
) -> Evaluation:
    """Predict the label with the highest score for every example; restores train or eval mode.

    Each of several processes predicts some of the batches, and all of them get the whole result.

    Raises:
        ValueError: a score is infinite or NaN.
    """
    was_training = model.training
    model.eval()
    # Prediction and log-probabilities by line, since batches need not have the file's order.
    predicted: dict[int, tuple[int, list[float]]] = {}
    try:
        for batch in shard_batches(dataloader):
            scores = model(to_device(batch.tokens, device), to_device(batch.lengths, device))
            rows = scores.argmax(dim=-1).tolist(), scores.float().log_softmax(dim=-1).tolist()
            predicted.update(zip(batch.lines.tolist(), zip(*rows, strict=True), strict=True))
    finally:
        model.train(was_training)
    for others in gather(predicted):
        predicted |= others
    examples = dataloader.dataset.examples  # type: ignore[attr-defined]
    predictions = [predicted[example.line][0] for example in examples]
    log_probs = [predicted[example.line][1] for example in examples]
    if not all(math.isfinite(log_prob) for row in log_probs for log_prob in row):
        raise ValueError(
            "the model's scores are infinite or NaN; if it was trained, try a lower --lr"
        )
    labels = [example.label for example in examples]
    sentences = [example.sentence for example in examples]
    return summarise(predictions, labels, sentences, log_probs)


def save_model(model: LlamaEmbeddingClassifier, filepath: str | Path) -> None:
    """Write a checkpoint that `load_any_classifier` reads, completely or not at all."""
    if is_main_process():
        write_checkpoint(filepath, model.to_checkpoint())
    print(f"save the model to {filepath}")


# --------------------------------------------------------------------------------------- tasks


def generate(options: GenerateOptions) -> None:
    """Task 1: continue the prompts at each temperature and write the texts to files."""
    prompts = [read_prompt(prompt) for prompt in options.prompt]
    llama, tokenizer, runtime = load_model(options)
    llama = prepare_to_generate(llama, runtime, options)
    for temperature, outfile in options.outfiles.items():
        print(f"Temperature is {temperature}")
        if runtime.causal or options.exceeds_assignment:
            texts = generate_texts(llama, tokenizer, prompts, temperature, options)
        else:
            texts = [
                generate_sentence(
                    llama, tokenizer, prompt, options.max_new_tokens, temperature, options.seed
                )
                for prompt in prompts
            ]
        with open_atomically(outfile) as file:
            file.write(f"\n{DIVIDER}\n".join(texts))
        write_record(outfile, runtime.record, temperature=temperature)
        print(f"Wrote generated sentence to {outfile}.")


def generate_sentence(
    llama: Llama,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """Continue a prompt with the assignment's own loop, print the text and return it."""
    device = llama.output.weight.device
    tokens = tokenizer.encode(prompt, bos=True, eos=False) or [tokenizer.boundary_id]
    idx = torch.tensor([tokens], device=device)  # (1, seq)
    generator = torch.Generator(device).manual_seed(seed)
    idx = llama.generate(idx, max_new_tokens, temperature, generator)
    text = tokenizer.decode(idx[0].tolist())
    print(f"{text}\n{DIVIDER}")
    return text


def build_prompt_suffix(label_names: Sequence[str]) -> str:
    """Return the question that follows a sentence in the zero-shot prompt."""
    if len(label_names) == 2:
        choices = " or ".join(label_names)
    else:
        choices = ", ".join(label_names[:-1]) + ", or " + label_names[-1]
    # Faithful: the trailing space becomes a token of its own, and the published accuracies
    # depend on it.
    return f" Is this movie {choices}? This movie is "


def test_with_prompting(options: PromptOptions) -> None:
    """Task 2: classify dev and test zero-shot, with all parameters frozen."""
    label_names = read_label_names(options.label_names)
    llama, tokenizer, runtime = load_model(options)
    prompt = build_prompt_suffix(label_names)
    suffix = prompt_suffix(options, prompt)  # the prompt itself, without more flags
    data = load_data(options.data_files, len(label_names), llama, tokenizer, suffix)
    config = ClassifierConfig(len(label_names), str(options.pretrained_model_path), 0.0, "prompt")
    if runtime.causal and not options.compile:
        # A model that is prepared for decoding computes scores faster too.
        llama = prepare_for_decoding(llama.to(runtime.device), runtime.dtype, exact_head=True)
    model = LlamaZeroShotClassifier(config, tokenizer, label_names, llama, prompt)
    model = prepare_model(model, runtime, options.compile)
    scorer = build_scorer(options, model, tokenizer, suffix, runtime.device)
    files = options.prediction_files
    results = predict(scorer, data, options.batch_size, files, runtime.device)
    record_predictions(files, results, runtime.record)


def finetune(options: FinetuneOptions) -> tuple[float, float]:
    """Task 3: train a classifier, then predict dev and test with the epoch that is best on dev.

    Returns:
        Accuracy on dev and on test.
    """
    seed_everything(options.seed)  # with --seeds, each run sets its own seed
    label_names = read_label_names(options.label_names)
    llama, tokenizer, runtime = load_model(options, options.dropout)
    path, dropout = str(options.pretrained_model_path), options.hidden_dropout_prob
    config = ClassifierConfig(len(label_names), path, dropout, option="finetune")
    model = LlamaEmbeddingClassifier(config, llama, label_names, tokenizer)
    prompt = build_prompt_suffix(label_names)
    method = build_method(options, model, classification_loss, prompt)  # plain, without more flags
    tokenizer = input_tokenizer(method.classifier, tokenizer)
    data = load_data(options.data_files, len(label_names), llama, tokenizer)
    prepare_model(method.classifier, runtime, options.compile)
    run = train(options, method.to(runtime.device), data, label_names, runtime)
    results = test(options, data, runtime)
    report_results(run, results, options.output_files)
    remove_training_checkpoint(options.run.training_checkpoint)
    return results["dev"].accuracy, results["test"].accuracy


def train(
    options: FinetuneOptions,
    method: Method,
    data: Mapping[str, LlamaDataset],
    label_names: Sequence[str],
    runtime: Runtime,
) -> TrainingRun[Batch]:
    """Train all epochs; write the epoch that is best on dev to `options.filepath`."""
    model, train_data, dev_data = method.classifier, data["train"], data["dev"]
    optimizer = AdamW(method.parameter_groups(), lr=options.lr)
    with start_run(method, optimizer, train_data.loader, options.run, runtime) as run:
        for epoch in run.epochs():
            for batch in run.batches():
                method.begin_step(run.step, run.total_steps)
                optimizer.zero_grad()
                # Faithful: divided by the nominal batch size, so a short last batch weighs less.
                loss = run.backward(sum_of_losses, batch, divisor=options.batch_size)
                gradient_norm = method.before_update(optimizer)
                optimizer.step()
                method.after_update()
                run.log(loss, gradient_norm)
            totals = run.epoch_totals()
            if train_data.group_by_length:
                print(f"train padding :: {1 - totals.tokens / totals.padded_tokens:.3f}")
            with method.kept_weights():
                train_result, dev_result = evaluate_splits(
                    (train_data, dev_data),
                    options.batch_size,
                    lambda loader: model_eval(loader, model, runtime.device),
                )
                if run.is_best(dev_result.accuracy):
                    save_model(model, options.filepath)
                    record_classifier(options.filepath, epoch, dev_result, runtime.record)
            print(
                f"epoch {epoch}: train loss :: {totals.loss / len(train_data):.3f}, "
                f"train acc :: {train_result.accuracy:.3f}, dev acc :: {dev_result.accuracy:.3f}"
            )
            report_epoch(run, train_result, dev_result, label_names)
    return run


def classification_loss(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the negative log-likelihoods of the labels, in nats."""
    return F.nll_loss(log_probs, labels, reduction="sum")


def test(
    options: FinetuneOptions, data: Mapping[str, LlamaDataset], runtime: Runtime
) -> dict[str, Evaluation]:
    """Predict dev and test with the best checkpoint of the run."""
    model = broadcast_object(lambda: load_any_classifier(options.filepath))
    print(f"load model from {options.filepath}")
    model = prepare_model(model, runtime, options.compile)
    files = options.prediction_files
    results = predict(model, data, options.batch_size, files, runtime.device)
    record_finetuning(options, results, model.label_names, runtime.record)
    return results


def predict(
    model: nn.Module,
    data: Mapping[str, LlamaDataset],
    batch_size: int,
    outfiles: Mapping[str, str],
    device: torch.device,
) -> dict[str, Evaluation]:
    """Predict dev and test, write the predictions, and return what was found, by split."""
    results = {}
    for split in ("dev", "test"):
        results[split] = model_eval(data[split].loader(batch_size), model, device)
    if is_main_process():
        for split, result in results.items():
            write_predictions_to_file(
                split, outfiles[split], result.accuracy, result.predictions, result.sentences
            )
    labels, path = results["test"].labels, data["test"].examples[0].path
    if len(labels) > 1 and set(labels) == {0}:
        print(f"note: every label in {path} is 0, a placeholder; its accuracy means nothing")
    return results


def write_predictions_to_file(
    split: str, outfile: str | Path, acc: float, pred: Sequence[int], sents: Sequence[str]
) -> None:
    """Print the accuracy of a split (n/a if it is NaN) and write lines `label ||| sentence`."""
    print(f"{split} acc :: {'n/a' if math.isnan(acc) else f'{acc:.3f}'}")
    with open_atomically(outfile) as file:
        file.writelines(f"{p}{SEPARATOR}{s}\n" for p, s in zip(pred, sents, strict=True))


def run_task(options: Options) -> None:
    """Run the task that the options are for."""
    seed_everything(options.seed)
    tasks: dict[str, Callable[[Any], object]] = {
        "generate": generate,
        "prompt": test_with_prompting,
        "finetune": partial(run_seeds, finetune=finetune, build_prompt=build_prompt_suffix),
        "pretrain": pretrain,
        "classify": classify,
    }
    tasks[options.option](options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (None: the program's); returns the exit status."""
    return run_program(partial(get_args, argv), run_task)


if __name__ == "__main__":
    exit_program(main())
