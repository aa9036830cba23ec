"""Reference mode beside Hugging Face transformers: time and memory, on the shape of stories42M.pt.

    uv run python -m benchmarks.reference [--use_gpu] [--rounds N]

Both sides have the same random weights and the same real, padded batches of SST and CFIMDB, which
`data/download.py` fetches. Times are medians over rounds that take the two sides in turn, each
side first in every second round; memory is the peak of a process that does one work alone.
"""

import argparse
import contextlib
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from classifier import ClassifierConfig, LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from config import LlamaConfig
from llama import Llama
from optimizer import AdamW
from run_llama import PROMPT, build_prompt_suffix, create_data, read_label_names
from tests.oracle import hugging_face_config, to_hugging_face
from tokenizer import Tokenizer
from utils import pad_batch, resolve_device

ROOT = Path(__file__).parent.parent
LR = 2e-5
NEW_TOKENS = 75
BATCH_SIZES = {"sst": {"prompt": 10, "finetune": 80}, "cfimdb": {"prompt": 10, "finetune": 10}}
SIDES = ("ours", "Hugging Face")
Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str  # task and data set
    unit: str  # of speed
    count: int  # units that one call works through


ROWS = [
    Row("generate", "tokens/s", NEW_TOKENS),
    Row("prompt sst", "sentences/s", 10),
    Row("prompt cfimdb", "sentences/s", 10),
    Row("finetune sst", "steps/s", 1),
    Row("finetune cfimdb", "steps/s", 1),
]


def make_batch(name: str, task: str, tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, lengths and labels of the first batch of a data set, as the task has them."""
    label_names = read_label_names(ROOT / f"data/{name}-label-mapping.json")
    suffix = build_prompt_suffix(label_names) if task == "prompt" else ""
    path = ROOT / f"data/{name}-{'dev' if task == 'prompt' else 'train'}.txt"
    with contextlib.redirect_stdout(sys.stderr):  # standard output holds the table alone
        examples = create_data(path, tokenizer, len(label_names), 1024, suffix)
    examples = examples[: BATCH_SIZES[name][task]]
    tokens, lengths = pad_batch([example.tokens for example in examples], tokenizer.pad_id)
    return tokens, lengths, torch.tensor([example.label for example in examples])


def make_work(row: Row, side: str, device: torch.device) -> Work:
    """A function that does the row's work once, on one side."""
    tokenizer = Tokenizer(tokenizer_model=ROOT / "tokenizer.model")
    torch.manual_seed(0)
    llama = Llama(LlamaConfig())
    if row.name == "generate":
        context = torch.tensor([tokenizer.encode(PROMPT, bos=True, eos=False)], device=device)
        if side == "ours":
            llama.to(device).eval()
            return lambda: llama.generate(context, NEW_TOKENS, temperature=0.0)
        language_model = to_hugging_face(llama).to(device)  # type: ignore[arg-type]
        return lambda: language_model.generate(
            context,
            attention_mask=torch.ones_like(context),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=False,  # without a mask nothing can be cached: the same work for both
            pad_token_id=tokenizer.pad_id,
        )
    task, data = row.name.split()
    tokens, lengths, labels = (x.to(device) for x in make_batch(data, task, tokenizer))
    mask = (torch.arange(tokens.shape[1], device=device) < lengths[:, None]).long()
    if task == "prompt":
        return make_prompt(side, llama, tokenizer, tokens, mask, device)
    return make_finetune(side, llama, tokens, mask, labels, device)


def make_prompt(
    side: str,
    llama: Llama,
    tokenizer: Tokenizer,
    tokens: Tensor,
    mask: Tensor,
    device: torch.device,
) -> Work:
    """Score two label words for a batch."""
    config = ClassifierConfig(2, "", 0.3, "prompt")
    names = ["bad", "good"]
    ids = [tokenizer.encode(name, bos=False, eos=False)[0] for name in names]
    zero_shot = LlamaZeroShotClassifier(config, tokenizer, names, llama).to(device).eval()
    language_model: LlamaForCausalLM = to_hugging_face(llama).to(device)  # type: ignore[arg-type]

    @torch.inference_mode()
    def ours() -> object:
        return zero_shot(tokens).argmax(dim=-1).tolist()

    @torch.inference_mode()
    def theirs() -> object:
        logits = language_model(tokens, attention_mask=mask, logits_to_keep=1).logits[:, -1]
        return F.log_softmax(logits, dim=-1)[:, ids].argmax(dim=-1).tolist()

    return ours if side == "ours" else theirs


def make_finetune(
    side: str, llama: Llama, tokens: Tensor, mask: Tensor, labels: Tensor, device: torch.device
) -> Work:
    """One training step on a batch: forward, backward, update."""
    num_labels = int(labels.max()) + 1
    if side == "ours":
        config = ClassifierConfig(num_labels, "", 0.3, "finetune")
        model = LlamaEmbeddingClassifier(config, llama).to(device).train()
        optimizer = AdamW(model.parameters(), lr=LR)

        def ours() -> float:
            optimizer.zero_grad()
            loss = F.nll_loss(model(tokens), labels, reduction="sum") / len(labels)
            loss.backward()
            optimizer.step()
            return loss.item()

        return ours

    their_config = hugging_face_config(llama.config)
    their_config.num_labels, their_config.pad_token_id = num_labels, 3
    their_model = LlamaForSequenceClassification(their_config)
    their_model.model = to_hugging_face(llama).model
    their_model.to(device).train()  # type: ignore[arg-type]
    their_optimizer = torch.optim.AdamW(
        their_model.parameters(), lr=LR, weight_decay=0.0, foreach=True
    )

    def theirs() -> float:
        their_optimizer.zero_grad()
        loss = their_model(tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        their_optimizer.step()
        return loss.item()

    return theirs


def time_row(row: Row, rounds: int, device: torch.device) -> list[float]:
    """Median seconds of one call, per side."""
    works = [make_work(row, side, device) for side in SIDES]
    times: list[list[float]] = [[], []]
    for work in works:
        work()  # warm up
    for turn in range(rounds):
        for i in (0, 1) if turn % 2 == 0 else (1, 0):
            start = time.perf_counter()
            works[i]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[i].append(time.perf_counter() - start)
    return [statistics.median(series) for series in times]


def measure_memory(row: Row, side: str, device: torch.device) -> float:
    """Peak memory in GiB of a process that does the work three times: of the GPU, or resident."""
    work = make_work(row, side, device)
    for _ in range(3):
        work()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def describe_machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        models = [line.split(": ")[1] for line in lines if line.startswith("model name")]
        machine = (
            f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"
        )
    return (
        f"{machine}; Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"transformers {transformers.__version__}; {time.strftime('%Y-%m-%d')}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--use_gpu", action="store_true")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    args = parser.parse_args()
    device = resolve_device(args.use_gpu)
    transformers.logging.set_verbosity_error()
    print(describe_machine(device), end="\n\n")
    print("| work | ours / Hugging Face, time | ours | Hugging Face | unit | peak memory, GiB |")
    print("|---|---|---|---|---|---|")
    for row in ROWS:
        memory = []
        for side in SIDES:  # each in a fresh process, whose peak is its own
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory.append(pool.apply(measure_memory, (row, side, device)))
        ours, theirs = time_row(row, args.rounds, device)
        speeds = f"{row.count / ours:.3g} | {row.count / theirs:.3g} | {row.unit}"
        peaks = f"{memory[0]:.2f} / {memory[1]:.2f}"
        print(f"| {row.name} | {ours / theirs:.3f} | {speeds} | {peaks} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
