"""Checkpoints: every accepted spelling loads to the same model, everything else is an error."""

import argparse
import logging
import math
import os
import pickle
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from base_llama import write_checkpoint
from llama import Llama, load_pretrained
from tests.conftest import make_llama, save_llama
from tests.oracle import numpy_forward

TOKENS = torch.tensor([[1, 20, 300, 4, 55]])


def llama2c_name(name: str) -> str:
    for ours, theirs in {"query": "wq", "key": "wk", "value": "wv", "output": "wo"}.items():
        name = name.replace(f"compute_{ours}.", f"{theirs}.")
    return name


def checkpoint_of(model: Llama) -> dict[str, Any]:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"model": weights, "model_args": model.config.to_model_args()}


def test_round_trip(llama: Llama, tmp_path: Path) -> None:
    save_llama(llama, tmp_path / "model.pt")
    loaded = load_pretrained(tmp_path / "model.pt")
    assert loaded.config == llama.config and not loaded.training
    assert torch.equal(loaded(TOKENS)[0], llama(TOKENS)[0])
    assert loaded.tok_embeddings.weight is loaded.output.weight
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.get_parameter("output.weight").device.type == "cpu"


def test_saved_file_holds_each_weight_once(llama: Llama, tmp_path: Path) -> None:
    save_llama(llama, tmp_path / "model.pt")
    count = sum(parameter.numel() for parameter in llama.parameters())
    assert (tmp_path / "model.pt").stat().st_size < 4 * count + 30_000


PREFIXES = ["", "_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_of_llama2c(llama: Llama, tmp_path: Path, prefix: str) -> None:
    """Hub's file: wq, wk, wv, wo, norm_eps for layer_norm_eps, and more keys beside the two.

    The prefixes are those of a compiled and of a parallel model.
    """
    checkpoint = checkpoint_of(llama)
    args = checkpoint["model_args"]
    args["norm_eps"] = args.pop("layer_norm_eps")
    for name in ("causal", "hidden_dim", "rope_theta", "tie_embeddings"):
        del args[name]
    weights = checkpoint["model"].items()
    checkpoint["model"] = {prefix + llama2c_name(name): tensor for name, tensor in weights}
    checkpoint |= {"optimizer": {"state": {}}, "iter_num": 7, "best_val_loss": torch.tensor(0.8)}
    write_checkpoint(tmp_path / "model.pt", checkpoint)
    loaded = load_pretrained(tmp_path / "model.pt")
    assert loaded.config == llama.config
    assert torch.equal(loaded(TOKENS)[0], llama(TOKENS)[0])


def test_a_name_with_and_without_prefix_is_named(llama: Llama, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(llama)
    checkpoint["model"]["module.norm.weight"] = torch.ones(48)
    write_checkpoint(tmp_path / "model.pt", checkpoint)
    with pytest.raises(ValueError, match=r"model\.pt: two tensors are named norm\.weight"):
        load_pretrained(tmp_path / "model.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_stored_masks_and_tables_are_not_read(
    llama: Llama, tmp_path: Path, dtype: torch.dtype
) -> None:
    """As llama2.c and Meta store them; a mask holds -inf."""
    checkpoint = checkpoint_of(llama)
    weights = {llama2c_name(name): tensor for name, tensor in checkpoint["model"].items()}
    mask = torch.full((1, 1, 128, 128), -math.inf).triu(1).to(dtype)
    weights |= {f"layers.{i}.attention.mask": mask.clone() for i in range(2)}
    weights |= {"freqs_cos": torch.ones(128, 4), "rope.freqs": torch.ones(4)}
    checkpoint["model"] = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    write_checkpoint(tmp_path / "model.pt", checkpoint)
    assert torch.equal(load_pretrained(tmp_path / "model.pt")(TOKENS)[0], llama(TOKENS)[0])


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "output.weight"])
def test_model_args_of_meta(llama: Llama, tmp_path: Path, name: str) -> None:
    """A vocabulary of -1 is that of either matrix; max_batch_size means nothing here."""
    checkpoint = checkpoint_of(llama)
    checkpoint["model_args"] |= {"vocab_size": -1, "max_batch_size": 32}
    del checkpoint["model"][name]
    write_checkpoint(tmp_path / "model.pt", checkpoint)
    loaded = load_pretrained(tmp_path / "model.pt")
    assert loaded.config == llama.config and loaded.config.vocab_size == 320
    assert torch.equal(loaded(TOKENS)[0], llama(TOKENS)[0])


