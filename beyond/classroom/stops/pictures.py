"""The tour's pictures, as SVG: rotated pairs, attention weights, and the gate of SwiGLU.

Each picture brings its own background and has colours for light and dark themes. Coordinates are
rounded to a tenth of a pixel.
"""

import math
from collections.abc import Sequence
from html import escape

from torch import Tensor

STYLE = """<style>
text { font-family: ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace; font-size: 13px }
.paper { fill: #ffffff } .ink { fill: #1f2328 } .soft { fill: #59636e } .light { fill: #ffffff }
.blue { fill: #0969da } .shade { fill: #0969da } .orange { fill: #bc4c00 }
.grid { stroke: #d1d9e0; fill: none }
.hand { stroke: #0969da } .last { stroke: #bc4c00 } .curve { stroke: #59636e; fill: none }
@media (prefers-color-scheme: dark) {
  .paper { fill: #0d1117 } .ink { fill: #e6edf3 } .soft { fill: #9198a1 }
  .blue { fill: #4493f8 } .shade { fill: #1f6feb } .orange { fill: #f0883e }
  .grid { stroke: #3d444d } .hand { stroke: #4493f8 } .last { stroke: #f0883e }
  .curve { stroke: #9198a1 }
}
</style>"""
MIDDLE, END = ' text-anchor="middle"', ' text-anchor="end"'
LONGEST_PIECE = 10  # characters; longer pieces are cut off
RADIUS = 70  # of a dial, in pixels, as all lengths here
DIAL = 210  # the width of a dial with its margins
CELL = 42  # of a table of weights
LETTER = 8  # the width of a letter


def number(value: float) -> str:
    """Write a coordinate."""
    return f"{value:.1f}"


def text(x: float, y: float, content: str, kind: str = "ink", more: str = "") -> str:
    """Draw a line of text that starts at (x, y), on its baseline, unless `more` says otherwise."""
    return f'<text class="{kind}" x="{number(x)}" y="{number(y)}"{more}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str, more: str = "") -> str:
    """Draw a line between two points."""
    ends = f'x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"'
    return f'<line class="{kind}" {ends}{more}/>'


def circle(x: float, y: float, radius: float, kind: str, more: str = "") -> str:
    """Draw a circle around a point."""
    return f'<circle class="{kind}" cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"{more}/>'


