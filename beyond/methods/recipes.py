"""Recipes: named sets of flags for `--option finetune`, and the rule for rate and epochs.

`--recipe better` stands for the flags below. A flag that is given too is used instead. What works
best depends on the model and on the data, so two flags have no fixed value: a rule computes the
learning rate from the number of parameters, and the epochs from the number of training lines.
Neither looks at dev or test, so the recipe is the same for every checkpoint. The choice is a first
one, made from the papers; how much it helps has not been measured yet.

Like `beyond/options.py`, this module imports neither PyTorch nor NumPy.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# By name: flags by the names of their fields. Between two that contradict each other the first
# one stays, so a flag comes after those that it needs.
RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "better": MappingProxyType(
            {
                "causal": True,
                "pooling": "mean",
                "warmup": 0.06,
                "linear_decay": True,
                "layer_decay": 0.9,
                "ema": 0.99,
            }
        )
    }
)
RULED = ("lr", "epochs")  # the flags that the rule sets

RATE, RATE_PARAMETERS = 1e-4, 3e6  # the rate of a model of this size
LOWEST_RATE, HIGHEST_RATE = 1e-5, 3e-4
MANY_LINES = 5000
EPOCHS_OF_MANY_LINES, EPOCHS_OF_FEW_LINES = 3, 5


def learning_rate(parameters: int) -> float:
    """Return the learning rate for a model: 1e-4 * sqrt(3e6 / parameters), within limits.

    The larger a model is, the more weights change its output in a step, and the smaller each
    weight's change has to be. The rate has two significant digits, so it is easy to give again.

    Args:
        parameters: of the pretrained model; a matrix that is used twice counts once.

    Returns:
        A rate from 1e-5 to 3e-4.
    """
    rate = RATE * math.sqrt(RATE_PARAMETERS / parameters)
    return float(f"{min(max(rate, LOWEST_RATE), HIGHEST_RATE):.1e}")


def epochs(lines: int) -> int:
    """Return the passes over the training data: fewer if they have many lines.

    Args:
        lines: of the training file.
    """
    return EPOCHS_OF_MANY_LINES if lines >= MANY_LINES else EPOCHS_OF_FEW_LINES
