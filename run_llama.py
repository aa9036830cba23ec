"""The assignment's three tasks behind one command, and pretraining beside them.

    uv run python run_llama.py --option generate   continue a sentence, greedily and by sampling
    uv run python run_llama.py --option prompt     classify reviews zero-shot, by the label's words
    uv run python run_llama.py --option finetune   train a classifier on reviews
    uv run python run_llama.py --option pretrain   train the language model itself on text

Results go to files, scores to standard output, progress and errors to standard error. A bad input
ends the program with one line and exit status 2.
"""

import argparse
import io
import itertools
import json
import math
import os
import reprlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

import pretraining
from base_llama import write_checkpoint
from classifier import (
    ClassifierConfig,
    LlamaEmbeddingClassifier,
    LlamaZeroShotClassifier,
    load_classifier,
)
from config import LlamaConfig
from decoding import DecodingLlama, prepare_for_decoding
from llama import Llama, load_pretrained
from optimizer import AdamW
from tokenizer import Tokenizer
from training import (
    Interrupted,
    TrainingRun,
    accumulate,
    check_settings,
    end_processes,
    from_first,
    gather,
    is_first,
    is_lost_process,
    leave,
    markdown_table,
    own_batches,
    parallelise,
    progress,
    rank,
    signals_raise,
    start_processes,
    state_path,
    world_size,
)
from utils import (
    LARGEST_INT,
    SEPARATOR,
    OneLineParser,
    accuracy,
    at_least_one,
    autocast,
    check_readable,
    check_writable,
    compute_deterministically,
    confusion_matrix,
    describe_error,
    fingerprint,
    has_bfloat16,
    is_out_of_memory,
    is_text,
    macro_f1,
    open_atomically,
    pad_batch,
    read_documents,
    read_lines,
    resolve_device,
    seed_everything,
    to_device,
)

if TYPE_CHECKING:  # imported where it is used: it takes a second
    from torch.utils.tensorboard import SummaryWriter

TASKS = ("generate", "prompt", "finetune", "pretrain")
DATASETS = ("sst", "cfimdb", "demo")
SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads")  # flags of a new model
TRAINING_TASKS = ("finetune", "pretrain")
OWN_FLAGS: dict[str, tuple[str, ...]] = {  # flags that some tasks have no use for
    **dict.fromkeys(("temperature", "top_k", "top_p", "num_samples"), ("generate",)),
    **dict.fromkeys(("stop_at_eos", "stream", "quantize"), ("generate",)),
    **dict.fromkeys((*SHAPE, "max_seq_len", "store_dtype"), ("pretrain",)),
    **dict.fromkeys(("resume", "save_every", "micro_batch_size"), TRAINING_TASKS),
    "seeds": ("finetune",),
    "deterministic": ("prompt", *TRAINING_TASKS),
}
NO_SETTINGS = ("resume", "save_every", "micro_batch_size", "seeds", "notes")  # of a run's result
CHECKPOINT = "stories42M.pt"
FULL_PRECISION = nullcontext()
NO_LABEL = -1  # in a test file: no gold label is known
RULE = "---------------"  # between generated texts
PROMPT = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. "
    "Keanu Reeves, playing the hero John Wick, is"
)


# ---------------------------------------------------------------------------------------- data


class Example(NamedTuple):
    """One line of a data file."""

    sentence: str
    label: int  # index into the label words, or NO_LABEL
    tokens: list[int]  # with BOS and the prompt's suffix, without EOS
    line: int  # in the file, from 0


class Batch(NamedTuple):
    """What the models see of some examples, and what is kept beside it."""

    tokens: Tensor  # (batch, seq), int64, padded on the right
    lengths: Tensor  # (batch,), int64
    labels: Tensor  # (batch,), int64
    examples: Sequence[Example]


class LlamaDataset(Dataset[Example]):
    """Examples, and how to make a batch of them.

    Args:
        examples: in the order of their file.
        pad_id: fills up the shorter rows of a batch.
        by_length: whether to put sentences of like length into one batch. In causal mode that
            saves most of the padding and changes no prediction.
    """

    def __init__(self, examples: Sequence[Example], pad_id: int, by_length: bool = False) -> None:
        self.examples = examples
        self.pad_id = pad_id
        # Faithful: in reference mode a prediction depends on its batch, so batches are the file's.
        self.by_length = by_length

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def collate_fn(self, examples: Sequence[Example]) -> Batch:
        """A batch, padded on the right to its longest row."""
        tokens, lengths = pad_batch([example.tokens for example in examples], self.pad_id)
        labels = torch.tensor([example.label for example in examples])
        return Batch(tokens, lengths, labels, examples)

    def loader(
        self, batch_size: int, shuffle: torch.Generator | None = None
    ) -> "DataLoader[Example]":
        """Batches in the file's order, or in a new random order for each pass over them."""
        if self.by_length:
            lengths = [len(example.tokens) for example in self.examples]
            batches = LengthBatches(lengths, batch_size, shuffle)
            return DataLoader(self, batch_sampler=batches, collate_fn=self.collate_fn)
        return DataLoader(
            self,
            batch_size,
            shuffle=shuffle is not None,
            generator=shuffle,
            collate_fn=self.collate_fn,
        )


