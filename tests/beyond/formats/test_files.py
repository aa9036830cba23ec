"""Which kind a checkpoint is, judged by what it holds, and which files belong to it."""

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest

from beyond.formats.files import default_tokenizer, hashing, kind_of, model_files, model_fingerprint
from llama import Llama
from tests.conftest import save_llama

VERSION_0 = struct.pack("<7i", 48, 128, 2, 6, 3, -320, 128)  # negative: untied
VERSION_1 = struct.pack("<Ii", 0x616B3432, 1)


def write(path: Path, content: bytes | str = "") -> Path:
    """Write a file and its folder; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (VERSION_0 + bytes(100), "llama2c"),
        (VERSION_1 + bytes(100), "llama2c"),
        (VERSION_0[:20], "pt"),
        (b"PK\x03\x04" + bytes(100), "pt"),
        (b"\x80\x02}q\x00." + bytes(100), "pt"),
        (b"<!DOCTYPE html><html></html>" + bytes(100), "pt"),
        (b"", "pt"),
    ],
)
def test_a_files_kind_is_that_of_its_content_whatever_its_name(
    tmp_path: Path, content: bytes, kind: str
) -> None:
    for name in ("model.pt", "model.bin", "config.json", "model"):
        assert kind_of(write(tmp_path / name, content)) == kind


def test_a_real_checkpoint_under_another_name_is_a_pt(llama: Llama, tmp_path: Path) -> None:
    save_llama(llama, tmp_path / "model.bin")
    assert kind_of(tmp_path / "model.bin") == "pt"


def test_a_folders_kind_is_that_of_its_config(tmp_path: Path) -> None:
    write(tmp_path / "meta" / "params.json")
    write(tmp_path / "hub" / "config.json")
    assert kind_of(tmp_path / "meta") == "meta" and kind_of(tmp_path / "hub") == "huggingface"
    write(tmp_path / "hub" / "params.json")  # as some models on the Hub have both
    assert kind_of(tmp_path / "hub") == "huggingface"


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: is a folder with neither config.json"):
        kind_of(tmp_path / "empty")
    part = write(tmp_path / "model.safetensors", struct.pack("<Q", 40) + b'{"weight": {}}')
    with pytest.raises(ValueError, match="model.safetensors: is the safetensors file of"):
        kind_of(part)
    with pytest.raises(FileNotFoundError):
        kind_of(tmp_path / "missing")


def test_a_named_pipe_is_not_looked_into(tmp_path: Path) -> None:
    """Reading its first bytes would take them away, or wait for them."""
    os.mkfifo(tmp_path / "pipe")
    assert kind_of(tmp_path / "pipe") == "pt"


def test_model_files_are_those_that_are_read(tmp_path: Path) -> None:
    file = write(tmp_path / "model.pt")
    assert model_files(file) == (str(file),)
    meta, hub = tmp_path / "meta", tmp_path / "hub"
    for name in ("params.json", "consolidated.00.pth", "tokenizer.model", "README.md"):
        write(meta / name)
    assert [Path(path).name for path in model_files(meta)] == ["params.json", "consolidated.00.pth"]
    write(hub / "config.json", "{}")
    weights = {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "part-1.safetensors"}
    write(hub / "model.safetensors.index.json", json.dumps({"weight_map": weights}))
    for name in set(weights.values()):
        write(hub / name)
    names = [Path(path).name for path in model_files(hub)]
    assert names == ["config.json", "part-1.safetensors", "part-2.safetensors"]


def test_a_checkpoint_is_hashed_while_it_is_read(tmp_path: Path) -> None:
    """So that the fingerprint is there at once afterwards; a named pipe is left alone."""
    path = tmp_path / "x.pt"
    path.write_bytes(b"0" * 1000)
    os.utime(path, (1e9, 1e9))
    with hashing(path):
        pass
    path.write_bytes(b"1" * 1000)
    os.utime(path, (1e9, 1e9))  # as if unchanged
    assert model_fingerprint(path) == hashlib.sha256(b"0" * 1000).hexdigest()
    with hashing(tmp_path / "missing.pt"):
        pass
    os.mkfifo(tmp_path / "pipe")
    with hashing(tmp_path / "pipe"):
        pass


def test_a_folders_fingerprint_depends_on_each_of_its_files(tmp_path: Path) -> None:
    config = write(tmp_path / "meta" / "params.json", "{}")
    weights = write(tmp_path / "meta" / "consolidated.00.pth", b"weights")
    lines = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in (config, weights)
    )
    before = model_fingerprint(tmp_path / "meta")
    assert before == hashlib.sha256(lines.encode()).hexdigest()
    write(tmp_path / "meta" / "README.md", "not read")
    assert model_fingerprint(tmp_path / "meta") == before
    write(weights, b"other weights")
    assert model_fingerprint(tmp_path / "meta") != before
    assert model_fingerprint(config) == hashlib.sha256(b"{}").hexdigest()


def test_each_kind_has_its_tokenizer_in_its_own_folder(tmp_path: Path) -> None:
    model = write(tmp_path / "a" / "model.bin", VERSION_0)
    assert default_tokenizer(model) == str(tmp_path / "a" / "tokenizer.bin")  # although missing
    write(tmp_path / "a" / "tokenizer.model")
    assert default_tokenizer(model) == str(tmp_path / "a" / "tokenizer.model")
    write(tmp_path / "a" / "tokenizer.bin")
    assert default_tokenizer(model) == str(tmp_path / "a" / "tokenizer.bin")
    checkpoint = write(tmp_path / "a" / "model.pt", b"PK\x03\x04")
    assert default_tokenizer(checkpoint) == str(tmp_path / "a" / "tokenizer.model")
    missing = tmp_path / "b" / "model.pt"
    assert default_tokenizer(missing) == str(tmp_path / "b" / "tokenizer.model")
