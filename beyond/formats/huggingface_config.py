"""The config.json of a Hugging Face Llama.

| fields | what |
|---|---|
| those of `SIZES` | the shape |
| `rope_theta`, at the top or in `rope_parameters` | RoPE base; else 10,000 |
| `head_dim` | if given, hidden_size / num_attention_heads |
| those of `FIXED`, `rope_scaling` | if given, as this project's model computes |
| `bos_token_id`, `eos_token_id`, `architectures`, `torch_dtype` | written, not read |

Sources: github.com/huggingface/transformers 5.22, `models/llama/configuration_llama.py` and
`modeling_rope_utils.py`.
"""

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from config import LlamaConfig
from tokenizer import Tokenizer

SIZES = {  # ours -> theirs
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "max_seq_len": "max_position_embeddings",
    "layer_norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
DEFAULTS = {  # transformers' own, for the fields of `SIZES` that may be missing
    "num_key_value_heads": None,  # as many as num_attention_heads
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
# Fields with only one value that this project can compute, which is also their default.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}


def parse_hf_config(fields: Mapping[str, Any], path: str | Path) -> LlamaConfig:
    """Build the config, causal, that the fields of a config.json describe.

    Raises:
        ValueError: it is another kind of model than this project's, or a field has a bad value;
            the message names the path and the field.
    """
    if (kind := fields.get("model_type")) != "llama":
        raise ValueError(f'{path}: model_type is {reprlib.repr(kind)}; only "llama" is read')
    for name, only in FIXED.items():
        if (value := fields.get(name)) is not None and value != only:
            raise ValueError(f"{path}: {name} is {reprlib.repr(value)}; only {only!r} is read")
    values: dict[str, Any] = {}
    for ours, name in SIZES.items():
        values[ours] = DEFAULTS.get(name) if fields.get(name) is None else fields[name]
        if values[ours] is None and name not in DEFAULTS:
            raise ValueError(f"{path}: {name} is missing")
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(name) or {}  # transformers 5 has rope_theta in it, older ones beside it
    if not isinstance(rope, dict) or rope.keys() - {"rope_theta", "rope_type", "type"}:
        raise ValueError(f"{path}: {name} is {reprlib.repr(rope)}; RoPE scaling is not read")
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise ValueError(f'{path}: {name}: rope_type is {reprlib.repr(kind)}; it must be "default"')
    values["rope_theta"] = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    try:
        config = LlamaConfig(**values, causal=True)
    except ValueError as error:  # says it with our names
        message = re.sub(r"\w+", lambda word: SIZES.get(word[0], word[0]), str(error))
        raise ValueError(f"{path}: {message}") from None
    if (head_dim := fields.get("head_dim")) not in (None, config.head_dim):
        raise ValueError(
            f"{path}: head_dim is {reprlib.repr(head_dim)}; only hidden_size / "
            f"num_attention_heads, here {config.head_dim}, is read"
        )
    return config


def describe_model(config: LlamaConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """Return the fields of a config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,  # at the top, where transformers 4 and 5 find it
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
