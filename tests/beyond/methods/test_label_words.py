"""Prompt-based fine-tuning: its equation, its zero-shot beginning, its words and its prompt."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch

from base_llama import read_checkpoint
from beyond.methods.checkpoints import load_any_classifier
from beyond.methods.label_words import LabelWordClassifier, PromptTokenizer, label_ids
from classifier import ClassifierConfig, LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from llama import load_pretrained
from run_llama import main
from tests.beyond.methods.conftest import PROMPT, WORDS
from tests.conftest import SENTENCES, make_llama, pad_rows, save_llama
from tests.test_run_llama import FINETUNE, predicted, run
from tokenizer import Tokenizer

TEXTS = [line.split(" ||| ")[1] for line in SENTENCES]
LABEL_WORDS = [*FINETUNE, "--head", "label_words"]


def make_classifier(causal: bool, tokenizer: Tokenizer, **shape: Any) -> LabelWordClassifier:
    config = ClassifierConfig(2, "", 0.3, "finetune")
    plain = LlamaEmbeddingClassifier(config, make_llama(causal, **shape), WORDS, tokenizer)
    return LabelWordClassifier(plain, f"{PROMPT} ").eval()


# --------------------------------------------------------------------------------------- equation


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_probabilities_are_the_equation(
    word_tokenizer: Tokenizer, causal: bool, tied: bool
) -> None:
    """Against NumPy in float64, from the hidden state of each row's own last token."""
    model = make_classifier(causal, word_tokenizer, tie_embeddings=tied)
    tokens, lengths = pad_rows([[1, 20, 33], [1, 7, 300, 41, 5], [1, 99]], pad_id=3)
    found = model(tokens, lengths).exp().detach().numpy()
    hidden = model.llama.compute_hidden(tokens).detach().double().numpy()
    w = model.llama.output.weight.detach().double().numpy()
    bad, good = (word_tokenizer.sp_model.piece_to_id(piece) for piece in ("▁bad", "▁good"))
    for row in range(3):
        h = hidden[row, int(lengths[row]) - 1]
        scores = np.array([np.exp(w[bad] @ h), np.exp(w[good] @ h)])
        np.testing.assert_allclose(found[row], scores / scores.sum(), atol=1e-5)


def encode(tokenizer: Tokenizer) -> list[list[int]]:
    """Return the prompts of the sentences, without the trailing space."""
    return [tokenizer.encode(text + PROMPT, bos=True, eos=False) for text in TEXTS]


@pytest.mark.parametrize("causal", [False, True])
def test_before_training_it_is_the_zero_shot_classifier(
    word_tokenizer: Tokenizer, causal: bool
) -> None:
    """Its scores among the label words: their log-probabilities, up to a constant of each row.

    In reference mode prompts are compared one by one: there the zero-shot classifier reads the
    last column, which may be padding.
    """
    model = make_classifier(causal, word_tokenizer)
    zero_shot = LlamaZeroShotClassifier(
        ClassifierConfig(2, "", 0.0, "prompt"), word_tokenizer, WORDS, model.llama, f"{PROMPT} "
    )
    rows = encode(word_tokenizer)
    for batch in [rows] if causal else [[row] for row in rows]:
        ours, theirs = (m(*pad_rows(batch, pad_id=3)) for m in (model, zero_shot))
        assert ours.argmax(dim=-1).tolist() == theirs.argmax(dim=-1).tolist()
        torch.testing.assert_close(ours, theirs.log_softmax(dim=-1), atol=1e-5, rtol=0)


def test_everything_trains_and_nothing_else_is_there(word_tokenizer: Tokenizer) -> None:
    """Also an output projection of its own, which the linear head leaves out."""
    for tied in (True, False):
        model = make_classifier(True, word_tokenizer, tie_embeddings=tied)
        tokens, lengths = pad_rows(encode(word_tokenizer), pad_id=3)
        model(tokens, lengths)[:, 0].sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        assert all(name.startswith("llama.") for name in model.state_dict())
        changed = model.llama.output.weight.grad
        assert changed is not None
        if not tied:
            assert changed.abs().sum(dim=1).nonzero().flatten().tolist() == sorted(
                word_tokenizer.sp_model.piece_to_id(piece) for piece in ("▁bad", "▁good")
            )


def test_dropout_acts_in_training_only(word_tokenizer: Tokenizer) -> None:
    model = make_classifier(True, word_tokenizer)
    tokens = torch.tensor(encode(word_tokenizer)[:1])
    torch.manual_seed(0)
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))


# ------------------------------------------------------------------------------ words and prompt


