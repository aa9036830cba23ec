"""llama2.c's model files, written here from their published layout, and a real one.

uv run pytest tests/beyond/formats/test_llama2c.py
"""

import hashlib
import re
import struct
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from beyond.formats.llama2c import read_llama2c, write_llama2c
from beyond.formats.llama2c_tokenizer import to_sentencepiece
from llama import Llama
from tests.beyond.formats.test_llama2c_tokenizer import real_file
from tests.conftest import make_llama
from tokenizer import Tokenizer

TOKENS = torch.tensor([[1, 5, 17, 300, 33, 4, 210]])
# All sizes differ. 16 divides dim but not hidden_dim, so groups of 16 cross the rows of w2.
SIZES = {"dim": 48, "hidden_dim": 88, "n_layers": 2, "n_heads": 6, "n_kv_heads": 3}
SIZES |= {"vocab_size": 320, "max_seq_len": 64}
HEADER = {0: 28, 1: 256, 2: 256}
GROUP_SIZE = 8  # divides every row


def model(tied: bool = True, causal: bool = True, **options: Any) -> Llama:
    """Make a random model with grouped heads."""
    return make_llama(causal, tie_embeddings=tied, **{**SIZES, **options})


# -------------------------------------------------------------- the format, by what is published


def header(
    version: int, tied: bool, default_group_size: int = GROUP_SIZE, /, **changes: int
) -> bytes:
    """Write the header of a file, with changes to its fields."""
    fields = {**SIZES, "magic": 0x616B3432, "version": version, "shared_classifier": int(tied)}
    fields["group_size"] = default_group_size
    if version == 0 and not tied:
        fields["vocab_size"] = -fields["vocab_size"]
    fields |= changes
    sizes = struct.pack("<7i", *(fields[name] for name in SIZES))
    if version == 0:
        return sizes
    content = struct.pack("<Ii", fields["magic"], fields["version"]) + sizes
    content += struct.pack("<B", fields["shared_classifier"])
    if version == 2:
        content += struct.pack("<i", fields["group_size"])
    return content + bytes(256 - len(content))


