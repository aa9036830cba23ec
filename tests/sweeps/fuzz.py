"""Throw broken and hostile input at everything that reads input, and count what comes of it.

    uv run python -m tests.sweeps.fuzz --inputs 20000 --seed 0   all of them, with a table of counts
    uv run python -m tests.sweeps.fuzz --seed 0 --only 1234      one of them again

Every input must end in a result or in an error that `main` reports in one line, within `TIME`
seconds and `MEMORY` bytes. Meanwhile no file may change but the named outputs, no program may be
started, and no address but this machine's own be asked. A worker process takes the inputs one
after the other, and its parent watches the clock. An input depends on the seed and its number only.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import rope
from base_llama import write_checkpoint
from beyond.command_line import get_args
from beyond.generation import decode_stream
from beyond.methods.checkpoints import load_any_classifier
from beyond.methods.options import HEADS, POOLINGS
from beyond.methods.pooling import PooledClassifier
from beyond.options import (
    TASKS,
    ClassifyOptions,
    PretrainOptions,
    RunOptions,
    TrainingOptions,
    flags_of,
)
from beyond.pretraining import Blocks
from beyond.run import TrainingRun, start_run
from beyond.runtime import Runtime
from classifier import ClassifierConfig, LlamaEmbeddingClassifier
from llama import load_pretrained
from optimizer import AdamW
from run_llama import build_prompt_suffix, create_data, main
from tests.beyond.forks import LATE_IMPORTS, warm_context
from tests.conftest import LABEL_NAMES, SENTENCES, make_llama, save_llama
from tests.data.test_download import Answers, Step, load_download, make_zip
from tests.sweeps.fuzz_formats import FORMAT_TARGETS
from tests.sweeps.inputs import (
    LONG,
    Case,
    Target,
    Targets,
    json_value,
    mutate,
    other_file,
    proto_field,
    put,
    rarely,
    text,
)
from tokenizer import Tokenizer, train_tokenizer
from utils import describe_error, read_documents, read_label_names

TIME = 5.0  # seconds for one input
START = 120.0  # seconds for a worker to begin: it imports PyTorch, on what may be a busy machine
MEMORY = 4 << 30  # bytes of data a worker may have
MOST = 20  # violations, after which it ends
VOCAB_SIZE = 320
CANARY = "code-was-run"  # the folder that hostile pickles make
TOKENS = torch.tensor([[1, 5, 17, 4, 33]])


class Violation(Exception):
    """An input did what none may do."""


# ----------------------------------------------------------------------------- text and words


def data_file(rng: random.Random) -> Case:
    """Lines `label ||| sentence`."""
    labels = ["-1", "2", "1e3", "٣", "0x1", "", " 1 ", "+1", "1_0", "9" * 20, "9" * 5000]
    separators = ["|||", " || ", "\t|||\t", " |||", ""]
    lines = []
    for _ in range(rng.choice((0, 1, 2, 5))):
        label = rng.choice(labels) if rarely(rng, 0.1) else rng.choice("01")
        separator = rng.choice(separators) if rarely(rng, 0.1) else " ||| "
        lines.append(label + separator + rng.choice((text(rng), "A warm film .")))
    end = rng.choice(("\n", "\n", "\n", "\n", "\r\n", "\r\n", "\r", "\n\n", "\x85"))
    content = (end.join(lines) + rng.choice(("", end))).encode("utf-8", "surrogatepass")
    if rng.random() < 0.3:
        content = mutate(rng, rng.choice((content, "\n".join(SENTENCES).encode())))
    path = put("data.txt", content)
    unlabelled, suffix = rng.random() < 0.5, rng.choice(("", build_prompt_suffix(["bad", "good"])))

    def run() -> None:
        for line in read_documents(path):
            line.encode()
        for example in create_data(path, SAMPLES.tokenizer, 2, 128, suffix, unlabelled):
            assert -1 * unlabelled <= example.label < 2 and example.sentence.strip()
            assert 1 <= len(example.tokens) <= 128 and "\n" not in example.sentence

    return Case(run, (path,))


def label_words(rng: random.Random) -> Case:
    """A JSON file of label words."""
    words = rng.sample(("bad", "good", "awful", text(rng), text(rng)), rng.randrange(6))
    value = json_value(rng) if rarely(rng, 0.2) else words
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-16", "utf-32-be", "utf-8-sig"))
    written = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rarely(rng):
        written = rng.choice(("[" * LONG, "[" * LONG + "]" * LONG, "9" * LONG, '{"":' * LONG))
    content = written.encode(encoding, "surrogatepass")
    path = put("labels.json", mutate(rng, content) if rng.random() < 0.3 else content)

    def run() -> None:
        names = read_label_names(path)
        assert len(names) == len(set(names)) > 1
        SAMPLES.tokenizer.encode(build_prompt_suffix(names), bos=True, eos=False)

    return Case(run, (path,))


# --------------------------------------------------------------------------------- checkpoints


class RunsCode:
    """Pickles as a call that makes the canary."""

    def __init__(self, call: tuple[Any, ...]) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def hostile_calls() -> list[tuple[Any, ...]]:
    return [
        (os.mkdir, (CANARY,)),
        (os.system, (f"mkdir {CANARY}",)),
        (eval, (f"__import__('os').mkdir({CANARY!r})",)),
        (exec, (f"import os; os.mkdir({CANARY!r})",)),
        (getattr, (os, "getcwd")),
        (open, (CANARY, "w")),
        (torch.load, ("model.pt",)),
        (torch.save, ([], CANARY)),
        (torch.from_file, (CANARY, True, 64)),
        (torch.UntypedStorage.from_file, (CANARY, True, 64)),
        (Path.mkdir, (Path(CANARY),)),
        (shutil.copy, ("model.pt", CANARY)),
    ]


def odd_tensor(rng: random.Random, like: torch.Tensor) -> Any:
    """What may stand in a file where a weight is expected."""
    shape, numel = like.shape, like.numel()
    vast = tuple(rng.choice((1 << 20, 1 << 31, 1 << 40)) for _ in shape)
    makers: list[Callable[[], Any]] = [
        lambda: torch.full_like(like, math.nan),
        lambda: like.clone().index_fill_(0, torch.tensor([0]), rng.choice((math.inf, -math.inf))),
        lambda: like.double() * 1e300,  # infinite in float32
        lambda: like * 1e38,
        lambda: like.half(),
        lambda: like.bfloat16(),
        lambda: like.to(rng.choice((torch.float8_e4m3fn, torch.float8_e5m2))),
        lambda: torch.zeros(shape, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        lambda: torch.zeros(shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        lambda: like.to(rng.choice((torch.int64, torch.int8, torch.bool, torch.uint16))),
        lambda: like.to(rng.choice((torch.complex64, torch.complex128))),
        lambda: like.to_sparse(),
        lambda: torch.sparse_coo_tensor(torch.zeros(len(vast), 0).long(), torch.zeros(0), vast),
        lambda: like.to_sparse_csr() if like.dim() == 2 else like.to_sparse(),
        lambda: torch.quantize_per_tensor(like, 0.1, 0, torch.qint8),
        lambda: like.to("meta"),
        lambda: torch.empty(vast, device="meta"),
        lambda: torch.nested.nested_tensor([like, like]),
        lambda: torch.nn.Parameter(like),
        lambda: torch.zeros(1).expand(shape),
        lambda: torch.zeros(1, dtype=torch.float16).expand(shape),
        lambda: torch.zeros(1).as_strided(vast, [0] * len(vast)),
        lambda: torch.zeros(1, dtype=torch.float16).as_strided(vast, [0] * len(vast)),
        lambda: like.T.contiguous().T,
        lambda: torch.cat((like, like))[: len(like)],
        lambda: like[:0],
        lambda: like.reshape(-1),
        lambda: like.flatten()[0],
        lambda: torch.zeros([0] * 30),
        lambda: torch.zeros(numel),
        lambda: like.untyped_storage(),
        lambda: like.tolist(),
        lambda: odd_value(rng),
    ]
    return rng.choice(makers)()


def odd_value(rng: random.Random) -> Any:
    """A plain value where another is expected."""
    nested: Any = []
    for _ in range(rng.choice((3, 5000))):
        nested = [nested] if rng.random() < 0.5 else {"": nested}
    recursive: list[Any] = []
    recursive.append(recursive)
    numbers = [0, 1, 2, 3, 4, 7, 48, -1, 2**20, 2**31, 2**40, 2**63, 10**30, 10**400, 10**5000]
    floats = [0.0, -0.0, 0.5, 48.0, math.nan, math.inf, 1e-320, 1e308]
    others = [None, True, False, "", "48", text(rng), b"x", (), nested, recursive, {}, 1j]
    others += [torch.ones(3), torch.tensor(4), torch.Size([4]), torch.float16, {1: 2}, "x" * LONG]
    return rng.choice((rng.choice(numbers), rng.choice(floats), rng.choice(others)))


def odd_key(rng: random.Random) -> Any:
    keys = [text(rng), "layers.0.attention.wq.weight", "a.b\nc", 0, 1.5, None, True, b"x", (1, 2)]
    return rng.choice([*keys, torch.tensor(1), "x" * LONG, "attention.wq", "." * LONG])


def odd_checkpoint(rng: random.Random, checkpoint: dict[str, Any]) -> Any:
    """A checkpoint with a few entries changed."""
    parts = {key: dict(value) for key, value in checkpoint.items()}
    for _ in range(rng.choice((1, 1, 2, 4))):
        part = rng.choice(list(parts))
        entries = parts[part]
        name = rng.choice(list(entries) or [""])
        kind = rng.randrange(6)
        if kind == 0:
            entries.pop(name, None)
        elif kind == 1:
            entries[odd_key(rng)] = entries.get(name)
        elif part != "model":
            entries[name] = odd_value(rng)
        elif isinstance(entries.get(name), torch.Tensor) and kind > 2:
            with suppress(RuntimeError, TypeError, NotImplementedError):  # not for every shape
                entries[name] = odd_tensor(rng, checkpoint["model"].get(name, torch.ones(2)))
        else:
            entries[name] = rng.choice((odd_value(rng), RunsCode(rng.choice(hostile_calls()))))
    if rarely(rng, 0.05):
        others: list[Any] = [list(parts.values()), parts["model"], odd_value(rng)]
        return rng.choice([*others, {**parts, "more": [1]}])
    if rarely(rng, 0.05):
        part = rng.choice(list(parts))
        return {**parts, part: rng.choice((odd_value(rng), RunsCode(rng.choice(hostile_calls()))))}
    return parts


def serialise(checkpoint: Any, as_zip: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(checkpoint, stream, _use_new_zipfile_serialization=as_zip)
    return stream.getvalue()


def change_members(rng: random.Random, content: bytes) -> bytes:
    """The zip archive of a checkpoint with other members, each with a right checksum."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    names = list(members)
    folder = names[0].split("/")[0]
    pickled = f"{folder}/data.pkl"
    for _ in range(rng.choice((1, 1, 2, 4))):
        name, kind = rng.choice(names), rng.randrange(7)
        if kind < 3:
            members[pickled] = mutate(rng, members.get(pickled, b""))
        elif kind == 3:
            members.pop(name, None)
        elif kind == 4:
            members[name] = mutate(rng, members.get(name, b""))
        elif kind == 5:
            other = rng.choice((f"../{CANARY}", f"/{CANARY}", "", "\0", f"{folder}/constants.pkl"))
            members[rng.choice((other, f"{folder}/{text(rng)}"))] = rng.randbytes(9)
        else:
            for end in ("byteorder", "version", ".format_version", ".storage_alignment"):
                odd = (b"big", b"", b"9" * 30, b"-1", b"\xff", b"little\0")
                members[f"{folder}/{end}"] = rng.choice(odd)
    stream = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rarely(rng, 0.1) else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, member in members.items():
            archive.writestr(name.encode("utf-8", "replace").decode(), member)
    return stream.getvalue()