@pytest.mark.parametrize("vocab_size", [-2, 0, -1.0, torch.tensor(-1), -torch.ones(3)])
def test_other_vocabularies_below_one_are_errors(
    llama: Llama, tmp_path: Path, vocab_size: Any
) -> None:
    checkpoint = checkpoint_of(llama)
    checkpoint["model_args"]["vocab_size"] = vocab_size
    write_checkpoint(tmp_path / "model.pt", checkpoint)
    with pytest.raises(ValueError, match=r"model\.pt: model_args: vocab_size=.* is not a whole"):
        load_pretrained(tmp_path / "model.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_storage_is_computed_in_float32(
    llama: Llama, tmp_path: Path, dtype: torch.dtype
) -> None:
    checkpoint = checkpoint_of(llama)
    checkpoint["model"] = {name: tensor.to(dtype) for name, tensor in checkpoint["model"].items()}
    write_checkpoint(tmp_path / "model.pt", checkpoint)
    loaded = load_pretrained(tmp_path / "model.pt")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    expected = llama.to(dtype).to(torch.float32)
    assert torch.equal(loaded(TOKENS)[0], expected(TOKENS)[0])


@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize("differ", [False, True])
@pytest.mark.parametrize("field", [None, False, True, "missing"])
def test_which_files_are_tied(
    llama: Llama,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    theirs: bool,
    differ: bool,
    field: bool | str | None,
) -> None:
    """The field decides; without it, a file under the assignment's names is tied, and any other one
    (`theirs`) if its matrices are equal. If they differ, a tied model uses output, with a warning.
    """
    checkpoint = checkpoint_of(llama)
    weights = checkpoint["model"]
    embeddings, output = weights["tok_embeddings.weight"], weights["output.weight"]
    embeddings += differ
    if theirs:
        checkpoint["model"] = {f"module.{llama2c_name(n)}": t for n, t in weights.items()}
    checkpoint["model_args"]["tie_embeddings"] = field
    if field == "missing":
        del checkpoint["model_args"]["tie_embeddings"]
    write_checkpoint(tmp_path / "model.pt", checkpoint)
    with caplog.at_level(logging.WARNING):
        loaded = load_pretrained(tmp_path / "model.pt")
    tied = field if isinstance(field, bool) else not (theirs and differ)
    assert loaded.config.tie_embeddings is tied
    assert (loaded.tok_embeddings.weight is loaded.output.weight) is tied
    assert torch.equal(loaded.output.weight, output)
    assert torch.equal(loaded.tok_embeddings.weight, output if tied else embeddings)
    warning = "tok_embeddings.weight and output.weight differ; output.weight is used"
    assert caplog.text.count(warning) == len(caplog.messages) == (tied and differ)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untied_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    """Both matrices are stored and read, and the forward pass uses each in its place."""
    llama = make_llama(False, tie_embeddings=False, rope_theta=500000.0).to(dtype).float()
    llama.save_pretrained(tmp_path / "model.pt", dtype)
    loaded = load_pretrained(tmp_path / "model.pt")
    assert loaded.config == llama.config and not loaded.config.tie_embeddings
    for name, parameter in llama.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert not torch.equal(loaded.tok_embeddings.weight, loaded.output.weight)
    logits, hidden = loaded(TOKENS, TOKENS)
    expected_logits, expected_hidden = numpy_forward(llama, TOKENS)
    torch.testing.assert_close(logits.double(), torch.tensor(expected_logits), atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden.double(), torch.tensor(expected_hidden), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "output.weight"])
def test_an_untied_file_needs_both_matrices(tmp_path: Path, name: str) -> None:
    checkpoint = checkpoint_of(make_llama(False, tie_embeddings=False))
    del checkpoint["model"][name]
    write_checkpoint(tmp_path / "model.pt", checkpoint)
    with pytest.raises(ValueError, match=rf"model\.pt: .*missing {name}"):
        load_pretrained(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "output.weight"])
