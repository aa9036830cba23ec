"""Pretraining: a causal language model learns to predict the next token of running text.

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", eq. 1: minimise
the mean of -log p(token | the tokens before it). Documents follow each other in one stream, each
with BOS before it, and the stream is cut into blocks of `max_seq_len` tokens. A document that is
cut continues in the next block.

Conventions: losses are means over predicted tokens, in nats; perplexity is exp(loss).
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond.batches import encode_all, shard_batches
from beyond.formats.load import load_tokenizer, write_tokenizer
from beyond.logs import write_completion
from beyond.options import PretrainOptions
from beyond.processes import gather, is_main_process
from beyond.records import write_record
from beyond.reports import escape_markdown, print_epoch_end, print_summary
from beyond.run import TrainingRun, remove_training_checkpoint, start_run
from beyond.runtime import Runtime, load_model, prepare_model, resolve_runtime, to_device
from config import LlamaConfig
from llama import Llama
from optimizer import AdamW
from tokenizer import Tokenizer
from utils import read_documents

WARM_UP = 0.05  # fraction of the steps in which the learning rate rises to its peak
FINAL_LR = 0.1  # fraction of the peak that is left at the end
MAX_GRAD_NORM = 1.0
# Touvron et al. 2023, arXiv:2307.09288, section 2.2, for these two.
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1  # of matrices; RMSNorm's gains do not decay
SAMPLE_TOKENS = 60  # of the text that is sampled after each epoch
MAX_LOGITS = 1 << 24  # logits that are computed at a time: 64 MiB in float32


def pretrain(options: PretrainOptions) -> None:
    """Train a language model, new or from a checkpoint; keep the epoch that is best on dev."""
    llama, tokenizer, runtime = make_model(options)
    print(f"{sum(p.numel() for p in llama.parameters()):,} parameters: {llama.config}")
    train_documents, dev_documents = (
        load_documents(paths, tokenizer) for paths in (options.train, options.dev)
    )
    block_size = llama.config.max_seq_len
    dev_blocks = pack(dev_documents, block_size, "--dev")
    tokens_per_byte = count_tokens_per_byte(dev_documents, tokenizer)
    if is_main_process():
        write_tokenizer(tokenizer, options.filepath)
    model = prepare_model(NextTokenLoss(llama), runtime, options.compile)
    make_loader = partial(BlockLoader, train_documents, block_size)
    with start_run(model, make_optimizer(llama), make_loader, options.run, runtime) as run:
        for epoch in run.epochs():
            speed = train_epoch(run, options.lr)
            train_loss = run.epoch_totals().loss / run.epoch_totals().tokens
            dev_loss = evaluate(llama, dev_blocks, options.batch_size, runtime)
            if not math.isfinite(dev_loss):
                raise ValueError(
                    f"step {run.step - 1}: the dev loss is {dev_loss}; try a lower --lr"
                )
            perplexity = math.exp(dev_loss)
            print(
                f"epoch {epoch}: train loss :: {train_loss:.3f}, dev loss :: {dev_loss:.3f}, "
                f"dev perplexity :: {perplexity:.2f}, tokens/s :: {speed:.0f}"
            )
            if run.is_best(-dev_loss):
                if is_main_process():
                    llama.save_pretrained(options.filepath, getattr(torch, options.store_dtype))
                print(f"save the model to {options.filepath}")
                write_record(options.filepath, runtime.record, epoch=epoch, dev_loss=dev_loss)
            scores = {
                "loss": dev_loss,
                "perplexity": perplexity,
                "bits_per_byte": dev_loss / math.log(2) * tokens_per_byte,
            }
            report_epoch(run, scores, llama, tokenizer, runtime)
    report_result(run, tokens_per_byte, options)
    remove_training_checkpoint(options.run.training_checkpoint)


def train_epoch(run: "TrainingRun[Blocks]", peak_lr: float) -> float:
    """Run the rest of the current epoch; returns the speed, in tokens per second."""
    start, tokens = time.perf_counter(), 0
    total_steps = run.options.epochs * len(run.loader)
    for batch in run.batches():
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.step, total_steps, peak_lr)
        run.optimizer.zero_grad()
        loss = run.backward(sum_of_losses, batch, divisor=batch.num_tokens)
        gradient_norm = nn.utils.clip_grad_norm_(run.model.parameters(), MAX_GRAD_NORM)
        run.optimizer.step()
        run.log(loss, gradient_norm)  # the norm before clipping
        tokens += batch.num_tokens
    run.epoch_totals()  # waits for the device
    return tokens / (time.perf_counter() - start)


def sum_of_losses(model: nn.Module, blocks: Tensor) -> Tensor:
    """Return the sum of the losses of all tokens but each block's first."""
    return model(blocks)


