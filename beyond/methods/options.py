"""The flags of the methods.

`FinetuneOptions` inherits `MethodOptions`, and `PromptOptions` inherits `ZeroShotOptions`.

Like `beyond/options.py`, this module imports neither PyTorch nor NumPy.
"""

import argparse
from dataclasses import dataclass

from beyond.flags import (
    dropout_probability,
    flag,
    non_negative,
    non_negative_int,
    number,
    positive_fraction,
    switch,
)
from beyond.methods.recipes import RECIPES
from utils import at_least_one

POOLINGS = ("last", "mean", "max", "attention", "before_stop")
HEADS = ("linear", "label_words")
# The matrices of a layer, by their names in a checkpoint.
MATRICES = ("query", "key", "value", "output", "w1", "w2", "w3")


def fraction(text: str) -> float:
    """Convert an argument to a number from 0 to 1."""
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 1]")
    return value


def matrix_list(text: str) -> tuple[str, ...]:
    """Convert an argument such as query,value to names of a layer's matrices."""
    names = tuple(text.split(","))
    if len(set(names)) < len(names) or not set(names) <= set(MATRICES):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of different matrices among {', '.join(MATRICES)}"
        )
    return names


@dataclass(frozen=True, kw_only=True)
class ZeroShotOptions:
    """Options that change how `--option prompt` scores; each is off by default."""

    no_trailing_space: bool = switch(
        "end the zero-shot prompt without its space; without effect if the tokenizer drops the "
        "space anyway"
    )
    calibrate: bool = switch(
        "divide the label words' probabilities by those that they have for texts without content"
    )


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Options that change how `--option finetune` trains; each is off by default."""

    recipe: str | None = flag(
        "a named set of the flags below, and of --causal, --dropout, --lr and --epochs (see "
        "beyond/methods/recipes.py); flags that are given too override it; also writes the "
        "predictions to ...{dev,test}-advanced-output.txt",
        None,
        choices=tuple(RECIPES),
    )
    pooling: str = flag(
        "what represents a sentence: its last token (in reference mode the batch's last column); "
        "the mean, the maximum or a learned attention over its own tokens; or the token before "
        "its final stop (. ! or ?)",
        "last",
        choices=POOLINGS,
    )
    pool_layer: int | None = flag(
        "drop the layers above this one before training; the final norm stays (default: keep all)",
        None,
        type=at_least_one,
    )
    head: str = flag(
        "linear: a new linear layer; label_words: ask the zero-shot question after each sentence, "
        "and use the output rows of the label words as the head (prompt-based fine-tuning); they "
        "train too, but not with --lora_rank",
        "linear",
        choices=HEADS,
    )
    label_smoothing: float = flag(
        "give this share of the target probability to all labels equally",
        0.0,
        type=dropout_probability,
    )
    warmup: float = flag(
        "fraction of the steps, at the start, in which the learning rate rises to --lr",
        0.0,
        type=fraction,
    )
    linear_decay: bool = flag(
        "let the learning rate fall linearly, towards 0 after the last step",
        False,
        action=argparse.BooleanOptionalAction,  # so that a recipe's can be switched off
    )
    layer_decay: float = flag(
        "the learning rate of a layer is this number times that of the layer above it; the head "
        "has --lr, unless it is part of the embeddings, which have the lowest; 1: all have --lr",
        1.0,
        type=positive_fraction,
    )
    weight_decay: float = flag(
        "weight decay of all matrices: each step multiplies them by 1 - lr * this number",
        0.0,
        type=non_negative,
    )
    max_grad_norm: float = flag(
        "scale the gradients down if their norm is above this number; 0: never",
        0.0,
        type=non_negative,
    )
    ema: float = flag(
        "evaluate and keep a moving average of the weights with this decay per step, or less in "
        "the first steps; 0: off",
        0.0,
        type=dropout_probability,
    )
    patience: int = flag(
        "stop after this many epochs without a better dev accuracy; 0: never",
        0,
        type=non_negative_int,
    )
    freeze_backbone: bool = switch(
        "train the head only (a linear probe); the frozen backbone uses no dropout"
    )
    lora_rank: int | None = flag(
        "LoRA: freeze the backbone and train low-rank updates of this rank (default: off)",
        None,
        type=at_least_one,
    )
    lora_alpha: float = flag(
        "LoRA: the update is scaled by this number / rank", 16.0, type=non_negative
    )
    lora_matrices: tuple[str, ...] = flag(
        f"LoRA: which matrices of each layer get an update, a list such as query,value from "
        f"{', '.join(MATRICES)}",
        ("query", "value"),
        type=matrix_list,
    )
    smart: float = flag(
        "weight of SMART's penalty on how much a small change of the embeddings changes the "
        "prediction (smoothness-inducing regularisation); 0: off",
        0.0,
        type=non_negative,
    )
    bregman: float = flag(
        "weight of SMART's penalty on how far the prediction is from that of a moving average of "
        "the weights (Bregman proximal point optimization); 0: off",
        0.0,
        type=non_negative,
    )
    r_drop: float = flag(
        "train on two forward passes with different dropout; this is the weight of R-Drop's "
        "penalty on how much their predictions differ; 0: off, one forward pass",
        0.0,
        type=non_negative,
    )
    mixout: float = flag(
        "probability with which a weight of the layers' matrices is replaced by its pretrained "
        "value in a training step; 0: off",
        0.0,
        type=dropout_probability,
    )
    wise_ft: float = flag(
        "keep this share of the fine-tuned weights and the rest of the pretrained ones (WiSE-FT); "
        "needs --head label_words",
        1.0,
        type=fraction,
    )

    def check_method(self) -> None:
        """Raise ValueError if two of the options contradict each other."""
        for name in ("lora_alpha", "lora_matrices"):
            if not self.lora_rank and getattr(self, name) != getattr(MethodOptions, name):
                raise ValueError(f"--{name}: needs --lora_rank")
        adapts = "lora_rank" if self.lora_rank else "freeze_backbone"
        if self.lora_rank and self.freeze_backbone:
            raise ValueError("--lora_rank and --freeze_backbone: choose one of them")
        if self.lora_rank or self.freeze_backbone:
            if self.mixout:
                raise ValueError(
                    f"--mixout and --{adapts}: mixout is for weights that train; leave one out"
                )
            if self.layer_decay != 1:
                raise ValueError(
                    f"--layer_decay and --{adapts}: the layers' own weights do not train; leave "
                    "one out"
                )
        if self.bregman and self.mixout:
            raise ValueError(
                "--bregman and --mixout: the penalty would measure what mixout does in a step; "
                "leave one out"
            )
        if self.wise_ft != 1 and self.lora_rank:
            raise ValueError(
                "--wise_ft and --lora_rank: LoRA freezes the weights that WiSE-FT would mix; leave "
                "one out"
            )
        if self.wise_ft != 1 and self.head != "label_words":
            raise ValueError(
                f"--wise_ft {self.wise_ft}: needs --head label_words, because it mixes with the "
                "zero-shot classifier"
            )
        if self.head == "label_words":
            if self.freeze_backbone:
                raise ValueError("--freeze_backbone: --head label_words has no head of its own")
            if self.pooling != "last" or self.pool_layer is not None:
                raise ValueError(
                    "--head label_words: reads the prompt's last token after all layers; leave "
                    "--pooling and --pool_layer out"
                )
