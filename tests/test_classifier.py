"""The classifiers: what they read, how they score, and what a prediction depends on."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from base_llama import write_checkpoint
from beyond.decoding import prepare_for_decoding
from classifier import (
    LlamaEmbeddingClassifier,
    LlamaZeroShotClassifier,
    last_positions,
    load_classifier,
)
from llama import Llama
from tests.conftest import ROOT, make_llama, pad_rows, save_llama
from tests.oracle import numpy_forward
from tokenizer import Tokenizer

BYTES = torch.arange(256, dtype=torch.uint8)
SEQUENCES = [[1, 20, 33], [1, 7, 300, 41, 5, 6, 9], [1, 99], [1, 12, 13, 14, 15]]


def config_of(**values: Any) -> Any:
    defaults = {"num_labels": 2, "pretrained_model_path": "none.pt"}
    defaults |= {"hidden_dropout_prob": 0.3, "option": "finetune"}
    return SimpleNamespace(**{**defaults, **values})


class StubLlama(nn.Module):
    """A model whose "hidden states" are chosen logits and whose projection changes nothing."""

    def __init__(self, logits: Tensor, causal: bool) -> None:
        super().__init__()
        self.logits = logits
        self.config = SimpleNamespace(causal=causal)
        self.output = nn.Identity()

    def compute_hidden(self, tokens: Tensor, *, positions: Tensor) -> Tensor:
        return self.logits[torch.arange(len(tokens)), positions, None]


@pytest.mark.parametrize("causal", [False, True])
def test_zero_shot_sums_log_probabilities_at_one_position(
    tokenizer_path: Path, causal: bool
) -> None:
    """The last column in reference mode, each row's own last token in causal mode."""
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    names = ["dull", "wonderful film"]
    logits = torch.randn(3, 5, 320, generator=torch.Generator().manual_seed(0))
    model: Any = LlamaZeroShotClassifier(
        config_of(),
        tokenizer,
        names,
        llama=StubLlama(logits, causal),  # type: ignore[arg-type]
    )
    lengths = torch.tensor([2, 5, 3])
    scores = model(torch.zeros(3, 5, dtype=torch.long), lengths)
    assert scores.shape == (3, 2)
    for row in range(3):
        column = int(lengths[row]) - 1 if causal else 4
        log_probs = logits[row, column] - logits[row, column].exp().sum().log()
        for label, name in enumerate(names):
            ids = tokenizer.encode(name, bos=False, eos=False)
            assert len(ids) > 1
            expected = sum(log_probs[i].item() for i in ids)
            assert scores[row, label].item() == pytest.approx(expected, abs=1e-4)


def test_last_positions() -> None:
    """The last column in reference mode or without lengths, else each row's own last token."""
    tokens, lengths = torch.zeros(3, 5, dtype=torch.long), torch.tensor([1, 2, 5])
    assert last_positions(tokens, None, causal=True).tolist() == [4, 4, 4]
    assert last_positions(tokens, lengths, causal=False).tolist() == [4, 4, 4]
    assert last_positions(tokens, lengths, causal=True).tolist() == [0, 1, 4]


def counted(model: nn.Module) -> dict[str, int]:
    """Count the rows that each linear layer of a model is given, from now on."""
    counts: dict[str, int] = {}

    def count(name: str, inputs: tuple[Tensor, ...]) -> None:
        counts[name] = inputs[0].shape[:-1].numel()

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: count(name, inputs))
    return counts


@pytest.mark.parametrize("causal", [False, True])
def test_the_last_layer_computes_only_what_is_read(tokenizer_path: Path, causal: bool) -> None:
    """Only keys and values of the other positions: the rest of it for one position of each row."""
    tokens, lengths = pad_rows(SEQUENCES, pad_id=3)  # (4, 7)
    for model in classifiers(causal, tokenizer_path):
        counts = counted(model.llama)  # type: ignore[arg-type]
        model(tokens, lengths)
        assert len(counts) == (15 if isinstance(model, LlamaZeroShotClassifier) else 14)
        for name, count in counts.items():
            is_for_all = "layers.0" in name or "key" in name or "value" in name
            assert count == (28 if is_for_all else 4), name


def classifiers(causal: bool, tokenizer_path: Path) -> list[nn.Module]:
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    zero_shot = LlamaZeroShotClassifier(config_of(), tokenizer, ["bad", "good"], make_llama(causal))
    return [zero_shot, LlamaEmbeddingClassifier(config_of(), make_llama(causal)).eval()]


