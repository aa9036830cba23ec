"""`load_pretrained`: whose values the parameters have, after loading small checkpoints.

Every checkpoint is loaded twice, under two seeds, so that a parameter that was left random is told
from one that is always wrong. One checkpoint has the course's names; one has them with the prefix
`_orig_mod.` of a compiled model, which the course's own loader removes; one has the names of
llama2.c, in which the Hub's `stories42M.pt` is stored. A loader that refuses the third is right.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beyond.classroom.adapters import OTHER_NAMES, find
from beyond.classroom.part import AdaptError, Mistake, Observations, Observed, Part, Variant
from beyond.classroom.parts.probes import fill
from beyond.classroom.student import Student
from config import LlamaConfig
from llama import Llama, load_pretrained

WHERE = "llama.py, load_pretrained"
PREFIX = "_orig_mod."
SIZES = {"dim": 12, "n_layers": 2, "n_heads": 6, "n_kv_heads": 3, "vocab_size": 23}
MODEL_ARGS = {**SIZES, "multiple_of": 8, "max_seq_len": 16}  # the keys of the course's file
GROUPS = ("attention", "feed_forward", "norm", "embeddings")
# Codes of a parameter; those of a group are its lowest.
FROM_FILE, ROUNDED, WRONG, RANDOM = 1.0, 0.75, 0.5, 0.0
AT_START = torch.tensor([RANDOM, RANDOM, WRONG, RANDOM])  # of a new model, whose gains are 1
Load = Callable[[str], nn.Module]


def adapt(student: Student) -> Load:
    """Return the student's loader, with the student's model."""
    load = find(student, "llama", "load_pretrained")

    def load_module(path: str) -> nn.Module:
        model = load(path)
        if model is None:
            raise NotImplementedError("load_pretrained returns None")
        if not isinstance(model, nn.Module):
            raise AdaptError(f"load_pretrained returns {type(model).__name__}, expected a model")
        return model

    return load_module


def group_of(name: str) -> str:
    """Return which of GROUPS a parameter belongs to, by its name in our model."""
    return next((group for group in GROUPS if f".{group}." in name), _other_group(name))


def _other_group(name: str) -> str:
    return "norm" if "norm" in name else "embeddings"


def rename(name: str) -> str:
    """Translate a name of ours and of the course to llama2.c's: wq, wk, wv and wo."""
    parts = name.split(".")
    return ".".join(OTHER_NAMES.get(part, part) for part in parts)


def observe(load: Load) -> Observations:
    """Load each checkpoint under two seeds and compare the parameters with the file's."""
    weights = fill(Llama(LlamaConfig.from_model_args(MODEL_ARGS)), 0.5).state_dict()
    files: dict[str, Callable[[str], str]] = {
        "the course's names": lambda name: name,
        "the prefix _orig_mod.": lambda name: PREFIX + name,
        "the Hub's names (wq, wk, wv, wo)": rename,
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, translate) in enumerate(files.items()):
            path = Path(folder, f"{number}.pt")
            stored = {translate(name): tensor for name, tensor in weights.items()}
            torch.save({"model": stored, "model_args": dict(MODEL_ARGS)}, path)
            models = []
            try:
                for seed in (1, 2):
                    torch.manual_seed(seed)
                    models.append(load(str(path)))
            except Exception:
                if number == 0:
                    raise
                # A refusal is loud. The course's loader knows the prefix, but not the Hub's names.
                codes = AT_START if number == 1 else torch.full((len(GROUPS),), FROM_FILE)
            else:
                codes = describe(models[0], models[1], weights)
            found[f"attention, feed-forward, norms, embeddings of a file with {kind}"] = codes
            if number == 0:
                found["embeddings are tied"] = torch.tensor(is_tied(models[0]))
    return {name: Observed(value, 1e-3) for name, value in found.items()}


