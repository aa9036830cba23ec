"""Tokenizers of the library `tokenizers`, and SentencePiece models written as one.

    uv run pytest tests/beyond/formats/test_huggingface_tokenizer.py

The oracle is AutoTokenizer of transformers.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from beyond.formats.huggingface_tokenizer import JsonTokenizer, read_tokenizer_json
from beyond.formats.sentencepiece_json import tokenizer_files
from beyond.formats.sentencepiece_model import encode_field
from beyond.generation import decode_stream
from tests.conftest import ROOT, SENTENCES
from tokenizer import Tokenizer

DEMO = ROOT / "data" / "demo" / "tokenizer.model"
TEXTS = [
    "",
    " ",
    "a",
    "The best thriller of the year , by far .",
    " leading",
    "trailing ",
    "runs  of   spaces        here",
    "\n",
    "two\n  lines\n\nand\ttabs \r\n",
    "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \u0441\u043b\u043e\u0432\u043e",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1ef\U0001f1f5",
    "don't . n't , 's ?",
    "\u2581 literal \u2581\u2581",
    "<0x0A> <s> </s> <unk>",
    "<|begin|> and <|end|><|pad|>",
    "\x00 nul",
    "1234567890 3.14",
]
CORPUS = [line.split(" ||| ")[1] for line in SENTENCES] * 4
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"


def make_byte_level(folder: Path, adds_bos: bool = True, pad: bool = True) -> Path:
    """Train a byte-level BPE such as GPT-2's or SmolLM2's; returns the path of tokenizer.json."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [BEGIN, END, PAD] if pad else [BEGIN, END]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, 0)]
        )
    names = {"bos_token": BEGIN, "eos_token": END} | ({"pad_token": PAD} if pad else {})
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder / "tokenizer.json"


def make_llama_like(folder: Path, tokenizer_path: Path) -> Path:
    """Let transformers convert a SentencePiece model; returns the path of tokenizer.json."""
    source = folder / "source"
    source.mkdir(parents=True)
    shutil.copy(tokenizer_path, source / "tokenizer.model")
    (source / "config.json").write_text('{"model_type": "llama"}')
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder / "saved")
    return folder / "saved" / "tokenizer.json"


def load(path: Path) -> JsonTokenizer:
    return JsonTokenizer(None, read_tokenizer_json(path), path)


@pytest.fixture(params=["byte-level", "byte-level without BOS", "llama-like"])
def path(request: pytest.FixtureRequest, tmp_path: Path, tokenizer_path: Path) -> Path:
    """The tokenizer.json of each kind of tokenizer."""
    if request.param == "llama-like":
        return make_llama_like(tmp_path, tokenizer_path)
    return make_byte_level(tmp_path, adds_bos=request.param == "byte-level")


# --------------------------------------------------------------------------------- JsonTokenizer


def test_tokens_and_texts_equal_autotokenizers(path: Path) -> None:
    ours, theirs = load(path), transformers.AutoTokenizer.from_pretrained(path.parent)
    for text in TEXTS:
        tokens = ours.encode(text, bos=True, eos=False)
        assert tokens == theirs(text).input_ids, text
        assert ours.encode_text(text) == theirs(text, add_special_tokens=False).input_ids, text
        assert ours.decode(tokens) == theirs.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    batch = ours.encode_batch(TEXTS, bos=True, eos=False)
    assert batch == [ours.encode(text, bos=True, eos=False) for text in TEXTS]
    assert ours.n_words == len(theirs) == len(theirs.get_vocab())


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> tuple[JsonTokenizer, Any]:
    """A byte-level tokenizer, and AutoTokenizer's."""
    path = make_byte_level(tmp_path_factory.mktemp("byte-level"))
    return load(path), transformers.AutoTokenizer.from_pretrained(path.parent)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 399), max_size=12))
def test_texts_of_any_tokens_equal_autotokenizers(
    byte_level: tuple[JsonTokenizer, Any], ids: list[int]
) -> None:
    ours, theirs = byte_level
    expected = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.decode(ids) == expected


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("pad", [False, True])
def test_special_tokens(tmp_path: Path, adds_bos: bool, pad: bool) -> None:
    tokenizer = load(make_byte_level(tmp_path, adds_bos, pad))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (0, 1, adds_bos)
    assert (tokenizer.pad_id, tokenizer.pad_piece) == ((2, PAD) if pad else (1, END))
    assert tokenizer.boundary_id == 0 and tokenizer.stop_ids == {0, 1}
    tokens = tokenizer.encode("a film", bos=True, eos=True)
    assert tokens == [0] * adds_bos + tokenizer.encode_text("a film") + [1]
    assert tokenizer.decode(tokens) == "a film"


