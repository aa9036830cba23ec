"""Tokens of the prepared model: cache, masks, padded rows, sampling filters, stored weights.

The oracle is `Llama.generate`, the plain loop that computes the whole context in each step.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from beyond.decoding import (
    DecodingLlama,
    Projection,
    Sampler,
    greedy_token,
    last_row_mask,
    left_padding_mask,
    likeliest,
    prepare_for_decoding,
    stream,
)
from beyond.kv_cache import KVCache
from beyond.pretraining import pack
from llama import Llama, load_pretrained
from tests.conftest import ROOT, make_llama
from tokenizer import Tokenizer
from utils import read_documents

SHAPES: list[dict[str, Any]] = [
    {},  # n_rep 2
    {"n_kv_heads": 6},
    {"n_heads": 4, "n_kv_heads": 1, "n_layers": 3, "dim": 64},
    {"rope_theta": 500000.0},
    {"tie_embeddings": False},
]
TIED = pytest.mark.parametrize("tied", [True, False])


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(4, 320, shape, generator=torch.Generator().manual_seed(0))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def continue_rows(llama: Llama, tokens: Tensor, count: int, sampler: Sampler) -> Tensor:
    """Return the rows with the tokens that `stream` yields."""
    return torch.cat((tokens, *stream(llama, tokens, count, sampler)), dim=1)


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of positions of each call of `compute_hidden`, by either kind of model."""
    seen: list[int] = []
    for kind in (Llama, DecodingLlama):

        def recording(
            self: Llama,
            tokens: Tensor,
            *more: object,
            compute: Callable[..., Tensor] = kind.compute_hidden,
            **options: Any,
        ) -> Tensor:
            seen.append(tokens.shape[1])
            return compute(self, tokens, *more, **options)

        monkeypatch.setattr(kind, "compute_hidden", recording)
    return seen


# ------------------------------------------------------------------------- against the plain loop


@pytest.mark.parametrize("shape", SHAPES)
def test_prepared_model_generates_the_tokens_of_the_plain_loop(shape: dict[str, Any]) -> None:
    """100 greedy tokens, of which the last 59 are beyond max_seq_len, where the window slides."""
    llama = make_llama(causal=True, **{**shape, "max_seq_len": 48})
    context = random_tokens(2, 7)
    expected = llama.generate(context, 100, temperature=0.0)
    assert len(set(expected[0].tolist())) > 12  # not a loop of a few tokens, easy to match
    model = prepare_for_decoding(llama)
    assert isinstance(model, DecodingLlama)
    assert torch.equal(model.generate(context, 100, temperature=0.0), expected)


def test_prepared_model_generates_the_tokens_of_the_plain_loop_within_max_seq_len() -> None:
    llama = make_llama(causal=True, max_seq_len=256)
    context = random_tokens(1, 30)
    expected = llama.generate(context, 150, temperature=0.0)
    assert torch.equal(prepare_for_decoding(llama).generate(context, 150, 0.0), expected)


