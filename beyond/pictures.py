"""Pictures for TensorBoard, drawn with NumPy: the confusion matrix.

A picture is an array (height, width, 3) of uint8 in RGB.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]
Ink = npt.NDArray[np.bool_]  # (height, width), true where there is ink
Colour = tuple[int, int, int]

MAX_LABELS = 40  # a matrix of more labels would be too large to read
LONGEST_WORD = 14  # characters; longer label words are cut off
SMALL, LARGE = 3, 4  # pixels per dot of a letter
LINE_HEIGHT = 36  # pixels, as all lengths here
MARGIN = 14
BLACK, GREY, WHITE = (20, 24, 32), (110, 116, 128), (255, 255, 255)
DARKEST = (8, 64, 129)  # a cell that has all examples of its row
LINE = (222, 226, 232)  # between two cells

# The letters, 5 pixels wide and 9 high; the last two rows are below the baseline.
CHARACTERS = (
    "abcdefghijklm",
    "nopqrstuvwxyz",
    "ABCDEFGHIJKLM",
    "NOPQRSTUVWXYZ",
    "0123456789%.,",
    "-_'/()+&:!?#~",
)
DRAWINGS = """
..... #.... ..... ....# ..... ..##. ..... #.... ..#.. ...#. #.... .##.. .....
..... #.... ..... ....# ..... .#..# ..... #.... ..... ..... #.... ..#.. .....
.###. #.##. .###. .##.# .###. .#... .#### #.##. .##.. ..##. #..#. ..#.. ##.#.
....# ##..# #...# #..## #...# ###.. #...# ##..# ..#.. ...#. #.#.. ..#.. #.#.#
.#### #...# #.... #...# ##### .#... #...# #...# ..#.. ...#. ##... ..#.. #.#.#
#...# #...# #...# #...# #.... .#... #...# #...# ..#.. ...#. #.#.. ..#.. #.#.#
.#### ####. .###. .#### .###. .#... .#### #...# .###. ...#. #..#. .###. #.#.#
..... ..... ..... ..... ..... ..... ....# ..... ..... #..#. ..... ..... .....
..... ..... ..... ..... ..... ..... .###. ..... ..... .##.. ..... ..... .....

..... ..... ..... ..... ..... ..... .#... ..... ..... ..... ..... ..... .....
..... ..... ..... ..... ..... ..... .#... ..... ..... ..... ..... ..... .....
#.##. .###. ####. .#### #.##. .#### ###.. #...# #...# #...# #...# #...# #####
##..# #...# #...# #...# ##..# #.... .#... #...# #...# #...# .#.#. #...# ...#.
#...# #...# #...# #...# #.... .###. .#... #...# #...# #.#.# ..#.. #...# ..#..
#...# #...# #...# #...# #.... ....# .#..# #..## .#.#. #.#.# .#.#. #...# .#...
#...# .###. ####. .#### #.... ####. ..##. .##.# ..#.. .#.#. #...# .#### #####
..... ..... #.... ....# ..... ..... ..... ..... ..... ..... ..... ....# .....
..... ..... #.... ....# ..... ..... ..... ..... ..... ..... ..... .###. .....

.###. ####. .###. ####. ##### ##### .###. #...# .###. ..### #...# #.... #...#
#...# #...# #...# #...# #.... #.... #...# #...# ..#.. ...#. #..#. #.... ##.##
#...# #...# #.... #...# #.... #.... #.... #...# ..#.. ...#. #.#.. #.... #.#.#
##### ####. #.... #...# ####. ####. #.### ##### ..#.. ...#. ##... #.... #.#.#
#...# #...# #.... #...# #.... #.... #...# #...# ..#.. ...#. #.#.. #.... #...#
#...# #...# #...# #...# #.... #.... #...# #...# ..#.. #..#. #..#. #.... #...#
#...# ####. .###. ####. ##### #.... .#### #...# .###. .##.. #...# ##### #...#
..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... .....
..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... .....

#...# .###. ####. .###. ####. .#### ##### #...# #...# #...# #...# #...# #####
##..# #...# #...# #...# #...# #.... ..#.. #...# #...# #...# #...# #...# ....#
##..# #...# #...# #...# #...# #.... ..#.. #...# #...# #...# .#.#. .#.#. ...#.
#.#.# #...# ####. #...# ####. .###. ..#.. #...# #...# #.#.# ..#.. ..#.. ..#..
#..## #...# #.... #.#.# #.#.. ....# ..#.. #...# #...# #.#.# .#.#. ..#.. .#...
#..## #...# #.... #..#. #..#. ....# ..#.. #...# .#.#. ##.## #...# ..#.. #....
#...# .###. #.... .##.# #...# ####. ..#.. .###. ..#.. #...# #...# ..#.. #####
..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... .....
..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... .....

.###. ..#.. .###. ##### ...#. ##### ..##. ##### .###. .###. ##..# ..... .....
#...# .##.. #...# ...#. ..##. #.... .#... ....# #...# #...# ##..# ..... .....
#..## ..#.. ....# ..#.. .#.#. ####. #.... ...#. #...# #...# ...#. ..... .....
#.#.# ..#.. ...#. ...#. #..#. ....# ####. ..#.. .###. .#### ..#.. ..... .....
##..# ..#.. ..#.. ....# ##### ....# #...# ..#.. #...# ....# .#... ..... .....
#...# ..#.. .#... #...# ...#. #...# #...# .#... #...# ...#. #..## .##.. .##..
.###. .###. ##### .###. ...#. .###. .###. .#... .###. .##.. #..## .##.. .##..
..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..#..
..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... .#...

