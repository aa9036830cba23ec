"""Means, standard deviations, and intervals of paired differences.

Student 1908, "The probable error of a mean". Methods are compared seed by seed, since runs with the
same seed have the same new head, and in the same mode the same order of the data. The 95% interval
of the mean difference of n seeds is

    mean(d) +- t * sd(d) / sqrt(n)

with d the differences by seed, sd the sample's standard deviation, and t the 97.5% quantile of
Student's distribution with n - 1 degrees of freedom.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# t for 1 to 30 degrees of freedom.
QUANTILES = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
NORMAL_QUANTILE = 1.959964


@dataclass(frozen=True)
class Difference:
    """A method's mean difference from the baseline.

    Attributes:
        values: by seed, in the order of the seeds.
        mean: of the values.
        half_width: of the 95% interval; None with fewer than three seeds, since two differences
            may be equal by chance, and accuracies are multiples of 1 / sentences.
    """

    values: tuple[float, ...]
    mean: float
    half_width: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends of the interval; None with fewer than three seeds."""
        if self.half_width is None:
            return None
        return self.mean - self.half_width, self.mean + self.half_width


def t_quantile(freedom: int) -> float:
    """Return the 97.5% quantile of Student's distribution with some degrees of freedom.

    Above 30 it is Abramowitz & Stegun 26.7.5, an expansion around the normal distribution's.
    """
    if freedom <= len(QUANTILES):
        return QUANTILES[freedom - 1]
    z = NORMAL_QUANTILE
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**i for i, term in enumerate(terms))


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float]
) -> Difference | None:
    """Compare a method with the baseline on the seeds that both have.

    Args:
        values, baseline: a score by seed.

    Returns:
        The difference; None if they have no seed in common.
    """
    seeds = sorted(values.keys() & baseline.keys())
    differences = tuple(values[seed] - baseline[seed] for seed in seeds)
    if not differences:
        return None
    mean, n = statistics.fmean(differences), len(differences)
    if n < 3:
        return Difference(differences, mean, None)
    half_width = t_quantile(n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(differences, mean, half_width)


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation of a sample; None with a single value."""
    return statistics.stdev(values) if len(values) > 1 else None
