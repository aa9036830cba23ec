"""Intervals of paired differences against SciPy."""

import math

import numpy as np
import pytest
import scipy

from benchmarks.quality.intervals import deviation, paired_difference, t_quantile


@pytest.mark.parametrize("freedom", [*range(1, 40), 60, 100, 1000])
def test_quantiles_match_scipy(freedom: int) -> None:
    """The table has four digits after the point, and the expansion is as good."""
    assert t_quantile(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), abs=6e-5)


@pytest.mark.parametrize("n", [3, 4, 5, 40])
def test_interval_matches_scipys_paired_test(n: int) -> None:
    rng = np.random.default_rng(n)
    ours, theirs = rng.normal(0.5, 0.02, n), rng.normal(0.45, 0.03, n)
    seeds = [int(seed) for seed in rng.permutation(100)[:n]]
    difference = paired_difference(
        dict(zip(seeds, ours.tolist(), strict=True)),
        # In another order, since they are matched by seed.
        dict(list(zip(seeds, theirs.tolist(), strict=True))[::-1]),
    )
    expected = scipy.stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert difference is not None and difference.interval is not None
    assert difference.mean == pytest.approx((ours - theirs).mean())
    # The quantile has four digits after the point, and is at most 12.7.
    assert difference.interval == pytest.approx((expected.low, expected.high), abs=1e-5)


def test_pairs_with_the_baseline_narrow_the_interval() -> None:
    """Seeds shift both alike; as two samples the interval would be far wider."""
    difference = paired_difference({1: 0.4, 2: 0.5, 3: 0.6}, {1: 0.39, 2: 0.488, 3: 0.591})
    assert difference is not None and difference.half_width is not None
    assert difference.half_width < 0.005


def test_only_seeds_that_both_have_are_compared() -> None:
    difference = paired_difference({1: 0.5, 3: 0.7}, {2: 0.9, 3: 0.6})
    assert difference is not None
    assert difference.values == pytest.approx((0.1,))
    assert difference.half_width is difference.interval is None  # a single seed says nothing of it
    assert paired_difference({1: 0.5}, {2: 0.5}) is None
    equal = paired_difference({1: 0.5, 2: 0.6}, {1: 0.4, 2: 0.5})  # by chance
    assert equal is not None and len(equal.values) == 2 and equal.interval is None


def test_deviation_is_that_of_a_sample() -> None:
    assert deviation([0.2, 0.4]) == pytest.approx(math.sqrt(0.02))
    assert deviation([0.2]) is None
