"""Small classifiers, rows and runs that the tests of the methods share."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import run_llama
from base_llama import read_checkpoint
from beyond.methods.ingredient import Ingredient, Rows
from beyond.methods.method import Method
from beyond.options import FinetuneOptions
from classifier import ClassifierConfig, LlamaEmbeddingClassifier
from tests.conftest import make_llama, pad_rows

MakeIngredient = Callable[[LlamaEmbeddingClassifier], Ingredient]


def make_classifier(
    causal: bool = True, dropout: float = 0.0, **shape: int
) -> LlamaEmbeddingClassifier:
    """Make a classifier of two labels on a tiny model, in eval mode, always the same."""
    llama = make_llama(causal, dropout=dropout, **shape)
    return LlamaEmbeddingClassifier(ClassifierConfig(2, "", dropout, "finetune"), llama).eval()


def make_rows() -> Rows:
    """Make seven rows of different lengths."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(3, 320, (length,), generator=generator).tolist()
        for length in (3, 9, 14, 5, 7, 2, 11)
    ]
    return Rows(*pad_rows(rows, 3), torch.tensor([0, 1, 1, 0, 1, 0, 0]), torch.arange(7))


def weights_of(classifier: LlamaEmbeddingClassifier) -> dict[str, Tensor]:
    """Return a copy of a classifier's weights, each under one name."""
    return {name: p.detach().clone() for name, p in classifier.named_parameters()}


def train_steps(method: Method, steps: int = 3, lr: float = 1e-2) -> None:
    """Do some steps of the training loop on `make_rows`."""
    optimizer = run_llama.AdamW(method.parameter_groups(), lr=lr)
    method.train()
    for step in range(steps):
        method.begin_step(step, steps)
        optimizer.zero_grad()
        (method(*make_rows()) / 8).backward()
        method.before_update(optimizer)
        optimizer.step()
        method.after_update()
    method.eval()


def add_ingredient(monkeypatch: pytest.MonkeyPatch, make: MakeIngredient) -> None:
    """Add an ingredient to all runs of this test."""
    build = run_llama.build_method

    def build_more(options: FinetuneOptions, *arguments: Any) -> Method:
        method = build(options, *arguments)
        ingredients = (*method.ingredients, make(method.classifier))
        return Method(method.classifier, method.loss_fn, ingredients)

    monkeypatch.setattr(run_llama, "build_method", build_more)


def finetune_and_load(argv: Sequence[str]) -> dict[str, Tensor]:
    """Run a command line in an empty folder out/; returns the classifier's weights in out/a.pt."""
    shutil.rmtree("out", ignore_errors=True)
    assert run_llama.main([*argv]) == 0
    return load_weights(Path())


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the classifier that a run in a folder has saved."""
    weights: dict[str, Tensor] = read_checkpoint(folder / "out/a.pt")["model"]
    return weights


def read_curve(tag: str, split: str = "train", folder: Path = Path()) -> list[float]:
    """Return a curve of the one run in a folder's out/, by step."""
    (run,) = (path for path in (folder / "out").iterdir() if path.is_dir())
    events: Any = EventAccumulator(str(run / split)).Reload()
    return [event.value for event in events.Scalars(tag)]


def assert_close_curves(ours: Path, theirs: Path) -> None:
    """The runs in two folders have the same losses, of each step and of the kept weights.

    The loss of a step has the penalties in it, so it also shows an ingredient whose effect on the
    weights is smaller than a tolerance.
    """
    for split in ("train", "dev"):
        found, expected = (read_curve("loss", split, folder) for folder in (ours, theirs))
        assert found == pytest.approx(expected, rel=1e-6)
