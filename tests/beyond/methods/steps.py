"""Training steps of a tiny classifier, and what the tests compare after them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from beyond.methods.ingredient import Ingredient, Rows
from beyond.methods.method import Method, sum_of_losses
from beyond.processes import backward_in_micro_batches
from classifier import ClassifierConfig, LlamaEmbeddingClassifier
from optimizer import AdamW
from run_llama import classification_loss
from tests.conftest import make_llama, pad_rows

NUM_LABELS = 3
SENTENCES = [[1, 20, 33], [1, 7, 300, 41, 5, 6, 9], [1, 99], [1, 12, 13, 14, 15]]
Make = Callable[[LlamaEmbeddingClassifier], Sequence[Ingredient]]


def make_classifier(causal: bool, dropout: bool = False, **shape: int) -> LlamaEmbeddingClassifier:
    """Make a classifier, always with the same weights, with or without dropout."""
    llama = make_llama(causal, dropout=0.1 if dropout else 0.0, **shape)
    config = ClassifierConfig(NUM_LABELS, "", 0.3 if dropout else 0.0, "finetune")
    return LlamaEmbeddingClassifier(config, llama).train()


def make_rows(lines: Sequence[int] = (4, 0, 9, 7)) -> Rows:
    """Return four sentences of different lengths, padded on the right."""
    tokens, lengths = pad_rows(SENTENCES, pad_id=3)
    return Rows(tokens, lengths, torch.tensor([0, 2, 1, 2]), torch.tensor(lines))


def run_steps(
    method: Method, rows: Rows, steps: int = 1, micro_batch_size: int | None = None
) -> AdamW:
    """Train as `run_llama.train` does, with the same rows in each step."""
    torch.manual_seed(5)  # of dropout
    optimizer = AdamW(method.parameter_groups(), lr=1e-2)
    for step in range(steps):
        method.begin_step(step, steps)
        optimizer.zero_grad()
        backward_in_micro_batches(sum_of_losses, method, rows, len(rows.lines), micro_batch_size)
        method.before_update(optimizer)
        optimizer.step()
        method.after_update()
    return optimizer


def train(
    make: Make,
    causal: bool,
    steps: int = 3,
    dropout: bool = False,
    micro_batch_size: int | None = None,
) -> dict[str, Tensor]:
    """Return the weights, the last gradients, and the random state, after some steps."""
    classifier = make_classifier(causal, dropout)
    method = Method(classifier, classification_loss, make(classifier))
    run_steps(method, make_rows(), steps, micro_batch_size)
    found = {"random state": torch.get_rng_state()}
    for name, parameter in classifier.named_parameters():
        assert parameter.grad is not None
        found |= {name: parameter.detach(), f"gradient of {name}": parameter.grad}
    return found


def assert_same_training(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Two runs have the same weights, gradients and random state, bit for bit."""
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def assert_close_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The gradients of one step are the same, to 1e-6 of the largest."""
    names = [name for name in theirs if name.startswith("gradient")]
    assert names
    for name in names:
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6 * scale + 1e-9, rtol=1e-5)
