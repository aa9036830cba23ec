"""Reading a plan, and what is refused, in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.quality.measurement import DEFAULT_PLAN
from benchmarks.quality.plan import Checkpoint, Plan, Stage, read_plan
from benchmarks.quality.runs import list_runs
from tests.conftest import ROOT

Change = Callable[[str, str], Plan]


def test_a_plan_is_read(plan: Plan) -> None:
    assert plan.threads == 1
    assert plan.checkpoints == {"tiny": Checkpoint("stories42M.pt", ("--batch_size", "3"))}
    assert plan.methods["mean"] == ("--pooling", "mean", "--lr", "1e-2")
    screen, full = plan.stages
    common = {"checkpoints": ("tiny",), "baseline": "plain"}
    assert screen == Stage(
        name="screen",
        data=("sst",),
        methods=("plain", "mean"),
        seeds=(1, 2),
        train_lines=5,
        splits=("dev",),
        **common,  # type: ignore[arg-type]
    )
    assert (full.seeds, full.train_lines, full.splits) == ((1, 2, 3), None, ("dev", "test"))


def test_the_committed_plan_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its checkpoints and data sets are here or not."""
    monkeypatch.chdir(ROOT)
    plan = read_plan(DEFAULT_PLAN)
    runs = {stage.name: list_runs(plan, stage) for stage in plan.stages}
    assert all(run.dev_only for run in runs["screen"] + runs["ablation"])
    assert len(runs["screen"]) == 2 * len(plan.stages[0].methods)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "threads = 1",
            "threads = 0",
            "threads: expected a whole number from 1 to 2147483647, found 0",
        ),
        (
            "threads = 1",
            "threads = true",
            "threads: expected a whole number from 1 to 2147483647, found True",
        ),
        ("threads = 1", "thread = 1", "the plan: unknown key 'thread'; the keys are checkpoints, "),
        ("[data]", "[dat]", "the plan: unknown key 'dat'"),
        ('mean = "--pool', 'plain = "--pool', "not a TOML file: Cannot overwrite a value"),
        ("threads = 1", "threads = ", "not a TOML file: Invalid value (at line 2, column 11)"),
        ('path = "stories42M.pt", ', "", "checkpoints.tiny: lacks path"),
        ('"stories42M.pt"', "3", "checkpoints.tiny: expected a path, found 3"),
        ('flags = "--batch', 'flag = "--batch', "checkpoints.tiny: unknown key 'flag'"),
        ('plain = ""', "plain = 1", "methods.plain: expected flags in one string, found 1"),
        ('plain = ""', 'plain = "\'"', 'methods.plain: "\'": No closing quotation'),
        ('plain = ""', '"a|b" = ""', "[methods]: name 'a|b': use up to 40 letters, digits, "),
        ('sst = "--', 'imdb = "--', "[data]: unknown data set 'imdb'; known: sst, cfimdb, demo"),
        ('data = ["sst"]', 'data = ["demo"]', "stage screen: unknown data set 'demo'; known: sst"),
        ('["plain", "mean"]', '["plain", "x"]', "stage screen: unknown method 'x'; known: plain"),
        ('["tiny"]', '["large"]', "stage screen: unknown checkpoint 'large'; known: tiny"),
        ('["plain", "mean"]', '["plain", "plain"]', "stage screen: methods: 'plain' occurs twice"),
        ("[1, 2]", "[1, 1]", "stage screen: seeds: 1 occurs twice"),
        ("[1, 2]", '["a"]', "stage screen: seeds: expected a whole number from 0 to 4294967295"),
        ("[1, 2]", "[1.5]", "stage screen: seeds: expected a whole number from 0 to 4294967295"),
        ("[1, 2]", "[-1]", "stage screen: seeds: expected a whole number from 0 to 4294967295"),
        (
            "[1, 2]",
            "[4294967296]",
            "stage screen: seeds: expected a whole number from 0 to 4294967295, found",
        ),
        ("[1, 2]", "[]", "stage screen: seeds: expected a list with at least one entry"),
        ("[1, 2]", "1", "stage screen: seeds: expected a list with at least one entry, found 1"),
        (
            '["plain", "mean"]',
            '["mean"]',
            "stage screen: baseline: unknown method or checkpoint of this stage",
        ),
        ('splits = ["dev"]', 'splits = ["test"]', 'splits: expected ["dev"] or ["dev", "test"]'),
        ("train_lines = 5", "subset_seed = 5", "stage screen: subset_seed needs train_lines"),
        ("train_lines = 5", "train_lines = 0", "stage screen: train_lines: expected a whole"),
        ("train_lines = 5", "lines = 5", "stages[0]: unknown key 'lines'"),
        ('name = "full"', 'name = "screen"', "[[stages]]: name: 'screen' occurs twice"),
        ('name = "screen"', 'name = ["x"]', "stages[0]: name ['x']: use up to 40 letters"),
        ('name = "screen"\n', "", "stages[0]: lacks name"),
        *(
            (
                'plain = ""',
                f'plain = "{flag}"',
                f"methods.plain: {flag.split()[0]}: the plan sets this itself; leave it out",
            )
            for flag in (
                "--seed 3",
                "--test=x",
                "--pretrained_model_path x",
                "--use-gpu",
                "-h",
                "--tokenizer_path x",
            )
        ),
    ],
)
def test_a_bad_plan_is_refused_in_one_line(
    changed: Change, old: str, new: str, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        changed(old, new)
    assert str(caught.value).startswith("plan.toml: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    for content in (b"\xff", b"", b"stages = 3", b"a = " + b"[" * 5000, b'stages = ["x"]'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="plan.toml: "):
            read_plan(path)
    with pytest.raises(FileNotFoundError):
        read_plan(tmp_path / "none.toml")
