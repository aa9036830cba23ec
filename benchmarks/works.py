"""The work that is timed: each task as this project does it, and as its peers do.

Models have the shape of `stories42M.pt` and the same random weights, or are read from a folder. The
sentences are those of SST and CFIMDB, which `data/download.py` downloads. A few batches stand for a
pass over a data set: its batches are sorted by size and cut into equal parts, and the middle one of
each part is taken.
"""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from transformers.generation.streamers import BaseStreamer

from benchmarks import llama2c
from benchmarks.measure import Work, wait
from beyond.command_line import PROMPT
from beyond.decoding import Sampler, prepare_for_decoding, stream
from beyond.fast_decoding import prepare_fastest
from beyond.formats.load import load_llama
from beyond.runtime import Runtime
from classifier import ClassifierConfig, LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from config import LlamaConfig
from llama import Llama
from optimizer import AdamW
from run_llama import LlamaDataset, build_prompt_suffix, classification_loss, create_data
from tests.oracle import hugging_face_config, to_hugging_face
from tokenizer import Tokenizer
from utils import read_label_names

ROOT = Path(__file__).parent.parent
LR = 2e-5
THE_PROMPT = "the prompt"  # the assignment's, as the context of a job
BATCH_SIZES = {"prompt": {"sst": 10, "cfimdb": 10}, "finetune": {"sst": 80, "cfimdb": 10}}
SAMPLES = {"sst": 2, "cfimdb": 1}  # batches that stand for a pass over the data
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}
Batch = tuple[Tensor, Tensor, Tensor]  # tokens, lengths, labels


@dataclass(frozen=True)
class Job:
    """Work that several sides do, each in its own way.

    Attributes:
        task: generate, prompt or finetune.
        data: for generate "<tokens> after <tokens of context>", or "<tokens> after the prompt",
            which is the assignment's; else sst, cfimdb, or, for finetune, one batch of random
            tokens, "<sentences> x <tokens>".
        model: a folder of Hugging Face's; "": random weights.
    """

    task: str
    data: str
    model: str = ""

    def __str__(self) -> str:
        model = f", {describe_model(self.model)}" if self.model else ""
        return f"{self.task} {self.data}{model}"

    @property
    def new_tokens(self) -> int:
        """Return how many tokens are generated and timed."""
        return int(self.data.split(" after ")[0])

    @property
    def is_one_batch(self) -> bool:
        """Return whether the data is a batch of random tokens."""
        return " x " in self.data


def missing_inputs() -> list[str]:
    """Return the course's files that the benchmarks need and that are missing."""
    names = ["tokenizer.model"]
    for data in ("sst", "cfimdb"):
        names += [f"data/{data}-train.txt", f"data/{data}-dev.txt"]
        names.append(f"data/{data}-label-mapping.json")
    return [name for name in names if not (ROOT / name).exists()]


@cache
def read_tokenizer() -> Tokenizer:
    """Read Llama's tokenizer."""
    return Tokenizer(tokenizer_model=ROOT / "tokenizer.model")


