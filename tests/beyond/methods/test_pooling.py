"""Pooling: each equation, which tokens it reads, and the layers that `--pool_layer` drops."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from base_llama import read_checkpoint, write_checkpoint
from beyond.methods.pooling import (
    AttentionPooling,
    BeforeStopPooling,
    MaxPooling,
    MeanPooling,
    PooledClassifier,
    cut_layers,
    stop_ids,
)
from classifier import ClassifierConfig, LlamaEmbeddingClassifier, load_classifier
from run_llama import main
from tests.conftest import make_llama, pad_rows
from tests.test_run_llama import FINETUNE, run
from tokenizer import Tokenizer

POOLINGS = ["mean", "max", "attention", "before_stop"]
LENGTHS = [3, 7, 2, 5]


def make_classifier(
    causal: bool, tokenizer: Tokenizer | None = None, **shape: Any
) -> LlamaEmbeddingClassifier:
    config = ClassifierConfig(3, "", 0.3, "finetune")
    return LlamaEmbeddingClassifier(config, make_llama(causal, **shape), None, tokenizer).eval()


def random_hidden() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (4, 7, 5), tokens and lengths; at padding the numbers are huge."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 7, 5, generator=generator)
    for row, length in zip(hidden, LENGTHS, strict=True):
        row[length:] = 1e9
    return hidden, torch.randint(3, 300, (4, 7), generator=generator), torch.tensor(LENGTHS)


# ------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize("name", ["mean", "max", "attention"])
def test_pooling_is_its_equation_over_a_sentences_own_tokens(name: str) -> None:
    """Against NumPy in float64, row by row; 1e-6 is a few rounding errors of float32."""
    hidden, tokens, lengths = random_hidden()
    modules: dict[str, nn.Module] = {"mean": MeanPooling(), "max": MaxPooling()}
    modules["attention"] = AttentionPooling(5)
    query = np.array([0.5, -1.0, 2.0, 0.25, -0.125])
    with torch.no_grad():
        modules["attention"].query.copy_(torch.tensor(query))  # type: ignore[operator]
    found = modules[name](hidden, tokens, lengths)
    for row, length, ours in zip(hidden.double().numpy(), LENGTHS, found, strict=True):
        h = row[:length]
        if name == "mean":
            expected = h.sum(axis=0) / length
        elif name == "max":
            expected = np.array([max(column) for column in h.T])
        else:
            weights = np.exp(h @ query) / np.exp(h @ query).sum()
            expected = sum(a * x for a, x in zip(weights, h, strict=True))
        np.testing.assert_allclose(ours.detach().numpy(), expected, atol=1e-6, rtol=0)


def test_attention_starts_as_the_mean_and_draws_nothing() -> None:
    hidden, tokens, lengths = random_hidden()
    state = torch.get_rng_state()
    attention = AttentionPooling(5)
    assert torch.equal(torch.get_rng_state(), state)
    mean = MeanPooling()(hidden, tokens, lengths)
    torch.testing.assert_close(attention(hidden, tokens, lengths), mean, atol=1e-6, rtol=0)


def test_before_stop_takes_the_token_before_the_final_stop(word_tokenizer: Tokenizer) -> None:
    """`.`, `!` or `?`, with a space before it or not; else the last token."""
    cases = {
        "a good film .": -2,
        "a good film.": -2,
        "a bad film!": -2,
        "a film ?": -2,
        "a film . .": -2,
        "no stop": -1,
        "a film . '": -1,
        ".": -1,  # before it is only BOS
        "a": -1,
    }
    rows = [word_tokenizer.encode(text, bos=True, eos=False) for text in cases]
    tokens, lengths = pad_rows(rows, pad_id=word_tokenizer.encode_text("a.")[-1])
    found = BeforeStopPooling(word_tokenizer).positions(tokens, lengths)
    expected = [len(row) + place for row, place in zip(rows, cases.values(), strict=True)]
    assert found.tolist() == expected


def test_stops_are_pieces_of_the_tokenizer(tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(None, tokenizer_path)
    pieces = {tokenizer.sp_model.id_to_piece(number) for number in stop_ids(tokenizer)}
    assert pieces == {".", "▁.", "<0x21>", "<0x3F>"}  # rare ones are bytes here

    class Without(Tokenizer):
        def decode(self, ids: Any) -> str:
            return "..."  # as if there were larger pieces only

    with pytest.raises(ValueError, match=r"before_stop: none of \. ! \? is a token"):
        BeforeStopPooling(Without(None, tokenizer_path))


# ---------------------------------------------------------------------------------- the classifier


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", POOLINGS)
def test_the_head_is_on_the_pooled_hidden_states(
    word_tokenizer: Tokenizer, name: str, causal: bool
) -> None:
    plain = make_classifier(causal, word_tokenizer)
    model = PooledClassifier(plain, name).eval()
    if name == "attention":
        torch.nn.init.normal_(model.pooling.query)  # type: ignore[arg-type]
    texts = ["a good film .", "bad", "a moving film about two sisters ."]
    rows = [word_tokenizer.encode(text, bos=True, eos=False) for text in texts]
    tokens, lengths = pad_rows(rows, pad_id=3)
    _, hidden = plain.llama(tokens)
    for i, row in enumerate(rows):
        h = hidden[i, : len(row)]
        vectors = {"mean": h.mean(dim=0), "max": h.max(dim=0).values}
        vectors["before_stop"] = h[-2] if texts[i].endswith(".") else h[-1]
        if name == "attention":
            weights = (h @ model.pooling.query).exp()
            vectors["attention"] = (weights[:, None] * h).sum(dim=0) / weights.sum()
        logits = plain.classifier_head.weight @ vectors[name] + plain.classifier_head.bias
        expected = logits - logits.exp().sum().log()
        torch.testing.assert_close(model(tokens, lengths)[i], expected, atol=1e-5, rtol=0)
    # without lengths there is no padding
    alone = model(torch.tensor(rows[:1]), lengths[:1])
    assert torch.equal(model(torch.tensor(rows[:1])), alone)


@pytest.mark.parametrize("name", POOLINGS)
def test_the_limit_case_is_the_plain_classifier(word_tokenizer: Tokenizer, name: str) -> None:
    """Sentences of one token, or without a final stop: predictions bit for bit.

    The gradients of lower layers are sums in another order.
    """
    rows = [[7], [20], [99]]
    if name == "before_stop":
        texts = ["a good film", "bad", "a moving film about two sisters"]
        rows = [word_tokenizer.encode(text, bos=True, eos=False) for text in texts]
    tokens, lengths = pad_rows(rows, pad_id=3)
    found = []
    for pooled in (False, True):
        classifier = make_classifier(True, word_tokenizer)
        model = PooledClassifier(classifier, name).eval() if pooled else classifier
        output = model(tokens, lengths)
        output[:, 0].sum().backward()
        gradients = [p.grad for n, p in model.named_parameters() if "pooling" not in n]
        found.append([output, *(g for g in gradients if g is not None)])
    assert len(found[0]) > 10 and torch.equal(found[0][0], found[1][0])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", POOLINGS)
def test_causal_predictions_do_not_depend_on_padding(word_tokenizer: Tokenizer, name: str) -> None:
    model = PooledClassifier(make_classifier(True, word_tokenizer), name).eval()
    rows = [[1, 20, 33], [1, 7, 300, 41, 5, 6, 9], [1, 99]]
    tokens, lengths = pad_rows(rows, pad_id=3)
    together = model(tokens, lengths)
    alone = torch.cat([model(torch.tensor([row]), torch.tensor([len(row)])) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", POOLINGS)
def test_a_pooling_changes_neither_the_head_nor_the_random_state(
    word_tokenizer: Tokenizer, name: str
) -> None:
    plain = make_classifier(False, word_tokenizer)
    state = torch.get_rng_state()
    model = PooledClassifier(plain, name)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.classifier_head is plain.classifier_head and model.llama is plain.llama


@pytest.mark.parametrize("name", POOLINGS)
def test_every_parameter_that_trains_gets_a_gradient(word_tokenizer: Tokenizer, name: str) -> None:
    """As averaging over processes needs; after `cut_layers` too, and without tied embeddings."""
    plain = make_classifier(True, word_tokenizer, tie_embeddings=False)
    cut_layers(plain.llama, 1)
    model = PooledClassifier(plain, name)
    model(torch.tensor([[1, 5, 9], [1, 7, 8]]))[:, 0].sum().backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set()
    assert not model.llama.output.weight.requires_grad


# ---------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("causal", [False, True])
def test_a_cut_model_computes_the_first_layers_and_the_final_norm(causal: bool) -> None:
    plain = make_classifier(causal, n_layers=3)
    tokens, lengths = pad_rows([[1, 20, 33], [1, 7, 300, 41]], pad_id=3)
    llama = plain.llama
    h = llama.tok_embeddings(tokens)
    for layer in list(llama.layers)[:2]:
        h = layer(h)
    h = h / (h.pow(2).mean(dim=-1, keepdim=True) + llama.config.layer_norm_eps).sqrt()
    h = h * llama.norm.weight
    last = h[torch.arange(2), lengths - 1] if causal else h[:, -1]
    logits = last @ plain.classifier_head.weight.T + plain.classifier_head.bias
    cut_layers(llama, 2)
    torch.testing.assert_close(plain(tokens, lengths), logits.log_softmax(-1), atol=1e-5, rtol=0)
    names = {name.split(".")[1] for name, _ in llama.named_parameters() if "layers" in name}
    assert names == {"0", "1"} and llama.config.n_layers == 2


def test_a_cut_models_checkpoint_is_a_plain_one(tmp_path: Path) -> None:
    """The assignment's `load_classifier` reads it, and it is smaller."""
    plain = make_classifier(True, n_layers=3)
    before = sum(parameter.numel() for parameter in plain.parameters())
    cut_layers(plain.llama, 1)
    write_checkpoint(tmp_path / "best.pt", plain.to_checkpoint())
    loaded = load_classifier(tmp_path / "best.pt")
    assert sum(parameter.numel() for parameter in loaded.parameters()) < before
    tokens = torch.tensor([[1, 5, 9]])
    assert torch.equal(loaded(tokens), plain(tokens))


