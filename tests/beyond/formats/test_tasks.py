"""Every task with a model of each kind, and with each kind of tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch

from base_llama import read_checkpoint, write_checkpoint
from beyond.decoding import prepare_for_decoding
from beyond.formats.files import default_tokenizer
from beyond.formats.huggingface import write_huggingface
from beyond.formats.huggingface_tokenizer import JsonTokenizer, read_tokenizer_json
from beyond.formats.llama2c import write_llama2c
from beyond.formats.llama2c_tokenizer import to_tokenizer_bin
from beyond.formats.load import load_llama, load_tokenizer
from beyond.generation import generate_texts
from beyond.methods.checkpoints import load_any_classifier
from classifier import ClassifierConfig, LlamaZeroShotClassifier
from llama import Llama
from run_llama import build_prompt_suffix, get_args, main
from tests.beyond.runs import assert_equal, interrupt, run
from tests.conftest import SENTENCES, make_llama
from tokenizer import Tokenizer

KINDS = ("llama2c", "meta", "huggingface", "byte-level")
PROMPT = ["--option", "prompt", "--batch_size", "3"]
FINETUNE = ["--option", "finetune", "--batch_size", "3", "--epochs", "2", "--lr", "1e-3"]
FINETUNE += ["--filepath", "out/best.pt", "--dev_out", "out/dev-finetuning-output.txt"]
FINETUNE += ["--test_out", "out/test-finetuning-output.txt"]
PRETRAIN = ["--option", "pretrain", "--batch_size", "2", "--epochs", "1", "--max_seq_len", "16"]
PRETRAIN += ["--dtype", "float32", "--filepath", "out/model.pt"]


def byte_level_tokenizer(folder: Path, adds_bos: bool = False, **special: str) -> Path:
    """Train a byte-level BPE tokenizer, and write tokenizer.json and its config; returns the path.

    Args:
        folder: of the files.
        adds_bos: whether its post-processor puts <|begin|> before a text.
        special: roles (`eos_token`, ...) and texts of special tokens.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    begin = ["<|begin|>"] if adds_bos else []
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[*special.values(), *begin],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Labels often enough for pieces of their own, with the space before them.
    backend.train_from_iterator([*SENTENCES, "is bad, is good " * 50], trainer)
    if adds_bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder / "tokenizer.json"


def load_json(path: Path) -> JsonTokenizer:
    return JsonTokenizer(None, read_tokenizer_json(path))


def write_model(kind: str, llama: Llama, tokenizer_path: Path) -> str:
    """Write a causal model and a tokenizer as a kind of checkpoint; returns its path."""
    tokenizer = Tokenizer(None, tokenizer_path)
    if kind == "llama2c":
        Path("c").mkdir()
        write_llama2c("c/model.bin", llama, quantize=False)
        Path("c/tokenizer.bin").write_bytes(to_tokenizer_bin(tokenizer))
        return "c/model.bin"
    if kind == "huggingface":
        write_huggingface("hub", llama, tokenizer)
        return "hub"
    if kind == "byte-level":
        path = byte_level_tokenizer(Path("bytes"), eos_token="<|end|>")
        write_huggingface("hub", llama, load_json(path))
        return "hub"
    config = llama.config
    params = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads}
    params |= {"n_kv_heads": config.n_kv_heads, "vocab_size": -1, "multiple_of": 32}
    names = {"query": "q", "key": "k", "value": "v", "output": "o"}
    weights = llama.state_dict()
    for old in [name for name in weights if "attention.compute_" in name]:
        start, _, rest = old.partition("compute_")
        weights[f"{start}w{names[rest.removesuffix('.weight')]}.weight"] = weights.pop(old)
    Path("meta").mkdir()
    Path("meta/params.json").write_text(json.dumps(params))
    Path("meta/tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    torch.save(weights, "meta/consolidated.00.pth")
    return "meta"


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, workplace: Path, tokenizer_path: Path) -> str:
    """Write the model as each of the kinds, in a workplace; returns its path."""
    return write_model(request.param, make_llama(causal=True), tokenizer_path)


