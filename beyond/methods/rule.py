"""Apply a recipe's rule: compute values of its flags from the checkpoint and the data."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from beyond.formats.load import load_llama, load_tokenizer
from beyond.methods.label_words import PromptTokenizer, problem_of_words
from beyond.methods.pooling import cut_layers
from beyond.methods.recipes import epochs, layer_decay, learning_rate
from beyond.options import FinetuneOptions
from config import LlamaConfig
from utils import parse_example, read_label_names, read_lines

BuildPrompt = Callable[[Sequence[str]], str]  # from the label words


def apply_rule(
    options: FinetuneOptions, build_prompt: BuildPrompt, say: Callable[[str], None] = print
) -> FinetuneOptions:
    """Fill in the values that the recipe's rule decides, and say all flags of the recipe.

    Args:
        options: of a run.
        build_prompt: returns the zero-shot prompt.
        say: gets a line for the user.

    Returns:
        The options to run with; the same ones without a recipe.

    Raises:
        FileNotFoundError, ValueError: the checkpoint or a data file cannot be used.
    """
    if options.recipe is None:
        return options
    for split, path in options.data_files.items():
        if Path(path).is_fifo():
            raise ValueError(f"--{split} {path}: --recipe reads it twice; give a file, not a pipe")
    values: dict[str, Any] = {}
    rates = {"lr", "layer_decay"}.intersection(options.left_to_rule)
    if options.layer_decay == 1:  # other flags exclude it
        rates.discard("layer_decay")
    may_ask = "head" in options.left_to_rule and options.head == "label_words"
    if rates or may_ask:
        # The parameters are counted in the model and not in the file, whose size depends on the
        # dtype, and which may hold a matrix twice.
        llama = load_llama(str(options.pretrained_model_path))
        if options.pool_layer is not None:
            cut_layers(llama, options.pool_layer)
        parameters = sum(p.numel() for p in llama.parameters())
        found = {"lr": learning_rate(parameters), "layer_decay": layer_decay(llama.config.n_layers)}
        values |= {name: found[name] for name in rates}
        if may_ask and (problem := problem_of_asking(options, build_prompt, llama.config)):
            if options.wise_ft != 1:
                raise ValueError(
                    f"--wise_ft {options.wise_ft}: needs --head label_words, but {problem}; leave "
                    "--wise_ft out"
                )
            say(f"recipe {options.recipe}: --head linear, since {problem}")
            values["head"] = "linear"
    if "epochs" in options.left_to_rule:
        values["epochs"] = epochs(Path(options.train).stat().st_size)
    options = replace(options, left_to_rule=(), **values)
    say(f"recipe {options.recipe}: {shlex.join(options.recipe_flags)}")
    return options


def problem_of_asking(
    options: FinetuneOptions, build_prompt: BuildPrompt, config: LlamaConfig
) -> str:
    """Return why the model cannot be asked for a label word after each sentence; "" if it can.

    A label word may be several tokens, or sentence and prompt together longer than the context. Of
    dev and test only these lengths are looked at, so that no run ends in an error because of them.
    """
    names = read_label_names(options.label_names)
    tokenizer = load_tokenizer(options.max_sentence_len, options.tokenizer_path)
    prompt = build_prompt(names).rstrip(" ")
    tokens = [tokenizer.label_tokens(name, f"{prompt} ") for name in names]
    if problem := problem_of_words(names, tokens, tokenizer):
        return problem
    # A token is at least one byte in nearly all tokenizers, so most sentences need no tokenizing.
    most_bytes = config.max_seq_len - len(prompt.encode()) - 2  # BOS, and a space that may be added
    for path in options.data_files.values():
        lines = enumerate(read_lines(path), start=1)
        texts = {number: parse_example(line, path, number)[1] for number, line in lines}
        long = {number: text for number, text in texts.items() if len(text.encode()) > most_bytes}
        asked = PromptTokenizer(tokenizer, prompt).encode_batch(list(long.values()), True, False)
        for number, row in zip(long, asked, strict=True):
            if len(row) > config.max_seq_len:
                return (
                    f"{path}:{number}: with the prompt it has {len(row)} tokens, more than the "
                    f"model's {config.max_seq_len}"
                )
    return ""