def picture(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """Put the parts of a picture together, on a background with round corners."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img">'
    )
    paper = f'<rect class="paper" width="{width}" height="{height}" rx="8"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", STYLE, paper, *parts, "</svg>\n"])


def shorten(piece: str) -> str:
    """Cut off the end of a long piece."""
    return piece if len(piece) <= LONGEST_PIECE else piece[: LONGEST_PIECE - 1] + "…"


def draw_angles(pairs: Sequence[int], turned: Tensor) -> str:
    """Draw a dial for each pair of features, with a hand for each position.

    Args:
        pairs: the numbers of the pairs.
        turned: (seq, len(pairs), 2), the pair's even and odd feature at each position.
    """
    parts = []
    for column, pair in enumerate(pairs):
        x, y = DIAL * column + DIAL / 2, 48 + RADIUS + 18
        title = f"pair {pair}: features {2 * pair}, {2 * pair + 1}"
        parts += [text(x, 28, title, more=MIDDLE), circle(x, y, RADIUS, "grid")]
        angles = [math.atan2(odd, even) for even, odd in turned[:, column].tolist()]
        last = len(angles) - 1
        labelled = -math.inf  # the angle of the last label, so that labels do not overlap
        for position, angle in enumerate(angles):
            tip_x, tip_y = x + RADIUS * math.cos(angle), y - RADIUS * math.sin(angle)
            kind, dot = ("last", "orange") if position == last else ("hand", "blue")
            parts.append(line(x, y, tip_x, tip_y, kind, ' stroke-width="2"'))
            parts.append(circle(tip_x, tip_y, 4, dot))
            if abs(angle - labelled) > 0.25 or position == last:
                reach = RADIUS + (30 if abs(angle - labelled) <= 0.25 else 15)
                label_x, label_y = x + reach * math.cos(angle), y - reach * math.sin(angle) + 4.5
                parts.append(text(label_x, label_y, str(position), dot, MIDDLE))
                labelled = angle
        turn = math.remainder(angles[1] - angles[0], math.tau)
        below = f"{math.degrees(turn):.2f}° per position"
        parts.append(text(x, y + RADIUS + 46, below, "soft", MIDDLE))
    return picture(DIAL * len(pairs), 270, "Pairs of a query, turned by position", parts)


def draw_weights(pieces: Sequence[str], without: Tensor, masked: Tensor) -> str:
    """Draw two tables of attention weights (seq, seq) beside each other, without and with mask."""
    size = len(pieces) * CELL
    margin = 24 + LETTER * max(len(shorten(piece)) for piece in pieces)  # with room for a piece
    parts = []
    tables = (("without the mask", without), ("with the mask", masked))
    for number_of_table, (title, weights) in enumerate(tables):
        left, top = margin + number_of_table * (margin + size), 28 + margin
        parts.append(text(left + size / 2, 26, title, more=MIDDLE))
        for i, piece in enumerate(map(shorten, pieces)):
            middle = (i + 0.5) * CELL
            x, y = left + middle + 4.5, top - 8.0
            turn = f' transform="rotate(-90 {number(x)} {number(y)})"'
            parts.append(text(x, y, piece, "soft", turn))
            parts.append(text(left - 8, top + middle + 4.5, piece, more=END))
            for j, weight in enumerate(weights[i].tolist()):
                parts += draw_weight(left + j * CELL, top + i * CELL, weight)
    title = "Attention weights of one head, without the causal mask and with it"
    return picture(2 * (margin + size) + 16, margin + size + 44, title, parts)


def draw_weight(x: float, y: float, weight: float) -> list[str]:
    """Draw one cell of a table of weights: the larger the weight, the stronger its colour."""
    place = f'x="{number(x)}" y="{number(y)}" width="{CELL}" height="{CELL}"'
    cell = f'<rect class="grid" {place}/>'
    if weight == 0:  # closed by the mask
        return [cell]
    shade = f'<rect class="shade" {place} fill-opacity="{weight:.3f}"/>'
    kind = "light" if weight > 0.6 else "ink"
    return [shade, cell, text(x + CELL / 2, y + CELL / 2 + 4.5, f"{weight:.2f}", kind, MIDDLE)]


def draw_silu(gates: Sequence[float]) -> str:
    """Draw silu, with a dot for each of a token's gates."""
    most = max(3.0, math.ceil(max(map(abs, gates))))  # both axes end here
    width, height, margin = 560, 320, 40
    scale = (width - 2 * margin) / (2 * most)
    lowest = 0.5  # silu's minimum is -0.28
    rise = (height - 2 * margin) / (most + lowest)

    def x(z: float) -> float:
        return width / 2 + scale * z

    def y(value: float) -> float:
        return height - margin - rise * (value + lowest)

    def silu(z: float) -> float:
        return z / (1 + math.exp(-z))

    steps = [most * (step / 50 - 1) for step in range(101)]
    points = " ".join(f"{number(x(z))},{number(y(silu(z)))}" for z in steps)
    parts = [
        line(margin, y(0), width - margin, y(0), "grid"),
        line(x(0), margin, x(0), y(-lowest), "grid"),
        f'<polyline class="curve" stroke-width="2" points="{points}"/>',
        text(width - margin, y(0) - 10, "z = w1 x, the gate", "soft", END),
        text(x(0) + 8, margin + 4, "silu(z)", "soft"),
    ]
    for tick in (-most, -most / 2, most / 2, most):
        parts.append(line(x(tick), y(0) - 3, x(tick), y(0) + 3, "grid"))
        parts.append(text(x(tick), y(-lowest) + 14, f"{tick:g}", "soft", MIDDLE))
    for tick in (most / 2, most):
        parts.append(text(x(0) - 8, y(tick) + 4.5, f"{tick:g}", "soft", END))
    dots = [circle(x(z), y(silu(z)), 3.5, "blue", ' fill-opacity="0.6"') for z in gates]
    return picture(width, height, "silu, and the gates of one token", [*parts, *dots])
