"""Folders of Hugging Face transformers: a Llama in safetensors, with its config and tokenizer.

| file | what it holds |
|---|---|
| `config.json` | the shape of the model (see `huggingface_config.py`) |
| `model.safetensors` | all weights (see `safetensors_files.py`), or |
| `model.safetensors.index.json` | `{"weight_map": {tensor: file}}`, and the files that it names |
| `generation_config.json` | the tokens that end a text; written, not read |
| `tokenizer.json`, `tokenizer_config.json` | see `huggingface_tokenizer.py` |
| `tokenizer.model` | a SentencePiece model (see `sentencepiece_json.py`) |

`NAMES` lists the tensors. Hugging Face rotates feature i of a head with feature i + head_dim / 2,
this project feature 2i with 2i + 1, both by the angle position * theta^(-2i / head_dim); so the
rows of the query and key matrices are in another order (`halves_to_pairs`).

Sources: github.com/huggingface/transformers 5.22, `models/llama/modeling_llama.py`,
`modeling_utils.py`.
"""

import glob
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base_llama import TENSORS_PER_LAYER
from beyond.formats.huggingface_config import describe_model, parse_hf_config
from beyond.formats.huggingface_files import CONFIG, WEIGHTS, weight_files
from beyond.formats.json_file import read_json
from beyond.formats.safetensors_files import locate_tensors, read_tensor, write_safetensors
from beyond.formats.sentencepiece_json import tokenizer_files
from config import LlamaConfig
from llama import Llama
from tokenizer import Tokenizer

logger = logging.getLogger(__name__)

NAMES = {  # ours -> theirs, without `.weight`; N is the number of the layer
    "tok_embeddings": "model.embed_tokens",
    "layers.N.attention_norm": "model.layers.N.input_layernorm",
    "layers.N.attention.compute_query": "model.layers.N.self_attn.q_proj",
    "layers.N.attention.compute_key": "model.layers.N.self_attn.k_proj",
    "layers.N.attention.compute_value": "model.layers.N.self_attn.v_proj",
    "layers.N.attention.compute_output": "model.layers.N.self_attn.o_proj",
    "layers.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    "layers.N.feed_forward.w1": "model.layers.N.mlp.gate_proj",
    "layers.N.feed_forward.w2": "model.layers.N.mlp.down_proj",
    "layers.N.feed_forward.w3": "model.layers.N.mlp.up_proj",
    "norm": "model.norm",
    "output": "lm_head",
}
EMBEDDINGS, OUTPUT = "tok_embeddings.weight", "output.weight"


def read_huggingface(folder: str | Path) -> dict[str, Any]:
    """Read a Hugging Face folder as a checkpoint: causal, under this project's names, in float32.

    Each tensor is copied out of its file and converted by itself, so the peak of memory is the
    float32 weights and one more tensor.

    Returns:
        The dicts "model" and "model_args".

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or `LlamaConfig` cannot describe the model.
    """
    folder = Path(folder)
    config = parse_hf_config(read_json(folder / CONFIG), folder / CONFIG)
    files = locate_tensors(weight_files(folder))
    least = config.n_layers * TENSORS_PER_LAYER  # checked before the shapes of so many are made
    if least > len(files):
        raise ValueError(
            f"{folder / CONFIG}: num_hidden_layers={config.n_layers} means {least} tensors or "
            f"more, but {folder} holds {len(files)}"
        )
    with torch.device("meta"):  # shapes without memory
        shapes = {name: tensor.shape for name, tensor in Llama(config).state_dict().items()}
    names = {their_name(name): name for name in shapes}
    weights = {}
    for name, path in files.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue  # in old files; computed from rope_theta
        if name not in names:
            raise ValueError(
                f"{path}: unexpected tensor {name[:100]!r}; only those of a Llama with "
                f"{config.n_layers} layers, without biases, are read"
            )
        ours = names[name]
        tensor = read_tensor(path, name, shapes[ours])
        n_heads = rotated_heads(ours, config)
        weights[ours] = halves_to_pairs(tensor, n_heads) if n_heads else tensor
    is_tied = config.tie_embeddings and tie(weights, folder)
    if missing := [their_name(name) for name in shapes if name not in weights]:
        raise ValueError(f"{folder}: the tensor {missing[0]} is missing")
    return {"model": weights, "model_args": config.to_model_args() | {"tie_embeddings": is_tied}}


