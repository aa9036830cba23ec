"""What lies around the architecture: initial weights and the checkpoint's file format.

A checkpoint is `{"model": state_dict, "model_args": {...}}`, tensors and plain values only. Besides
its own names this module reads those of llama2.c and of Meta's Llama, weights saved from a compiled
model (prefix `_orig_mod.`), and weights stored in float16 or bfloat16, which become float32.
"""

import logging
import pickle
import re
import reprlib
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import LlamaConfig
from utils import open_atomically

logger = logging.getLogger(__name__)

COMPILED_PREFIX = "_orig_mod."
OTHER_NAMES = {
    "wq": "compute_query",
    "wk": "compute_key",
    "wv": "compute_value",
    "wo": "compute_output",
}
# Rotary tables, which some writers store and every reader recomputes.
DERIVED = re.compile(r"(^|\.)(freqs_cos|freqs_sin|rope\.freqs|inv_freq)$")
STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TIED_NAMES = ("tok_embeddings.weight", "output.weight")  # in the order of loading


class LlamaPreTrainedModel(nn.Module):
    """Base of the model: keeps the config and draws the initial weights."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config

    def init_weights(self) -> None:
        """Draw every weight from the global random state: normal, deviation 0.02.

        The matrices that write to the residual stream are drawn smaller, by 1 / sqrt(2 n_layers),
        so that its variance does not grow with depth (Radford et al. 2019, "Language Models are
        Unsupervised Multitask Learners", section 2.3).
        """
        residual_std = 0.02 / (2 * self.config.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2 or parameter.is_meta:
                continue  # RMSNorm's gains stay at one; on the meta device nothing is drawn
            # Faithful: the assignment scales w3, the up projection; the residual writer is w2.
            residual = name.endswith(("compute_output.weight", "w3.weight"))
            nn.init.normal_(parameter, mean=0.0, std=residual_std if residual else 0.02)

    def save_pretrained(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a checkpoint that `load_pretrained` reads, its weights stored as `dtype`.

        It is written whole or not at all.
        """
        weights = {name: tensor.to(dtype) for name, tensor in self.state_dict().items()}
        # One tensor under both names, so that the file holds it once.
        weights.update(dict.fromkeys(TIED_NAMES, weights[TIED_NAMES[-1]]))
        write_checkpoint(path, {"model": weights, "model_args": self.config.to_model_args()})


def load_safely(path: str | Path) -> Any:
    """What a file of `torch.save` holds, tensors on the CPU; runs no code from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, another kind of file, or it holds anything but tensors and
            plain values.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a checkpoint file")
    try:
        _check_stored_sizes(path)
        with warnings.catch_warnings(action="ignore"):  # on odd files; what counts is raised
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint") from None
    except PermissionError:
        raise
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: not a checkpoint of tensors and plain values ({_describe(path)}); "
            "nothing in it was run"
        ) from None
    except Exception as error:  # torch.load raises a dozen kinds on a damaged file
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: cannot be read ({_describe(path)}): {reason}") from None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dict that a checkpoint file holds, as `load_safely` reads it.

    Raises:
        FileNotFoundError, ValueError: it cannot be read, or is no checkpoint.
    """
    checkpoint = load_safely(path)
    parts = (
        [checkpoint.get(key) for key in ("model", "model_args")]
        if isinstance(checkpoint, dict)
        else []
    )
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f'{path}: expected a dict that holds the dicts "model" and "model_args"')
    return checkpoint


def _check_stored_sizes(path: Path) -> None:
    """Raise ValueError if a zip archive would unpack to more than it holds: no checkpoint does."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError(f"it would unpack to {unpacked:,} bytes")


def write_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Write tensors and plain values to `path`, whole or not at all."""
    with open_atomically(path, "wb") as file:
        try:
            torch.save(dict(checkpoint), file)
        except RuntimeError as error:
            # A full disk: closing the archive fails too, and hides why.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def parse_config(
    checkpoint: Mapping[str, Any],
    path: str | Path,
    causal: bool | None = None,
    dropout: float | None = None,
    max_seq_len: int | None = None,
) -> LlamaConfig:
    """The config of a checkpoint.

    Args:
        checkpoint: what `read_checkpoint` returned.
        path: where it came from, for messages.
        causal, dropout, max_seq_len: override the checkpoint's own fields where they are not None.

    Raises:
        ValueError: `model_args` do not describe a Llama.
    """
    try:
        config = LlamaConfig.from_model_args(checkpoint["model_args"])
    except ValueError as error:
        raise ValueError(f"{path}: model_args: {error}") from None
    tensors = len(checkpoint["model"])
    if config.n_layers * 9 > tensors:  # found out before so many layers are made
        raise ValueError(
            f"{path}: model_args: n_layers={config.n_layers}, of 9 tensors each, but the file "
            f"holds {tensors} tensors"
        )
    return replace(
        config,
        causal=config.causal if causal is None else causal,
        dropout=config.dropout if dropout is None else dropout,
        max_seq_len=config.max_seq_len if max_seq_len is None else max_seq_len,
    )