# ---------------------------------------------------------------------------------------- reports


def report_epoch(
    run: "TrainingRun[Blocks]",
    scores: Mapping[str, float],
    llama: Llama,
    tokenizer: Tokenizer,
    runtime: Runtime,
) -> None:
    """Write an epoch's scores on dev and a sample text to TensorBoard; print how long it took."""
    if is_main_process():
        dev, step = run.writers.dev, run.step
        for tag, score in scores.items():
            dev.add_scalar(tag, score, step)
        if run.is_best_epoch:
            dev.add_scalar("result/dev_loss", scores["loss"], step)
        text = sample_text(llama, tokenizer, runtime, run.options.seed)
        dev.add_text("sample", escape_markdown(text), step)
        run.writers.flush()
    print_epoch_end(run)


def report_result(
    run: "TrainingRun[Blocks]", tokens_per_byte: float, options: PretrainOptions
) -> None:
    """Tell TensorBoard that the run is complete, and print a table of its results."""
    with run.logging() as writers:
        write_completion(writers, run.options.hyperparameters)
    if run.best is not None:
        loss = -run.best
        scores = (
            f"loss {loss:.3f}, perplexity {math.exp(loss):.2f}, "
            f"bits per byte {loss / math.log(2) * tokens_per_byte:.3f}"
        )
        print_summary(run, [("dev", scores)], options.output_files)


def count_tokens_per_byte(documents: Sequence[Tensor], tokenizer: Tokenizer) -> float:
    """Return the ratio of predicted tokens to bytes of text in UTF-8.

    It turns a loss per token into one per byte, so that models with different tokenizers can be
    compared. All tokens but the first are predicted, also the BOS between two documents.
    """
    num_bytes = sum(len(tokenizer.decode(tokens.tolist()).encode()) for tokens in documents)
    return (sum(map(len, documents)) - 1) / max(1, num_bytes)


@torch.inference_mode()
def sample_text(llama: Llama, tokenizer: Tokenizer, runtime: Runtime, seed: int) -> str:
    """Return the beginning of a document that the model makes up, sampled at temperature 1.

    The random numbers come from a generator of their own, so training does not change.
    """
    device = llama.output.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    boundary = tokenizer.boundary_id
    context = torch.tensor([[boundary]], device=device)
    with runtime.autocast():
        tokens = llama.generate(context, SAMPLE_TOKENS, generator=generator)[0, 1:].tolist()
    if boundary in tokens:  # where the next document begins
        tokens = tokens[: tokens.index(boundary)]
    return tokenizer.decode(tokens)


# ------------------------------------------------------------------------------------------ model


def make_model(options: PretrainOptions) -> tuple[Llama, Tokenizer, Runtime]:
    """Make a new model on the CPU, or load the checkpoint; with its tokenizer and runtime."""
    if not options.shape:
        return load_model(options, options.dropout, options.max_seq_len)
    tokenizer = load_tokenizer(options.max_sentence_len, options.tokenizer_path)
    config = LlamaConfig(
        vocab_size=tokenizer.n_words,
        **options.shape,  # type: ignore[arg-type]  # sizes only
        max_seq_len=options.max_seq_len or LlamaConfig.max_seq_len,
        dropout=options.dropout or 0.0,
        causal=True,
    )
    return Llama(config), tokenizer, resolve_runtime(options, causal=True)


