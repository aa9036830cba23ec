"""Turn a checkpoint of one kind into another.

    uv run python -m beyond.formats SOURCE TARGET

SOURCE is whatever `--pretrained-model-path` takes, or a fine-tuned classifier. TARGET names the
kind that is written, with its tokenizer beside it:

- `NAME.pt`: this project's checkpoint;
- `NAME.bin`: llama2.c's, version 0, or version 2 with `--dtype int8`;
- any other name: a folder that Hugging Face's `AutoModelForCausalLM` and `AutoTokenizer` open.
"""

import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch

from base_llama import read_checkpoint
from beyond.formats.files import Kind, default_tokenizer, kind_of, model_files
from beyond.formats.huggingface import write_huggingface
from beyond.formats.llama2c import write_llama2c
from beyond.formats.llama2c_tokenizer import tokenizer_bin_notes
from beyond.formats.load import load_llama, load_tokenizer, make_tokenizer, write_tokenizer
from beyond.methods.checkpoints import load_any_classifier
from beyond.processes import progress
from beyond.program import exit_status
from beyond.runtime import check_vocabulary
from llama import Llama
from tokenizer import Tokenizer
from utils import OneLineParser, check_readable, lock_results, prepare_output

PROGRAM = "beyond.formats"
DTYPES = ("float32", "float16", "bfloat16", "int8")
KINDS: dict[str, Kind] = {".pt": "pt", ".bin": "llama2c"}  # of a target, by its ending


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""

    def work() -> int:
        convert(*parse(argv))
        return 0

    return exit_status(PROGRAM, work)


def parse(argv: Sequence[str] | None) -> tuple[str, str, str, str | None]:
    """Return source, target, dtype and tokenizer of a command line.

    Raises:
        ValueError: an argument is missing or unknown, or the target cannot store the dtype.
    """
    lines = (__doc__ or "").split("\n")
    parser = OneLineParser(prog="python -m beyond.formats", description=lines[0])
    parser.add_argument("source", metavar="SOURCE", help="checkpoint: a file or a folder")
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="NAME.pt (this project's), NAME.bin (llama2.c's), or a new folder (Hugging Face's)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the stored weights; int8 is for NAME.bin only (default: float32)",
    )
    parser.add_argument(
        "--tokenizer_path", help="the source's tokenizer (default: the one in its folder)"
    )
    args = parser.parse_args(argv)
    is_bin = Path(args.target).suffix == ".bin"
    if is_bin != (args.dtype == "int8") and args.dtype != "float32":
        known = "float32 or int8" if is_bin else "float32, float16 or bfloat16"
        raise ValueError(f"--dtype {args.dtype}: {args.target} can store {known}")
    return args.source, args.target, args.dtype, args.tokenizer_path


def convert(source: str, target: str, dtype: str, tokenizer_path: str | None) -> None:
    """Read the checkpoint `source` and write it to `target`, completely or not at all.

    Args:
        source, target: paths; the target's name says which kind is written.
        dtype: of the stored weights, one of `DTYPES`.
        tokenizer_path: of the source; None: its own.

    Raises:
        FileNotFoundError, ValueError: the source cannot be used, or the target cannot hold it.
    """
    if Path(target).resolve() == Path(source).resolve():
        raise ValueError(f"{target}: is the source; name another target")
    kind = KINDS.get(Path(target).suffix, "huggingface")
    if kind == "huggingface":
        Path(target).parent.mkdir(parents=True, exist_ok=True)
    else:
        prepare_output(target)
    llama, tokenizer = read(source, tokenizer_path)
    if kind != "pt" and not llama.config.causal:
        note(
            f"{target} is a causal model for other programs; {source} is in reference mode "
            "(attention without a mask), which they do not know"
        )
    with lock_results([target], note):
        if kind == "huggingface":
            write_huggingface(target, llama, tokenizer, getattr(torch, dtype), bar)
        else:
            write_file(target, kind, llama, tokenizer, dtype)
    print(f"Wrote {target}.")


def read(source: str, tokenizer_path: str | None) -> tuple[Llama, Tokenizer]:
    """Load the model and the tokenizer of a checkpoint, or of a fine-tuned classifier.

    Raises:
        FileNotFoundError, ValueError: a file cannot be used, or the vocabularies differ.
    """
    for path in model_files(source):
        check_readable(path)
    if kind_of(source) == "pt" and "classifier" in read_checkpoint(source):
        classifier = load_any_classifier(source)
        note(f"the head of the classifier {source} is left out")
        llama, own_tokenizer = classifier.llama, classifier.tokenizer
    else:
        llama, own_tokenizer = load_llama(source), None
    if tokenizer_path is None and own_tokenizer is not None:
        return llama, make_tokenizer(None, own_tokenizer.content)
    path = tokenizer_path or default_tokenizer(source)
    tokenizer = load_tokenizer(None, path)
    check_vocabulary(tokenizer, path, llama, source)
    return llama, tokenizer


def write_file(target: str, kind: Kind, llama: Llama, tokenizer: Tokenizer, dtype: str) -> None:
    """Write a checkpoint that is one file, and its tokenizer beside it.

    Raises:
        ValueError: the target cannot hold the model, or its folder holds another tokenizer.
    """
    new_files = write_tokenizer(tokenizer, target, kind)
    if kind == "llama2c":
        for text in tokenizer_bin_notes(tokenizer):
            note(text)
    try:
        if kind == "pt":
            llama.save_pretrained(target, getattr(torch, dtype))
        else:
            write_llama2c(target, llama, dtype == "int8", bar)
    except BaseException:
        for path in new_files:
            path.unlink()
        raise


def bar(names: Collection[str]) -> Iterable[str]:
    """Return the names of what is written, with a progress bar."""
    return progress(names, desc="write", total=len(names))


def note(text: str) -> None:
    """Print a note on standard error."""
    print(f"{PROGRAM}: note: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