def test_one_of_the_tied_names_is_enough(llama: Llama, tmp_path: Path, name: str) -> None:
    checkpoint = checkpoint_of(llama)
    del checkpoint["model"][name]
    write_checkpoint(tmp_path / "model.pt", checkpoint)
    assert torch.equal(load_pretrained(tmp_path / "model.pt")(TOKENS)[0], llama(TOKENS)[0])


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [(None, None, False), (True, None, True), (True, False, False), (False, True, True)],
)
def test_causal_is_the_files_unless_asked_otherwise(
    llama: Llama, tmp_path: Path, stored: bool | None, asked: bool | None, expected: bool
) -> None:
    checkpoint = checkpoint_of(llama)
    checkpoint["model_args"]["causal"] = stored
    write_checkpoint(tmp_path / "model.pt", checkpoint)
    assert load_pretrained(tmp_path / "model.pt", asked).config.causal is expected


def lacking(weights: dict[str, Tensor]) -> None:
    del weights["layers.1.attention.compute_key.weight"], weights["norm.weight"]


def surplus(weights: dict[str, Tensor]) -> None:
    weights["layers.2.ffn_norm.weight"] = torch.ones(48)


def misshapen(weights: dict[str, Tensor]) -> None:
    weights["layers.0.feed_forward.w2.weight"] = torch.ones(48, 127)


def no_numbers(weights: dict[str, Tensor]) -> None:
    weights["norm.weight"] = torch.ones(48, dtype=torch.int64)


def named_twice(weights: dict[str, Tensor]) -> None:
    weights["layers.0.attention.wq.weight"] = weights["layers.0.attention.compute_query.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacking, "missing layers.1.attention.compute_key.weight, norm.weight"),
        (surplus, "unexpected layers.2.ffn_norm.weight"),
        (misshapen, r"layers.0.feed_forward.w2.weight is \(48, 127\), expected \(48, 128\)"),
        (no_numbers, "norm.weight is not a tensor of floating-point numbers"),
        (named_twice, "two tensors are named layers.0.attention.compute_query.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    llama: Llama, tmp_path: Path, change: Any, message: str
) -> None:
    checkpoint = checkpoint_of(llama)
    change(checkpoint["model"])
    write_checkpoint(tmp_path / "model.pt", checkpoint)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "model.pt")


