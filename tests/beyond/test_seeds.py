"""Fine-tuning with several seeds: their summary, resuming, and refusals."""

import json
import re
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from base_llama import read_checkpoint
from run_llama import main
from tests.beyond.runs import FINETUNE, assert_equal, interrupt, run
from tests.conftest import SENTENCES


def titles(out: str) -> list[str]:
    """Return the lines before each run, with ... instead of the expected end, if it is there."""
    lines = re.findall("^seed .*", out, re.MULTILINE)
    return [
        re.sub(r"the last one ends about [A-Z][a-z]+ \d\d:\d\d$", "...", line) for line in lines
    ]


def test_seeds_are_summed_up_and_resumed(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*FINETUNE, "--seeds", "1,2,3", "--epochs", "2"]
    status, out, err = run(argv, capsys)
    assert (status, err) == (0, "")
    assert titles(out) == [
        "seed 1: run 1 of 3",
        "seed 2: run 2 of 3; ...",
        "seed 3: run 3 of 3; ...",
    ]
    written = json.loads(Path("out/a.seeds.json").read_text())
    assert [*written["accuracy"]] == ["1", "2", "3"]
    for i, split in enumerate(("dev", "test")):
        values = [accuracies[i] for accuracies in written["accuracy"].values()]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        assert written[split]["mean"] == pytest.approx(mean)
        assert written[split]["standard deviation"] == pytest.approx(deviation)
        assert f"{split} acc over 3 seeds :: {mean:.3f} +- {deviation:.3f}\n" in out
    # Each is the run of its seed alone.
    predictions = {
        number: Path(f"out/seed-{number}-dev-finetuning-output.txt").read_bytes()
        for number in "123"
    }
    for number in "123":
        alone = [*FINETUNE, "--epochs", "2", "--seed", number, "--filepath", "out/alone.pt"]
        assert main(alone) == 0
        assert Path("out/dev-finetuning-output.txt").read_bytes() == predictions[number]
        models = [read_checkpoint(f"out/{n}.pt")["model"] for n in ("alone", f"a-seed-{number}")]
        assert_equal(models[0], models[1])

    shutil.rmtree("out")
    steps_of_a_run = 6
    assert interrupt(argv, steps_of_a_run + 4) == 130
    status, out, _ = run([*argv, "--resume"], capsys)
    assert status == 0 and "epoch 0" in out
    assert titles(out) == ["seed 2: run 2 of 3", "seed 3: run 3 of 3; ..."]
    again = json.loads(Path("out/a.seeds.json").read_text())
    assert again == written


def test_seeds_of_a_test_file_without_labels(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no accuracy on test to sum up; that on dev is not lost."""
    path = Path("data/cfimdb-test.txt")
    path.write_text("".join(f"-1 ||| {line.split(' ||| ')[1]}\n" for line in SENTENCES))
    argv = [*FINETUNE, "--epochs", "1", "--seeds", "1,2"]
    results = Path("out/a.seeds.json")
    for flags in ([], ["--resume"]):
        status, out, err = run([*argv, *flags], capsys)
        assert (status, err) == (0, "")
        assert "test acc over 2 seeds :: n/a\n" in out
        assert re.search(r"^dev acc over 2 seeds :: \.?\d\.\d{3} \+- ", out, re.MULTILINE)
        content = results.read_text()
        assert "NaN" not in content  # which is not JSON
        written = json.loads(content)
        assert written["test"] == {"mean": None, "standard deviation": None}
        assert [test for _, test in written["accuracy"].values()] == [None, None]


def test_only_seeds_that_are_asked_for_are_to_do(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of the accuracies may have others, of an earlier run."""
    left: list[int] = []

    def note_left(times: Sequence[float], number: int) -> str:
        left.append(number)
        return ""

    monkeypatch.setattr("beyond.seeds.expected_end", note_left)
    argv = [*FINETUNE, "--epochs", "1", "--resume", "--seeds"]
    monkeypatch.setattr("run_llama.finetune", lambda options: (0.5, 0.4))
    assert main([*argv, "1,2,3"]) == 0
    assert main([*argv, "4,2,5"]) == 0
    assert left == [3, 2, 1, 2, 1]


def test_seeds_of_another_run_are_not_taken(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*FINETUNE, "--seeds", "1,2", "--epochs", "1"]
    assert main(argv) == 0
    status, _, err = run([*argv, "--resume", "--lr", "1e-4"], capsys)
    assert status == 2 and "with other settings: lr=0.001, now 0.0001" in err
    Path("out/a.seeds.json").write_text("[]")
    status, _, err = run([*argv, "--resume"], capsys)
    assert status == 2 and "does not hold the accuracies of several seeds" in err


@pytest.mark.parametrize("text", ["1", "1,1", "1,x", "", "-1,2", "1,,2"])
def test_bad_seeds(workplace: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    status, _, err = run([*FINETUNE, f"--seeds={text}"], capsys)
    assert status == 2 and "--seeds" in err and err.count("\n") == 1
