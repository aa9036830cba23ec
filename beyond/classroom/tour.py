"""The tour: a page and pictures that follow one sentence through the demo model.

`stops/` runs the model, checks each step that the page shows, and fills in the template. So the
page cannot disagree with the program; a test compares it with a new run.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from beyond.classroom.stops.layer import open_layer
from beyond.classroom.stops.next_token import (
    DISTANCES,
    attend,
    describe_model,
    embed,
    feed,
    predict,
    turn,
)
from beyond.classroom.stops.tasks import ask, train
from beyond.classroom.stops.template import ROOT, fill
from beyond.classroom.stops.walk import Walk, layers_of
from llama import load_pretrained
from tokenizer import Tokenizer
from utils import OneLineParser, is_text, open_atomically, prepare_output, read_label_names

TEMPLATE = Path(__file__).parent / "stops" / "tour.md"
PAGE = "tour.md"
PICTURES = "tour"  # the folder of the pictures, beside the page
SENTENCE = "This is a delightfully funny"
FEWEST, MOST = 3, 12  # tokens of a sentence; more would make the pictures too wide


def main(argv: Sequence[str]) -> int:
    """Run the command `tour`; returns the exit status.

    Raises:
        ValueError, OSError: a bad argument, or a file cannot be written.
    """
    parser = OneLineParser(
        prog="python -m beyond.classroom tour",
        description="Write a page that follows one sentence through the demo model.",
    )
    parser.add_argument(
        "--sentence",
        default=SENTENCE,
        help=f"a sentence of {FEWEST} to {MOST} tokens (default: {SENTENCE!r})",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "docs",
        help=f"the folder of {PAGE} and its pictures (default: docs)",
    )
    args = parser.parse_args(argv)
    if not is_text(args.sentence) or not args.sentence.isprintable():
        raise ValueError("--sentence: expected one line of UTF-8 text")
    for path in tour(args.sentence, args.output):
        print(f"Wrote {path}.")
    return 0


def tour(sentence: str, folder: Path) -> list[Path]:
    """Write the page and its pictures into a folder; returns their paths.

    Raises:
        ValueError: the sentence has too few or too many tokens.
        OSError: a file cannot be written.
    """
    files = build_tour(sentence)
    for name, content in files.items():
        prepare_output(folder / name)
        with open_atomically(folder / name) as file:
            file.write(content)
    return [folder / name for name in files]


def build_tour(sentence: str = SENTENCE) -> dict[str, str]:
    """Run the demo model on a sentence; returns the page and its pictures, by relative path.

    Raises:
        ValueError: the sentence has too few or too many tokens.
    """
    walk = start_walk(sentence)
    with torch.no_grad():
        rows = walk.llama.tok_embeddings.weight[walk.ids]
        opened = open_layer(layers_of(walk.llama)[0], rows)
        unmasked = open_layer(layers_of(walk.unmasked)[0], rows)
        places = {
            **describe_model(walk),
            **embed(walk),
            **turn(walk, opened),
            **attend(walk, opened, unmasked),
            **feed(walk, opened),
            **predict(walk),
            **ask(walk),
            **train(walk),
        }
    page = fill(TEMPLATE.read_text(encoding="utf-8"), places)
    return {PAGE: page, **{f"{PICTURES}/{name}": svg for name, svg in walk.pictures.items()}}


def start_walk(sentence: str) -> Walk:
    """Load the demo model, which must be able to see the sentence.

    Raises:
        ValueError: the sentence has too few or too many tokens.
    """
    demo = ROOT / "data" / "demo"
    # 1 + the highest position that the tour uses
    length = max(MOST + 1, 1 + max(map(max, DISTANCES)))
    walk = Walk(
        llama=load_pretrained(demo / "model.pt", causal=True, dropout=0.0),
        unmasked=load_pretrained(demo / "model.pt", causal=False, dropout=0.0),
        tokenizer=Tokenizer(tokenizer_model=demo / "tokenizer.model"),
        label_names=read_label_names(demo / "label-mapping.json"),
        sentence=sentence,
    )
    assert walk.llama.config.max_seq_len >= length
    if not FEWEST <= len(walk.ids) <= MOST:
        raise ValueError(
            f"--sentence: {sentence!r} has {len(walk.ids)} tokens with BOS; the tour needs "
            f"{FEWEST} to {MOST}"
        )
    return walk