BAD_TENSORS = {
    "NaN": (torch.full((48,), math.nan), "norm.weight holds a number that is NaN or infinite"),
    "infinite": (torch.full((48,), -math.inf), "norm.weight holds a number that is NaN"),
    "above float32": (torch.full((48,), 1e300, dtype=torch.float64), "norm.weight holds a number"),
    "sparse": (torch.ones(48).to_sparse(), "norm.weight is not a tensor of floating-point"),
    "complex": (torch.ones(48, dtype=torch.complex64), "norm.weight is not a tensor of"),
    "float8": (torch.ones(48).to(torch.float8_e4m3fn), "norm.weight is not a tensor of"),
    "without numbers": (torch.ones(48, device="meta"), "norm.weight is not a tensor of"),
    "one number for all": (torch.ones(1).expand(1 << 40), "claim 4,.* bytes, more than the file"),
    "half of one number": (torch.ones(1).half().expand(1 << 40), "bytes, more than the file"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_named(llama: Llama, tmp_path: Path, name: str) -> None:
    checkpoint = checkpoint_of(llama)
    checkpoint["model"]["norm.weight"], message = BAD_TENSORS[name]
    write_checkpoint(tmp_path / "model.pt", checkpoint)
    with pytest.raises(ValueError, match=rf"model\.pt: .*{message}"):
        load_pretrained(tmp_path / "model.pt")


def test_a_name_that_is_not_a_string_is_an_error(llama: Llama, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(llama)
    checkpoint["model"][7] = torch.ones(3)
    write_checkpoint(tmp_path / "model.pt", checkpoint)
    with pytest.raises(ValueError, match=r"model\.pt: a weight's name is 7, expected a string"):
        load_pretrained(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["n_layers", "dim", "vocab_size", "hidden_dim", "max_seq_len"])
@pytest.mark.parametrize("size", [2**20, 2**40, 10**400])
def test_absurd_sizes_are_refused_at_once(
    llama: Llama, tmp_path: Path, name: str, size: int
) -> None:
    checkpoint = checkpoint_of(llama)
    checkpoint["model_args"][name] = size
    write_checkpoint(tmp_path / "model.pt", checkpoint)
    if (name, size) == ("max_seq_len", 2**20):
        load_pretrained(tmp_path / "model.pt")
        return
    with pytest.raises(ValueError, match=r"model\.pt: "):
        load_pretrained(tmp_path / "model.pt")


def test_bad_model_args_are_named(llama: Llama, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(llama)
    checkpoint["model_args"]["dim"] = 50
    write_checkpoint(tmp_path / "model.pt", checkpoint)
    with pytest.raises(ValueError, match="model.pt: model_args: dim=50 is not divisible"):
        load_pretrained(tmp_path / "model.pt")


class RunsCode:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("as_zip", [False, True])
def test_code_in_a_file_is_not_run(tmp_path: Path, as_zip: bool) -> None:
    path, sign = tmp_path / "model.pt", tmp_path / "was-run"
    if as_zip:
        torch.save({"model": {}, "model_args": RunsCode(sign)}, path)
    else:
        path.write_bytes(pickle.dumps({"model": {}, "model_args": RunsCode(sign)}))
    with pytest.raises(ValueError, match="nothing in it was run"):
        load_pretrained(path)
    assert not sign.exists()
    with suppress(RuntimeError):
        torch.load(path, weights_only=False)  # without safe loading its code runs
    assert sign.exists()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.float64(3.0), "numpy.*scalar"),
        (np.arange(3), "numpy.*_reconstruct"),
        (argparse.Namespace(lr=1e-3), "argparse.Namespace"),
        (Path("x"), "pathlib.*Path"),
    ],
)
def test_an_object_that_is_not_allowed_is_named(
    llama: Llama, tmp_path: Path, value: Any, name: str
) -> None:
    """The file is whole, so nothing is said of a download."""
    torch.save({**checkpoint_of(llama), "args": value}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"model\.pt: .*found .*{name}") as caught:
        load_pretrained(tmp_path / "model.pt")
    assert "download" not in str(caught.value) and "nothing in it was run" in str(caught.value)


def test_a_truncated_file_hints_at_the_download(llama: Llama, tmp_path: Path) -> None:
    save_llama(llama, tmp_path / "whole.pt")
    (tmp_path / "model.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-100])
    with pytest.raises(ValueError, match="the end of the archive is missing; a truncated download"):
        load_pretrained(tmp_path / "model.pt")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_file(llama: Llama, tmp_path: Path, share: float) -> None:
    save_llama(llama, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"model\.pt: .* bytes"):
        load_pretrained(tmp_path / "model.pt")


def test_truncated_file_of_the_old_format(tmp_path: Path) -> None:
    """Wherever it is cut, for which `torch.load` raises many kinds of errors."""
    path = tmp_path / "model.pt"
    torch.save({"model": {}, "model_args": {}}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for size in range(len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.pt: .* bytes"):
            load_pretrained(path)


def test_packed_archive_is_refused(llama: Llama, tmp_path: Path) -> None:
    """It could unpack to more than fits into memory."""
    save_llama(llama, tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, bytes(1_000_000) if "/data/" in name else whole.read(name))
    with pytest.raises(
        ValueError, match=r"model\.pt: .*its members would unpack to [\d,]{10,} bytes"
    ):
        load_pretrained(tmp_path / "model.pt")


def test_html_page(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("<!DOCTYPE html>\n<html><body>404 Not Found</body></html>")
    with pytest.raises(ValueError, match="an HTML page"):
        load_pretrained(tmp_path / "model.pt")


def test_other_zip_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"model\.pt: cannot be read"):
        load_pretrained(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "content", [torch.ones(3), [1, 2], {"model": {}}, {"model": [], "model_args": {}}]
)
def test_other_contents(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match='expected a dict that holds the dicts "model"'):
        load_pretrained(tmp_path / "model.pt")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such checkpoint"):
        load_pretrained(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="is a folder"):
        load_pretrained(tmp_path)


def test_failed_write_leaves_the_old_file(llama: Llama, tmp_path: Path) -> None:
    save_llama(llama, tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint(tmp_path / "model.pt", {"model": llama.state_dict(), "bad": lambda: 0})
    assert (tmp_path / "model.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_an_archive_of_several_disks_is_one_line(tmp_path: Path) -> None:
    """Python's own check for a zip archive raises an error for it."""
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 2)  # of two disks
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0, 0, 0, 0, 0)
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04" + bytes(60) + locator + end)
    with pytest.raises(ValueError, match="model.pt: cannot be read"):
        load_pretrained(tmp_path / "model.pt")
