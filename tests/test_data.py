"""Reading data and scoring predictions."""

import json
import math
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import torch

from classifier import ClassifierConfig, LlamaEmbeddingClassifier
from run_llama import (
    Example,
    LlamaDataset,
    build_prompt_suffix,
    create_data,
    model_eval,
    write_predictions_to_file,
)
from tests.conftest import ROOT, make_llama
from tokenizer import Tokenizer
from utils import (
    accuracy,
    confusion_matrix,
    macro_f1,
    open_atomically,
    parse_example,
    read_label_names,
)


@pytest.fixture
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_model=tokenizer_path)


def test_parse_example_splits_at_the_first_separator() -> None:
    assert parse_example("3 ||| A film ||| of parts . ", "f", 1) == (3, "A film ||| of parts .")
    assert parse_example("-1 ||| ?", "f", 1) == (-1, "?")


@pytest.mark.parametrize(
    "line", ["", "   ", "3", "3 ||| ", "3 |||", "3||| no space before", "3 |||no space after"]
)
def test_line_without_label_and_sentence_is_named(line: str) -> None:
    with pytest.raises(ValueError, match=r'^data/x\.txt:17: expected "<label> \|\|\| <sentence>"'):
        parse_example(line, "data/x.txt", 17)


@pytest.mark.parametrize("label", ["good", "1.5", "", "one"])
def test_label_that_is_no_integer_is_named(label: str) -> None:
    with pytest.raises(ValueError, match=r"^x\.txt:4: expected a whole number as label"):
        parse_example(f"{label} ||| A film .", "x.txt", 4)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_create_data(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "x.txt", "1 ||| Warm .\n0 ||| Dull \u2028 and \x85 long .\n")
    examples = create_data(path, tokenizer, num_labels=2, max_seq_len=64)
    assert capsys.readouterr().out == f"load 2 data from {path}\n"
    assert [(e.label, e.sentence) for e in examples] == [
        (1, "Warm ."),
        (0, "Dull \u2028 and \x85 long ."),  # only a newline ends a line
    ]
    assert list(examples[0].tokens) == tokenizer.encode("Warm .", bos=True, eos=False)


@pytest.mark.parametrize(
    "content",
    [
        "0 ||| a\r\n1 ||| b\r\n",
        "\ufeff0 ||| a\n1 ||| b",
        "0 ||| a\r1 ||| b\r",
        "0 ||| a\r1 ||| b\n",
    ],
)
def test_line_ends_of_all_systems(tmp_path: Path, tokenizer: Tokenizer, content: str) -> None:
    examples = create_data(write(tmp_path / "x.txt", content), tokenizer, 2, 64)
    assert [(example.label, example.sentence) for example in examples] == [(0, "a"), (1, "b")]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_other_separators_are_part_of_the_sentence(
    tmp_path: Path, tokenizer: Tokenizer, separator: str
) -> None:
    """The prediction file has one line per example, and it reads back."""
    path = write(tmp_path / "x.txt", f"0 ||| a{separator}b\n1 ||| c\n")
    examples = create_data(path, tokenizer, 2, 64)
    sentences = [example.sentence for example in examples]
    assert sentences == [f"a{separator}b", "c"]
    write_predictions_to_file("dev", tmp_path / "out.txt", 0.5, [1, 0], sentences)
    with open(tmp_path / "out.txt", encoding="utf-8", newline=None) as file:
        assert file.read().split("\n") == [f"1 ||| a{separator}b", "0 ||| c", ""]


def test_a_carriage_return_ends_a_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As in the course's own reader: what follows it is a line of its own."""
    path = write(tmp_path / "x.txt", "0 ||| a\rb\n")
    with pytest.raises(ValueError, match=r'x\.txt:2: expected "<label>'):
        create_data(path, tokenizer, 2, 64)


