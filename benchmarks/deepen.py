"""Make a model deeper without changing what it computes, as a start for further pretraining.

    uv run python -m benchmarks.deepen MODEL N_LAYERS TARGET

The new layers stand behind the old ones, evenly spread, and are copies of them. Only the two
matrices that write to the residual stream, compute_output and w2, are zero: so each new layer adds
zero at first, and learns from there (Wu et al. 2024, "LLaMA Pro: Progressive LLaMA with Block
Expansion", section 3.2).
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from beyond.formats.load import load_llama
from beyond.program import exit_status
from llama import Llama
from utils import OneLineParser, at_least_one, prepare_output

PROGRAM = "python -m benchmarks.deepen"


def deepen(llama: Llama, n_layers: int) -> Llama:
    """Return a model of `n_layers` layers that gives the same logits.

    Raises:
        ValueError: the model has as many layers already, or more.
    """
    n_old = llama.config.n_layers
    if n_layers <= n_old:
        raise ValueError(f"expected more than the model's {n_old} layers, found {n_layers}")
    deeper = Llama(replace(llama.config, n_layers=n_layers))
    weights = {k: v for k, v in llama.state_dict().items() if not k.startswith("layers.")}
    deeper.load_state_dict(weights, strict=False)
    previous = -1
    for new, layer in enumerate(deeper.layers):
        old = ((new + 1) * n_old - 1) // n_layers
        layer.load_state_dict(llama.layers[old].state_dict())
        if old == previous:
            nn.init.zeros_(layer.attention.compute_output.weight)
            nn.init.zeros_(layer.feed_forward.w2.weight)
        previous = old
    return deeper.eval()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(PROGRAM, lambda: run(argv), "nothing is written")


def run(argv: Sequence[str] | None) -> int:
    """Read the command line, and write the deeper model."""
    parser = OneLineParser(prog=PROGRAM, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="a checkpoint")
    parser.add_argument("n_layers", metavar="N_LAYERS", type=at_least_one, help="of the new model")
    parser.add_argument("target", metavar="TARGET", help="the new checkpoint, a .pt file")
    args = parser.parse_args(argv)
    deeper = deepen(load_llama(args.model), args.n_layers)
    prepare_output(args.target)
    deeper.save_pretrained(args.target)
    print(f"{args.target}: {sum(p.numel() for p in deeper.parameters()):,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