@pytest.mark.parametrize("number", [0, 3])
def test_a_layer_that_the_model_lacks_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=rf"--pool_layer {number}: the model has 2 layers"):
        cut_layers(make_llama(False), number)


# -------------------------------------------------------------------------------- command lines


def test_all_layers_are_plain_fine_tuning(workplace: Path) -> None:
    """Bit for bit, dropout and all."""
    argv = [*FINETUNE, "--epochs", "1", "--dropout", "0.1"]
    weights = []
    for name, flags in (("a", []), ("b", ["--pool_layer", "2", "--pooling", "last"])):
        assert main([*argv, *flags, "--filepath", f"{name}.pt"]) == 0
        weights.append(read_checkpoint(f"{name}.pt")["model"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("name", POOLINGS)
def test_the_seed_alone_determines_the_head(workplace: Path, name: str) -> None:
    """At a learning rate of 0 the checkpoint holds the head as it was drawn."""
    heads = []
    for flags in ([], ["--pooling", name]):
        assert main([*FINETUNE, "--epochs", "1", "--lr", "0", "--filepath", "a.pt", *flags]) == 0
        heads.append(read_checkpoint("a.pt")["model"]["classifier_head.weight"])
    assert torch.equal(*heads)


@pytest.mark.parametrize(
    "flags",
    [
        ["--pooling", "mean"],
        ["--pooling", "max", "--causal"],
        ["--pooling", "attention", "--causal"],
        ["--pooling", "before_stop"],
        ["--pool_layer", "1", "--causal"],
    ],
)
def test_each_pooling_memorises_eight_sentences(
    workplace: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    argv = ["--option", "finetune", "--epochs", "25", "--lr", "1e-3", "--batch_size", "8"]
    argv += ["--hidden_dropout_prob", "0", *flags]
    status, out, _ = run(argv, capsys)
    assert status == 0 and "train acc :: 1.000" in out and "test acc :: 1.000" in out


def test_too_many_layers_are_one_line(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run([*FINETUNE, "--pool_layer", "9"], capsys)
    assert status == 2
    assert err == (
        "run_llama.py: error: --pool_layer 9: the model has 2 layers; choose one from 1 to 2\n"
    )