def claim_sizes(rng: random.Random, content: bytes) -> bytes:
    """The zip archive of a checkpoint, whose directory says that members are huge."""
    data = bytearray(content)
    for found in re.finditer(rb"PK\x01\x02|PK\x03\x04", content):
        if rng.random() < 0.5:
            central = content[found.start() + 2] == 1
            at = found.start() + (10 if central else 8)  # of the method; the sizes follow
            struct.pack_into("<H", data, at, rng.choice((0, 8)))
            struct.pack_into("<I", data, at + 14, rng.choice((2**32 - 2, 2**31, 10**9)))
            if rng.random() < 0.5:
                struct.pack_into("<I", data, at + 10, rng.choice((2**32 - 2, 2**31, 10**9)))
    return bytes(data)


def bomb(rng: random.Random, content: bytes) -> bytes:
    """A checkpoint of 100 MB of zeros, compressed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(stream, "w", 8) as packed:
        for name in archive.namelist():
            big = name.endswith("/data/0")
            packed.writestr(name, bytes(100_000_000) if big else archive.read(name))
    return stream.getvalue()


def deep_checkpoint(rng: random.Random, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Sizes that no file holds, with weights that seem to fit them."""
    args = dict(checkpoint["model_args"])
    args[rng.choice(("n_layers", "vocab_size", "dim", "hidden_dim", "max_seq_len"))] = rng.choice(
        (2**10, 2**16, 2**20, 2**24, 2**30, 2**40)
    )
    shapes = {name: list(tensor.shape) for name, tensor in checkpoint["model"].items()}
    for name, shape in shapes.items():
        if name.endswith(("tok_embeddings.weight", "output.weight")):
            shape[0] = args["vocab_size"]
        if "w2" in name:
            shape[1] = args["hidden_dim"]
        elif "w1" in name or "w3" in name:
            shape[0] = args["hidden_dim"]
    dtype = rng.choice((torch.float32, torch.float16, torch.float64))
    weights = {name: torch.zeros(1, dtype=dtype).expand(shape) for name, shape in shapes.items()}
    return {**checkpoint, "model": weights, "model_args": args}


