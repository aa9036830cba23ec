"""The layout of llama2.c's model files (`.bin`), versions 0, 1 and 2.

Source: karpathy/llama2.c at commit 350e04f: `legacy_export`, `version1_export`, `version2_export`
in export.py, and `memory_map_weights` in run.c and runq.c. All numbers are little-endian.

| offset | version 0 | versions 1 and 2 |
|---|---|---|
| 0 | the seven sizes, int32 | 0x616b3432, uint32 ("ak42" from the highest byte to the lowest) |
| 4 | | version, int32 |
| 8 | | the seven sizes, int32 |
| 28 | the tensors, float32 | |
| 36 | | 1 if embedding and output are tied, else 0, uint8 |
| 37 | | version 2: group size, int32 |
| 256 | | the tensors |

The sizes are dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size and max_seq_len; a negative
vocab_size in version 0 means that embedding and output are not tied. The tensors follow each other
in this order, where `*` means all layers' tensors of this kind; `output` only if it is not tied:

| version 0 | versions 1 and 2 |
|---|---|
| tok_embeddings | attention_norm*, ffn_norm*, norm |
| attention_norm*, wq*, wk*, wv*, wo* | tok_embeddings |
| ffn_norm*, w1*, w2*, w3*, norm | wq*, wk*, wv*, wo* |
| RoPE's cosines, sines: (max_seq_len, head_dim / 2) each | w1*, w2*, w3* |
| output | output |

In version 2 norms are float32. A matrix is stored as its numbers in int8, row by row, and after
them a float32 scale for each group of `group size` numbers; a weight is its int8 times its group's
scale (Q8_0). RoPE's tables are not used, neither by llama2.c nor here.
"""

import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from beyond.formats.files import LLAMA2C_MAGIC
from config import LlamaConfig
from llama import Llama

HEADER_BYTES = {0: 28, 1: 256, 2: 256}  # by version
SIZES = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
EPS, THETA = 1e-5, 10000.0  # constants of llama2.c's programs
GROUP_SIZE = 64  # export.py's default

ATTENTION = [f"layers.{{}}.attention.compute_{x}" for x in ("query", "key", "value", "output")]
FEED_FORWARD = [f"layers.{{}}.feed_forward.{x}" for x in ("w1", "w2", "w3")]
ATTENTION_NORM, FFN_NORM = "layers.{}.attention_norm", "layers.{}.ffn_norm"
TABLES = ["freqs_cos", "freqs_sin"]
START = ["tok_embeddings", ATTENTION_NORM, *ATTENTION, FFN_NORM, *FEED_FORWARD, "norm"]
ORDER = {  # by version; {} stands for each layer in turn
    0: [*START, *TABLES, "output"],
    1: [ATTENTION_NORM, FFN_NORM, "norm", "tok_embeddings", *ATTENTION, *FEED_FORWARD, "output"],
}
ORDER[2] = ORDER[1]


@dataclass(frozen=True)
class Layout:
    """The content of a header, from which the place of each tensor follows.

    Attributes:
        version: 0, 1 or 2.
        config: the model's sizes.
        group_size: how many numbers of a matrix share a scale; 0: they are float32.
    """

    version: int
    config: LlamaConfig
    group_size: int = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors in the order of the file, those of a layer only once."""
        config = self.config
        with torch.device("meta"):  # shapes without memory
            one_layer = Llama(replace(config, n_layers=1)).state_dict()
        shapes = {name.removesuffix(".weight"): tuple(t.shape) for name, t in one_layer.items()}
        shapes |= dict.fromkeys(TABLES, (config.max_seq_len, config.head_dim // 2))
        names = [x for x in ORDER[self.version] if x != "output" or not config.tie_embeddings]
        return {name: shapes[name.format(0)] for name in names}

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return name and shape of every tensor in the order of the file."""
        return [
            (name if name in TABLES else f"{name.format(layer)}.weight", shape)
            for name, shape in self.shapes().items()
            for layer in range(self.config.n_layers if "{}" in name else 1)
        ]

    def is_quantized(self, shape: tuple[int, ...]) -> bool:
        """Return whether a tensor of this shape is stored as int8 with scales."""
        return self.group_size > 0 and len(shape) == 2

    def file_size(self) -> int:
        """Return the size of the whole file, in bytes."""
        size = HEADER_BYTES[self.version]
        for name, shape in self.shapes().items():
            n = prod(shape) * (self.config.n_layers if "{}" in name else 1)
            size += n + n // self.group_size * 4 if self.is_quantized(shape) else n * 4
        return size


