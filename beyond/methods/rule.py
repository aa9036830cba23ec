"""Apply a recipe's rule: compute values of its flags from the checkpoint and the data."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from beyond.formats.load import load_llama, load_tokenizer
from beyond.methods.label_words import PromptTokenizer, problem_of_words
from beyond.methods.pooling import cut_layers
from beyond.methods.randomness import preserve_random_state
from beyond.methods.recipes import TOLERATED, epochs, layer_decay, learning_rate
from beyond.options import FinetuneOptions
from config import LlamaConfig
from llama import Llama
from utils import parse_example, read_label_names, read_lines

BuildPrompt = Callable[[Sequence[str]], str]  # from the label words
SENTENCES, TOKENS = 16, 32  # by which the rule judges dropout: how many, and of each at most


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
    left = options.left_to_rule
    values = values_by_model(options, build_prompt, say)
    head, dropout = (values.get(name, getattr(options, name)) for name in ("head", "dropout"))
    if "hidden_dropout_prob" in left and "dropout" in values and head == "label_words":
        values["hidden_dropout_prob"] = 0.0
    if "r_drop" in left and not dropout:
        values["r_drop"] = 0.0  # it was only tried together with dropout in the layers
    if "epochs" in left:
        values["epochs"] = epochs(Path(options.train).stat().st_size, bool(dropout))
    options = replace(options, left_to_rule=(), **values)
    say(f"recipe {options.recipe}: {shlex.join(options.recipe_flags)}")
    return options


def values_by_model(
    options: FinetuneOptions, build_prompt: BuildPrompt, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return those values that the rule takes from the model, which is read only if they need it.

    `head` and `dropout` are among them only if the recipe's own cannot be used. The arguments and
    the errors are those of `apply_rule`.
    """
    left = options.left_to_rule
    rates = {"lr", "layer_decay"}.intersection(left)
    if options.layer_decay == 1:  # other flags exclude it
        rates.discard("layer_decay")
    may_ask = "head" in left and options.head == "label_words"
    if not rates and not may_ask and "dropout" not in left:
        return {}
    # The parameters are counted in the model and not in the file, whose size depends on the dtype,
    # and which may hold a matrix twice.
    llama = load_llama(str(options.pretrained_model_path), options.causal, options.dropout)
    if options.pool_layer is not None:
        cut_layers(llama, options.pool_layer)
    parameters = sum(p.numel() for p in llama.parameters())
    found = {"lr": learning_rate(parameters), "layer_decay": layer_decay(llama.config.n_layers)}
    values: dict[str, Any] = {name: found[name] for name in rates}
    if may_ask and (problem := problem_of_asking(options, build_prompt, llama.config)):
        if options.wise_ft != 1:
            raise ValueError(
                f"--wise_ft {options.wise_ft}: needs --head label_words, but {problem}; leave "
                "--wise_ft out"
            )
        say(f"recipe {options.recipe}: --head linear, since {problem}")
        values["head"] = "linear"
    if "dropout" in left and (change := change_by_dropout(llama, options)) > TOLERATED:
        say(
            f"recipe {options.recipe}: no dropout, since it would change the model's predictions "
            f"by {change:.1f} nats per token"
        )
        values["dropout"] = 0.0
    return values


@torch.no_grad()
def change_by_dropout(llama: Llama, options: FinetuneOptions) -> float:
    """Return how much dropout changes what a pretrained model predicts, in nats per token.

    It is the mean of KL(p || q) over the next tokens of the first training sentences, with p the
    model's probabilities without dropout and q those with it. A model that dropout changes much
    cannot be fine-tuned with it: it loses what it has learned.

    Args:
        llama: with the dropout in question; in eval mode at the end.
        options: of the run.
    """
    tokenizer = load_tokenizer(options.max_sentence_len, options.tokenizer_path)
    if not tokenizer.fits(llama.config.vocab_size):
        return 0.0  # the run will say so
    lines = enumerate(read_lines(options.train)[:SENTENCES], start=1)
    texts = [parse_example(line, options.train, number)[1] for number, line in lines]
    total, count = 0.0, 0
    with preserve_random_state():
        torch.manual_seed(0)
        for tokens in tokenizer.encode_batch(texts, bos=True, eos=False):
            row = torch.tensor([tokens[: min(TOKENS, llama.config.max_seq_len)]])
            p, q = (
                llama.train(mode)(row, targets=row)[0].log_softmax(dim=-1) for mode in (False, True)
            )
            total += F.kl_div(q, p, reduction="sum", log_target=True).item()
            count += row.numel()
    llama.eval()
    return total / max(count, 1)


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