def checkpoint_bytes(rng: random.Random, checkpoint: dict[str, Any], whole: bytes) -> bytes:
    """A checkpoint file that is broken or hostile in one of many ways."""
    kind = rng.random()
    if kind < 0.2:
        return mutate(rng, whole)
    if kind < 0.45:
        return change_members(rng, whole)
    if kind < 0.5:
        return claim_sizes(rng, whole)
    if kind < 0.502:
        return bomb(rng, whole)
    if kind < 0.55:
        return other_file(rng)
    if kind < 0.6:
        return serialise(deep_checkpoint(rng, checkpoint))
    changed = odd_checkpoint(rng, checkpoint)
    if kind < 0.9:
        with suppress(Exception):  # what cannot be saved
            content = serialise(changed, as_zip=kind < 0.85)
            return mutate(rng, content) if kind > 0.87 else content
    code = RunsCode(rng.choice(hostile_calls()))
    hostile = rng.choice((code, {"model": code, "model_args": {}}, {"model": {code: 1}}))
    with suppress(Exception):  # what cannot be pickled
        if rng.random() < 0.5:
            return serialise(hostile, as_zip=rng.random() < 0.5)
        return pickle.dumps(hostile, rng.randrange(6))
    return other_file(rng)


def pretrained(rng: random.Random) -> Case:
    """A checkpoint, loaded and used."""
    path = put("model.pt", checkpoint_bytes(rng, SAMPLES.checkpoint, SAMPLES.files["model.pt"]))

    def run() -> None:
        model = load_pretrained(path)
        parameters = list(model.parameters())
        assert all(p.dtype == torch.float32 and p.layout == torch.strided for p in parameters)
        assert all(p.isfinite().all() for p in parameters)
        with torch.inference_mode():
            model(TOKENS.clamp(max=model.config.vocab_size - 1)[:, : model.config.max_seq_len])
        rope.rotary_tables.cache_clear()

    return Case(run, (path,))


def fine_tuned(rng: random.Random) -> Case:
    """A classifier's checkpoint, plain or pooled, loaded and used."""
    checkpoint, name = rng.choice(
        ((SAMPLES.classifier, "classifier.pt"), (SAMPLES.pooled, "pooled.pt"))
    )
    path = put("classifier.pt", checkpoint_bytes(rng, checkpoint, SAMPLES.files[name]))

    def run() -> None:
        model = load_any_classifier(path)
        assert all(p.isfinite().all() for p in model.parameters())
        with torch.inference_mode():
            config = model.llama.config
            model(TOKENS.clamp(max=config.vocab_size - 1)[:, : config.max_seq_len])
        rope.rotary_tables.cache_clear()

    return Case(run, (path,))


BATCHES = [Blocks(torch.ones(1, 3), torch.zeros(1, 3).long()) for _ in range(3)]


def train(resume: bool, steps: int | None = None) -> None:
    """Train a tiny model in the current folder, for three epochs or for so many steps."""
    options = RunOptions(
        filepath="run.pt",
        log_folder=Path("logs"),
        input_files=(),
        output_files=("run.pt",),
        hyperparameters={"lr": "0.001"},
        seed=0,
        epochs=3,
        batch_size=1,
        micro_batch_size=None,
        save_every=1,
        resume=resume,
    )
    model = torch.nn.Linear(3, 2)
    optimizer = AdamW(model.parameters())
    runtime = Runtime(torch.device("cpu"), torch.float32, causal=True)
    run: TrainingRun[Blocks]
    with start_run(model, optimizer, lambda *_: BATCHES, options, runtime) as run:
        for _ in run.epochs():
            for batch in run.batches():
                if run.step == steps:
                    return
                optimizer.zero_grad()
                loss = run.backward(lambda model, rows: model(rows).sum(), batch, 1)
                optimizer.step()
                run.log(loss)
            run.is_best(run.epoch_totals().loss)


