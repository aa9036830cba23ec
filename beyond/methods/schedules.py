"""Learning rates by step and by layer, weight decay of matrices, and clipping of gradients.

- Warm-up and linear decay: Devlin et al. 2019, "BERT", arXiv:1810.04805, appendix A.2.
- Layer-wise learning rates: Howard & Ruder 2018, "ULMFiT", arXiv:1801.06146, section 3.2
  (discriminative fine-tuning, rate of layer l-1 = rate of layer l * decay); with embeddings as the
  lowest layer: Clark et al. 2020, "ELECTRA", arXiv:2003.10555, appendix B.
- Weight decay: Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2 (decoupled from the
  gradient), here of matrices only.
- Clipping: Pascanu et al. 2013, arXiv:1211.5063, Algorithm 1.

The rate of a parameter in step s (from 0) of S, with W steps of warm-up, d layers below the head:

    lr * decay^d * (s + 1) / (W + 1)        in the warm-up
    lr * decay^d * (S - s) / (S - W)        after it, with linear decay; else lr * decay^d

The rates depend on the step and the number of steps only, so a resumed run needs no state of them.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from beyond.methods.ingredient import Ingredient
from classifier import LlamaEmbeddingClassifier

Groups = list[dict[str, Any]]


def rate_factor(step: int, total_steps: int, warmup: float, linear_decay: bool) -> float:
    """Return the share of the learning rate that a step uses, in (0, 1].

    It is 1 at the first step after the warm-up. No step has a rate of 0: a warm-up of W steps
    begins with 1 / (W + 1), and a decay of D steps ends with 1 / D.

    Args:
        step: from 0 to total_steps - 1.
        total_steps: of all epochs.
        warmup: fraction of the steps in which the rate rises.
        linear_decay: whether it falls in the other steps.
    """
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return (total_steps - step) / (total_steps - warmup_steps) if linear_decay else 1.0


def layers_to_head(classifier: LlamaEmbeddingClassifier) -> dict[int, int]:
    """Return how many layers each parameter is away from the head, by the parameter's id.

    It is 0 for the head and the final norm, 1 for the last layer, and n_layers + 1 for the
    embeddings, even if their matrix is also the output projection.
    """
    llama = classifier.llama
    distances = {id(parameter): 0 for parameter in classifier.parameters()}
    for i, layer in enumerate(llama.layers):
        for parameter in layer.parameters():
            distances[id(parameter)] = len(llama.layers) - i
    distances[id(llama.tok_embeddings.weight)] = len(llama.layers) + 1
    return distances


def split(groups: Groups, key: Callable[[nn.Parameter], int]) -> list[tuple[int, dict[str, Any]]]:
    """Split groups by a key of their parameters; returns key and group, the lowest key first."""
    parts: list[tuple[int, dict[str, Any]]] = []
    for group in groups:
        by_key: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_key.setdefault(key(parameter), []).append(parameter)
        parts += [(number, {**group, "params": by_key[number]}) for number in by_key]
    return sorted(parts, key=lambda part: part[0])


class LearningRates(Ingredient):
    """Sets the learning rate of each parameter before each step.

    It is lr * rate_factor(step) * layer_decay^layers_to_head, with the optimizer's `lr`.

    Args:
        classifier: what is trained.
        warmup, linear_decay: as in `rate_factor`.
        layer_decay: in (0, 1].
    """

    def __init__(
        self,
        classifier: LlamaEmbeddingClassifier,
        warmup: float = 0.0,
        linear_decay: bool = False,
        layer_decay: float = 1.0,
    ) -> None:
        super().__init__()
        self.warmup, self.linear_decay, self.layer_decay = warmup, linear_decay, layer_decay
        self.distances = layers_to_head(classifier)
        self.factor = 1.0  # of the current step

    def parameter_groups(self, groups: Groups) -> Groups:
        """Return one group for each distance from the head, the head's first."""
        if self.layer_decay == 1:
            return groups
        parts = split(groups, lambda parameter: self.distances.get(id(parameter), 0))
        return [{**group, "lr_factor": self.layer_decay**distance} for distance, group in parts]

    def begin_step(self, step: int, total_steps: int) -> None:
        """Compute the factor of a step, from 0 to total_steps - 1."""
        self.factor = rate_factor(step, total_steps, self.warmup, self.linear_decay)

    def before_update(self, optimizer: Optimizer) -> None:
        """Set the learning rate of each group."""
        for group in optimizer.param_groups:
            layer_factor = group.get("lr_factor", 1.0)
            group["lr"] = optimizer.defaults["lr"] * self.factor * layer_factor


class WeightDecay(Ingredient):
    """Decays matrices, but not biases and RMSNorm's gains, which set a scale.

    Args:
        weight_decay: a step multiplies each matrix by 1 - learning rate * weight_decay.
    """

    def __init__(self, weight_decay: float) -> None:
        super().__init__()
        self.weight_decay = weight_decay

    def parameter_groups(self, groups: Groups) -> Groups:
        """Return the groups, matrices apart from the rest."""
        parts = split(groups, lambda parameter: 0 if parameter.dim() >= 2 else 1)
        decays = (self.weight_decay, 0.0)
        return [{**group, "weight_decay": decays[kind]} for kind, group in parts]


class GradientClipping(Ingredient):
    """Scales all gradients down together if their norm is larger than a limit.

    g <- g * min(1, limit / ||g||), with the norm of all gradients as one vector.

    Args:
        limit: above 0.
    """

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def before_update(self, optimizer: Optimizer) -> Tensor:
        """Scale the gradients; returns their norm before."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return nn.utils.clip_grad_norm_(parameters, self.limit)
