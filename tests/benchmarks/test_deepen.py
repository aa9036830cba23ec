"""benchmarks/deepen.py: a deeper model that computes the same."""

from pathlib import Path

import pytest
import torch

from benchmarks.deepen import deepen, main
from beyond.formats.load import load_llama
from tests.beyond.runs import assert_equal
from tests.conftest import make_llama, save_llama


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n_layers", [3, 4, 5, 9])
def test_the_deeper_model_gives_the_same_logits(n_layers: int, tied: bool) -> None:
    llama = make_llama(n_layers=2, tie_embeddings=tied, causal=True)
    deeper = deepen(llama, n_layers)
    assert len(deeper.layers) == deeper.config.n_layers == n_layers
    assert deeper.config.causal
    tokens = torch.tensor([[1, 5, 7, 3]])
    assert torch.equal(deeper(tokens, tokens)[0], llama(tokens, tokens)[0])


def test_the_new_layers_follow_the_old_ones_evenly() -> None:
    weights = deepen(make_llama(n_layers=2, causal=True), 5).state_dict()
    for name in ("attention.compute_output", "feed_forward.w2"):
        is_new = [not weights[f"layers.{i}.{name}.weight"].any() for i in range(5)]
        assert is_new == [False, True, False, True, True]
    inner = [weights[f"layers.{i}.feed_forward.w1.weight"] for i in range(5)]
    equal = [torch.equal(inner[i], inner[i + 1]) for i in range(4)]
    assert equal == [True, False, True, True]


def test_all_weights_of_the_new_layers_learn_within_two_steps() -> None:
    """Only the two zero matrices of a new layer have gradients at first, and all after a step."""
    deeper = deepen(make_llama(n_layers=1, causal=True), 2).train()
    optimizer = torch.optim.SGD(deeper.parameters(), lr=0.1)
    tokens = torch.tensor([[1, 5, 7, 3]])
    for _ in range(2):
        optimizer.zero_grad()
        deeper(tokens, tokens)[0].log_softmax(-1)[0, :, 2].sum().backward()
        optimizer.step()
    assert all(weight.grad is not None and weight.grad.any() for weight in deeper.parameters())


def test_the_command_writes_the_model(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama = make_llama(n_layers=2, causal=True)
    save_llama(llama, Path("two.pt"))
    assert main(["two.pt", "3", "new/three.pt"]) == 0
    deeper = load_llama("new/three.pt")
    assert deeper.config == deepen(llama, 3).config
    assert_equal(dict(deeper.state_dict()), dict(deepen(llama, 3).state_dict()))
    parameters = sum(weight.numel() for weight in deeper.parameters())
    assert capsys.readouterr().out == f"new/three.pt: {parameters:,} parameters\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pt", "3", "new.pt"], "none.pt: No such file"),
        (["two.pt", "2", "new.pt"], "expected more than the model's 2 layers, found 2"),
        (["two.pt", "x", "new.pt"], "argument N_LAYERS: expected a whole number, found 'x'"),
        (["two.pt", "3"], "the following arguments are required: TARGET"),
        (["two.pt", "3", "."], ".: cannot be written"),
        (["two.pt", "3", "./two.pt"], "./two.pt: is the model itself; choose another name"),
    ],
)
def test_a_wrong_input_is_one_line(
    arguments: list[str], message: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_llama(make_llama(n_layers=2, causal=True), Path("two.pt"))
    assert main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("python -m benchmarks.deepen: error: ") and message in error
    assert not Path("new.pt").exists()