..... ..... ..#.. ....# ...#. .#... ..... .##.. ..... ..#.. .###. .#.#. .....
..... ..... ..#.. ....# ..#.. ..#.. ..#.. #..#. .##.. ..#.. #...# .#.#. .....
..... ..... ..... ...#. .#... ...#. ..#.. #.#.. .##.. ..#.. ....# ##### .#...
##### ..... ..... ..#.. .#... ...#. ##### .#... ..... ..#.. ...#. .#.#. #.#.#
..... ..... ..... .#... .#... ...#. ..#.. #.#.# .##.. ..#.. ..#.. ##### ...#.
..... ..... ..... #.... ..#.. ..#.. ..#.. #..#. .##.. ..... ..... .#.#. .....
..... ..... ..... #.... ...#. .#... ..... .##.# ..... ..#.. ..#.. .#.#. .....
..... ##### ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... .....
..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... ..... .....
"""


def parse_font() -> dict[str, Ink]:
    """Return the drawing of each character as (9, 5), true where there is ink."""
    font = {" ": np.zeros((9, 5), dtype=bool)}
    for characters, band in zip(CHARACTERS, DRAWINGS.strip().split("\n\n"), strict=True):
        rows = [line.split(" ") for line in band.splitlines()]
        for number, character in enumerate(characters):
            font[character] = np.array([[dot == "#" for dot in row[number]] for row in rows])
    return font


FONT = parse_font()


def draw_text(text: str, scale: int) -> Ink:
    """Return a line of text as (9 * scale, width), true where there is ink."""
    columns = [np.pad(FONT[character], ((0, 0), (0, 1))) for character in text]
    ink = np.concatenate(columns or [np.zeros((9, 1), dtype=bool)], axis=1)
    return ink.repeat(scale, axis=0).repeat(scale, axis=1)


def drawable(word: str, label: int) -> str:
    """Return a label word that the font can draw, without accents and shortened.

    That is the label's number if the font has no drawing for one of the characters.
    """
    decomposed = unicodedata.normalize("NFKD", word)
    plain = "".join(c for c in decomposed if not unicodedata.combining(c)).strip()
    if not plain or any(character not in FONT for character in plain):
        return f"#{label}"
    return plain if len(plain) <= LONGEST_WORD else plain[: LONGEST_WORD - 2] + ".."


def paint(picture: Picture, ink: Ink, centre: tuple[int, int], colour: Colour) -> None:
    """Colour the pixels of a drawing around a centre (y, x) of a picture."""
    top, left = centre[0] - ink.shape[0] // 2, centre[1] - ink.shape[1] // 2
    picture[top : top + ink.shape[0], left : left + ink.shape[1]][ink] = colour


def draw_confusion(confusion: Sequence[Sequence[int]], label_names: Sequence[str]) -> Picture:
    """Draw a confusion matrix: the gold labels are the rows, the predictions the columns.

    A cell with a larger share of its row is darker, so the diagonal shows each label's recall.

    Args:
        confusion: counts; row: gold label, column: predicted label.
        label_names: the label words, at most `MAX_LABELS`.
    """
    # TensorBoard shows a picture at most 350 pixels wide and 210 high, and leaves out rows and
    # columns of pixels to get there. So letters have thick strokes, and space is saved elsewhere.
    words = [draw_text(drawable(name, i), SMALL) for i, name in enumerate(label_names)]
    counts = [[draw_text(str(count), LARGE) for count in row] for row in confusion]
    widest = max(word.shape[1] for word in words)
    width = max(*(count.shape[1] for row in counts for count in row), 60) + MARGIN
    height, size = LINE_HEIGHT + MARGIN, len(words)
    heads = words if widest <= width - MARGIN else [np.rot90(word) for word in words]
    head_height = max(head.shape[0] for head in heads)
    gold, predicted = draw_text("gold", SMALL), draw_text("predicted", SMALL)
    left = max(widest, gold.shape[1]) + 2 * MARGIN
    top = LINE_HEIGHT + head_height + 2 * MARGIN
    right = max(left + size * width, left + predicted.shape[1])
    picture = np.full((top + size * height + MARGIN, right + MARGIN, 3), WHITE, dtype=np.uint8)
    paint(picture, predicted, (LINE_HEIGHT // 2 + 4, (left + right) // 2), GREY)
    paint(picture, gold, (top - MARGIN - LINE_HEIGHT // 2, left // 2), GREY)
    picture[top : top + size * height + 2, left : left + size * width + 2] = LINE
    for i, head in enumerate(heads):
        bottom = top - MARGIN // 2 - head.shape[0] // 2
        paint(picture, head, (bottom, left + i * width + width // 2), BLACK)
        paint(picture, words[i], (top + i * height + height // 2, left // 2), BLACK)
        for j in range(size):
            share = confusion[i][j] / max(1, sum(confusion[i]))
            y, x = top + i * height, left + j * width
            picture[y + 2 : y + height, x + 2 : x + width] = shade(share)
            colour, centre = WHITE if share > 0.45 else BLACK, x + width // 2
            paint(picture, counts[i][j], (y + height // 2 + LARGE, centre), colour)
    return picture


def shade(share: float) -> npt.NDArray[np.uint8]:
    """Return the colour of a cell, from white at 0 to `DARKEST` at 1."""
    white, darkest = np.array(WHITE), np.array(DARKEST)
    return (white + share * (darkest - white)).round().astype(np.uint8)