def describe(first: nn.Module, second: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
    """Return a code for each of GROUPS: whose values its parameters have."""
    loaded = [
        {name: tensor.detach().cpu().float() for name, tensor in model.state_dict().items()}
        for model in (first, second)
    ]
    codes = dict.fromkeys(GROUPS, FROM_FILE)
    for name, expected in weights.items():
        group = group_of(name)
        codes[group] = min(codes[group], judge_parameter(name, expected, loaded[0], loaded[1]))
    return torch.tensor([codes[group] for group in GROUPS])


def judge_parameter(
    name: str, expected: Tensor, first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> float:
    """Return the code of one parameter of a file.

    In a model with names of its own, any parameter with the file's values counts.
    """
    alike = [other for other, tensor in first.items() if tensor.shape == expected.shape]
    candidates = [name] if name in alike else alike
    differences = [float((first[other] - expected).abs().max()) for other in candidates]
    if min(differences, default=1.0) < 1e-6:
        return FROM_FILE
    if min(differences, default=1.0) < 0.02:  # of bfloat16; the weights are below 2
        return ROUNDED
    is_random = any(
        other in second and not torch.equal(first[other], second[other]) for other in candidates
    )
    return RANDOM if is_random else WRONG


def is_tied(model: nn.Module) -> bool:
    """Say whether input embedding and output projection are one parameter, by their usual names."""
    names = ("tok_embeddings.weight", "output.weight")
    weights = dict(model.named_parameters(remove_duplicate=False))
    tied = [weights[name] for name in names if name in weights]
    return len(tied) < 2 or tied[0] is tied[1]


def load_like_the_course(
    path: str,
    translate: Callable[[str], str] = lambda name: name,
    prefix: str = PREFIX,
    tie: bool = True,
) -> nn.Module:
    """Load what fits and say nothing of the rest, as the course's loader does.

    Args:
        path: of the checkpoint.
        translate: from a name in the file, without `prefix`, to one of the model.
        prefix: removed from the names.
        tie: whether embedding and output share one matrix.
    """
    checkpoint: Any = torch.load(path, weights_only=True)
    model = Llama(LlamaConfig(**checkpoint["model_args"], tie_embeddings=tie))
    weights = {
        translate(name.removeprefix(prefix)): tensor for name, tensor in checkpoint["model"].items()
    }
    model.load_state_dict(weights, strict=False)
    return model


def _translate_hub(name: str) -> str:
    ours = {other: name for name, other in OTHER_NAMES.items()}
    return ".".join(ours.get(part, part) for part in name.split("."))


def _exchange(name: str) -> str:
    """Translate the Hub's names, but take the keys for values."""
    swapped = {"wk": "wv", "wv": "wk"}
    return _translate_hub(".".join(swapped.get(part, part) for part in name.split(".")))


def _lose(*groups: str) -> Callable[[str], str]:
    """Return a translation that knows no name of these groups."""
    return lambda name: f"lost.{name}" if group_of(name) in groups else _translate_hub(name)


def _entry(
    name: str, why: str, seen: str = "", is_note: bool = False, where: str = WHERE, **options: Any
) -> Variant:
    def load(path: str) -> nn.Module:
        return load_like_the_course(path, **{"translate": _translate_hub, **options})

    return Variant(Mistake(name, where, why, seen, is_note=is_note), load)


STRICT = "load_state_dict(..., strict=False) says nothing; use strict=True."

VARIANTS = (
    _entry(
        "the Hub's names are not known",
        "Right, but only for the course's file.",
        "Yousefbahr, ArinaOwl, dbashkirov, ggrantrichards",
        is_note=True,
        where="llama.py",  # so that the remark fits in a line: right solutions have it too
        translate=lambda name: name,
    ),
    _entry(
        "only the Hub's names are known",
        "The attention's matrices of the course's own file, compute_query and so on, are left "
        f"random. {STRICT}",
        translate=lambda name: f"lost.{name}" if ".compute_" in name else _translate_hub(name),
    ),
    _entry(
        "attention left random",
        "No matrix of the attention is loaded, so the text is gibberish, and fine-tuning gets "
        f"0.33 to 0.36 on SST instead of 0.41. Compare the names with the file's. {STRICT}",
        translate=_lose("attention"),
    ),
    _entry(
        "feed-forward networks left random",
        f"No matrix of the feed-forward networks is loaded. Compare the names with the file's. "
        f"{STRICT}",
        translate=_lose("feed_forward"),
    ),
    _entry(
        "gains of the norms left at 1",
        f"The weights of the norms are not loaded. Compare the names with the file's. {STRICT}",
        translate=_lose("norm"),
    ),
    _entry(
        "embeddings left random",
        "Neither tok_embeddings nor output is loaded. Compare the names with the file's. " + STRICT,
        translate=_lose("embeddings"),
    ),
    _entry(
        "the whole model left random",
        "Nothing of the file is loaded. The weights are in checkpoint['model']. " + STRICT,
        translate=_lose(*GROUPS),
    ),
    _entry(
        "prefix _orig_mod. not removed",
        "A compiled model's file has this prefix in its names, so nothing of it is loaded. Remove "
        "it, as the course's loader does.",
        prefix="",
    ),
    _entry(
        "embeddings not tied",
        "Input embedding and output projection are two parameters with the same values, so they "
        "part in training, and the model is larger. Assign tok_embeddings.weight = output.weight.",
        where="llama.py, Llama.__init__",
        tie=False,
    ),
    _entry(
        "keys and values exchanged",
        "The file's wk becomes compute_value and its wv compute_key. The shapes are the same, so "
        "nothing complains.",
        translate=_exchange,
    ),
    Variant(
        Mistake(
            "weights in half precision",
            WHERE,
            "The parameters are bfloat16 or float16, or were; sanity_check.py needs float32.",
        ),
        lambda path: load_like_the_course(path, _translate_hub).bfloat16(),
    ),
)

PART = Part("loading", WHERE, load_pretrained, VARIANTS, observe, adapt)
