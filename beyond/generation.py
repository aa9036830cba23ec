"""From prompts to texts: several prompts and samples in a batch, stop tokens, and streaming."""

import codecs
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence, Set

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from beyond.decoding import DecodingLlama, Sampler, stream
from beyond.fast_decoding import prepare_fastest
from beyond.options import GenerateOptions
from beyond.runtime import Runtime, allow_tf32
from llama import Llama
from tokenizer import Tokenizer
from utils import LINE_END

DIVIDER = "---------------"  # between texts


def read_prompt(prompt: str) -> str:
    r"""Return a prompt of the command line; `-` stands for all of standard input.

    Standard input is one text. A byte-order mark and the last line end are dropped, and "\r\n" and
    "\r" become "\n".

    Raises:
        ValueError: standard input is empty or not UTF-8.
    """
    if prompt != "-":
        return prompt
    content = sys.stdin.buffer.read().removeprefix(codecs.BOM_UTF8)
    try:
        text = LINE_END.sub(b"\n", content).decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt -: standard input is not UTF-8 text: {error.reason}") from None
    if not text:
        raise ValueError("--prompt -: standard input is empty")
    return text


def prepare_to_generate(llama: Llama, runtime: Runtime, options: GenerateOptions) -> Llama:
    """Move a model to its device and prepare it for decoding."""
    allow_tf32(runtime)
    quantize = options.quantize is not None
    model = prepare_fastest(
        llama.to(runtime.device),
        runtime.dtype,
        quantize,
        measure=not options.deterministic,
        compile_step=options.compile,
        note=print,
    )
    if quantize and isinstance(model, DecodingLlama):
        print(f"int8 weights: the largest error of a weight is {model.error:.2g}")
    return model


def generate_texts(
    llama: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    temperature: float,
    options: GenerateOptions,
) -> list[str]:
    """Continue each prompt `options.num_samples` times, and print the texts.

    A text depends on its prompt and the seed alone: each sample has its own generator, and rows
    share a batch only in a float32 `DecodingLlama`, where padding changes no result.

    Args:
        llama: as `prepare_for_decoding` returned it.
        tokenizer: the checkpoint's.
        prompts: the texts to continue.
        temperature: 0 gives one text per prompt, since all samples would be equal.
        options: how to sample, and when to stop.

    Returns:
        Prompts with their continuations.
    """
    samples = [
        (tokenizer.encode(prompt, bos=True, eos=False) or [tokenizer.boundary_id], options.seed + i)
        for prompt in prompts
        for i in range(options.num_samples if temperature else 1)
    ]
    stop_ids = tokenizer.stop_ids if options.stop_at_eos else set()
    can_share = isinstance(llama, DecodingLlama) and llama.dtype == torch.float32
    batch_size = options.batch_size if can_share and not options.stream else 1
    device = llama.output.weight.device
    texts: list[str] = []
    for start in range(0, len(samples), batch_size):
        rows, seeds = zip(*samples[start : start + batch_size], strict=True)
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        sampler = Sampler(temperature, options.top_k, options.top_p, generators)
        idx, padding = pad_left(rows, tokenizer.pad_id, device)
        new_tokens = until_stop(
            stream(llama, idx, options.max_new_tokens, sampler, padding), stop_ids
        )
        if options.stream:
            tokens = itertools.chain(rows[0], (token for _, token in new_tokens))
            texts.append(print_stream(decode_stream(tokenizer, tokens)))
        else:
            for index, token in new_tokens:
                rows[index].append(token)
            texts += [tokenizer.decode(row) for row in rows]
            print("".join(f"{text}\n{DIVIDER}\n" for text in texts[start:]), end="")
    return texts


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Pad rows of token ids on the left, so that all of them continue in the same column.

    Returns:
        idx: (batch, seq), int64.
        padding: (batch,), the number of padding columns of each row; None for a single row.
    """
    idx = pad_sequence(
        [torch.tensor(row) for row in rows],
        batch_first=True,
        padding_value=pad_id,
        padding_side="left",
    )
    padding = torch.tensor([idx.shape[1] - len(row) for row in rows], device=device)
    return idx.to(device), padding if len(rows) > 1 else None


def print_stream(parts: Iterable[str]) -> str:
    """Print the parts of a text as they come, and return the text."""
    printed = []
    for part in parts:
        print(part, end="", flush=True)
        printed.append(part)
    print(f"\n{DIVIDER}")
    return "".join(printed)


def until_stop(columns: Iterable[Tensor], stop_ids: Set[int]) -> Iterator[tuple[int, int]]:
    """Yield each new token with the index of its row, up to the row's first stop token.

    Args:
        columns: (batch, 1) each, in the order they are generated; none is asked for after all rows
            have stopped.
        stop_ids: the stop tokens, which are left out.
    """
    stopped: set[int] = set()
    for column in columns:
        for index, token in enumerate(column.flatten().tolist()):
            if token in stop_ids:
                stopped.add(index)
            if index not in stopped:
                yield index, token
        if len(stopped) == len(column):
            return


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of token ids as they come, in parts that join to `tokenizer.decode(ids)`.

    A part is held back while it ends within a character: a character may take several byte pieces,
    and until all of them have come, decoding gives U+FFFD. (If bytes never become a character, a
    `tokenizer.json` with byte pieces gives U+FFFD for those before them too, and the join differs.)
    """
    tokens: list[int] = []
    # SentencePiece drops a leading space, so a part is decoded together with the part before it,
    # which starts at `previous`. The text of all tokens before `done` has been yielded.
    previous, done = 0, 0
    for token in ids:
        tokens.append(token)
        yielded, text = tokenizer.decode(tokens[previous:done]), tokenizer.decode(tokens[previous:])
        if len(text) > len(yielded) and not text.endswith("\ufffd"):
            yield text[len(yielded) :]
            # A part that is only a space cannot be the left neighbour: decoding would drop it.
            if tokenizer.decode(tokens[done:]).strip():
                previous = done
            done = len(tokens)
    yielded, text = tokenizer.decode(tokens[previous:done]), tokenizer.decode(tokens[previous:])
    if len(text) > len(yielded):
        yield text[len(yielded) :]
