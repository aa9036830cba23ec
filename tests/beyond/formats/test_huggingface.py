"""Hugging Face folders against transformers itself, in both directions, and damaged folders.

uv run pytest tests/beyond/formats/test_huggingface.py
"""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from beyond.formats.huggingface import (
    halves_to_pairs,
    pairs_to_halves,
    read_huggingface,
    write_huggingface,
)
from beyond.formats.huggingface_files import count_pieces, find_tokenizer, weight_files
from llama import Llama
from tests.conftest import ROOT, make_llama
from tokenizer import Tokenizer

# All sizes differ: 6 heads of 8 features, 3 of them for keys and values, 2 layers.
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
QUERY = "model.layers.0.self_attn.q_proj.weight"
# Logits are of order 10, so float32 rounds them to about 1e-6; the issue at stake is 1e-4.
TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-4}


def make_theirs(tied: bool = False, theta: float = 500000.0) -> Any:
    """Make a random model of transformers whose outputs are of order one."""
    torch.manual_seed(1)
    rope = {"rope_theta": theta, "rope_type": "default"}
    config = transformers.LlamaConfig(**SIZES, rope_parameters=rope, tie_word_embeddings=tied)
    theirs = transformers.LlamaForCausalLM(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return theirs


def open_theirs(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """Open a folder with transformers, in the stored dtype by default."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")


def read_ours(folder: Path) -> Llama:
    return Llama.from_checkpoint(read_huggingface(folder), folder)


def logits_of_both(ours: Llama, theirs: Any) -> tuple[Tensor, Tensor]:
    """Compute the logits of all positions of 5 random rows of 17 tokens."""
    tokens = torch.randint(ours.config.vocab_size, (5, 17))
    with torch.no_grad():
        return ours(tokens, tokens)[0], theirs(tokens).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of an untied model, written by transformers."""
    make_theirs().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON object; a value of `...` deletes the field."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


def edit_tensors(path: Path, **changes: Tensor | None) -> None:
    """Change tensors of a safetensors file; None deletes a tensor. `__` in a name means a dot."""
    tensors: dict[str, Any] = safetensors.torch.load_file(path)
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.torch.save_file(kept, path, {"format": "pt"})


# ---------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_logits_of_a_read_model_equal_transformers(
    tmp_path: Path, tied: bool, dtype: torch.dtype, shard_size: str
) -> None:
    make_theirs(tied).to(dtype).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "5GB")
    ours = read_ours(tmp_path)
    assert (ours.tok_embeddings.weight is ours.output.weight) == tied
    assert ours.config.causal and ours.config.rope_theta == 500000.0
    assert ours.output.weight.dtype == torch.float32
    theirs = open_theirs(tmp_path, torch.float32)
    torch.testing.assert_close(*logits_of_both(ours, theirs), **TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": ..., "rope_theta": 20000.0},
        {"rope_parameters": ..., "rope_theta": 20000, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 20000.0}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 20000.0},
        {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}, "rope_theta": 5.0},
    ],
)
def test_rope_theta_is_found_where_transformers_finds_it(
    folder: Path, changes: dict[str, Any]
) -> None:
    edit_json(folder / "config.json", **changes)
    ours = read_ours(folder)
    assert ours.config.rope_theta == 20000.0
    theirs = open_theirs(folder)
    torch.testing.assert_close(*logits_of_both(ours, theirs), **TOLERANCE)


def test_missing_fields_have_the_defaults_of_transformers(folder: Path) -> None:
    edit_json(
        folder / "config.json",
        **dict.fromkeys(("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"), ...),
        **dict.fromkeys(("rope_parameters", "head_dim", "hidden_act", "attention_bias"), ...),
    )
    ours = read_ours(folder)
    assert ours.config.layer_norm_eps == 1e-6 and ours.config.max_seq_len == 2048
    assert ours.config.rope_theta == 10000.0 and not ours.config.tie_embeddings
    theirs = open_theirs(folder)
    torch.testing.assert_close(*logits_of_both(ours, theirs), **TOLERANCE)


def test_missing_num_key_value_heads_means_as_many_as_heads(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**(SIZES | {"num_key_value_heads": 6}))
    theirs: Any = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", num_key_value_heads=...)
    torch.testing.assert_close(*logits_of_both(read_ours(tmp_path), theirs), **TOLERANCE)


