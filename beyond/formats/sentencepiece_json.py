"""SentencePiece models as a `tokenizer.json`, so that AutoTokenizer gives the same tokens.

| SentencePiece (`sentencepiece_model.proto`) | the library `tokenizers` |
|---|---|
| `normalizer_model.precompiled_charsmap` | normalizer `Precompiled` |
| `remove_extra_whitespaces` | normalizers `Replace`: one space for several, none at the ends |
| `add_dummy_prefix` | normalizer `Prepend` of U+2581; decoder `Strip` |
| a space in the text is U+2581 in a piece | normalizer `Replace`; decoder `Replace` |
| `pieces`: text, score and type, in the order of their ids | vocabulary of the model `BPE` |
| the neighbours whose piece has the highest score are merged first | merges, by falling score |
| `trainer_spec.byte_fallback` | the same in `BPE`; decoders `ByteFallback` and `Fuse` |
| BOS, put before the text | post-processor `TemplateProcessing` |
| control pieces are never found in a text | `split_special_tokens` in `tokenizer_config.json` |

Sources: github.com/google/sentencepiece, `src/bpe_model.cc`, `src/normalizer.cc`; the conversion of
transformers, `convert_slow_tokenizer.py`, which differs in the whitespace and the merges.

Differs from SentencePiece: without byte pieces, unknown characters give no text instead of U+2047;
with a character map (not in Llama's models), `Precompiled` maps whole graphemes, and so drops what
follows a mapped character in one: a combining character, or the second of "\\r\\n".
"""

import json
from collections.abc import Sequence

from beyond.formats.huggingface_files import SENTENCEPIECE, TOKENIZER_JSON
from beyond.formats.huggingface_tokenizer import COMMON, SPLIT, TOKENIZER_CONFIG, JsonTokenizer
from beyond.formats.optional import import_library
from beyond.formats.sentencepiece_model import (
    BPE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    SentencePieceModel,
    parse_model,
)
from tokenizer import Tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files, by name, from which AutoTokenizer and this program make the tokenizer.

    A SentencePiece model is kept as it is, too: `tokenizer.model` is what this program reads.

    Raises:
        ValueError: it is a SentencePiece model that `tokenizers` cannot express.
    """
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.files()
    model = parse_model(tokenizer.content)
    special = {
        f"{role}_token": model.pieces[number].text if number >= 0 else None
        for role, number in (
            ("bos", tokenizer.sp_model.bos_id()),
            ("eos", tokenizer.sp_model.eos_id()),
            ("pad", tokenizer.sp_model.pad_id()),
            ("unk", tokenizer.sp_model.unk_id()),
        )
    }
    config = COMMON | special | {SPLIT: True}
    return {
        SENTENCEPIECE: tokenizer.content,
        TOKENIZER_JSON: (to_tokenizer_json(model, tokenizer) + "\n").encode(),
        TOKENIZER_CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }


def to_tokenizer_json(model: SentencePieceModel, tokenizer: Tokenizer) -> str:
    """Return a `tokenizer.json` that tokenizes as a SentencePiece model does."""
    library = import_library("tokenizers", "the tokenizer")
    normalizers, decoders = library.normalizers, library.decoders
    check_expressible(model)
    steps = []
    if model.precompiled_charsmap:
        steps.append(normalizers.Precompiled(model.precompiled_charsmap))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(library.Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(library.Regex(" {2,}"), " "))
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(library.Regex(rf"{SPACE}+\z"), ""))
    unknown = next(piece.text for piece in model.pieces if piece.kind == UNKNOWN)
    backend = library.Tokenizer(
        library.models.BPE(
            vocab={piece.text: number for number, piece in enumerate(model.pieces)},
            merges=find_merges(model.pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    backend.add_special_tokens(
        [
            library.AddedToken(piece.text, normalized=False, special=True)
            for piece in model.pieces
            if piece.kind in (UNKNOWN, CONTROL)
        ]
    )
    backend.normalizer = normalizers.Sequence(steps)
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix or model.remove_extra_whitespaces:
        n_leading = 2**20 if model.remove_extra_whitespaces else 1  # as many as there are
        decoding.append(decoders.Strip(" ", n_leading, 0))
    backend.decoder = decoders.Sequence(decoding)
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        bos = model.pieces[tokenizer.bos_id].text
        backend.post_processor = library.processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.bos_id)],
        )
    return backend.to_str(pretty=True)


def check_expressible(model: SentencePieceModel) -> None:
    """Raise ValueError if `tokenizers` would give other tokens than a SentencePiece model."""
    other = "cannot be written as a tokenizer.json"
    if model.model_type != BPE:
        raise ValueError(f"the tokenizer {other}: its model is not BPE")
    if model.treat_whitespace_as_suffix or not model.escape_whitespaces:
        raise ValueError(f"the tokenizer {other}: it treats spaces in another way than Llama's")
    for piece in model.pieces:
        if piece.kind in (USER_DEFINED, UNUSED):
            raise ValueError(f"the tokenizer {other}: {piece.text!r} is user-defined or unused")
    # SentencePiece also merges characters that are not pieces; `tokenizers` cannot.
    normal = {piece.text for piece in model.pieces if piece.kind == NORMAL}
    if missing := set("".join(normal)) - normal:
        raise ValueError(
            f"the tokenizer {other}: {min(missing)!r} occurs in pieces, but is not one"
        )


def find_merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that make up a piece, those of the highest score first."""
    scores = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    merges = [
        (text[:middle], text[middle:])
        for text in scores
        for middle in range(1, len(text))
        if text[:middle] in scores and text[middle:] in scores
    ]
    # Pieces of equal score, such as Llama's runs of spaces, are merged from the left. With the
    # longest left parts first, a piece grows to the right before the next one begins.
    return sorted(
        merges, key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0]), -len(pair[1]))
    )