def test_label_ids_are_the_tokens_that_follow_the_prompt(word_tokenizer: Tokenizer) -> None:
    before = word_tokenizer.encode(TEXTS[0] + PROMPT, bos=True, eos=False)
    for name, number in zip(WORDS, label_ids(WORDS, word_tokenizer, PROMPT), strict=True):
        after = word_tokenizer.encode(f"{TEXTS[0]}{PROMPT} {name}", bos=True, eos=False)
        assert after == [*before, number]


def test_words_that_are_not_one_token_are_refused(word_tokenizer: Tokenizer) -> None:
    for words, message in (
        (["bad", "awful"], "the label word 'awful' is [0-9]+ tokens, not one"),
        (["映画", "bad"], "the label word '映画' is [0-9]+ tokens, not one"),  # bytes
        (["bad", "good bad"], "the label word 'good bad' is 2 tokens, not one"),
        (["bad", "bad "], "the label word 'bad ' is 2 tokens, not one"),
        (["x" * 1000, "bad"], r"the label word 'xx+\.\.\.x+' is"),
    ):
        with pytest.raises(ValueError, match=rf"--head label_words: {message}"):
            label_ids(words, word_tokenizer, PROMPT)


def train_tokenizer_without_bytes(tmp_path: Path) -> Path:
    """Train a tokenizer without byte pieces, which ignores case; returns its path."""
    (tmp_path / "corpus.txt").write_text("\n".join([*TEXTS, *["bad good"] * 50]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "t"),
        vocab_size=90,
        model_type="bpe",
        normalization_rule_name="nmt_nfkc_cf",
        minloglevel=2,
    )
    return tmp_path / "t.model"


def test_words_that_the_tokenizer_does_not_know_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(None, train_tokenizer_without_bytes(tmp_path))
    assert len(label_ids(WORDS, tokenizer, PROMPT)) == 2
    with pytest.raises(ValueError, match="the label word '映画' is unknown to the tokenizer"):
        label_ids(["bad", "映画"], tokenizer, PROMPT)
    with pytest.raises(ValueError, match="the label word 'Bad' is the same token as another one"):
        label_ids(["bad", "Bad"], tokenizer, PROMPT)


def test_the_prompt_follows_whole_sentences_and_truncated_ones(word_tokenizer_path: Path) -> None:
    for max_len in (None, 1, 7, 500):
        tokenizer = Tokenizer(max_len, word_tokenizer_path)
        both = PromptTokenizer(tokenizer, PROMPT)
        assert (both.pad_id, both.n_words) == (tokenizer.pad_id, tokenizer.n_words)
        endless = Tokenizer(None, word_tokenizer_path)
        question = endless.encode("." + PROMPT, bos=False, eos=False)
        question = question[len(endless.encode(".", bos=False, eos=False)) :]
        for text in TEXTS:
            sentence = tokenizer.encode(text, bos=True, eos=False)  # truncated
            assert both.encode(text, bos=True, eos=False) == sentence + question
            assert both.encode(text, bos=False, eos=True) == [*sentence[1:], *question, 2]
        batch = both.encode_batch(TEXTS, bos=True, eos=False)
        assert batch == [both.encode(text, bos=True, eos=False) for text in TEXTS]
        assert both.decode(question) == endless.decode(question)
        assert both.label_tokens("good", PROMPT) == endless.encode("good", bos=False, eos=False)
        assert both.files() == tokenizer.files()


# ---------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize("mode", ["--no-causal", "--causal"])
def test_finetune(word_workplace: Path, capsys: pytest.CaptureFixture[str], mode: str) -> None:
    """Predictions are those of the checkpoint; all weights train; the checkpoint names it."""
    status, out, err = run([*LABEL_WORDS, mode], capsys)
    assert (status, err) == (0, "") and "epoch 1: train loss :: " in out
    path = "output/task_3/cfimdb-finetune-2-0.001.pt"
    stored = read_checkpoint(path)["classifier"]
    assert stored["method"] == {"head": "label_words", "prompt": PROMPT}
    model = load_any_classifier(path)
    assert isinstance(model, LabelWordClassifier)
    rows = encode(Tokenizer())
    groups = [rows[start : start + 3] for start in (0, 3, 6)]
    expected = [
        label
        for group in groups
        for label in model(*pad_rows(group, pad_id=3)).argmax(dim=-1).tolist()
    ]
    assert expected == predicted("output/task_3/cfimdb-dev-finetuning-output.txt")
    start = load_pretrained("stories42M.pt")
    for name, parameter in model.llama.named_parameters():
        assert not torch.equal(parameter, start.get_parameter(name)), f"{name} did not train"


