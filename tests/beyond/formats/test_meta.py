"""Meta's folders: a random model of transformers, written in Meta's layout, gives the same logits.

The layout is written here from its published field and parameter names, the hidden size by hand.
"""

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from beyond.formats.meta import hidden_size, read_meta
from llama import Llama

# int(8 * 40 / 3) = 106 and int(1.3 * 106) = 137; with one cut less it would be 138.
PARAMS: dict[str, Any] = {"dim": 40, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 77}
PARAMS |= {"multiple_of": 1, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-4, "rope_theta": 500000.0}
HIDDEN_DIM = 137
TOKENS = torch.randint(0, 77, (3, 29), generator=torch.Generator().manual_seed(1))
NAMES = {  # Hugging Face's -> Meta's
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "layers",
}


def make_model(hidden_dim: int = HIDDEN_DIM, **values: Any) -> "transformers.LlamaForCausalLM":
    """Make a random model of transformers; all its weights are numbers of bfloat16."""
    torch.manual_seed(0)
    values = {"rms_norm_eps": 1e-4, "rope_theta": 500000.0, "tie_word_embeddings": False} | values
    config = transformers.LlamaConfig(
        vocab_size=77,
        hidden_size=40,
        intermediate_size=hidden_dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=values.pop("num_key_value_heads", 2),
        pad_token_id=None,
        **values,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = (0.3 * torch.randn_like(parameter)).bfloat16().float()
    return model


def meta_weights(model: "transformers.LlamaForCausalLM") -> dict[str, Tensor]:
    """Return a model's weights in bfloat16 as Meta names and orders them."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            # Features i and i + 5 of a head of 10 are a rotated pair here, 2i and 2i + 1 at Meta.
            tensor = tensor.view(-1, 2, 5, 40).transpose(1, 2).reshape(-1, 40)
        for theirs, metas in NAMES.items():
            name = name.replace(theirs, metas)
        weights[name] = tensor.bfloat16().clone()
    return weights


def write_folder(folder: Path, params: Any = PARAMS, weights: Any = None) -> Path:
    """Write a folder of Meta; without weights, those of `make_model`."""
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")
    weights = meta_weights(make_model()) if weights is None else weights
    torch.save(weights, folder / "consolidated.00.pth")
    return folder


def load(folder: Path) -> Llama:
    return Llama.from_checkpoint(read_meta(folder), folder)


@torch.inference_mode()
def assert_same_logits(folder: Path, model: "transformers.LlamaForCausalLM") -> None:
    logits, _ = load(folder)(TOKENS, TOKENS)
    torch.testing.assert_close(logits, model(TOKENS).logits, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------ the same model


def test_meta_folder_has_the_logits_of_transformers(tmp_path: Path) -> None:
    """Grouped heads, theta 500,000, another epsilon, a multiplier, bfloat16, untied."""
    model = make_model()
    write_folder(tmp_path, weights=meta_weights(model))
    assert_same_logits(tmp_path, model)
    llama = load(tmp_path)
    config = llama.config
    assert config.causal and not config.tie_embeddings and config.hidden_dim == HIDDEN_DIM
    assert (config.rope_theta, config.layer_norm_eps, config.n_kv_heads) == (500000.0, 1e-4, 2)
    assert {parameter.dtype for parameter in llama.parameters()} == {torch.float32}
    assert not torch.equal(llama.tok_embeddings.weight, llama.output.weight)


@pytest.mark.parametrize(("name", "value"), [("rope_theta", 10000.0), ("norm_eps", 1e-5)])
def test_each_field_changes_the_logits(tmp_path: Path, name: str, value: float) -> None:
    """So the test above would notice a field that is not read."""
    expected, _ = load(write_folder(tmp_path))(TOKENS, TOKENS)
    logits, _ = load(write_folder(tmp_path, {**PARAMS, name: value}))(TOKENS, TOKENS)
    assert (logits - expected).abs().max() > 1e-3


def test_fields_of_llama_1_and_2(tmp_path: Path) -> None:
    """`vocab_size` -1, a stored `rope.freqs`, theta 10,000, no grouped heads, Meta's defaults."""
    # int(8 * 40 / 3) = 106, rounded up to Meta's default multiple of 256
    model = make_model(256, rope_theta=10000.0, rms_norm_eps=1e-5, num_key_value_heads=4)
    weights = {**meta_weights(model), "rope.freqs": torch.rand(5).bfloat16()}
    params: dict[str, Any] = {"dim": 40, "n_heads": 4, "n_layers": 2, "vocab_size": -1}
    write_folder(tmp_path, params, weights)
    assert_same_logits(tmp_path, model)
    assert load(tmp_path).config.max_seq_len == 4096
    del params["vocab_size"]
    nulls = dict.fromkeys(("n_kv_heads", "norm_eps", "rope_theta", "ffn_dim_multiplier"))
    unused = {"max_batch_size": 32, "model_parallel_size": 1, "use_scaled_rope": False}
    params |= {**nulls, **unused, "lora_args": None, "max_seq_len": 64}
    write_folder(tmp_path, params, weights)
    assert_same_logits(tmp_path, model)
    assert load(tmp_path).config.max_seq_len == 64


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "published"),
    [
        (4096, 256, 1, 11008),  # Llama 1 and 2, 7B
        (5120, 256, 1, 13824),  # Llama 1 and 2, 13B
        (8192, 4096, 1.3, 28672),  # Llama 2 70B and Llama 3 70B
        (8192, 256, 1.0, 22016),  # Code Llama 34B
        (4096, 1024, 1.3, 14336),  # Llama 3 8B
        (16384, 4096, 1.2, 53248),  # Llama 3.1 405B
        (2048, 256, 1.5, 8192),  # Llama 3.2 1B
        (3072, 256, 1.0, 8192),  # Llama 3.2 3B
    ],
)
def test_hidden_size_is_that_of_the_published_models(
    dim: int, multiple_of: int, multiplier: float, published: int
) -> None:
    """The models' `intermediate_size` on the Hub."""
    assert hidden_size(dim, multiple_of, multiplier) == published