def test_rows_are_reordered_as_the_equation_says() -> None:
    """With 3 heads of 10 features: ours[2i + s] = theirs[5s + i]."""
    theirs = torch.arange(30.0)[:, None] * torch.tensor([1.0, 100.0])  # (30, 2)
    ours = halves_to_pairs(theirs, 3)
    for head in range(3):
        for i in range(5):
            for s in (0, 1):
                expected = theirs[10 * head + 5 * s + i]
                torch.testing.assert_close(ours[10 * head + 2 * i + s], expected, rtol=0, atol=0)
    torch.testing.assert_close(pairs_to_halves(ours, 3), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("stored", ["equal", "different", "only lm_head"])
def test_tied_model_with_a_stored_lm_head_is_read_as_transformers_reads_it(
    tmp_path: Path, stored: str, caplog: pytest.LogCaptureFixture
) -> None:
    make_theirs(tied=True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    embedding = safetensors.torch.load_file(path)["model.embed_tokens.weight"]
    edit_tensors(path, lm_head__weight=embedding + (1 if stored == "different" else 0))
    if stored == "only lm_head":
        edit_tensors(path, model__embed_tokens__weight=None)
    ours = read_ours(tmp_path)
    assert ours.config.tie_embeddings == (stored != "different")
    assert ("embed_tokens and lm_head differ" in caplog.text) == (stored == "different")
    theirs = open_theirs(tmp_path)
    torch.testing.assert_close(*logits_of_both(ours, theirs), **TOLERANCE)


def test_stored_rotary_tables_are_left_out(folder: Path) -> None:
    before = read_huggingface(folder)
    name = "model__layers__0__self_attn__rotary_emb__inv_freq"
    edit_tensors(folder / "model.safetensors", **{name: torch.ones(4)})
    assert read_huggingface(folder)["model"].keys() == before["model"].keys()


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_links_of_the_hubs_cache_are_followed(tmp_path: Path, shard_size: str) -> None:
    """In the cache each file is a link such as ../../blobs/f3a9..."""
    make_theirs().save_pretrained(tmp_path / "plain", max_shard_size=shard_size)
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate((tmp_path / "plain").iterdir()):
        shutil.copy(path, tmp_path / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    found, expected = read_huggingface(snapshot), read_huggingface(tmp_path / "plain")
    assert found["model_args"] == expected["model_args"]
    for name, tensor in expected["model"].items():
        torch.testing.assert_close(found["model"][name], tensor, rtol=0, atol=0)


def test_a_read_model_does_not_depend_on_its_files(folder: Path) -> None:
    """The weights are copies: a map of the file would change, or end the program, with the file."""
    before = {name: tensor.clone() for name, tensor in read_huggingface(folder)["model"].items()}
    found = read_huggingface(folder)["model"]
    with open(path := folder / "model.safetensors", "r+b") as file:
        file.write(bytes(path.stat().st_size))
    for name, tensor in before.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


PEAK = """
import sys
from beyond.formats.huggingface import read_huggingface
from llama import Llama

def load(folder):
    return Llama.from_checkpoint(read_huggingface(folder), folder)

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

load(sys.argv[1])  # a tiny model, after which the libraries are loaded
before = peak()
llama = load(sys.argv[2])
print((peak() - before) / sum(4 * parameter.numel() for parameter in llama.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux measures the peak")
@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_memory_is_below_one_and_a_half_times_the_float32_weights(
    tmp_path: Path, tokenizer_path: Path, dtype: torch.dtype
) -> None:
    tokenizer = Tokenizer(None, tokenizer_path)
    shape = {"dim": 384, "n_layers": 8, "n_heads": 6, "n_kv_heads": 3}  # 52 MB in float32
    write_huggingface(tmp_path / "tiny", make_llama(True), tokenizer, dtype)
    write_huggingface(tmp_path / "model", make_llama(True, **shape), tokenizer, dtype)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "tiny"), str(tmp_path / "model")]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert 0.9 < float(output.stdout) < 1.5, output.stderr


# ------------------------------------------------------------------------------ folders not read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, r"model_type is 'mistral'; only \"llama\" is read"),
        ({"model_type": ...}, r"model_type is None; only \"llama\" is read"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters: rope_type is 'llama3'"),
        ({"rope_parameters": {"factor": 8.0}}, r"rope_parameters is {'factor': 8\.0}; RoPE scal"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: rope_type is 'linear'; it must be"),
        ({"rope_scaling": ["linear"]}, r"rope_scaling is \['linear'\]; RoPE scaling is not read"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta='big' is not a number"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta=1000.*0 is not a number"),
        ({"attention_bias": True}, "attention_bias is True; only False is read"),
        ({"mlp_bias": True}, "mlp_bias is True; only False is read"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is read"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; only None"),
        ({"head_dim": 16}, "head_dim is 16; only hidden_size / num_attention_heads, here 8, is"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"hidden_size": 50}, "hidden_size=50 is not divisible by num_attention_heads=6"),
        ({"hidden_size": "48"}, "hidden_size='48' is not a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 is not a whole number"),
        ({"vocab_size": 10**300}, "vocab_size is above"),
        ({"num_hidden_layers": 2**20}, "num_hidden_layers=1048576 means 9437184 tensors or more"),
        ({"num_hidden_layers": 1}, r"unexpected tensor 'model\.layers\.1\..*with 1 layers"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6 is not divisible by num_key_value_"),
        ({"num_key_value_heads": 2}, r"k_proj.weight has shape \(24, 48\), expected \(16, 48\)"),
        ({"rms_norm_eps": [1]}, r"rms_norm_eps=\[1\] is not a number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no' is not True or False"),
        ({"vocab_size": 96}, r"has shape \(97, 48\), expected \(96, 48\)"),
    ],
)
def test_a_config_of_another_model_is_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}.*{message}") as error:
        read_huggingface(folder)
    assert "\n" not in str(error.value)


DAMAGED_JSON = [
    b"",
    b"[1, 2]",
    b"null",
    b'{"a": 1',
    b'{"a": NaN}',
    b'{"a": -Infinity}',
    b'{"a": "\xff"}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"a": ' + b"9" * 5000 + b"}",
    b" " * 2**23,
]


@pytest.mark.parametrize("content", DAMAGED_JSON, ids=lambda content: repr(content[:12]))
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json_is_refused_in_one_line(folder: Path, name: str, content: bytes) -> None:
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder / name))}: ") as error:
        read_huggingface(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "sub/secret.safetensors",
        "/secret.safetensors",
        "..\\secret.safetensors",
        "C:secret.safetensors",
        "..",
        "",
        "config.json",
        "a\nb.safetensors",
        "a\x00.safetensors",
        "\ud800.safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_names_files_of_its_own_folder_only(folder: Path, name: Any) -> None:
    """The named file exists and has the tensors, so that only the name can be refused."""
    (folder / "sub").mkdir()
    weights = folder / "model.safetensors"
    for copy in (folder.parent / "secret.safetensors", folder / "sub" / "secret.safetensors"):
        shutil.copy(weights, copy)
    names = safetensors.torch.load_file(weights)
    weights.unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(ValueError, match=f"^{re.escape(str(index))}: weight_map: expected the nam"):
        read_huggingface(folder)


@pytest.mark.parametrize("weight_map", [..., {}, [], None, "model.safetensors"])
def test_an_index_without_a_map_is_refused(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({} if weight_map is ... else {"weight_map": weight_map}))
    with pytest.raises(ValueError, match="index.json: weight_map is not an object that maps"):
        read_huggingface(folder)


@pytest.mark.parametrize("name", ["missing.safetensors", "x" * 300 + ".safetensors"])
def test_a_missing_shard_is_named(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {QUERY: name}}))
    with pytest.raises(FileNotFoundError, match=f"^{index}: weight_map names {name}, but there is"):
        read_huggingface(folder)


def test_shards_are_found_in_the_order_of_their_names(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "b.safetensors", "b": "a.safetensors", "c": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]


def test_a_folder_without_safetensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="has neither model.safetensors nor model.safete"):
        read_huggingface(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        read_huggingface(folder)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        with_header(b"[1, 2]"),
        with_header(b"[" * 200_000),
        with_header(b"\xff\xfe"),
        with_header(b'{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}'),
        with_header(b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"1234"),
        with_header(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"12345678"),
        with_header(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', b"1234"),
        with_header(b'{"x":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    ],
    ids=lambda content: repr(content[:40]),
)
def test_damaged_safetensors_are_refused_in_one_line(folder: Path, content: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: cannot be read as safetensors: ") as error:
        read_huggingface(folder)
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(ValueError, match=f"^{path}: cannot be read as safetensors: "):
        read_huggingface(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_head__weight": None}, "the tensor lm_head.weight is missing"),
        ({QUERY.replace(".", "__"): None}, "the tensor .*layers.0.self_attn.q_proj.weight is miss"),
        (
            {QUERY.replace(".", "__"): torch.ones(24, 96)},
            r"q_proj.weight has shape \(24, 96\), ex",
        ),
        (
            {QUERY.replace(".", "__"): torch.ones(48, 48).int()},
            "q_proj.weight is stored as I32; re",
        ),
        (
            {"model__layers__0__self_attn__q_proj__bias": torch.ones(48)},
            "unexpected tensor 'model.layers.0.self_attn.q_proj.bias'; only those of a Llama",
        ),
        ({"score__weight": torch.ones(2, 48)}, "unexpected tensor 'score.weight'"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_tensors(folder / "model.safetensors", **changes)
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}.*: .*{message}"):
        read_huggingface(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    for name in ("a", "b"):
        shutil.copy(weights, folder / f"{name}.safetensors")
    weights.unlink()
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"b.safetensors: '.*' is also in {folder}/a.safetensors"):
        read_huggingface(folder)


@pytest.mark.parametrize("name", ["safetensors", "tokenizers"])
def test_without_the_libraries_the_error_says_how_to_install_them(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make_theirs().save_pretrained(tmp_path / "model")
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(ValueError, match="install them with: uv sync --group formats"):
        if name == "safetensors":
            read_huggingface(tmp_path / "model")
        else:
            tokenizer = Tokenizer(None, tokenizer_path)
            write_huggingface(tmp_path / "new", make_llama(True), tokenizer)


# ---------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_written_folder_opens_in_transformers(
    tmp_path: Path, tokenizer_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    ours = make_llama(True, tie_embeddings=tied, rope_theta=500000.0, layer_norm_eps=1e-4)
    tokenizer = Tokenizer(None, tokenizer_path)
    write_huggingface(tmp_path / "new", ours, tokenizer, dtype)
    assert open_theirs(tmp_path / "new").dtype == dtype
    theirs = open_theirs(tmp_path / "new", torch.float32)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == tied
    rounded = Llama(ours.config)
    rounded.load_state_dict({k: v.to(dtype).float() for k, v in ours.state_dict().items()})
    torch.testing.assert_close(*logits_of_both(rounded.eval(), theirs), **TOLERANCE)
    theirs_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    text = "A dull , lifeless story"
    assert theirs_tokenizer(text).input_ids == tokenizer.encode(text, bos=True, eos=False)


def test_greedy_text_of_a_written_folder_equals_transformers(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    """It also ends at BOS, as this project's does."""
    ours, tokenizer = make_llama(True), Tokenizer(None, tokenizer_path)
    write_huggingface(tmp_path / "new", ours, tokenizer)
    theirs = open_theirs(tmp_path / "new")
    assert theirs.generation_config.eos_token_id == [tokenizer.bos_id, tokenizer.eos_id]
    prompt = torch.tensor([tokenizer.encode("The story", bos=True, eos=False)])
    found = theirs.generate(prompt, max_new_tokens=40, do_sample=False)
    expected = ours.generate(prompt, 40, temperature=0.0)
    assert found.tolist() == expected[:, : found.shape[1]].tolist()
    assert found.shape[1] == expected.shape[1] or found[0, -1] in tokenizer.stop_ids


@pytest.mark.parametrize("tied", [False, True])
def test_writing_and_reading_gives_the_same_model_and_tokenizer(
    tmp_path: Path, tokenizer_path: Path, tied: bool
) -> None:
    ours = make_llama(True, tie_embeddings=tied, rope_theta=1234.5)
    write_huggingface(tmp_path / "new", ours, Tokenizer(None, tokenizer_path))
    again = read_ours(tmp_path / "new")
    assert again.config == ours.config
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    found = find_tokenizer(tmp_path / "new")
    assert found.name == "tokenizer.model"
    assert found.read_bytes() == tokenizer_path.read_bytes()


def test_the_tensors_of_a_written_file_are_aligned(tmp_path: Path, tokenizer_path: Path) -> None:
    write_huggingface(tmp_path / "new", make_llama(True), Tokenizer(None, tokenizer_path))
    with open(tmp_path / "new" / "model.safetensors", "rb") as file:
        assert struct.unpack("<Q", file.read(8))[0] % 8 == 0


def test_progress_is_told_each_tensor(tmp_path: Path, tokenizer_path: Path) -> None:
    seen: list[str] = []

    def progress(names: Iterable[str]) -> Iterator[str]:
        for name in names:
            yield name
            seen.append(name)

    ours = make_llama(True)
    tokenizer = Tokenizer(None, tokenizer_path)
    write_huggingface(tmp_path / "new", ours, tokenizer, progress=progress)
    assert seen == [name for name in ours.state_dict() if name != "output.weight"]


def raise_interrupt(names: Iterable[str]) -> Iterator[str]:
    yield next(iter(names))
    raise KeyboardInterrupt


def test_a_failure_leaves_nothing(tmp_path: Path, tokenizer_path: Path) -> None:
    ours, tokenizer = make_llama(True), Tokenizer(None, tokenizer_path)
    with pytest.raises(KeyboardInterrupt):
        write_huggingface(tmp_path / "new", ours, tokenizer, progress=raise_interrupt)
    assert list(tmp_path.iterdir()) == []
    ours.norm.weight.data[3] = 70000.0
    with pytest.raises(ValueError, match="model.norm.weight holds a number that is not finite in"):
        write_huggingface(tmp_path / "new", ours, tokenizer, torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_used_and_a_full_one_is_refused(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    ours, tokenizer = make_llama(True), Tokenizer(None, tokenizer_path)
    (tmp_path / "new").mkdir()
    write_huggingface(tmp_path / "new", ours, tokenizer)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "new").iterdir()}
    assert len(before) == 6
    with pytest.raises(ValueError, match=f"^{tmp_path}/new: exists and is not empty"):
        write_huggingface(tmp_path / "new", ours, tokenizer)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "new").iterdir()}
    assert after == before and os.listdir(tmp_path) == ["new"]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"^{tmp_path}/file: exists and is not empty"):
        write_huggingface(tmp_path / "file", ours, tokenizer)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error:
        write_huggingface(
            tmp_path / "file" / "new", make_llama(True), Tokenizer(None, tokenizer_path)
        )
    assert str(tmp_path / "file") in str(error.value)


