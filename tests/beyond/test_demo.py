"""The demo's files: what data/demo/README.md says of them is true."""

import json
import re
from collections import Counter

from llama import load_pretrained
from tests.conftest import ROOT

DEMO = ROOT / "data" / "demo"


def labels_and_sentences(split: str) -> list[list[str]]:
    lines = (DEMO / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    return [line.split(" ||| ") for line in lines]


def test_the_reviews_are_balanced_differ_and_do_not_name_their_label() -> None:
    names = json.loads((DEMO / "label-mapping.json").read_text())
    sentences = []
    for split, size in (("train", 1500), ("dev", 300), ("test", 300)):
        pairs = labels_and_sentences(split)
        labels = Counter(label for label, _ in pairs)
        assert labels == {str(label): size // 5 for label in range(5)}
        sentences += [sentence for _, sentence in pairs]
    words = re.compile(rf"\b({'|'.join(names)})\b", re.IGNORECASE)
    assert [sentence for sentence in sentences if words.search(sentence)] == []
    assert len({sentence.lower() for sentence in sentences}) == 2100


def test_the_demo_is_small_and_its_readme_gives_its_size() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 12e6
    model = load_pretrained(DEMO / "model.pt")
    readme = (DEMO / "README.md").read_text(encoding="utf-8")
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in readme
    assert model.config.causal and f"contexts of {model.config.max_seq_len}" in readme
