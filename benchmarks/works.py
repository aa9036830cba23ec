"""The work that is timed: each task as this project does it, and as Hugging Face does.

All models have the shape of `stories42M.pt` and the same random weights. The sentences are those of
SST and CFIMDB, which `data/download.py` downloads. A few batches stand for a pass over a data set:
its batches are sorted by size and cut into equal parts, and the middle one of each part is taken.
"""

import contextlib
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.measure import Work
from beyond.command_line import PROMPT
from beyond.decoding import prepare_for_decoding
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
NEW_TOKENS = 75
BATCH_SIZES = {"prompt": {"sst": 10, "cfimdb": 10}, "finetune": {"sst": 80, "cfimdb": 10}}
SAMPLE = 3  # batches that stand for a pass over the data
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}
Batch = tuple[Tensor, Tensor, Tensor]  # tokens, lengths, labels


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
    picked = [batches[(2 * i + 1) * len(batches) // (2 * SAMPLE)] for i in range(SAMPLE)]
    cells = [batch.tokens.numel() for batch in batches]
    worth = sum(batch.tokens.numel() for batch in picked) / sum(cells) * len(cells) * size
    return [(b.tokens, b.lengths, b.labels) for b in picked], worth


def make_llama(causal: bool) -> Llama:
    """Make the model; its weights are the same for every work."""
    torch.manual_seed(0)
    return Llama(LlamaConfig(causal=causal))


def make_work(task: str, data: str, side: str, device: torch.device) -> Work:
    """Return a function that does some work once.

    Args:
        task: generate, prompt or finetune.
        data: sst or cfimdb; for generate the number of tokens in the context, or "" for the
            assignment's prompt.
        side: "reference float32", "causal <dtype>", "Hugging Face <dtype>" or, for generate,
            "Hugging Face without cache float32".
        device: where the work runs.
    """
    kind, dtype = side.rsplit(" ", 1)
    llama = make_llama(causal=kind == "causal").to(device)
    if task == "generate":
        return make_generate(llama, data, kind, dtype, device)
    batches, _ = sample_batches(task, data, group_by_length=kind == "causal")
    on_device = [(t.to(device), n.to(device), y.to(device)) for t, n, y in batches]
    if task == "prompt":
        return make_prompt(llama, on_device, kind, dtype, device)
    return make_finetune(llama, on_device, kind, dtype, device)


def make_generate(llama: Llama, context: str, kind: str, dtype: str, device: torch.device) -> Work:
    """Return a function that continues a prompt greedily, as `make_work` describes."""
    ids = read_tokenizer().encode(PROMPT, bos=True, eos=False)
    if context:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 32000, (int(context),), generator=generator).tolist()
    idx = torch.tensor([ids], device=device)
    if not kind.startswith("Hugging Face"):
        model = prepare_for_decoding(llama.eval(), DTYPES[dtype], quantize=dtype == "int8")
        return lambda: model.generate(idx, NEW_TOKENS, temperature=0.0)
    theirs = to_hugging_face(llama).to(DTYPES[dtype]).to(device)  # type: ignore[arg-type]
    return lambda: theirs.generate(
        idx,
        attention_mask=torch.ones_like(idx),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache="without cache" not in kind,
        pad_token_id=3,
    )


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
