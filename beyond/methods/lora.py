"""LoRA: low-rank updates of frozen matrices.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, eq. 3:

    h = W0 x + (alpha / r) B A x

W0 (out, in) is a pretrained matrix and does not change. A (r, in) starts random and B (out, r) at
zero, so the first step starts from the pretrained model. What is evaluated and saved has the merged
matrices W0 + (alpha / r) B A: it is a plain classifier, which can be loaded without this module.

Differs from the paper in:
- A is drawn uniformly from +-1/sqrt(in), as in the authors' code, instead of from a normal
  distribution;
- a new head trains too. The label words' output rows (`--head label_words`) are pretrained, so they
  are frozen as the rest of the backbone is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond.methods.ingredient import Ingredient
from beyond.methods.randomness import make_generator
from beyond.methods.weights import only_trained, replaced
from classifier import LlamaEmbeddingClassifier

# The names of a layer's matrices on the command line -> in the model.
PATHS = {
    **{name: f"attention.compute_{name}" for name in ("query", "key", "value", "output")},
    **{name: f"feed_forward.{name}" for name in ("w1", "w2", "w3")},
}


class LowRankUpdate(nn.Module):
    """The update of one matrix: (alpha / r) B A x.

    Args:
        linear: has the matrix W0; its output gets the update added.
        rank: r, at least 1.
        alpha: the update is scaled by alpha / r.
        generator: source of the random numbers of A.
    """

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        bound = linear.in_features**-0.5
        nn.init.uniform_(self.a, -bound, bound, generator=generator)
        self.scale = alpha / rank
        self.is_merged = False
        # A hook, since a new module around the matrix would change the names in the checkpoint.
        linear.register_forward_hook(self.add_to)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the update's share of the output, (..., out), for x (..., in)."""
        return F.linear(self.scale * F.linear(x, self.a), self.b)  # A x is the smallest tensor

    def add_to(self, linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the output of the matrix with the update, unless the matrix already has it."""
        return output if self.is_merged else output + self(*inputs)

    @torch.no_grad()
    def merge(self, weight: Tensor) -> Tensor:
        """Return W0 + (alpha / r) B A, (out, in), for the matrix W0."""
        # In float64, since the products of float32 may be set to the less exact TF32.
        return (weight.double() + self.scale * (self.b.double() @ self.a.double())).to(weight.dtype)


class Lora(Ingredient):
    """Trains low-rank updates of matrices, and a new head, instead of the backbone's weights.

    Args:
        classifier: its backbone is frozen here, and gets the updates.
        rank: r, from 1 to the smaller side of each matrix.
        alpha: the updates are scaled by alpha / r.
        matrices: which of each layer get an update, by names of `PATHS`.
        seed: of the random numbers of A, which come from a generator of their own.

    Raises:
        ValueError: the rank is above a matrix.
    """

    def __init__(
        self,
        classifier: LlamaEmbeddingClassifier,
        rank: int,
        alpha: float,
        matrices: Sequence[str],
        seed: int,
    ) -> None:
        super().__init__()
        generator = make_generator(torch.device("cpu"), "LoRA", seed)
        linears = []
        for i, layer in enumerate(classifier.llama.layers):
            for name in matrices:
                linear = layer.get_submodule(PATHS[name])
                assert isinstance(linear, nn.Linear)
                check_rank(rank, linear, f"layers.{i}.{PATHS[name]}")
                linears.append(linear)
        self.weights = tuple(linear.weight for linear in linears)  # W0; a tuple is not saved
        self.updates = nn.ModuleList(
            LowRankUpdate(linear, rank, alpha, generator) for linear in linears
        )
        classifier.llama.requires_grad_(False)

    def parameter_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the groups with A and B instead of the backbone."""
        first, *others = only_trained(groups)
        return [{**first, "params": [*first["params"], *self.parameters()]}, *others]

    @contextmanager
    def kept_weights(self) -> Iterator[None]:
        """Merge the updates into the matrices, in the block."""
        updates = [update for update in self.updates if isinstance(update, LowRankUpdate)]
        merged = [u.merge(weight) for u, weight in zip(updates, self.weights, strict=True)]
        with replaced(self.weights, merged):
            self._set_merged(True)
            try:
                yield
            finally:
                self._set_merged(False)

    def _set_merged(self, is_merged: bool) -> None:
        for update in self.updates:
            update.is_merged = is_merged  # type: ignore[assignment]


def check_rank(rank: int, linear: nn.Linear, name: str) -> None:
    """Raise ValueError if the rank is above the smaller side of a matrix."""
    rows, columns = linear.weight.shape
    if rank > min(rows, columns):
        raise ValueError(
            f"--lora_rank {rank}: {name} is {rows} x {columns}; choose a rank of at most "
            f"{min(rows, columns)}, or other --lora_matrices"
        )
