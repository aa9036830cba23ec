"""Two dialects of the assignment: make a student's modules with our sizes, weights and mode.

The course's: `FeedForward(dim, hidden_dim, multiple_of, dropout)`, and
`compute_query_key_value_scores` is given keys and values that are repeated for all heads. Ours:
`FeedForward(config)`, and keys and values as they are. The other classes take the same arguments.

What a module calls is replaced by our own modules, whatever else the student hands to them, so
that an error in one part is not found in another.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import ModuleType
from typing import Any

from torch import Tensor, nn

import llama
import rope
from base_llama import ATTENTION_NAMES
from beyond.classroom.part import AdaptError
from beyond.classroom.student import Student, StudentError
from config import LlamaConfig

OTHER_NAMES = {ours: other for other, ours in ATTENTION_NAMES.items()}  # compute_query -> wq, ...


def find(student: Student, module: str, *names: str) -> Any:
    """Return the first of some names that a student's module defines.

    If the folder's `rope.py` cannot be imported, or lacks what the others import, ours takes its
    place in them.

    Raises:
        AdaptError: it defines none of them.
    """
    if module in ("llama", "classifier"):
        try:
            is_usable = hasattr(student.module("rope"), "apply_rotary_emb")
        except StudentError:
            is_usable = False
        if not is_usable:
            student.stand_in("rope", rope)
    found = student.module(module)
    for name in names:
        if hasattr(found, name):
            return getattr(found, name)
    raise AdaptError(f"{module}.py defines no {' or '.join(names)}")


def accepted(function: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return those of `values` whose names are parameters of `function`."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return values
    return {name: value for name, value in values.items() if name in parameters}


def is_course_style(student: Student) -> bool:
    """Return whether FeedForward takes sizes, as in the course, instead of a config."""
    return "hidden_dim" in inspect.signature(find(student, "llama", "FeedForward")).parameters


def make_config(student: Student, config: LlamaConfig) -> Any:
    """Make a student's config of our config's values.

    Of values that the course's config does not have, such as `causal`, only those are given that
    are not our defaults, so that the student's own defaults are examined.
    """
    try:
        theirs = find(student, "llama", "LlamaConfig")
    except AdaptError:
        theirs = find(student, "config", "LlamaConfig")
    values = asdict(config)
    defaults = asdict(LlamaConfig())
    for name in ("rope_theta", "tie_embeddings", "causal"):
        if values[name] == defaults[name]:
            del values[name]
    return theirs(**accepted(theirs, values))


def make_norm(student: Student, ours: llama.RMSNorm) -> nn.Module:
    """Make a student's norm with our gain; in Fall 2025 it was called LayerNorm."""
    cls = find(student, "llama", "RMSNorm", "LayerNorm")
    return with_weights(cls(len(ours.weight), ours.eps), ours)


def make_attention(student: Student, ours: llama.Attention) -> nn.Module:
    """Make a student's attention with our weights; what it calls is still the student's."""
    cls = find(student, "llama", "Attention")
    return with_weights(cls(make_config(student, ours.config)), ours)


def make_feed_forward(student: Student, ours: llama.FeedForward, config: LlamaConfig) -> nn.Module:
    """Make a student's feed-forward network with our weights."""
    cls = find(student, "llama", "FeedForward")
    if is_course_style(student):
        names = ("dim", "hidden_dim", "multiple_of", "dropout")
        sizes = {name: getattr(config, name) for name in names}
        return with_weights(cls(**accepted(cls, sizes)), ours)
    return with_weights(cls(make_config(student, config)), ours)


def make_layer(student: Student, ours: llama.LlamaLayer, config: LlamaConfig) -> nn.Module:
    """Make a student's layer with our weights, and with our modules inside."""
    cls = find(student, "llama", "LlamaLayer")
    layer = with_weights(cls(ours.layer_id, make_config(student, config)), ours)
    for name in ("attention", "feed_forward", "attention_norm", "ffn_norm"):
        replace_forward(submodule(layer, name), submodule(ours, name))
    vars(layer)["forward"] = with_nones(layer.forward, 1)
    return layer