def test_causal_predictions_do_not_depend_on_batch_order_or_padding(tokenizer_path: Path) -> None:
    for model in classifiers(True, tokenizer_path):
        tokens, lengths = pad_rows(SEQUENCES, pad_id=3)
        together = model(tokens, lengths)
        alone = torch.cat([model(torch.tensor([s]), torch.tensor([len(s)])) for s in SEQUENCES])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
        order = [2, 0, 3, 1]
        torch.testing.assert_close(
            model(tokens[order], lengths[order]), together[order], atol=1e-5, rtol=0
        )
        wider = torch.nn.functional.pad(tokens, (0, 9), value=77)
        torch.testing.assert_close(model(wider, lengths), together, atol=1e-5, rtol=0)


def test_prepared_model_scores_alike(tokenizer_path: Path) -> None:
    """What `--option prompt` runs in causal mode: the same in float32, near in bfloat16."""
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    llama = make_llama(causal=True)
    expected, exact, half = (
        LlamaZeroShotClassifier(config_of(), tokenizer, ["bad", "good"], model)(
            *pad_rows(SEQUENCES, pad_id=3)
        )
        for model in (
            llama,
            prepare_for_decoding(llama, exact_head=True),
            prepare_for_decoding(llama, torch.bfloat16, exact_head=True),
        )
    )
    assert exact.dtype == half.dtype == torch.float32
    torch.testing.assert_close(exact, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(half, expected, atol=0.05 * expected.std().item(), rtol=0)
    assert len(half.unique()) == half.numel()  # nothing is rounded to bfloat16


def test_reference_predictions_depend_on_padding(tokenizer_path: Path) -> None:
    """Faithful: the last column is read and padding is attended to."""
    for model in classifiers(False, tokenizer_path):
        tokens, lengths = pad_rows(SEQUENCES, pad_id=3)
        together = model(tokens, lengths)
        assert torch.equal(together, model(tokens))  # lengths are not even looked at
        alone = model(torch.tensor(SEQUENCES[:1]))
        assert (together[:1] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [False, True])
def test_embedding_classifier_is_a_head_on_the_hidden_state(causal: bool) -> None:
    llama = make_llama(causal)
    model = LlamaEmbeddingClassifier(config_of(num_labels=5), llama).eval()
    tokens, lengths = pad_rows(SEQUENCES, pad_id=3)
    log_probs = model(tokens, lengths)
    _, hidden = llama(tokens)
    columns = lengths - 1 if causal else torch.full((4,), -1)
    logits = hidden[torch.arange(4), columns] @ model.classifier_head.weight.T
    expected = (logits + model.classifier_head.bias).softmax(dim=-1).log()
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(log_probs.exp().sum(dim=-1), torch.ones(4))


def test_embedding_classifier_projects_no_vocabulary() -> None:
    llama = make_llama(causal=False)
    model = LlamaEmbeddingClassifier(config_of(), llama)
    llama.output.forward = None  # type: ignore[method-assign, assignment]  # calling it would fail
    model(torch.tensor(SEQUENCES[:1]))


def test_dropout_acts_on_the_hidden_state_in_training_only() -> None:
    model = LlamaEmbeddingClassifier(config_of(hidden_dropout_prob=0.5), make_llama(False))
    tokens = torch.tensor(SEQUENCES[:1])
    torch.manual_seed(0)
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))


def test_zero_shot_of_an_untied_model_uses_its_output_matrix(tokenizer_path: Path) -> None:
    """The oracle is NumPy's forward pass; the prepared model scores alike."""
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    llama = make_llama(causal=True, tie_embeddings=False, rope_theta=500000.0)
    tokens, lengths = pad_rows(SEQUENCES, pad_id=3)
    logits = torch.tensor(numpy_forward(llama, tokens)[0])  # (batch, seq, vocab)
    log_probs = logits[torch.arange(len(tokens)), lengths - 1].log_softmax(dim=-1)
    ids = [tokenizer.encode(name, bos=False, eos=False) for name in ("bad", "good")]
    expected = torch.stack([log_probs[:, i].sum(dim=-1) for i in ids], dim=-1).float()
    for model in (llama, prepare_for_decoding(llama, exact_head=True)):
        zero_shot = LlamaZeroShotClassifier(config_of(), tokenizer, ["bad", "good"], model)
        torch.testing.assert_close(zero_shot(tokens, lengths), expected, atol=1e-4, rtol=0)


