"""Check optimizer.py with the course's published values and a scalar recurrence in float64.

Run as `uv run python optimizer_test.py`; pytest collects it too.
"""

import math

import numpy as np
import torch
from torch import nn

from optimizer import AdamW
from utils import refuse_arguments


def test_course_values() -> None:
    """Compare with the course's optimizer_test.npy: 1000 steps of a random linear regression."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, correct_bias=True)
    for _ in range(1000):
        x = torch.tensor(rng.uniform(size=3), dtype=torch.float32)
        target = torch.stack((x[0] + x[1], -x[2]))
        optimizer.zero_grad()
        (target - model(x)).square().sum().backward()
        optimizer.step()
    expected = torch.tensor(
        [
            [0.554827868938446, 0.8666566610336304, 0.0729198157787323],
            [-0.4472450613975525, -0.29512280225753784, -0.27172720432281494],
        ]
    )
    # tolerance of the course
    torch.testing.assert_close(model.weight.detach(), expected, atol=1e-5, rtol=1e-3)


def scalar_recurrence(
    theta: float,
    grads: list[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> float:
    """Update a single number by the formulas of optimizer.py, in Python's float64."""
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        alpha_t = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        theta = theta - alpha_t * m / (math.sqrt(v) + eps)
        theta = theta - lr * decay * theta
    return theta


def test_scalar_recurrence() -> None:
    """Compare 200 steps of 15 float64 numbers in two tensors with one recurrence per number."""
    rng = np.random.default_rng(1)
    lr, beta1, beta2, eps, decay = 3e-3, 0.85, 0.98, 1e-3, 0.07
    starts = rng.normal(size=15)
    grads = rng.normal(loc=0.3, size=(200, 15)) * rng.lognormal(size=15)
    parameters = [
        nn.Parameter(torch.tensor(starts[:6].reshape(2, 3))),
        nn.Parameter(torch.tensor(starts[6:])),
    ]
    optimizer = AdamW(parameters, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    for row in grads:
        parameters[0].grad = torch.tensor(row[:6].reshape(2, 3))
        parameters[1].grad = torch.tensor(row[6:])
        optimizer.step()
    actual = torch.cat([parameter.detach().flatten() for parameter in parameters])
    expected = [
        scalar_recurrence(start, column.tolist(), lr, beta1, beta2, eps, decay)
        for start, column in zip(starts, grads.T, strict=True)
    ]
    # the same arithmetic in another order, so only float64 rounding differs
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-11, atol=1e-12)


def main() -> None:
    test_course_values()
    test_scalar_recurrence()
    print("AdamW matches the course's values and a scalar recurrence.\nOptimizer test passed!")


if __name__ == "__main__":
    refuse_arguments(__doc__)
    main()
