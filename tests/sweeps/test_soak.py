"""A long haul: neither memory nor open files grow with the steps of a run or its tokens.

2,000 steps and 20,000 tokens are a sweep; 60 steps and 300 tokens are a test.
"""

import json
from pathlib import Path

import pytest

from tests.beyond.runs import Job, RunForks
from tests.conftest import make_llama, save_llama

FINETUNE = ["--option", "finetune", "--batch_size", "2", "--lr", "1e-4"]  # four steps per epoch
GENERATE = ["--max_new_tokens", "100", "--temperature", "1", "--batch_size", "1"]
SHORT = [([*FINETUNE, "--epochs", "15"], 60), ([*GENERATE, "--num_samples", "3"], 300)]
LONG = [([*FINETUNE, "--epochs", "500"], 2000), ([*GENERATE, "--num_samples", "200"], 20_000)]


@pytest.mark.parametrize("mode", ["--causal", "--no-causal"])
@pytest.mark.parametrize(
    ("argv", "count"),
    [*SHORT, *(pytest.param(*case, marks=pytest.mark.sweep) for case in LONG)],
)
def test_memory_and_files_stay_as_they_are(
    run_forks: RunForks, workplace: Path, argv: list[str], count: int, mode: str
) -> None:
    """After a tenth of the steps or tokens, as many bytes (to 2%) and as many open files."""
    save_llama(make_llama(causal=False, max_seq_len=256), Path("stories42M.pt"))
    ((status, _, err),) = run_forks([Job([*argv, mode], workplace, watch=True)])
    assert status == 0, err
    samples = json.loads(Path("samples.json").read_text())
    assert len(samples) == count
    tenth = count // 10
    memory = [resident for resident, _ in samples]
    growth = max(memory[tenth:]) / max(memory[:tenth]) - 1
    print(f"{' '.join(argv[:2])} {mode}: {count} samples, memory {growth:+.2%}")
    assert growth < 0.02
    assert {files for _, files in samples[tenth:]} == {samples[tenth][1]}
