"""Generation in causal mode: the cache, batches, sampling filters, streaming, prepared models."""

import io
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from decoding import DecodingLlama, Projection, prepare_for_decoding
from llama import (
    KVCache,
    Llama,
    last_row_mask,
    left_padding_mask,
    load_pretrained,
    sample_next_token,
)
from pretraining import pack
from run_llama import get_args, main, until_stop
from tests.conftest import ROOT, make_llama, save_llama
from tests.test_run_llama import run
from tokenizer import Tokenizer
from utils import read_documents

SHAPES = [
    {},  # n_rep 2
    {"n_kv_heads": 6},
    {"n_heads": 4, "n_kv_heads": 1, "n_layers": 3, "dim": 64},
]


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(4, 320, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def cacheless(llama: Llama, tokens: Tensor, count: int) -> Tensor:
    """Greedy text, each token from a fresh pass over the whole context or its end."""
    for _ in range(count):
        logits, _ = llama(tokens[:, -llama.config.max_seq_len :])
        tokens = torch.cat((tokens, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return tokens


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_text_is_the_cacheless_one(shape: dict[str, int], prepared: bool) -> None:
    """200 greedy tokens, of which the last 80 are beyond max_seq_len, where the context is cut."""
    llama = make_llama(causal=True, **shape)
    context = random_tokens(2, 7)
    expected = cacheless(llama, context, 200)
    assert len(set(expected[0].tolist())) > 12  # no loop that anything would match
    model = prepare_for_decoding(llama) if prepared else llama
    assert isinstance(model, DecodingLlama) == prepared
    assert torch.equal(model.generate(context, 200, temperature=0.0), expected)


def test_cached_text_within_max_seq_len() -> None:
    llama = make_llama(causal=True, max_seq_len=256)
    context = random_tokens(1, 30)
    expected = cacheless(llama, context, 200)
    assert torch.equal(llama.generate(context, 200, temperature=0.0), expected)
    assert torch.equal(prepare_for_decoding(llama).generate(context, 200, 0.0), expected)


def test_a_step_computes_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the cache the prompt is read once and each new token once; reference mode has none."""
    widths: list[int] = []
    compute = Llama.compute_hidden

    def recording(self: Llama, tokens: Tensor, *more: object) -> Tensor:
        widths.append(tokens.shape[1])
        return compute(self, tokens, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Llama, "compute_hidden", recording)
    make_llama(causal=True).generate(random_tokens(1, 7), 4, 0.0)
    make_llama(causal=False).generate(random_tokens(1, 7), 4, 0.0)
    assert widths == [7, 1, 1, 1, 7, 8, 9, 10]


@pytest.mark.parametrize("prepared", [False, True])
def test_rows_of_different_lengths_continue_as_if_alone(prepared: bool) -> None:
    """Greedy and sampled, beyond max_seq_len too; what stands in the padding does not matter."""
    llama = make_llama(causal=True)
    model = prepare_for_decoding(llama) if prepared else llama
    rows = [random_tokens(9), random_tokens(4), random_tokens(6)]
    padding = torch.tensor([0, 5, 3])
    batch = torch.full((3, 9), 77)
    for i, row in enumerate(rows):
        batch[i, padding[i] :] = row
    for temperature in (0.0, 1.0):
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        together = model.generate(batch, 150, temperature, generators, padding=padding)
        for i, row in enumerate(rows):
            alone = model.generate(row[None], 150, temperature, torch.Generator().manual_seed(i))
            assert torch.equal(together[i, padding[i] :], alone[0]), (temperature, i)


def test_left_padding_mask() -> None:
    expected = [
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]],
    ]
    mask = left_padding_mask(torch.tensor([0, 1]), 3)
    assert mask[:, 0].int().tolist() == expected
    assert torch.equal(last_row_mask(torch.tensor([0, 1]), 3), mask[:, :, -1:])


def test_reference_mode_takes_no_padded_rows(llama: Llama) -> None:
    with pytest.raises(ValueError, match="would see padding"):
        llama.generate(random_tokens(2, 3), 1, padding=torch.tensor([0, 1]))


def test_cache_refuses_what_does_not_fit() -> None:
    cache = KVCache(4)
    key = torch.zeros(1, 2, 3, 8)
    assert cache.extend(key, key)[0].shape == (1, 2, 3, 8)
    with pytest.raises(ValueError, match="6 positions do not fit a cache of 4"):
        cache.extend(key, key)
    with pytest.raises(ValueError, match="one position at a time, not 2"):
        roomy = KVCache(9)
        roomy.extend(key, key)
        roomy.extend(key[:, :, :2], key[:, :, :2])


def test_prepared_model_refuses_too_long_a_sequence() -> None:
    model = prepare_for_decoding(make_llama(causal=True, max_seq_len=8))
    with pytest.raises(ValueError, match="9 tokens is longer than max_seq_len=8"):
        model.compute_hidden(random_tokens(1, 9))


def test_stream_yields_as_it_computes() -> None:
    """Tokens come one by one, and what is not asked for is not computed."""
    llama = make_llama(causal=True).train()
    context = random_tokens(2, 5)
    stream = llama.stream(context, 10**9, temperature=0.0)
    columns = list(islice(stream, 6))
    stream.close()  # type: ignore[attr-defined]
    assert torch.equal(torch.cat((context, *columns), dim=1), llama.generate(context, 6, 0.0))
    assert llama.training


def draws(count: int = 20_000, **filters: Any) -> Tensor:
    """Relative frequencies of tokens with probabilities .4 .3 .2 .1, in another order."""
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    generator = torch.Generator().manual_seed(0)
    tokens = sample_next_token(logits.expand(count, -1), 1.0, generator, **filters)
    return torch.bincount(tokens[:, 0], minlength=4) / count


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"top_k": 0}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 99}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.01}, [0, 1, 0, 0]),  # the likeliest always stays
        ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),  # with as many as reach it, none less
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),  # of the two that are left
    ],
)
def test_top_k_and_top_p(filters: dict[str, Any], expected: list[float]) -> None:
    # four standard errors of 20,000 draws
    torch.testing.assert_close(
        draws(**filters), torch.tensor(expected, dtype=torch.float32), atol=0.014, rtol=0
    )


@pytest.mark.parametrize(
    ("filters", "message"),
    [({"top_k": -1}, "top_k=-1"), ({"top_p": 0.0}, "top_p=0"), ({"top_p": 1.5}, "top_p=1.5")],
)
def test_bad_filters_are_errors(filters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draws(1, **filters)


@pytest.mark.parametrize("generator", [None, [torch.Generator()]])
def test_logits_that_are_not_finite_are_an_error(generator: Any) -> None:
    with pytest.raises(ValueError, match="the logits are not finite"):
        sample_next_token(torch.tensor([[1.0, float("inf")]]), 1.0, generator)


def test_until_stop_ends_each_row_at_its_own_stop() -> None:
    columns = [torch.tensor(column)[:, None] for column in ([5, 6], [2, 7], [8, 1], [9, 9])]
    taken = iter(columns)
    assert list(until_stop(taken, {1, 2})) == [(0, 5), (1, 6), (1, 7)]
    assert len(list(taken)) == 1  # the last column was not asked for
    assert len(list(until_stop(columns, set()))) == 8


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(0, 399), max_size=40),
    text=st.text(max_size=20),
    cut=st.integers(0),
)
@example(ids=[0, 288, 269], text="", cut=0)  # <unk>, then two pieces that begin with spaces
def test_streamed_text_is_the_decoded_text(
    tokenizer_path: Path, ids: list[int], text: str, cut: int
) -> None:
    """For any ids, bytes that form no character included, and for real text cut anywhere."""
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    space = tokenizer.sp_model.piece_to_id("▁")  # one in five, since it is the piece to get wrong
    ids = [token if token < tokenizer.n_words else space for token in ids]
    encoded = tokenizer.encode(text, bos=True, eos=False)
    for tokens in (ids, encoded, encoded[: cut % (len(encoded) + 1)], encoded + ids):
        assert "".join(tokenizer.decode_stream(tokens)) == tokenizer.decode(tokens)


def test_streamed_parts_hold_whole_characters(tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    ids = tokenizer.encode("a 映画 🎬 !", bos=True, eos=False)
    parts = list(tokenizer.decode_stream(ids))
    assert "".join(parts) == "a 映画 🎬 !" and "🎬" in parts and len(parts) < len(ids)


# ------------------------------------------------------------------------------ prepared models


@pytest.mark.parametrize(("out", "size"), [(24, 16), (7, 20), (1, 40), (33, 5)])
def test_projection_computes_what_it_stores(out: int, size: int) -> None:
    """All three storages against a float64 product, for one row and for several, of any size."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, size, generator=generator)
    x = torch.randn(5, size, generator=generator)
    for dtype, quantize, tolerance in (
        (torch.float32, False, 1e-5),
        (torch.bfloat16, False, 0.15),
        (torch.bfloat16, True, 0.3),  # steps of about 3 / 127, in forty products
    ):
        projection = Projection(weight, dtype, quantize)
        for rows in (1, 5):
            expected = x[:rows].double() @ weight.double().T
            actual = projection(x[:rows].to(dtype)).double()
            torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def test_int8_error_is_half_a_step_at_most() -> None:
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    projection = Projection(weight, torch.bfloat16, quantize=True)
    assert projection.weight.dtype == torch.int8 and projection.scales is not None
    steps = projection.scales.float()[:, None]
    errors = (projection.weight.float() * steps - weight).abs()
    # half a step; the largest of a row may lose as much again to the scale's own rounding
    assert (errors <= 0.5 * steps + 127 * steps / 256).all()
    assert projection.error == errors.max()
    assert Projection(torch.zeros(3, 16), torch.bfloat16, quantize=True).error == 0


@pytest.mark.parametrize("quantize", [False, True])
def test_half_precision_logits_are_near(quantize: bool) -> None:
    """bfloat16 and int8 move the logits by a few hundredths of their spread."""
    llama = make_llama(causal=True)
    tokens = random_tokens(2, 40)
    expected = llama(tokens, targets=tokens)[0]
    model = prepare_for_decoding(llama, torch.bfloat16, quantize)
    hidden = model.compute_hidden(tokens)
    logits = model.output(hidden.flatten(0, 1)).view_as(expected).float()
    assert (logits - expected).std() < 0.05 * expected.std()
    assert (logits - expected).std() > 1e-4 * expected.std()


def test_int8_is_for_causal_models_only(llama: Llama) -> None:
    with pytest.raises(ValueError, match="only for a causal model"):
        prepare_for_decoding(llama, quantize=True)


# --------------------------------------------------------------------------------- command line


@pytest.fixture
def causal_workplace(workplace: Path) -> Path:
    """A workplace whose checkpoint is causal."""
    save_llama(make_llama(causal=True), Path("stories42M.pt"))
    return workplace


def generated(argv: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The texts that a run prints, checked to be those that it writes."""
    status, out, err = run([*argv, "--max_new_tokens", "9"], capsys)
    assert (status, err) == (0, "")
    printed = re.search(
        r"Temperature is \S+\n(.*)\n---------------\nWrote .* to (\S+)\.\n", out, re.S
    )
    assert printed, out
    assert Path(printed[2]).read_text(encoding="utf-8") == printed[1]
    return printed[1].split("\n---------------\n")


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--stream"],
        ["--causal"],
        ["--causal", "--batch_size", "2"],
        ["--causal", "--stream"],
        ["--causal", "--dtype", "bfloat16"],
        ["--causal", "--quantize", "int8"],
    ],
)
def test_prompts_and_samples_are_independent(
    workplace: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """Text is the same in any batch, streamed or not: it depends on prompt, seed, and number."""
    prompts = ["A", "Funny , warm and wonderfully acted", "No"]
    base = ["--temperature", "0.9", "--num_samples", "3", *flags]
    argv = [*base, *(word for prompt in prompts for word in ("--prompt", prompt))]
    texts = generated(argv, capsys)
    assert len(texts) == len(set(texts)) == 9
    assert all(text.startswith(prompts[i // 3]) for i, text in enumerate(texts))
    alone = [text for prompt in prompts for text in generated([*base, "--prompt", prompt], capsys)]
    assert alone == texts
    second = generated(["--temperature", "0.9", *flags, "--prompt", "No", "--seed", "1338"], capsys)
    assert second == texts[7:8]


def test_temperature_names_its_file(workplace: Path) -> None:
    folder = "output/task_1/generated-sentence-temp"
    assert get_args(["--temperature", "0.25"]).outfiles == {0.25: f"{folder}-0.25.txt"}
    assert get_args(["--temperature", "0"]).outfiles == {0.0: f"{folder}-0.txt"}
    named = ["--generated_sentence_high_temp_out", "x.txt"]
    assert get_args(["--temperature", "2", *named]).outfiles == {2.0: "x.txt"}
    assert get_args(named).outfiles == {0.0: f"{folder}-0.txt", 1.0: "x.txt"}


def test_prompt_from_standard_input(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("Été\nA warm film\n".encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    (text,) = generated(["--temperature", "0", "--prompt", "-"], capsys)
    (named,) = generated(["--temperature", "0", "--prompt", "Été\nA warm film"], capsys)
    assert text == named and len(text) > len("Été\nA warm film")


@pytest.mark.parametrize("stop", [1, 2])
def test_stop_at_eos_ends_the_text_at_bos_or_eos(
    causal_workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
) -> None:
    """A scripted model: one row says " warm", the stop, and goes on; the other stops later."""
    tokenizer = Tokenizer()
    (warm,) = tokenizer.encode("warm", bos=False, eos=False)[:1]
    word = tokenizer.decode([warm, warm])[1:]
    steps = iter([[warm, warm], [stop, warm], [warm, 3 - stop], [warm, warm]] * 9)

    def scripted(logits: Tensor, *args: object, **filters: object) -> Tensor:
        return torch.tensor(next(steps))[: len(logits), None]

    monkeypatch.setattr("llama.sample_next_token", scripted)
    argv = ["--temperature", "0", "--prompt", "A film", "--prompt", "No", "--stop_at_eos"]
    assert generated(argv, capsys) == [f"A film{word}", f"No{word}{word}"]
    steps = iter([[warm], [stop]] * 9)
    assert generated([*argv, "--stream"], capsys) == [f"A film{word}", f"No{word}"]
    steps = iter([[warm, stop]] * 9)
    assert generated(argv[:-1], capsys)[0] == f"A film{word * 9}"


@pytest.mark.parametrize("flags", [["--dtype", "bfloat16"], ["--quantize", "int8"]])
def test_other_storages_generate(
    causal_workplace: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    argv = ["--temperature", "0", "--prompt", "A film", "--max_new_tokens", "9", *flags]
    status, out, _ = run(argv, capsys)
    assert status == 0
    assert ("int8 weights: the largest error of a weight is 0.0" in out) == ("int8" in flags)
    quantize = "int8" in flags
    model = prepare_for_decoding(load_pretrained("stories42M.pt"), torch.bfloat16, quantize)
    context = torch.tensor([Tokenizer().encode("A film", bos=True, eos=False)])
    text = Tokenizer().decode(model.generate(context, 9, 0.0)[0].tolist())
    assert Path("output/task_1/generated-sentence-temp-0.txt").read_text("utf-8") == text


@pytest.mark.parametrize(("quantize", "changed"), [(False, 0.01), (True, 0.01)])
def test_half_precision_changes_few_of_the_demos_choices(quantize: bool, changed: float) -> None:
    """Of 2,000 greedy choices on real text less than one in a hundred is another."""
    tokenizer = Tokenizer(tokenizer_model=ROOT / "data/demo/tokenizer.model")
    texts = [t for name in ("test", "dev") for t in read_documents(ROOT / f"data/demo/{name}.txt")]
    documents = [torch.tensor(tokenizer.encode(text, bos=True, eos=False)) for text in texts]
    blocks = pack(documents, 250)[:8, :-1]
    llama = load_pretrained(ROOT / "data/demo/model.pt")
    model = prepare_for_decoding(llama, torch.bfloat16, quantize)
    with torch.inference_mode():
        expected = llama(blocks, targets=blocks)[0].flatten(0, 1).argmax(dim=-1)
        actual = model.output(model.compute_hidden(blocks).flatten(0, 1)).argmax(dim=-1)
    assert len(actual) == 2000
    assert 0 < (actual != expected).float().mean() < changed


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        (["--temperature", "-0.1"], "--temperature: -0.1 is not a number of at least 0"),
        (["--temperature", "nan"], "--temperature: nan is not a number of at least 0"),
        (["--temperature", "inf"], "--temperature: inf is not a number of at least 0"),
        (["--top_k", "-1"], "--top_k: -1 is below 0"),
        (["--top_p", "0"], "--top_p: 0.0 is not in (0, 1]"),
        (["--top_p", "nan"], "--top_p: nan is not in (0, 1]"),
        (["--num_samples", "0"], "--num_samples: 0 is below 1"),
        (["--prompt", "-", "--prompt", "-"], "standard input can be read once only"),
        (["--prompt", "-"], "--prompt -: standard input is empty"),
        (["--quantize", "int8"], "--quantize int8: only for a causal model"),
        (["--quantize", "int2"], "--quantize: invalid choice: 'int2'"),
        (["--compile"], "--compile is not for --option generate"),
        (["--quantize", "int8", "--dtype", "float32"], "--quantize int8 computes in bfloat16"),
        (["--option", "prompt", "--stream"], "--stream is for --option generate only"),
        (["--option", "finetune", "--top_k", "3"], "--top_k is for --option generate only"),
        (["--store_dtype", "float16"], "--store_dtype is for --option pretrain only"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    pattern: str,
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    status, out, err = run(argv, capsys)
    assert status == 2
    assert re.fullmatch(rf"run_llama\.py: error: .*{re.escape(pattern)}.*\n", err), err
    assert "Temperature" not in out


def test_standard_input_that_is_no_text(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert main(["--prompt", "-"]) == 2
    error = "--prompt -: standard input is not UTF-8 text: unexpected end of data"
    assert capsys.readouterr().err == f"run_llama.py: error: {error}\n"