def their_name(name: str) -> str:
    """Translate the name of a tensor to Hugging Face's."""
    key = name.removesuffix(".weight")
    layer = f".{key.split('.')[1]}." if key.startswith("layers.") else ".N."
    return NAMES[key.replace(layer, ".N.")].replace(".N.", layer) + ".weight"


def rotated_heads(name: str, config: LlamaConfig) -> int:
    """Return the number of heads of a query or key matrix; 0 for other tensors."""
    heads = {"compute_query": config.n_heads, "compute_key": config.n_kv_heads}
    return heads.get(name.split(".")[-2], 0)


def halves_to_pairs(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of a query or key matrix (n_heads * head_dim, dim) from theirs to ours.

    Feature i of the first half of a head becomes feature 2i, and i of the second half 2i + 1: with
    s in {0, 1}, ours[2i + s] = theirs[s * head_dim / 2 + i]. Queries and keys are reordered alike,
    so all their products stay the same.
    """
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def pairs_to_halves(weight: Tensor, n_heads: int) -> Tensor:
    """Undo `halves_to_pairs`."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def tie(weights: dict[str, Tensor], folder: Path) -> bool:
    """Use the embedding for the output too, or the other way round, whichever is stored.

    Returns:
        False, and nothing is changed, if both are stored and differ. transformers uses each of them
        then, whatever the config says (`PreTrainedModel.tie_weights`).
    """
    stored = [weights[name] for name in (EMBEDDINGS, OUTPUT) if name in weights]
    if len(stored) == 2 and not torch.equal(*stored):
        logger.warning("%s: embed_tokens and lm_head differ, so they are not tied", folder)
        return False
    weights.update(dict.fromkeys((EMBEDDINGS, OUTPUT), stored[0]) if stored else {})
    return True


def write_huggingface(
    folder: str | Path,
    llama: Llama,
    tokenizer: Tokenizer,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[Collection[str]], Iterable[str]] = iter,
) -> None:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer open, completely or not at all.

    A Hugging Face Llama is always causal, so a model in reference mode becomes another one.

    Args:
        folder: new, or empty.
        llama, tokenizer: the model and its tokenizer.
        dtype: of the stored weights: float32, float16 or bfloat16.
        progress: wraps the names of the tensors, as tqdm does.

    Raises:
        ValueError: the folder is in use, the tokenizer cannot be written, or a weight does not fit
            into `dtype`.
        OSError: the folder cannot be written.
    """
    files = tokenizer_files(tokenizer)
    fields = {
        CONFIG: describe_model(llama.config, tokenizer, dtype),
        # transformers stops at any of these tokens, as this project does.
        "generation_config.json": {"eos_token_id": sorted(tokenizer.stop_ids) or None},
    }
    for name, content in fields.items():
        files[name] = (json.dumps(content, indent=2) + "\n").encode()
    weights = llama.state_dict()
    if llama.config.tie_embeddings:
        del weights[OUTPUT]  # stored once; transformers ties it too

    def read(name: str) -> Tensor:
        n_heads = rotated_heads(name, llama.config)
        return pairs_to_halves(weights[name], n_heads) if n_heads else weights[name]

    with make_folder_atomically(Path(os.path.realpath(folder))) as unfinished:
        for name, data in files.items():
            (unfinished / name).write_bytes(data)
        shapes = {their_name(name): tensor.shape for name, tensor in weights.items()}
        write_safetensors(unfinished / WEIGHTS, shapes, map(read, progress(weights)), dtype)


@contextmanager
def make_folder_atomically(folder: Path) -> Iterator[Path]:
    """Make a folder under a temporary name, which it loses once its files are complete and on disk.

    Temporary folders that killed processes have left are removed; no other process may be writing
    to `folder`.

    Raises:
        ValueError: `folder` is a file, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not empty; choose another name or delete it")
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in unfinished.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if folder.is_dir():
            folder.rmdir()  # it is empty
        os.replace(unfinished, folder)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError) and not error.filename:  # such as a full disk
            error.filename = str(folder)
        raise