class LengthBatches(Sampler[list[int]]):
    """Batches of examples of like length.

    Without shuffling, all examples in order of length. With it, each pass shuffles the examples,
    cuts them into equal pools of at most `POOL` batches, sorts each pool, and shuffles the batches:
    which examples share a batch and when is random, but for their length.

    Args:
        lengths: of the examples, in tokens.
        batch_size: examples.
        shuffle: source of randomness.
    """

    POOL = 100  # batches; leaves 3.4% of SST's tokens as padding, where 50 leave 4.8%

    def __init__(
        self, lengths: Sequence[int], batch_size: int, shuffle: torch.Generator | None = None
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.shuffle = shuffle

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        size = len(self.lengths)
        if self.shuffle is None:
            order, pool = list(range(size)), size
        else:
            order = torch.randperm(size, generator=self.shuffle).tolist()
            pools = math.ceil(len(self) / self.POOL)
            pool = math.ceil(len(self) / pools) * self.batch_size
        ordered: list[int] = []
        for start in range(0, size, pool):
            ordered += sorted(order[start : start + pool], key=self.lengths.__getitem__)
        batches = [
            ordered[start : start + self.batch_size] for start in range(0, size, self.batch_size)
        ]
        if self.shuffle is not None:
            batches = [
                batches[i] for i in torch.randperm(len(batches), generator=self.shuffle).tolist()
            ]
        yield from batches


def parse_example(line: str, path: str | Path, line_number: int) -> tuple[int, str]:
    """Label and sentence of a line `label ||| sentence`; the first separator counts.

    Raises:
        ValueError: it is no such line.
    """
    label, separator, sentence = line.partition(SEPARATOR)
    sentence = sentence.strip()
    if not separator or not sentence:
        shown = line if len(line) <= 40 else f"{line[:40]}..."
        raise ValueError(
            f'{path}:{line_number}: expected "<label> ||| <sentence>", found {json.dumps(shown)}'
        )
    try:
        return int(label), sentence
    except ValueError:
        raise ValueError(
            f"{path}:{line_number}: expected a whole number as label, found {json.dumps(label)}"
        ) from None


def create_data(
    filename: str | Path,
    tokenizer: Tokenizer,
    num_labels: int,
    max_seq_len: int,
    prompt_suffix: str = "",
    unlabelled: bool = False,
) -> list[Example]:
    """The examples of a file, each tokenised once.

    Args:
        filename: UTF-8 lines `label ||| sentence`.
        tokenizer: puts BOS before each text.
        num_labels: labels are 0 to num_labels - 1.
        max_seq_len: the model's limit, in tokens, BOS included.
        prompt_suffix: what follows each sentence in the text that is tokenised.
        unlabelled: whether a label may be NO_LABEL, as in test files.

    Raises:
        FileNotFoundError, ValueError: the file cannot be used; the message says where and why.
    """
    lowest = NO_LABEL if unlabelled else 0
    examples = []
    for number, line in enumerate(read_lines(filename), start=1):
        label, sentence = parse_example(line, filename, number)
        if not lowest <= label < num_labels:
            raise ValueError(
                f"{filename}:{number}: label {label} is not among {lowest} to {num_labels - 1}"
            )
        tokens = tokenizer.encode(sentence + prompt_suffix, bos=True, eos=False)
        if len(tokens) > max_seq_len:
            raise ValueError(
                f"{filename}:{number}: {len(tokens)} tokens are more than the model's "
                f"{max_seq_len}; shorten the sentence or use --max_sentence_len"
            )
        examples.append(Example(sentence, label, tokens, number - 1))
    print(f"load {len(examples)} data from {filename}")
    return examples


def read_label_names(path: str | Path) -> list[str]:
    """The label words of a JSON file; a label is an index into them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds anything but a list of two or more different words.
    """
    try:
        names = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(names, list) or not all(is_text(name) and name.strip() for name in names):
        raise ValueError(f'{path}: expected a JSON list of words such as ["bad", "good"]')
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"{path}: expected two or more different label words, found {reprlib.repr(names)}"
        )
    return names


def build_prompt_suffix(label_names: Sequence[str]) -> str:
    """The question that follows a sentence in the zero-shot prompt, with the space before it."""
    if len(label_names) == 2:
        choices = " or ".join(label_names)
    else:
        choices = ", ".join(label_names[:-1]) + ", or " + label_names[-1]
    # Faithful: the trailing space becomes a token of its own, and the published accuracies
    # depend on it.
    return f" Is this movie {choices}? This movie is "


# ---------------------------------------------------------------------------------- evaluation


class Evaluation(NamedTuple):
    """What a classifier did with a data set; lists are in the order of the data."""

    accuracy: float  # in [0, 1], over the examples with a gold label; NaN if none has one
    macro_f1: float  # likewise
    predictions: list[int]
    labels: list[int]
    sentences: list[str]


@torch.inference_mode()
def model_eval(
    dataloader: "DataLoader[Example]",
    model: nn.Module,
    device: torch.device,
    precision: AbstractContextManager = FULL_PRECISION,
) -> Evaluation:
    """Predict every example with the highest-scored label; leaves the model's mode as it was.

    Several processes share out the batches, and all of them get the whole result.
    """
    was_training = model.training
    model.eval()
    predicted: dict[int, int] = {}  # by line, since batches need not have the file's order
    finite = True
    try:
        for batch in own_batches(dataloader):
            with precision:
                scores = model(to_device(batch.tokens, device), to_device(batch.lengths, device))
            finite = finite and bool(scores.isfinite().all())
            lines = (example.line for example in batch.examples)
            predicted.update(zip(lines, scores.argmax(dim=-1).tolist(), strict=True))
    finally:
        model.train(was_training)
    for other, others_finite in gather((predicted, finite)):
        predicted |= other
        finite &= others_finite
    if not finite:
        raise ValueError(
            "the model's scores are infinite or NaN; if it was trained, try a lower --lr"
        )
    examples = cast(LlamaDataset, dataloader.dataset).examples
    predictions = [predicted[example.line] for example in examples]
    labels = [example.label for example in examples]
    sentences = [example.sentence for example in examples]
    confusion = judge(predictions, labels, max(predictions + labels) + 1)
    return Evaluation(accuracy(confusion), macro_f1(confusion), predictions, labels, sentences)


def judge(predictions: Sequence[int], labels: Sequence[int], num_labels: int) -> np.ndarray:
    """Confusion matrix over the examples that have a gold label."""
    pairs = [pair for pair in zip(predictions, labels, strict=True) if pair[1] != NO_LABEL]
    return confusion_matrix([p for p, _ in pairs], [label for _, label in pairs], num_labels)


def write_predictions_to_file(
    split: str, outfile: str | Path, acc: float, pred: Sequence[int], sents: Sequence[str]
) -> None:
    """Print the split's accuracy (n/a if it is NaN) and write lines `label ||| sentence`."""
    print(f"{split} acc :: {'n/a' if math.isnan(acc) else f'{acc:.3f}'}")
    with open_atomically(outfile) as file:
        file.writelines(f"{p}{SEPARATOR}{s}\n" for p, s in zip(pred, sents, strict=True))


