"""Read the checkpoints that Meta publishes: a folder with `params.json` and `consolidated.00.pth`.

Source: `llama/model.py` of meta-llama/llama, `models/llama3/args.py` and `models/llama3/model.py`
of meta-llama/llama-models.

| `params.json`              | meaning here                                                       |
|----------------------------|--------------------------------------------------------------------|
| dim, n_layers, n_heads     | as in `LlamaConfig`; required                                      |
| n_kv_heads                 | as in `LlamaConfig`; missing: n_heads                              |
| vocab_size                 | -1 or missing: the number of rows of `tok_embeddings.weight`       |
| multiple_of                | the hidden size is rounded up to a multiple of it; missing: 256    |
| ffn_dim_multiplier         | factor of the hidden size; missing: none                           |
| norm_eps                   | `layer_norm_eps`; missing: 1e-5                                    |
| rope_theta                 | as in `LlamaConfig`; missing: 10000, as in Llama 1 and 2           |
| max_seq_len                | in tokens; missing, as in Meta's own files: 4096                   |
| max_batch_size,            | not used                                                           |
| model_parallel_size        |                                                                    |
| use_scaled_rope, quantization_args, lora_args | another model: an error, unless false or null   |

`consolidated.00.pth` is a state dict that `torch.save` wrote, mostly of bfloat16. Its names are
`tok_embeddings.weight`, `layers.N.attention.wq|wk|wv|wo.weight`,
`layers.N.feed_forward.w1|w2|w3.weight`, `layers.N.attention_norm|ffn_norm.weight`, `norm.weight`
and `output.weight`. The rotary embeddings rotate pairs (2i, 2i+1), as in this project, so no row is
permuted. Llama 1 and 2 also store `rope.freqs`, which is not used. A large model is cut into
several files (`consolidated.01.pth`, ...), which this module does not join.
"""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base_llama import check_claimed_size, is_tied, load_safely
from beyond.formats.files import META_CONFIG, META_WEIGHTS
from beyond.formats.json_file import read_json
from config import MAX_SIZE

WEIGHTS = "consolidated.00.pth"
REQUIRED = ("dim", "n_layers", "n_heads")
OPTIONAL = ("n_kv_heads", "vocab_size", "norm_eps", "rope_theta", "max_seq_len")
HIDDEN_SIZE = ("multiple_of", "ffn_dim_multiplier")
IGNORED = ("max_batch_size", "model_parallel_size")
OTHER_MODELS = {
    "use_scaled_rope": "RoPE scaling (Llama 3.1 and later)",
    "quantization_args": "quantized weights",
    "lora_args": "LoRA adapters",
}
MULTIPLE_OF = 256  # Meta's default
# Llama 2's context. The files do not give it; Llama 3 was trained with more, 8192.
MAX_SEQ_LEN = 4096
LARGEST_MULTIPLIER = 1000.0


def read_meta(folder: str | Path) -> dict[str, Any]:
    """Read a folder of Meta as a checkpoint, its tensors as stored.

    They are mapped into memory, not read, so `consolidated.00.pth` must not be written to in place
    while they are used.

    Args:
        folder: holds `params.json` and `consolidated.00.pth`; no other file is read.

    Returns:
        The dicts "model" and "model_args", for `Llama.from_checkpoint`.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file cannot be read, or describes a model that this project does not have.
    """
    folder = Path(folder)
    params = read_json(folder / META_CONFIG)
    shards = sorted(path.name for path in folder.glob(META_WEIGHTS))
    if len(shards) > 1:
        raise ValueError(
            f"{folder}: the model is cut into {len(shards)} files ({reprlib.repr(shards)}), and "
            f"only models in one file, {WEIGHTS}, can be read; use its Hugging Face folder"
        )
    path = folder / WEIGHTS
    weights = load_safely(path, mmap=True)
    if not isinstance(weights, dict) or "model" in weights:
        raise ValueError(f"{path}: expected a state dict, of names and tensors")
    check_claimed_size(weights, path)
    model_args = to_model_args(params, folder / META_CONFIG)
    return {"model": weights, "model_args": {**model_args, "tie_embeddings": is_tied(weights)}}


def to_model_args(params: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Translate the fields of `params.json` to `model_args`, without `tie_embeddings`.

    Args:
        params: name -> value; null means that the field is missing.
        path: of the file, for error messages.

    Raises:
        ValueError: a required field is missing, a field is unknown, the model is another than
            Llama 1, 2 or 3, or the hidden size cannot be computed. `LlamaConfig` checks the rest.
    """
    for name, what in OTHER_MODELS.items():
        if params.get(name):
            raise ValueError(
                f"{path}: {name}={reprlib.repr(params[name])} means {what}, which this program "
                "does not have; use a model without it"
            )
    known = {*REQUIRED, *OPTIONAL, *HIDDEN_SIZE, *IGNORED, *OTHER_MODELS}
    if unknown := sorted(params.keys() - known):
        raise ValueError(
            f"{path}: unknown field {reprlib.repr(unknown[0])}; known are {sorted(known)}"
        )
    given = {name: value for name, value in params.items() if value is not None}
    if missing := [name for name in REQUIRED if name not in given]:
        raise ValueError(f"{path}: the field {missing[0]} is missing")
    sizes = {"multiple_of": MULTIPLE_OF, **given}
    for name in ("dim", "multiple_of"):
        if type(sizes[name]) is not int or not 1 <= sizes[name] <= MAX_SIZE:
            value = reprlib.repr(sizes[name])
            raise ValueError(f"{path}: {name}={value} is not a whole number from 1 to {MAX_SIZE}")
    multiplier = given.get("ffn_dim_multiplier", 1)
    if type(multiplier) not in (int, float) or not 0 < multiplier <= LARGEST_MULTIPLIER:
        raise ValueError(
            f"{path}: ffn_dim_multiplier={reprlib.repr(multiplier)} is not a number in "
            f"(0, {LARGEST_MULTIPLIER:g}]"
        )
    return {
        "vocab_size": -1,
        "max_seq_len": MAX_SEQ_LEN,
        **{name: given[name] for name in (*REQUIRED, *OPTIONAL) if name in given},
        "multiple_of": sizes["multiple_of"],
        "hidden_dim": hidden_size(sizes["dim"], sizes["multiple_of"], multiplier),
        "causal": True,
    }


def hidden_size(dim: int, multiple_of: int, multiplier: float) -> int:
    """Compute the hidden size of SwiGLU as Meta's `FeedForward` does.

    That is 2/3 of 4 dim, cut to a whole number; times the multiplier, cut again; then rounded up to
    a multiple of `multiple_of`.
    """
    size = int(multiplier * int(8 * dim / 3))
    return multiple_of * -(-size // multiple_of)
