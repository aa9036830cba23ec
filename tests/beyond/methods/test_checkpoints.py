"""Checkpoints that record a method, and runs with one: resumed, parallel, in micro-batches."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from base_llama import read_checkpoint, write_checkpoint
from beyond.command_line import get_args
from beyond.methods.checkpoints import input_tokenizer, load_any_classifier
from beyond.methods.label_words import LabelWordClassifier, PromptTokenizer
from beyond.methods.method import build_method
from beyond.methods.pooling import PooledClassifier
from beyond.options import FinetuneOptions
from classifier import ClassifierConfig, LlamaEmbeddingClassifier, load_classifier
from run_llama import classification_loss, main
from tests.beyond.methods.conftest import PROMPT, WORDS
from tests.beyond.methods.helpers import assert_close_curves
from tests.beyond.runs import (
    FINETUNE,
    TERM,
    Job,
    RunForks,
    Strike,
    assert_close_results,
    assert_same_results,
    copy_of,
    run_uninterrupted,
    strike_and_resume,
)
from tests.conftest import make_llama, pad_rows
from tests.test_run_llama import predicted, run
from tokenizer import Tokenizer

FLAGS = [
    *(["--pooling", name] for name in ("mean", "max", "attention", "before_stop")),
    ["--pool_layer", "1"],
    ["--head", "label_words"],
]
MODES = {True: "--causal", False: "--no-causal"}
# Without dropout, since each process draws its own random numbers.
STILL = ["--dropout", "0", "--hidden_dropout_prob", "0", "--lr", "1e-4", "--epochs", "2"]


def make_plain(tokenizer: Tokenizer | None, causal: bool = True) -> LlamaEmbeddingClassifier:
    config = ClassifierConfig(2, "", 0.3, "finetune")
    return LlamaEmbeddingClassifier(config, make_llama(causal), WORDS, tokenizer).eval()


def make_all(tokenizer: Tokenizer) -> list[LlamaEmbeddingClassifier]:
    """Make a classifier of each kind that a checkpoint records."""
    pooled = [
        PooledClassifier(make_plain(tokenizer), name)
        for name in ("mean", "max", "attention", "before_stop")
    ]
    torch.nn.init.normal_(pooled[2].pooling.query)  # type: ignore[arg-type]
    return [*pooled, LabelWordClassifier(make_plain(tokenizer), PROMPT)]


# ------------------------------------------------------------------------------------ round trips


def test_each_classifier_is_made_again(word_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Its class, its scores, tied weights; in eval mode; no random number is drawn."""
    path = tmp_path / "best.pt"
    batch = pad_rows([[1, 20, 33], [1, 7, 300, 267], [1, 99]], pad_id=3)
    for model in [*make_all(word_tokenizer), make_plain(word_tokenizer)]:
        write_checkpoint(path, model.to_checkpoint())
        state = torch.get_rng_state()
        loaded = load_any_classifier(path)
        assert torch.equal(torch.get_rng_state(), state)
        assert type(loaded) is type(model) and not loaded.training
        assert torch.equal(loaded(*batch), model.eval()(*batch))
        assert loaded.llama.tok_embeddings.weight is loaded.llama.output.weight
        assert (loaded.num_labels, loaded.dropout.p, loaded.label_names) == (2, 0.3, WORDS)
        write_checkpoint(tmp_path / "again.pt", loaded.to_checkpoint())
        assert (tmp_path / "again.pt").read_bytes() == path.read_bytes()