def arrays(llama: Llama, version: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors in the order of the file, and the names that llama2.c's code gives them."""
    weights = {name: tensor.numpy() for name, tensor in llama.state_dict().items()}
    renamed = {"wq": "compute_query", "wk": "compute_key", "wv": "compute_value"}
    renamed["wo"] = "compute_output"

    def of_layers(*names: str) -> Iterator[tuple[str, np.ndarray]]:
        for name in names:
            part = f"attention.{renamed[name]}" if name in renamed else name
            part = f"feed_forward.{part}" if name in ("w1", "w2", "w3") else part
            for layer in range(SIZES["n_layers"]):
                yield name, weights[f"layers.{layer}.{part}.weight"]

    embedding = ("tok_embeddings", weights["tok_embeddings.weight"])
    norm = ("norm", weights["norm.weight"])
    if version == 0:
        yield embedding
        yield from of_layers("attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3")
        yield norm
        exponents = np.arange(0, llama.config.head_dim, 2) / llama.config.head_dim
        angles = np.outer(np.arange(SIZES["max_seq_len"]), 10000.0**-exponents)
        yield "freqs_cos", np.cos(angles).astype("<f4")
        yield "freqs_sin", np.sin(angles).astype("<f4")
    else:
        yield from of_layers("attention_norm", "ffn_norm")
        yield norm
        yield embedding
        yield from of_layers("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    if not llama.config.tie_embeddings:
        yield "output", weights["output.weight"]


def quantize(array: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantize to int8 (groups, group_size) and scales (groups, 1), Q8_0 as in export.py."""
    groups = array.reshape(-1, group_size)
    scales = np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)
    return np.rint(groups / scales).astype(np.int8), scales


def file_of(llama: Llama, version: int, group_size: int = GROUP_SIZE, /, **changes: int) -> bytes:
    """Write a whole file."""
    content = header(version, llama.config.tie_embeddings, group_size, **changes)
    for _, array in arrays(llama, version):
        if version == 2 and array.ndim == 2:
            content += b"".join(part.tobytes() for part in quantize(array, group_size))
        else:
            content += array.astype("<f4").tobytes()
    return content


def dequantized(llama: Llama, group_size: int) -> Llama:
    """Return the model with the weights that its file of version 2 holds."""
    result = model(llama.config.tie_embeddings)
    state_dict: dict[str, Tensor] = {}
    for name, tensor in llama.state_dict().items():
        if tensor.dim() == 2:
            numbers, scales = quantize(tensor.numpy(), group_size)
            tensor = torch.from_numpy((numbers * scales).reshape(tensor.shape))
        state_dict[name] = tensor
    result.load_state_dict(state_dict)
    return result


def load(path: Path) -> Llama:
    return Llama.from_checkpoint(read_llama2c(path), path)


def assert_same(found: Llama, expected: Llama) -> None:
    """Compare weights and logits, bit for bit."""
    names = expected.state_dict().keys()
    assert found.state_dict().keys() == names
    for name in names:
        assert torch.equal(found.state_dict()[name], expected.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(found(TOKENS, TOKENS)[0], expected(TOKENS, TOKENS)[0])


# ------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1])
def test_float_files_give_the_logits_of_their_source(
    version: int, tied: bool, tmp_path: Path
) -> None:
    source = model(tied)
    (tmp_path / "m.bin").write_bytes(file_of(source, version))
    found = load(tmp_path / "m.bin")
    assert_same(found, source)
    assert found.config.causal and found.config.tie_embeddings == tied
    assert (found.tok_embeddings.weight is found.output.weight) == tied
    config = found.config
    assert {name: getattr(config, name) for name in SIZES} == SIZES
    assert (config.layer_norm_eps, config.rope_theta) == (1e-5, 10000.0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("group_size", [GROUP_SIZE, 16, 1])
def test_int8_files_give_the_logits_of_their_dequantized_source(
    group_size: int, tied: bool, tmp_path: Path
) -> None:
    source = model(tied)
    (tmp_path / "m.bin").write_bytes(file_of(source, 2, group_size))
    found = load(tmp_path / "m.bin")
    assert_same(found, dequantized(source, group_size))
    for name, tensor in source.state_dict().items():
        # Half a step of the group with the largest number, and its rounding to float32.
        step = tensor.abs().max() / 127 if tensor.dim() == 2 else 0
        assert (found.state_dict()[name] - tensor).abs().max() <= step * 0.5001


def test_ropes_tables_and_the_rest_of_the_header_are_not_used(tmp_path: Path) -> None:
    source = model()
    content = bytearray(file_of(source, 0))
    tables = SIZES["max_seq_len"] * source.config.head_dim * 4
    content[-tables:] = b"\xff" * tables  # NaN
    (tmp_path / "0.bin").write_bytes(content)
    assert_same(load(tmp_path / "0.bin"), source)
    content = bytearray(file_of(source, 1))
    content[37:256] = b"\xff" * 219
    (tmp_path / "1.bin").write_bytes(content)
    assert_same(load(tmp_path / "1.bin"), source)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_each_weight_has_its_own_memory(version: int, tmp_path: Path) -> None:
    """So that saving one of them does not save the whole file."""
    source = model(tied=False)
    (tmp_path / "m.bin").write_bytes(file_of(source, version))
    weights = read_llama2c(tmp_path / "m.bin")["model"]
    assert weights.keys() == source.state_dict().keys()
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in weights.values())
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


# ------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("tied", [True, False])
def test_written_float_files_have_the_published_bytes(tied: bool, tmp_path: Path) -> None:
    source = model(tied, causal=False, dropout=0.1)  # neither of which a file can say
    write_llama2c(tmp_path / "m.bin", source, quantize=False)
    content = (tmp_path / "m.bin").read_bytes()
    assert content[:28] == header(0, tied)
    position = 28
    for name, array in arrays(source, 0):
        found = np.frombuffer(content, "<f4", array.size, position).reshape(array.shape)
        # RoPE's tables are computed in float32, so the angles of up to 64 radians are rounded.
        atol = 64 * 2**-23 if name.startswith("freqs") else 0
        np.testing.assert_allclose(found, array, rtol=0, atol=atol, err_msg=name)
        position += array.nbytes
    assert position == len(content)
    assert load(tmp_path / "m.bin").config.causal


@pytest.mark.parametrize("tied", [True, False])
def test_written_int8_files_have_the_published_bytes(tied: bool, tmp_path: Path) -> None:
    source = model(tied)
    write_llama2c(tmp_path / "m.bin", source, quantize=True)
    assert (tmp_path / "m.bin").read_bytes() == file_of(source, 2)
    assert_same(load(tmp_path / "m.bin"), dequantized(source, GROUP_SIZE))


@pytest.mark.parametrize(
    ("dim", "hidden_dim", "group_size"),
    [(128, 192, 64), (96, 192, 32), (128, 172, 4), (128, 33, 1), (12, 64, 4)],
)
def test_groups_divide_every_row(
    dim: int, hidden_dim: int, group_size: int, tmp_path: Path
) -> None:
    """runq multiplies rows of whole groups; export.py lets groups cross the rows of w2."""
    source = model(dim=dim, hidden_dim=hidden_dim, n_heads=2, n_kv_heads=1)
    write_llama2c(tmp_path / "m.bin", source, quantize=True)
    assert struct.unpack_from("<i", (tmp_path / "m.bin").read_bytes(), 37) == (group_size,)
    load(tmp_path / "m.bin")


def test_groups_of_zeros_stay_zero(tmp_path: Path) -> None:
    source = model()
    with torch.no_grad():
        source.layers[1].attention.compute_key.weight.zero_()  # type: ignore[union-attr, operator]
        source.output.weight[7] = 1e-45  # its scale is too small for float32
    write_llama2c(tmp_path / "m.bin", source, quantize=True)
    found = load(tmp_path / "m.bin").state_dict()
    assert not found["layers.1.attention.compute_key.weight"].any()
    assert not found["output.weight"][7].any()
    assert found["output.weight"][8].any()
    norms = (2 * SIZES["n_layers"] + 1) * SIZES["dim"] * 4
    row = (tmp_path / "m.bin").read_bytes()[256 + norms + 7 * SIZES["dim"] :][: SIZES["dim"]]
    assert row == bytes(SIZES["dim"])


def test_weights_of_another_dtype_are_written_as_float32(tmp_path: Path) -> None:
    write_llama2c(tmp_path / "m.bin", model().bfloat16(), quantize=False)
    assert_same(load(tmp_path / "m.bin"), model().bfloat16().float())


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_theta": 500000.0}, "rope_theta=500000.0: in llama2.c it is always 10000.0"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06: in llama2.c it is always 1e-05"),
    ],
)
def test_what_a_file_cannot_say_is_an_error(
    options: dict[str, Any], message: str, quantize: bool, tmp_path: Path
) -> None:
    path = tmp_path / "m.bin"
    with pytest.raises(ValueError, match=f"m.bin: cannot store {message}"):
        write_llama2c(path, model(**options), quantize)
    assert list(tmp_path.iterdir()) == []
    float32_eps = struct.unpack("<f", struct.pack("<f", 1e-5))[0]  # as some configs give it
    write_llama2c(path, model(layer_norm_eps=float32_eps), quantize)


@pytest.mark.parametrize("quantize", [True, False])
def test_progress_sees_every_tensor_and_a_failure_leaves_the_old_file(
    quantize: bool, tmp_path: Path
) -> None:
    seen: list[str] = []

    def progress(names: Collection[str]) -> Iterable[str]:
        for name in names:
            seen.append(name)
            yield name

    def fail(names: Collection[str]) -> Iterable[str]:
        yield next(iter(names))
        raise KeyboardInterrupt

    source = model(tied=False)
    write_llama2c(tmp_path / "m.bin", source, quantize, progress)
    content = (tmp_path / "m.bin").read_bytes()
    tables = set() if quantize else {"freqs_cos", "freqs_sin"}
    assert set(seen) == source.state_dict().keys() | tables and len(seen) == len(set(seen))
    with pytest.raises(KeyboardInterrupt):
        write_llama2c(tmp_path / "m.bin", model(), quantize, fail)
    assert (tmp_path / "m.bin").read_bytes() == content
    assert list(tmp_path.iterdir()) == [tmp_path / "m.bin"]


# -------------------------------------------------------------------------------- a real model


def test_stories260k_tells_its_known_story(tmp_path: Path) -> None:
    path = real_file("stories260K/model.bin", "llama2c/stories260K.bin")
    tokenizer_path = real_file("stories260K/tokenizer.bin", "llama2c/tok512.bin")
    model = to_sentencepiece(tokenizer_path.read_bytes(), tokenizer_path)
    ids = load(path).generate(torch.tensor([[1]]), 200, temperature=0.0)[0].tolist()
    assert ids[1:16] == [403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426]
    story = Tokenizer(tokenizer_model=model).decode(ids).encode()
    assert len(story) == 464
    known = "beeb5cb46785efee81a8545300b31e396b595e5ce6f3b77db201545501981d14"
    assert hashlib.sha256(story).hexdigest() == known
    write_llama2c(tmp_path / "again.bin", load(path), quantize=False)
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()


# ------------------------------------------------------------------------------ damaged files


def error_of(path: Path, content: bytes) -> str:
    """Return the message, one line that begins with the path, of reading a damaged file."""
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_llama2c(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -(2**31), 2**31 - 1, 2**20 + 1])
def test_sizes_out_of_bounds_are_errors(
    version: int, name: str, value: int, tmp_path: Path
) -> None:
    message = error_of(tmp_path / "m.bin", file_of(model(), version, **{name: value}))
    assert re.match(f"not a model file of llama2.c: header: .*{name}", message), message


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 2**20}, r"truncated: .* n_layers=1048576,"),  # no list of so many is made
        ({"n_layers": 3}, "truncated: .* n_layers=3,"),
        ({"vocab_size": 2**20, "dim": 6 * 2**17}, "truncated: .* vocab_size=1048576"),
        ({"hidden_dim": 2**20}, "truncated: .* hidden_dim=1048576"),
        ({"n_layers": 1}, "longer than its model: .* n_layers=1,"),
        ({"vocab_size": 319}, "longer than its model: .* vocab_size=319"),
        ({"dim": 47}, "not a model file .*: header: dim=47 is not divisible by n_heads=6"),
        ({"n_kv_heads": 4}, "not a model file .*: header: n_heads=6 is not .* n_kv_heads=4"),
        ({"n_heads": 48, "n_kv_heads": 1}, "not a model file .*: header: .* odd head size 1"),
    ],
)
def test_sizes_that_lie_are_errors(
    version: int, changes: dict[str, int], message: str, tmp_path: Path
) -> None:
    """The error comes before memory is taken: these sizes would be more than there is."""
    found = error_of(tmp_path / "m.bin", file_of(model(), version, **changes))
    assert re.match(message, found), found


@pytest.mark.parametrize(
    ("version", "changes", "message"),
    [
        (1, {"version": 0}, "header: version=0, expected 1 or 2"),
        (2, {"version": 3}, "header: version=3, expected 1 or 2"),
        (2, {"version": -1}, "header: version=-1, expected 1 or 2"),
        (2, {"version": 1}, "truncated"),
        (1, {"shared_classifier": 2}, "header: shared_classifier=2, expected 0 or 1"),
        (2, {"shared_classifier": 255}, "header: shared_classifier=255, expected 0 or 1"),
        (1, {"shared_classifier": 0}, "truncated"),
        (2, {"group_size": 0}, "header: group_size=0 is below 1"),
        (2, {"group_size": -8}, "header: group_size=-8 is below 1"),
        (2, {"group_size": 7}, "header: group_size=7 does not divide the 15,360 numbers of tok"),
        (2, {"group_size": 320}, "header: group_size=320 does not divide .* of layers.0.attention"),
        (2, {"group_size": 2**31 - 1}, "header: group_size=2147483647 does not divide"),
        (2, {"group_size": 4}, "truncated"),
        (1, {"magic": 0x616B3433}, "not a model file of llama2.c: header: "),
        (2, {"vocab_size": -320}, "not a model file of llama2.c: header: vocab_size=-320"),
        (0, {"vocab_size": -320}, "truncated: .* vocab_size=320"),
    ],
)
def test_other_fields_that_are_wrong_are_errors(
    version: int, changes: dict[str, int], message: str, tmp_path: Path
) -> None:
    content = bytearray(file_of(model(), version))
    content[: HEADER[version]] = header(version, True, **changes)
    found = error_of(tmp_path / "m.bin", bytes(content))
    assert re.match(message, found), found


@pytest.mark.parametrize("version", [0, 1, 2])
def test_truncated_and_longer_files_are_errors(version: int, tmp_path: Path) -> None:
    content = file_of(model(), version)
    size = HEADER[version]
    for length in (0, 1, 3, 4, 7, 8, *range(12, size, 4), 37, 41, size - 1):
        if length < size:
            message = error_of(tmp_path / "m.bin", content[:length])
            assert re.match(f"truncated: {length} bytes, .* header of (28|256) bytes", message)
    for length in (size, size + 1, len(content) // 2, len(content) - 4, len(content) - 1):
        message = error_of(tmp_path / "m.bin", content[:length])
        assert message.startswith(f"truncated: {length:,} bytes, but expected {len(content):,} ")
    for more in (b"\0", bytes(4), content):
        message = error_of(tmp_path / "m.bin", content + more)
        assert message.startswith(f"longer than its model: {len(content + more):,} bytes, but")


def test_missing_files_and_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_llama2c(tmp_path / "none.bin")
    with pytest.raises(IsADirectoryError):
        read_llama2c(tmp_path)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_weights_that_are_not_finite_are_errors(version: int, tmp_path: Path) -> None:
    content = bytearray(file_of(model(tied=False), version))
    content[-4:] = struct.pack("<f", float("nan"))
    (tmp_path / "m.bin").write_bytes(content)
    with pytest.raises(ValueError, match="output.weight holds a number that is NaN"):
        load(tmp_path / "m.bin")


@settings(
    max_examples=50,  # the fuzz sweep tries hundreds
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), version=st.sampled_from([0, 1, 2]))
def test_any_bytes_are_a_model_or_one_line(
    data: st.DataObject, version: int, tmp_path: Path
) -> None:
    path = tmp_path / "m.bin"
    content = bytearray(file_of(model(), version))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, 11).map(lambda n: 4 * n) | st.integers(0, len(content)))
        value = data.draw(st.integers(-(2**31), 2**31 - 1) | st.integers(-9, 400))
        content[start : start + 4] = data.draw(
            st.just(struct.pack("<i", value)) | st.binary(max_size=8)
        )
    for damaged in (bytes(content), data.draw(st.binary(max_size=300))):
        path.write_bytes(damaged)
        try:
            load(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