@pytest.mark.parametrize("kind", ["reference", "causal", "prepared"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_gives_the_tokens_of_the_plain_loop(kind: str, temperature: float) -> None:
    """Greedy and sampled with equal seeds, beyond max_seq_len too."""
    llama = make_llama(causal=kind != "reference", max_seq_len=24)
    context = random_tokens(3, 5)
    expected = llama.generate(context, 40, temperature, seeded(3))
    model = prepare_for_decoding(llama) if kind == "prepared" else llama
    assert isinstance(model, DecodingLlama) == (kind == "prepared")
    actual = continue_rows(model, context, 40, Sampler(temperature, generators=seeded(3)))
    assert torch.equal(actual, expected)
    assert torch.equal(model.generate(context, 40, temperature, seeded(3)), expected)
    if temperature:
        assert not torch.equal(llama.generate(context, 40, temperature, seeded(4)), expected)


def test_a_context_longer_than_max_seq_len_is_cut_as_in_the_plain_loop() -> None:
    llama = make_llama(causal=True, max_seq_len=8)
    context = random_tokens(2, 13)
    expected = llama.generate(context, 5, temperature=0.0)
    assert torch.equal(prepare_for_decoding(llama).generate(context, 5, 0.0), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_the_plain_loop_has_no_cache(widths: list[int], causal: bool) -> None:
    """In both modes each step computes the whole context, or its last max_seq_len tokens."""
    llama = make_llama(causal, max_seq_len=9)
    llama.generate(random_tokens(1, 7), 5, 0.0)
    assert widths == [7, 8, 9, 9, 9]
    list(stream(llama, random_tokens(1, 7), 5, Sampler(0.0)))
    assert widths == [7, 8, 9, 9, 9] * 2


def test_the_prepared_model_computes_one_position_per_step(widths: list[int]) -> None:
    """It reads the prompt once; beyond max_seq_len each step computes the whole window."""
    model = prepare_for_decoding(make_llama(causal=True))
    model.generate(random_tokens(1, 7), 4, 0.0)
    assert widths == [7, 1, 1, 1]
    widths.clear()
    model = prepare_for_decoding(make_llama(causal=True, max_seq_len=9))
    model.generate(random_tokens(1, 7), 5, 0.0)
    assert widths == [7, 1, 1, 9, 9]


def test_without_a_mask_there_is_no_prepared_model(llama: Llama) -> None:
    """Each new token changes the results at all other positions, so nothing can be cached."""
    assert prepare_for_decoding(llama) is llama


def test_rows_of_different_lengths_continue_as_if_alone() -> None:
    """Greedy and sampled, beyond max_seq_len too; the tokens in the padding do not matter."""
    model = prepare_for_decoding(make_llama(causal=True, max_seq_len=32))
    rows = [random_tokens(9), random_tokens(4), random_tokens(6)]
    padding = torch.tensor([0, 5, 3])
    idx = torch.full((3, 9), 77)
    for i, row in enumerate(rows):
        idx[i, padding[i] :] = row
    for temperature in (0.0, 1.0):
        sampler = Sampler(temperature, generators=[seeded(i) for i in range(3)])
        together = torch.cat((idx, *stream(model, idx, 60, sampler, padding)), dim=1)
        for i, row in enumerate(rows):
            alone = model.generate(row[None], 60, temperature, seeded(i))
            assert torch.equal(together[i, padding[i] :], alone[0]), (temperature, i)
    one = stream(model, idx[1:2], 20, Sampler(0.0), padding[1:2])  # a single row with padding
    assert torch.equal(
        torch.cat((rows[1][None], *one), dim=1), model.generate(rows[1][None], 20, 0.0)
    )


@pytest.mark.parametrize("causal", [False, True])
def test_only_the_prepared_model_takes_padded_rows(causal: bool) -> None:
    llama, padding = make_llama(causal), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="not a DecodingLlama would attend to the padding"):
        next(stream(llama, random_tokens(2, 3), 1, Sampler(), padding))


@pytest.mark.parametrize("kind", ["reference", "causal", "prepared"])
def test_stream_computes_only_the_tokens_that_are_asked_for(widths: list[int], kind: str) -> None:
    """Also, closing the stream puts a model that was training back into training mode."""
    llama = make_llama(causal=kind != "reference").train()
    model = prepare_for_decoding(llama) if kind == "prepared" else llama
    context = random_tokens(2, 5)
    tokens = stream(model, context, 10**9, Sampler(0.0))
    columns = list(islice(tokens, 6))
    assert len(widths) == 6
    tokens.close()  # type: ignore[attr-defined]
    assert torch.equal(torch.cat((context, *columns), dim=1), llama.generate(context, 6, 0.0))
    assert llama.training


@pytest.mark.parametrize("prepared", [False, True])
def test_stream_refuses_what_the_plain_loop_refuses(prepared: bool) -> None:
    llama = make_llama(causal=True)
    model = prepare_for_decoding(llama) if prepared else llama
    with pytest.raises(ValueError, match="max_new_tokens=-1 is negative"):
        next(stream(model, random_tokens(1, 3), -1, Sampler()))
    with pytest.raises(ValueError, match="seq >= 1"):
        next(stream(model, torch.zeros(1, 0, dtype=torch.long), 1, Sampler()))
    assert list(stream(model, random_tokens(1, 3), 0, Sampler())) == []


# ------------------------------------------------------------------------------- masks and cache


def test_left_padding_mask() -> None:
    expected = [
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]],
    ]
    mask = left_padding_mask(torch.tensor([0, 1]), 3)
    assert mask[:, 0].int().tolist() == expected
    assert torch.equal(last_row_mask(torch.tensor([0, 1]), 3), mask[:, :, -1:])


