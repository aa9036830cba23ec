"""Make a model deeper without changing what it computes, as a start for further pretraining.

    uv run python -m benchmarks.deepen MODEL N_LAYERS TARGET

Each new layer is a copy of an old one and follows it directly; the new layers are evenly spread.
In a new layer the two matrices that write to the residual stream, compute_output and w2, are zero,
so it adds nothing at first, and learns from there (Wu et al. 2024, "LLaMA Pro: Progressive LLaMA
with Block Expansion", section 3.2).
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from beyond.formats.load import load_llama
from beyond.program import exit_status
from llama import Llama
from utils import OneLineParser, at_least_one, prepare_output

PROGRAM = "python -m benchmarks.deepen"
RESIDUAL = ("attention.compute_output.weight", "feed_forward.w2.weight")


def deepen(llama: Llama, n_layers: int) -> Llama:
    """Return a model of `n_layers` layers that gives the same logits.

    Raises:
        ValueError: the model has as many layers already, or more.
    """
    n_old = llama.config.n_layers
    if n_layers <= n_old:
        raise ValueError(f"expected more than the model's {n_old} layers, found {n_layers}")
    weights = {k: v for k, v in llama.state_dict().items() if not k.startswith("layers.")}
    previous = -1
    for new in range(n_layers):
        old = ((new + 1) * n_old - 1) // n_layers
        for name, weight in llama.layers[old].state_dict().items():
            is_zero = old == previous and name in RESIDUAL
            weights[f"layers.{new}.{name}"] = torch.zeros_like(weight) if is_zero else weight
        previous = old
    deeper = Llama(replace(llama.config, n_layers=n_layers))
    deeper.load_state_dict(weights)
    return deeper.eval()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(PROGRAM, lambda: run(argv), "nothing is written")


def run(argv: Sequence[str] | None) -> int:
    """Read the command line, and write the deeper model."""
    parser = OneLineParser(prog=PROGRAM, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="a checkpoint")
    parser.add_argument(
        "n_layers", metavar="N_LAYERS", type=at_least_one, help="number of layers of the new model"
    )
    parser.add_argument("target", metavar="TARGET", help="the new checkpoint, a .pt file")
    args = parser.parse_args(argv)
    if Path(args.target).resolve() == Path(args.model).resolve():
        raise ValueError(f"{args.target}: is the model itself; choose another name")
    prepare_output(args.target)
    deeper = deepen(load_llama(args.model), args.n_layers)
    deeper.save_pretrained(args.target)
    print(f"{args.target}: {sum(p.numel() for p in deeper.parameters()):,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
