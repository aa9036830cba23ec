"""Pretraining: a causal language model learns to predict the next token of running text.

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", eq. 1: minimise
the mean of -log p(token | the tokens before it). Documents follow each other in one stream, each
begun by BOS, and the stream is cut into blocks of `max_seq_len` tokens; a document that a cut goes
through is continued in the next block.

Conventions: losses are means over predicted tokens, in nats; perplexity is exp(loss).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llama import Llama
from optimizer import AdamW
from utils import StepLog, to_device, uninterrupted

if TYPE_CHECKING:  # imported where it is used: it takes a second
    from torch.utils.tensorboard import SummaryWriter

WARM_UP = 0.05  # share of the steps in which the learning rate rises to its peak
FINAL_LR = 0.1  # share of the peak that is left at the end
MAX_GRAD_NORM = 1.0
BETAS = (0.9, 0.95)  # Touvron et al. 2023, arXiv:2307.09288, section 2.2, and so the next one
WEIGHT_DECAY = 0.1  # of matrices; RMSNorm's gains do not decay
SLICE = 1 << 24  # logits that are made at a time: 64 MiB in float32


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    epochs: int
    batch_size: int  # blocks of max_seq_len tokens
    lr: float  # the peak


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A linear warm-up to the peak, then half a cosine down to `FINAL_LR` of it.

    Args:
        step: from 0 to steps - 1.
        steps: of the whole training.
        peak: the highest rate.
    """
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - 1 - warm_up)  # 0 to 1
    return peak * (FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * progress)) / 2)


def pack(documents: Sequence[Tensor], block: int, name: str = "text") -> Tensor:
    """The stream of all documents, cut into full blocks.

    Args:
        documents: token ids (length,) each, BOS first.
        block: tokens that the model sees at a time.
        name: of the documents, for the message.

    Returns:
        (blocks, block + 1): a block's last token is only predicted, and is the first of the next
        block, so that every token but the stream's first is predicted once. What remains after
        the last full block is left out.

    Raises:
        ValueError: there are fewer tokens than one block.
    """
    stream = torch.cat(list(documents))
    if len(stream) <= block:
        raise ValueError(
            f"{name}: {len(stream)} tokens are fewer than one block of {block} and the token after "
            "it; give more text or a smaller --max_seq_len"
        )
    return stream.unfold(0, block + 1, block)


def backward(llama: Llama, blocks: Tensor, precision: AbstractContextManager) -> Tensor:
    """The loss of some blocks (batch, block + 1), with its gradients added to the parameters'.

    The vocabulary projection is the one large tensor here. It is made, and its gradient taken,
    a slice of rows at a time, so that no tensor of logits is larger than `SLICE`.
    """
    with precision:
        hidden = llama.compute_hidden(blocks[:, :-1])  # (batch, block, dim)
    leaf = hidden.detach().requires_grad_()
    loss = torch.zeros((), device=blocks.device)
    for rows, targets in slices(leaf, blocks, llama.config.vocab_size):
        with precision:
            logits = llama.output(rows)  # (rows, vocab)
            part = F.cross_entropy(logits.float(), targets, reduction="sum") / blocks[:, 1:].numel()
        part.backward()
        loss += part.detach()
    hidden.backward(leaf.grad)
    return loss


def slices(hidden: Tensor, blocks: Tensor, vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (rows, dim) of hidden states and what they predict (rows,), a slice at a time."""
    size = max(1, SLICE // vocab_size)
    return zip(hidden.flatten(0, 1).split(size), blocks[:, 1:].flatten().split(size), strict=True)


@torch.inference_mode()
def evaluate(
    llama: Llama, blocks: Tensor, batch_size: int, precision: AbstractContextManager
) -> float:
    """Mean loss over all tokens that blocks (blocks, block + 1) predict."""
    was_training = llama.training
    llama.eval()
    loss = 0.0
    try:
        for batch in tqdm(blocks.split(batch_size), desc="eval", leave=False):
            batch = to_device(batch, llama.output.weight.device)
            with precision:
                hidden = llama.compute_hidden(batch[:, :-1])
                for rows, targets in slices(hidden, batch, llama.config.vocab_size):
                    logits = llama.output(rows).float()
                    loss += F.cross_entropy(logits, targets, reduction="sum").item()
    finally:
        llama.train(was_training)
    return loss / blocks[:, 1:].numel()


def train(
    llama: Llama,
    train_documents: Sequence[Tensor],
    dev_documents: Sequence[Tensor],
    schedule: Schedule,
    generator: torch.Generator,
    precision: AbstractContextManager,
    log: "SummaryWriter",
    keep: Callable[[], None],
) -> None:
    """Train for all epochs.

    Args:
        llama: the model, in causal mode, on its device.
        train_documents: token ids (length,) each, BOS first; packed in a new order each epoch.
        dev_documents: likewise, held out; packed in their own order.
        schedule: epochs, batch size and learning rate.
        generator: source of the orders, on the CPU.
        precision: scope of the forward passes, such as `torch.autocast`.
        log: where loss, learning rate, tokens per second and perplexity go.
        keep: called after each epoch whose validation loss is the lowest so far.

    Raises:
        ValueError: there are fewer tokens than one block; or the loss became infinite or NaN.
    """
    block, device = llama.config.max_seq_len, llama.output.weight.device
    dev_blocks = pack(dev_documents, block, "--dev")
    steps_per_epoch = math.ceil(len(pack(train_documents, block, "--train")) / schedule.batch_size)
    parameters = list(llama.parameters())
    optimizer = AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() < 2]},
        ],
        betas=BETAS,
    )
    best = math.inf
    llama.train()
    for epoch in range(schedule.epochs):
        steps = StepLog(log, optimizer, device, first_step=epoch * steps_per_epoch)
        start = time.perf_counter()
        order = torch.randperm(len(train_documents), generator=generator).tolist()
        blocks = pack([train_documents[i] for i in order], block)
        blocks = blocks[torch.randperm(len(blocks), generator=generator)]
        batches = blocks.split(schedule.batch_size)
        for i, batch in enumerate(tqdm(batches, desc=f"pretrain-{epoch}", leave=False)):
            step = epoch * steps_per_epoch + i
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, schedule.epochs * steps_per_epoch, schedule.lr)
            optimizer.zero_grad()
            loss = backward(llama, to_device(batch, device), precision)
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            tokens = batch[:, 1:].numel()
            steps.add(loss, tokens, tokens)
        train_loss = steps.loss_sum() / blocks[:, 1:].numel()
        seconds = time.perf_counter() - start
        dev_loss = evaluate(llama, dev_blocks, schedule.batch_size, precision)
        if not math.isfinite(dev_loss):
            raise ValueError(f"step {step}: the validation loss is {dev_loss}; try a lower --lr")
        print(
            f"epoch {epoch}: train loss :: {train_loss:.3f}, "
            f"dev loss :: {dev_loss:.3f}, dev perplexity :: {math.exp(dev_loss):.2f}, "
            f"tokens/s :: {blocks[:, 1:].numel() / seconds:.0f}"
        )
        with uninterrupted():
            log.add_scalar("loss/dev", dev_loss, epoch)
            log.add_scalar("perplexity/dev", math.exp(dev_loss), epoch)
            log.flush()
        if dev_loss < best:
            best = dev_loss
            keep()