def test_without_training_it_predicts_as_the_zero_shot_task(word_workplace: Path) -> None:
    argv = ["--causal", "--batch_size", "3"]
    flags = ["--lr", "0", "--epochs", "1", "--head", "label_words"]
    assert main(["--option", "finetune", *argv, *flags]) == 0
    assert main(["--option", "prompt", *argv, "--no_trailing_space"]) == 0
    tuned = predicted("output/task_3/cfimdb-dev-finetuning-output.txt")
    assert tuned == predicted("output/task_2/cfimdb-dev-prompting-output.txt")
    assert len(set(tuned)) == 2


def test_it_memorises_eight_sentences(
    word_workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*LABEL_WORDS, "--causal", "--batch_size", "8", "--epochs", "25"]
    status, out, _ = run([*argv, "--hidden_dropout_prob", "0"], capsys)
    assert status == 0 and "train acc :: 1.000" in out and "test acc :: 1.000" in out


@pytest.mark.parametrize("mode", ["--no-causal", "--causal"])
def test_classify_adds_the_prompt(
    word_workplace: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    """The labels of dev in file order and, in reference mode, of batches of one."""
    flags = [mode, "--filepath", "best.pt", "--batch_size", "1", "--max_sentence_len", "9"]
    assert main([*LABEL_WORDS, *flags]) == 0
    expected = [WORDS[i] for i in predicted("output/task_3/cfimdb-dev-finetuning-output.txt")]
    for name in ("stories42M.pt", "tokenizer.model"):
        Path(name).unlink()
    argv = ["--option", "classify", "--filepath", "best.pt", "--input", "data/cfimdb-dev.txt"]
    status, out, _ = run(argv, capsys)
    assert status == 0 and [line.split("\t")[0] for line in out.splitlines()] == expected
    names = ["--label-names", "names.json"]  # other names for the labels, not other tokens
    Path("names.json").write_text(json.dumps(["no", "yes"]))
    status, out, _ = run([*argv, *names], capsys)
    renamed = [{"bad": "no", "good": "yes"}[name] for name in expected]
    assert status == 0 and [line.split("\t")[0] for line in out.splitlines()] == renamed


def test_a_sentence_that_does_not_fit_with_its_prompt(
    word_workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The advice takes the prompt into account, and works."""
    assert main([*LABEL_WORDS, "--filepath", "best.pt"]) == 0
    Path("in.txt").write_text("a film and a film " * 12)
    argv = ["--option", "classify", "--filepath", "best.pt", "--input", "in.txt"]
    status, _, err = run(argv, capsys)
    tokenizer = Tokenizer()
    n_prompt = len(tokenizer.encode(PROMPT, bos=True, eos=False))
    assert status == 2 and err.endswith(
        "tokens are more than the classifier's 128; shorten the sentence or use "
        f"--max_sentence_len {128 - n_prompt}\n"
    )
    assert main([*argv, "--max_sentence_len", str(128 - n_prompt)]) == 0
    Path("long.txt").write_text("0 ||| " + "a film and a film " * 12)
    status, _, err = run([*LABEL_WORDS, "--dev", "long.txt", "--dataset", "cfimdb"], capsys)
    advice = f"--max_sentence_len {128 - n_prompt}"
    assert status == 2 and err.endswith(f"shorten the sentence or use {advice}\n")
    flags = ["--dev", "long.txt", "--dataset", "cfimdb", *advice.split()]
    assert main([*LABEL_WORDS, *flags]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bad", "wonderful"], r"the label word 'wonderful' is \d+ tokens, not one"),
        (["bad", "映画"], r"the label word '映画' is \d+ tokens, not one"),
    ],
)
def test_bad_words_are_one_line(
    word_workplace: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    check_bad_words(capsys, words, message)


def test_an_unknown_word_is_one_line(
    word_workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_llama(make_llama(causal=True, vocab_size=90), Path("stories42M.pt"))
    flags = ["--tokenizer_path", str(train_tokenizer_without_bytes(tmp_path))]
    check_bad_words(
        capsys, ["bad", "映画"], "the label word '映画' is unknown to the tokenizer", flags
    )


def check_bad_words(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str, flags: Sequence[str] = ()
) -> None:
    """A run with these words ends before any training, with one line."""
    Path("words.json").write_text(json.dumps(words))
    status, out, err = run([*LABEL_WORDS, "--label-names", "words.json", *flags], capsys)
    assert status == 2 and "epoch" not in out and err.count("\n") == 1
    start = "run_llama.py: error: --head label_words: "
    end = "; choose another word (--label-names) or --head linear\n"
    assert err.startswith(start) and err.endswith(end)
    assert re.fullmatch(message, err.removeprefix(start).removesuffix(end))
