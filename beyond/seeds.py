"""Several seeds: fine-tune once with each, and report mean and standard deviation."""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from beyond.methods.rule import BuildPrompt, apply_rule
from beyond.options import FinetuneOptions
from beyond.processes import broadcast_object, is_main_process
from beyond.run import check_hyperparameters
from utils import fingerprint, open_atomically

SPLITS = ((0, "dev"), (1, "test"))
Finetune = Callable[[FinetuneOptions], tuple[float, float]]  # returns accuracy on dev and test


def run_seeds(options: FinetuneOptions, finetune: Finetune, build_prompt: BuildPrompt) -> None:
    """Fine-tune with each seed; print and write the accuracies, their mean and deviation.

    Args:
        options: of all runs. Without `seeds` there is one run and no summary.
        finetune: runs one seed. `run_llama.run_task` passes it, and
        build_prompt: returns the zero-shot prompt for label words.
    """
    options = apply_rule(options, build_prompt)
    if not options.seeds:
        finetune(options)
        return
    settings = {k: v for k, v in options.hyperparameters().items() if k != "seed"}
    settings |= {f"SHA-256 of {path}": fingerprint(path) for path in options.input_files}
    path = options.seeds_file
    accuracies: dict[str, list[float | None]] = {}
    if options.resume and path.exists():
        accuracies = broadcast_object(lambda: read_accuracies(path, settings))
    total, times = len(options.seeds), list[float]()  # in seconds, of the runs of this process
    for number, seed_options in enumerate(options.per_seed(), start=1):
        seed = seed_options.seed
        if str(seed) not in accuracies:
            left = sum(str(other) not in accuracies for other in options.seeds)
            print(f"seed {seed}: run {number} of {total}{expected_end(times, left)}")
            start = time.monotonic()
            pair = finetune(seed_options)
            accuracies[str(seed)] = [None if math.isnan(acc) else acc for acc in pair]
            times.append(time.monotonic() - start)
        done = [accuracies[str(seed)] for seed in options.seeds if str(seed) in accuracies]
        summary = {split: summarise([pair[i] for pair in done]) for i, split in SPLITS}
        if is_main_process():
            with open_atomically(path) as file:
                json.dump({"settings": settings, "accuracy": accuracies, **summary}, file, indent=2)
    for split, values in summary.items():
        mean, deviation = values.values()
        found = "n/a" if mean is None else f"{mean:.3f} +- {deviation:.3f}"
        print(f"{split} acc over {len(done)} seeds :: {found}")
    print(f"Wrote the accuracies to {path}.")


def expected_end(times: Sequence[float], left: int) -> str:
    """Return when the last run will end, to follow a line; "" if no run has been timed.

    Args:
        times: of runs, in seconds.
        left: the number of runs still to do.
    """
    if not times:
        return ""
    end = datetime.now() + timedelta(seconds=left * statistics.fmean(times))
    return f"; the last one ends about {end:%a %H:%M}"


def summarise(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return mean and standard deviation (of the sample; 0 for a single value).

    Both are None if a value is, which is the accuracy on a file without labels.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None, "standard deviation": None}
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return {"mean": statistics.fmean(known), "standard deviation": deviation}


def read_accuracies(path: Path, settings: Mapping[str, str]) -> dict[str, list[float | None]]:
    """Read the accuracies on dev and test, by seed, that `run_seeds` has written.

    An accuracy is None if the file has no labels.

    Raises:
        ValueError: `run_seeds` did not write the file, or wrote it for other settings.
    """
    try:
        content: Any = json.loads(path.read_bytes())
        accuracies = {
            str(seed): [None if acc is None else float(acc) for acc in (dev, test)]
            for seed, (dev, test) in content["accuracy"].items()
        }
        saved = dict(content["settings"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{path}: does not hold the accuracies of several seeds") from None
    check_hyperparameters(saved, settings, path)
    return accuracies
