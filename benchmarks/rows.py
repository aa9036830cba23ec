"""Which comparisons there are, with the aims, and which of them are left out here."""

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.table import Group, Row
from benchmarks.works import Job
from beyond.runtime import has_bfloat16

GREEDY = "200 after 1"
SMOLLM2 = "SmolLM2"  # stands for the folder

# In reference mode both sides get the same batches, in the file's order and with the same padding.
# Without a causal mask nothing can be cached, so Hugging Face generates without its cache too.
# In causal mode Hugging Face gets the same batches as before, as its users make them; this project
# makes batches of sentences of similar length. So speeds are per sentence.
GROUPS = (
    Group(
        Job("generate", GREEDY),
        (
            Row("causal float32", "llama2.c float32", 0.75),
            Row("compiled float32", "llama2.c float32", 0.95),
            Row("causal int8", "llama2.c int8", 1.0),
            Row("compiled int8", "llama2.c int8", 1.2),
            Row("causal float32", "Hugging Face float32", 2.0),
            Row("compiled float32", "Hugging Face float32"),
            Row("causal bfloat16", "Hugging Face float32"),
            Row("causal int8", "Hugging Face float32", 5.0),
            Row("causal bfloat16", "Hugging Face bfloat16", 1.6),
            Row("compiled bfloat16", "Hugging Face bfloat16"),
        ),
        26,
    ),
    Group(
        Job("generate", "100 after 1", SMOLLM2),
        (
            Row("causal bfloat16", "Hugging Face bfloat16", 1.5),
            Row("causal int8", "Hugging Face bfloat16"),
        ),
        7,
    ),
    Group(
        Job("generate", "75 after the prompt"),
        (
            Row("reference float32", "Hugging Face without cache float32"),
            Row("causal float32", "reference float32", 4.0),
        ),
        8,
    ),
    Group(
        Job("prompt", "sst"),
        (
            Row("reference float32", "Hugging Face float32"),
            Row("causal float32", "Hugging Face float32"),
            Row("causal bfloat16", "Hugging Face float32", 3.0),
        ),
        2,
    ),
    Group(
        Job("prompt", "cfimdb"),
        (
            Row("reference float32", "Hugging Face float32"),
            Row("causal float32", "Hugging Face float32"),
            Row("causal bfloat16", "Hugging Face float32"),
        ),
        6,
        is_quick=True,
    ),
    Group(
        Job("finetune", "sst"),
        (
            Row("reference float32", "Hugging Face float32", 1.09),  # .92 of the time
            Row("causal float32", "Hugging Face float32", 2.4),
            Row("causal bfloat16", "Hugging Face float32", 3.5),
        ),
        31,
    ),
    Group(
        Job("finetune", "cfimdb"),
        (
            Row("reference float32", "Hugging Face float32"),
            Row("causal float32", "Hugging Face float32"),
            Row("causal bfloat16", "Hugging Face float32", 3.0),
        ),
        15,
        is_quick=True,
    ),
)


def choose(
    device: torch.device,
    llama2c: Path | None,
    smollm2: Path | None,
    can_compile: bool,
    only: str,
) -> list[Group]:
    """Return the groups with the rows that can be measured here; see `notes` for the others.

    Args:
        device: where the work runs.
        llama2c, smollm2: the folders of the command line.
        can_compile: whether decoding can be compiled.
        only: a row is left out unless its work or its sides contain this text.
    """
    chosen = []
    for group in GROUPS:
        job, work = group.job, f"{group.job.task} {group.job.data} {group.job.model}"
        if job.model:
            if smollm2 is None:
                continue
            job = replace(job, model=str(smollm2))
        rows = []
        for row in group.rows:
            words = f"{row.side} {row.baseline}".split(" ")
            needs_units = "bfloat16" in words and job.task != "generate"
            if (
                only in f"{work} {row.side} {row.baseline}"
                and (llama2c is not None or "llama2.c" not in words)
                and (can_compile or "compiled" not in words)
                and (has_bfloat16(device) or not needs_units)
                and (device.type == "cpu" or "int8" not in words)
            ):
                rows.append(row)
        if rows:
            chosen.append(replace(group, job=job, rows=tuple(rows)))
    return chosen


def notes(
    device: torch.device, llama2c: Path | None, smollm2: Path | None, can_compile: bool
) -> list[str]:
    """Return a line for each kind of row that is left out."""
    reasons = [
        (llama2c is None, "llama2.c: `--llama2c FOLDER` was not given"),
        (smollm2 is None, "SmolLM2: `--smollm2 FOLDER` was not given"),
        (not can_compile, "compiled decoding: it needs the CPU and a C++ compiler"),
        (
            not has_bfloat16(device),
            "prompt and finetune in bfloat16: the processor has no units for it, so that float32 "
            "is the best dtype",
        ),
        (device.type != "cpu", "int8: it is for the CPU only"),
    ]
    return [f"- Left out: {text}." for applies, text in reasons if applies]