def parse_weights(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The weights of a checkpoint in float32, under this project's names.

    Args:
        checkpoint, path: as in `parse_config`.

    Raises:
        ValueError: an entry is no tensor of floating-point numbers, or two have one name.
    """
    weights: dict[str, Tensor] = {}
    for given, tensor in checkpoint["model"].items():
        if not isinstance(given, str):
            raise ValueError(f"{path}: a weight's name is {reprlib.repr(given)}, no text")
        name = translate_name(given)
        if DERIVED.search(name):
            continue
        if not is_plain(tensor):
            raise ValueError(f"{path}: {given} is not a tensor of floating-point numbers")
        if name in weights:
            raise ValueError(f"{path}: two tensors are named {name}")
        weights[name] = tensor
    # Stored once, a number may be claimed by many tensors and many times by each of them. A
    # checkpoint does that at most for the tied matrix; more could fill any memory.
    size = sum(tensor.nbytes for tensor in weights.values())
    if size > 2 * Path(path).stat().st_size:
        raise ValueError(f"{path}: its tensors claim {size:,} bytes, more than the file holds")
    state_dict = {name: tensor.float() for name, tensor in weights.items()}
    _tie(state_dict, path)
    return state_dict


def is_plain(tensor: object) -> bool:
    """Whether an entry is an ordinary tensor of floating-point numbers, with its numbers."""
    return (
        isinstance(tensor, Tensor)
        and tensor.dtype in STORED_DTYPES
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"  # not meta, which has a shape only
        and not tensor.is_nested
    )


def _tie(state_dict: dict[str, Tensor], path: str | Path) -> None:
    """Let the two names of the tied matrix have one tensor, whichever of them the file holds."""
    tied = [state_dict[name] for name in TIED_NAMES if name in state_dict]
    if len(tied) == 2 and not torch.equal(*tied):
        # Faithful: loaded one after the other into one shared matrix, the last one stays.
        logger.warning("%s: %s and %s differ; %s is used", path, *TIED_NAMES, TIED_NAMES[-1])
    if tied:
        state_dict.update(dict.fromkeys(TIED_NAMES, tied[-1]))


def translate_name(name: str) -> str:
    """This project's name of a parameter, from llama2.c's, Meta's, or that of a compiled model."""
    parts = name.removeprefix(COMPILED_PREFIX).split(".")
    if len(parts) > 2 and parts[-3] == "attention":
        parts[-2] = OTHER_NAMES.get(parts[-2], parts[-2])
    return ".".join(parts)


def load_strictly(model: nn.Module, state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Give `model` the tensors of `state_dict` themselves, which must be its own, no more, no less.

    Raises:
        ValueError: names the missing, unexpected and wrongly shaped tensors, or one that holds a
            NaN or an infinity.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing {_some(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"unexpected {_some(unexpected)}")
    shapes = [
        f"{name} is {found[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ]
    if shapes:
        problems.append(f"wrong shape: {_some(shapes)}")
    if problems:
        raise ValueError(f"{path}: the weights do not fit the model: {'; '.join(problems)}")
    for name, tensor in state_dict.items():
        if not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{path}: {name} holds a number that is NaN or infinite")
    model.load_state_dict(state_dict, assign=True)


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _describe(path: Path) -> str:
    """Size and, where it can be told, kind of a file that is no checkpoint."""
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    size = f"{path.stat().st_size:,} bytes"
    if head.startswith((b"<!doctype html", b"<html")):
        return f"{size}, an HTML page; was the download answered by a web page?"
    if head.startswith(b"pk\x03\x04"):
        return f"{size}; a broken or truncated download?"
    return size
