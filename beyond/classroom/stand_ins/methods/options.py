"""The flags of the methods: the starter has none of them, and refuses them by name.

Like `beyond/options.py`, this module imports neither PyTorch nor NumPy.
"""

from collections.abc import Iterable
from typing import ClassVar

# Flags of the project that the starter lacks.
LACKS = (
    *("top_k", "top_p", "quantize"),
    *("no_trailing_space", "calibrate"),
    *("recipe", "pooling", "pool_layer", "head", "label_smoothing"),
    *("warmup", "linear_decay", "layer_decay", "weight_decay", "max_grad_norm", "ema", "patience"),
    *("freeze_backbone", "lora_rank", "lora_alpha", "lora_matrices"),
    *("smart", "bregman", "r_drop", "mixout", "wise_ft"),
)


def refuse_lacking(words: Iterable[str]) -> None:
    """Raise ValueError if a word of a command line is a flag that the starter lacks."""
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and {name, name.removeprefix("no_")} & {*LACKS}:
            raise ValueError(f"the starter lacks --{name}")


class ZeroShotOptions:
    """Options that change how `--option prompt` scores."""

    no_trailing_space: ClassVar[bool] = False
    calibrate: ClassVar[bool] = False


class MethodOptions:
    """Options that change how `--option finetune` trains."""

    recipe: ClassVar[None] = None
    patience: ClassVar[int] = 0

    def check_method(self) -> None:
        """Raise ValueError if two of the options contradict each other; there are none."""