def test_an_example_needs_little_memory(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """4 bytes for each token, besides the text and less than 400 bytes."""
    path = write(
        tmp_path / "x.txt", "".join(f"1 ||| {i} {'warm film ' * 20}.\n" for i in range(500))
    )
    tracemalloc.start()
    try:
        examples = create_data(path, tokenizer, 2, 500)
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    needed = sum(4 * len(example.tokens) + len(example.sentence) for example in examples)
    assert len(examples[0].tokens) > 60 and size < needed + 400 * len(examples)


def test_prompt_suffix_follows_the_sentence(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "x.txt", "1 ||| Warm .\n")
    suffix = build_prompt_suffix(["bad", "good"])
    (example,) = create_data(path, tokenizer, 2, 64, suffix)
    text = "Warm . Is this movie bad or good? This movie is "
    assert list(example.tokens) == tokenizer.encode(text, bos=True, eos=False)
    assert example.sentence == "Warm ."


def test_prompt_suffix_reads_as_the_assignments() -> None:
    names = ["awful", "bad", "average", "good", "excellent"]
    expected = " Is this movie awful, bad, average, good, or excellent? This movie is "
    assert build_prompt_suffix(names) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.txt: is empty"),
        (b"0 ||| fine\n1 ||| caf\xe9\n", "x.txt:2: not UTF-8"),
        (b"0 ||| fine\n2 ||| label\n", "x.txt:2: label 2 is not among 0 to 1"),
        (b"0 ||| fine\n-1 ||| label\n", "x.txt:2: label -1 is not among 0 to 1"),
        (b"0 ||| fine\n\n1 ||| blank line before\n", 'x.txt:2: expected "<label>'),
        (b"0 ||| " + b"word " * 99, "x.txt:1: .* tokens are more than the model's 64"),
    ],
)
def test_bad_data_is_named(
    tmp_path: Path, tokenizer: Tokenizer, content: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        create_data(write(tmp_path / "x.txt", content), tokenizer, 2, 64)


def test_test_files_may_have_unknown_labels(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "x.txt", "-1 ||| a\n1 ||| b\n")
    examples = create_data(path, tokenizer, 2, 64, allow_unlabelled=True)
    assert [example.label for example in examples] == [-1, 1]
    with pytest.raises(ValueError, match="label -2 is not among -1 to 1"):
        create_data(write(path, "-2 ||| a\n"), tokenizer, 2, 64, allow_unlabelled=True)


def test_max_sentence_len_cuts_long_sentences(tmp_path: Path, tokenizer_path: Path) -> None:
    path = write(tmp_path / "x.txt", "0 ||| " + "word " * 99)
    (example,) = create_data(path, Tokenizer(10, tokenizer_path), 2, 64)
    assert len(example.tokens) == 11  # BOS is not counted


def test_label_names(tmp_path: Path) -> None:
    assert read_label_names(write(tmp_path / "x.json", '["bad", "good"]')) == ["bad", "good"]


@pytest.mark.parametrize(
    "content",
    [b"", b"bad, good", b'{"bad": 0}', b'["bad", 1]', b'["bad", ""]', b'"bad"', b"\xff\xfe"]
    + [b'["bad"]', b'["bad", "bad"]', b"[]", b"[" * 100_000]
    + [b'["bad", "\\ud800"]'],
)
def test_bad_label_names_are_errors(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"x\.json: "):
        read_label_names(write(tmp_path / "x.json", content))


def test_batches_are_padded_on_the_right() -> None:
    rows = [[1, 5], [1, 6, 7, 8], [1]]
    examples = [Example("text", i % 2, row, 4 + i, "x.txt") for i, row in enumerate(rows)]
    batch = LlamaDataset(examples, pad_id=3).collate_fn(examples)
    assert batch.tokens.tolist() == [[1, 5, 3, 3], [1, 6, 7, 8], [1, 3, 3, 3]]
    assert batch.lengths.tolist() == [2, 4, 1] and batch.labels.tolist() == [0, 1, 0]
    assert (batch.num_tokens, batch.num_padded_tokens) == (7, 12)
    assert batch.describe() == "lines 5, 6, 7 of x.txt"


def test_loader_shuffles_anew_and_by_seed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "x.txt", "".join(f"0 ||| number {i}\n" for i in range(30)))
    data = LlamaDataset(create_data(path, tokenizer, 2, 64), tokenizer.pad_id)

    def passes(shuffle: torch.Generator | None) -> list[list[str]]:
        loader = data.loader(7, shuffle)
        lines = [[line for batch in loader for line in batch.lines] for _ in range(2)]
        return [[data.examples[line].sentence for line in one_pass] for one_pass in lines]

    in_order = [f"number {i}" for i in range(30)]
    assert passes(None) == [in_order, in_order]
    first, second = passes(torch.Generator().manual_seed(5))
    assert first != second and sorted(first) == sorted(second) == sorted(in_order)
    assert passes(torch.Generator().manual_seed(5)) == [first, second]
    assert [len(batch.lines) for batch in data.loader(7)] == [7, 7, 7, 7, 2]