def predict(
    args: argparse.Namespace,
    model: nn.Module,
    dev_data: LlamaDataset,
    test_data: LlamaDataset,
    device: torch.device,
) -> tuple[float, float]:
    """Predict dev and test, print their accuracies, and write their prediction files.

    Returns:
        The two accuracies.
    """
    precision = autocast(device, args.dtype)
    dev = model_eval(dev_data.loader(args.batch_size), model, device, precision)
    test = model_eval(test_data.loader(args.batch_size), model, device, precision)
    if is_first():
        for split, path, result in (("dev", args.dev_out, dev), ("test", args.test_out, test)):
            write_predictions_to_file(
                split, path, result.accuracy, result.predictions, result.sentences
            )
    if len(test.labels) > 1 and set(test.labels) == {0}:
        print(f"note: every label in {args.test} is 0, a placeholder; its accuracy means nothing")
    return dev.accuracy, test.accuracy


# --------------------------------------------------------------------------------------- tasks


def load_model(args: argparse.Namespace) -> tuple[Llama, Tokenizer]:
    """The pretrained model, on the CPU, and the tokenizer that goes with it.

    Raises:
        FileNotFoundError, ValueError: one of them cannot be used, or their vocabularies differ.
    """
    tokenizer = Tokenizer(args.max_sentence_len, args.tokenizer_path)
    llama = load_pretrained(args.pretrained_model_path, args.causal, args.dropout, args.max_seq_len)
    if tokenizer.n_words != llama.config.vocab_size:
        raise ValueError(
            f"{args.tokenizer_path}: a vocabulary of {tokenizer.n_words}, but that of "
            f"{args.pretrained_model_path} is {llama.config.vocab_size}; use the checkpoint's own "
            "tokenizer (--tokenizer_path)"
        )
    print(f"load model from {args.pretrained_model_path}")
    return llama, tokenizer


def allow_tf32(llama: Llama, device: torch.device) -> None:
    """On CUDA, let float32 products of a causal model use TF32, for the whole process."""
    # Faithful: reference mode's numbers are float32's.
    if device.type == "cuda" and llama.config.causal:
        torch.set_float32_matmul_precision("high")
        print("float32 products are computed in TF32")


def speed_up(args: argparse.Namespace, llama: Llama, device: torch.device) -> None:
    """Allow TF32, and compile the layers if the run asks for it, for sequences of any length."""
    allow_tf32(llama, device)
    if args.compile:
        # Rotary tables are cached; the compiler says that it does not see the cache.
        warnings.filterwarnings("ignore", message=".*functools.lru_cache")
        llama.compute_hidden = torch.compile(  # type: ignore[method-assign]
            llama.compute_hidden, dynamic=True
        )


def generate(args: argparse.Namespace, device: torch.device) -> None:
    """Task 1: continue the prompts at each temperature and write the texts to files."""
    prompts = [read_prompt(prompt) for prompt in args.prompt]
    llama, tokenizer = load_model(args)
    allow_tf32(llama, device)
    llama = prepare_for_decoding(
        llama.to(device), getattr(torch, args.dtype), quantize=args.quantize is not None
    )
    if isinstance(llama, DecodingLlama) and args.quantize:
        print(f"int8 weights: the largest error of a weight is {llama.error:.2g}")
    for temperature, outfile in args.outfiles.items():
        print(f"Temperature is {temperature}")
        texts = generate_sentence(args, llama, tokenizer, prompts, temperature, device)
        with open_atomically(outfile) as file:
            file.write(f"\n{RULE}\n".join(texts))
        print(f"Wrote generated sentence to {outfile}.")


def read_prompt(prompt: str) -> str:
    """A prompt of the command line; `-` stands for all of standard input.

    Raises:
        ValueError: standard input is empty or no UTF-8.
    """
    if prompt != "-":
        return prompt
    try:
        text = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt -: standard input is not UTF-8 text: {error.reason}") from None
    if not text:
        raise ValueError("--prompt -: standard input is empty")
    return text


def generate_sentence(
    args: argparse.Namespace,
    llama: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    temperature: float,
    device: torch.device,
) -> list[str]:
    """Continue each prompt `args.num_samples` times, and print the texts.

    A text depends on its prompt and the seed alone: each sample has its own generator, and rows
    share a batch only where they do not see each other's padding, nor round by it.

    Returns:
        Prompts with their continuations.
    """
    samples = [
        (tokenizer.encode(prompt, bos=True, eos=False), args.seed + i)
        for prompt in prompts
        for i in range(args.num_samples if temperature else 1)
    ]
    stop_ids = {tokenizer.bos_id, tokenizer.eos_id} if args.stop_at_eos else set()
    alone = args.stream or not llama.config.causal or args.dtype != "float32"
    size = 1 if alone else args.batch_size
    texts = []
    for start in range(0, len(samples), size):
        rows, seeds = zip(*samples[start : start + size], strict=True)
        # Padded on the left, so that all rows go on in the same column.
        backwards, lengths = pad_batch([row[::-1] for row in rows], tokenizer.pad_id)
        columns = llama.stream(
            backwards.flip(1).to(device),
            args.max_new_tokens,
            temperature,
            [torch.Generator(device).manual_seed(seed) for seed in seeds],
            top_k=args.top_k,
            top_p=args.top_p,
            padding=(lengths.max() - lengths).to(device) if len(rows) > 1 else None,
        )
        if args.stream:
            parts = []
            tokens = (token for _, token in until_stop(columns, stop_ids))
            for part in tokenizer.decode_stream(itertools.chain(rows[0], tokens)):
                print(part, end="", flush=True)
                parts.append(part)
            texts.append("".join(parts))
            print(f"\n{RULE}")
        else:
            for row, token in until_stop(columns, stop_ids):
                rows[row].append(token)
            texts += [tokenizer.decode(row) for row in rows]
            print("".join(f"{text}\n{RULE}\n" for text in texts[start:]), end="")
    return texts


