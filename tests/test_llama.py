"""The model: its parts and its whole against independent implementations. `uv run pytest tests`."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from config import LlamaConfig
from llama import Attention, FeedForward, Llama, LlamaLayer, RMSNorm, sample_next_token
from rope import apply_rotary_emb
from tests.conftest import ROOT, make_llama
from tests.oracle import hugging_face_forward, numpy_forward

SHAPES: list[dict[str, Any]] = [
    {},
    {"n_kv_heads": 6},
    {"n_kv_heads": 1, "n_layers": 3},
    {"dim": 40, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 52, "vocab_size": 77},
    {"rope_theta": 500000.0},
    {"tie_embeddings": False},
]


def random_tokens(batch: int, seq: int, vocab_size: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (batch, seq), generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_forward_matches_numpy_float64(shape: dict[str, Any], causal: bool) -> None:
    model = make_llama(causal, **shape)
    tokens = random_tokens(3, 11, model.config.vocab_size)
    expected_logits, expected_hidden = numpy_forward(model, tokens)
    logits, hidden = model(tokens, tokens)
    torch.testing.assert_close(
        hidden.detach(), torch.tensor(expected_hidden).float(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        logits.detach(), torch.tensor(expected_logits).float(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_causal_forward_matches_hugging_face(shape: dict[str, Any]) -> None:
    model = make_llama(causal=True, **shape)
    tokens = random_tokens(3, 11, model.config.vocab_size)
    theirs, their_hidden = hugging_face_forward(model, tokens)
    ours, our_hidden = model(tokens, tokens)
    torch.testing.assert_close(ours.detach(), theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(our_hidden.detach(), their_hidden, atol=1e-4, rtol=0)


def test_forward_gives_last_column_without_targets(llama: Llama) -> None:
    tokens = random_tokens(3, 11, 320)
    last, hidden = llama(tokens)
    every, same_hidden = llama(tokens, tokens)
    assert last.shape == (3, 1, 320) and every.shape == (3, 11, 320) and hidden.shape == (3, 11, 48)
    torch.testing.assert_close(last, every[:, -1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(hidden, same_hidden, atol=0, rtol=0)


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 6}, {"n_layers": 1}])
@pytest.mark.parametrize("causal", [False, True])
def test_one_position_of_each_row_is_the_same_alone(shape: dict[str, Any], causal: bool) -> None:
    """Its value against float64, and its gradients against those of all positions' hidden states.

    1e-6 of the largest gradient is a few rounding errors of float32.
    """
    model = make_llama(causal, **shape).train()
    tokens = random_tokens(4, 11, 320)
    positions = torch.tensor([10, 0, 6, 3])
    logits, hidden = model(tokens, positions=positions)
    rows = torch.arange(4)
    expected_logits, expected_hidden = (x[rows, positions] for x in numpy_forward(model, tokens))
    assert hidden.shape == (4, 1, 48) and logits.shape == (4, 1, 320)
    for actual, expected in ((hidden, expected_hidden), (logits, expected_logits)):
        torch.testing.assert_close(
            actual[:, 0].detach(), torch.tensor(expected).float(), atol=1e-5, rtol=0
        )
    direction = torch.randn(4, 48, generator=torch.Generator().manual_seed(2))
    names, parameters = zip(*model.named_parameters(), strict=True)
    alone, among_all = (
        torch.autograd.grad((states * direction).sum(), parameters)
        for states in (hidden[:, 0], model(tokens)[1][rows, positions])
    )
    for name, actual, expected in zip(names, alone, among_all, strict=True):
        largest = expected.abs().max()
        assert largest > 0 and (actual - expected).abs().max() < 1e-6 * largest, name


def test_dropout_of_one_position_follows_the_seed() -> None:
    model = make_llama(causal=True, dropout=0.5).train()
    tokens, positions = random_tokens(3, 7, 320), torch.tensor([6, 2, 4])
    hidden = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        hidden.append(model(tokens, positions=positions)[1])
    assert torch.equal(hidden[0], hidden[1]) and not torch.equal(hidden[0], hidden[2])


def test_generate_computes_only_the_last_column_of_the_last_layer(llama: Llama) -> None:
    counts = []
    for name in ("compute_output", "compute_key"):
        linear = getattr(llama.layers[-1].attention, name)
        linear.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[1]))
    llama.generate(random_tokens(2, 5, 320), 2)
    assert counts == [5, 1, 6, 1]


def test_reference_mode_sees_later_tokens_and_causal_mode_does_not() -> None:
    tokens = random_tokens(2, 9, 320)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 320
    for causal in (False, True):
        model = make_llama(causal)
        before, after = (model(t)[1][:, :5].detach() for t in (tokens, changed))
        assert torch.equal(before, after) == causal


def test_course_data_proves_the_missing_mask() -> None:
    """Both rows of the course's data begin with one token, yet differ at position 0."""
    path = ROOT / "sanity_check.data"
    if not path.exists():
        pytest.skip("sanity_check.data is not here (data/download.py)")
    hidden = torch.load(path, weights_only=True)["hidden_states"]
    assert (hidden[0, 0] - hidden[1, 0]).abs().max() > 1

    # A causal model cannot do that, and a model without a mask does it.
    rows = torch.tensor([[101, 7, 20, 102, 0, 0], [101, 7, 15, 28, 20, 102]])
    assert torch.equal(*make_llama(causal=True)(rows)[1][:, 0].detach())
    reference = make_llama(causal=False)(rows)[1][:, 0].detach()
    assert (reference[0] - reference[1]).abs().max() > 0.01


