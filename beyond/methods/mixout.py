"""Mixout: in each training step, random weights have their pretrained values.

Lee, Cho & Kang 2020, "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language
Models", arXiv:1909.11299. With a weight w, its pretrained value u and m ~ Bernoulli(p), the forward
and backward passes of a training step use

    (m u + (1 - m) w - p u) / (1 - p)

whose expectation is w, as dropout's is. The gradient reaches only the weights that are kept (m = 0)
and is scaled by 1 / (1 - p). Evaluation uses w itself.

Which weights: the matrices of the layers (query, key, value, output, w1, w2, w3), as the authors'
code mixes linear layers. A new head has no pretrained value; embeddings, whose rows may be the head
(`--head label_words`), and RMSNorm's gains train plainly.

Differs from the paper in: dropout stays as `--dropout` and `--hidden_dropout_prob` say, where the
paper replaces the dropout between layers by mixout.

The mixed values are written into the parameters before the forward pass, and w is written back
before the update. So all forward passes of a step use them, gradients are averaged over processes
as ever, and no layer has to know. Memory per mixed weight: 4 bytes for u, 4 for w and 1 for m.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer

from beyond.methods.ingredient import Ingredient
from beyond.methods.randomness import make_generator
from classifier import LlamaEmbeddingClassifier


class Mixout(Ingredient):
    """Mixes the matrices of the layers with their pretrained values in each training step.

    Args:
        classifier: the plain one, whose matrices still have their pretrained values. Copies of them
            are kept, and are not saved, since a resumed run begins with the same model.
        probability: p, in [0, 1).
        seed: of the masks, which depend on it, the step and the matrix, so they are the same in all
            processes and micro-batches.
    """

    def __init__(self, classifier: LlamaEmbeddingClassifier, probability: float, seed: int) -> None:
        super().__init__()
        self.probability = probability
        self.seed = seed
        named = classifier.llama.layers.named_parameters()
        self.weights = {name: weight for name, weight in named if weight.dim() == 2}
        self.own: list[Tensor] = []  # w and 1 - m of each matrix, in a step
        self.kept: list[Tensor] = []
        # No buffers, which several processes would send each other before each forward pass.
        self.pretrained = [weight.detach().clone() for weight in self.weights.values()]

    @torch.no_grad()
    def begin_step(self, step: int, total_steps: int) -> None:
        """Write the mixed values into the parameters."""
        p = self.probability
        weights = list(self.weights.values())
        self.pretrained = [w.to(on.device) for w, on in zip(self.pretrained, weights, strict=True)]
        for (name, weight), pretrained in zip(self.weights.items(), self.pretrained, strict=True):
            generator = make_generator(weight.device, "mixout", self.seed, step, name)
            # Tensor.bernoulli_ and torch.where would take twice as long.
            kept = torch.rand(weight.shape, generator=generator, device=weight.device) >= p
            chosen = torch.lerp(pretrained, weight, kept.to(weight.dtype))  # exactly one of them
            self.own.append(weight.clone())
            self.kept.append(kept)
            weight.copy_((chosen - p * pretrained) / (1 - p))

    @torch.no_grad()
    def before_update(self, optimizer: Optimizer) -> None:
        """Turn the gradients into those of w, and write w back into the parameters."""
        for weight, own, kept in zip(self.weights.values(), self.own, self.kept, strict=True):
            if weight.grad is not None:
                weight.grad *= kept / (1 - self.probability)
            weight.copy_(own)
        self.own.clear()
        self.kept.clear()
