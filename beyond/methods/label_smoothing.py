"""Label smoothing: the target gives some probability to all labels.

Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", arXiv:1512.00567,
section 7: the target q'(k) = (1 - eps) [k = y] + eps / K of K labels, with cross-entropy as before:

    loss = (1 - eps) (-log p(y)) + eps mean_k (-log p(k))
"""

from torch import Tensor

from beyond.methods.ingredient import LossFn


def smooth_labels(loss_fn: LossFn, eps: float) -> LossFn:
    """Return the loss with smoothed targets.

    It takes the place of `loss_fn`, so that ingredients with several forward passes use it in each.

    Args:
        loss_fn: the plain loss, of log-probabilities and labels, summed over rows.
        eps: the share of the target that all labels get equally, in [0, 1).
    """

    def smoothed(log_probs: Tensor, labels: Tensor) -> Tensor:
        return (1 - eps) * loss_fn(log_probs, labels) - eps * log_probs.mean(dim=-1).sum()

    return smoothed
