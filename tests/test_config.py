"""LlamaConfig: what it derives, what it refuses, and what it reads of a checkpoint."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from config import LlamaConfig


def test_defaults_are_those_of_stories42m() -> None:
    config = LlamaConfig()
    assert (config.n_kv_heads, config.n_rep, config.head_dim, config.hidden_dim) == (8, 1, 64, 1376)
    assert config.layer_norm_eps == 1e-5 and config.causal is False
    assert config.rope_theta == 10000.0 and config.tie_embeddings is True


@pytest.mark.parametrize(
    ("dim", "multiple_of", "hidden_dim"),
    [(512, 32, 1376), (288, 32, 768), (48, 32, 128), (48, 1, 128)],
)
def test_hidden_dim_is_rounded_up(dim: int, multiple_of: int, hidden_dim: int) -> None:
    assert LlamaConfig(dim=dim, n_heads=2, multiple_of=multiple_of).hidden_dim == hidden_dim


def test_config_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        LlamaConfig().dim = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dim": 510}, "dim=510 is not divisible by n_heads=8"),
        ({"n_kv_heads": 3}, "n_heads=8 is not divisible by n_kv_heads=3"),
        ({"dim": 40, "n_heads": 8}, "odd head size 5"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"dim": 64.0}, "dim=64.0"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"max_seq_len": "1024"}, "max_seq_len='1024'"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps=0.0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps=nan"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"causal": 1}, "causal=1"),
        ({"tie_embeddings": 0}, "tie_embeddings=0 is not True or False"),
        ({"tie_embeddings": "false"}, "tie_embeddings='false' is not True or False"),
        ({"rope_theta": 0.5}, "rope_theta=0.5 is not a number in"),
        ({"rope_theta": -10000.0}, "rope_theta=-10000.0 is not a number in"),
        ({"rope_theta": True}, "rope_theta=True is not a number in"),
        ({"rope_theta": "10000"}, "rope_theta='10000' is not a number in"),
        ({"rope_theta": float("nan")}, "rope_theta=nan is not a number in"),
        ({"rope_theta": float("inf")}, "rope_theta=inf is not a number in"),
        ({"rope_theta": 10**400}, "rope_theta=1000.*0000 is not a number in"),
        ({"hidden_dim": -1}, "hidden_dim=-1"),
        ({"dim": 2**40}, "dim is above 1048576"),
        ({"dim": 10**400}, "dim is above 1048576"),
        ({"dim": 2**20}, "hidden_dim is above 1048576"),
        ({"dim": "x" * 9999}, "dim='xxxxxxxxxxxx...xxxxxxxxxxxxx' is not"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**values)


def test_model_args_of_other_writers() -> None:
    config = LlamaConfig.from_model_args(
        {"dim": 64, "n_heads": 4, "n_kv_heads": None, "norm_eps": 1e-6, "max_seq_len": 256}
    )
    assert config == LlamaConfig(dim=64, n_heads=4, layer_norm_eps=1e-6, max_seq_len=256)
    metas = {"rope_theta": 500000, "tie_embeddings": None, "max_batch_size": 32}
    assert LlamaConfig.from_model_args(metas) == LlamaConfig(rope_theta=500000.0)


def test_model_args_round_trip() -> None:
    config = LlamaConfig(
        dim=48, n_heads=6, n_kv_heads=3, causal=True, rope_theta=500000.0, tie_embeddings=False
    )
    assert LlamaConfig.from_model_args(config.to_model_args()) == config


def test_unknown_and_doubled_model_args_are_named() -> None:
    with pytest.raises(ValueError, match="unknown model argument 'n_expert'"):
        LlamaConfig.from_model_args({"n_expert": 8})
    with pytest.raises(ValueError, match="'layer_norm_eps' is given twice"):
        LlamaConfig.from_model_args({"norm_eps": 1e-6, "layer_norm_eps": 1e-6})


def test_deeply_nested_values_are_errors() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    for name in ("dim", "dropout", "layer_norm_eps", "rope_theta", "tie_embeddings", "causal"):
        with pytest.raises(ValueError, match=name):
            LlamaConfig.from_model_args({name: nested})