def test_cache_refuses_what_does_not_fit() -> None:
    cache = KVCache(4)
    key = torch.zeros(1, 2, 3, 8)
    assert cache.extend(key, key)[0].shape == (1, 2, 3, 8)
    with pytest.raises(ValueError, match="6 positions do not fit a cache of 4"):
        cache.extend(key, key)
    cache.append(torch.zeros(2, 2, 8))
    with pytest.raises(ValueError, match="5 positions do not fit a cache of 4"):
        cache.append(torch.zeros(2, 2, 8))
    large = KVCache(9)
    large.extend(key, key)
    with pytest.raises(ValueError, match="one position at a time, not 2"):
        large.extend(key[:, :, :2], key[:, :, :2])


def test_prepared_model_refuses_too_long_a_sequence() -> None:
    model = prepare_for_decoding(make_llama(causal=True, max_seq_len=8))
    with pytest.raises(ValueError, match="9 tokens is longer than max_seq_len=8"):
        model.compute_hidden(random_tokens(1, 9))


# ------------------------------------------------------------------------------ sampling filters


def draw_frequencies(count: int = 20_000, **filters: Any) -> Tensor:
    """Sample tokens with probabilities .1 .4 .2 .3; returns their relative frequencies."""
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    tokens = Sampler(1.0, generators=seeded(0), **filters)(logits.expand(count, -1))
    return torch.bincount(tokens[:, 0], minlength=4) / count


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"top_k": 0}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 99}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.01}, [0, 1, 0, 0]),  # the likeliest token always stays
        ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),  # the token that reaches top_p stays too
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),  # top_p of the two tokens that top_k keeps
    ],
)
def test_top_k_and_top_p(filters: dict[str, Any], expected: list[float]) -> None:
    # four standard errors of 20,000 draws
    torch.testing.assert_close(
        draw_frequencies(**filters), torch.tensor(expected, dtype=torch.float32), atol=0.014, rtol=0
    )


def test_top_p_keeps_no_token_after_those_that_reach_it_exactly() -> None:
    """.5 and .25 are the smallest set with a total probability of .75."""
    probabilities = torch.tensor([[0.125, 0.5, 0.125, 0.25]], dtype=torch.float64)
    assert Sampler(top_p=0.75).filter(probabilities).tolist() == [[0, 0.5, 0, 0.25]]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_single_row_is_sampled_with_one_thread(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """PyTorch's other threads would be in the way of NumPy's; afterwards there are as many."""
    multinomial, seen = torch.multinomial, []

    def recording(*args: Any, **options: Any) -> Tensor:
        seen.append(torch.get_num_threads())
        return multinomial(*args, **options)

    monkeypatch.setattr(torch, "multinomial", recording)
    torch.set_num_threads(2)
    try:
        Sampler(1.0)(torch.zeros(rows, 9))
        assert (seen, torch.get_num_threads()) == ([rows], 2)
    finally:
        torch.set_num_threads(1)


def test_filters_do_not_change_the_greedy_token() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert Sampler(0.0, top_k=2, top_p=0.1)(logits).tolist() == [[1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
    ],
)
def test_bad_sampler_arguments_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**arguments)


@pytest.mark.parametrize("vocab", [320, 128 * 40, 5])
def test_likeliest_tokens_are_the_sorted_ones(vocab: int) -> None:
    """Many logits are equal; then the first token is the greedy one; others are in any order."""
    logits = torch.randint(-40, 40, (6, vocab), generator=seeded(0)) / 8
    expected, order = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(greedy_token(logits), order[:, :1])
    tokens = likeliest(logits, min(16, vocab))
    assert torch.equal(logits.gather(1, tokens), expected[:, :16])
    assert all(len(set(row)) == len(row) for row in tokens.tolist())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("vocab", [320, 128 * 40])
def test_greedy_tokens_of_bad_logits_are_an_error(vocab: int, bad: float) -> None:
    logits = torch.zeros(2, vocab)
    logits[1, 77] = bad
    if bad < 0:  # a single token may be impossible
        assert Sampler(0.0)(logits).tolist() == [[0], [0]]
        logits[1] = bad
    with pytest.raises(ValueError, match="the logits are infinite or NaN"):
        Sampler(0.0)(logits)


@pytest.mark.parametrize("generators", [None, [torch.Generator()]])
def test_infinite_logits_are_an_error(generators: Any) -> None:
    with pytest.raises(ValueError, match="the logits are infinite or NaN"):
        Sampler(1.0, generators=generators)(torch.tensor([[1.0, float("inf")]]))


# ------------------------------------------------------------------------------- stored weights


