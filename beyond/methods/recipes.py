"""Recipes: named sets of flags for `--option finetune`, and the rule for some of their values.

`--recipe better` is shorthand for the flags below. A flag on the command line overrides it. What
works best depends on the model and on the data, so a rule sets some of them:

- the learning rate by the number of parameters, and its decay from layer to layer by the number of
  layers;
- no dropout, neither in the layers nor before the label words, and so no R-Drop, if dropout changes
  the pretrained model's predictions too much;
- the epochs by the size of the training file, and fewer without dropout;
- a new head instead of the label words if one of them is not a token of its own, or if a sentence
  and the prompt together exceed the model's context.

Nothing is chosen by hand for a checkpoint. Of dev and test, the rule uses only the sentences'
lengths: without that, a run with one too long sentence among them would end in an error.

The learning rate is for the default of 8 sentences per batch, and for training all weights. Larger
batches mean fewer steps, and low-rank updates (`--lora_rank`) need a higher rate; give `--lr` too
with them.

Like `beyond/options.py`, this module imports neither PyTorch nor NumPy.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# By name: flags by the names of their fields. If a given flag contradicts one of them, that one is
# left out, so a flag comes after those that it needs.
RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "better": MappingProxyType(
            {
                "causal": True,
                "head": "label_words",
                "warmup": 0.06,
                "linear_decay": True,
                "layer_decay": 0.8,  # the rule sets it
                "dropout": 0.1,
                "r_drop": 1.0,
            }
        )
    }
)
# The flags that the rule sets or changes.
RULED = ("head", "layer_decay", "dropout", "hidden_dropout_prob", "r_drop", "lr", "epochs")

RATE, RATE_PARAMETERS = 2e-4, 5.5e6  # the rate of a model of this size
LOWEST_RATE, HIGHEST_RATE = 1e-5, 3e-4
LOWEST_LAYER = 0.25  # its share of the learning rate
# Nats per token by which dropout may change the predictions. On SST and CFIMDB, in causal mode, it
# changes those of the demo's model by .3 to .5 and of stories260K by .7 to .8, but of SmolLM2-135M
# by 3.8 to 6.5, which then learns nothing.
TOLERATED = 1.0
# Bytes of text that a run reads with and without dropout, if that takes from 1 to MOST_EPOCHS
# epochs. Without dropout a model overfits sooner.
BYTES, BYTES_WITHOUT_DROPOUT = 5e6, 3e6
MOST_EPOCHS = 10


def learning_rate(parameters: int) -> float:
    """Return the learning rate for a model: 2e-4 * sqrt(5.5e6 / parameters), within limits.

    The larger a model is, the more weights change its output in a step, and the smaller each
    weight's change has to be. The rate has two significant digits, so it is easy to type.

    Args:
        parameters: of the pretrained model; a matrix that is used twice counts once.

    Returns:
        A rate from 1e-5 to 3e-4.
    """
    rate = RATE * math.sqrt(RATE_PARAMETERS / parameters)
    return float(f"{min(max(rate, LOWEST_RATE), HIGHEST_RATE):.1e}")


def layer_decay(layers: int) -> float:
    """Return the factor from one layer's learning rate to that of the layer below.

    However many layers there are, the lowest one learns at about a quarter of --lr (.19 to .33 with
    up to 80 layers, because of the rounding). The embeddings are one layer further down. If the
    output projection is tied to them, they hold the label words' rows, so these learn at about a
    fifth of --lr (.06 with one layer, .12 with two); in an untied output projection at --lr.

    Args:
        layers: of the pretrained model.

    Returns:
        A factor of two digits, below 1.
    """
    return min(round(LOWEST_LAYER ** (1 / layers), 2), 0.99)


def epochs(size: int, has_dropout: bool) -> int:
    """Return the number of epochs: the larger the training file, the fewer.

    Args:
        size: of the training file in bytes.
        has_dropout: whether the run has dropout inside the layers.

    Returns:
        From 1 to 10.
    """
    total = BYTES if has_dropout else BYTES_WITHOUT_DROPOUT
    return min(max(round(total / max(size, 1)), 1), MOST_EPOCHS)