def test_generate(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also from an empty prompt, which begins with BOS or EOS; and streamed."""
    argv = ["--pretrained-model-path", model, "--max_new_tokens", "9", "--stop_at_eos"]
    for words in (["--prompt", "A warm"], ["--prompt", ""], ["--prompt", "A", "--stream"]):
        status, out, err = run([*argv, *words], capsys)
        assert status == 0 and "in causal mode" in out, err
    status, out, _ = run([*argv, "--no-causal", "--prompt", ""], capsys)
    assert status == 0 and "in reference mode" in out


def test_prompt(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*PROMPT, "--pretrained-model-path", model]
    status, out, err = run(argv, capsys)
    assert status == 0 and "pads with" not in out, err
    status, out, err = run([*argv, "--no-causal"], capsys)
    tokenizer = load_tokenizer(None, default_tokenizer(model))
    assert status == 0 and f"pads with {tokenizer.pad_piece} (id {tokenizer.pad_id})\n" in out, err


def test_finetune_resume_and_classify(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Interrupted and resumed; then the classifier alone gives the same predictions."""
    argv = [*FINETUNE, "--pretrained-model-path", model]
    assert interrupt([*argv, "--save_every", "1"], steps=4) == 130
    status, _, err = run([*argv, "--save_every", "1", "--resume"], capsys)
    assert status == 0, err
    resumed = read_checkpoint("out/best.pt")["model"]
    predictions = Path("out/dev-finetuning-output.txt").read_text()
    assert main(argv) == 0
    whole = read_checkpoint("out/best.pt")["model"]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert Path("out/dev-finetuning-output.txt").read_text() == predictions
    record = json.loads(Path("out/best.pt.json").read_text())
    assert record["checkpoint"] == model and len(record["checkpoint SHA-256"]) == 64
    for path in [Path(model)] if Path(model).is_file() else Path(model).iterdir():
        path.unlink()  # the classifier needs none of them
    argv = ["--option", "classify", "--filepath", "out/best.pt", "--output", "out/x.tsv"]
    assert main([*argv, "--input", "data/cfimdb-dev.txt"]) == 0
    words = [line.split("\t")[0] for line in Path("out/x.tsv").read_text().splitlines()]
    assert [["bad", "good"].index(word) for word in words] == [
        int(line[0]) for line in predictions.splitlines()
    ]


def test_a_folder_that_changed_is_not_resumed(
    workplace: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model("huggingface", make_llama(causal=True), tokenizer_path)
    argv = [*FINETUNE, "--pretrained-model-path", model, "--save_every", "1"]
    assert interrupt(argv, steps=2) == 130
    for path in Path(model).iterdir():
        path.unlink()
    write_model("huggingface", make_llama(causal=True, seed=1), tokenizer_path)
    status, _, err = run([*argv, "--resume"], capsys)
    assert status == 2 and "SHA-256 of hub/model.safetensors=" in err, err


def test_pretrain_further_and_use_the_result(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result lies beside its tokenizer, whatever kind that is."""
    Path("train.txt").write_text("\n".join(SENTENCES * 3))
    Path("dev.txt").write_text("\n".join(SENTENCES))
    argv = [*PRETRAIN, "--pretrained-model-path", model, "--train", "train.txt", "--dev", "dev.txt"]
    status, _, err = run(argv, capsys)
    assert status == 0, err
    before, after = load_llama(model).state_dict(), load_llama("out/model.pt").state_dict()
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    old, new = (load_tokenizer(None, default_tokenizer(p)) for p in (model, "out/model.pt"))
    for sentence in SENTENCES:
        assert old.encode(sentence, bos=True, eos=True) == new.encode(sentence, bos=True, eos=True)
    status, out, err = run(["--pretrained-model-path", "out/model.pt", "--prompt", "A"], capsys)
    assert status == 0 and "in causal mode" in out, err


# -------------------------------------------------------------------------------- tokenizers


@pytest.fixture
def make(tmp_path: Path, tokenizer_path: Path) -> Callable[[str], Tokenizer]:
    """Return a function that makes a tokenizer of a kind."""

    def make_kind(kind: str) -> Tokenizer:
        if kind == "SentencePiece":
            return load_tokenizer(None, tokenizer_path)
        if kind == "tokenizer.bin":
            path = tmp_path / "tokenizer.bin"
            path.write_bytes(to_tokenizer_bin(Tokenizer(None, tokenizer_path)))
            return load_tokenizer(None, path)
        special = {"eos_token": "<|end|>"}
        special |= {"pad_token": "<|pad|>"} if kind == "JSON with BOS and pad" else {}
        path = byte_level_tokenizer(tmp_path / kind, kind == "JSON with BOS and pad", **special)
        return load_tokenizer(None, path)

    return make_kind


@pytest.mark.parametrize(
    ("kind", "bos", "boundary", "pad"),
    [
        ("SentencePiece", "<s>", "<s>", "<0x00>"),
        ("tokenizer.bin", "<s>", "<s>", "<0x00>"),
        ("JSON", None, "<|end|>", "<|end|>"),
        ("JSON with BOS and pad", "<|begin|>", "<|begin|>", "<|pad|>"),
    ],
)
def test_special_tokens_of_each_kind(
    make: Callable[[str], Tokenizer], kind: str, bos: str | None, boundary: str, pad: str
) -> None:
    tokenizer = make(kind)

    def piece(number: int) -> str:
        if isinstance(tokenizer, JsonTokenizer):
            return tokenizer.backend.id_to_token(number)
        return tokenizer.sp_model.id_to_piece(number)

    text = tokenizer.encode_text("A warm film")
    start = tokenizer.encode("A warm film", bos=True, eos=False)[: -len(text)]
    assert [piece(number) for number in start] == ([bos] if bos else [])
    assert tokenizer.bos_id == (start[0] if bos else None) and tokenizer.eos_id is not None
    assert piece(tokenizer.boundary_id) == boundary
    assert tokenizer.stop_ids == {*start, tokenizer.eos_id}
    assert (piece(tokenizer.pad_id), tokenizer.pad_piece) == (pad, pad)
    assert tokenizer.encode("A warm film", bos=True, eos=True) == [*start, *text, tokenizer.eos_id]
    assert tokenizer.decode([*start, *text, tokenizer.eos_id]) == "A warm film"


@pytest.mark.parametrize("kind", ["SentencePiece", "tokenizer.bin"])
def test_a_label_of_sentencepiece_is_tokenized_alone(
    make: Callable[[str], Tokenizer], kind: str
) -> None:
    tokenizer, prompt = make(kind), build_prompt_suffix(["bad", "good"])
    for label in ("bad", "good", "excellent"):
        tokens = tokenizer.label_tokens(label, prompt)
        assert tokens == tokenizer.encode(label, bos=False, eos=False)


@pytest.mark.parametrize("kind", ["JSON", "JSON with BOS and pad"])
def test_a_label_of_a_byte_level_tokenizer_takes_in_the_space_before_it(
    make: Callable[[str], Tokenizer], kind: str
) -> None:
    tokenizer, prompt = make(kind), build_prompt_suffix(["bad", "good"])
    # "excellent" was not seen in training: it has several tokens, and its space none of its own.
    for label, text in (("bad", " bad"), ("good", " good"), ("excellent", "excellent")):
        tokens = tokenizer.label_tokens(label, prompt)
        assert tokenizer.decode(tokens) == text
        assert len(tokens) == 1 if text[0] == " " else len(tokens) > 1
        prompt_tokens, whole = (tokenizer.encode_text(text) for text in (prompt, prompt + label))
        assert prompt_tokens[: len(whole) - len(tokens)] + tokens == whole


def test_zero_shot_scores_are_those_of_the_labels_tokens(
    make: Callable[[str], Tokenizer],
) -> None:
    """A label of several tokens is the sum of their log-probabilities."""
    tokenizer, labels = make("JSON"), ["bad", "excellent"]
    prompt = build_prompt_suffix(labels)
    llama = make_llama(causal=True)
    config = ClassifierConfig(2, "", 0.0, "prompt")
    scorer = LlamaZeroShotClassifier(config, tokenizer, labels, llama, prompt)
    tokens = torch.tensor([tokenizer.encode(f"A film.{prompt}", bos=True, eos=False)])
    log_probs = llama(tokens)[0][0, -1].log_softmax(-1)
    for score, label in zip(scorer(tokens)[0], labels, strict=True):
        ids = tokenizer.label_tokens(label, prompt)
        torch.testing.assert_close(score, log_probs[ids].sum())


def test_only_a_json_tokenizer_may_be_smaller_than_the_models_vocabulary(
    make: Callable[[str], Tokenizer],
) -> None:
    for kind in ("SentencePiece", "tokenizer.bin", "JSON"):
        tokenizer = make(kind)
        assert tokenizer.fits(tokenizer.n_words) and not tokenizer.fits(tokenizer.n_words - 1)
        assert tokenizer.fits(tokenizer.n_words + 8) == (kind == "JSON")


def test_a_model_with_more_rows_than_tokens(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may choose a row without a token, which gives no text."""
    path = byte_level_tokenizer(Path("bytes"), eos_token="<|end|>")
    write_huggingface("hub", make_llama(causal=True, vocab_size=400), load_json(path))
    argv = ["--pretrained-model-path", "hub", "--prompt", "A warm film", "--max_new_tokens", "30"]
    status, out, err = run([*argv, "--stream"], capsys)
    assert status == 0 and "A warm film" in out, err
    assert main([*FINETUNE, "--pretrained-model-path", "hub"]) == 0


@pytest.mark.parametrize("kind", ["SentencePiece", "tokenizer.bin", "JSON"])
def test_padding_changes_no_text_of_a_causal_model(
    make: Callable[[str], Tokenizer], kind: str
) -> None:
    """Prompts of different lengths share a batch; each text is the one that it gets alone."""
    tokenizer, llama = make(kind), prepare_for_decoding(make_llama(causal=True))
    prompts = ["A", "A much longer sentence about a film", ""]
    options = get_args(["--max_new_tokens", "12", "--batch_size", "3", "--num_samples", "2"])
    together = generate_texts(llama, tokenizer, prompts, 1.0, options)  # type: ignore[arg-type]
    alone = [
        text
        for prompt in prompts
        for text in generate_texts(llama, tokenizer, [prompt], 1.0, options)  # type: ignore[arg-type]
    ]
    assert together == alone


# ---------------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize("flags", [[], ["--causal", "--pooling", "attention", "--pool_layer", "1"]])
def test_a_classifier_can_be_fine_tuned_further(
    workplace: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """Its backbone is used, and its head left out, so the labels may be others."""
    status, _, err = run([*FINETUNE, *flags], capsys)
    assert status == 0, err
    classifier = load_any_classifier("out/best.pt")
    Path("old").mkdir()
    Path("out/best.pt").rename("old/classifier.pt")
    backbone = load_llama("old/classifier.pt")
    assert_equal(backbone.state_dict(), classifier.llama.state_dict())
    assert backbone.config == classifier.llama.config
    Path("labels.json").write_text('["bad", "fair", "good"]')
    argv = [*FINETUNE, "--pretrained-model-path", "old/classifier.pt"]
    argv += ["--label-names", "labels.json"]
    status, out, err = run(argv, capsys)
    advice = "name the model's tokenizer with --tokenizer_path"
    assert (status, out) == (2, "")
    assert err == f"run_llama.py: error: old/tokenizer.model: no such file; {advice}\n"
    status, out, err = run([*argv, "--tokenizer_path", "tokenizer.model"], capsys)
    assert status == 0 and "load model from old/classifier.pt" in out, err
    assert load_any_classifier("out/best.pt").num_labels == 3


def test_a_classifier_without_a_part_of_its_model_is_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(FINETUNE, capsys)[0] == 0
    checkpoint = read_checkpoint("out/best.pt")
    weights = {n: w for n, w in checkpoint["model"].items() if n != "llama.norm.weight"}
    write_checkpoint("half.pt", {**checkpoint, "model": weights})
    argv = ["--pretrained-model-path", "half.pt", "--tokenizer_path", "tokenizer.model"]
    status, _, err = run(argv, capsys)
    assert status == 2 and err.count("\n") == 1
    assert "half.pt: the weights do not fit the model: missing norm.weight" in err