def test_what_trains() -> None:
    """Zero-shot nothing, fine-tuning everything that is used, any other option the head alone."""

    def trained(model: nn.Module) -> set[bool]:
        return {parameter.requires_grad for parameter in model.parameters()}

    finetuned = LlamaEmbeddingClassifier(config_of(), make_llama(False))
    assert trained(finetuned) == {True}
    probed = LlamaEmbeddingClassifier(config_of(option="probe"), make_llama(False))
    assert trained(probed.llama) == {False} and trained(probed.classifier_head) == {True}
    untied = LlamaEmbeddingClassifier(config_of(), make_llama(False, tie_embeddings=False))
    frozen = [name for name, parameter in untied.named_parameters() if not parameter.requires_grad]
    assert frozen == ["llama.output.weight"]
    untied(torch.tensor(SEQUENCES[:1])).sum().backward()
    unused = [name for name, parameter in untied.named_parameters() if parameter.grad is None]
    assert unused == frozen


def test_models_are_loaded_from_the_configured_path(
    llama: Llama, tmp_path: Path, tokenizer_path: Path
) -> None:
    save_llama(llama, tmp_path / "model.pt")
    config = config_of(pretrained_model_path=str(tmp_path / "model.pt"))
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    zero_shot = LlamaZeroShotClassifier(config, tokenizer, ["bad", "good"])
    assert not any(parameter.requires_grad for parameter in zero_shot.parameters())
    for model in (zero_shot, LlamaEmbeddingClassifier(config)):
        assert torch.equal(model.llama.output.weight, llama.output.weight)


def test_label_names_must_fit(tokenizer_path: Path, llama: Llama) -> None:
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    with pytest.raises(ValueError, match="3 label names for num_labels=2"):
        LlamaZeroShotClassifier(config_of(), tokenizer, ["a", "b", "c"], llama)
    with pytest.raises(ValueError, match="'' has no tokens"):
        LlamaZeroShotClassifier(config_of(), tokenizer, ["a", ""], llama)


def test_a_checkpoint_holds_words_and_tokenizer(tmp_path: Path, tokenizer_path: Path) -> None:
    """A checkpoint of the first version holds neither."""
    for max_len in (None, 7):
        tokenizer = Tokenizer(max_len, tokenizer_path)
        model = LlamaEmbeddingClassifier(config_of(), make_llama(True), ["no", "はい"], tokenizer)
        write_checkpoint(tmp_path / "best.pt", model.to_checkpoint())
        loaded = load_classifier(tmp_path / "best.pt")
        assert loaded.label_names == ["no", "はい"] and loaded.tokenizer is not None
        assert loaded.tokenizer.content == tokenizer_path.read_bytes()
        assert loaded.tokenizer.max_len == max_len
    model = LlamaEmbeddingClassifier(config_of(), make_llama(True))
    assert model.to_checkpoint()["classifier"] == {"num_labels": 2, "hidden_dropout_prob": 0.3}
    write_checkpoint(tmp_path / "best.pt", model.to_checkpoint())
    loaded = load_classifier(tmp_path / "best.pt")
    assert loaded.label_names is None and loaded.tokenizer is None


def test_a_checkpoint_with_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(None, ROOT / "data" / "demo" / "tokenizer.model")
    model = LlamaEmbeddingClassifier(config_of(), make_llama(True), ["a", "b"], tokenizer)
    write_checkpoint(tmp_path / "best.pt", model.to_checkpoint())
    with pytest.raises(ValueError, match="the tokenizer has a vocabulary of .* model's is 320"):
        load_classifier(tmp_path / "best.pt")


@pytest.mark.parametrize("causal", [False, True])
def test_saved_classifier_is_whole_without_the_pretrained_file(
    tmp_path: Path, causal: bool
) -> None:
    model = LlamaEmbeddingClassifier(config_of(num_labels=5), make_llama(causal)).eval()
    write_checkpoint(tmp_path / "best.pt", model.to_checkpoint())
    loaded = load_classifier(tmp_path / "best.pt")
    tokens, lengths = pad_rows(SEQUENCES, pad_id=3)
    assert torch.equal(loaded(tokens, lengths), model(tokens, lengths))
    assert loaded.dropout.p == 0.3 and loaded.llama.config.causal == causal
    assert loaded.llama.tok_embeddings.weight is loaded.llama.output.weight


