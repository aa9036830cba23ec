"""What must hold for any input, tried on many: reading, writing, scoring, and refusals."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from config import LlamaConfig
from run_llama import (
    Example,
    build_prompt_suffix,
    create_data,
    write_predictions_to_file,
)
from tokenizer import Tokenizer
from utils import (
    SEPARATOR,
    accuracy,
    confusion_matrix,
    describe_error,
    is_text,
    macro_f1,
    parse_example,
    read_label_names,
    read_lines,
)

# The clock of a busy machine proves nothing; and files are written anew for each example.
many = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
sentence = text.map(lambda s: re.sub("[\r\n]", " ", s).strip()).filter(bool)
label = st.integers(0, 4)


# ------------------------------------------------------------------------------------ data


@many
@given(label=st.integers(), sentence=sentence)
@example(label=0, sentence="|||")
def test_an_example_reads_as_it_was_written(label: int, sentence: str) -> None:
    assert parse_example(f"{label}{SEPARATOR}{sentence}", "f", 1) == (label, sentence)


@many
@given(st.text())
@example("9" * 5000 + " ||| a")
def test_any_line_is_an_example_or_a_named_error(line: str) -> None:
    try:
        number, sentence = parse_example(line, "x.txt", 7)
    except ValueError as error:
        assert describe_error(error).startswith("x.txt:7: expected ")
    else:
        assert sentence == line.partition(SEPARATOR)[2].strip() != ""
        assert number == int(line.partition(SEPARATOR)[0])


@many
@given(examples=st.lists(st.tuples(label, sentence), min_size=1, max_size=6))
def test_a_data_file_reads_as_it_was_written(
    tmp_path: Path, tokenizer_path: Path, examples: list[tuple[int, str]]
) -> None:
    path = tmp_path / "x.txt"
    lines = "".join(f"{label}{SEPARATOR}{sentence}\n" for label, sentence in examples)
    path.write_bytes(lines.encode())
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    found = create_data(path, tokenizer, 5, 10_000)
    assert [example._replace(tokens=list(example.tokens)) for example in found] == [
        Example(sentence, label, tokenizer.encode(sentence, bos=True, eos=False), line, str(path))
        for line, (label, sentence) in enumerate(examples)
    ]


@many
@given(content=st.binary(max_size=60) | st.lists(st.sampled_from([b"0 ||| ", b"\n", b"a"])))
def test_any_file_is_data_or_a_named_error(
    tmp_path: Path, tokenizer_path: Path, content: bytes | list[bytes]
) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(content if isinstance(content, bytes) else b"".join(content))
    try:
        examples = create_data(path, Tokenizer(tokenizer_model=tokenizer_path), 2, 64)
    except ValueError as error:
        assert describe_error(error).startswith(f"{path}:")
    else:
        assert all(0 <= e.label < 2 and e.sentence and len(e.tokens) <= 64 for e in examples)


@many
@given(rows=st.lists(st.tuples(label, sentence), max_size=8))
def test_predictions_read_as_they_were_written(tmp_path: Path, rows: list[tuple[int, str]]) -> None:
    path = tmp_path / "out.txt"
    labels, sentences = [label for label, _ in rows], [sentence for _, sentence in rows]
    write_predictions_to_file("dev", path, 0.5, labels, sentences)
    lines = read_lines(path) if rows else []
    assert [parse_example(line, path, 1) for line in lines] == rows


# ------------------------------------------------------------------------------ label words

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@many
@given(value=json_values | st.lists(text, max_size=5))
@example(["bad", "\ud800"])
@example(["bad", " "])
def test_label_words_are_two_or_more_words_or_a_named_error(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(value))
    good = (
        isinstance(value, list)
        and all(is_text(word) and word.strip() for word in value)
        and len(value) == len(set(value)) >= 2
    )
    if good:
        assert read_label_names(path) == value
        assert all(word in build_prompt_suffix(value) for word in value)
    else:
        with pytest.raises(ValueError) as caught:
            read_label_names(path)
        assert describe_error(caught.value).startswith(f"{path}: expected ")


@many
@given(content=st.binary(max_size=40))
def test_any_bytes_are_label_words_or_a_named_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "labels.json"
    path.write_bytes(content)
    try:
        assert len(read_label_names(path)) >= 2
    except ValueError as error:
        assert str(path) in describe_error(error)


# ----------------------------------------------------------------------------------- config

FIELDS = list(LlamaConfig().to_model_args())
values = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
sizes = st.sampled_from([1, 2, 3, 4, 6, 8, 48, 64, 2**20, 2**63])
numbers = st.sampled_from([0.0, 1e-5, 0.5, 1.0, True])
few = st.dictionaries(st.sampled_from(FIELDS), sizes | numbers | st.none(), max_size=4)


@many
@given(few | st.dictionaries(st.sampled_from([*FIELDS, "norm_eps"]) | values, values))
@example({"dim": 10**400})
@example({"dim": -(10**5000)})
def test_any_model_args_are_a_config_or_an_error(model_args: dict[Any, Any]) -> None:
    try:
        config = LlamaConfig.from_model_args(model_args)
    except ValueError as error:
        assert describe_error(error)
        return
    assert LlamaConfig.from_model_args(config.to_model_args()) == config
    assert config.head_dim * config.n_heads == config.dim and config.head_dim % 2 == 0
    assert config.n_rep * config.n_kv_heads == config.n_heads
    assert config.hidden_dim >= 1 and config.vocab_size * config.dim <= 2**40


# ----------------------------------------------------------------------------------- scores


@many
@given(st.lists(st.tuples(label, st.integers(-1, 4)), max_size=30))
def test_scores_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    """Over the examples with a gold label; a class that does not occur does not count."""
    from sklearn.metrics import accuracy_score, f1_score  # here, since it takes a second

    confusion = confusion_matrix([p for p, _ in pairs], [gold for _, gold in pairs], 5)
    judged = np.array([pair for pair in pairs if pair[1] >= 0])
    if not len(judged):
        assert math.isnan(accuracy(confusion)) and math.isnan(macro_f1(confusion))
        return
    predictions, labels = judged.T
    assert accuracy(confusion) == pytest.approx(accuracy_score(labels, predictions))
    expected = f1_score(labels, predictions, average="macro", zero_division=0)
    assert macro_f1(confusion) == pytest.approx(expected)
