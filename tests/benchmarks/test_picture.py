"""The picture: an SVG whose dots and lines are where the differences are."""

import re
from xml.etree import ElementTree

import pytest

from benchmarks.quality.intervals import Difference
from benchmarks.quality.picture import (
    LABEL_WIDTH,
    LEAST_RANGE,
    MARGIN,
    PLOT_WIDTH,
    axis_range,
    draw,
    draw_panel,
    ticks,
)
from benchmarks.quality.plan import NAME_LENGTH, Plan
from benchmarks.quality.tables import make_tables
from tests.benchmarks.conftest import make_result, runs_of

NAME = "{http://www.w3.org/2000/svg}"
STEP = 0.06  # pixels: coordinates are rounded to .1
CHARACTER = 7.5  # pixels, with a font of 13; the plan's longest name has 6.8 in Chromium


def panel_of(*methods: tuple[str, Difference | None]) -> ElementTree.Element:
    parts = "".join(draw_panel(("a title", "dev", list(methods))))
    return ElementTree.fromstring(f"<g>{parts}</g>")


def places(panel: ElementTree.Element) -> dict[float, float]:
    """Return the x of each number on the axis."""
    found = {}
    for text in panel.iter("text"):
        if text.get("text-anchor") == "middle":
            found[float(text.text or "")] = float(text.get("x", ""))
    return found


def test_dots_and_interval_lie_on_the_axis() -> None:
    difference = Difference((0.02, 0.06), 0.04, 0.03)
    panel = panel_of(("a & b", difference))
    axis = places(panel)
    (low, high), (left, right) = (min(axis), max(axis)), (min(axis.values()), max(axis.values()))

    def value_at(x: float) -> float:
        return low + (x - left) / (right - left) * (high - low)

    slack = STEP * (high - low) / (right - left) * 2
    dots = [value_at(float(dot.get("cx", ""))) for dot in panel.iter("circle")]
    assert dots == pytest.approx([0.02, 0.06], abs=slack)
    (path,) = panel.iter("path")
    (x,) = re.findall(r"^M([\d.]+) ", path.get("d", ""))
    assert value_at(float(x)) == pytest.approx(0.04, abs=slack)
    y = {dot.get("cy") for dot in panel.iter("circle")}
    lines = [line for line in panel.iter("line") if {line.get("y1")} == {line.get("y2")} == y]
    (interval,) = lines
    ends = [value_at(float(interval.get(name, ""))) for name in ("x1", "x2")]
    assert ends == pytest.approx([0.01, 0.07], abs=slack)
    assert "a & b" in [text.text for text in panel.iter("text")]


def test_a_wide_interval_ends_at_the_edge_without_a_bar() -> None:
    panel = panel_of(("x", Difference((0.02, 0.03), 0.025, 0.5)))
    xs = [float(line.get(name, "")) for line in panel.iter("line") for name in ("x1", "x2")]
    assert min(xs) == LABEL_WIDTH and max(xs) == LABEL_WIDTH + PLOT_WIDTH
    coloured = [line for line in panel.iter("line") if line.get("stroke") == "#084081"]
    assert len(coloured) == 1  # no bars
    assert len(list(panel.iter("circle"))) == 2


def test_a_method_that_is_not_measured_says_so() -> None:
    for difference in (0.1, -0.1):  # zero is at the left, or at the right
        panel = panel_of(("x", Difference((difference,), difference, None)), ("y", None))
        text = list(panel.iter("text"))[-1]
        assert text.text == "not measured"
        assert LABEL_WIDTH <= float(text.get("x", "")) <= LABEL_WIDTH + PLOT_WIDTH - 100
        assert len(list(panel.iter("circle"))) == 1


@pytest.mark.parametrize("size", [1e-9, 0.003, 0.02, 0.4, 1.0])
def test_the_axis_holds_all_dots_and_zero(size: float) -> None:
    differences = [
        Difference((size, -size / 3), size / 3, size * 9),
        Difference((size,), size, None),
    ]
    low, high = axis_range(differences)
    assert low < -size / 3 and size < high and high - low >= LEAST_RANGE
    numbers = ticks(low, high)
    assert 3 <= len(numbers) <= 9 and all(low <= number <= high for number in numbers)


def test_the_longest_name_fits_to_the_left_of_the_axis() -> None:
    panel = panel_of(("n" * NAME_LENGTH, Difference((0.02, 0.06), 0.04, 0.03)))
    (name,) = [text for text in panel.iter("text") if text.get("text-anchor") == "end"]
    assert float(name.get("x", "")) + MARGIN >= NAME_LENGTH * CHARACTER


def test_the_picture_has_a_panel_for_each_split_that_is_measured(plan: Plan) -> None:
    runs = {stage.name: runs_of(plan, stage.name) for stage in plan.stages}
    results = [make_result(run, 0.5 + 0.01 * run.seed, 0.4) for run in runs["full"]]
    root = ElementTree.fromstring(draw(make_tables(plan, runs, results)))
    titles = [text.text for text in root.iter(f"{NAME}text") if text.get("font-weight")]
    assert titles == [
        "full: tiny on sst, dev, against plain",
        "full: tiny on sst, test, against plain",
        "full: tiny on cfimdb, dev, against plain",
    ]
    assert draw(make_tables(plan, runs, [])) == ""


def test_the_picture_is_as_large_as_its_panels(plan: Plan) -> None:
    """Every text lies inside."""
    runs = {stage.name: runs_of(plan, stage.name) for stage in plan.stages}
    results = [make_result(run, 0.5 + 0.01 * run.seed, 0.4) for run in runs["full"]]
    root = ElementTree.fromstring(draw(make_tables(plan, runs, results)))
    bottom = 0.0
    for group in (root, *root.findall(f"{NAME}g")):
        (top,) = re.findall(r"^translate\(\d+ (\d+)\)$", group.get("transform", "translate(0 0)"))
        for text in group.findall(f"{NAME}text"):
            y = float(top) + float(text.get("y", ""))
            assert 10 <= y <= float(root.get("height", ""))
            bottom = max(bottom, y)
    assert float(root.get("height", "")) - bottom < 40  # no empty space below