def training_state(rng: random.Random) -> Case:
    """The training checkpoint of an interrupted run, which is resumed."""
    whole = SAMPLES.files["run.pt.state"]
    kind = rng.random()
    if kind < 0.2:
        content = mutate(rng, whole)
    elif kind < 0.4:
        content = change_members(rng, whole)
    elif kind < 0.45:
        content = claim_sizes(rng, whole)
    elif kind < 0.5:
        content = other_file(rng)
    else:
        content = whole
        name = rng.choice(list(SAMPLES.state))
        folders = (f"/../../{CANARY}", f"/../../../{CANARY}", "a" * 300, "\0", text(rng))
        log = f"run-{rng.choice(folders)}"
        with suppress(Exception):  # what cannot be made or saved
            odd = log if name == "log" and rng.random() < 0.5 else change(rng, SAMPLES.state[name])
            content = serialise({**SAMPLES.state, name: odd})
    path = put("run.pt.state", content)
    put("run.pt", b"")

    # A step says where it is, if the values in the file are finite but too large.
    return Case(lambda: train(resume=True), (path, "step "), outputs=("run.pt.state", "logs/"))


def change(rng: random.Random, value: Any) -> Any:
    """Another value, or the same with one of its parts changed."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        return {**value, key: change(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        number = rng.randrange(len(value))
        return [*value[:number], change(rng, value[number]), *value[number + 1 :]]
    if isinstance(value, torch.Tensor) and rng.random() < 0.8:
        return odd_tensor(rng, value)
    return odd_value(rng)


# ----------------------------------------------------------------------------------- tokenizer


def tokenizer_file(rng: random.Random) -> Case:
    """A SentencePiece model."""
    content = SAMPLES.files["tokenizer.model"]
    kind = rng.random()
    if kind < 0.6:
        content = mutate(rng, content)
    elif kind < 0.9:
        content = rng.choice((b"", content)) + b"".join(
            proto_field(rng) for _ in range(rng.choice((1, 3)))
        )
    else:
        content = other_file(rng)
    path = put("tokenizer.model", content)

    def run() -> None:
        tokenizer = Tokenizer(None, path)
        ids = tokenizer.encode("A warm  film, naïve 映画 🎬 123", bos=True, eos=True)
        assert all(0 <= token < tokenizer.n_words for token in ids)
        tokenizer.decode(ids)
        "".join(decode_stream(tokenizer, ids))

    return Case(run, (path,))


# ------------------------------------------------------------------------------------ download

FILE, ENTIRE = "tokenizer.model", random.Random(0).randbytes(3000)
MODEL, MODEL_CONTENT = "stories42M.pt", make_zip(random.Random(1).randbytes(2000))


def answer(rng: random.Random, url: str) -> Callable[[], Iterator[Step]]:
    """A way to answer that a server may have."""
    wait = 0.02
    body = rng.choice((ENTIRE, ENTIRE, MODEL_CONTENT, mutate(rng, ENTIRE), b"<html></html>", b""))
    number = rng.choice((len(body), len(body), 0, -1, len(body) + 5, len(body) // 2, 10**20))
    length = rng.choice((str(number), str(number), "9" * 5000, "٣", "1, 1", "x", text(rng)))
    places = ["/", f"{url}/x", "file:///etc/hostname", f"file://{os.getcwd()}/secret", "ftp://[::1"]
    places += ["http://127.0.0.1:99999/", "http://[::1", "http://127.0.0.1:0/", "//", "", text(rng)]
    places += [
        "http://" + "a" * 70 + "/",
        "data:,x",
        "HTTP://127.0.0.1:1/",
        "http://\x7f/",
        "http:",
    ]
    places += [
        "http:///x",
        "https://127.0.0.1:1/",
        "javascript:1",
        "ftp://127.0.0.1:1/x",
        "?" * 999,
    ]
    ranges = [f"bytes {rng.choice((0, 1, 1500, -1))}-{number}/{rng.choice((3000, '*', number))}"]
    ranges += ["bytes 0-2999/3000", f"bytes 1500-2999/{'9' * 5000}", "x", text(rng)]
    headers = [f"Content-Length: {length}"]
    if rng.random() < 0.3:
        others = ["Content-Type: text/html", "Content-Type: ;;=", "Content-Encoding: gzip", ": x"]
        others += ["Transfer-Encoding: chunked", "Connection: keep-alive", "X" * 200, "\0", " x: y"]
        headers.append(
            rng.choice([*others, f"Set-Cookie: {text(rng)}", "WWW-Authenticate: Digest"])
        )
    status = rng.choice((200, 200, 200, 206, 206, 204, 304, 401, 404, 416, 500, 99, 1000, 100))
    if rng.random() < 0.25:
        status = rng.choice((301, 302, 303, 307, 308, 300))
        headers.append(f"{rng.choice(('Location', 'URI'))}: {rng.choice(places)}")
    if status in (206, 416) or rarely(rng):
        headers.append(f"Content-Range: {rng.choice(ranges)}")
    if "Transfer-Encoding: chunked" in headers:
        sizes = ("5", f"{len(body):x}", "-5", "", "0", "ffffffffffffffffff", "x", "1" * 70_000)
        body = rng.choice(sizes).encode() + b"\r\n" + body + rng.choice((b"\r\n0\r\n\r\n", b""))
    top = rng.choice(
        (f"HTTP/1.1 {status} OK",) * 8 + ("HTTP/1.0 200", "HTTP/9", "", "ICY 200", "x")
    )
    joined = "\r\n".join([top, *headers, "", ""]).encode("utf-8", "surrogatepass")
    entire = joined + body

    def once() -> Iterator[Step]:
        yield 0, entire

    def cut() -> Iterator[Step]:
        yield 0, entire[: rng.randrange(len(entire))]

    def drip() -> Iterator[Step]:
        for i in range(len(entire)):
            yield wait, entire[i : i + 1]

    def endless() -> Iterator[Step]:
        yield 0, entire
        while True:
            yield 0, ENTIRE

    def endless_drip() -> Iterator[Step]:
        yield 0, entire
        while True:
            yield wait, b"x"

    def endless_headers() -> Iterator[Step]:
        yield 0, f"{top}\r\n".encode()
        while True:
            yield rng.choice((0, wait)), b"X: " + rng.choice((b"", b"y" * 3000, b"y")) + b"\r\n"

    def endless_line() -> Iterator[Step]:
        yield 0, f"{top}\r\nX: ".encode()
        while True:
            yield wait, b"y"

    def stall() -> Iterator[Step]:
        yield 0, entire[: rng.randrange(len(entire))]
        yield TIME, b""

    kinds = [endless, endless_headers]
    slow = [drip, endless_drip, endless_line, stall]  # each takes as long as the program lets it
    if rarely(rng, 0.3):
        return right_answer
    return rng.choice(slow if rarely(rng, 0.02) else [once] * 20 + [cut] * 3 + kinds)


def right_answer() -> Iterator[Step]:
    yield 0, b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n" + ENTIRE


def download(rng: random.Random) -> Case:
    """A server that answers as it likes, and the downloader's own arguments."""
    server = SAMPLES.server
    server.closing.set()  # the last input's answers end
    server.closing = threading.Event()
    server.scripts = [answer(rng, server.url) for _ in range(rng.choice((1, 2, 3)))]
    if rng.random() < 0.4:
        server.scripts.append(right_answer)
    put("secret", ENTIRE)  # what a redirection to file:// would find
    if rng.random() < 0.4:
        Path("target").mkdir()
        had = (ENTIRE[: rng.choice((1, 1500))], ENTIRE + b"x", b"other", ENTIRE[:-1] + b"x")
        put(f"target/{FILE}{rng.choice(('', '.part', '.part'))}", rng.choice(had))
    argv = [rng.choice((FILE, FILE, FILE, MODEL)), "--from", server.url, "--to", "target"]
    if rng.random() < 0.1:
        sources = ["nowhere", "", ".", "secret", "http://127.0.0.1:99999", "http://[::1", "http://"]
        sources += ["http://\0/", "HTTP://a b/", "http://" + "a" * 70, "file:///etc", "http://ä.ö/"]
        argv[2] = rng.choice([*sources, text(rng)])
        argv[0] = rng.choice((FILE, MODEL, text(rng), "../x", "--bogus", f"../{CANARY}"))
        argv[4] = rng.choice(("target", "secret", "secret/x", "a" * 300, "target/../target", ""))
    download_main = SAMPLES.download.main
    outputs = tuple(f"{folder}{name}" for folder in ("target/", "") for name in (FILE, MODEL))
    return Case(lambda: exit_status(download_main, argv, "download.py"), outputs=outputs)


