"""Initial weights, and reading and writing checkpoints.

A checkpoint is `{"model": state_dict, "model_args": {...}}`, tensors and plain values only. Besides
this project's parameter names, this module reads those of llama2.c and of Meta's Llama, weights
that were saved from a compiled or a parallel model (prefixes `_orig_mod.` and `module.`), and
weights that are stored in float16, bfloat16 or float64, which become float32.
"""

import logging
import pickle
import re
import reprlib
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from config import LlamaConfig
from utils import open_atomically

logger = logging.getLogger(__name__)

# The prefixes of a compiled and of a parallel model, in any order.
WRAPPER_PREFIXES = re.compile(r"^((_orig_mod|module)\.)+")
ATTENTION_NAMES = {  # llama2.c's and Meta's -> ours
    "wq": "compute_query",
    "wk": "compute_key",
    "wv": "compute_value",
    "wo": "compute_output",
}
# Some programs store their rotary tables and causal masks; these are computed when needed.
COMPUTED = re.compile(
    r"(^|\.)(freqs_cos|freqs_sin|freqs_cis|rope\.freqs|inv_freq|attention\.mask)$"
)
ASSIGNMENT_NAME = "attention.compute_query."  # in every file of the course and of this project
STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TIED_NAMES = ("tok_embeddings.weight", "output.weight")  # if they differ, the last one is used
TENSORS_PER_LAYER = 9


