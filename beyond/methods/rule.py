"""Applying a recipe's rule: rate and epochs, once the checkpoint and the data can be read."""

import shlex
from dataclasses import replace
from typing import Any

from beyond.formats.load import load_llama
from beyond.methods.recipes import epochs, learning_rate
from beyond.options import FinetuneOptions
from utils import read_lines


def apply_rule(options: FinetuneOptions) -> FinetuneOptions:
    """Set what the flags leave to the recipe's rule, and print all flags of the recipe.

    Returns:
        The options to run with; the same ones without a recipe.

    Raises:
        FileNotFoundError, ValueError: the checkpoint or the training file cannot be used.
    """
    if options.recipe is None:
        return options
    options = resolve_rule(options)
    print(f"recipe {options.recipe}: {shlex.join(options.recipe_flags)}")
    return options


def resolve_rule(options: FinetuneOptions) -> FinetuneOptions:
    """Return options with the rate and the epochs of the recipe's rule; the errors as above."""
    values: dict[str, Any] = {}
    if "lr" in options.left_to_rule:
        # The parameters are counted in the model and not in the file, whose size depends on the
        # dtype, and which may hold a matrix twice.
        llama = load_llama(str(options.pretrained_model_path))
        values["lr"] = learning_rate(sum(p.numel() for p in llama.parameters()))
    if "epochs" in options.left_to_rule:
        values["epochs"] = epochs(len(read_lines(options.train)))
    return replace(options, left_to_rule=(), **values)
