"""Applying a recipe's rule, once the checkpoint and the data can be read."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from beyond.formats.load import load_llama, load_tokenizer
from beyond.methods.label_words import problem_of_words
from beyond.methods.recipes import epochs, layer_decay, learning_rate
from beyond.options import FinetuneOptions
from utils import read_label_names

PROMPT_END = " is "  # what stands before a label word; no token spans the space between them


def apply_rule(options: FinetuneOptions) -> FinetuneOptions:
    """Set what the flags leave to the recipe's rule, and print all flags of the recipe.

    Returns:
        The options to run with; the same ones without a recipe.

    Raises:
        FileNotFoundError, ValueError: the checkpoint or the training file cannot be used.
    """
    if options.recipe is None:
        return options
    head, options = options.head, resolve_rule(options)
    if options.head != head:
        problem = problem_of_label_words(options)
        print(f"recipe {options.recipe}: --head {options.head}, since {problem}")
    print(f"recipe {options.recipe}: {shlex.join(options.recipe_flags)}")
    return options


def resolve_rule(options: FinetuneOptions) -> FinetuneOptions:
    """Return options with what the recipe's rule sets; the errors as above."""
    values: dict[str, Any] = {}
    if "head" in options.left_to_rule and options.head == "label_words":
        if problem_of_label_words(options):
            values["head"] = "linear"
    rates = {"lr", "layer_decay"}.intersection(options.left_to_rule)
    if options.layer_decay == 1:  # other flags exclude it
        rates.discard("layer_decay")
    if rates:
        # The parameters are counted in the model and not in the file, whose size depends on the
        # dtype, and which may hold a matrix twice.
        llama = load_llama(str(options.pretrained_model_path))
        parameters = sum(p.numel() for p in llama.parameters())
        found = {"lr": learning_rate(parameters), "layer_decay": layer_decay(llama.config.n_layers)}
        values |= {name: found[name] for name in rates}
    if "epochs" in options.left_to_rule:
        values["epochs"] = epochs(Path(options.train).stat().st_size)
    return replace(options, left_to_rule=(), **values)


def problem_of_label_words(options: FinetuneOptions) -> str:
    """Return why the label words cannot be the head; "" if they can."""
    names = read_label_names(options.label_names)
    tokenizer = load_tokenizer(options.max_sentence_len, options.tokenizer_path)
    tokens = [tokenizer.label_tokens(name, PROMPT_END) for name in names]
    return problem_of_words(names, tokens, tokenizer)