@cache
def sample_batches(task: str, data: str, group_by_length: bool) -> tuple[list[Batch], float]:
    """Return some batches of a pass, and the number of sentences that they stand for.

    That is the pass's sentences times the batches' part of its tokens, padding included. Evaluation
    takes the dev file, in the file's order or grouped by length; training takes shuffled batches.
    """
    label_names = read_label_names(ROOT / f"data/{data}-label-mapping.json")
    suffix = build_prompt_suffix(label_names) if task == "prompt" else ""
    path = ROOT / f"data/{data}-{'dev' if task == 'prompt' else 'train'}.txt"
    with contextlib.redirect_stdout(sys.stderr):  # only the tables go to standard output
        examples = create_data(path, read_tokenizer(), len(label_names), 1024, suffix)
    dataset = LlamaDataset(examples, read_tokenizer().pad_id, group_by_length)
    shuffle = torch.Generator().manual_seed(0) if task == "finetune" else None
    size = BATCH_SIZES[task][data]
    batches = [batch for batch in dataset.loader(size, shuffle) if len(batch.labels) == size]
    batches.sort(key=lambda batch: batch.tokens.numel())
    sample = SAMPLES[data]
    picked = [batches[(2 * i + 1) * len(batches) // (2 * sample)] for i in range(sample)]
    cells = [batch.tokens.numel() for batch in batches]
    worth = sum(batch.tokens.numel() for batch in picked) / sum(cells) * len(cells) * size
    return [(b.tokens, b.lengths, b.labels) for b in picked], worth


def batches_of(job: Job, side: str) -> tuple[list[Batch], float]:
    """Return the batches that a side gets, and the number of sentences that they stand for."""
    if job.is_one_batch:
        rows, length = (int(size) for size in job.data.split(" x "))
        labels = torch.arange(rows) % 2
        tokens = random_tokens(rows, length, LlamaConfig().vocab_size)
        return [(tokens, torch.full((rows,), length), labels)], rows
    return sample_batches(job.task, job.data, group_by_length=side.startswith("causal"))


def random_tokens(rows: int, length: int, vocab_size: int) -> Tensor:
    """Return the same random tokens each time: (rows, length), neither BOS nor EOS."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocab_size, (rows, length), generator=generator)


@cache
def read_llama(folder: str) -> Llama:
    """Read a model of Hugging Face's, in float32."""
    return load_llama(folder, causal=True)


def describe_model(folder: str) -> str:
    """Return the name of a model in a folder, such as SmolLM2-135M."""
    parameters = sum(parameter.numel() for parameter in read_llama(folder).parameters())
    return f"SmolLM2-{parameters / 1e6:.0f}M"


def make_llama(causal: bool, folder: str = "") -> Llama:
    """Make the model; its weights are the same for every side of a job."""
    if folder:
        return read_llama(folder)
    torch.manual_seed(0)
    return Llama(LlamaConfig(causal=causal))


def make_work(job: Job, side: str, device: torch.device, peer: Path | None = None) -> Work:
    """Return a function that does some work once.

    Args:
        job: the work.
        side: who does it, and the dtype: "reference float32", "causal <dtype>",
            "Hugging Face <dtype>" or, for generate, "compiled <dtype>", "llama2.c <dtype>", or
            "Hugging Face without cache float32".
        device: where the work runs.
        peer: the folder of llama2.c's programs.
    """
    kind, dtype = side.rsplit(" ", 1)
    if kind == "llama2.c":
        assert peer is not None, "the row is left out without a folder"
        threads = torch.get_num_threads()
        return lambda: llama2c.generate(peer, dtype, job.new_tokens, threads)
    if job.model and kind == "Hugging Face":
        theirs = LlamaForCausalLM.from_pretrained(job.model, dtype=DTYPES[dtype])
        work = make_hugging_face_generate(theirs, job, kind, device)
    else:
        llama = make_llama(kind != "reference", job.model).to(device)
        if job.task == "generate":
            work = make_generate(llama, job, kind, dtype, device)
        else:
            make = make_prompt if job.task == "prompt" else make_finetune
            batches, _ = batches_of(job, side)
            on_device = [(t.to(device), n.to(device), y.to(device)) for t, n, y in batches]
            work = make(llama, on_device, kind, dtype, device)

    def precisely() -> float | None:
        with precision(side, device):
            return work()

    return precisely


@contextlib.contextmanager
def precision(side: str, device: torch.device) -> Iterator[None]:
    """On CUDA, let float32 products use TF32 in the block, as the program does in causal mode.

    Hugging Face's do so too; only those of reference mode do not.
    """
    uses_tf32 = device.type == "cuda" and not side.startswith("reference")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if uses_tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ----------------------------------------------------------------------------------------- generate


def make_context(job: Job, vocab_size: int, device: torch.device) -> Tensor:
    """Return the tokens that come before the first new one: (1, seq)."""
    context = job.data.split(" after ")[1]
    if context == THE_PROMPT:
        return torch.tensor([read_tokenizer().encode(PROMPT, bos=True, eos=False)], device=device)
    return random_tokens(1, int(context), vocab_size).to(device)


def make_generate(llama: Llama, job: Job, kind: str, dtype: str, device: torch.device) -> Work:
    """Return a function that continues a context greedily, as `make_work` describes.

    It returns the seconds from the first new token to the last, as llama2.c counts them. So one
    token more than `job.new_tokens` is generated, and the context's own time does not count.
    """
    if kind.startswith("Hugging Face"):
        theirs = to_hugging_face(llama).to(DTYPES[dtype])  # type: ignore[arg-type]
        return make_hugging_face_generate(theirs, job, kind, device)
    idx, new_tokens = make_context(job, llama.config.vocab_size, device), job.new_tokens + 1
    model = prepare(llama.eval(), kind, dtype)

    def ours() -> float:
        columns = stream(model, idx, new_tokens, Sampler(temperature=0.0))
        next(columns)
        wait(device)
        start = time.perf_counter()
        for _ in columns:
            pass
        wait(device)
        return time.perf_counter() - start

    return ours


def prepare(llama: Llama, kind: str, dtype: str) -> Llama:
    """Return the model as `--option generate` prepares it, "compiled" as with `--compile`."""
    return prepare_fastest(
        llama,
        DTYPES[dtype],
        quantize=dtype == "int8",
        measure=True,
        compile_step=kind == "compiled",
        note=lambda text: print(text, file=sys.stderr),
    )


def can_compile(device: torch.device) -> bool:
    """Return whether decoding can be compiled: on the CPU, with a C++ compiler."""
    return device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is not None


class Clock(BaseStreamer):
    """Gets the prompt and then each new token of `transformers`, and notes when it came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


def make_hugging_face_generate(
    theirs: LlamaForCausalLM, job: Job, kind: str, device: torch.device
) -> Work:
    """Return a function that does what that of `make_generate` does."""
    theirs.to(device).eval()  # type: ignore[arg-type]
    idx, new_tokens = make_context(job, theirs.config.vocab_size, device), job.new_tokens + 1

    def generate() -> float:
        clock = Clock()
        theirs.generate(  # type: ignore[misc]
            idx,
            attention_mask=torch.ones_like(idx),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            use_cache="without cache" not in kind,
            pad_token_id=3,
            streamer=clock,
        )
        assert len(clock.times) == 1 + new_tokens
        return clock.times[-1] - clock.times[1]

    return generate


# ------------------------------------------------------------------------------ prompt and finetune


def attention_mask(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Make Hugging Face's mask: 1 on tokens, 0 on padding."""
    return (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]).long()


def make_prompt(
    llama: Llama, batches: Sequence[Batch], kind: str, dtype: str, device: torch.device
) -> Work:
    """Return a function that scores two label words for each sentence."""
    names = ["bad", "good"]
    ids = [read_tokenizer().encode(name, bos=False, eos=False)[0] for name in names]
    if not kind.startswith("Hugging Face"):
        config = ClassifierConfig(2, "", 0.3, "prompt")
        if kind == "causal":
            llama = prepare_for_decoding(llama, DTYPES[dtype], exact_head=True)
        model = LlamaZeroShotClassifier(config, read_tokenizer(), names, llama).eval()
        runtime = Runtime(device, DTYPES[dtype], causal=kind == "causal")

        @torch.inference_mode()
        def ours() -> None:
            for tokens, lengths, _ in batches:
                with runtime.autocast():
                    model(tokens, lengths).argmax(dim=-1).tolist()

        return ours
    theirs: LlamaForCausalLM = to_hugging_face(llama).to(device)  # type: ignore[arg-type]

    @torch.inference_mode()
    def score() -> None:
        for tokens, lengths, _ in batches:
            mask = attention_mask(tokens, lengths)
            logits = theirs(tokens, attention_mask=mask, logits_to_keep=1).logits[:, -1]
            F.log_softmax(logits, dim=-1)[:, ids].argmax(dim=-1).tolist()

    return score


def make_finetune(
    llama: Llama, batches: Sequence[Batch], kind: str, dtype: str, device: torch.device
) -> Work:
    """Return a function that trains on each batch once: forward, backward, update."""
    num_labels = max(int(labels.max()) for _, _, labels in batches) + 1
    if not kind.startswith("Hugging Face"):
        config = ClassifierConfig(num_labels, "", 0.3, "finetune")
        model = LlamaEmbeddingClassifier(config, llama).to(device).train()
        optimizer = AdamW(model.parameters(), lr=LR)
        runtime = Runtime(device, DTYPES[dtype], causal=kind == "causal")

        def ours() -> None:
            for tokens, lengths, labels in batches:
                optimizer.zero_grad()
                with runtime.autocast():
                    loss = classification_loss(model(tokens, lengths), labels) / len(labels)
                loss.backward()
                optimizer.step()
                loss.item()

        return ours

    their_config = hugging_face_config(llama.config)
    their_config.num_labels, their_config.pad_token_id = num_labels, 3
    theirs = LlamaForSequenceClassification(their_config)
    theirs.model = to_hugging_face(llama).model
    theirs.to(device).train()  # type: ignore[arg-type]
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=LR, weight_decay=0.0, foreach=True)

    def step() -> None:
        for tokens, lengths, labels in batches:
            their_optimizer.zero_grad()
            mask = attention_mask(tokens, lengths)
            loss = theirs(tokens, attention_mask=mask, labels=labels).loss
            loss.backward()
            their_optimizer.step()
            loss.item()

    return step