def test_equal_matrices_become_one(tmp_path: Path) -> None:
    """Llama 3.2's small models store the matrix under both names."""
    model = make_model(tie_word_embeddings=True)
    weights = meta_weights(model)
    assert torch.equal(weights["tok_embeddings.weight"], weights["output.weight"])
    write_folder(tmp_path, weights=weights)
    assert read_meta(tmp_path)["model_args"]["tie_embeddings"] is True
    assert_same_logits(tmp_path, model)
    llama = load(tmp_path)
    assert llama.tok_embeddings.weight is llama.output.weight


def test_the_tensors_are_mapped_not_copied(tmp_path: Path) -> None:
    """In the stored dtype; a loaded model can be trained, and the file stays as it is."""
    params = {**PARAMS, "rope_theta": 10000.0}
    weights = {name: tensor.float() for name, tensor in meta_weights(make_model()).items()}
    for dtype in (torch.bfloat16, torch.float32):
        write_folder(tmp_path, params, {name: t.to(dtype) for name, t in weights.items()})
        before = (tmp_path / "consolidated.00.pth").read_bytes()
        checkpoint = read_meta(tmp_path)
        assert {tensor.dtype for tensor in checkpoint["model"].values()} == {dtype}
        assert str(tmp_path / "consolidated.00.pth") in Path("/proc/self/maps").read_text()
        llama = Llama.from_checkpoint(checkpoint, tmp_path)
        with torch.no_grad():
            for parameter in llama.parameters():
                parameter.fill_(7.0)
        assert (tmp_path / "consolidated.00.pth").read_bytes() == before


def test_a_file_of_the_old_format_is_read(tmp_path: Path) -> None:
    """It cannot be mapped."""
    model = make_model()
    write_folder(tmp_path)
    path = tmp_path / "consolidated.00.pth"
    torch.save(meta_weights(model), path, _use_new_zipfile_serialization=False)
    assert_same_logits(tmp_path, model)


# -------------------------------------------------------------------------------------- bad input


BAD_PARAMS: dict[str, tuple[dict[str, Any], str]] = {
    "scaled": ({"use_scaled_rope": True}, "params.json: use_scaled_rope=True means RoPE scaling"),
    "quantized": (
        {"quantization_args": {"scheme": "int4_weight_int8_dynamic_activation"}},
        r"params.json: quantization_args=\{'scheme': .* means quantized weights",
    ),
    "LoRA": ({"lora_args": {"rank": 16}}, "lora_args=.* means LoRA adapters"),
    "unknown": ({"vision_chunk_size": 448}, "params.json: unknown field 'vision_chunk_size'; know"),
    "no dim": ({"dim": None}, "params.json: the field dim is missing"),
    "no heads": ({"n_heads": None}, "params.json: the field n_heads is missing"),
    "dim": ({"dim": "40"}, "params.json: dim='40' is not a whole number from 1 to 1048576"),
    "bool": ({"dim": True}, "params.json: dim=True is not a whole number"),
    "negative dim": ({"dim": -8}, "params.json: dim=-8 is not a whole number"),
    "huge dim": ({"dim": 10**400}, "params.json: dim=10.* is not a whole number"),
    "float": ({"multiple_of": 256.0}, "params.json: multiple_of=256.0 is not a whole number"),
    "zero": ({"multiple_of": 0}, "params.json: multiple_of=0 is not a whole number"),
    "factor": ({"ffn_dim_multiplier": "1"}, "ffn_dim_multiplier='1' is not a number in"),
    "factor of 0": ({"ffn_dim_multiplier": 0}, "ffn_dim_multiplier=0 is not a number in"),
    "NaN": ({"ffn_dim_multiplier": math.nan}, "is not JSON: NaN is not a number"),
    "infinity": (
        {"ffn_dim_multiplier": math.inf},
        "is not JSON: Infinity is not a number",
    ),
    "huge factor": ({"ffn_dim_multiplier": 10**400}, "ffn_dim_multiplier=10.* is not a number"),
    "layers": ({"n_layers": 2**40}, "n_layers is above 1048576"),
    "many layers": ({"n_layers": 2**19}, "n_layers=524288 means .* but the file holds 21"),
    "heads": ({"n_heads": [4]}, r"n_heads=\[4\] is not a whole number"),
    "odd heads": ({"n_heads": 8}, "gives an odd head size 5"),
    "theta": ({"rope_theta": "1e6"}, "rope_theta='1e6' is not a number"),
    "theta of 0": ({"rope_theta": 0}, "rope_theta=0 is not a number"),
    "epsilon": ({"norm_eps": math.nan}, "is not JSON: NaN is not a number"),
    "positions": ({"max_seq_len": 2**60}, "max_seq_len is above 1048576"),
    "vocabulary": ({"vocab_size": -2}, "vocab_size=-2 is not a whole number"),
    "other vocabulary": ({"vocab_size": 78}, r"output.weight is \(77, 40\), expected \(78, 40\)"),
    "hidden size": (
        {"ffn_dim_multiplier": 1.4},
        r"layers.0.feed_forward.w1.weight is \(137, 40\), expected \(148, 40\)",
    ),
    "huge hidden size": ({"multiple_of": 2**20, "dim": 2**20}, "hidden_dim is above 1048576"),
}