# -------------------------------------------------------------------------------- command line


def arguments(rng: random.Random, inputs: Sequence[str], outputs: Sequence[str]) -> list[str]:
    """Make the words of a command line; most flags are among those of its task."""
    ints = ["-1", "0", "1", "3", "7", "99999999999999999999", "1" + "0" * 400, "9" * 5000, "1_0"]
    floats = ["0", "-0.0", "1e-320", "0.5", "1", "1e38", "1e39", "1e300", "inf", "nan", "x", ""]
    numbers = {"max_sentence_len": ints, "seed": ints, "max_new_tokens": ["1", "3"], "top_k": ints}
    numbers |= {"threads": ["1", *ints]}
    numbers |= {"num_samples": ["0", "1", "2"], "epochs": ["0", "1"], "batch_size": ints, "x": ints}
    numbers |= dict.fromkeys(("dropout", "temperature", "top_p", "lr"), floats)
    numbers |= dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads"), ["1", "2", "8", "-1"])
    numbers |= {"hidden_dropout_prob": floats, "max_seq_len": ["1", "2", "16", "64", *ints]}
    words = {name: rng.choice(values) for name, values in numbers.items()}
    words |= {"prompt": rng.choice(("A film", "", "-", text(rng))), "quantize": "int8"}
    words |= {"dtype": rng.choice(("bfloat16", "float64")), "dataset": rng.choice(("sst", "x"))}
    words |= {"store_dtype": rng.choice(("bfloat16", "float16", "x")), "y": text(rng)}
    words |= {"seeds": rng.choice(("1,2", "1", "1,,2")), "save_every": rng.choice(("1", "0"))}
    words |= {"micro_batch_size": rng.choice(("1", "3", "-1"))}
    words |= {"pooling": rng.choice((*POOLINGS, "x")), "head": rng.choice((*HEADS, "x"))}
    words |= {"recipe": rng.choice(("better", "x"))}
    words |= {"pool_layer": rng.choice(("1", "2", *ints))}
    rates = ("label_smoothing", "warmup", "layer_decay", "weight_decay", "max_grad_norm", "ema")
    words |= {name: rng.choice(floats) for name in (*rates, "lora_alpha", "wise_ft")}
    words |= {"patience": rng.choice(ints), "lora_rank": rng.choice(("1", "8", "9999", *ints))}
    words |= {"lora_matrices": rng.choice(("query", "w2,key", "query,query", "", "wq"))}
    words |= {name: rng.choice(floats) for name in ("smart", "bregman", "r_drop", "mixout")}
    files = ["pretrained-model-path", "tokenizer_path", "train", "dev", "test", "label-names"]
    files += ["input"]
    words |= {name: rng.choice(inputs) for name in files}
    files = ["generated_sentence_low_temp_out", "generated_sentence_high_temp_out", "dev_out"]
    words |= {name: rng.choice(outputs) for name in (*files, "test_out", "filepath", "output")}
    switches = ["causal", "no-causal", "stop_at_eos", "stream", "use_gpu", "caus", "", "compile "]
    switches += ["resume", "deterministic", "compile", "json", "calibrate", "no-trailing-space"]
    switches += ["linear_decay", "no-linear_decay", "freeze_backbone"]
    argv = []
    if rng.random() < 0.8:
        argv += ["--option", rng.choice(("prompt", *TASKS))]
    known = flags_of(TASKS[task_of(argv)])
    own = [
        name
        for name in (*words, *switches)
        if flag_name(name) in {*known, "no_causal", "no_linear_decay"}
    ]
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        name = rng.choice(own if rng.random() < 0.8 else (*words, rng.choice(switches)))
        flag = f"--{name.replace(*rng.choice(('_-', '-_')))}"
        if name in words:
            argv += rng.choice(([flag, words[name]], [f"{flag}={words[name]}"]))
        else:
            argv.append(flag)
    return argv


