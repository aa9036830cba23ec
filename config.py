"""The shape of a Llama model, as one validated value.

`LlamaConfig` holds what a checkpoint's `model_args` hold, under the assignment's names, and only
what the model reads. Options of a run (paths, learning rate, ...) are in `beyond/options.py`.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

ALIASES = {"norm_eps": "layer_norm_eps"}  # names in llama2.c's and Meta's files -> ours
IGNORED = ("max_batch_size",)  # in Meta's files: how many rows a cache is made for
# Upper bound of every size: above any real Llama's, and the product of two fits into int64.
MAX_SIZE = 2**20
MAX_THETA = 1e12  # above any real Llama's base, and far from overflow


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a Llama model; the defaults are those of `stories42M.pt`.

    Raises:
        ValueError: a value has the wrong type, is out of bounds, or does not fit the others.
    """

    vocab_size: int = 32000
    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int = None  # type: ignore[assignment]  # None: as many as n_heads
    hidden_dim: int = None  # type: ignore[assignment]  # None: 8/3 dim, rounded up (see below)
    multiple_of: int = 32  # the derived hidden_dim is a multiple of this
    max_seq_len: int = 1024  # tokens, BOS included
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # base of the rotary frequencies
    tie_embeddings: bool = True  # whether input embedding and output projection share one matrix
    # Probability, on embeddings and inside the layers; stories42M.pt was trained without dropout.
    dropout: float = 0.0
    causal: bool = False  # Faithful: the assignment's attention has no mask (reference mode)

    def __post_init__(self) -> None:
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        sizes = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of")
        for name in (*sizes, "max_seq_len"):
            self._check_size(name)
        if self.hidden_dim is None:
            # Two thirds of the usual 4 dim: SwiGLU has three matrices where ReLU has two
            # (Shazeer 2020, arXiv:2002.05202, section 3.1).
            multiples = -(-int(8 * self.dim / 3) // self.multiple_of)
            object.__setattr__(self, "hidden_dim", multiples * self.multiple_of)
        self._check_size("hidden_dim")
        if self.dim % self.n_heads:
            raise ValueError(f"dim={self.dim} is not divisible by n_heads={self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"dim={self.dim} / n_heads={self.n_heads} gives an odd head size "
                f"{self.head_dim}; rotary embeddings rotate pairs of features"
            )
        if not _is_number(self.layer_norm_eps) or not 0 < self.layer_norm_eps < 1:
            raise ValueError(
                f"layer_norm_eps={reprlib.repr(self.layer_norm_eps)} is not a number in (0, 1)"
            )
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={reprlib.repr(self.dropout)} is not a number in [0, 1)")
        if not _is_number(self.rope_theta) or not 1 <= self.rope_theta <= MAX_THETA:
            raise ValueError(
                f"rope_theta={reprlib.repr(self.rope_theta)} is not a number in [1, {MAX_THETA:g}]"
            )
        for name in ("tie_embeddings", "causal"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}={reprlib.repr(value)} is not True or False")

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={reprlib.repr(value)} is not a whole number of at least 1")
        if value > MAX_SIZE:
            raise ValueError(f"{name} is above {MAX_SIZE}")

    @property
    def head_dim(self) -> int:
        """The number of features per attention head."""
        return self.dim // self.n_heads

    @property
    def n_rep(self) -> int:
        """The number of query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads

    @classmethod
    def from_model_args(cls, model_args: Mapping[str, Any]) -> Self:
        """Build the config that a checkpoint's `model_args` describe.

        Translates the names in `ALIASES` and leaves out those in `IGNORED`; a value of None means
        the default.

        Raises:
            ValueError: an unknown name, a name given twice, or a bad value.
        """
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for stored_name, value in model_args.items():
            if stored_name in IGNORED:
                continue
            name = ALIASES.get(stored_name, stored_name)
            if name not in known:
                raise ValueError(
                    f"unknown model argument {reprlib.repr(stored_name)}; known are {sorted(known)}"
                )
            if name in values:
                raise ValueError(f"model argument {name!r} is given twice")
            if value is not None:
                values[name] = value
        return cls(**values)

    def to_model_args(self) -> dict[str, Any]:
        """Return a plain dict that `from_model_args` turns back into this config."""
        return asdict(self)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
