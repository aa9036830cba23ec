"""Compute how well a language model predicts the documents of a text file, in bits per byte.

    uv run python -m benchmarks.bits_per_byte MODEL TEXT

The file has one document per line. They are joined and cut into blocks as long as the model's
context, as `--option pretrain` does with `--dev`. Matrix products are computed in bfloat16 where
the processor has it. Unlike a loss per token, a loss per byte can be compared between models with
different tokenizers. The model's tokenizer has to be in its folder.
"""

import math
import sys
from collections.abc import Sequence

import torch

from beyond.formats.files import default_tokenizer
from beyond.formats.load import load_llama, load_tokenizer
from beyond.pretraining import count_tokens_per_byte, evaluate, load_documents, pack
from beyond.program import exit_status
from beyond.runtime import Runtime, check_vocabulary, has_bfloat16
from utils import OneLineParser

PROGRAM = "python -m benchmarks.bits_per_byte"
BATCH_SIZE = 4  # blocks


def bits_per_byte(model: str, text: str) -> float:
    """Return the loss of a causal language model on a text, in bits per byte.

    Args:
        model: path of a checkpoint of any kind; its tokenizer is in the same folder.
        text: path of a file with one document per line.

    Raises:
        FileNotFoundError, ValueError: a file cannot be used.
    """
    device = torch.device("cpu")
    llama = load_llama(model, causal=True)
    path = default_tokenizer(model)
    tokenizer = load_tokenizer(None, path)
    check_vocabulary(tokenizer, path, llama, model)
    documents = load_documents([text], tokenizer)
    blocks = pack(documents, llama.config.max_seq_len, text)
    dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
    loss = evaluate(llama, blocks, BATCH_SIZE, Runtime(device, dtype, causal=True))
    return loss / math.log(2) * count_tokens_per_byte(documents, tokenizer)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(PROGRAM, lambda: run(argv), "nothing is computed")


def run(argv: Sequence[str] | None) -> int:
    """Read the command line, and print the bits per byte."""
    parser = OneLineParser(prog=PROGRAM, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a checkpoint, with its tokenizer in the same folder")
    parser.add_argument("text", help="a text file, one document per line")
    args = parser.parse_args(argv)
    print(f"{args.model}: {bits_per_byte(args.model, args.text):.3f} bits per byte")
    return 0


if __name__ == "__main__":
    sys.exit(main())
