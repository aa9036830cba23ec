"""How long a training step and an evaluation take here, from one of each."""

import contextlib
import io
import time
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from beyond.methods.checkpoints import input_tokenizer
from beyond.methods.method import build_method, sum_of_losses
from beyond.options import FinetuneOptions
from beyond.processes import backward_in_micro_batches
from beyond.runtime import load_model, prepare_model
from classifier import ClassifierConfig, LlamaEmbeddingClassifier
from optimizer import AdamW
from run_llama import build_prompt_suffix, classification_loss
from utils import parse_example, read_label_names, read_lines

ROUNDS, ENOUGH = 3, 5.0  # repetitions, and seconds after which there is no further one


def time_steps(options: FinetuneOptions) -> tuple[float, float]:
    """Time a training step, which may have several micro-batches, and an evaluation of its batch.

    In reference mode the sentences are taken from all over the training file. In causal mode, which
    groups sentences by length, they are some of average length. Of up to `ROUNDS` repetitions,
    after one to warm up, the fastest counts, since other programs may disturb them.

    Args:
        options: of a run.

    Returns:
        Seconds of training, and of evaluation, per sentence.

    Raises:
        ValueError: a flag does not fit the model, or a line of the training file is not labelled
            with one of the labels.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        llama, tokenizer, runtime = load_model(options, options.dropout)
    label_names = read_label_names(options.label_names)
    path, dropout = str(options.pretrained_model_path), options.hidden_dropout_prob
    config = ClassifierConfig(len(label_names), path, dropout, option="finetune")
    classifier = LlamaEmbeddingClassifier(config, llama, label_names, tokenizer)
    prompt = build_prompt_suffix(label_names)
    method = build_method(options, classifier, classification_loss, prompt).train()
    prepare_model(method.classifier, runtime, compile_layers=False)
    tokenizer = input_tokenizer(method.classifier, tokenizer)
    optimizer = AdamW(method.parameter_groups(), lr=options.lr)
    lines = read_lines(options.train)
    numbers = choose_lines(lines, min(options.batch_size, len(lines)), by_length=runtime.causal)
    examples = [parse_example(lines[i], options.train, i + 1) for i in numbers]
    if bad := {label for label, _ in examples} - set(range(len(label_names))):
        raise ValueError(f"{options.train}: label {min(bad)} is not among those of the data set")
    longest = llama.config.max_seq_len
    encoded = [tokenizer.encode(text, bos=True, eos=False)[:longest] for _, text in examples]
    tokens = pad_sequence([torch.tensor(ids) for ids in encoded], True, tokenizer.pad_id)
    lengths = torch.tensor([len(ids) for ids in encoded])
    labels = torch.tensor([label for label, _ in examples])
    batch = tokens, lengths, labels, torch.tensor(numbers)

    def train() -> None:
        method.begin_step(0, 1)
        optimizer.zero_grad()
        backward_in_micro_batches(
            sum_of_losses, method, batch, options.batch_size, options.micro_batch_size
        )
        method.before_update(optimizer)
        optimizer.step()
        method.after_update()

    @torch.inference_mode()
    def evaluate() -> None:
        method.classifier.eval()(tokens, lengths)

    seconds = []
    for work in (train, evaluate):
        work()
        times: list[float] = []
        while len(times) < ROUNDS and sum(times) < ENOUGH:
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        seconds.append(min(times) / len(encoded))
    return seconds[0], seconds[1]


def choose_lines(lines: Sequence[str], count: int, by_length: bool) -> list[int]:
    """Return the numbers of some lines: evenly spaced, or of about the average length."""
    if not by_length:
        return [i * len(lines) // count for i in range(count)]
    order = sorted(range(len(lines)), key=lambda i: len(lines[i]))
    average = sum(map(len, lines)) / len(lines)
    middle = sum(len(line) < average for line in lines)
    start = min(max(middle - count // 2, 0), len(lines) - count)
    return order[start : start + count]