def make_optimizer(llama: Llama) -> AdamW:
    """Make AdamW with decay of the matrices only; the learning rate is set before each step."""
    parameters = list(llama.parameters())
    return AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() < 2]},
        ],
        betas=BETAS,
    )


def learning_rate(step: int, total_steps: int, peak: float) -> float:
    """Return the learning rate of a step: a linear warm-up to the peak, then half a cosine.

    Args:
        step: from 0 to total_steps - 1.
        total_steps: of the whole training.
        peak: the highest rate; the last step has `FINAL_LR` of it.
    """
    warm_up = max(1, round(WARM_UP * total_steps))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    fraction = (step - warm_up) / max(1, total_steps - 1 - warm_up)  # 0 to 1
    return peak * (FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * fraction)) / 2)


# ------------------------------------------------------------------------------------------- text


def load_documents(paths: Sequence[str], tokenizer: Tokenizer) -> list[Tensor]:
    """Read the documents of text files and tokenize each; (length,) each.

    Each begins with BOS, or with EOS if the tokenizer has no BOS.
    """
    documents, boundary = [], [tokenizer.boundary_id]
    for path in paths:
        texts = read_documents(path)
        rows = encode_all(tokenizer, texts, path, bos=False)
        tokens = [torch.tensor(boundary + row) for row in rows]
        print(f"load {len(tokens)} documents, {sum(map(len, tokens))} tokens from {path}")
        documents += tokens
    if not documents:
        raise ValueError(f"{paths[0]}: holds no text")
    return documents


def pack(documents: Sequence[Tensor], block_size: int, name: str = "text") -> Tensor:
    """Join all documents to one stream and cut it into full blocks.

    Args:
        documents: token ids (length,) each, BOS first.
        block_size: tokens that the model sees at a time.
        name: of the documents, for the error message.

    Returns:
        (blocks, block_size + 1). The last token of a block is only predicted, and is the first of
        the next block, so every token but the stream's first is predicted once. What remains after
        the last full block is left out.

    Raises:
        ValueError: the stream has fewer than block_size + 1 tokens.
    """
    stream = torch.cat(list(documents))
    if len(stream) <= block_size:
        raise ValueError(
            f"{name}: {len(stream)} tokens are fewer than one block of {block_size} and the token "
            "after it; give more text or a smaller --max_seq_len"
        )
    return stream.unfold(0, block_size + 1, block_size)