def task_of(argv: Sequence[str]) -> str:
    """Return the task of a command line that `arguments` has made."""
    return argv[1] if argv[:1] == ["--option"] else "generate"


def flag_name(word: str) -> str:
    """Return the name of the option that a word of a command line sets, if it is a flag."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


def argument_words(rng: random.Random) -> Case:
    """A command line, parsed only."""
    names = ["data/cfimdb-dev.txt", "x", "", ".", "/", "a" * 5000, "\0", text(rng)]
    argv = arguments(
        rng, names, [*names, "dev-prompting-output.txt", "x/dev-finetuning-output.txt"]
    )
    if rng.random() < 0.2:
        argv += rng.choices(("--", "-", "-h", "--help", "@x", "--=", "--option", text(rng)), k=2)
        rng.shuffle(argv)

    def run() -> None:
        try:
            options = get_args(argv)
        except SystemExit as stop:
            assert not stop.code and {"-h", "--help"} & set(argv)
        else:
            assert options.input_files
            assert options.output_files or isinstance(options, ClassifyOptions)
            assert not isinstance(options, TrainingOptions) or options.epochs >= 1

    return Case(run)


def whole_run(rng: random.Random) -> Case:
    """A whole run on a tiny model, with odd flags and at times an odd file."""
    for name in ("model.pt", "tokenizer.model", "cfimdb-dev.txt", "classifier.pt"):
        put(name, SAMPLES.files[name])
    Path("data").mkdir()
    for split in ("train", "dev", "test"):
        shutil.copy("cfimdb-dev.txt", f"data/cfimdb-{split}.txt")
    put("data/cfimdb-label-mapping.json", LABEL_NAMES.encode())
    shutil.copy("model.pt", MODEL)
    odd = ["no.txt", "data", "/dev/null", "", "model.pt", "a" * 300, "caf\udce9.txt", "n\nl.txt"]
    put("caf\udce9.txt", SAMPLES.files["cfimdb-dev.txt"])
    for name, make in (("odd.txt", data_file), ("odd.json", label_words)):
        make(rng)
        Path({"odd.txt": "data.txt", "odd.json": "labels.json"}[name]).rename(name)
    changed = mutate(rng, SAMPLES.files["model.pt"])
    put("odd.pt", rng.choice((changed, SAMPLES.files["narrow.pt"], SAMPLES.files["vast.pt"])))
    put("odd.model", mutate(rng, SAMPLES.files["tokenizer.model"]))
    outputs = ["out/x.txt", "data", "/proc/x/y.txt", "/dev/full", "model.pt/x", "b" * 250, "out/\n"]
    outputs += [f"out/{split}-{kind}-output.txt" for split in ("dev", "test") for kind in KINDS]
    outputs += ["out/caf\udce9.txt", "out/\udce9/dev-prompting-output.txt"]
    argv = arguments(rng, [*odd, "odd.txt", "odd.json", "odd.pt", "odd.model"], outputs)
    argv = [word for word in argv if word != "--compile"]  # takes too long
    task = task_of(argv)
    argv += ["--max_new_tokens", "2"] if task == "generate" else []
    argv += ["--epochs", "1"] if task in ("finetune", "pretrain") else []
    if task == "classify" and rng.random() < 0.9:
        put("odd-classifier.pt", mutate(rng, SAMPLES.files["classifier.pt"]))
        names = ("classifier.pt", "classifier.pt", "odd-classifier.pt", "model.pt")
        argv += ["--filepath", rng.choice(names)]
    for flag, name in (("--dev", "odd.txt"), ("--label-names", "odd.json")):
        if rng.random() < (0.3 if flag_name(flag) in flags_of(TASKS[task]) else 0.03):
            argv += [flag, name]
    for flag, name in (("--pretrained-model-path", "odd.pt"), ("--tokenizer_path", "odd.model")):
        if rng.random() < 0.2:
            argv += [flag, name]
    if any(flag_name(word) in PretrainOptions.shape_names for word in argv):
        argv += ["--dim", "8"]  # small enough for a test
        argv += ["--tokenizer_path", "tokenizer.model"] if rng.random() < 0.7 else []

    def run() -> None:
        sys.stdin = io.TextIOWrapper(io.BytesIO(b"A film\xff"))
        exit_status(main, argv, "run_llama.py")
        rope.rotary_tables.cache_clear()

    return Case(run, outputs=("output/", "out/", "b" * 250))


KINDS = ("prompting", "finetuning")
TARGETS: Targets = {  # with their shares of the inputs
    "data file": (5, data_file),
    "label words": (4, label_words),
    "checkpoint": (4, pretrained),
    "classifier": (2, fine_tuned),
    "training state": (1, training_state),
    "tokenizer file": (3, tokenizer_file),
    "download": (1, download),
    **FORMAT_TARGETS,
    "argument words": (2, argument_words),
    "whole run": (1, whole_run),
}


# -------------------------------------------------------------------------------------- worker


class CleanError(Exception):
    """A program ended with status 2 and one line."""


def exit_status(program: Callable[[list[str]], int], argv: list[str], name: str) -> None:
    """Run a program; raises CleanError where it reports an error as it should."""
    try:
        status = program(argv)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    sys.stderr.flush()
    os.lseek(2, 0, os.SEEK_SET)
    err = re.sub(r"[^\n]*\r", "", os.read(2, 1 << 20).decode("utf-8", "replace"))
    lines = [
        line
        for line in err.splitlines()
        if not re.match(
            rf"{name}: (note: |.*; trying )|.* differ; .* is used$|.*B/s\] *$| *$", line
        )
    ]
    if status == 2:
        if len(lines) != 1 or not lines[0].startswith(f"{name}: error: "):
            raise Violation(f"{argv}: expected one line of error, found {err[-2000:]!r}")
        check_message(lines[0])
        raise CleanError
    if status != 0:
        raise Violation(f"{argv}: status {status}")


def check_message(message: str, names: Sequence[str] = ()) -> None:
    """Raise Violation unless a message says in one line, and where, what the user did wrong."""
    if not message.strip() or len(message.splitlines()) > 1:
        raise Violation(f"not one line: {message!r}")
    if names and not any(name in message for name in names):
        raise Violation(f"names none of {names}: {message!r}")
    if re.search("alloc|not enough memory|can't encode|surrogates not allowed", message):
        raise Violation(f"the program's fault: {message!r}")


@dataclass
class Samples:
    """What inputs are made of."""

    files: dict[str, bytes]
    checkpoint: dict[str, Any]
    classifier: dict[str, Any]
    pooled: dict[str, Any]
    state: dict[str, Any]
    tokenizer: Tokenizer
    server: Answers
    download: Any


SAMPLES: Samples


def make_samples(folder: Path) -> None:
    """Write the sound files from which broken ones are made."""
    shape = {"n_heads": 2, "n_kv_heads": 1, "vocab_size": VOCAB_SIZE}
    save_llama(make_llama(causal=True, dim=12, **shape), folder / "narrow.pt")
    llama = make_llama(causal=True, dim=16, **shape)
    save_llama(llama, folder / "model.pt")
    with tempfile.TemporaryDirectory() as elsewhere, contextlib.chdir(elsewhere):
        train(resume=False, steps=4)
        shutil.copy("run.pt.state", folder)
    (folder / "cfimdb-dev.txt").write_text("\n".join(SENTENCES) + "\n")
    train_tokenizer([folder / "cfimdb-dev.txt"], VOCAB_SIZE, folder / "tokenizer.model")
    tokenizer = Tokenizer(tokenizer_model=folder / "tokenizer.model")
    config = ClassifierConfig(2, "", 0.3, "finetune")
    model = LlamaEmbeddingClassifier(config, llama, ["bad", "good"], tokenizer)
    write_checkpoint(folder / "classifier.pt", model.to_checkpoint())
    pooled = PooledClassifier(model, "attention")
    write_checkpoint(folder / "pooled.pt", pooled.to_checkpoint())
    for parameter in llama.parameters():
        parameter.data *= 1e30  # finite, but nothing that is computed with it
    save_llama(llama, folder / "vast.pt")


def load_samples(folder: Path) -> Samples:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    checkpoint, classifier, pooled, state = (
        torch.load(io.BytesIO(files[name]), weights_only=True)
        for name in ("model.pt", "classifier.pt", "pooled.pt", "run.pt.state")
    )
    server = Answers()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    module: Any = load_download()
    module.TIMEOUT, module.LIMIT = 0.1, 0.3
    sha256 = hashlib.sha256(ENTIRE).hexdigest()
    module.FILES = (
        module.PinnedFile(sha256, len(ENTIRE), FILE, server.url),
        module.PinnedFile(None, len(MODEL_CONTENT), MODEL, server.url),
        module.PinnedFile(sha256, len(ENTIRE), MODEL, server.url, ".hub.part"),
    )
    tokenizer = Tokenizer(None, folder / "tokenizer.model")
    return Samples(files, checkpoint, classifier, pooled, state, tokenizer, server, module)


class Guard:
    """Watches, from within the interpreter, for what no input may make a program do."""

    FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.kill"}
    FORBIDDEN |= {"subprocess.Popen", "ctypes.dlopen"}
    MOVERS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"}
    MOVERS |= {"os.truncate", "os.chmod", "shutil.rmtree", "tempfile.mkdtemp", "tempfile.mkstemp"}

    def __init__(self, place: Path) -> None:
        self.place = str(place.resolve())
        self.seen: list[str] = []
        self.watches = False
        sys.addaudithook(self.audit)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.watches:
            return
        paths: list[Any] = []
        if event == "open":
            writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            paths = [args[0]] if writes else []
        elif event in self.MOVERS:
            paths = [arg for arg in args if isinstance(arg, (str, bytes, os.PathLike))]
        elif event in self.FORBIDDEN or (event == "socket.connect" and not self.is_local(args[1])):
            self.seen.append(f"{event} {args!r}")
        if event == "os.mkdir" and os.path.isdir(args[0]):
            return  # only to find that it is there
        for path in paths:
            if not isinstance(path, int) and not self.may_write(os.fsdecode(path)):
                self.seen.append(f"{event} {path!r}")

    def may_write(self, path: str) -> bool:
        # Opened to see whether they can be written, as users may ask for; or to drop messages.
        path = os.path.realpath(path) + os.sep
        return path.startswith(("/proc/x/", "/dev/null/", self.place + os.sep))

    @staticmethod
    def is_local(address: Any) -> bool:
        return isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1")


def files_below(folder: Path) -> dict[str, bytes]:
    found = {}
    for name, _, files in os.walk(folder):
        for file in files:
            path = Path(name, file)
            found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else b""
    return found


def try_one(target: Target, rng: random.Random, place: Path, guard: Guard) -> str:
    """Make one input and try it; returns "result" or "error", raises Violation."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    os.chdir(place)
    case = target(rng)
    before, outcome = files_below(place), "result"
    for stream in (1, 2):
        os.ftruncate(stream, 0)
        os.lseek(stream, 0, os.SEEK_SET)
    guard.seen, guard.watches = [], True
    try:
        case.run()
    except CleanError:
        outcome = "error"
    except Violation:
        raise
    except (ValueError, OSError) as error:
        check_message(describe_error(error), case.names)
        outcome = "error"
    except BaseException:
        raise Violation(traceback.format_exc()) from None
    finally:
        guard.watches = False
        sys.stdout.flush()
    if guard.seen:
        raise Violation(f"did what no input may do: {guard.seen}")
    os.chdir(place)
    if Path(CANARY).exists():
        raise Violation(f"made the folder {CANARY}: by code in the file, or by a path in it")
    after = files_below(place)
    for name in before.keys() | after.keys():
        if before.get(name) != after.get(name) and not name.startswith(case.outputs or "\0"):
            raise Violation(f"changed the file {name}")
    return outcome


