"""How times grow: straight lines are found again, and the pictures are drawn."""

import re
from pathlib import Path

import pytest

from benchmarks import growth
from benchmarks.growth import BATCHES, CONTEXTS, LENGTHS, NEW_TOKENS, Size, Times

PNG = b"\x89PNG\r\n\x1a\n"


def peak_rate(what: str) -> float:
    """Return the rates of an imaginary machine: 20 GB/s, 100 GFLOP/s."""
    return 20e9 if what == "memory" else 100e9


@pytest.fixture
def contexts() -> Times:
    """A token takes 10 ms, and 2 us more for each position before it."""
    column: dict[Size, float] = {}
    for context in CONTEXTS:
        positions = range(context, context + NEW_TOKENS)
        column[context] = sum(10e-3 + 2e-6 * (position + 0.5) for position in positions)
    return {"causal float32": column, "causal int8": {key: s / 2 for key, s in column.items()}}


@pytest.fixture
def steps() -> Times:
    """A step takes 80 ms, and 1 ms more for each token, in long sentences 1.5 ms."""
    sizes: list[tuple[int, int]] = [*BATCHES, *LENGTHS]
    cost = {length: 1.5e-3 if length == 512 else 1e-3 for _, length in sizes}
    return {"causal float32": {(n, m): 80e-3 + cost[m] * n * m for n, m in sizes}}


def cells_of(lines: list[str], start: str) -> list[list[str]]:
    """Return the cells of the lines that start with this text."""
    found = [line for part in lines for line in part.split("\n") if line.startswith(start)]
    return [line.strip("| ").split(" | ") for line in found]


def test_the_line_of_a_tokens_time(contexts: Times) -> None:
    lines = growth.describe_contexts(contexts, peak_rate)
    ours, int8 = cells_of(lines, "| causal float32 | ") + cells_of(lines, "| causal int8 | ")
    # 8 layers, keys and values of 512 numbers of 4 bytes are 32 KiB, also with int8 weights.
    assert ours == ["causal float32", "10", "2", "32", "1.6"]
    assert int8 == ["causal int8", "5", "1", "32", "1.6"]


def test_the_row_compares_the_longest_context_with_the_shortest(contexts: Times) -> None:
    (row,) = cells_of(growth.describe_contexts(contexts, peak_rate), "| generate 75 after 949")
    expected = (10e-3 + 2e-6 * (16 + 37.5)) / (10e-3 + 2e-6 * (949 + 37.5))
    assert row[3:5] == [f"**{expected:.2f}**", "0.8"]
    assert float(row[5]) / float(row[6]) == pytest.approx(expected, abs=0.01)


def test_the_line_of_a_steps_time(steps: Times) -> None:
    lines = growth.describe_steps(steps, peak_rate, rounds=3)
    (row,) = cells_of(lines, "| causal float32")
    assert row[:3] == ["causal float32", "80", "1e+03"]
    # Eight layers have 8 (4 512^2 + 3 512 1376 + 2 512) weights, and the last norm 512.
    in_layers = 8 * (4 * 512**2 + 3 * 512 * 1376 + 2 * 512) + 512
    assert float(row[3]) == pytest.approx(6 * in_layers / 100e9 * 1e6, rel=0.005)
    assert row[4:] == ["1.5e+03"]
    text = " ".join(lines)
    assert "Medians of 3 rounds" in text
    assert re.search(r"at 512 tokens\s+they\s+are\s+17% of", text)


def test_a_table_has_a_line_for_each_size(steps: Times) -> None:
    lines = growth.make_table("batch", steps, 1e3)
    assert lines[0] == "| batch | causal float32 |" and len(lines) == 2 + 8
    assert lines[2] == "| 1 x 32 | 112 |"


def test_pictures_are_drawn(contexts: Times, steps: Times, tmp_path: Path) -> None:
    growth.draw_contexts(contexts, tmp_path)
    growth.draw_steps(steps, tmp_path)
    for name in (growth.CONTEXT_PICTURE, growth.STEP_PICTURE):
        assert (tmp_path / name).read_bytes().startswith(PNG)
