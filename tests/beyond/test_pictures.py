"""Pictures: the letters, and the confusion matrix."""

import numpy as np
import pytest

from beyond.pictures import (
    CHARACTERS,
    DARKEST,
    FONT,
    LARGE,
    LINE,
    LONGEST_WORD,
    MAX_LABELS,
    Picture,
    draw_confusion,
    draw_text,
    drawable,
    shade,
)

DIGITS = "0123456789"


def read_numbers(picture: Picture, scale: int) -> list[str]:
    """Read the numbers that a picture shows with letters of one size, line by line.

    A digit is found where all pixels of its dots have one colour and all others another one.
    """
    # The first channel and the second one tell any two colours of the picture apart.
    colours = picture[..., 0].astype(np.int32) * 256 + picture[..., 1]
    found = []
    for digit in DIGITS:
        ink = np.pad(draw_text(digit, scale), ((0, 0), (scale, 0)))  # an empty column before it
        height, width = (a - b + 1 for a, b in zip(colours.shape, ink.shape, strict=True))
        dot = tuple(np.argwhere(ink)[0])

        def shifted(y: int, x: int, shape: tuple[int, int] = (height, width)) -> np.ndarray:
            return colours[y : y + shape[0], x : x + shape[1]]

        colour, paper = shifted(*dot), shifted(0, 0)
        same = colour != paper
        for (y, x), is_ink in np.ndenumerate(ink):
            same &= shifted(y, x) == (colour if is_ink else paper)
        found += [(int(y), int(x), digit) for y, x in np.argwhere(same)]
    lines: dict[int, list[tuple[int, str]]] = {}
    for y, x, digit in sorted(found):
        lines.setdefault(y, []).append((x, digit))
    numbers = []
    for _, line in sorted(lines.items()):
        last = None
        for x, digit in line:
            if last is not None and x - last == 6 * scale:
                numbers[-1] += digit
            else:
                numbers.append(digit)
            last = x
    return numbers


def test_the_font_has_all_letters_and_digits_each_with_its_own_drawing() -> None:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    assert set(letters) | {x.upper() for x in letters} | set(DIGITS) <= set(FONT)
    drawings = {drawing.tobytes() for drawing in FONT.values()}
    assert len(drawings) == len(FONT) == len("".join(CHARACTERS)) + 1  # and the space
    assert all(drawing.shape == (9, 5) for drawing in FONT.values())


def test_text_is_drawn_at_a_scale() -> None:
    small, large = draw_text("a1", 1), draw_text("a1", 3)
    assert small.shape == (9, 12) and large.shape == (27, 36)
    assert (large[1::3, 1::3] == small).all() and large.sum() == 9 * small.sum()


@pytest.mark.parametrize(
    ("word", "drawn"),
    [
        ("good", "good"),
        ("Très déçu", "Tres decu"),
        ("とても良い", "#7"),
        ("  ", "#7"),
        ("abc\ndef", "#7"),
        ("somewhat-negative", "somewhat-neg.."),
        ("exactly14chars", "exactly14chars"),
    ],
)
def test_a_label_word_that_cannot_be_drawn_becomes_its_number(word: str, drawn: str) -> None:
    assert drawable(word, 7) == drawn and len(drawn) <= LONGEST_WORD


def test_the_darker_a_cell_the_larger_its_share() -> None:
    assert shade(0).tolist() == [255, 255, 255] and shade(1).tolist() == list(DARKEST)
    levels = [shade(i / 10).sum() for i in range(11)]
    assert levels == sorted(levels, reverse=True) and len(set(levels)) == 11


def test_a_confusion_matrix_shows_counts_by_gold_row_and_predicted_column() -> None:
    confusion = [[30, 9, 1], [12, 250, 3], [0, 45, 678]]
    picture = draw_confusion(confusion, ["bad", "average", "good"])
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    expected = [str(count) for row in confusion for count in row]
    assert read_numbers(picture, LARGE) == expected


def test_a_cell_is_coloured_by_its_share_of_the_row() -> None:
    picture = draw_confusion([[0, 5], [0, 0]], ["bad", "good"])
    dark = (picture == DARKEST).all(axis=2)
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    line = (picture == LINE).all(axis=2)
    middle = np.flatnonzero(line.any(0))
    # The first row's second cell: right of the middle line of the matrix.
    assert columns[0] > (middle[0] + middle[-1]) / 2 - 5
    grid = np.flatnonzero(line.any(1))
    assert rows[-1] < (grid[0] + grid[-1]) / 2 + 5 and rows[0] < grid[0] + 5


@pytest.mark.parametrize("labels", [2, 3, MAX_LABELS])
def test_a_picture_of_any_size_has_its_words_and_numbers_inside(labels: int) -> None:
    """Also with long words and large counts; drawing outside the picture raises an error."""
    names = [f"{'x' * (i % 20)}{i}" for i in range(labels)]
    for count in (0, 10**9) if labels < 10 else (10**9,):
        picture = draw_confusion([[count] * labels] * labels, names)
        for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
            assert (edge == 255).all()
