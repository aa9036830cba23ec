"""Broken and hostile checkpoints of other projects, and their tokenizers: targets of `fuzz.py`."""

import json
import random
import shutil
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import rope
from beyond.decoding import prepare_for_decoding
from beyond.formats.files import default_tokenizer, model_files, model_fingerprint
from beyond.formats.huggingface import write_huggingface
from beyond.formats.llama2c import write_llama2c
from beyond.formats.llama2c_tokenizer import to_tokenizer_bin
from beyond.formats.load import load_llama, load_tokenizer
from beyond.generation import decode_stream
from tests.conftest import SENTENCES, make_llama
from tests.sweeps.inputs import Case, Targets, json_value, mutate, other_file, put, rarely
from tokenizer import Tokenizer, train_tokenizer

VOCAB_SIZE = 320
SHAPE = {"dim": 16, "n_heads": 2, "n_kv_heads": 1, "vocab_size": VOCAB_SIZE, "max_seq_len": 32}
HUGE = (-1, 0, 1, 2**20, 2**31 - 1, -(2**31), 10**9)
SECRET = "secret.safetensors"  # lies beside the folder that is named


@cache
def samples() -> dict[str, dict[str, bytes]]:
    """Make the sound files from which broken ones are made, by kind and name."""
    files: dict[str, dict[str, bytes]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("\n".join(SENTENCES) + "\n")
        train_tokenizer([folder / "text.txt"], VOCAB_SIZE, folder / "tokenizer.model")
        tokenizer = Tokenizer(None, folder / "tokenizer.model")
        llama = make_llama(causal=True, tie_embeddings=False, **SHAPE)
        for version, quantize in ((0, False), (2, True)):
            write_llama2c(folder / "model.bin", llama, quantize)
            files[f"llama2.c {version}"] = {"model.bin": (folder / "model.bin").read_bytes()}
        files["tokenizer.bin"] = {"tokenizer.bin": to_tokenizer_bin(tokenizer)}
        write_huggingface(folder / "hub", llama, tokenizer, torch.bfloat16)
        files["hub"] = {path.name: path.read_bytes() for path in (folder / "hub").iterdir()}
        (folder / "meta").mkdir()
        config = llama.config
        params = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads}
        params |= {"n_kv_heads": config.n_kv_heads, "vocab_size": -1, "multiple_of": 32}
        (folder / "meta" / "params.json").write_text(json.dumps(params))
        torch.save(llama.state_dict(), folder / "meta" / "consolidated.00.pth")
        files["meta"] = {path.name: path.read_bytes() for path in (folder / "meta").iterdir()}
    return files


def change_numbers(rng: random.Random, content: bytes, end: int) -> bytes:
    """Put odd numbers into the header of a file, or into the first bytes of what follows."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        struct.pack_into("<i", data, 4 * rng.randrange(end // 4), rng.choice((*HUGE, 2, 3, 48)))
    return bytes(data)


def change_json(rng: random.Random, content: bytes) -> bytes:
    """Change a JSON object: odd values, more or fewer names, other shapes, or broken bytes."""
    if rng.random() < 0.3:
        return mutate(rng, content)
    if rng.random() < 0.1:
        return json.dumps(json_value(rng)).encode("utf-8", "surrogatepass")
    if rarely(rng, 0.05):
        return rng.choice((b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b"\xff\xfe{}"))
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 3))):
        place = value
        while isinstance(place, dict) and place:
            name = rng.choice(list(place))
            if isinstance(place[name], dict) and rng.random() < 0.7:
                place = place[name]
                continue
            if rng.random() < 0.2:
                del place[name]
            else:
                place[name] = rng.choice((json_value(rng), rng.choice(HUGE), "llama", 0.5, []))
            break
        if isinstance(place, dict) and rng.random() < 0.2:
            odd = ("rope_scaling", "head_dim", "attention_bias", "lora_args", "use_scaled_rope")
            place[rng.choice(odd)] = rng.choice((json_value(rng), True, 8))
    return json.dumps(value).encode("utf-8", "surrogatepass")


def change_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Change the length of the header, the header itself, or what follows."""
    kind = rng.random()
    if kind < 0.2:
        return mutate(rng, content)
    if kind < 0.4:
        length = rng.choice((0, 1, 2**20, 2**31, 2**60, 2**64 - 1))
        return struct.pack("<Q", length) + content[8:]
    (length,) = struct.unpack("<Q", content[:8])
    header = change_json(rng, content[8 : 8 + length])
    if kind < 0.6:
        return struct.pack("<Q", len(header)) + header + content[8 + length :]
    entries = json.loads(content[8 : 8 + length])
    name = rng.choice(list(entries))
    if name != "__metadata__":
        offsets = [rng.choice((0, 8, *HUGE, 2**40, 2**62)) for _ in range(2)]
        changes = {"data_offsets": offsets, "shape": [2**31, 2**31], "dtype": "F8_E4M3"}
        field = rng.choice(list(changes))
        entries[name][field] = changes[field]
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def use(path: str, has_tokenizer: bool = True) -> None:
    """Do with a checkpoint what a run does."""
    model_fingerprint(path)
    llama = load_llama(path)
    assert llama.config.causal
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in llama.parameters())
    tokens = torch.tensor([[1, 2, 3]]).clamp(max=llama.config.vocab_size - 1)
    with torch.inference_mode():
        llama(tokens[:, : llama.config.max_seq_len])
        prepare_for_decoding(llama)
    rope.rotary_tables.cache_clear()
    if has_tokenizer:
        read_text(default_tokenizer(path))


