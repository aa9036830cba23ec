"""Pretraining: packing, loss, schedule, and `--option pretrain` end to end."""

import math
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from base_llama import read_checkpoint
from beyond import pretraining
from beyond.runtime import Runtime, prepare_model
from llama import load_pretrained
from run_llama import main
from tests.conftest import SENTENCES, make_llama, save_llama
from tests.oracle import numpy_forward
from tests.test_run_llama import run
from tokenizer import Tokenizer

TEXTS = [line.split(" ||| ")[1] for line in SENTENCES]
PRETRAIN = ["--option", "pretrain", "--batch_size", "2", "--epochs", "2"]
SHAPE = ["--dim", "32", "--n_layers", "2", "--n_heads", "4", "--n_kv_heads", "2"]
SCRATCH = [*PRETRAIN, *SHAPE, "--max_seq_len", "16", "--tokenizer_path", "tokenizer.model"]
FLOAT32, BFLOAT16 = (
    Runtime(torch.device("cpu"), dtype, causal=True) for dtype in (torch.float32, torch.bfloat16)
)


def documents() -> list[Tensor]:
    return [torch.tensor(ids) for ids in ([1, 5, 6], [1, 7], [1, 8, 9, 10])]


def test_pack_cuts_one_stream_into_full_blocks() -> None:
    """The stream is 1 5 6 1 7 1 8 9 10; what remains after the last full block is left out."""
    assert pretraining.pack(documents(), 3).tolist() == [[1, 5, 6, 1], [1, 7, 1, 8]]
    assert pretraining.pack(documents(), 8).tolist() == [[1, 5, 6, 1, 7, 1, 8, 9, 10]]


def test_pack_refuses_less_text_than_a_block() -> None:
    with pytest.raises(
        ValueError, match="text: 9 tokens are fewer than one block of 9 and the token"
    ):
        pretraining.pack(documents(), 9)


def test_learning_rate_rises_then_falls() -> None:
    rates = [pretraining.learning_rate(step, 200, 2.0) for step in range(200)]
    assert rates[:3] == [pytest.approx(0.2), pytest.approx(0.4), pytest.approx(0.6)]
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.2)
    # in the middle of the cosine: the mean of its peak and its end
    assert pretraining.learning_rate(10 + 189 // 2, 200, 2.0) == pytest.approx(1.1, abs=0.01)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_learning_rate_of_short_runs_is_positive(steps: int) -> None:
    assert all(0 < pretraining.learning_rate(step, steps, 1.0) <= 1 for step in range(steps))


@pytest.mark.parametrize("tied", [True, False])
def test_loss_in_slices_is_the_loss_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """Slices of three rows, the last one shorter, against one cross-entropy of all rows."""
    blocks = torch.randint(0, 320, (2, 8), generator=torch.Generator().manual_seed(0))
    llama = make_llama(causal=True, tie_embeddings=tied)
    logits, _ = llama(blocks[:, :-1], targets=blocks[:, 1:])
    expected = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    expected.backward()
    gradients = [parameter.grad for parameter in llama.parameters()]
    llama.zero_grad()
    monkeypatch.setattr(pretraining, "MAX_LOGITS", 3 * 320)
    prepare_model(pretraining.NextTokenLoss(llama), BFLOAT16, False)(blocks).backward()
    for parameter, gradient in zip(llama.parameters(), gradients, strict=True):
        assert parameter.grad is not None and gradient is not None
        assert (parameter.grad / 14 - gradient).std() < 0.05 * gradient.std()
    llama.zero_grad()
    loss = pretraining.NextTokenLoss(llama)(blocks) / 14
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach())
    for parameter, gradient in zip(llama.parameters(), gradients, strict=True):
        # sums are computed in another order
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def test_evaluate_is_the_mean_over_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a short last batch and a short last slice; the oracle is NumPy's logits."""
    blocks = torch.randint(0, 320, (3, 8), generator=torch.Generator().manual_seed(1))
    llama = make_llama(causal=True).train()
    logits = torch.tensor(numpy_forward(llama, blocks[:, :-1])[0])
    expected = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item()
    monkeypatch.setattr(pretraining, "MAX_LOGITS", 4 * 320)
    assert pretraining.evaluate(llama, blocks, 2, FLOAT32) == pytest.approx(expected, rel=1e-5)
    assert llama.training
    rounded = pretraining.evaluate(llama, blocks, 2, BFLOAT16)
    assert rounded != pytest.approx(expected, rel=1e-5)
    assert rounded == pytest.approx(expected, rel=0.01)


