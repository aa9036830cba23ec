"""Small real files that the tests share: a tokenizer, checkpoints, and a data set."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from base_llama import write_checkpoint
from config import LlamaConfig
from llama import Llama

ROOT = Path(__file__).parent.parent
LABEL_NAMES = '["bad", "good"]'
SENTENCES = [
    "0 ||| A dull , lifeless story with no heart .",
    "1 ||| An honest and moving film about two sisters .",
    "0 ||| The jokes fall flat and the plot makes no sense at all .",
    "1 ||| Funny , warm and wonderfully acted .",
    "0 ||| I wanted to leave after ten minutes .",
    "1 ||| The best thriller of the year , by far .",
    "0 ||| Clumsy , loud and much too long .",
    "1 ||| Every scene is a small surprise .",
]
# The files that take longest, the longest first.
LONGEST = (
    *("test_run", "test_plants_training", "test_processes", "test_flags", "test_plants"),
    *("test_checker", "test_method", "test_checkpoints", "test_compile", "test_program"),
    *("test_starter", "test_quality", "test_run_llama", "test_parts_model", "test_submission"),
    *("test_download", "test_pretraining", "test_smart", "test_huggingface", "test_tasks"),
    *("test_llama2c", "test_styles_model", "test_logs", "test_generation", "test_interrupts"),
    *("test_parts_classifier", "test_decoding", "test_command_line", "test_llama2c_tokenizer"),
)
# The sizes differ from each other wherever they can, so that a swapped axis cannot pass.
SHAPE = {"dim": 48, "n_layers": 2, "n_heads": 6, "n_kv_heads": 3, "max_seq_len": 128}


def pytest_configure() -> None:
    """Use one thread, and let SIGINT interrupt.

    The models of the tests are so small that a second thread only costs time. If the suite is
    started in the background of a script, the shell has SIGINT ignored, and processes that the
    tests start would inherit that.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest files begin first, so that no process has one to run when the others end."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a SentencePiece model like Llama's on a few sentences; returns its path."""
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(line.split(" ||| ")[1] for line in SENTENCES), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture
def llama(tokenizer_path: Path) -> Llama:
    """Make a tiny model with grouped heads, in reference mode and eval mode."""
    return make_llama(causal=False)


def make_llama(causal: bool, seed: int = 0, **shape: Any) -> Llama:
    """Make a random model whose weights are larger than those of `init_weights`.

    Its outputs are of order one, so a mistake changes them visibly.
    """
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(**{"vocab_size": 320, **SHAPE, **shape, "causal": causal}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return the rows as one batch, padded on the right, and their lengths."""
    tensors = [torch.tensor(row) for row in rows]
    tokens = pad_sequence(tensors, batch_first=True, padding_value=pad_id)
    return tokens, torch.tensor([len(row) for row in rows])


def save_llama(model: Llama, path: Path) -> None:
    """Write a checkpoint that `load_pretrained` reads."""
    write_checkpoint(
        path, {"model": model.state_dict(), "model_args": model.config.to_model_args()}
    )


@pytest.fixture
def workplace(
    tmp_path: Path, tokenizer_path: Path, llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Make the current folder of a run: default checkpoint, tokenizer, and CFIMDB's files."""
    write_inputs(tmp_path, tokenizer_path, llama)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_inputs(folder: Path, tokenizer_path: Path, llama: Llama) -> None:
    """Write the default files of all tasks."""
    save_llama(llama, folder / "stories42M.pt")
    (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    data = folder / "data"
    data.mkdir()
    for split in ("train", "dev", "test"):
        (data / f"cfimdb-{split}.txt").write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    (data / "cfimdb-label-mapping.json").write_text(LABEL_NAMES, encoding="utf-8")