def test_scores_by_hand() -> None:
    # gold 0 0 0 1 1 2, predicted 0 0 1 1 1 0
    confusion = confusion_matrix([0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 2], 4)
    assert confusion == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert accuracy(confusion) == pytest.approx(4 / 6)
    # F1: class 0: 4/6, class 1: 4/5, class 2: 0; class 3 does not occur
    assert macro_f1(confusion) == pytest.approx((4 / 6 + 4 / 5 + 0) / 3)


def test_scores_of_nothing_are_nan() -> None:
    nothing = [[0, 0], [0, 0]]
    assert math.isnan(accuracy(nothing)) and math.isnan(macro_f1(nothing))


def test_predictions_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_predictions_to_file("dev", tmp_path / "out.txt", 0.21345, [1, 0], ["naïve .", "b"])
    assert (tmp_path / "out.txt").read_bytes() == "1 ||| naïve .\n0 ||| b\n".encode()
    write_predictions_to_file("test", tmp_path / "out.txt", math.nan, [1], ["a"])
    assert capsys.readouterr().out == "dev acc :: 0.213\ntest acc :: n/a\n"


def test_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write(tmp_path / "out.txt", "old")
    with pytest.raises(KeyboardInterrupt), open_atomically(path) as file:
        file.write("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


COUNTS = {
    "sst-train": 8544,
    "sst-dev": 1101,
    "sst-test": 2210,
    "cfimdb-train": 1707,
    "cfimdb-dev": 245,
    "cfimdb-test": 488,
}


@pytest.mark.parametrize("name", COUNTS)
def test_course_data_facts(name: str) -> None:
    """Counts of the real files, no sentence too long, and CFIMDB's placeholder labels."""
    path = ROOT / "data" / f"{name}.txt"
    if not path.exists() or not (ROOT / "tokenizer.model").exists():
        pytest.skip("the course's data is not here (data/download.py)")
    names = read_label_names(ROOT / "data" / f"{name.split('-')[0]}-label-mapping.json")
    tokenizer = Tokenizer(tokenizer_model=ROOT / "tokenizer.model")
    suffix = build_prompt_suffix(names)
    examples = create_data(path, tokenizer, len(names), 1024, suffix)
    assert len(examples) == COUNTS[name]
    labels = Counter(example.label for example in examples)
    if name == "cfimdb-test":
        assert labels == {0: 488}
    if name == "sst-dev":
        assert labels == {0: 139, 1: 289, 2: 229, 3: 279, 4: 165}
    assert json.dumps(suffix).endswith(' This movie is "')


def test_model_eval_returns_to_the_files_order(tmp_path: Path, tokenizer_path: Path) -> None:
    """Batches by length predict what batches in the file's order do, to 1e-5 in the scores."""
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    words = "warm dull film story funny"
    texts = [" ".join((words.split() * 5)[i % 4 : i % 4 + 1 + 7 * i % 13]) for i in range(30)]
    path = tmp_path / "x.txt"
    path.write_text("\n".join(f"{i % 2} ||| {text}" for i, text in enumerate(texts)))
    examples = create_data(path, tokenizer, 2, 128)
    config = ClassifierConfig(2, "", 0.0, "finetune")
    torch.manual_seed(0)
    model = LlamaEmbeddingClassifier(config, make_llama(causal=True))
    results = []
    for group_by_length in (False, True):
        loader = LlamaDataset(examples, 3, group_by_length).loader(7)
        results.append(model_eval(loader, model, torch.device("cpu")))
    # All but the log-probabilities and the loss, whose last digits depend on the batch's shape.
    assert results[0][:-2] == results[1][:-2]
    for first, second in zip(*(result.log_probs for result in results), strict=True):
        assert first == pytest.approx(second, abs=1e-5)
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-5)
    assert results[0].sentences == texts and 0 < sum(results[0].predictions) < 30
    with torch.no_grad():
        model.classifier_head.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="scores are infinite or NaN"):
        model_eval(loader, model, torch.device("cpu"))
