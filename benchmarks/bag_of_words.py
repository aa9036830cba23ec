"""A bag-of-words baseline: logistic regression on the words of a sentence, in any order.

    uv run python -m benchmarks.bag_of_words [TRAIN DEV TEST]

It uses three kinds of features: which words a sentence has, TF-IDF of words, and TF-IDF of words
and bigrams. For each kind the strength of the regularisation is chosen by cross-validation on the
training sentences. The files have a line `label ||| sentence` each; default: those of the demo.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from beyond.program import exit_status
from utils import OneLineParser, parse_example, read_lines

PROGRAM = "python -m benchmarks.bag_of_words"
SPLITS = ("train", "dev", "test")
DEMO = Path(__file__).parent.parent / "data" / "demo"
STRENGTHS = (0.03, 0.1, 0.3, 1, 3, 10, 30)  # inverse of the regularisation
FOLDS = 5  # of the cross-validation
FEATURES = {
    "words": lambda: CountVectorizer(binary=True),
    "TF-IDF of words": lambda: TfidfVectorizer(sublinear_tf=True),
    "TF-IDF of words and bigrams": lambda: TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)),
}


def read_split(path: str | Path) -> tuple[list[str], list[int]]:
    """Return the sentences of a data file and their labels."""
    lines = enumerate(read_lines(path), start=1)
    labels, sentences = zip(*(parse_example(line, path, i) for i, line in lines), strict=True)
    return list(sentences), list(labels)


def accuracies(files: Sequence[str | Path], features: str) -> dict[str, float]:
    """Train on the first of three files, and return the accuracy on the others, dev and test.

    Args:
        files: paths of the training, dev and test sentences.
        features: a key of `FEATURES`.

    Raises:
        FileNotFoundError, ValueError: a file cannot be used.
    """
    splits = {name: read_split(path) for name, path in zip(SPLITS, files, strict=True)}
    pipeline = make_pipeline(FEATURES[features](), LogisticRegression(max_iter=2000))
    search = GridSearchCV(pipeline, {"logisticregression__C": STRENGTHS}, cv=FOLDS)
    search.fit(*splits.pop("train"))
    return {name: search.score(*split) for name, split in splits.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(PROGRAM, lambda: run(argv), "the rest is not computed")


def run(argv: Sequence[str] | None) -> int:
    """Read the command line, and print the accuracies with each kind of features."""
    parser = OneLineParser(prog=PROGRAM, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", help="train, dev and test (default: the demo's)")
    files = parser.parse_args(argv).files or [DEMO / f"{name}.txt" for name in SPLITS]
    if len(files) != len(SPLITS):
        raise ValueError(f"expected three files, train, dev and test; found {len(files)}")
    for features in FEATURES:
        scores = accuracies(files, features)
        described = ", ".join(f"{name} acc :: {score:.3f}" for name, score in scores.items())
        print(f"{features}: {described}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
