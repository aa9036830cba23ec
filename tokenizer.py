"""Text to token ids and back, with a SentencePiece model.

    uv run python tokenizer.py train --input FILE [FILE ...] --vocab_size N --output PATH

Kudo & Richardson 2018, "SentencePiece", arXiv:1808.06226. Reads Llama's `tokenizer.model` and any
other model that has BOS, EOS and byte pieces, such as those that this module trains.
"""

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from utils import (
    OneLineParser,
    at_least_one,
    describe_error,
    lock_results,
    open_atomically,
    prepare_output,
    read_documents,
)

DEFAULT_MODEL = "tokenizer.model"
PAD_PIECE = (
    "<0x00>"  # Faithful: Llama's model has no padding piece, so that of byte 0 (id 3) is used
)


class Tokenizer:
    """A SentencePiece model with the assignment's conventions.

    A tokenizer of another kind is a subclass that overrides `__init__`, `encode_text`,
    `encode_texts`, `decode`, `label_tokens`, `fits` and `files`.

    Args:
        max_len: the number of pieces that `encode` keeps, BOS and EOS not counted; None: all.
        tokenizer_model: path of the SentencePiece model, or its content as bytes; None:
            `tokenizer.model` in the current folder.

    Attributes:
        content: bytes from which the tokenizer can be made again.
        bos_id, eos_id: ids of the special pieces; None: the tokenizer has no such piece.
        pad_id: id of the piece that fills up short rows: the declared one, else `<0x00>`, else EOS.
        pad_piece: its text.
        n_words: size of the vocabulary.
        adds_bos: whether the texts of the model's training begin with BOS.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a SentencePiece model, or no piece can be used for padding; or
            max_len < 1.
    """

    bos_id: int | None
    eos_id: int | None
    adds_bos: bool = True

    def __init__(
        self, max_len: int | None = None, tokenizer_model: str | Path | bytes | None = None
    ) -> None:
        if max_len is not None and max_len < 1:
            raise ValueError(f"max_len={max_len} is below 1")
        path: str | Path = "the tokenizer"
        if isinstance(tokenizer_model, bytes):
            self.content = tokenizer_model
        else:
            path = Path(DEFAULT_MODEL if tokenizer_model is None else tokenizer_model)
            if path.is_dir():
                raise ValueError(f"{path}: is a folder, expected a SentencePiece model")
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such tokenizer")
            self.content = path.read_bytes()
        if not self.content:  # SentencePiece would accept an empty file
            raise ValueError(f"{path}: not a SentencePiece model")
        try:
            self.sp_model = SentencePieceProcessor(model_proto=self.content)
        # UnicodeDecodeError: SentencePiece's message can quote bytes that are not UTF-8.
        except (RuntimeError, UnicodeDecodeError):
            raise ValueError(f"{path}: not a SentencePiece model") from None
        self.max_len = max_len
        self.n_words: int = self.sp_model.vocab_size()
        bos, eos, pad = self.sp_model.bos_id(), self.sp_model.eos_id(), self.sp_model.pad_id()
        self.bos_id, self.eos_id = (None if number < 0 else number for number in (bos, eos))
        zero = self.sp_model.piece_to_id(PAD_PIECE)
        candidates = (pad, -1 if self.sp_model.is_unknown(zero) else zero, eos)
        self.pad_id = next((number for number in candidates if number >= 0), -1)
        if self.pad_id < 0:
            raise ValueError(f"{path}: has no piece for padding: neither {PAD_PIECE} nor EOS")
        self.pad_piece: str = self.sp_model.id_to_piece(self.pad_id)

    @property
    def boundary_id(self) -> int:
        """The token between two documents: BOS, or EOS if there is no BOS.

        Raises:
            ValueError: the tokenizer has neither.
        """
        if self.bos_id is not None:
            return self.bos_id
        if self.eos_id is not None:
            return self.eos_id
        raise ValueError("the tokenizer has neither BOS nor EOS to begin a text with")

    @property
    def stop_ids(self) -> set[int]:
        """The tokens that end a text: those of BOS and EOS that exist."""
        return {number for number in (self.bos_id, self.eos_id) if number is not None}

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Convert a text to token ids.

        Args:
            s: the text.
            bos, eos: whether to add BOS at the start (if the tokenizer adds it), and EOS at the
                end.

        Returns:
            At most max_len ids of the text, and BOS and EOS if asked for.
        """
        return self._finish(self.encode_text(s), bos, eos)

    def encode_batch(self, texts: Sequence[str], bos: bool, eos: bool) -> list[list[int]]:
        """Convert each text as `encode` does, which is faster for many texts at once."""
        return [self._finish(tokens, bos, eos) for tokens in self.encode_texts(texts)]

    def _finish(self, tokens: list[int], bos: bool, eos: bool) -> list[int]:
        """Truncate the tokens of a text, and add BOS and EOS."""
        # Faithful: truncated before BOS and EOS are added, so max_len does not count them.
        tokens = tokens[: self.max_len]
        start = [self.bos_id] if bos and self.adds_bos and self.bos_id is not None else []
        end = [self.eos_id] if eos and self.eos_id is not None else []
        return start + tokens + end

    def encode_text(self, text: str) -> list[int]:
        """Convert a text to its token ids, without BOS and EOS."""
        return self.sp_model.encode(text)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Convert texts in one call of the library, which uses all processors."""
        return self.sp_model.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Convert token ids to a text; BOS and EOS give no text."""
        return self.sp_model.decode(list(ids))

    def label_tokens(self, label: str, prompt: str) -> list[int]:
        """Return the tokens of a label word that follows a prompt."""
        # Faithful: the word is tokenized alone, with the space that SentencePiece puts before it.
        return self.encode_text(label)

    def fits(self, vocab_size: int) -> bool:
        """Return whether the tokenizer can be that of a model with a vocabulary of this size."""
        return self.n_words == vocab_size

    def files(self) -> dict[str, bytes]:
        """Return the files, by name, from which the tokenizer can be made again."""
        return {DEFAULT_MODEL: self.content}


def train_tokenizer(paths: Sequence[str | Path], vocab_size: int, output: str | Path) -> None:
    """Train a BPE tokenizer like Llama's on text with one document per line.

    Sennrich et al. 2016, arXiv:1508.07909. There is a piece for every byte, so no text is unknown;
    each digit is a piece of its own; Unicode is not normalised; runs of spaces become one space,
    and none is left at the start or the end.

    Args:
        paths: UTF-8 text files; a label at the start of a line (`label ||| text`) is removed.
        vocab_size: number of pieces, including the three special and the 256 byte pieces.
        output: where the model is written, completely or not at all.

    Raises:
        FileNotFoundError, ValueError: a file cannot be used, or the text is too short for this
            many pieces.
    """
    documents = [text for path in paths for text in read_documents(path)]
    if not documents:
        raise ValueError(f"{paths[0]}: holds no text")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(documents),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            max_sentence_length=max(len(text.encode()) for text in documents),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # makes the result reproducible
            minloglevel=2,
        )
    except RuntimeError as error:
        # Such as "Internal: ...trainer.cc(585) [...condition...] Vocabulary size too high (...)."
        reason = str(error).split("] ")[-1]
        raise ValueError(f"--vocab_size {vocab_size}: {reason}") from None
    with open_atomically(output, "wb") as file:
        file.write(model.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = OneLineParser(description="Train a SentencePiece tokenizer.")
    command = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    train = command.add_parser(
        "train", help="train a tokenizer on UTF-8 text files with one document per line"
    )
    train.add_argument("--input", nargs="+", required=True, help="text files; labels are removed")
    train.add_argument(
        "--vocab_size", type=at_least_one, required=True, help="number of pieces, 260 or more"
    )
    train.add_argument("--output", required=True, help="file of the trained model")
    try:
        args = parser.parse_args(argv)
        prepare_output(args.output)
        with lock_results([args.output], note):
            train_tokenizer(args.input, args.vocab_size, args.output)
    except (ValueError, OSError) as error:
        print(f"tokenizer.py: error: {describe_error(error)}", file=sys.stderr)
        return 2
    print(f"Wrote a tokenizer with {args.vocab_size} pieces to {args.output}.")
    return 0


def note(text: str) -> None:
    """Print a note on standard error."""
    print(f"tokenizer.py: note: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
