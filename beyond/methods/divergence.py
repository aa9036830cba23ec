"""The divergence between two predictions."""

from torch import Tensor


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """Return KL(P || Q) + KL(Q || P) of each row, in nats, at least 0.

    Computed as sum_k (p_k - q_k) (log p_k - log q_k). For predictions that are close together this
    is more exact than a difference of two sums.

    Args:
        first, second: log P and log Q, (rows, num_labels).

    Returns:
        (rows,).
    """
    return ((first.exp() - second.exp()) * (first - second)).sum(dim=-1)
