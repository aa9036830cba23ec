"""Test AdamW beyond `optimizer_test.py`: against torch, with groups, closures and saved state."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizer import AdamW


def random_parameters(seed: int = 0) -> list[nn.Parameter]:
    """Draw three parameters with different shapes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 3), (7,), (2, 3, 4)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def random_grads(seed: int) -> list[Tensor]:
    """Draw a gradient for each parameter of `random_parameters`."""
    return [parameter.detach() for parameter in random_parameters(seed)]


def test_matches_torch_with_zero_eps_and_decay() -> None:
    """Compare with torch.optim.AdamW: with eps 0 and decay 0, only the rounding differs."""
    ours, theirs = random_parameters(), random_parameters()
    optimizers = [
        AdamW(ours, lr=1e-2, eps=0.0),
        torch.optim.AdamW(theirs, lr=1e-2, eps=0.0, weight_decay=0.0),
    ]
    for step in range(1, 51):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for parameter, grad in zip(parameters, random_grads(step), strict=True):
                parameter.grad = grad
            optimizer.step()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)


def test_parameter_without_gradient_is_skipped_and_has_its_own_step_count() -> None:
    first, second, third = random_parameters()
    before = second.detach().clone()
    optimizer = AdamW([first, second, third], lr=0.1)
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert torch.equal(second, before) and second not in optimizer.state
    second.grad = torch.ones_like(second)
    optimizer.step()
    assert optimizer.state[first]["step"] == 2 and optimizer.state[second]["step"] == 1
    # its first step is as with a new optimizer: its size is lr, against the gradient
    torch.testing.assert_close(second.detach(), before - 0.1, rtol=0, atol=1e-4)


def test_groups_have_their_own_options() -> None:
    first, second, _ = random_parameters()
    starts = [first.detach().clone(), second.detach().clone()]
    optimizer = AdamW([{"params": [first], "lr": 0.1}, {"params": [second]}], lr=0.01)
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    optimizer.step()
    for parameter, start, lr in zip((first, second), starts, (0.1, 0.01), strict=True):
        torch.testing.assert_close(parameter.detach(), start - lr, rtol=0, atol=1e-4)


def test_without_bias_correction() -> None:
    parameter = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = AdamW([parameter], lr=0.1, betas=(0.9, 0.99), eps=0.5, correct_bias=False)
    parameter.grad = torch.tensor([2.0], dtype=torch.float64)
    optimizer.step()
    # m = 0.1 * 2, v = 0.01 * 4
    assert parameter.item() == pytest.approx(1.0 - 0.1 * 0.2 / (0.04**0.5 + 0.5), abs=1e-12)


def test_closure_is_called_with_gradients() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdamW([parameter], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert (parameter < 1).all()


def test_state_dict_resumes_bit_for_bit() -> None:
    uninterrupted, resumed = random_parameters(), random_parameters()
    uninterrupted_optimizer = AdamW(uninterrupted, lr=0.1)
    resumed_optimizer = AdamW(resumed, lr=0.1)
    for step in range(6):
        if step == 3:
            state = resumed_optimizer.state_dict()
            assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
            resumed_optimizer = AdamW(resumed, lr=0.5)  # the loaded state restores lr=0.1
            resumed_optimizer.load_state_dict(state)
        for parameters, optimizer in (
            (uninterrupted, uninterrupted_optimizer),
            (resumed, resumed_optimizer),
        ):
            for parameter, grad in zip(parameters, random_grads(step), strict=True):
                parameter.grad = grad
            optimizer.step()
    for expected, actual in zip(uninterrupted, resumed, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"eps": -1e-8}, {"weight_decay": -0.1}, {"betas": (1.0, 0.9)}]
    + [{"betas": (0.9, -0.1)}, {"lr": float("nan")}],
)
def test_invalid_options_raise_value_error(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=name):
        AdamW(random_parameters(), **options)


def test_sparse_gradients_raise_runtime_error() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        AdamW(embedding.parameters()).step()