def worker(
    connection: Connection, folder: Path, targets: Targets, seed: int, indices: Sequence[int]
) -> None:
    """Try inputs one after the other and report each; the parent ends this process."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "no_proxy": "*"}
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed process leaves
    for module in LATE_IMPORTS:
        importlib.import_module(module)
    tempfile.gettempdir()  # tries by a file where it is, once
    for stream, name in ((1, "stdout"), (2, "stderr")):
        # Read back, so that what C++ code prints counts too.
        with open(folder / name, "wb+") as file:
            os.dup2(file.fileno(), stream)
    if not (folder / "samples").exists():  # this is the first worker
        (folder / "samples").mkdir()
        make_samples(folder / "samples")
    global SAMPLES
    SAMPLES = load_samples(folder / "samples")
    guard = Guard(folder / "place")
    connection.send("ready")
    for index in indices:
        rng, name = rng_of(seed, index, targets)
        start = time.monotonic()
        try:
            outcome, detail = try_one(targets[name][1], rng, folder / "place", guard), ""
        except Violation as violation:
            outcome, detail = "VIOLATION", str(violation)
        except BaseException:
            outcome, detail = "VIOLATION", f"the fuzzer itself: {traceback.format_exc()}"
        connection.send((outcome, detail, time.monotonic() - start))


# -------------------------------------------------------------------------------------- parent


class Tally:
    """What came of all inputs."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()  # by target and outcome
        self.violations: list[str] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by target
        self.slowest = (0.0, -1)  # seconds, input

    def table(self) -> str:
        counts = Counter(self.counts)
        for (_, outcome), count in self.counts.items():
            counts["all", outcome] += count
        seconds = {**self.seconds, "all": sum(self.seconds.values())}
        heads = f"{'inputs':>8}{'results':>9}{'errors':>8}{'violations':>12}{'seconds':>9}"
        rows = [f"{'target':<16}{heads}"]
        for target in dict.fromkeys([*sorted(target for target, _ in self.counts), "all"]):
            result, error, violation = (
                counts[target, outcome] for outcome in ("result", "error", "VIOLATION")
            )
            total = result + error + violation
            numbers = f"{total:>8,}{result:>9,}{error:>8,}{violation:>12,}{seconds[target]:>9.1f}"
            rows.append(f"{target:<16}{numbers}")
        return "\n".join(rows)