@pytest.mark.parametrize(("out", "size"), [(24, 16), (7, 20), (1, 40), (33, 5)])
def test_projection_computes_what_it_stores(out: int, size: int) -> None:
    """All three formats against a float64 product, for one row and for several, of any size."""
    generator = seeded(0)
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


def test_int8_error_is_at_most_half_a_step() -> None:
    weight = torch.randn(24, 16, generator=seeded(0))
    projection = Projection(weight, torch.bfloat16, quantize=True)
    assert projection.weight.dtype == torch.int8 and projection.scales is not None
    steps = projection.scales.float()[:, None]
    errors = (projection.weight.float() * steps - weight).abs()
    # Half a step; the largest weight of a row may lose as much again, since the scale is rounded.
    assert (errors <= 0.5 * steps + 127 * steps / 256).all()
    assert projection.error == errors.max()
    assert Projection(torch.zeros(3, 16), torch.bfloat16, quantize=True).error == 0


@TIED
@pytest.mark.parametrize("quantize", [False, True])
def test_bfloat16_logits_are_near_the_float32_ones(quantize: bool, tied: bool) -> None:
    """bfloat16 and int8 move the logits by a few hundredths of their standard deviation."""
    llama = make_llama(causal=True, tie_embeddings=tied, rope_theta=500000.0)
    tokens = random_tokens(2, 40)
    expected = llama(tokens, targets=tokens)[0]
    model = prepare_for_decoding(llama, torch.bfloat16, quantize)
    hidden = model.compute_hidden(tokens)
    logits = model.output(hidden.flatten(0, 1)).view_as(expected).float()
    assert (logits - expected).std() < 0.05 * expected.std()
    assert (logits - expected).std() > 1e-4 * expected.std()


@TIED
@pytest.mark.parametrize("quantize", [False, True])
def test_an_exact_head_computes_all_logits_in_float32(quantize: bool, tied: bool) -> None:
    """Without it only the highest logits are float32's; the hidden states are the same."""
    llama = make_llama(causal=True, tie_embeddings=tied)
    exact, rounded = (
        prepare_for_decoding(llama, torch.bfloat16, quantize, exact_head=exact_head)
        for exact_head in (True, False)
    )
    hidden = exact.compute_hidden(random_tokens(2, 9)).flatten(0, 1)  # (18, dim)
    expected = llama.output(llama.norm(hidden))
    torch.testing.assert_close(exact.output(hidden), expected)
    difference = (rounded.output(hidden) - expected).abs()  # (18, vocab)
    highest = rounded.output(hidden).topk(4).indices
    assert difference.gather(1, highest).max() < 1e-4 < difference.mean()


def test_only_causal_models_can_be_quantized(llama: Llama) -> None:
    with pytest.raises(ValueError, match="only for a causal model"):
        prepare_for_decoding(llama, quantize=True)


@pytest.fixture(scope="module")
def demo_choices() -> tuple[Llama, Tensor, Tensor]:
    """The demo's model, blocks (24, 250) of real text, and the greedy choice at each position."""
    tokenizer = Tokenizer(tokenizer_model=ROOT / "data/demo/tokenizer.model")
    texts = [t for name in ("test", "dev") for t in read_documents(ROOT / f"data/demo/{name}.txt")]
    documents = [torch.tensor(tokenizer.encode(text, bos=True, eos=False)) for text in texts]
    blocks = pack(documents, 250)[:24, :-1]
    llama = load_pretrained(ROOT / "data/demo/model.pt")
    with torch.inference_mode():
        choices = llama(blocks, targets=blocks)[0].flatten(0, 1).argmax(dim=-1)
    return llama, blocks, choices


@pytest.mark.parametrize(
    ("quantize", "changed"), [(False, 0.01), pytest.param(True, 0.01, marks=pytest.mark.sweep)]
)
def test_bfloat16_changes_few_of_the_demos_choices(
    demo_choices: tuple[Llama, Tensor, Tensor], quantize: bool, changed: float
) -> None:
    """Of 6,000 greedy choices on real text, fewer than one in a hundred change."""
    llama, blocks, expected = demo_choices
    model = prepare_for_decoding(llama, torch.bfloat16, quantize)
    with torch.inference_mode():
        actual = model.output(model.compute_hidden(blocks).flatten(0, 1)).argmax(dim=-1)
    assert len(actual) == 6000
    assert 0 < (actual != expected).float().mean() < changed