def test_byte_piece_is_the_padding_of_a_llama_like_tokenizer(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    tokenizer = load(make_llama_like(tmp_path, tokenizer_path))
    assert (tokenizer.pad_id, tokenizer.pad_piece) == (3, "<0x00>")


def test_max_len_counts_neither_bos_nor_eos(tmp_path: Path) -> None:
    content = read_tokenizer_json(make_byte_level(tmp_path))
    tokenizer, whole = JsonTokenizer(3, content), JsonTokenizer(None, content)
    expected = [0, *whole.encode_text(CORPUS[0])[:3], 1]
    assert tokenizer.encode(CORPUS[0], bos=True, eos=True) == expected
    with pytest.raises(ValueError, match="max_len=0 is below 1"):
        JsonTokenizer(0, content)


def test_bos_is_added_by_the_post_processor_alone(tmp_path: Path) -> None:
    """`add_bos_token` has no say if there is a tokenizer.json, as in AutoTokenizer."""
    for adds_bos in (False, True):
        path = make_byte_level(tmp_path / str(adds_bos), adds_bos)
        edit_json(path.with_name("tokenizer_config.json"), add_bos_token=not adds_bos)
        theirs = transformers.AutoTokenizer.from_pretrained(path.parent)
        assert load(path).encode("a", bos=True, eos=False) == theirs("a").input_ids
        assert load(path).adds_bos == adds_bos


def test_a_token_that_the_post_processor_adds_is_bos_whatever_its_name(tmp_path: Path) -> None:
    path = make_byte_level(tmp_path)
    edit_json(path.with_name("tokenizer_config.json"), bos_token=None)
    assert load(path).bos_id == 0 and load(path).encode("", bos=True, eos=False) == [0]


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON object; a value of `...` deletes the field."""
    fields = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


@pytest.mark.parametrize(
    ("config", "special_tokens_map", "model", "expected"),
    [
        ({}, None, None, (0, 1)),
        ({"bos_token": None, "eos_token": None}, None, {"eos_token_id": 1}, (None, None)),
        ({"bos_token": ..., "eos_token": ...}, None, None, (None, None)),
        ({"bos_token": ..., "eos_token": ...}, None, {"eos_token_id": 1}, (None, 1)),
        ({"bos_token": ..., "eos_token": ...}, None, {"bos_token_id": 10**9}, (None, None)),
        ({"bos_token": ..., "eos_token": ...}, None, {"bos_token_id": [0, 1]}, (None, None)),
        ({"bos_token": ...}, {"bos_token": BEGIN}, {"bos_token_id": 5}, (0, 1)),
        ({"bos_token": END}, {"bos_token": {"content": BEGIN}}, None, (0, 1)),
        ({"bos_token": END, "added_tokens_decoder": {}}, {"bos_token": BEGIN}, None, (1, 1)),
        ({"eos_token": {"__type": "AddedToken", "content": BEGIN}}, None, None, (0, 0)),
        ({"eos_token": "<not a token>"}, None, None, (0, None)),
    ],
)
def test_special_tokens_are_found_in_the_files_around(
    tmp_path: Path,
    config: dict[str, Any],
    special_tokens_map: dict[str, Any] | None,
    model: dict[str, Any] | None,
    expected: tuple[int | None, int | None],
) -> None:
    path = make_byte_level(tmp_path, adds_bos=False)
    edit_json(path.with_name("tokenizer_config.json"), **config)
    for name, content in (("special_tokens_map", special_tokens_map), ("config", model)):
        if content is not None:
            path.with_name(f"{name}.json").write_text(json.dumps(content))
    tokenizer = load(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == expected
    if model is None and "<not a token>" not in config.values():
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert (theirs.bos_token_id, theirs.eos_token_id) == expected


def test_a_file_alone_is_a_tokenizer(tmp_path: Path) -> None:
    path = make_byte_level(tmp_path / "whole")
    alone = shutil.copy(path, tmp_path / "tokenizer.json")
    content = read_tokenizer_json(Path(alone))
    with pytest.raises(ValueError, match="no token for padding: no pad_token, <0x00> or eos_token"):
        JsonTokenizer(None, content)
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1}')
    assert load(tmp_path / "tokenizer.json").stop_ids == {0, 1}


def test_an_ordinary_token_that_is_named_eos_becomes_special(tmp_path: Path) -> None:
    """So it gives no text, and is found in a text, as in AutoTokenizer."""
    path = make_byte_level(tmp_path)
    edit_json(path.with_name("tokenizer_config.json"), eos_token="film")
    backend = json.loads(path.read_text())
    backend["model"]["vocab"]["film"] = len(backend["model"]["vocab"])
    path.write_text(json.dumps(backend))
    ours, theirs = load(path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_id == theirs.eos_token_id == backend["model"]["vocab"]["film"]
    tokens = ours.encode_text("a film.")
    assert ours.eos_id in tokens and tokens == theirs("a film.", add_special_tokens=False).input_ids
    assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True) == "a ."


@pytest.mark.parametrize("split", [False, True])
def test_special_tokens_in_a_text_are_found_unless_the_config_says_otherwise(
    tmp_path: Path, split: bool
) -> None:
    path = make_byte_level(tmp_path)
    edit_json(path.with_name("tokenizer_config.json"), split_special_tokens=split)
    ours, theirs = load(path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = f"one{END}two"
    assert ours.encode_text(text) == theirs(text, add_special_tokens=False).input_ids
    assert (1 in ours.encode_text(text)) != split


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    path = make_byte_level(tmp_path)
    backend = Backend.from_file(str(path))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert load(path).encode(CORPUS[0], bos=True, eos=False) == theirs(CORPUS[0]).input_ids
    assert len(load(path).encode_text(CORPUS[0])) > 2


def test_added_tokens_and_gaps_count_as_words(tmp_path: Path) -> None:
    path = make_byte_level(tmp_path)
    content = json.loads(path.read_text())
    content["model"]["vocab"]["beyond"] = 999
    path.write_text(json.dumps(content))
    assert load(path).n_words == 1000
    assert load(path).decode([500, 10**12, -1, 999]) == "beyond"


def test_label_tokens_are_those_that_the_label_adds(tmp_path: Path) -> None:
    tokenizer = load(make_byte_level(tmp_path))
    encode = tokenizer.encode_text
    prompt = "A film is "
    space = encode(" ")
    assert encode(prompt)[-1:] == space
    # The prompt's last space, which is a token by itself, becomes a part of the label's.
    for label in ("moving", "warm and wonderfully"):
        tokens = tokenizer.label_tokens(label, prompt)
        assert tokens == encode(f" {label}") and encode(prompt)[:-1] + tokens == encode(
            prompt + label
        )
    assert len(tokenizer.label_tokens("and", prompt)) == 1
    # No token begins with a space and a bracket, so the prompt keeps its space.
    assert tokenizer.label_tokens("[", prompt) == encode("[")
    assert tokenizer.label_tokens("moving", "A film") == encode("moving")
    assert tokenizer.label_tokens("moving", "") == encode("moving")
    with pytest.raises(ValueError, match="the label '' adds no token to the prompt"):
        tokenizer.label_tokens("", prompt)


def test_label_tokens_of_a_llama_like_tokenizer(tmp_path: Path, tokenizer_path: Path) -> None:
    """The prompt's last space is kept, and the label's first token has no space of its own."""
    tokenizer = load(make_llama_like(tmp_path, tokenizer_path))
    prompt = "A film is "
    tokens = tokenizer.encode_text(prompt + "moving")
    found = tokenizer.label_tokens("moving", prompt)
    assert tokens[-len(found) :] == found
    assert tokenizer.decode(tokens) == "A film is moving"


def test_the_files_give_the_same_tokenizer(path: Path, tmp_path: Path) -> None:
    tokenizer = load(path)
    (again := tmp_path / "again").mkdir()
    for name, content in tokenizer.files().items():
        (again / name).write_bytes(content)
    assert (again / "tokenizer.json").read_bytes() == path.read_bytes()
    read = read_tokenizer_json(again / "tokenizer.json")
    assert JsonTokenizer(None, read).files() == tokenizer.files()
    assert read_tokenizer_json(again / "tokenizer.json") == read
    theirs = transformers.AutoTokenizer.from_pretrained(again)
    for text in TEXTS:
        assert tokenizer.encode(text, bos=True, eos=False) == theirs(text).input_ids, text


def test_a_stream_gives_the_text(path: Path) -> None:
    """Characters that take several tokens come whole."""
    tokenizer = load(path)
    for text in TEXTS:
        tokens = tokenizer.encode(text, bos=True, eos=True)
        parts = list(decode_stream(tokenizer, tokens))
        assert "".join(parts) == tokenizer.decode(tokens), text
        assert not any("\ufffd" in part for part in parts)
    emoji = tokenizer.encode_text("\U0001f600")
    assert len(emoji) >= 4 and list(decode_stream(tokenizer, emoji)) == ["\U0001f600"]
    for end in range(1, len(emoji)):  # a text that ends within a character
        assert set("".join(decode_stream(tokenizer, emoji[:end]))) <= {"\ufffd"}


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 450), max_size=12))  # some have no token
def test_a_stream_gives_the_text_of_any_tokens(
    byte_level: tuple[JsonTokenizer, Any], ids: list[int]
) -> None:
    assert "".join(decode_stream(byte_level[0], ids)) == byte_level[0].decode(ids)


# --------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b'{"model": {}}',
        b"[" * 100_000,
        b'{"version": "1.0", "model": ' * 10_000,
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": ["a"], "merges": []}}',
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
        # A character map of four bytes makes Rust panic.
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, '
        b'"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}',
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, '
        b'"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", '
        b'"invert": false}}',
        b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "x"}}',
    ],
    ids=lambda content: repr(content[:70]),
)
def test_a_damaged_file_is_refused_in_one_line(
    tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    (tmp_path / "config.json").write_text('{"bos_token_id": 0}')
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: ") as error:
        load(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert capfd.readouterr() == ("", "")


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with open(path, "wb") as file:
        file.truncate(2**40)  # it takes no room on the disk
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes are too many for a tokenizer"):
        load(path)
    with pytest.raises(FileNotFoundError, match="no such tokenizer"):
        load(tmp_path / "other.json")


@pytest.mark.parametrize("value", ["\ud800", 1, ["a"], {"content": 5}, True])
def test_a_special_token_that_is_no_text_is_refused(tmp_path: Path, value: Any) -> None:
    path = make_byte_level(tmp_path)
    edit_json(path.with_name("tokenizer_config.json"), bos_token=value)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: its setting bos_token is "):
        load(path)


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_a_switch_that_is_no_boolean_is_refused(tmp_path: Path, value: Any) -> None:
    path = make_byte_level(tmp_path)
    edit_json(path.with_name("tokenizer_config.json"), split_special_tokens=value)
    with pytest.raises(ValueError, match="its setting split_special_tokens is"):
        load(path)


def test_two_tokens_before_a_text_are_refused(tmp_path: Path) -> None:
    path = make_byte_level(tmp_path)
    backend = Backend.from_file(str(path))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} {END} $A", special_tokens=[(BEGIN, 0), (END, 1)]
    )
    backend.save(str(path))
    with pytest.raises(ValueError, match="puts 2 tokens before a text; only BOS is read"):
        load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"tokenizer.json": 1, "tokenizer_config.json": {}}',
        b'{"tokenizer.json": "{}", "tokenizer_config.json": []}',
        b'{"tokenizer.json": "{}", "tokenizer_config.json": {"model": "x"}}',
        b'{"tokenizer.json": "\\ud800", "tokenizer_config.json": {}}',
        b"[" * 100_000,
    ],
    ids=lambda content: repr(content[:70]),
)
def test_damaged_content_of_a_checkpoint_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="^the tokenizer: ") as error:
        JsonTokenizer(None, content)
    assert "\n" not in str(error.value)


def test_a_text_that_the_library_refuses_is_an_error(tmp_path: Path) -> None:
    tokenizer = load(make_byte_level(tmp_path))
    with pytest.raises(ValueError, match="^the tokenizer: the library tokenizers refuses it: "):
        tokenizer.encode_text("\ud800")


# --------------------------------------------------------- SentencePiece models as tokenizer.json


def train(folder: Path, **options: Any) -> bytes:
    """Train a SentencePiece model of BPE on a few sentences; returns its content."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(CORPUS), encoding="utf-8")
    defaults = {"vocab_size": 320, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    options = {"input": str(corpus), "model_prefix": str(folder / "trained"), **defaults, **options}
    sentencepiece.SentencePieceTrainer.train(**options)
    return (folder / "trained.model").read_bytes()


def write_files(folder: Path, tokenizer: Tokenizer) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in tokenizer_files(tokenizer).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        None,  # the demo's model
        {},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},  # as Llama's
        {"add_dummy_prefix": False},
        {
            "normalization_rule_name": "identity",
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
        },
        {"bos_id": -1, "pad_id": 3},
        {"byte_fallback": False, "vocab_size": 90},
    ],
)
def test_autotokenizer_gives_the_tokens_of_a_sentencepiece_model(
    tmp_path: Path, options: dict[str, Any] | None
) -> None:
    ours = Tokenizer(None, DEMO if options is None else train(tmp_path, **options))
    folder = write_files(tmp_path / "new", ours)
    assert (folder / "tokenizer.model").read_bytes() == ours.content
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    copy = load(folder / "tokenizer.json")
    for text in TEXTS:
        tokens = ours.encode(text, bos=True, eos=False)
        assert theirs(text).input_ids == tokens, text
        assert copy.encode(text, bos=True, eos=False) == tokens, text
        if 0 not in tokens:  # only SentencePiece has a text for unknown pieces
            assert theirs.decode(tokens, skip_special_tokens=True) == ours.decode(tokens), text
    for role in ("bos_id", "eos_id", "pad_id", "n_words"):
        assert getattr(copy, role) == getattr(ours, role)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    declared = ours.sp_model.pad_id()
    assert theirs.pad_token_id == (declared if declared >= 0 else None)