@pytest.mark.sweep
def test_pretrain_memorises_from_scratch(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new model learns eight sentences by heart and continues their beginnings."""
    Path("plain.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    argv = [*SCRATCH, "--train", "data/cfimdb-train.txt", "--dev", "plain.txt"]
    argv += ["--batch_size", "4", "--epochs", "90", "--lr", "1e-2", "--dtype", "float32"]
    argv += ["--filepath", "lm/model.pt"]
    status, out, err = run(argv, capsys)
    assert (status, err) == (0, "")
    tokenizer = Tokenizer()
    tokens = sum(len(tokenizer.encode(text, bos=True, eos=False)) for text in TEXTS)
    for path in ("data/cfimdb-train.txt", "plain.txt"):  # without labels and blank lines
        assert f"load 8 documents, {tokens} tokens from {path}\n" in out
    assert out.startswith("computes in float32 on cpu, in causal mode\n")
    losses = re.findall(r"^epoch \d+: train loss :: (\d\.\d{3}), dev loss :: ", out, re.MULTILINE)
    assert len(losses) == 90 and float(losses[0]) > 5 and float(losses[-1]) < 0.5

    llama = load_pretrained("lm/model.pt")
    config = llama.config
    assert (config.causal, config.vocab_size, config.dim, config.n_kv_heads) == (True, 320, 32, 2)
    assert Path("lm/tokenizer.model").read_bytes() == Path("tokenizer.model").read_bytes()
    start = tokenizer.encode("Funny , warm", bos=True, eos=False)
    generated = llama.generate(torch.tensor([start]), 10, temperature=0.0)[0].tolist()
    assert tokenizer.decode(generated).startswith("Funny , warm and wond")
    assert main(["--pretrained-model-path", "lm/model.pt", "--max_new_tokens", "4"]) == 0


def test_pretrain_trains_a_checkpoint_further(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss of the default checkpoint falls; its file is unchanged, the result is causal."""
    save_llama(make_llama(causal=False, max_seq_len=16), Path("stories42M.pt"))
    before = Path("stories42M.pt").read_bytes()
    Path("dev.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    argv = [*PRETRAIN, "--dev", "dev.txt", "--epochs", "5", "--filepath", "on/model.pt"]
    status, out, err = run(argv, capsys)
    assert (status, err) == (0, "")
    losses = [float(loss) for loss in re.findall(r"dev loss :: (\d+\.\d{3})", out)]
    tokenizer = Tokenizer()
    tokens = [torch.tensor(tokenizer.encode(text, bos=True, eos=False)) for text in TEXTS]
    blocks = pretraining.pack(tokens, 16)
    start = pretraining.evaluate(load_pretrained("stories42M.pt", causal=True), blocks, 2, FLOAT32)
    assert losses[-1] < losses[0] < start
    assert load_pretrained("on/model.pt").config.causal
    after = pretraining.evaluate(load_pretrained("on/model.pt"), blocks, 2, FLOAT32)
    assert after == pytest.approx(min(losses), abs=0.02)  # bfloat16 may have computed the loss
    assert Path("stories42M.pt").read_bytes() == before


def test_pretrain_keeps_the_rope_base_and_trains_both_matrices_of_an_untied_checkpoint(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result records both, and is the model whose loss was printed."""
    start = make_llama(False, max_seq_len=16, rope_theta=500000.0, tie_embeddings=False)
    save_llama(start, Path("stories42M.pt"))
    argv = [*PRETRAIN, "--dtype", "float32", "--filepath", "on/model.pt"]
    status, out, err = run(argv, capsys)
    assert (status, err) == (0, "")
    args = read_checkpoint("on/model.pt")["model_args"]
    assert args["rope_theta"] == 500000.0 and args["tie_embeddings"] is False
    llama = load_pretrained("on/model.pt")
    for name in ("tok_embeddings.weight", "output.weight"):
        assert not torch.equal(llama.get_parameter(name), start.get_parameter(name)), name
    assert not torch.equal(llama.tok_embeddings.weight, llama.output.weight)
    tokens = [torch.tensor(Tokenizer().encode(text, bos=True, eos=False)) for text in TEXTS]
    blocks = pretraining.pack(tokens, 16)
    logits = torch.tensor(numpy_forward(llama, blocks[:, :-1])[0])
    loss = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item()
    losses = [float(loss) for loss in re.findall(r"dev loss :: (\d+\.\d{3})", out)]
    assert min(losses) == pytest.approx(loss, abs=6e-4)  # printed with three digits


def test_pretrain_is_determined_by_the_seed(workplace: Path) -> None:
    weights = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        argv = [*SCRATCH, "--train", "data/cfimdb-train.txt", "--dev", "data/cfimdb-dev.txt"]
        argv += ["--dropout", "0.1", "--seed", str(seed), "--filepath", f"{name}/model.pt"]
        assert main(argv) == 0
        weights[name] = read_checkpoint(f"{name}/model.pt")["model"]["norm.weight"]
    assert torch.equal(weights["a"], weights["b"]) and not torch.equal(weights["a"], weights["c"])


def test_the_best_epoch_is_kept(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses, gains = iter([3.0, 2.0, 2.5, 2.0, 4.0]), []

    def scripted(llama, blocks, batch_size, runtime):  # type: ignore[no-untyped-def]
        gains.append(llama.norm.weight.detach().clone())
        return next(losses)

    monkeypatch.setattr(pretraining, "evaluate", scripted)
    status, out, _ = run([*SCRATCH, "--epochs", "5", "--filepath", "best/model.pt"], capsys)
    assert status == 0 and out.count("save the model to best/model.pt") == 2
    assert torch.equal(load_pretrained("best/model.pt").norm.weight, gains[1])


def test_store_dtype_sets_the_size_of_the_file(workplace: Path) -> None:
    """Half precision halves it, and the matrix that has two names is stored once."""
    sizes = {}
    for dtype in ("float32", "float16"):
        argv = [*SCRATCH, "--store_dtype", dtype, "--filepath", f"{dtype}/model.pt"]
        assert main(argv) == 0
        sizes[dtype] = os.path.getsize(f"{dtype}/model.pt")
    llama = load_pretrained("float16/model.pt")
    assert llama.output.weight.dtype == torch.float32
    numbers = sum(parameter.numel() for parameter in llama.parameters())
    assert 4 * numbers < sizes["float32"] < 4 * numbers + 12_000
    assert sizes["float32"] - sizes["float16"] == pytest.approx(2 * numbers, abs=2000)


def test_bfloat16_computes_nearly_the_same(workplace: Path) -> None:
    argv = [*SCRATCH, "--filepath"]
    for dtype in ("bfloat16", "float32"):
        assert main([*argv, f"{dtype}/model.pt", "--dtype", dtype]) == 0
    weights = [
        load_pretrained(f"{dtype}/model.pt").state_dict() for dtype in ("float32", "bfloat16")
    ]
    differences = [(weights[0][name] - weights[1][name]).abs().max() for name in weights[0]]
    assert 0 < max(differences) < 0.02  # at most a few steps of 1e-3 in the other direction


def test_pretrain_writes_tensorboard_events(workplace: Path) -> None:
    assert main([*SCRATCH, "--filepath", "lm/model.pt"]) == 0
    (folder,) = [path for path in Path("lm").iterdir() if path.is_dir()]
    train, dev = (EventAccumulator(str(folder / name)).Reload() for name in ("train", "dev"))
    curves = {"loss", "learning_rate", "gradient_norm", "tokens_per_second", "peak_memory"}
    assert set(train.Tags()["scalars"]) == curves
    steps = [event.step for event in train.Scalars("loss")]
    assert steps == list(range(1, len(steps) + 1))
    scores = {"loss", "perplexity", "bits_per_byte", "result/dev_loss"}
    assert set(dev.Tags()["scalars"]) == scores
    perplexities = [event.value for event in dev.Scalars("perplexity")]
    losses = [event.value for event in dev.Scalars("loss")]
    assert dev.Scalars("loss")[-1].step == len(steps)
    assert dev.Scalars("result/dev_loss")[-1].value == min(losses)
    assert perplexities == pytest.approx([math.exp(loss) for loss in losses], rel=1e-5)
    rates = [event.value for event in train.Scalars("learning_rate")]
    assert max(rates) == pytest.approx(1e-3)
    texts = dev.Tensors("sample/text_summary")
    assert [text.step for text in texts] == [event.step for event in dev.Scalars("loss")]
    assert all(text.tensor_proto.string_val[0] for text in texts)
    settings = train.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| n_kv_heads | `2` |" in settings and "| mode | `causal` |" in settings


def test_a_loss_of_nan_stops_and_keeps_the_last_good_checkpoint(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*SCRATCH, "--filepath", "lm/model.pt"]
    assert main(argv) == 0
    good = Path("lm/model.pt").read_bytes()
    status, _, err = run([*argv, "--lr", "1e30"], capsys)
    assert status == 2
    assert re.fullmatch(
        r"run_llama\.py: error: step \d+: the loss is (nan|inf) at a learning rate of \S* in "
        r"documents [1-8](, [1-8])* of --train; try a lower --lr\n",
        err,
    )
    assert Path("lm/model.pt").read_bytes() == good


def test_blocks_name_their_documents() -> None:
    """Of four documents, the third one continues in the second block."""
    sources = pretraining.pack([torch.full((n,), i) for i, n in enumerate((2, 3, 4, 5))], 6)
    first, second = (pretraining.Blocks(s, s) for s in (sources[:1], sources[1:]))
    assert first.describe() == "documents 1, 2, 3 of --train"
    assert second.describe() == "documents 3, 4 of --train"


def test_each_pass_shuffles_documents_and_blocks() -> None:
    """Each block knows the documents of its tokens; equal seeds give equal passes."""
    texts = [torch.tensor([1] + [10 + i] * (i + 2)) for i in range(7)]

    def passes(seed: int) -> list[list[list[int]]]:
        generator = torch.Generator().manual_seed(seed)
        loader = pretraining.BlockLoader(texts, 3, 4, generator)
        epochs = [list(loader) for _ in range(2)]
        for batches in epochs:  # 42 tokens are 13 blocks and two more tokens
            assert [len(batch.tokens) for batch in batches] == [4, 4, 4, 1]
            assert len(batches) == len(loader)
            for batch in batches:
                is_bos = batch.tokens == 1
                assert torch.equal(batch.tokens[~is_bos], 10 + batch.sources[~is_bos])
                assert batch.num_tokens == batch.num_padded_tokens == 3 * len(batch.tokens)
        return [[row for batch in batches for row in batch.tokens.tolist()] for batches in epochs]

    first, second = passes(0)
    assert first != second and sorted(first) != sorted(second)
    assert passes(0) == [first, second] != passes(1)


def test_a_last_step_that_destroys_the_model_is_an_error(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own loss is still finite, and the dev loss is not."""
    argv = [*SCRATCH, "--epochs", "1", "--batch_size", "64", "--lr", "1e38"]
    status, _, err = run([*argv, "--filepath", "lm/model.pt"], capsys)
    assert status == 2 and not Path("lm/model.pt").exists()
    assert re.fullmatch(
        r"run_llama\.py: error: step 0: the dev loss is (nan|inf); try a lower --lr\n", err
    )


BAD_INPUTS = {
    "dim": ([*SCRATCH, "--dim", "30"], "dim=30 is not divisible by n_heads=4"),
    "odd head": ([*SCRATCH, "--dim", "36"], "gives an odd head size 9"),
    "kv heads": ([*SCRATCH, "--n_kv_heads", "3"], "n_heads=4 is not divisible by n_kv_heads=3"),
    "short text": ([*SCRATCH, "--max_seq_len", "4096"], "fewer than one block of 4096"),
    "short validation text": (
        [*SCRATCH, "--dev", "short.txt"],
        "--dev: 2 tokens are fewer than one block of 16",
    ),
    "dev is train": (
        [*SCRATCH, "--train", "data/cfimdb-dev.txt"],
        "--dev data/cfimdb-dev.txt: is also a training file",
    ),
    "dev links to train": (
        [*SCRATCH, "--dev", "data/cfimdb-dev.txt", "link.txt"],
        "--dev link.txt: is also a training file",
    ),
    "other vocabulary": (
        [*PRETRAIN, "--pretrained-model-path", "vocab.pt"],
        "has a vocabulary of 320, but that of vocab.pt is 99",
    ),
    "no tokenizer": ([*PRETRAIN, *SHAPE], "a new model needs a tokenizer"),
    "new and old": (
        [*SCRATCH, "--pretrained-model-path", "stories42M.pt"],
        "--dim starts a new model, --pretrained-model-path trains an old one further",
    ),
    "not causal": ([*SCRATCH, "--no-causal"], "--no-causal: pretraining needs causal attention"),
    "missing text": ([*SCRATCH, "--train", "no.txt"], "no.txt: No such file"),
    "blank text": ([*SCRATCH, "--train", "blank.txt"], "blank.txt: holds no text"),
    "not UTF-8": ([*SCRATCH, "--train", "latin1.txt"], "latin1.txt:1: not UTF-8"),
    "shape elsewhere": (["--n_layers", "2"], "--n_layers is for --option pretrain only"),
    "several files": (
        ["--option", "prompt", "--dev", "a.txt", "b.txt"],
        "--dev a.txt b.txt: only pretrain takes more than one file",
    ),
    "another's tokenizer": (
        [*SCRATCH, "--filepath", "taken/model.pt"],
        "taken/tokenizer.model: is another tokenizer than that of taken/model.pt",
    ),
    "size of nothing": ([*SCRATCH, "--dim", "0"], "--dim: 0 is below 1"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_line_and_status_2(
    workplace: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    save_llama(make_llama(causal=False, vocab_size=99), Path("vocab.pt"))
    Path("link.txt").symlink_to("data/cfimdb-train.txt")
    Path("short.txt").write_text("a\n")
    Path("blank.txt").write_text("0 ||| \n\n  \n")
    Path("latin1.txt").write_bytes(b"caf\xe9\n")
    Path("taken").mkdir()
    Path("taken/tokenizer.model").write_bytes(b"another")
    argv, pattern = BAD_INPUTS[name]
    status, out, err = run(argv, capsys)
    assert status == 2
    assert re.fullmatch(rf"run_llama\.py: error: .*{re.escape(pattern)}.*\n", err), err
    assert not list(Path().rglob("output/**/model.pt")) and "epoch" not in out