def test_saved_classifier_of_an_untied_model_keeps_both_matrices(tmp_path: Path) -> None:
    llama = make_llama(False, tie_embeddings=False, rope_theta=500000.0)
    model = LlamaEmbeddingClassifier(config_of(), llama).eval()
    write_checkpoint(tmp_path / "best.pt", model.to_checkpoint())
    loaded = load_classifier(tmp_path / "best.pt")
    assert loaded.llama.config == llama.config
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert torch.equal(loaded(torch.tensor(SEQUENCES[:1])), model(torch.tensor(SEQUENCES[:1])))


def test_a_classifier_of_an_earlier_version_is_tied(tmp_path: Path) -> None:
    """Its config has no field for it."""
    model = LlamaEmbeddingClassifier(config_of(), make_llama(False)).eval()
    checkpoint = model.to_checkpoint()
    del checkpoint["model_args"]["tie_embeddings"], checkpoint["model_args"]["rope_theta"]
    write_checkpoint(tmp_path / "best.pt", checkpoint)
    loaded = load_classifier(tmp_path / "best.pt")
    assert loaded.llama.config == model.llama.config
    assert loaded.llama.tok_embeddings.weight is loaded.llama.output.weight


def test_pretrained_checkpoint_is_no_classifier(llama: Llama, tmp_path: Path) -> None:
    save_llama(llama, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="does not hold a fine-tuned classifier"):
        load_classifier(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("classifier", "num_labels", -1, "num_labels=-1 is not a whole number from 1 to"),
        ("classifier", "num_labels", True, "num_labels=True is not a whole number from 1 to"),
        ("classifier", "num_labels", 10**30, "num_labels=10.* is not a whole number from 1 to"),
        ("classifier", "hidden_dropout_prob", "x", "hidden_dropout_prob='x' is not a number in"),
        ("classifier", "more", 1, "does not hold a fine-tuned classifier"),
        ("classifier", "label_names", "ab", "label_names='ab' is not a list of words"),
        ("classifier", "label_names", ["a", 1], r"label_names=\['a', 1\] is not a list of words"),
        ("classifier", "label_names", ["a", " "], "is not a list of words"),
        ("classifier", "label_names", ["a", "\udcff"], "is not a list of words"),
        ("classifier", "label_names", ["a"], "expected num_labels=2 different words"),
        ("classifier", "label_names", ["a"] * 2, "expected num_labels=2 different words"),
        ("classifier", "label_names", ["a"] * 10**5, "expected num_labels=2 different words"),
        ("classifier", "max_sentence_len", 0, "max_sentence_len=0 is not a whole number from 1"),
        ("classifier", "max_sentence_len", True, "max_sentence_len=True is not a whole number"),
        ("classifier", "max_sentence_len", 2**31, "max_sentence_len=2147483648 is not a whole"),
        ("classifier", "tokenizer", "x", "tokenizer is not a tensor of bytes"),
        ("classifier", "tokenizer", b"x", "tokenizer is not a tensor of bytes"),
        ("classifier", "tokenizer", torch.zeros(9), "tokenizer is not a tensor of bytes"),
        ("classifier", "tokenizer", BYTES[None], "tokenizer is not a tensor of bytes"),
        ("classifier", "tokenizer", BYTES[:1].expand(10**12), "tokenizer is not a tensor of bytes"),
        ("classifier", "tokenizer", BYTES.to("meta"), "tokenizer is not a tensor of bytes"),
        ("classifier", "tokenizer", BYTES.to_sparse(), "tokenizer is not a tensor of bytes"),
        ("classifier", "tokenizer", BYTES, "the tokenizer: not a SentencePiece model"),
        ("classifier", "tokenizer", BYTES[:0], "the tokenizer: not a SentencePiece model"),
        ("model", "classifier_head.bias", 1.5, "classifier_head.bias is not a tensor"),
        ("model", "classifier_head.bias", torch.tensor([0.0, math.nan]), "is NaN or infinite"),
    ],
)
def test_bad_entries_are_named(
    llama: Llama, tmp_path: Path, part: str, name: str, value: Any, message: str
) -> None:
    checkpoint = LlamaEmbeddingClassifier(config_of(), llama).to_checkpoint()
    checkpoint[part][name] = value
    write_checkpoint(tmp_path / "best.pt", checkpoint)
    with pytest.raises(ValueError, match=rf"best\.pt: .*{message}"):
        load_classifier(tmp_path / "best.pt")