def parse_header(header: bytes, path: str | Path) -> Layout:
    """Return the layout that the first bytes of a file describe."""
    has_magic = header.startswith(LLAMA2C_MAGIC)
    size = HEADER_BYTES[1 if has_magic else 0]
    if len(header) < size:
        raise ValueError(
            f"{path}: truncated: {len(header)} bytes, shorter than the header of {size} bytes; "
            "download it again"
        )
    version = int.from_bytes(header[4:8], "little", signed=True) if has_magic else 0
    if has_magic and version not in (1, 2):
        raise ValueError(f"{path}: header: version={version}, expected 1 or 2")
    sizes = dict(zip(SIZES, struct.unpack_from("<7i", header, 8 if version else 0), strict=True))
    is_tied, group_size = sizes["vocab_size"] > 0, 0
    if version == 0:
        sizes["vocab_size"] = abs(sizes["vocab_size"])
    else:
        is_tied, group_size = struct.unpack_from("<Bi", header, 36)
        if is_tied not in (0, 1):
            raise ValueError(f"{path}: header: shared_classifier={is_tied}, expected 0 or 1")
    tied = bool(is_tied)
    try:
        config = LlamaConfig(
            **sizes, layer_norm_eps=EPS, rope_theta=THETA, tie_embeddings=tied, causal=True
        )
    except ValueError as error:
        raise ValueError(f"{path}: not a model file of llama2.c: header: {error}") from None
    if version == 2 and group_size < 1:
        raise ValueError(f"{path}: header: group_size={group_size} is below 1")
    return Layout(version, config, group_size if version == 2 else 0)


def check_size(layout: Layout, size: int, path: str | Path) -> None:
    """Raise ValueError unless a file of `size` bytes holds exactly the tensors of its header."""
    for name, shape in layout.shapes().items():
        if layout.is_quantized(shape) and prod(shape) % layout.group_size:
            raise ValueError(
                f"{path}: header: group_size={layout.group_size} does not divide the "
                f"{prod(shape):,} numbers of {name.format(0)}"
            )
    if size != (expected := layout.file_size()):
        problem = "truncated" if size < expected else "longer than its model"
        sizes = ", ".join(f"{name}={getattr(layout.config, name)}" for name in SIZES)
        raise ValueError(
            f"{path}: {problem}: {size:,} bytes, but expected {expected:,} by its header "
            f"({sizes}); download it again"
        )


def group_size(config: LlamaConfig) -> int:
    """Return the largest of 64, 32, 16, ... that divides every row of every matrix.

    Rows have dim or hidden_dim numbers. export.py looks at dim only, but `runq` computes with whole
    groups of a row: if hidden_dim has a remainder, it leaves that out of every product with w2.
    """
    size = GROUP_SIZE
    while config.dim % size or config.hidden_dim % size:
        size //= 2
    return size


def make_header(layout: Layout) -> bytes:
    """Return the bytes before the first tensor."""
    config = layout.config
    sizes = [getattr(config, name) for name in SIZES]
    if layout.version == 0 and not config.tie_embeddings:
        sizes[SIZES.index("vocab_size")] *= -1
    if layout.version == 0:
        return struct.pack("<7i", *sizes)
    flags = struct.pack("<Bi", config.tie_embeddings, layout.group_size)
    header = LLAMA2C_MAGIC + struct.pack("<8i", layout.version, *sizes) + flags
    return header.ljust(HEADER_BYTES[layout.version], b"\0")