class Blocks(NamedTuple):
    """A batch of blocks."""

    tokens: Tensor  # (batch, block_size + 1), int64
    sources: Tensor  # same shape: the index of each token's document

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The arguments of the loss."""
        return (self.tokens,)

    @property
    def num_tokens(self) -> int:
        """The tokens that are predicted."""
        return self.tokens[:, 1:].numel()

    @property
    def num_padded_tokens(self) -> int:
        """The same, since blocks have no padding."""
        return self.num_tokens

    def describe(self) -> str:
        """Say which documents the blocks come from, counted from 1."""
        numbers = ", ".join(str(i + 1) for i in self.sources.unique().tolist())
        return f"documents {numbers} of --train"


class BlockLoader:
    """Batches of blocks; each pass shuffles the documents, packs them, and shuffles the blocks.

    Args:
        documents: token ids (length,) each, BOS first.
        block_size: tokens that the model sees at a time.
        batch_size: blocks per batch.
        generator: source of randomness.

    Raises:
        ValueError: there are fewer than block_size + 1 tokens.
    """

    def __init__(
        self,
        documents: Sequence[Tensor],
        block_size: int,
        batch_size: int,
        generator: torch.Generator,
    ) -> None:
        self.documents = documents
        self.block_size = block_size
        self.batch_size = batch_size
        self.generator = generator
        num_blocks = len(pack(documents, block_size, "--train"))  # in whatever order
        self.num_batches = math.ceil(num_blocks / batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Blocks]:
        order = torch.randperm(len(self.documents), generator=self.generator).tolist()
        blocks = pack([self.documents[i] for i in order], self.block_size)
        indices = [torch.full_like(self.documents[i], i) for i in order]
        sources = pack(indices, self.block_size)
        shuffled = torch.randperm(len(blocks), generator=self.generator)
        for chosen in shuffled.split(self.batch_size):
            yield Blocks(blocks[chosen], sources[chosen])


# ------------------------------------------------------------------------------------------- loss


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of the cross-entropies of hidden @ weight^T, computed in little memory.

    The logits are by far the largest tensor of pretraining: with a vocabulary of 32,000 they are
    tens of times as large as the hidden states. So the forward pass computes them in slices of at
    most `MAX_LOGITS`, takes each slice's gradients at once, and keeps only those.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Return a scalar; hidden is (rows, dim), weight (vocab, dim), targets (rows,)."""
        loss = torch.zeros((), device=hidden.device)
        weight_grad, hidden_grads = torch.zeros_like(weight), []
        weight = (
            weight.detach().requires_grad_()
        )  # a leaf, so that autocast casts it once for all slices
        for rows, row_targets in slices(hidden, targets, len(weight)):
            rows = rows.detach().requires_grad_()
            with torch.enable_grad():
                logits = F.linear(rows, weight)  # (rows, vocab)
                part = F.cross_entropy(logits.float(), row_targets, reduction="sum")
            rows_grad, part_grad = torch.autograd.grad(part, (rows, weight))
            hidden_grads.append(rows_grad)
            weight_grad += part_grad
            loss += part.detach()
        ctx.save_for_backward(torch.cat(hidden_grads), weight_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of hidden states, weight and targets."""
        hidden_grad, weight_grad = ctx.saved_tensors
        return grads[0] * hidden_grad, grads[0] * weight_grad, None


class NextTokenLoss(nn.Module):
    """The sum of the losses of all tokens but the first of blocks (batch, block_size + 1)."""

    def __init__(self, llama: Llama) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, blocks: Tensor) -> Tensor:
        """Return a scalar, in nats."""
        hidden = self.llama.compute_hidden(blocks[:, :-1]).flatten(0, 1)  # (rows, dim)
        targets = blocks[:, 1:].flatten()  # (rows,)
        return LinearCrossEntropy.apply(hidden, self.llama.output.weight, targets)


def slices(hidden: Tensor, targets: Tensor, vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split hidden states (rows, dim) and targets (rows,) into slices of `MAX_LOGITS` logits."""
    size = max(1, MAX_LOGITS // vocab_size)
    return zip(hidden.split(size), targets.split(size), strict=True)


@torch.inference_mode()
def evaluate(llama: Llama, blocks: Tensor, batch_size: int, runtime: Runtime) -> float:
    """Return the mean loss of all tokens but the first of blocks (blocks, block_size + 1)."""
    was_training = llama.training
    llama.eval()
    loss = 0.0
    try:
        for batch in shard_batches(blocks.split(batch_size)):
            batch = to_device(batch, runtime.device)
            with runtime.autocast():
                hidden = llama.compute_hidden(batch[:, :-1]).flatten(0, 1)
                targets = batch[:, 1:].flatten()
                for rows, row_targets in slices(hidden, targets, llama.config.vocab_size):
                    logits = llama.output(rows).float()
                    loss += F.cross_entropy(logits, row_targets, reduction="sum").item()
    finally:
        llama.train(was_training)
    return sum(gather(loss)) / blocks[:, 1:].numel()