def read_text(path: str) -> None:
    """Tokenize a text and put it together again."""
    tokenizer = load_tokenizer(None, path)
    for text in ("A warm  film, naïve 映画 🎬 123", "", "</s> <s>"):
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert all(0 <= token < tokenizer.n_words for token in ids)
        tokenizer.decode(ids)
        "".join(decode_stream(tokenizer, ids))


def llama2c_file(rng: random.Random) -> Case:
    """A model of llama2.c."""
    version = rng.choice((0, 2))
    content = samples()[f"llama2.c {version}"]["model.bin"]
    kind = rng.random()
    if kind < 0.5:
        content = change_numbers(rng, content, 28 if version == 0 else 64)
    elif kind < 0.8:
        content = mutate(rng, content)
    elif kind < 0.9:
        content = content[: rng.randrange(len(content))] + bytes(rng.choice((0, 1, 100)))
    elif kind < 0.95:
        content = other_file(rng)
    path = put("model.bin", content)
    return Case(lambda: use(path, has_tokenizer=False), (path,))


def llama2c_tokenizer(rng: random.Random) -> Case:
    """A tokenizer of llama2.c."""
    content = samples()["tokenizer.bin"]["tokenizer.bin"]
    kind = rng.random()
    if kind < 0.4:
        content = mutate(rng, content)
    elif kind < 0.9:
        content = change_numbers(rng, content, len(content))
    path = put("tokenizer.bin", content)
    return Case(lambda: read_text(path), (path,))


def folder_case(
    rng: random.Random, kind: str, changes: dict[str, Callable[[random.Random, bytes], bytes]]
) -> Case:
    """Make a folder of a kind with a file or two that are broken, missing, or of another kind."""
    Path("model").mkdir()
    for name, content in samples()[kind].items():
        put(f"model/{name}", content)
    for name in rng.sample(list(changes), k=rng.choice((0, 1, 1, 1, 2))):
        action = rng.random()
        if action < 0.05:
            Path(f"model/{name}").unlink()
        elif action < 0.1:
            put(f"model/{name}", other_file(rng))
        elif action < 0.13:
            Path(f"model/{name}").unlink()
            Path(f"model/{name}").mkdir()
        else:
            put(f"model/{name}", changes[name](rng, samples()[kind][name]))
    return Case(lambda: use("model"), ("model",))


def meta_folder(rng: random.Random) -> Case:
    """A folder of Meta; without a tokenizer."""
    case = folder_case(rng, "meta", {"params.json": change_json, "consolidated.00.pth": mutate})
    if rarely(rng):
        put("model/consolidated.01.pth", samples()["meta"]["consolidated.00.pth"])
    return case._replace(run=lambda: use("model", has_tokenizer=False))


def hugging_face_folder(rng: random.Random) -> Case:
    """A folder of Hugging Face, with one weight file or an index."""
    changes: dict[str, Any] = {"config.json": change_json, "model.safetensors": change_safetensors}
    case = folder_case(rng, "hub", changes)
    if rng.random() < 0.3 and Path("model/model.safetensors").is_file():
        return with_index(rng, case)
    return case


def with_index(rng: random.Random, case: Case) -> Case:
    """Let an index name the weight file, at times one outside the folder."""
    name = rng.choice(("part.safetensors", "part.safetensors", f"../{SECRET}", "/etc/passwd", ""))
    shutil.copy("model/model.safetensors", SECRET)
    Path("model/model.safetensors").rename("model/part.safetensors")
    index = json.dumps({"weight_map": {"model.norm.weight": name, "lm_head.weight": name}})
    if rng.random() < 0.3:
        index = change_json(rng, index.encode()).decode("utf-8", "replace")
    put("model/model.safetensors.index.json", index.encode("utf-8", "surrogatepass"))

    def run() -> None:
        try:
            outside = [path for path in model_files("model") if Path(path).parent != Path("model")]
        except (ValueError, OSError):
            outside = []
        assert not outside, f"would read {outside}"
        use("model")

    return case._replace(run=run)


def json_tokenizer(rng: random.Random) -> Case:
    """A tokenizer of Hugging Face."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = samples()["hub"][name]
        put(name, change_json(rng, content) if rng.random() < 0.7 else content)
    return Case(lambda: read_text("tokenizer.json"), ("tokenizer.json", "tokenizer_config.json"))


FORMAT_TARGETS: Targets = {
    "llama2.c model": (2, llama2c_file),
    "tokenizer.bin": (1, llama2c_tokenizer),
    "Meta folder": (1, meta_folder),
    "HF folder": (2, hugging_face_folder),
    "tokenizer.json": (1, json_tokenizer),
}
