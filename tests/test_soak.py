"""A long haul: neither memory nor open files grow with the steps of a run or its tokens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, make_llama, save_llama

STEPS, TOKENS = 2000, 20_000
FINETUNE = ["--option", "finetune", "--epochs", "500", "--batch_size", "2", "--lr", "1e-4"]
GENERATE = ["--max_new_tokens", "100", "--num_samples", "200", "--temperature", "1"]
GENERATE += ["--batch_size", "1"]


def measure(argv: list[str]) -> list[tuple[int, int]]:
    """Resident bytes and open files of a process after each step, or each new token."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_soak", *argv],
        cwd=Path.cwd(),
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(sample) for sample in json.loads(Path("samples.json").read_text())]


@pytest.mark.parametrize("mode", ["--causal", "--no-causal"])
@pytest.mark.parametrize(("argv", "count"), [(FINETUNE, STEPS), (GENERATE, TOKENS)])
def test_memory_and_files_stay_as_they_are(
    workplace: Path, argv: list[str], count: int, mode: str
) -> None:
    save_llama(make_llama(causal=False, max_seq_len=256), Path("stories42M.pt"))
    samples = measure([*argv, mode])
    assert len(samples) == count
    tenth = count // 10
    memory = [resident for resident, _ in samples]
    growth = max(memory[tenth:]) / max(memory[:tenth]) - 1
    print(f"{' '.join(argv[:2])} {mode}: {count} samples, memory {growth:+.2%}")
    assert growth < 0.02
    assert {files for _, files in samples[tenth:]} == {samples[tenth][1]}


def main() -> None:
    """Run a command line and write down what it holds after each step or token."""
    import llama
    import run_llama

    samples: list[tuple[int, int]] = []

    def sample() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        samples.append((pages * 4096, len(list(Path("/proc/self/fd").iterdir()))))

    class Sampling(run_llama.AdamW):
        def step(self, closure=None):  # type: ignore[no-untyped-def]
            super().step(closure)
            sample()

    draw = llama.sample_next_token

    def sampling(*args, **kwargs):  # type: ignore[no-untyped-def]
        sample()
        return draw(*args, **kwargs)

    run_llama.AdamW = Sampling  # type: ignore[misc]
    llama.sample_next_token = sampling
    assert run_llama.main(sys.argv[1:]) == 0
    Path("samples.json").write_text(json.dumps(samples))


if __name__ == "__main__":
    main()
