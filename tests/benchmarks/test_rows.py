"""Which comparisons there are: their aims, and which are left out where they cannot be made."""

from pathlib import Path

import pytest
import torch

from benchmarks.rows import GREEDY, GROUPS, choose, notes
from benchmarks.table import Group
from beyond.runtime import has_bfloat16

CPU = torch.device("cpu")
FOLDER = Path("folder")


def cells(groups: list[Group]) -> list[tuple[str, str, str]]:
    """Return work, side and baseline of every row."""
    return [
        (f"{group.job.task} {group.job.data} {group.job.model}", row.side, row.baseline)
        for group in groups
        for row in group.rows
    ]


def test_aims() -> None:
    aims = {
        (group.job.task, group.job.data, bool(group.job.model), row.side, row.baseline): row.target
        for group in GROUPS
        for row in group.rows
    }
    generate = ("generate", GREEDY, False)
    finetune = ("finetune", "sst", False)
    expected = {
        (*generate, "causal float32", "llama2.c float32"): 0.75,
        (*generate, "compiled float32", "llama2.c float32"): 0.95,
        (*generate, "causal int8", "llama2.c int8"): 1.0,
        (*generate, "compiled int8", "llama2.c int8"): 1.2,
        (*generate, "causal float32", "Hugging Face float32"): 2.0,
        (*generate, "causal bfloat16", "Hugging Face bfloat16"): 1.6,
        (*finetune, "reference float32", "Hugging Face float32"): 1.09,  # .92 of the time
        (*finetune, "causal float32", "Hugging Face float32"): 2.4,
        (*finetune, "causal bfloat16", "Hugging Face float32"): 3.5,
        ("generate", "100 after 1", True, "causal bfloat16", "Hugging Face bfloat16"): 1.5,
    }
    assert {key: aims[key] for key in expected} == expected


def test_rows_without_their_peer_are_left_out_and_said_to_be() -> None:
    everything = choose(CPU, FOLDER, FOLDER, True, "generate")
    without = choose(CPU, None, None, False, "generate")
    missing = set(cells(everything)) - set(cells(without))
    assert {str(FOLDER) in work for work, *_ in missing} == {True, False}
    assert all(
        str(FOLDER) in work or "llama2.c" in baseline or "compiled" in side
        for work, side, baseline in missing
    )
    assert not any(name in str(cells(without)) for name in ("llama2.c", "compiled", str(FOLDER)))
    text = " ".join(notes(CPU, None, None, False))
    assert all(name in text for name in ("--llama2c FOLDER", "--smollm2 FOLDER", "compiled"))
    assert all("Left out" in line for line in notes(CPU, None, None, False))


def test_no_note_about_rows_that_are_there() -> None:
    left_out = notes(CPU, FOLDER, FOLDER, True)
    assert all("bfloat16" in line for line in left_out)
    assert bool(left_out) != has_bfloat16(CPU)


def test_products_in_bfloat16_need_units_for_it() -> None:
    """Without them they would take up to 100 times as long; reading such weights is fast."""
    rows = cells(choose(CPU, FOLDER, FOLDER, True, "bfloat16"))
    tasks = {task.split(" ")[0] for task, _, _ in rows}
    assert tasks == ({"generate", "prompt", "finetune"} if has_bfloat16(CPU) else {"generate"})


@pytest.mark.parametrize(
    ("only", "count"), [("finetune sst", 1), ("Face without cache", 1), ("no such row", 0)]
)
def test_only_the_rows_that_contain_a_text(only: str, count: int) -> None:
    assert len(choose(CPU, None, None, False, only)) == count


def test_the_folder_takes_the_place_of_the_models_name() -> None:
    chosen = choose(CPU, None, Path("demo"), False, "")
    assert [group.job.model for group in chosen if group.job.model] == ["demo"]