def test_rms_norm_matches_torch() -> None:
    x = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(0)) * 0.01
    norm = RMSNorm(12, eps=1e-3)
    nn.init.normal_(norm.weight)
    expected = F.rms_norm(x, (12,), norm.weight, eps=1e-3)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.norm(x), F.rms_norm(x, (12,), eps=1e-3))


def test_rms_norm_casts_back_before_it_scales() -> None:
    """Meta's order: a bfloat16 input with a float32 gain gives float32."""
    norm = RMSNorm(12, eps=1e-5)
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 12).bfloat16()
    output = norm(x)
    assert output.dtype == torch.float32
    assert torch.equal(output, F.rms_norm(x.float(), (12,), eps=1e-5).bfloat16() * norm.weight)


@pytest.mark.parametrize("causal", [False, True])
def test_key_value_heads_are_shared_by_consecutive_query_heads(causal: bool) -> None:
    config = LlamaConfig(dim=48, n_heads=6, n_kv_heads=3, causal=causal)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, 6, 7, 8, generator=generator)
    key, value = torch.randn(2, 5, 3, 7, 8, generator=generator)
    attention = Attention(config).eval()
    actual = attention.compute_query_key_value_scores(query, key, value)
    assert actual.shape == (5, 6, 7, 8)
    for head in range(6):
        scores = query[:, head] @ key[:, head // 2].mT / math.sqrt(8)  # (batch, seq, seq)
        if causal:
            scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
        expected = scores.softmax(dim=-1) @ value[:, head // 2]
        torch.testing.assert_close(actual[:, head], expected, atol=1e-5, rtol=1e-5)


def test_attention_drops_out_in_training_only() -> None:
    config = LlamaConfig(dim=48, n_heads=6, dropout=0.5)
    attention = Attention(config)
    heads = torch.randn(3, 2, 6, 7, 8)
    torch.manual_seed(0)
    outputs = [attention.compute_query_key_value_scores(*heads) for _ in range(2)]
    assert not torch.equal(*outputs)
    attention.eval()
    outputs = [attention.compute_query_key_value_scores(*heads) for _ in range(2)]
    assert torch.equal(*outputs)


def test_swiglu_is_the_gated_silu() -> None:
    config = LlamaConfig(dim=48, n_heads=6)
    feed_forward = FeedForward(config).eval()
    x = torch.randn(5, 48)
    gate, up = x @ feed_forward.w1.weight.T, x @ feed_forward.w3.weight.T
    expected = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(feed_forward.SwiGLU(x), expected)
    torch.testing.assert_close(feed_forward(x), expected @ feed_forward.w2.weight.T)


def test_layer_adds_its_parts_to_the_residual() -> None:
    layer = LlamaLayer(0, LlamaConfig(dim=48, n_heads=6)).eval()
    x = torch.randn(2, 5, 48)
    nn.init.zeros_(layer.attention.compute_output.weight)
    torch.testing.assert_close(layer(x), x + layer.feed_forward(layer.ffn_norm(x)))
    nn.init.zeros_(layer.feed_forward.w2.weight)
    assert torch.equal(layer(x), x)


def test_initial_weights() -> None:
    """Normal with deviation 0.02; w3 and compute_output smaller by 1 / sqrt(2 n_layers)."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=500, dim=96, n_layers=8, n_heads=6))
    small = 0.02 / 4
    for name, expected in {
        "tok_embeddings.weight": 0.02,
        "layers.3.attention.compute_query.weight": 0.02,
        "layers.3.attention.compute_output.weight": small,
        "layers.3.feed_forward.w1.weight": 0.02,
        "layers.3.feed_forward.w2.weight": 0.02,
        "layers.3.feed_forward.w3.weight": small,  # Faithful: the assignment's own choice
    }.items():
        # the deviation of 9,000 draws is within 3% with a chance of 1 - 1e-4
        assert model.get_parameter(name).std().item() == pytest.approx(expected, rel=0.03), name
    assert torch.equal(model.norm.weight, torch.ones(96))


def test_embedding_and_output_are_one_tensor_unless_the_config_says_otherwise() -> None:
    """Two matrices are drawn independently, each with deviation 0.02."""
    tied, untied = (
        Llama(LlamaConfig(vocab_size=500, dim=96, n_layers=1, n_heads=6, tie_embeddings=tie))
        for tie in (True, False)
    )
    assert tied.tok_embeddings.weight is tied.output.weight
    embeddings, output = untied.tok_embeddings.weight, untied.output.weight
    counts = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert counts[1] - counts[0] == embeddings.numel() == 500 * 96
    for matrix, expected in ((embeddings, 0.02), (output, 0.02), (embeddings - output, 0.0283)):
        assert matrix.std().item() == pytest.approx(expected, rel=0.03)  # as in the test above


def test_the_rope_base_is_the_configs() -> None:
    """A larger base turns more slowly, so the same model computes something else."""
    tokens = random_tokens(2, 11, 320)
    _, hidden = make_llama(True)(tokens)
    _, other = make_llama(True, rope_theta=500000.0)(tokens)
    torch.testing.assert_close(hidden[:, 0], other[:, 0])  # position 0 is not rotated
    assert (hidden - other)[:, 1:].abs().amax(dim=-1).min() > 1e-3


def test_rope_rejects_what_does_not_fit() -> None:
    x = torch.zeros(1, 5, 2, 6)
    with pytest.raises(ValueError, match="5 tokens .* max_seq_len=4"):
        apply_rotary_emb(x, x, head_dim=6, max_seq_len=4)
    with pytest.raises(ValueError, match="head_dim=5 is odd"):
        apply_rotary_emb(x, x, head_dim=5, max_seq_len=9)
    with pytest.raises(ValueError, match="head_dim=4, but query has 6"):
        apply_rotary_emb(x, x, head_dim=4, max_seq_len=9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rope_keeps_the_dtype_and_computes_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(2, 9, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    rotated, _ = apply_rotary_emb(x, x, 8, 16)
    assert rotated.dtype == dtype
    expected, _ = apply_rotary_emb(x.float(), x.float(), 8, 16)
    assert torch.equal(rotated, expected.to(dtype))


def test_rope_tables_made_while_evaluating_serve_training() -> None:
    x = torch.randn(1, 4, 1, 10, requires_grad=True)
    with torch.inference_mode():
        apply_rotary_emb(x, x, 10, 37)
    apply_rotary_emb(x, x, 10, 37)[0].sum().backward()
    assert x.grad is not None


def test_too_long_a_sequence_is_an_error(llama: Llama) -> None:
    with pytest.raises(ValueError, match="129 tokens is longer than max_seq_len=128"):
        llama(random_tokens(1, 129, 320))


def test_generate_is_greedy_at_temperature_zero(llama: Llama) -> None:
    """Each token is the argmax of a fresh forward pass, whatever the seed."""
    context = random_tokens(2, 5, 320)
    texts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        texts.append(llama.generate(context, 12, temperature=0.0))
    assert torch.equal(*texts) and texts[0].shape == (2, 17)
    assert torch.equal(texts[0][:, :5], context)
    for length in range(5, 17):
        logits, _ = llama(texts[0][:, :length])
        assert torch.equal(logits[:, -1].argmax(dim=-1), texts[0][:, length])


def test_generate_gives_equal_text_for_equal_seeds(llama: Llama) -> None:
    context = random_tokens(2, 5, 320)
    texts = [
        llama.generate(context, 12, 1.0, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)
    ]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_generate_crops_the_context_to_max_seq_len() -> None:
    model = make_llama(causal=False, max_seq_len=8)
    context = random_tokens(1, 13, 320)
    text = model.generate(context, 3, temperature=0.0)
    assert torch.equal(text[:, :13], context)
    for length in (13, 14, 15):
        logits, _ = model(text[:, length - 8 : length])
        assert logits[0, -1].argmax() == text[0, length]


@pytest.mark.parametrize("training", [False, True])
def test_generate_restores_the_mode(llama: Llama, training: bool) -> None:
    llama.train(training)
    llama.generate(random_tokens(1, 3, 320), 2)
    assert llama.training == training
    with pytest.raises(ValueError):
        llama.generate(random_tokens(1, 3, 320), 2, temperature=-1.0)
    assert llama.training == training


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_frequencies_match_softmax(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    count = 40_000
    draws = sample_next_token(
        logits.expand(count, -1), temperature, torch.Generator().manual_seed(0)
    )
    frequencies = torch.bincount(draws[:, 0], minlength=5) / count
    expected = torch.softmax(logits / temperature, dim=0)
    # five standard deviations of a share: a false alarm in one of a million seeds
    assert ((frequencies - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()


def test_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for temperature in (1e-3, 1e-30, 5e-324):
        assert sample_next_token(logits, temperature).tolist() == [[1]]


@pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf])
def test_bad_temperature_is_an_error(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        sample_next_token(torch.zeros(1, 4), temperature)


def test_bad_generate_arguments_are_errors(llama: Llama) -> None:
    with pytest.raises(ValueError, match="max_new_tokens=-1"):
        llama.generate(random_tokens(1, 3, 320), -1)
    with pytest.raises(ValueError, match="seq >= 1"):
        llama.generate(torch.zeros(1, 0, dtype=torch.long), 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("causal", [False, True])
def test_cuda_matches_cpu(causal: bool) -> None:
    model = make_llama(causal)
    tokens = random_tokens(3, 11, 320)
    expected = model(tokens)
    actual = model.cuda()(tokens.cuda())
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-4, rtol=1e-4)