@pytest.mark.parametrize("name", BAD_PARAMS)
def test_bad_fields_are_named(tmp_path: Path, name: str) -> None:
    change, message = BAD_PARAMS[name]
    write_folder(tmp_path, {**PARAMS, **change})
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"dim": 40, ', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"\x80\x02}q\x00.", "is not JSON"),
        (b'{"dim": ' + b"9" * 9999 + b"}", "is not JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"[40, 2, 4]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b"{}", "the field dim is missing"),
        (b'{"\\ud800": 1}', r"unknown field '\\ud800'"),
        (b" " * (5 << 20), "5,242,880 bytes are too many"),
    ],
)
def test_damaged_params_are_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    write_folder(tmp_path)
    (tmp_path / "params.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_meta(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'params.json'}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_several_shards_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "consolidated.01.pth").write_bytes(b"more")
    with pytest.raises(ValueError, match=r"cut into 2 files .*'consolidated.01.pth'.*Hugging Face"):
        read_meta(tmp_path)


@pytest.mark.parametrize("name", ["params.json", "consolidated.00.pth"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: no such"):
        read_meta(tmp_path)


@pytest.mark.parametrize("content", [[1], torch.ones(3), {"model": {}, "model_args": {}}])
def test_another_file_than_a_state_dict(tmp_path: Path, content: Any) -> None:
    write_folder(tmp_path, weights=content)
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth: expected a state dict"):
        read_meta(tmp_path)


BAD_TENSORS = {
    "missing": (None, "missing norm.weight"),
    "NaN": (torch.full((40,), math.nan), "norm.weight holds a number that is NaN"),
    "float8": (torch.ones(40).to(torch.float8_e4m3fn), "norm.weight is not a tensor of"),
    "int8": (torch.ones(40, dtype=torch.int8), "norm.weight is not a tensor of"),
    "no tensor": ("x", "norm.weight is not a tensor of"),
    "no data": (torch.ones(40, device="meta"), "norm.weight is not a tensor of"),
    "one number": (torch.ones(1).expand(1 << 40), "consolidated.00.pth: its tensors claim 4,398,"),
    "half a number": (torch.ones(1).bfloat16().expand(1 << 40), "its tensors claim 2,199,"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_named(tmp_path: Path, name: str) -> None:
    tensor, message = BAD_TENSORS[name]
    weights = {**meta_weights(make_model()), "norm.weight": tensor}
    if tensor is None:
        del weights["norm.weight"]
    write_folder(tmp_path, weights=weights)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_one_line(tmp_path: Path, share: float) -> None:
    path = write_folder(tmp_path) / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"{path}: .* bytes") as caught:
        read_meta(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [b"M\xff\xff", b"J\xff\xff\xff\x7f", b"\x8a\x06" + b"\x7f" * 6])
def test_a_size_that_lies_takes_no_memory(tmp_path: Path, size: bytes) -> None:
    """A tensor says that it has 65,535, 2 billion, or 140 trillion numbers, but has 12,345."""
    write_folder(tmp_path, weights={"norm.weight": torch.ones(12345)})
    path = tmp_path / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if name.endswith("data.pkl"):
                assert content.count(b"M\x39\x30") == 2  # the storage's size and the tensor's
                content = content.replace(b"M\x39\x30", size)
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth: cannot be read"):
        read_meta(tmp_path)
