"""Tokenizers of Hugging Face's library `tokenizers`: the file `tokenizer.json`.

| file | what is read of it |
|---|---|
| `tokenizer.json` | all of it, by the library `tokenizers`: the steps below and the tokens |
| `tokenizer_config.json` | `bos_token`, `eos_token`, `pad_token` ..., and `split_special_tokens` |
| `special_tokens_map.json` | the same tokens, in folders of transformers 4 |
| `config.json` | `bos_token_id`, `eos_token_id`, if the files above do not mention the token |

| in `tokenizer.json` | what it does |
|---|---|
| `added_tokens` | tokens that are found in a text first; special ones give no text |
| `normalizer` | replaces characters, for example spaces by U+2581 |
| `pre_tokenizer` | splits the text into words; if byte-level, it maps bytes to characters |
| `model` | splits words into tokens: the vocabulary and the merges of BPE |
| `post_processor` | adds tokens such as BOS to a whole text |
| `decoder` | turns tokens into text |

`AutoTokenizer` of transformers 5.22 does the same with a folder whose `tokenizer_class` is
`PreTrainedTokenizerFast` or `TokenizersBackend`. In particular it ignores `add_bos_token` if there
is a `tokenizer.json`: BOS is added if the post-processor adds it. (For some other classes it builds
the pre-tokenizer anew instead of using the one in the file; this module never does.)

Sources: huggingface.co/docs/tokenizers; github.com/huggingface/transformers 5.22,
`tokenization_utils_base.py`, `tokenization_utils_tokenizers.py`.
"""

import itertools
import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beyond.formats.huggingface_files import (
    CONFIG,
    MAX_TOKENIZER,
    TOKENIZER_JSON,
)
from beyond.formats.json_file import read_json
from beyond.formats.optional import import_library, library_errors, silent_stderr
from tokenizer import PAD_PIECE, Tokenizer
from utils import is_text

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL = tuple(f"{role}_token" for role in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))
SPLIT = "split_special_tokens"
# This class takes tokenizer.json as it is. transformers 4 would remove spaces before punctuation.
COMMON = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


class JsonTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`, as a `tokenizer.json` describes it.

    A special token that is written out in a text, such as "</s>", becomes that token, as in
    AutoTokenizer, unless the tokenizer's config sets `split_special_tokens`. Special tokens give no
    text, nor do ids without a token, since a model's vocabulary can be larger than its tokenizer's.

    Args:
        max_len: as in `Tokenizer`.
        content: as `read_tokenizer_json` returned it.
        path: of the tokenizer, for error messages.

    Attributes:
        adds_bos: whether the post-processor puts a token before each text; that token is BOS.
        n_words: the highest id plus one, added tokens included.
        Others as in `Tokenizer`. A special token that the vocabulary lacks counts as not declared.

    Raises:
        ValueError: the content is not such a tokenizer, or no token can be used for padding; or
            max_len < 1; or the library is missing.
    """

    def __init__(
        self, max_len: int | None, content: bytes, path: str | Path = "the tokenizer"
    ) -> None:
        if max_len is not None and max_len < 1:
            raise ValueError(f"max_len={max_len} is below 1")
        self.max_len = max_len
        self.content = content
        self.json, self.settings = _parse_content(content, path)
        self.backend = _build(self.json, self.settings, path)
        with library_errors(path), silent_stderr():
            vocabulary = self.backend.get_vocab(with_added_tokens=True)
            probe = self.backend.encode("a")
        self.n_words = 1 + max(vocabulary.values(), default=-1)
        ids = {role: vocabulary.get(self.settings.get(role)) for role in SPECIAL}
        # Tokens that the post-processor adds belong to no sequence.
        n_added = sum(1 for _ in itertools.takewhile(lambda x: x is None, probe.sequence_ids))
        start = probe.ids[:n_added]
        if len(start) > 1:
            raise ValueError(f"{path}: puts {len(start)} tokens before a text; only BOS is read")
        self.adds_bos = bool(start)
        self.bos_id, self.eos_id = start[0] if start else ids["bos_token"], ids["eos_token"]
        candidates = (ids["pad_token"], vocabulary.get(PAD_PIECE), self.eos_id)
        pad_id = next((number for number in candidates if number is not None), None)
        if pad_id is None:
            raise ValueError(
                f"{path}: has no token for padding: no pad_token, {PAD_PIECE} or eos_token"
            )
        self.pad_id, self.pad_piece = pad_id, str(self.backend.id_to_token(pad_id))

    def encode_text(self, text: str) -> list[int]:
        """Convert a text to its token ids, without BOS and EOS."""
        with library_errors("the tokenizer"):
            return self.backend.encode(text, add_special_tokens=False).ids

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Convert texts in one call of the library, which uses all processors."""
        with library_errors("the tokenizer"):
            encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Convert token ids to a text; special tokens give no text."""
        known = [number for number in ids if 0 <= number < self.n_words]
        with library_errors("the tokenizer"):
            return self.backend.decode(known, skip_special_tokens=True)

    def label_tokens(self, label: str, prompt: str) -> list[int]:
        """Return the tokens that a label word adds to a prompt.

        They are those of prompt + label after the tokens with which the prompt begins, too. After
        "is ", a byte-level tokenizer has " bad" as one token, which takes in the prompt's space.

        Raises:
            ValueError: there are none.
        """
        before, after = self.encode_text(prompt), self.encode_text(prompt + label)
        pairs = zip(before, after, strict=False)
        n_common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        tokens = after[n_common:]
        if not tokens:
            raise ValueError(f"the label {label!r} adds no token to the prompt")
        return tokens

    def fits(self, vocab_size: int) -> bool:
        """Return whether the tokenizer can be that of a model with a vocabulary of this size.

        Some models have rows of the embedding that belong to no token.
        """
        return self.n_words <= vocab_size

    def files(self) -> dict[str, bytes]:
        """Return the files, by name, from which the tokenizer can be made again."""
        return {
            TOKENIZER_JSON: self.json.encode(),
            TOKENIZER_CONFIG: (json.dumps(COMMON | self.settings, indent=2) + "\n").encode(),
        }


def read_tokenizer_json(path: Path) -> bytes:
    """Read a tokenizer.json and what the files beside it say about its special tokens.

    Returns:
        The content of a `JsonTokenizer`: JSON, with the text of the file and the settings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer")
    if (size := path.stat().st_size) > MAX_TOKENIZER:
        raise ValueError(f"{path}: {size:,} bytes are too many for a tokenizer")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text: {error.reason}") from None
    config_path, map_path, model_path = (
        path.with_name(name) for name in (TOKENIZER_CONFIG, "special_tokens_map.json", CONFIG)
    )
    config = read_json(config_path) if config_path.is_file() else {}
    if "added_tokens_decoder" not in config and map_path.is_file():  # as in transformers
        config |= read_json(map_path)
    settings: dict[str, Any] = {}
    for role in SPECIAL:
        if role in config:
            token = config[role]
            settings[role] = token.get("content") if isinstance(token, dict) else token
    if model_path.is_file() and not {"bos_token", "eos_token"} <= settings.keys():
        model = read_json(model_path)
        backend = _build(text, {}, path)
        for role in ("bos_token", "eos_token"):
            number = model.get(f"{role}_id")
            if role not in settings and isinstance(number, int) and 0 <= number < 2**32:
                settings[role] = backend.id_to_token(number)
    if SPLIT in config:
        settings[SPLIT] = config[SPLIT]
    stored = json.dumps({TOKENIZER_JSON: text, TOKENIZER_CONFIG: settings}, ensure_ascii=False)
    content = stored.encode("utf-8", "surrogatepass")
    _parse_content(content, path)
    return content


def _parse_content(content: bytes, path: str | Path) -> tuple[str, dict[str, Any]]:
    """Return the text of tokenizer.json and the settings that `read_tokenizer_json` stored."""
    try:
        parsed = json.loads(content)
        text, settings = parsed[TOKENIZER_JSON], parsed[TOKENIZER_CONFIG]
        if not isinstance(text, str) or not isinstance(settings, dict):
            raise TypeError
    except (ValueError, TypeError, LookupError, RecursionError):
        raise ValueError(f"{path}: is not a tokenizer.json as this program stores it") from None
    for name, value in settings.items():
        is_right = isinstance(value, bool) if name == SPLIT else value is None or is_text(value)
        if not is_right or name not in (SPLIT, *SPECIAL):
            raise ValueError(f"{path}: its setting {name} is {reprlib.repr(value)}")
    return text, settings


def _build(text: str, settings: Mapping[str, Any], path: str | Path) -> Any:
    """Make the library's tokenizer, without its truncation and padding, as AutoTokenizer does."""
    library = import_library("tokenizers", path)
    with library_errors(path), silent_stderr():
        backend = library.Tokenizer.from_str(text)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = settings.get(SPLIT, False)
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        names = [settings.get(role) for role in SPECIAL]
        backend.add_special_tokens(
            [
                library.AddedToken(name, normalized=False, special=True)
                for name in names
                if name and name not in added and backend.token_to_id(name) is not None
            ]
        )
    return backend
