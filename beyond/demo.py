"""The demo: a small model and reviews that stand in for missing default files."""

import os
from pathlib import Path

# Fine-tuning the demo's model on the demo's reviews. The assignment's rate of 2e-5 is for a model
# eight times as large and far more training steps.
LEARNING_RATE = 2e-4
EPOCHS = 4


def demo_folder() -> Path:
    """Return the folder of the demo, relative to the current folder."""
    return Path(os.path.relpath(Path(__file__).parent.parent / "data" / "demo"))


def data_files(dataset: str) -> dict[str, str]:
    """Return the four files of a data set, by the options that name them."""
    prefix = f"{demo_folder()}{os.sep}" if dataset == "demo" else f"data/{dataset}-"
    files = {split: f"{prefix}{split}.txt" for split in ("train", "dev", "test")}
    return {**files, "label_names": f"{prefix}label-mapping.json"}


def stand_in_note(missing: str) -> str:
    """Say that the demo stands in because a file is missing, and how to get the real files."""
    return (
        f"there is no {missing}, so the demo in {demo_folder()} stands in, and its results are "
        "called demo-...; get the real files with: uv run python data/download.py"
    )
