"""Classify sentences by the words in them: what a model has to beat that understands more.

    uv run python -m benchmarks.counting_words [--data FOLDER]

Logistic regression on three kinds of features: which words a sentence has, TF-IDF of words, and
TF-IDF of words and pairs of words. Each kind chooses the strength of its regularisation by
cross-validation on the training sentences. `FOLDER` has train.txt, dev.txt and test.txt.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from utils import OneLineParser, describe_error, parse_example, read_lines

PROGRAM = "python -m benchmarks.counting_words"
DEMO = Path(__file__).parent.parent / "data" / "demo"
STRENGTHS = (0.03, 0.1, 0.3, 1, 3, 10, 30)  # inverse of the regularisation
FOLDS = 5  # of the cross-validation
FEATURES = {
    "words": lambda: CountVectorizer(binary=True),
    "TF-IDF of words": lambda: TfidfVectorizer(sublinear_tf=True),
    "TF-IDF of words and pairs": lambda: TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)),
}


def read_split(path: Path) -> tuple[list[str], list[int]]:
    """Return the sentences of a data file and their labels."""
    lines = enumerate(read_lines(path), start=1)
    labels, sentences = zip(*(parse_example(line, path, i) for i, line in lines), strict=True)
    return list(sentences), list(labels)


def accuracies(folder: Path, features: str) -> dict[str, float]:
    """Train on a folder's train.txt, and return the accuracy on dev and test, by split.

    Args:
        folder: has train.txt, dev.txt and test.txt.
        features: a key of `FEATURES`.

    Raises:
        FileNotFoundError, ValueError: a file cannot be used.
    """
    splits = {name: read_split(folder / f"{name}.txt") for name in ("train", "dev", "test")}
    pipeline = make_pipeline(FEATURES[features](), LogisticRegression(max_iter=2000))
    search = GridSearchCV(pipeline, {"logisticregression__C": STRENGTHS}, cv=FOLDS)
    search.fit(*splits.pop("train"))
    return {name: search.score(*split) for name, split in splits.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = OneLineParser(prog=PROGRAM, description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--data", type=Path, default=DEMO, metavar="FOLDER", help="default: data/demo"
    )
    try:
        args = parser.parse_args(argv)
        for features in FEATURES:
            scores = accuracies(args.data, features)
            described = ", ".join(f"{name} acc :: {score:.3f}" for name, score in scores.items())
            print(f"{features}: {described}")
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: error: {describe_error(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