def test_load_classifier_refuses_a_method_by_its_name(
    word_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "best.pt"
    texts = ["mean", "max", "attention", "before_stop", "label_words"]
    for model, text in zip(make_all(word_tokenizer), texts, strict=True):
        write_checkpoint(path, model.to_checkpoint())
        with pytest.raises(ValueError) as caught:
            load_classifier(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: was fine-tuned with {{") and f": '{text}'" in message
        assert message.endswith("; load it with beyond.methods") and "\n" not in message


def test_a_plain_checkpoint_says_nothing_of_methods(word_tokenizer: Tokenizer) -> None:
    assert "method" not in make_plain(word_tokenizer).to_checkpoint()["classifier"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"pooling": "sum"}, r"{'pooling': 'sum'}, which this program does not know"),
        ({"pooling": "last"}, "which this program does not know"),
        ({"pooling": 3}, "which this program does not know"),
        ({"pooling": "mean", "more": 1}, "which this program does not know"),
        ({"head": "label_words"}, "which this program does not know"),
        ({"head": "label_words", "prompt": None}, "which this program does not know"),
        ({"a\nb": "c" * 1000}, "which this program does not know"),
        ({}, "which this program does not know"),
        (None, "which this program does not know"),
        ([1] * 1000, "which this program does not know"),
        ({"pooling": "attention"}, "do not fit the model: missing pooling.query"),
        ({"head": "label_words", "prompt": ""}, "unexpected classifier_head"),
    ],
)
def test_a_bad_method_is_named(
    word_tokenizer: Tokenizer, tmp_path: Path, method: Any, message: str
) -> None:
    checkpoint = make_plain(word_tokenizer).to_checkpoint()
    checkpoint["classifier"]["method"] = method
    write_checkpoint(tmp_path / "best.pt", checkpoint)
    with pytest.raises(ValueError) as caught:
        load_any_classifier(tmp_path / "best.pt")
    found = str(caught.value)
    assert message in found and found.startswith(f"{tmp_path}/best.pt: ")
    assert "\n" not in found and len(found) < 400


@pytest.mark.parametrize("number", [3, 4])
def test_a_method_without_its_tokenizer_is_named(
    word_tokenizer: Tokenizer, tmp_path: Path, number: int
) -> None:
    checkpoint = make_all(word_tokenizer)[number].to_checkpoint()
    del checkpoint["classifier"]["tokenizer"]
    write_checkpoint(tmp_path / "best.pt", checkpoint)
    with pytest.raises(ValueError, match=r"best\.pt: (pooling|head) .* needs the .*tokenizer"):
        load_any_classifier(tmp_path / "best.pt")


def test_label_words_that_do_not_fit_are_named(word_tokenizer: Tokenizer, tmp_path: Path) -> None:
    checkpoint = make_all(word_tokenizer)[4].to_checkpoint()
    checkpoint["classifier"]["label_names"] = ["bad", "awful"]
    write_checkpoint(tmp_path / "best.pt", checkpoint)
    with pytest.raises(ValueError, match=r"best\.pt: .*label word 'awful' is \d+ tokens, not one"):
        load_any_classifier(tmp_path / "best.pt")


def test_only_label_words_have_a_prompt(word_tokenizer: Tokenizer) -> None:
    *others, last = [make_plain(word_tokenizer), *make_all(word_tokenizer)]
    assert all(input_tokenizer(model, word_tokenizer) is word_tokenizer for model in others)
    prompting = input_tokenizer(last, word_tokenizer)
    assert isinstance(prompting, PromptTokenizer) and prompting.prompt == PROMPT


def test_without_a_flag_the_plain_classifier_trains(workplace: Path) -> None:
    options = get_args(["--option", "finetune"])
    assert isinstance(options, FinetuneOptions)
    plain = make_plain(None)
    assert build_method(options, plain, classification_loss).classifier is plain


# -------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize("flags", FLAGS)
def test_classify_gives_the_labels_of_the_run(
    word_workplace: Path, capsys: pytest.CaptureFixture[str], flags: Sequence[str]
) -> None:
    assert main([*FINETUNE, "--causal", "--epochs", "1", *flags]) == 0
    shutil.copy("out/dev-finetuning-output.txt", "dev.txt")
    argv = ["--option", "classify", "--filepath", "out/a.pt", "--input", "data/cfimdb-dev.txt"]
    status, out, err = run(argv, capsys)
    assert status == 0 and "acc :: " in err
    assert [WORDS.index(line.split("\t")[0]) for line in out.splitlines()] == predicted("dev.txt")


@pytest.mark.parametrize(("number", "flags"), [*enumerate(FLAGS)])
@pytest.mark.parametrize("turn", [0, pytest.param(1, marks=pytest.mark.sweep)])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    run_forks: RunForks, word_workplace: Path, number: int, flags: Sequence[str], turn: int
) -> None:
    """By SIGTERM after a step or in an evaluation; signals and modes alternate. Dropout is on."""
    argv = [*FINETUNE, MODES[number % 2 == 0], "--epochs", "2", *flags]
    expected = run_uninterrupted(run_forks, word_workplace, argv)
    strike = [Strike(TERM, "step", 2), Strike(TERM, "eval", 4)][(number // 2 + turn) % 2]
    assert strike_and_resume(run_forks, word_workplace, argv, strike, expected) == (True, True)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.sweep), True])
def test_processes_and_micro_batches_compute_the_same(
    run_forks: RunForks, word_workplace: Path, flags: Sequence[str], causal: bool
) -> None:
    """Two processes, a row at a time; or three, one of which has no row of the last batch."""
    argv = [*FINETUNE, *STILL, MODES[causal], *flags]
    folder = copy_of(word_workplace, "several")
    processes, small = (2, ["--micro_batch_size", "1"]) if causal else (3, [])
    ((status, _, err),) = run_forks([Job([*argv, *small], folder, processes=processes)])
    assert status == 0, err
    assert main(argv) == 0
    assert_close_results(folder, word_workplace)
    assert_close_curves(folder, word_workplace)


def test_a_run_with_another_pooling_cannot_be_resumed(
    run_forks: RunForks, word_workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ((status, *_),) = run_forks([Job(FINETUNE, word_workplace, Strike(TERM, "step", 2))])
    assert status == 128 + TERM
    status, _, err = run([*FINETUNE, "--resume", "--pooling", "mean"], capsys)
    assert status == 2 and "other settings: pooling=last, now mean" in err


def test_two_runs_of_a_command_are_equal(run_forks: RunForks, word_workplace: Path) -> None:
    """Bit for bit, with the pooling that has a parameter of its own."""
    argv = [*FINETUNE, "--epochs", "2", "--pooling", "attention"]
    folders = [copy_of(word_workplace, name) for name in "ab"]
    results = run_forks([Job(argv, folder) for folder in folders])
    assert [result.status for result in results] == [0, 0]
    assert_same_results(*folders)
    query = read_checkpoint(folders[0] / "out/a.pt")["model"]["pooling.query"]
    assert query.abs().min() > 0  # it trains
