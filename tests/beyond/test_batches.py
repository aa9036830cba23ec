"""Batches of similar lengths: each example once, little padding, and random if asked for."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from beyond import batches
from beyond.batches import LengthBatchSampler
from classifier import ClassifierConfig, LlamaEmbeddingClassifier
from run_llama import LlamaDataset, create_data, model_eval
from tests.conftest import ROOT, make_llama
from tokenizer import Tokenizer
from utils import Evaluation


def padding_share(batches: list[list[int]], lengths: list[int]) -> float:
    """Share of padding in batches, each padded to its longest row."""
    real = sum(lengths[i] for batch in batches for i in batch)
    return 1 - real / sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


def test_length_batches_hold_each_example_once() -> None:
    lengths = torch.randint(2, 90, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    in_order = list(LengthBatchSampler(lengths, 8))
    flat = [i for batch in in_order for i in batch]
    assert [lengths[i] for i in flat] == sorted(lengths)
    sampler = LengthBatchSampler(lengths, 8, torch.Generator().manual_seed(1))
    first, second = list(sampler), list(sampler)
    again = list(LengthBatchSampler(lengths, 8, torch.Generator().manual_seed(1)))
    assert first == again and first != second
    for ordered in (in_order, first, second):
        assert sorted(i for batch in ordered for i in batch) == list(range(1003))
        assert len(ordered) == len(sampler) == 126
        assert sorted(map(len, ordered)) == [3] + [8] * 125
        assert padding_share(ordered, lengths) < 0.04
    # Shuffled: neither the batches nor what is in them follow the length alone.
    means = [sum(lengths[i] for i in batch) / len(batch) for batch in first]
    assert means != sorted(means)
    assert {frozenset(batch) for batch in first}.isdisjoint(map(frozenset, second))


def test_length_batches_leave_little_padding_on_the_real_data(tokenizer_path: Path) -> None:
    """Below 5% on SST and CFIMDB at the assignment's batch sizes, of half and more without."""
    if not (ROOT / "data/cfimdb-train.txt").exists() or not (ROOT / "tokenizer.model").exists():
        pytest.skip("the course's data are not here (data/download.py)")
    tokenizer = Tokenizer(tokenizer_model=ROOT / "tokenizer.model")
    for name, num_labels, size in (("sst", 5, 80), ("cfimdb", 2, 10)):
        examples = create_data(ROOT / f"data/{name}-train.txt", tokenizer, num_labels, 1024)
        lengths = [len(example.tokens) for example in examples]
        generator = torch.Generator().manual_seed(0)
        assert padding_share(list(LengthBatchSampler(lengths, size, generator)), lengths) < 0.05
        assert padding_share(list(LengthBatchSampler(lengths, size)), lengths) < 0.05
        unsorted = torch.arange(len(lengths)).split(size)
        assert padding_share([batch.tolist() for batch in unsorted], lengths) > 0.3


def test_all_texts_are_encoded_in_order_with_a_bar_if_it_takes_long(
    tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow(Tokenizer):
        seconds = 0.0  # for each call

        def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
            counts.append(len(texts))
            time.sleep(self.seconds)
            return super().encode_texts(texts)

    monkeypatch.setattr(batches, "TEXTS_AT_A_TIME", 3)
    tokenizer = Slow(None, tokenizer_path)
    texts = ["a film", "", "no", "a moving story", "x", "two sisters", "b"]
    for tokenizer.seconds, has_bar in ((0.0, False), (0.6, True)):
        counts: list[int] = []
        found = list(batches.encode_all(tokenizer, texts, "x.txt", bos=True))
        assert found == [tokenizer.encode(text, bos=True, eos=False) for text in texts]
        assert counts == [3, 3, 1]
        assert ("tokenize x.txt" in capsys.readouterr().err) == has_bar


@pytest.mark.parametrize("by_length", [False, True])
def test_data_sets_are_evaluated_as_one_list_if_grouped_by_length(
    tmp_path: Path, tokenizer_path: Path, by_length: bool
) -> None:
    """Each gets its own evaluation, equal to what it is alone."""
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
    splits = []
    for name, size in (("a", 10), ("b", 7)):
        lines = [f"{i % 2} ||| {'film ' * (i * 5 % 9 + 1)}{name}" for i in range(size)]
        (tmp_path / name).write_text("\n".join(lines))
        examples = create_data(tmp_path / name, tokenizer, 2, 128)
        splits.append(LlamaDataset(examples, 3, group_by_length=by_length))
    torch.manual_seed(0)
    model = LlamaEmbeddingClassifier(ClassifierConfig(2, "", 0.0, "finetune"), make_llama(True))
    sizes: list[list[int]] = []

    def evaluate(loader: Any) -> Evaluation:
        sizes.append([len(batch.tokens) for batch in loader])
        return model_eval(loader, model, torch.device("cpu"))

    found = batches.evaluate_splits(splits, 4, evaluate)
    assert sizes == ([[4, 4, 4, 4, 1]] if by_length else [[4, 4, 2], [4, 3]])
    for split, result in zip(splits, found, strict=True):
        alone = model_eval(split.loader(4), model, torch.device("cpu"))
        # All but the log-probabilities and the loss, whose last digits depend on the batch's shape.
        assert result[:-2] == alone[:-2] and result.loss == pytest.approx(alone.loss, abs=1e-5)
        for first, second in zip(result.log_probs, alone.log_probs, strict=True):
            assert first == pytest.approx(second, abs=1e-5)
        assert [example.line for example in split.examples] == list(range(len(split)))


def test_each_batch_of_an_evaluation_is_computed_by_one_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Evenly, in order; a single process computes all."""
    monkeypatch.setattr(batches, "progress", lambda items, desc: items)
    assert list(batches.shard_batches(range(11))) == list(range(11))
    monkeypatch.setattr(batches, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(batches, "rank", lambda rank=rank: rank)
        shares.append(list(batches.shard_batches(range(11))))
    assert shares == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]