def make_model(student: Student, ours: llama.Llama) -> nn.Module:
    """Make a student's model with our weights, and with our layers and our final norm inside."""
    cls = find(student, "llama", "Llama")
    model = with_weights(cls(make_config(student, ours.config)), ours)
    layers = submodule(model, "layers")
    if len(list(layers.children())) != len(ours.layers):
        raise AdaptError(f"Llama has {len(list(layers.children()))} layers, not {len(ours.layers)}")
    for theirs, layer in zip(layers.children(), ours.layers, strict=True):
        replace_forward(theirs, layer)
    replace_forward(submodule(model, "norm"), ours.norm)
    return model


def with_weights(theirs: nn.Module, ours: nn.Module) -> nn.Module:
    """Copy our parameters into a student's module, under the names it has, and our mode.

    Parameters that only the student's module has keep their values.

    Raises:
        AdaptError: the student's module lacks a parameter, or it has another shape.
    """
    known = theirs.state_dict()
    weights = {}
    for name, tensor in ours.state_dict().items():
        *path, parent, last = ["", *name.split(".")]
        other = ".".join([*path, OTHER_NAMES.get(parent, parent), last]).strip(".")
        found = name if name in known or other not in known else other
        where = f"{type(theirs).__name__}.{name}"
        if found not in known:
            raise AdaptError(f"there is no parameter {where}")
        if known[found].shape != tensor.shape:
            shapes = f"{tuple(known[found].shape)}, expected {tuple(tensor.shape)}"
            raise AdaptError(f"the parameter {where} has shape {shapes}")
        weights[found] = tensor
    theirs.load_state_dict(weights, strict=False)
    return theirs.train(ours.training)


def with_nones(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Let a function be called with `count` arguments: others that it requires become None."""
    required = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]

    def call(*args: Any, **options: Any) -> Any:
        missing = required[max(count, len(args)) :]
        return function(*args, **{name: None for name in missing if name not in options}, **options)

    return call


def refuse_unwritten(function: object, x: Tensor) -> None:
    """Raise NotImplementedError if a helper of a student's part returns None."""
    if inspect.isroutine(function):
        try:
            result = function(x)
        except Exception:
            return  # the part itself will show it
        if result is None:
            raise NotImplementedError(f"{function.__name__} returns None")


def submodule(module: nn.Module, name: str) -> nn.Module:
    """Return a module's submodule; raises AdaptError if there is none."""
    found = getattr(module, name, None)
    if not isinstance(found, nn.Module):
        raise AdaptError(f"{type(module).__name__} has no submodule {name!r}")
    return found


def replace_forward(module: nn.Module, stand_in: Callable[..., Any]) -> None:
    """Let a module compute stand_in(x), with what it is given first, instead of its own forward."""
    vars(module)["forward"] = lambda x, *_, **__: stand_in(x)


@contextmanager
def replaced(module: ModuleType, original: object, stand_in: object) -> Iterator[None]:
    """Replace every name of a module that stands for `original`, for a while."""
    names = [name for name, value in vars(module).items() if value is original]
    for name in names:
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for name in names:
            setattr(module, name, original)


@contextmanager
def our_rope(student: Student, config: LlamaConfig) -> Iterator[None]:
    """Let a student's modules call our `apply_rotary_emb`, for a while."""
    try:
        original = getattr(student.module("rope"), "apply_rotary_emb", None)
    except StudentError:
        original = None  # ours is there already

    def rotate(query: Tensor, key: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        theta = options.get("theta", args[2] if len(args) > 2 else None)
        theta = theta if isinstance(theta, int | float) else 10000.0
        return rope.apply_rotary_emb(query, key, query.shape[-1], config.max_seq_len, theta)

    if original is None:
        yield
        return
    with (
        replaced(student.module("rope"), original, rotate),
        replaced(student.module("llama"), original, rotate),
    ):
        yield
