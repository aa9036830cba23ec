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
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import Llama
from optimizer import AdamW
from training import TrainingRun, accumulate, gather, own_batches, parallelise, progress
from utils import to_device

WARM_UP = 0.05  # share of the steps in which the learning rate rises to its peak
FINAL_LR = 0.1  # share of the peak that is left at the end
MAX_GRAD_NORM = 1.0
BETAS = (0.9, 0.95)  # Touvron et al. 2023, arXiv:2307.09288, section 2.2, and so the next one
WEIGHT_DECAY = 0.1  # of matrices; RMSNorm's gains do not decay
SLICE = 1 << 24  # logits that are made at a time: 64 MiB in float32


@dataclass(frozen=True)
class Schedule:
    """How much at a time and how fast to train."""

    batch_size: int  # blocks of max_seq_len tokens
    lr: float  # the peak
    micro_batch_size: int | None = None  # blocks that are computed at a time


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


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of cross-entropies of hidden @ weight^T, and its gradients, in little memory.

    The logits are the one large tensor of pretraining. They are made, and their gradients taken,
    a slice of rows at a time, so that no tensor of logits is larger than `SLICE`.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """The loss of hidden states (rows, dim), weight (vocab, dim), and targets (rows,)."""
        loss = torch.zeros((), device=hidden.device)
        weight_grad, hidden_grads = torch.zeros_like(weight), []
        weight = weight.detach().requires_grad_()  # one leaf, which autocast casts once
        for rows, wanted in slices(hidden, targets, len(weight)):
            rows = rows.detach().requires_grad_()
            with torch.enable_grad():
                logits = F.linear(rows, weight)  # (rows, vocab)
                part = F.cross_entropy(logits.float(), wanted, reduction="sum")
            rows_grad, part_grad = torch.autograd.grad(part, (rows, weight))
            hidden_grads.append(rows_grad)
            weight_grad += part_grad
            loss += part.detach()
        ctx.save_for_backward(torch.cat(hidden_grads), weight_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of hidden states, weight and targets."""
        hidden_grad, weight_grad = ctx.saved_tensors
        return grads[0] * hidden_grad, grads[0] * weight_grad, None


class NextTokenLoss(nn.Module):
    """The sum of the losses of all tokens that some blocks (batch, block + 1) predict."""

    def __init__(self, llama: Llama) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, blocks: Tensor) -> Tensor:
        """A scalar, in nats."""
        hidden = self.llama.compute_hidden(blocks[:, :-1]).flatten(0, 1)  # (rows, dim)
        weight = self.llama.output.weight
        return LinearCrossEntropy.apply(hidden, weight, blocks[:, 1:].flatten())


def slices(hidden: Tensor, targets: Tensor, vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states (rows, dim) and what they predict (rows,), a slice at a time."""
    size = max(1, SLICE // vocab_size)
    return zip(hidden.split(size), targets.split(size), strict=True)


@torch.inference_mode()
def evaluate(
    llama: Llama, blocks: Tensor, batch_size: int, precision: AbstractContextManager
) -> float:
    """Mean loss over all tokens that blocks (blocks, block + 1) predict."""
    was_training = llama.training
    llama.eval()
    loss = 0.0
    try:
        for batch in own_batches(blocks.split(batch_size)):
            batch = to_device(batch, llama.output.weight.device)
            with precision:
                hidden = llama.compute_hidden(batch[:, :-1]).flatten(0, 1)
                targets = batch[:, 1:].flatten()
                for rows, wanted in slices(hidden, targets, llama.config.vocab_size):
                    logits = llama.output(rows).float()
                    loss += F.cross_entropy(logits, wanted, reduction="sum").item()
    finally:
        llama.train(was_training)
    return sum(gather(loss)) / blocks[:, 1:].numel()


def make_optimizer(llama: Llama) -> AdamW:
    """AdamW, with decay of the matrices only; the learning rate is set at each step."""
    parameters = list(llama.parameters())
    return AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() < 2]},
        ],
        betas=BETAS,
    )


def name_documents(sources: Tensor) -> str:
    """Which documents, counted from 1, some blocks are made of; sources (blocks, block + 1)."""
    return f"documents {', '.join(str(i + 1) for i in sources.unique().tolist())} of --train"


def train(
    llama: Llama,
    train_documents: Sequence[Tensor],
    dev_documents: Sequence[Tensor],
    schedule: Schedule,
    run: TrainingRun,
    precision: AbstractContextManager,
    keep: Callable[[], None],
) -> None:
    """Train for all epochs.

    Args:
        llama: the model, in causal mode, on its device.
        train_documents: token ids (length,) each, BOS first; packed in a new order each epoch.
        dev_documents: likewise, held out; packed in their own order.
        schedule: batch size and learning rate.
        run: with the model, its optimizer, and the number of epochs.
        precision: scope of the forward passes, such as `torch.autocast`.
        keep: called after each epoch whose validation loss is the lowest so far.

    Raises:
        ValueError: there are fewer tokens than one block; or the loss became infinite or NaN.
    """
    block, device = llama.config.max_seq_len, llama.output.weight.device
    dev_blocks = pack(dev_documents, block, "--dev")
    steps_per_epoch = math.ceil(len(pack(train_documents, block, "--train")) / schedule.batch_size)
    steps = run.last_epoch * steps_per_epoch
    optimizer, log = run.optimizer, run.log
    model = parallelise(NextTokenLoss(llama))

    def loss_of(rows: Tensor) -> Tensor:
        with precision:
            return model(rows)

    llama.train()
    for epoch in run.epochs():
        start, first_step = time.perf_counter(), run.step
        order = torch.randperm(len(train_documents), generator=run.shuffle).tolist()
        blocks = pack([train_documents[i] for i in order], block)
        # Of each token, the document that it is from.
        sources = pack([torch.full_like(train_documents[i], i) for i in order], block)
        shuffled = torch.randperm(len(blocks), generator=run.shuffle).split(schedule.batch_size)
        options = {"desc": f"pretrain-{epoch}", "total": steps_per_epoch, "initial": run.done}
        for chosen in progress(run.batches(shuffled), **options):
            batch = blocks[chosen]  # (batch, block + 1)
            tokens = batch[:, 1:].numel()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(run.step, steps, schedule.lr)
            optimizer.zero_grad()
            loss = accumulate(loss_of, model, [batch], tokens, schedule.micro_batch_size, device)
            torch.nn.utils.clip_grad_norm_(llama.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            run.steps.add(loss, tokens, tokens, tokens, partial(name_documents, sources[chosen]))
        train_loss = run.steps.loss_sum() / blocks[:, 1:].numel()
        speed = (run.step - first_step) / steps_per_epoch * blocks[:, 1:].numel()
        speed /= time.perf_counter() - start
        dev_loss = evaluate(llama, dev_blocks, schedule.batch_size, precision)
        if not math.isfinite(dev_loss):
            last = run.step - 1
            raise ValueError(f"step {last}: the validation loss is {dev_loss}; try a lower --lr")
        print(
            f"epoch {epoch}: train loss :: {train_loss:.3f}, "
            f"dev loss :: {dev_loss:.3f}, dev perplexity :: {math.exp(dev_loss):.2f}, "
            f"tokens/s :: {speed:.0f}"
        )
        log.add_scalar("loss/dev", dev_loss, epoch)
        log.add_scalar("perplexity/dev", math.exp(dev_loss), epoch)
        log.flush()
        if run.best is None or dev_loss < run.best:
            run.best = dev_loss
            keep()
