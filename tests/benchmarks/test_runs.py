"""The command lines of a plan's runs, their training lines, and what identifies them."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.quality.plan import Plan, read_plan
from benchmarks.quality.runs import check_inputs, list_runs
from beyond.command_line import get_args
from beyond.methods.recipes import RULED
from beyond.options import FinetuneOptions
from tests.benchmarks.conftest import runs_of
from tests.conftest import SENTENCES, make_llama, save_llama

Change = Callable[[str, str], Plan]


def test_runs_are_those_of_the_plan_one_seed_after_the_other(plan: Plan) -> None:
    runs = runs_of(plan, "full")
    assert [(run.data, run.method, run.seed) for run in runs] == [
        (data, method, seed)
        for seed in (1, 2, 3)
        for data in ("sst", "cfimdb")
        for method in ("plain", "better")
    ]
    assert len({run.folder for run in runs}) == len(runs)


def test_a_runs_command_line_has_the_flags_of_checkpoint_data_and_method(plan: Plan) -> None:
    run = runs_of(plan, "full")[4]
    assert (run.data, run.method, run.seed) == ("sst", "plain", 2)
    options = get_args(run.argv())
    assert isinstance(options, FinetuneOptions)
    expected = {
        "pretrained_model_path": "stories42M.pt",
        "train": "data/sst-train.txt",
        "dev": "data/sst-dev.txt",
        "test": "data/sst-test.txt",
        "label_names": "data/sst-label-mapping.json",
        "batch_size": 3,
        "epochs": 2,
        "seed": 2,
        "threads": 1,
        "filepath": f"{run.folder}/classifier.pt",
    }
    assert {name: getattr(options, name) for name in expected} == expected
    assert run.train_lines == "all"


def test_of_flags_that_are_given_twice_that_of_the_method_counts(changed: Change) -> None:
    plan = changed('plain = ""', 'plain = "--epochs 7 --batch_size 4"')
    (run, *_) = runs_of(plan, "full")
    assert (run.options.epochs, run.options.batch_size) == (7, 4)


def test_runs_on_dev_only_do_not_name_the_test_file(plan: Plan) -> None:
    """Those of CFIMDB, whose test labels mean nothing, even in a stage that reads test."""
    screen, full = runs_of(plan, "screen"), runs_of(plan, "full")
    for run in (*screen, *full):
        test = f"data/{run.data}-test.txt"
        assert run.dev_only == (run in screen or run.data == "cfimdb")
        options = get_args(run.argv())
        assert (test in options.input_files) != run.dev_only
        assert not any(test in word for word in run.argv())  # --dataset implies it
        if run.dev_only:
            assert f"data/{run.data}-dev.txt" == options.test  # type: ignore[union-attr]


# ----------------------------------------------------------------------------------- training lines


def test_the_first_lines(plan: Plan) -> None:
    (run, *_) = runs_of(plan, "screen")
    assert run.options.train == "output/quality/sst-train-first-5.txt"
    assert Path(run.options.train).read_text().splitlines() == SENTENCES[:5]
    assert run.train_lines == "first 5"


def test_lines_by_a_seed_keep_the_order_of_the_file(changed: Change) -> None:
    plan = changed("train_lines = 5", "train_lines = 5\nsubset_seed = 3")
    (run, *_) = runs_of(plan, "screen")
    numbers = random.Random(3).sample(range(8), 5)
    expected = [line for i, line in enumerate(SENTENCES) if i in numbers]
    assert Path(run.options.train).read_text().splitlines() == expected != SENTENCES[:5]
    assert run.train_lines == "5 by seed 3"


def test_more_lines_than_there_are_are_refused(changed: Change) -> None:
    plan = changed("train_lines = 5", "train_lines = 9")
    with pytest.raises(ValueError) as caught:
        runs_of(plan, "screen")
    assert str(caught.value) == (
        "plan.toml: stage screen: train_lines = 9: data/sst-train.txt has only 8 lines"
    )


# ----------------------------------------------------------------------------------- identification


def test_recorded_flags_are_those_in_force(plan: Plan) -> None:
    plain, better = runs_of(plan, "full")[:2]
    assert plain.flags == "batch_size=3 dtype=float32 epochs=2 lr=2e-05"
    assert better.flags == (
        "batch_size=3 causal=True dropout=0.1 dtype=float32 epochs=2 layer_decay=0.5 "
        "linear_decay=True lr=0.0003 r_drop=1.0 recipe=better warmup=0.06"
    )
    assert better.unknown_flags == ()


def test_hashes_follow_the_content_of_the_files(plan: Plan) -> None:
    (before, *_) = runs_of(plan, "full")
    assert len(before.checkpoint_hash) == len(before.data_hash) == 12
    save_llama(make_llama(causal=False, seed=1), Path("other.pt"))
    Path("other.pt").replace("stories42M.pt")
    Path("data/sst-dev.txt").write_text(SENTENCES[0] + "\n")
    (after, *_) = runs_of(plan, "full")
    assert before.checkpoint_hash != after.checkpoint_hash
    assert before.data_hash != after.data_hash
    assert before.folder != after.folder


def test_files_may_be_missing_until_a_run_starts(plan: Plan) -> None:
    """So a report can be written without them."""
    Path("stories42M.pt").unlink()
    for path in Path("data").glob("sst-*"):
        path.unlink()
    runs = runs_of(plan, "full")
    plain, better = runs[:2]
    assert (plain.checkpoint_hash, plain.data_hash, plain.unknown_flags) == ("", "", ())
    assert set(better.unknown_flags) == set(RULED) - {"epochs"}  # which the plan sets
    assert "lr=" not in better.flags and "head=" not in better.flags
    message = "data/sst-train.txt: no such file; get it with: uv run python data/download.py"
    with pytest.raises(FileNotFoundError, match=message):
        check_inputs(plain)
    with pytest.raises(FileNotFoundError, match="stories42M.pt: no such file; get it with"):
        check_inputs(runs[2])  # of the other data set


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pool mean", "unrecognized arguments: --pool mean"),
        ("--pooling middle", "argument --pooling: invalid choice: 'middle'"),
        ("--lora_rank 2 --mixout 0.1", "--mixout and --lora_rank: mixout is for weights that"),
        ("--top_k 3", "--top_k is for --option generate only"),
        ("--recipe best", "argument --recipe: invalid choice: 'best'"),
        ("x", "unrecognized arguments: x"),
    ],
)
def test_bad_flags_are_refused(changed: Change, flags: str, message: str) -> None:
    plan = changed('mean = "--pooling mean --lr 1e-2"', f'mean = "{flags}"')
    with pytest.raises(ValueError) as caught:
        runs_of(plan, "screen")
    expected = f"plan.toml: stage screen: tiny, sst, mean: {message}"
    assert str(caught.value).startswith(expected)


def test_methods_that_a_rule_makes_the_same_are_no_mistake(place: Path) -> None:
    """Label words of several tokens leave the recipe with a new head; a method may ask for one."""
    plan, flags = Path("plan.toml"), "--recipe better --head linear"
    text = plan.read_text().replace("--pooling mean --lr 1e-2", flags)
    plan.write_text(text.replace('["plain", "better"]', '["plain", "better", "mean"]'))
    _, better, mean, *_ = runs_of(read_plan(plan), "full")
    assert better.flags == mean.flags


def test_two_methods_that_are_the_same_are_refused(changed: Change) -> None:
    plan = changed('mean = "--pooling mean --lr 1e-2"', 'mean = "--lr 2e-5 --pooling last"')
    with pytest.raises(ValueError) as caught:
        list_runs(plan, plan.stages[0])
    assert str(caught.value) == (
        "plan.toml: stage screen: methods plain and mean have the same flags on sst; leave one out"
    )