class LlamaPreTrainedModel(nn.Module):
    """Base class of the model: its config, initial weights, and loading and saving them."""

    tok_embeddings: nn.Embedding
    output: nn.Linear

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config

    def init_weights(self) -> None:
        """Initialize every matrix from a normal distribution with standard deviation 0.02.

        For two matrices of each layer it is 0.02 / sqrt(2 n_layers). Radford et al. 2019, "Language
        Models are Unsupervised Multitask Learners", section 2.3, scale the matrices that write to
        the residual stream, so that its variance does not grow with depth. Those are compute_output
        and w2, but the assignment scales compute_output and w3.
        """
        residual_std = 0.02 / (2 * self.config.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2 or parameter.is_meta:
                continue  # RMSNorm's gains stay at one; on the meta device there are no values
            # Faithful: w3, the up projection, instead of w2, which writes to the residual stream.
            is_scaled = name.endswith(("compute_output.weight", "w3.weight"))
            nn.init.normal_(parameter, mean=0.0, std=residual_std if is_scaled else 0.02)

    def tie_weights(self) -> None:
        """Make input embedding and output projection one parameter, if the config ties them."""
        if self.config.tie_embeddings:
            self.tok_embeddings.weight = self.output.weight

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Mapping[str, Any],
        path: str | Path,
        causal: bool | None = None,
        dropout: float | None = None,
        max_seq_len: int | None = None,
    ) -> Self:
        """Make the model of a checkpoint that has been read, on the CPU, in eval mode.

        Args:
            checkpoint: the dicts "model" and "model_args".
            path, causal, dropout, max_seq_len: as in `parse_config`.

        Raises:
            ValueError: the weights do not fit `model_args`.
        """
        config = parse_config(checkpoint, path, causal, dropout, max_seq_len)
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
            model = cls(config)
        load_strictly(model, parse_weights(checkpoint, path, config.tie_embeddings), path)
        model.tie_weights()  # loading gave each of the two names its own parameter
        return model.eval()

    def save_pretrained(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a checkpoint that `load_pretrained` reads, its weights stored as `dtype`.

        It is written completely or not at all.
        """
        weights = {name: tensor.to(dtype) for name, tensor in self.state_dict().items()}
        if self.config.tie_embeddings:
            # .to() may have copied the matrix twice; one tensor under two names is stored once.
            weights["tok_embeddings.weight"] = weights["output.weight"]
        write_checkpoint(path, {"model": weights, "model_args": self.config.to_model_args()})


def load_safely(path: str | Path, mmap: bool = False) -> Any:
    """Read a file of `torch.save`, with tensors on the CPU; runs no code from the file.

    Args:
        path: of the file.
        mmap: whether to map the tensors of a zip archive into memory instead of reading them. The
            file must not be written to in place while they are used.

    Raises:
        FileNotFoundError: there is no such file.
        PermissionError: reading it is not permitted.
        ValueError: it is truncated, another kind of file, or holds more than tensors and plain
            values.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a checkpoint file")
    try:
        _check_stored_sizes(path)  # its ValueError has no path; the last except adds it
        # PyTorch warns about unusual files; real problems raise an error.
        with warnings.catch_warnings(action="ignore"):
            mmap = mmap and zipfile.is_zipfile(path)  # files of the old format cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint") from None
    except PermissionError:
        raise  # its message is clear; the errors below need the path and a reason
    except pickle.UnpicklingError:
        found = _refused_objects(path)
        reason = f"found {_join_first(found)}" if found else _describe(path)
        raise ValueError(
            f"{path}: expected tensors and plain values only ({reason}); nothing in it was run"
        ) from None
    except Exception as error:  # torch.load raises many kinds of error for a damaged file
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: cannot be read ({_describe(path)}): {reason}") from None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file.

    Raises:
        FileNotFoundError, PermissionError, ValueError: it cannot be read, or is not a checkpoint.
    """
    checkpoint = load_safely(path)
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(key), dict) for key in ("model", "model_args")
    ):
        raise ValueError(f'{path}: expected a dict that holds the dicts "model" and "model_args"')
    check_claimed_size(checkpoint["model"], path)
    return checkpoint


def check_claimed_size(weights: Mapping[str, Any], path: str | Path) -> None:
    """Raise ValueError if the tensors of a file claim more than twice the size of the file.

    They can be views that share or repeat one storage, and copying them could fill the memory. A
    real checkpoint shares only the tied matrix.
    """
    size = sum(value.nbytes for value in weights.values() if is_dense_float(value))
    if size > 2 * Path(path).stat().st_size:
        raise ValueError(f"{path}: its tensors claim {size:,} bytes, more than the file holds")


def _check_stored_sizes(path: Path) -> None:
    """Raise ValueError if the members of a zip archive are larger than the file itself.

    `torch.save` never compresses, so a compressed archive is not a checkpoint.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError(f"its members would unpack to {unpacked:,} bytes")


def write_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Write tensors and plain values to `path`, completely or not at all."""
    with open_atomically(path, "wb") as file:
        try:
            torch.save(dict(checkpoint), file)
        except RuntimeError as error:
            # On a full disk PyTorch raises RuntimeError when it closes the archive; the OSError
            # with the reason is that error's context.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def parse_config(
    checkpoint: Mapping[str, Any],
    path: str | Path,
    causal: bool | None = None,
    dropout: float | None = None,
    max_seq_len: int | None = None,
) -> LlamaConfig:
    """Build the config of a checkpoint's model.

    Args:
        checkpoint: as `read_checkpoint` returned it.
        path: of the checkpoint, for error messages.
        causal, dropout, max_seq_len: override the checkpoint's own values unless None.

    Raises:
        ValueError: `model_args` does not describe a Llama.
    """
    model_args = dict(checkpoint["model_args"])
    vocab_size = model_args.get("vocab_size")
    if isinstance(vocab_size, int) and vocab_size == -1:  # in Meta's files: as the tokenizer has it
        model_args["vocab_size"] = _vocab_size(checkpoint["model"])
    if model_args.get("tie_embeddings") is None:
        model_args["tie_embeddings"] = is_tied(checkpoint["model"])
    try:
        config = LlamaConfig.from_model_args(model_args)
    except ValueError as error:
        raise ValueError(f"{path}: model_args: {error}") from None
    n_tensors = len(checkpoint["model"])
    if config.n_layers * TENSORS_PER_LAYER > n_tensors:  # checked before the layers are made
        raise ValueError(
            f"{path}: model_args: n_layers={config.n_layers} means "
            f"{config.n_layers * TENSORS_PER_LAYER} tensors or more, but the file holds {n_tensors}"
        )
    return replace(
        config,
        causal=config.causal if causal is None else causal,
        dropout=config.dropout if dropout is None else dropout,
        max_seq_len=config.max_seq_len if max_seq_len is None else max_seq_len,
    )


def _tied_tensors(weights: Mapping[str, Any]) -> list[Tensor]:
    """Return those of the input embedding and the output projection that are stored."""
    named = {translate_name(str(name)): value for name, value in weights.items()}
    return [named[name] for name in TIED_NAMES if is_dense_float(named.get(name))]


def _vocab_size(weights: Mapping[str, Any]) -> int | None:
    """Return the number of rows of the embedding; None if there is none."""
    return next((len(tensor) for tensor in _tied_tensors(weights) if tensor.dim() == 2), None)


def is_tied(weights: Mapping[str, Any]) -> bool:
    """Return whether embedding and output are tied in a file whose `model_args` do not say it."""
    # Faithful: the assignment's model ties them whatever its file holds.
    if any(ASSIGNMENT_NAME in str(name) for name in weights):
        return True
    tensors = _tied_tensors(weights)
    if len({tensor.dtype for tensor in tensors}) > 1:  # else compared as stored, without a copy
        tensors = [tensor.float() for tensor in tensors]
    return len(tensors) < 2 or torch.equal(*tensors)


def parse_weights(
    checkpoint: Mapping[str, Any], path: str | Path, tie_embeddings: bool = True
) -> dict[str, Tensor]:
    """Return the weights of a checkpoint in float32, under this project's names.

    Args:
        checkpoint, path: as in `parse_config`.
        tie_embeddings: whether input embedding and output projection become one tensor.

    Raises:
        ValueError: an entry is not a tensor of floating-point numbers, or two entries translate to
            the same name.
    """
    weights: dict[str, Tensor] = {}
    for stored_name, tensor in checkpoint["model"].items():
        if not isinstance(stored_name, str):
            raise ValueError(
                f"{path}: a weight's name is {reprlib.repr(stored_name)}, expected a string"
            )
        name = translate_name(stored_name)
        if COMPUTED.search(name):
            continue
        if not is_dense_float(tensor):
            raise ValueError(f"{path}: {stored_name} is not a tensor of floating-point numbers")
        if name in weights:
            raise ValueError(f"{path}: two tensors are named {name}")
        weights[name] = tensor
    state_dict = {name: tensor.float() for name, tensor in weights.items()}
    if tie_embeddings:
        _tie(state_dict, path)
    return state_dict


def is_dense_float(tensor: object) -> bool:
    """Return whether a value is a dense floating-point tensor that holds data."""
    return is_dense(tensor, STORED_DTYPES)


def is_dense(tensor: object, dtypes: Sequence[torch.dtype]) -> bool:
    """Return whether a value is a dense tensor of one of these dtypes that holds data."""
    return (
        isinstance(tensor, Tensor)
        and tensor.dtype in dtypes
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"  # a meta tensor has a shape but no data
        and not tensor.is_nested
    )


def _tie(state_dict: dict[str, Tensor], path: str | Path) -> None:
    """Make both names of the tied matrix refer to one tensor, even if the file has only one."""
    tied = [state_dict[name] for name in TIED_NAMES if name in state_dict]
    if len(tied) == 2 and not torch.equal(*tied):
        # Faithful: the assignment loads both into one shared matrix, so the last one stays.
        logger.warning("%s: %s and %s differ; %s is used", path, *TIED_NAMES, TIED_NAMES[-1])
    if tied:
        state_dict.update(dict.fromkeys(TIED_NAMES, tied[-1]))


def translate_name(name: str) -> str:
    """Translate a parameter name of llama2.c, of Meta, or of a wrapped model to this project's."""
    parts = WRAPPER_PREFIXES.sub("", name).split(".")  # such as layers.0.attention.wq.weight
    if len(parts) > 2 and parts[-3] == "attention":
        parts[-2] = ATTENTION_NAMES.get(parts[-2], parts[-2])
    return ".".join(parts)


def load_strictly(model: nn.Module, state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Replace the model's parameters by the tensors of `state_dict`, without copying them.

    Raises:
        ValueError: names or shapes do not match exactly, or a tensor holds an infinity or NaN; the
            message names the tensors.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing {_join_first(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"unexpected {_join_first(unexpected)}")
    wrong_shapes = [
        f"{name} is {found[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ]
    if wrong_shapes:
        problems.append(f"wrong shape: {_join_first(wrong_shapes)}")
    if problems:
        raise ValueError(f"{path}: the weights do not fit the model: {'; '.join(problems)}")
    for name, tensor in state_dict.items():
        if not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{path}: {name} holds a number that is NaN or infinite")
    model.load_state_dict(state_dict, assign=True)


def _join_first(names: list[str], limit: int = 4) -> str:
    """Join the first names with commas, and count the rest."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _refused_objects(path: Path) -> list[str]:
    """Return the names of the classes and functions in a file that PyTorch refuses to load."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # of many kinds, for a file that is also damaged or of the old format
        return []


def _describe(path: Path) -> str:
    """Return the size of a file that is not a checkpoint, and its kind if that is recognized."""
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    size = f"{path.stat().st_size:,} bytes"
    if head.startswith((b"<!doctype html", b"<html")):
        return f"{size}, an HTML page; perhaps an error page was saved instead of the file"
    if head.startswith(b"pk\x03\x04"):
        with suppress(
            zipfile.BadZipFile
        ):  # which is_zipfile raises for an archive of several disks
            if not zipfile.is_zipfile(path):
                return f"{size}, the end of the archive is missing; a truncated download?"
    return size
