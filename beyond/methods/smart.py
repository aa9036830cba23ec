"""SMART's regulariser: small changes of the embeddings should not change the prediction.

Jiang et al. 2020, "SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models
through Principled Regularized Optimization", arXiv:1911.03437, section 3.1. The loss, eq. 1, for
each sentence with embeddings x:

    NLL(f(x)) + lambda max_{|delta| <= eps} [KL(f(x + delta) || f(x)) + KL(f(x) || f(x + delta))]

|delta| is the largest absolute value. The maximum is approximated by one step of projected gradient
ascent from a random start (Algorithm 1 with T = 1), where l is the divergence in brackets:

    nu ~ N(0, sigma^2),  g = dl/dnu,  delta = clip(nu + eta g / max|g|, -eps, eps)

The other half of SMART, Bregman proximal point optimization, is in `proximal_point.py`
(`--bregman`).

Differs from the paper in:
- sigma, eps and eta are in units of the root mean square of the pretrained embeddings, since those
  of a Llama are not normalised as BERT's are, and eps is 0.01. With the paper's 1e-5 (absolute) the
  gradient of the penalty was measured below 1e-4 of the loss's, and in bfloat16 it is lost in
  rounding. The ratios sigma : eps : eta are the paper's, 1 : 1 : 100;
- max|g| is that of each token, so that each embedding is changed. Algorithm 1 divides by one
  number for the whole input. (The authors' code, mt-dnn, divides nu + eta g instead, and does not
  clip.)

Padding gets no noise. All forward passes have the dropout masks of the plain one: with masks of
their own, the penalty would measure mostly the difference of the masks (as R-Drop does on purpose),
and f(x) would need a pass of its own. A step takes two more forward passes, one backward pass to
the embeddings and one through the whole model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from beyond.methods.divergence import symmetric_kl
from beyond.methods.ingredient import Ingredient, Rows
from beyond.methods.randomness import make_generator, preserve_random_state
from beyond.run import get_random_state, set_random_state
from classifier import LlamaEmbeddingClassifier

# In units of the root mean square of the embeddings.
NOISE = 0.01  # sigma, the standard deviation of the random start
RADIUS = 0.01  # eps, the largest change of an embedding's entry
STEP_SIZE = 1.0  # eta


class Smart(Ingredient):
    """Adds the penalty on how much the prediction changes with the embeddings.

    Args:
        classifier: the plain one; its embeddings get the noise during the additional passes.
        weight: lambda, >= 0.
        seed: of the noise. A sentence's noise depends on the seed, the step and its line in the
            training file, so it is the same in any process, micro-batch or order.
    """

    def __init__(self, classifier: LlamaEmbeddingClassifier, weight: float, seed: int) -> None:
        super().__init__()
        self.weight = weight
        self.seed = seed
        self.step = 0
        self.random_state: dict[str, Any] = {}
        self.delta: Tensor | None = None  # (rows, seq, dim), added to the embeddings
        embedding = classifier.llama.tok_embeddings
        self.dim = embedding.embedding_dim
        # Taken from the pretrained model, so it is the same when the run is resumed.
        self.unit = embedding.weight.detach().square().mean().sqrt().item()
        # The compiler would compile the model anew for each shape of the noise.
        embedding.register_forward_hook(torch.compiler.disable(self.perturb))

    def perturb(self, embedding: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        """Return the embeddings plus delta; None, which changes nothing, if there is no delta."""
        return None if self.delta is None else output + self.delta

    def begin_step(self, step: int, total_steps: int) -> None:
        """Remember the step, on which the noise depends."""
        self.step = step

    def before_forward(self, rows: Rows) -> None:
        """Remember the random state from which the plain forward pass draws its dropout masks."""
        self.random_state = get_random_state()

    def loss(self, loss: Tensor, classifier: nn.Module, rows: Rows, log_probs: Tensor) -> Tensor:
        """Add lambda times the divergence to the loss; see `Ingredient.loss`."""
        delta = self.find_delta(classifier, rows, log_probs.detach())
        perturbed = self.predict(classifier, rows, delta)
        return loss + self.weight * symmetric_kl(perturbed, log_probs).sum()

    def find_delta(self, classifier: nn.Module, rows: Rows, log_probs: Tensor) -> Tensor:
        """Return the change of the embeddings, (rows, seq, dim), 0 on padding.

        Args:
            classifier, rows: as in `loss`.
            log_probs: of the unchanged embeddings, without a graph.
        """
        noise = self.draw_noise(rows).requires_grad_()
        divergence = symmetric_kl(self.predict(classifier, rows, noise), log_probs).sum()
        (gradient,) = torch.autograd.grad(divergence, noise)  # of no parameter
        largest = gradient.abs().amax(dim=-1, keepdim=True)  # (rows, seq, 1)
        direction = gradient / largest.clamp_min(torch.finfo(largest.dtype).tiny)
        radius, step_size = RADIUS * self.unit, STEP_SIZE * self.unit
        delta = (noise.detach() + step_size * direction).clamp(-radius, radius)
        positions = torch.arange(delta.shape[1], device=delta.device)
        is_token = positions < rows.lengths[:, None]  # (rows, seq)
        return delta * is_token[..., None]

    def draw_noise(self, rows: Rows) -> Tensor:
        """Return the random start, (rows, seq, dim), 0 on padding.

        It is drawn on the CPU, so that it does not depend on the device.
        """
        noise = torch.zeros(*rows.tokens.shape, self.dim)
        pairs = zip(rows.lengths.tolist(), rows.lines.tolist(), strict=True)
        for row, (length, line) in zip(noise, pairs, strict=True):
            generator = make_generator(noise.device, "smart", self.seed, self.step, line)
            row[:length].normal_(std=NOISE * self.unit, generator=generator)
        return noise.to(rows.tokens.device)

    def predict(self, classifier: nn.Module, rows: Rows, delta: Tensor) -> Tensor:
        """Return log-probabilities with changed embeddings and the dropout of the plain pass."""
        self.delta = delta
        try:
            with preserve_random_state():
                set_random_state(self.random_state)
                return classifier(rows.tokens, rows.lengths)
        finally:
            self.delta = None
