"""What is timed, in which order, and what counts."""

import time

import pytest
import torch

from benchmarks.measure import time_in_turn
from benchmarks.table import Group, Progress, Row
from benchmarks.works import Job, batches_of, make_context, make_generate
from tests.conftest import make_llama

CPU = torch.device("cpu")


def test_works_run_in_turn_and_every_second_round_backwards() -> None:
    calls = []
    works = [lambda name=name: calls.append(name) for name in "abc"]
    time_in_turn(works, 3, CPU)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"


def test_seconds_that_a_work_returns_count() -> None:
    given = iter([9.0, 3.0, 1.0, 2.0])  # the first one warms up

    def measured() -> None:
        time.sleep(0.02)

    returned, wall = time_in_turn([lambda: next(given), measured], 3, CPU)
    assert returned == 2.0 and 0.02 <= wall < 1


@pytest.mark.parametrize("side", ["causal float32", "causal int8", "Hugging Face float32"])
def test_the_time_of_the_context_and_the_first_token_does_not_count(side: str) -> None:
    """A context of 2,000 takes far longer than the one token that is timed after it."""
    kind, dtype = side.rsplit(" ", 1)
    llama = make_llama(causal=True, n_layers=6, max_seq_len=2002)
    work = make_generate(llama, Job("generate", "1 after 2000"), kind, dtype, CPU)
    work()
    start = time.perf_counter()
    seconds = work()
    assert seconds is not None and 0 < seconds < (time.perf_counter() - start) / 2


def test_a_job_names_its_tokens_and_its_batch() -> None:
    job = Job("generate", "200 after 7")
    assert job.new_tokens == 200 and str(job) == "generate 200 after 7"
    assert make_context(job, 30, CPU).shape == (1, 7)
    ((tokens, lengths, labels),), sentences = batches_of(Job("finetune", "5 x 9"), "causal float32")
    assert tokens.shape == (5, 9) and lengths.tolist() == [9] * 5 and sentences == 5
    assert len(labels) == 5 and set(labels.tolist()) == {0, 1}


def test_a_side_of_several_rows_is_measured_once() -> None:
    rows = (Row("a x", "b x"), Row("c x", "b x"), Row("a x", "c x"))
    assert Group(Job("generate", "1 after 1"), rows, 1).sides == ["a x", "b x", "c x"]


def test_progress_says_what_is_measured_and_when_it_ends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Progress([60.0, 7200.0])
    progress.next("one")
    progress.start -= 120  # it took twice as long as expected
    progress.next("two")
    first, second = capsys.readouterr().err.splitlines()
    assert " 1 of 2: one; all ends at about " in first and " 2 of 2: two; " in second

    def minutes(text: str) -> int:
        hours, rest = text.split(":")
        return int(hours) * 60 + int(rest)

    duration = minutes(second[-5:]) - minutes(second[:5])
    assert duration % (24 * 60) in (239, 240, 241)