ALPHABET = st.sampled_from(" ab\n\t\u2581.\u00e9\u65e5\U0001f600</s>0") | st.characters(
    codec="utf-8"
)


def added_piece(text: str, score: float) -> bytes:
    """Return the bytes that add a piece when they are put at the end of a model."""
    return encode_field(1, encode_field(1, text.encode()) + encode_field(2, score))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """The demo's tokenizer, and AutoTokenizer's."""
    ours = Tokenizer(None, DEMO)
    folder = write_files(tmp_path_factory.mktemp("demo"), ours)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@settings(deadline=None)
@given(text=st.text(ALPHABET, max_size=40))
def test_autotokenizer_gives_the_tokens_of_any_text(demo: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = demo
    tokens = ours.encode(text, bos=True, eos=False)
    assert theirs(text).input_ids == tokens
    assert theirs.decode(tokens, skip_special_tokens=True) == ours.decode(tokens)


def test_pieces_of_equal_score_are_merged_from_the_left(tmp_path: Path) -> None:
    """Llama's runs of spaces have one score."""
    content = train(tmp_path, normalization_rule_name="identity", remove_extra_whitespaces=False)
    for length in (2, 3, 5):
        content += added_piece("\u2581" * length, -1e9)
    ours = Tokenizer(None, content)
    theirs = transformers.AutoTokenizer.from_pretrained(write_files(tmp_path / "new", ours))
    for length in range(40):
        for text in (" " * length, " " * length + "a", "a" + " " * length + "b  c"):
            assert theirs(text).input_ids == ours.encode(text, bos=True, eos=False), repr(text)
    assert len({tuple(ours.encode_text(" " * length)) for length in range(40)}) == 40


def test_control_pieces_are_never_merged_from_a_text(tmp_path: Path) -> None:
    added = [added_piece(piece, -1.0) for piece in ("<", ">", "s>")]
    ours = Tokenizer(None, train(tmp_path) + b"".join(added))
    theirs = transformers.AutoTokenizer.from_pretrained(write_files(tmp_path / "new", ours))
    tokens = ours.encode("<s>", bos=True, eos=False)
    assert theirs("<s>").input_ids == tokens and 1 not in tokens[1:]


def test_a_piece_with_a_character_that_is_no_piece_is_refused(tmp_path: Path) -> None:
    ours = Tokenizer(None, train(tmp_path) + added_piece("s>", -1.0))
    assert ours.sp_model.id_to_piece(ours.encode_text("<s>"))[-1] == "s>"
    with pytest.raises(ValueError, match="'>' occurs in pieces, but is not one"):
        tokenizer_files(ours)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram", "vocab_size": 300}, "its model is not BPE"),
        ({"user_defined_symbols": ["<sep>"]}, "'<sep>' is user-defined or unused"),
        ({"treat_whitespace_as_suffix": True}, "it treats spaces in another way than Llama's"),
    ],
)
def test_models_that_cannot_be_expressed_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    ours = Tokenizer(None, train(tmp_path, **options))
    with pytest.raises(ValueError, match=f"the tokenizer cannot be written.*: {message}"):
        tokenizer_files(ours)


def test_a_json_tokenizer_is_written_as_it_is(path: Path) -> None:
    assert tokenizer_files(load(path)) == load(path).files()