def until_stop(columns: Iterable[Tensor], stop_ids: Set[int]) -> Iterator[tuple[int, int]]:
    """Row and token of each new token of a batch, up to each row's first stop token.

    Args:
        columns: (batch, 1) each, in time's order; no more are taken once all rows have stopped.
        stop_ids: the stop tokens, which are left out.
    """
    stopped: set[int] = set()
    for column in columns:
        for row, token in enumerate(column.flatten().tolist()):
            if token in stop_ids:
                stopped.add(row)
            if row not in stopped:
                yield row, token
        if len(stopped) == len(column):
            return


def load_split(
    path: str,
    args: argparse.Namespace,
    llama: Llama,
    tokenizer: Tokenizer,
    label_names: Sequence[str],
    prompt_suffix: str = "",
) -> LlamaDataset:
    """One of the data files of a run; only the test file may leave labels open."""
    limit = llama.config.max_seq_len
    unlabelled = path == args.test
    examples = create_data(path, tokenizer, len(label_names), limit, prompt_suffix, unlabelled)
    return LlamaDataset(examples, tokenizer.pad_id, by_length=llama.config.causal)


def test_with_prompting(args: argparse.Namespace, device: torch.device) -> None:
    """Task 2: classify dev and test zero-shot, with all parameters frozen."""
    label_names = read_label_names(args.label_names)
    llama, tokenizer = load_model(args)
    suffix = build_prompt_suffix(label_names)
    dev_data = load_split(args.dev, args, llama, tokenizer, label_names, suffix)
    test_data = load_split(args.test, args, llama, tokenizer, label_names, suffix)
    if llama.config.causal and not args.compile:
        allow_tf32(llama, device)
        dtype = getattr(torch, args.dtype)
        llama = prepare_for_decoding(llama.to(device), dtype, exact_head=True)
    else:
        speed_up(args, llama, device)
    config = classifier_config(args, label_names)
    model = LlamaZeroShotClassifier(config, tokenizer, label_names, llama).to(device)
    predict(args, model, dev_data, test_data, device)


