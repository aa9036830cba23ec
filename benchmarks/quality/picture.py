"""A picture: for each method a dot per seed and the interval of the mean, as an SVG file.

The horizontal axis is the difference in accuracy from the baseline, which is the line at 0.
"""

import html
import math
from collections.abc import Iterator, Sequence

from benchmarks.quality.intervals import Difference
from benchmarks.quality.tables import Table

# All lengths are pixels.
LABEL_WIDTH, PLOT_WIDTH, MARGIN = 290, 480, 24
ROW, HEAD, FOOT = 26, 44, 40  # heights: of a method, above a panel, and of its axis
LINE = 18  # height of a line of the legend
FONT = "font-family='system-ui, sans-serif'"
COLOURS = {"dev": "#084081", "test": "#c2410c"}
LEAST_RANGE = 0.02  # of the axis, so that tiny differences do not look large
LEGEND = (
    "Difference in accuracy from the baseline. Dots: seeds. Diamond: their mean.",
    "Line: 95% interval of the mean; without an end bar it extends beyond the plot.",
)
Panel = tuple[str, str, list[tuple[str, Difference | None]]]  # title, split, methods


def draw(tables: Sequence[Table]) -> str:
    """Return the SVG of the tables, one panel per split; "" if there is nothing to show."""
    panels = [panel for table in tables for panel in panels_of(table)]
    if not panels:
        return ""
    width = LABEL_WIDTH + PLOT_WIDTH + 2 * MARGIN
    heights = [HEAD + ROW * len(methods) + FOOT for _, _, methods in panels]
    parts = [
        f"<text x='{MARGIN}' y='{MARGIN + LINE * i}' fill='#6b7280'>{line}</text>"
        for i, line in enumerate(LEGEND)
    ]
    top = MARGIN + LINE * len(LEGEND)
    for panel, height in zip(panels, heights, strict=True):
        parts += [f"<g transform='translate({MARGIN} {top})'>", *draw_panel(panel), "</g>"]
        top += height
    size = f"width='{width}' height='{top}' viewBox='0 0 {width} {top}'"
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' {size} {FONT} font-size='13'>",
            "<rect width='100%' height='100%' fill='white'/>",
            *parts,
            "</svg>",
            "",
        ]
    )


def panels_of(table: Table) -> Iterator[Panel]:
    """Yield the panels of a table: those of a split in which a method differs from the baseline."""
    for split in table.splits:
        others = [row for row in table.rows if row.name != table.stage.baseline]
        methods = [(row.name, row.difference(split)) for row in others]
        if any(difference is not None for _, difference in methods):
            title = f"{table.stage.name}: {table.title}, {split}, against {table.stage.baseline}"
            yield title, split, methods


def draw_panel(panel: Panel) -> Iterator[str]:
    """Yield the elements of a panel, whose upper left corner is at (0, 0)."""
    title, split, methods = panel
    colour, bottom = COLOURS[split], HEAD + ROW * len(methods)
    low, high = axis_range([difference for _, difference in methods if difference])

    def x_of(value: float) -> float:
        share = (value - low) / (high - low)
        return round(LABEL_WIDTH + PLOT_WIDTH * min(max(share, 0.0), 1.0), 1)

    yield f"<text x='0' y='20' font-weight='600'>{html.escape(title)}</text>"
    for value in ticks(low, high):
        x = x_of(value)
        strong = "#111827" if abs(value) < 1e-9 else "#e5e7eb"
        yield f"<line x1='{x}' y1='{HEAD - 8}' x2='{x}' y2='{bottom}' stroke='{strong}'/>"
        yield f"<text x='{x}' y='{bottom + 18}' text-anchor='middle'>{show(value)}</text>"
    for i, (name, difference) in enumerate(methods):
        y = HEAD + ROW * i + ROW // 2 - 4
        place = f"x='{LABEL_WIDTH - 12}' y='{y + 4}' text-anchor='end'"
        yield f"<text {place}>{html.escape(name)}</text>"
        if difference is None:
            yield f"<text x='{LABEL_WIDTH + 8}' y='{y + 4}' fill='#6b7280'>not measured</text>"
            continue
        if difference.interval:
            left, right = map(x_of, difference.interval)
            yield f"<line x1='{left}' y1='{y}' x2='{right}' y2='{y}' stroke='{colour}'/>"
            for x, value in ((left, difference.interval[0]), (right, difference.interval[1])):
                if low <= value <= high:  # an end outside the axis has no bar
                    yield f"<line x1='{x}' y1='{y - 5}' x2='{x}' y2='{y + 5}' stroke='{colour}'/>"
        for value in difference.values:
            place = f"cx='{x_of(value)}' cy='{y}' r='3.5'"
            yield f"<circle {place} fill='{colour}' fill-opacity='.45'/>"
        x = x_of(difference.mean)
        yield f"<path d='M{x} {y - 7}l4 7l-4 7l-4 -7z' fill='{colour}'/>"


def axis_range(differences: Sequence[Difference]) -> tuple[float, float]:
    """Return the ends of the axis: all dots and 0, and what fits of the intervals.

    Intervals make the axis at most twice as long: with few seeds one may be much wider than the
    dots are apart.
    """
    dots = [value for difference in differences for value in (*difference.values, 0.0)]
    low, high = min(dots), max(dots)
    size = max(high - low, LEAST_RANGE)
    ends = [end for difference in differences for end in difference.interval or ()]
    low = max(min([low, *ends]), low - size / 2)
    high = min(max([high, *ends]), high + size / 2)
    rest = max(LEAST_RANGE - (high - low), 0.1 * (high - low)) / 2
    return low - rest, high + rest


def ticks(low: float, high: float) -> list[float]:
    """Return three to nine round numbers within an axis."""
    raw = (high - low) / 8
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def show(value: float) -> str:
    """Return a difference with a sign; 0 has none."""
    return "0" if abs(value) < 1e-9 else f"{value:+.3g}"
