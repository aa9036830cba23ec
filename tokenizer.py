"""Text to token ids and back, with a SentencePiece model.

Kudo & Richardson 2018, "SentencePiece", arXiv:1808.06226. Reads Llama's `tokenizer.model` and any
other model that has BOS, EOS and byte pieces.
"""

from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

DEFAULT_MODEL = "tokenizer.model"
PAD_PIECE = "<0x00>"  # Faithful: Llama's model has no padding piece, so byte 0 serves (its id: 3)


class Tokenizer:
    """A SentencePiece model with the assignment's conventions.

    Args:
        max_len: pieces of text that `encode` keeps, BOS and EOS not counted; None keeps all.
        tokenizer_model: path of the SentencePiece model; None: `tokenizer.model` in the current
            folder.

    Attributes:
        bos_id, eos_id, pad_id: ids of the special pieces.
        n_words: size of the vocabulary.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no SentencePiece model, or it lacks BOS, EOS or `<0x00>`; or max_len < 1.
    """

    def __init__(
        self, max_len: int | None = None, tokenizer_model: str | Path | None = None
    ) -> None:
        if max_len is not None and max_len < 1:
            raise ValueError(f"max_len={max_len} is below 1")
        path = Path(DEFAULT_MODEL if tokenizer_model is None else tokenizer_model)
        if path.is_dir():
            raise ValueError(f"{path}: is a folder, expected a SentencePiece model")
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such tokenizer")
        model_proto = path.read_bytes()
        try:
            self.sp_model = SentencePieceProcessor(model_proto=model_proto)
        except RuntimeError:
            model_proto = b""
        if not model_proto:  # SentencePiece itself takes an empty file, and then has no model
            raise ValueError(f"{path}: not a SentencePiece model")
        self.max_len = max_len
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.piece_to_id(PAD_PIECE)
        if self.bos_id < 0 or self.eos_id < 0 or self.sp_model.is_unknown(self.pad_id):
            raise ValueError(f"{path}: has no BOS, no EOS, or no piece {PAD_PIECE} to pad with")

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Token ids of a text.

        Args:
            s: the text.
            bos, eos: whether to put the begin and end pieces around it.

        Returns:
            At most max_len ids of the text, with BOS and EOS where asked for.
        """
        # Faithful: the text is cut before BOS and EOS are added, so max_len does not count them.
        tokens = self.sp_model.encode(s)[: self.max_len]
        return [self.bos_id] * bos + tokens + [self.eos_id] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; BOS and EOS leave nothing."""
        return self.sp_model.decode(list(ids))