def finetune(args: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """Task 3: train a classifier, then predict dev and test with the epoch best on dev.

    Returns:
        Accuracy on dev and on test.
    """
    label_names = read_label_names(args.label_names)
    llama, tokenizer = load_model(args)
    train_data, dev_data, test_data = (
        load_split(path, args, llama, tokenizer, label_names)
        for path in (args.train, args.dev, args.test)
    )
    speed_up(args, llama, device)
    model = LlamaEmbeddingClassifier(classifier_config(args, label_names), llama).to(device)
    train(args, model, train_data, dev_data, label_names, device)
    accuracies = test(args, dev_data, test_data, device)
    remove_state(args)
    return accuracies


def finetune_seeds(args: argparse.Namespace, device: torch.device) -> None:
    """Task 3 with each of several seeds; prints and writes mean and standard deviation."""
    path = seeds_file(args)
    settings = {name: value for name, value in settings_of(args).items() if name != "seed"}
    accuracies: dict[str, list[float]] = {}
    if args.resume and path.exists():
        accuracies = from_first(lambda: read_accuracies(path, settings))
    for own in runs_of(args):
        if str(own.seed) not in accuracies:
            print(f"seed {own.seed}")
            seed_everything(own.seed)
            accuracies[str(own.seed)] = list(finetune(own, device))
        done = [accuracies[str(seed)] for seed in args.seeds if str(seed) in accuracies]
        summary = {
            split: {
                "mean": float(np.mean(values)),
                "standard deviation": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
            }
            for split, values in zip(("dev", "test"), zip(*done, strict=True), strict=True)
        }
        if is_first():
            with open_atomically(path) as file:
                json.dump({"settings": settings, "accuracy": accuracies, **summary}, file, indent=2)
    for split, values in summary.items():
        mean, deviation = values.values()
        print(f"{split} acc over {len(done)} seeds :: {mean:.3f} +- {deviation:.3f}")
    print(f"Wrote the accuracies to {path}.")


def seeds_file(args: argparse.Namespace) -> Path:
    """Where the accuracies of several seeds go."""
    return Path(args.filepath).with_suffix(".seeds.json")


def runs_of(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The runs that the options ask for: one, or one for each seed, with results of its own."""
    if not args.seeds:
        return [args]
    runs = []
    for number in args.seeds:
        own = argparse.Namespace(**vars(args))
        own.seed = number
        path = Path(args.filepath)
        own.filepath = str(path.with_name(f"{path.stem}-seed-{number}{path.suffix}"))
        for split in ("dev", "test"):
            ending = f"{split}-finetuning-output.txt"
            beginning = getattr(args, f"{split}_out").removesuffix(ending)
            setattr(own, f"{split}_out", f"{beginning}seed-{number}-{ending}")
        own.resume = args.resume and state_path(own.filepath).exists()
        runs.append(own)
    return runs


def read_accuracies(path: Path, settings: Mapping[str, str]) -> dict[str, list[float]]:
    """The accuracies on dev and test by seed that `finetune_seeds` has written.

    Raises:
        ValueError: the file is none of its, or other settings gave them.
    """
    try:
        content = json.loads(path.read_bytes())
        accuracies = {
            str(seed): [float(dev), float(test)]
            for seed, (dev, test) in content["accuracy"].items()
        }
        saved = dict(content["settings"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{path}: holds no accuracies of several seeds") from None
    check_settings(saved, settings, path)
    return accuracies


def train(
    args: argparse.Namespace,
    model: LlamaEmbeddingClassifier,
    train_data: LlamaDataset,
    dev_data: LlamaDataset,
    label_names: Sequence[str],
    device: torch.device,
) -> None:
    """Train all epochs; the checkpoint of the epoch best on dev stays in `args.filepath`."""
    shuffle = torch.Generator().manual_seed(args.seed)
    loader = train_data.loader(args.batch_size, shuffle)
    precision = autocast(device, args.dtype)
    optimizer = AdamW(model.parameters(), lr=args.lr)
    parallel = parallelise(model)
    with start_run(args, model, optimizer, shuffle, Path(args.dev_out).parent) as run:
        for epoch in run.epochs():
            train_loss = train_epoch(args, parallel, loader, run, device, precision)
            train_result = model_eval(train_data.loader(args.batch_size), model, device, precision)
            dev_result = model_eval(dev_data.loader(args.batch_size), model, device, precision)
            if run.best is None or dev_result.accuracy > run.best:
                run.best = dev_result.accuracy
                save_model(model, args.filepath)
                log_confusion(run.log, dev_result, label_names, epoch)
            print(
                f"epoch {epoch}: train loss :: {train_loss:.3f}, "
                f"train acc :: {train_result.accuracy:.3f}, dev acc :: {dev_result.accuracy:.3f}"
            )
            log_epoch(run.log, train_result, dev_result, epoch)


def train_epoch(
    args: argparse.Namespace,
    model: nn.Module,
    loader: "DataLoader[Example]",
    run: TrainingRun,
    device: torch.device,
    precision: AbstractContextManager,
) -> float:
    """What is left of one pass over the training data.

    Returns:
        The mean loss of an example over the whole pass, in nats.
    """

    def loss_of(tokens: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        with precision:
            return F.nll_loss(model(tokens, lengths), labels, reduction="sum")

    model.train()
    options = {"desc": f"train-{run.epoch}", "total": len(loader), "initial": run.done}
    for batch in progress(run.batches(loader), **options):
        run.optimizer.zero_grad()
        # Faithful: divided by the nominal batch size, so a short last batch weighs less.
        divisor = args.batch_size
        loss = accumulate(loss_of, model, batch[:3], divisor, args.micro_batch_size, device)
        run.optimizer.step()
        source = partial(name_lines, batch.examples, args.train)
        run.steps.add(loss, divisor, int(batch.lengths.sum()), batch.tokens.numel(), source)
    dataset = cast(LlamaDataset, loader.dataset)
    if dataset.by_length:
        totals = run.steps.totals
        print(f"train padding :: {1 - totals['tokens'] / totals['cells']:.3f}")
    return run.steps.loss_sum() / len(dataset)


def name_lines(examples: Sequence[Example], path: str) -> str:
    """Which lines of a file a batch is made of."""
    return f"lines {', '.join(str(example.line + 1) for example in examples)} of {path}"


def save_model(model: LlamaEmbeddingClassifier, filepath: str | Path) -> None:
    """Write a checkpoint that `load_classifier` reads, whole or not at all; one process does."""
    if is_first():
        write_checkpoint(filepath, model.to_checkpoint())
    print(f"save the model to {filepath}")


def test(
    args: argparse.Namespace,
    dev_data: LlamaDataset,
    test_data: LlamaDataset,
    device: torch.device,
) -> tuple[float, float]:
    """Predict dev and test with the best checkpoint of the run; returns their accuracies."""
    model = from_first(lambda: load_classifier(args.filepath)).to(device)
    print(f"load model from {args.filepath}")
    speed_up(args, model.llama, device)
    return predict(args, model, dev_data, test_data, device)


def start_run(
    args: argparse.Namespace,
    model: nn.Module,
    optimizer: AdamW,
    shuffle: torch.Generator,
    log_folder: Path,
) -> TrainingRun:
    """A new training run, or the interrupted one that `--resume` asks for."""
    return TrainingRun(
        model,
        optimizer,
        shuffle,
        args.filepath,
        settings_of(args),
        args.epochs,
        args.save_every,
        log_folder,
        args.resume,
    )


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """What makes a run what it is: its options, and what the files hold that it reads."""
    settings = {name: str(value) for name, value in vars(args).items() if name not in NO_SETTINGS}
    for path in input_files(args):
        settings[f"SHA-256 of {path}"] = fingerprint(path)
    return settings


def remove_state(args: argparse.Namespace) -> None:
    """Once a run is complete there is nothing to resume."""
    if is_first():
        state_path(args.filepath).unlink(missing_ok=True)


def classifier_config(args: argparse.Namespace, label_names: Sequence[str]) -> ClassifierConfig:
    """What the classifiers read of a run's options."""
    return ClassifierConfig(
        num_labels=len(label_names),
        pretrained_model_path=args.pretrained_model_path,
        hidden_dropout_prob=args.hidden_dropout_prob,
        option=args.option,
    )


def pretrain(args: argparse.Namespace, device: torch.device) -> None:
    """Train the language model, from scratch or on from a checkpoint; keep its best epoch."""
    if args.shape:
        tokenizer = Tokenizer(args.max_sentence_len, args.tokenizer_path)
        llama = Llama(
            LlamaConfig(
                vocab_size=tokenizer.n_words,
                **args.shape,
                max_seq_len=args.max_seq_len or LlamaConfig.max_seq_len,
                dropout=args.dropout or 0.0,
                causal=True,
            )
        )
    else:
        llama, tokenizer = load_model(args)
    print(f"{sum(p.numel() for p in llama.parameters()):,} parameters: {llama.config}")
    train_documents, dev_documents = (
        load_documents(paths, tokenizer) for paths in (args.train, args.dev)
    )
    copy_tokenizer(args)
    speed_up(args, llama, device)

    def keep() -> None:
        if is_first():
            llama.save_pretrained(args.filepath, getattr(torch, args.store_dtype))
        print(f"save the model to {args.filepath}")

    print(f"computes in {args.dtype}")
    llama.to(device)
    optimizer = pretraining.make_optimizer(llama)
    shuffle = torch.Generator().manual_seed(args.seed)
    with start_run(args, llama, optimizer, shuffle, Path(args.filepath).parent) as run:
        pretraining.train(
            llama,
            train_documents,
            dev_documents,
            pretraining.Schedule(args.batch_size, args.lr, args.micro_batch_size),
            run,
            autocast(device, args.dtype),
            keep,
        )
    remove_state(args)


def load_documents(paths: Sequence[str], tokenizer: Tokenizer) -> list[Tensor]:
    """The documents of text files, each tokenised once, with BOS."""
    documents = []
    for path in paths:
        texts = read_documents(path)
        tokens = [torch.tensor(tokenizer.encode(text, bos=True, eos=False)) for text in texts]
        print(f"load {len(tokens)} documents, {sum(map(len, tokens))} tokens from {path}")
        documents += tokens
    if not documents:
        raise ValueError(f"{paths[0]}: holds no text")
    return documents


def copy_tokenizer(args: argparse.Namespace) -> None:
    """Put the tokenizer beside the checkpoint that it goes with, where `load_model` looks."""
    if not is_first():
        return
    target = Path(args.filepath).with_name("tokenizer.model")
    model = Path(args.tokenizer_path).read_bytes()
    if not target.exists():
        with open_atomically(target, "wb") as file:
            file.write(model)
    elif target.read_bytes() != model:
        raise ValueError(
            f"{target}: is another tokenizer than {args.tokenizer_path}; each checkpoint needs its "
            "own beside it, so choose another folder for --filepath"
        )


# --------------------------------------------------------------------------------- TensorBoard


def log_epoch(log: "SummaryWriter", train: Evaluation, dev: Evaluation, epoch: int) -> None:
    """Write the curves that have a point per epoch."""
    for split, result in (("train", train), ("dev", dev)):
        log.add_scalar(f"accuracy/{split}", result.accuracy, epoch)
        log.add_scalar(f"macro_f1/{split}", result.macro_f1, epoch)
    log.flush()


def log_confusion(
    log: "SummaryWriter", dev: Evaluation, label_names: Sequence[str], epoch: int
) -> None:
    """Write the confusion matrix of a dev result as a table of counts."""
    counts = judge(dev.predictions, dev.labels, len(label_names)).tolist()
    rows = [[f"**{name}**", *row] for name, row in zip(label_names, counts, strict=True)]
    table = markdown_table([["gold \\ predicted", *label_names], *rows])
    log.add_text("dev confusion (best epoch)", f"epoch {epoch}\n\n{table}", epoch)


# -------------------------------------------------------------------------------- command line


def seed(text: str) -> int:
    """Argument type: a whole number that every generator takes as a seed."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is not in 0 to 2^32 - 1")
    return value


def seeds(text: str) -> list[int]:
    """Argument type: several different seeds with commas between them."""
    values = [seed(part) for part in text.split(",")]
    if len(values) < 2 or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text} is not two or more different seeds")
    return values


def at_least_zero(text: str) -> float:
    """Argument type: a number of at least 0 that tensors can be multiplied with."""
    value = float(text)
    if not 0 <= value <= torch.finfo(torch.float32).max:
        raise argparse.ArgumentTypeError(f"{value} is not a number of at least 0 in float32")
    return value


def whole_at_least_zero(text: str) -> int:
    """Argument type: a whole number from 0 to `LARGEST_INT`."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    if value > LARGEST_INT:
        raise argparse.ArgumentTypeError(f"{value} is above {LARGEST_INT}")
    return value


def probability(text: str) -> float:
    """Argument type: a probability above 0."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not in (0, 1]")
    return value


def dropout(text: str) -> float:
    """Argument type: a probability below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 1)")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The only parser: every flag with its type, default and unit."""
    parser = OneLineParser(
        prog="run_llama.py",
        description="Llama 2: generate text, classify it zero-shot, or fine-tune a classifier.",
        epilog="A flag may be written with - or _ inside.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--option", choices=TASKS, default="generate", help="the task (default: %(default)s)")
    add("--seed", type=seed, default=1337, help="of all randomness (default: %(default)s)")
    add("--use_gpu", action="store_true", help="run on CUDA; an error where there is none")
    add(
        "--deterministic",
        action="store_true",
        help="the same numbers in every run on one machine, also on CUDA, where that costs time",
    )

    model = parser.add_argument_group("model")
    add = model.add_argument
    add(
        "--pretrained-model-path",
        help=f"checkpoint (default: {CHECKPOINT}, or the demo's where that is missing)",
    )
    add("--tokenizer_path", help="default: tokenizer.model in the checkpoint's folder")
    add("--max_sentence_len", type=at_least_one, help="cut texts to this many pieces")
    add(
        "--causal",
        action=argparse.BooleanOptionalAction,
        help="mask attention and read out at each sentence's last token, or not "
        "(default: as the checkpoint says; without a word, not)",
    )
    add(
        "--dropout",
        type=dropout,
        help="inside the layers (default: the checkpoint's; a new one: 0)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the large products (default: float32; pretrain: bfloat16 where the hardware "
        "has it)",
    )
    add("--compile", action="store_true", help="compile the model (not to generate): slow start")

    generate = parser.add_argument_group("generate")
    add = generate.add_argument
    add(
        "--prompt",
        action="append",
        help="text to continue, - for standard input; may be repeated (default: the assignment's)",
    )
    add("--max_new_tokens", type=at_least_one, default=75, help="default: %(default)s")
    add(
        "--temperature",
        type=at_least_zero,
        help="of the softmax, 0 for the likeliest token (default: one text at 0 and one at 1)",
    )
    add("--top_k", type=whole_at_least_zero, default=0, help="draw from the k likeliest; 0: off")
    add(
        "--top_p",
        type=probability,
        default=1.0,
        help="draw from the likeliest with this probability together (default: %(default)s)",
    )
    add("--num_samples", type=at_least_one, default=1, help="texts for each prompt")
    add("--stop_at_eos", action="store_true", help="end a text at EOS or BOS")
    add("--stream", action="store_true", help="print the text as it comes")
    add("--quantize", choices=("int8",), help="store the matrices as int8 (causal, on the CPU)")
    for name in ("low", "high"):
        add(
            f"--generated_sentence_{name}_temp_out",
            help="file for the text at temperature "
            + ("0" if name == "low" else "1, or --temperature")
            + " (default: output/task_1/generated-sentence-temp-<temperature>.txt)",
        )

    data = parser.add_argument_group("data (all but generate)")
    add = data.add_argument
    add("--dataset", choices=DATASETS, help="sets the next four and the names of all results")
    for split in ("train", "dev", "test"):
        add(
            f"--{split}",
            nargs="+",
            metavar="FILE",
            help=f"lines `label ||| sentence` (default: data/cfimdb-{split}.txt)"
            + (", for pretrain also plain text and several files" if split != "test" else ""),
        )
    add(
        "--label-names",
        help="JSON list of label words (default: data/cfimdb-label-mapping.json)",
    )
    for split in ("dev", "test"):
        add(
            f"--{split}_out",
            help=f"predictions, named ...{split}-prompting-output.txt or "
            f"...{split}-finetuning-output.txt "
            f"(default: output/task_{{2,3}}/<dataset>-{split}-...)",
        )

    training = parser.add_argument_group("training (finetune and pretrain; batch size: all)")
    add = training.add_argument
    add("--epochs", type=at_least_one, default=5, help="default: %(default)s")
    add(
        "--batch_size",
        type=at_least_one,
        default=8,
        help="sentences; pretrain: blocks of max_seq_len tokens (default: %(default)s)",
    )
    add(
        "--lr",
        type=at_least_zero,
        help="AdamW's (default: 2e-5; pretrain, the peak: 1e-3 for a new model, else 1e-4)",
    )
    add(
        "--hidden_dropout_prob",
        type=dropout,
        default=0.3,
        help="before the classifier's head (default: %(default)s)",
    )
    add(
        "--filepath",
        help="the best classifier (default: output/task_3/<dataset>-finetune-<epochs>-<lr>.pt) or "
        "language model (default: output/pretrain/<dataset>-<epochs>-<lr>/model.pt)",
    )
    add(
        "--micro_batch_size",
        type=at_least_one,
        help="compute so many rows of a batch at a time, to need less memory (default: all)",
    )
    add(
        "--save_every",
        type=at_least_one,
        help="steps between two states to resume from (default: one state each epoch)",
    )
    add("--resume", action="store_true", help="go on with the interrupted run of this --filepath")
    add(
        "--seeds",
        type=seeds,
        help="finetune with each of these seeds, as in 1,2,3; writes mean and standard deviation",
    )

    shape = parser.add_argument_group(
        "pretrain", "With any of the first four: from scratch; without: on from the checkpoint."
    )
    add = shape.add_argument
    for name in SHAPE:
        default = getattr(LlamaConfig, name)
        add(f"--{name}", type=at_least_one, help=f"default: {default or 'that of n_heads'}")
    add(
        "--max_seq_len",
        type=at_least_one,
        help="tokens of a block, and the model's limit (default: the checkpoint's; a new one: "
        f"{LlamaConfig.max_seq_len})",
    )
    add(
        "--store_dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights in the checkpoint (default: %(default)s)",
    )
    return parser


def get_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a run, with every default filled in.

    Raises:
        ValueError: an argument is unknown or out of bounds, or a result has a wrong name.
    """
    parser = build_parser()
    known = {flag.replace("_", "-"): flag for a in parser._actions for flag in a.option_strings}
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        if not is_text(word):
            raise ValueError(f"the argument {word!r} is not UTF-8 text")
        flag, equals, value = word.partition("=")
        words.append(known.get(flag.replace("_", "-"), flag) + equals + value)
    args = parser.parse_args(words)

    for name, options in OWN_FLAGS.items():
        if args.option not in options and getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name} is for --option {', '.join(options)} only")
    if args.compile and args.option == "generate":
        raise ValueError("--compile is not for --option generate")
    if args.quantize and args.dtype == "float32":
        raise ValueError("--quantize int8 computes in bfloat16, not in --dtype float32")
    args.notes = []
    args.shape = {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
    fill_in_model(args)
    fill_in_data(args)
    fill_in_generation(args)
    if args.lr is None:
        pretraining_lr = 1e-3 if args.shape else 1e-4
        args.lr = pretraining_lr if args.option == "pretrain" else 2e-5
    if args.option == "pretrain":
        check_pretraining(args)
        args.causal = True
    elif args.option != "generate":
        folder, kind = {
            "prompt": ("output/task_2", "prompting"),
            "finetune": ("output/task_3", "finetuning"),
        }[args.option]
        for split in ("dev", "test"):
            ending = f"{split}-{kind}-output.txt"
            path = getattr(args, f"{split}_out") or f"{folder}/{args.dataset}-{ending}"
            if not path.endswith(ending):
                raise ValueError(f"--{split}_out {path}: must end in {ending}")
            setattr(args, f"{split}_out", path)
    if args.filepath is None:
        args.filepath = (
            f"output/pretrain/{args.dataset}-{args.epochs}-{args.lr}/model.pt"
            if args.option == "pretrain"
            else f"output/task_3/{args.dataset}-finetune-{args.epochs}-{args.lr}.pt"
        )
    return args


def fill_in_model(args: argparse.Namespace) -> None:
    """Find the checkpoint and its tokenizer; the demo's stand in for a default that is not there.

    Raises:
        ValueError: the flags contradict each other.
    """
    if args.shape:
        if args.pretrained_model_path is not None:
            raise ValueError(
                f"--{next(iter(args.shape))} asks for a new model, --pretrained-model-path for an "
                "old one; leave one of them out"
            )
        if args.tokenizer_path is None:
            raise ValueError("a new model needs a tokenizer; name one with --tokenizer_path")
        return
    if args.pretrained_model_path is None:
        args.pretrained_model_path = CHECKPOINT
        if not Path(CHECKPOINT).exists():
            args.pretrained_model_path = str(demo_folder() / "model.pt")
            args.notes.append(stand_in(CHECKPOINT, args.pretrained_model_path))
    if args.tokenizer_path is None:
        args.tokenizer_path = str(Path(args.pretrained_model_path).with_name("tokenizer.model"))


def fill_in_generation(args: argparse.Namespace) -> None:
    """Find out which temperatures go to which files.

    Raises:
        ValueError: the flags contradict each other.
    """
    args.prompt = args.prompt or [PROMPT]
    if args.prompt.count("-") > 1:
        raise ValueError("--prompt -: standard input can be read once only")
    low, high = args.generated_sentence_low_temp_out, args.generated_sentence_high_temp_out
    wanted = {0.0: low, 1.0: high}
    if args.temperature is not None:
        wanted = {args.temperature: high if args.temperature else low}
    args.outfiles = {
        temperature: outfile or f"output/task_1/generated-sentence-temp-{temperature:g}.txt"
        for temperature, outfile in wanted.items()
    }


def fill_in_data(args: argparse.Namespace) -> None:
    """Find the data files; the demo's stand in for CFIMDB's if nothing was named.

    Raises:
        ValueError: several files where only pretraining takes them.
    """
    names = ("train", "dev", "test", "label_names")
    if (
        args.option != "generate"
        and args.dataset is None
        and not any(getattr(args, name) for name in names)
    ):
        read = {"prompt": names[1:], "finetune": names, "pretrain": names[:2]}[args.option]
        files = data_files("cfimdb")
        missing = [files[name] for name in read if not Path(files[name]).exists()]
        if missing:
            args.dataset = "demo"
            args.notes.append(stand_in(missing[0], str(demo_folder())))
    for name, path in data_files(args.dataset or "cfimdb").items():
        if getattr(args, name) is None:
            setattr(args, name, path if name == "label_names" else [path])
    args.dataset = args.dataset or Path(args.dev[0]).stem.removesuffix("-dev")
    if args.option != "pretrain":
        for name in ("train", "dev", "test"):
            path, *more = getattr(args, name)
            if more:
                raise ValueError(f"--{name} {path} {more[0]}: one file only, except to pretrain")
            setattr(args, name, path)


def demo_folder() -> Path:
    """The data and the model that come with the repository, as seen from the current folder."""
    return Path(os.path.relpath(Path(__file__).parent / "data" / "demo"))


def data_files(dataset: str) -> dict[str, str]:
    """The four files of a data set, by the flags that name them."""
    beginning = f"{demo_folder()}{os.sep}" if dataset == "demo" else f"data/{dataset}-"
    files = {split: f"{beginning}{split}.txt" for split in ("train", "dev", "test")}
    return {**files, "label_names": f"{beginning}label-mapping.json"}


def stand_in(missing: str, demo: str) -> str:
    """Says that the demo takes the place of a default, and how to get the real thing."""
    return (
        f"there is no {missing}, so {demo} stands in for it; "
        "get the real one with: uv run python data/download.py"
    )


def check_pretraining(args: argparse.Namespace) -> None:
    """Raise where pretraining's flags make no sense together.

    Raises:
        ValueError: says which.
    """
    if args.causal is False:
        raise ValueError("--no-causal: next-token training is causal, or it would see its answers")
    for dev in args.dev:
        for train in args.train:
            if Path(dev).exists() and Path(train).exists() and os.path.samefile(dev, train):
                raise ValueError(
                    f"--dev {dev}: is a training file too; a loss on it would say nothing"
                )


def input_files(args: argparse.Namespace) -> list[str]:
    """The files that a run reads."""
    inputs = [args.pretrained_model_path, args.tokenizer_path]
    if args.option == "pretrain":
        inputs += [*args.train, *args.dev]
    elif args.option != "generate":
        inputs += [args.label_names, args.dev, args.test]
    if args.option == "finetune":
        inputs.append(args.train)
    return list(filter(None, inputs))


def check_files(args: argparse.Namespace) -> None:
    """Find out before any work whether all inputs are there and all outputs can be written.

    Raises:
        FileNotFoundError, ValueError, OSError: the first that is not or cannot.
    """
    for path in input_files(args):
        check_readable(path)
    outputs = list(args.outfiles.values()) if args.option == "generate" else []
    if args.option in ("prompt", "finetune"):
        outputs += [args.dev_out, args.test_out]
    if args.option in TRAINING_TASKS:
        outputs.append(args.filepath)
        for state in [state_path(own.filepath) for own in runs_of(args)]:
            if state.exists() and not args.resume:
                raise ValueError(
                    f"{state}: holds a run that was interrupted; go on with it by --resume, or "
                    "delete the file to begin anew"
                )
    for path in outputs if is_first() else ():
        check_writable(path)


def run(args: argparse.Namespace) -> None:
    """Do the task that `args` ask for."""
    device = resolve_device(args.use_gpu)
    start_processes(args.use_gpu)
    if args.deterministic:
        compute_deterministically()
        print("computes deterministically")
    if args.option == "generate" and world_size() > 1:
        raise ValueError("--option generate runs in one process; start it without torchrun")
    if args.dtype is None:
        half = args.quantize or (args.option == "pretrain" and has_bfloat16(device))
        args.dtype = "bfloat16" if half else "float32"
    check_files(args)
    for note in args.notes if is_first() else ():
        print(f"run_llama.py: note: {note}", file=sys.stderr)
    seed_everything(args.seed)
    if args.option == "generate":
        generate(args, device)
    elif args.option == "prompt":
        test_with_prompting(args, device)
    elif args.option == "pretrain":
        pretrain(args, device)
    elif args.seeds:
        finetune_seeds(args, device)
    else:
        finetune(args, device)
    end_processes()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Line by line, so that a log file shows a run's progress; and a text that the terminal
        # cannot show is shown escaped.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    args = None
    with signals_raise():
        try:
            args = get_args(argv)
            run(args)
        except Interrupted as signal:
            if is_first():
                say("interrupted" + how_to_resume(args))
            return 128 + signal.number
        except (ValueError, OSError) as error:
            say(f"error: {describe_error(error)}")
            return 2
        except Exception as error:
            if is_out_of_memory(error):
                say(f"error: {advise_on_memory(args)}")
                return 2
            if is_lost_process(error):
                say(f"error: lost another process: {describe_error(error)}")
                return 1
            raise
    return 0


def say(message: str) -> None:
    """A line on standard error."""
    which = f"rank {rank()}: " if world_size() > 1 else ""
    print(f"run_llama.py: {which}{message}", file=sys.stderr)


def how_to_resume(args: argparse.Namespace | None) -> str:
    """What to add to the news of an interruption."""
    if args is None or args.option not in TRAINING_TASKS:
        return ""
    files = [state_path(own.filepath) for own in runs_of(args)]
    if args.seeds:
        files.append(seeds_file(args))
    if not any(path.exists() for path in files):
        return ""
    return "; the same command with --resume goes on where it stopped"


def advise_on_memory(args: argparse.Namespace | None) -> str:
    """What to do about too little memory."""
    if args is not None and args.option in TRAINING_TASKS:
        return "out of memory; compute fewer rows at a time: --micro_batch_size"
    return "out of memory; try a smaller --batch_size"


if __name__ == "__main__":
    leave(main())
