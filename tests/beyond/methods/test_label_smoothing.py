"""Label smoothing against its equation and PyTorch's own."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from beyond.methods.label_smoothing import smooth_labels
from run_llama import classification_loss
from tests.beyond.methods.helpers import finetune_and_load, read_curve
from tests.beyond.runs import FINETUNE


def test_matches_the_equation() -> None:
    """Cross-entropy with the target (1 - eps) [k = y] + eps / K, by hand: eps .2, K 4."""
    probabilities = [0.1, 0.2, 0.3, 0.4]
    target = [0.05, 0.05, 0.85, 0.05]
    expected = -sum(q * math.log(p) for q, p in zip(target, probabilities, strict=True))
    loss = smooth_labels(classification_loss, 0.2)
    found = loss(torch.tensor([probabilities]).log(), torch.tensor([2]))
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.9])
def test_matches_pytorch(eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 4, 2, 2, 1, 3, 0])
    ours = smooth_labels(classification_loss, eps)(F.log_softmax(logits, dim=-1), labels)
    theirs = F.cross_entropy(logits, labels, label_smoothing=eps, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_without_smoothing_it_is_the_plain_loss_bit_for_bit(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = finetune_and_load(FINETUNE)
    monkeypatch.setattr("run_llama.classification_loss", smooth_labels(classification_loss, 0.0))
    smoothed = finetune_and_load(FINETUNE)
    assert all(torch.equal(smoothed[name], weight) for name, weight in plain.items())


def test_the_first_loss_is_linear_in_the_flag(workplace: Path) -> None:
    """That with 0.25 is the mean of those with 0 and 0.5."""
    losses = []
    for eps in ("0", "0.25", "0.5"):
        finetune_and_load([*FINETUNE, "--epochs", "1", "--label_smoothing", eps])
        losses.append(read_curve("loss")[0])
    assert losses[1] != pytest.approx(losses[0], rel=1e-3)
    assert losses[1] == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-5)