def rng_of(seed: int, index: int, targets: Targets) -> tuple[random.Random, str]:
    """The source of randomness of an input, and the name of its target."""
    rng = random.Random(f"{seed}/{index}")
    shares = [share for share, _ in targets.values()]
    return rng, rng.choices(list(targets), shares)[0]


def fuzz(
    seed: int, indices: Sequence[int], targets: Targets | None = None, limit: float = TIME
) -> Tally:
    """Try inputs on targets (None: on all); a worker that hangs or dies is replaced."""
    targets = TARGETS if targets is None else targets
    tally = Tally()
    context = warm_context()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        while indices and len(tally.violations) < MOST:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=worker, args=(theirs, folder, targets, seed, indices), daemon=True
            )
            process.start()
            theirs.close()  # so that its end shows when the worker dies
            if not ours.poll(START) or ours.recv() != "ready":
                raise RuntimeError("no worker could be started")
            while indices and len(tally.violations) < MOST:
                index, indices = indices[0], indices[1:]
                target = rng_of(seed, index, targets)[1]
                seconds = 0.0
                try:
                    if ours.poll(limit):
                        outcome, detail, seconds = ours.recv()
                    else:
                        outcome, detail = "VIOLATION", f"no end within {limit} s"
                except EOFError:
                    process.join()
                    outcome, detail = "VIOLATION", f"died: exit status {process.exitcode}"
                tally.counts[target, outcome] += 1
                tally.seconds[target] += seconds
                tally.slowest = max(tally.slowest, (seconds, index))
                if outcome == "VIOLATION":
                    again = f"python -m tests.sweeps.fuzz --seed {seed} --only {index}"
                    tally.violations.append(f"{target}: {detail}\nreproduce: {again}")
                    if not seconds:  # this worker is of no more use
                        process.kill()
                        break
            process.join(0 if indices else START)
            process.kill()
            process.join()
            ours.close()
    return tally


def run_main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 after a violation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="try this input alone")
    args = parser.parse_args(argv)
    indices = range(args.inputs) if args.only is None else range(args.only, args.only + 1)
    start = time.monotonic()
    tally = fuzz(args.seed, indices)
    for violation in tally.violations:
        print(violation, end="\n\n")
    print(tally.table())
    print(f"seed {args.seed}, {time.monotonic() - start:.0f} s; the slowest input: {tally.slowest}")
    return 1 if tally.violations else 0


if __name__ == "__main__":
    sys.exit(run_main())