# -------------------------------------------------------------------------- which tokenizer it is


def test_the_tokenizer_of_a_folder(tmp_path: Path, tokenizer_path: Path) -> None:
    """`tokenizer.model` counts if it has the checkpoint's vocabulary, else `tokenizer.json`."""
    model, tokenizer_json = tmp_path / "tokenizer.model", tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match="has neither tokenizer.model nor tokenizer.json"):
        find_tokenizer(tmp_path)
    shutil.copy(tokenizer_path, model)
    assert find_tokenizer(tmp_path) == model
    tokenizer_json.write_text("{}")
    config = tmp_path / "config.json"
    config.write_text('{"vocab_size": 320}')
    assert find_tokenizer(tmp_path) == model
    config.write_text('{"vocab_size": 328}')  # tokens were added
    assert find_tokenizer(tmp_path) == tokenizer_json
    config.write_text('{"vocab_size": 320}')
    model.write_bytes(b"IQ== 0\nIg== 1\n")  # a file of tiktoken
    assert find_tokenizer(tmp_path) == tokenizer_json
    model.unlink()
    assert find_tokenizer(tmp_path) == tokenizer_json


def test_pieces_are_counted(tokenizer_path: Path) -> None:
    assert count_pieces(tokenizer_path.read_bytes()) == 320
    demo = ROOT / "data" / "demo" / "tokenizer.model"
    assert count_pieces(demo.read_bytes()) == Tokenizer(None, demo).n_words


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\n" + b"\xff" * 9, b"text", b"\n\x80", b"\n\x05<unk", b"\n\x00\n"]
)
def test_no_pieces_are_counted_in_something_else(content: bytes) -> None:
    assert count_pieces(content) == 0


def test_finding_the_files_needs_no_torch() -> None:
    code = "import sys, beyond.formats.files; print({'torch', 'numpy'} & sys.modules.keys())"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert output.stdout == "set()\n", output.stderr
