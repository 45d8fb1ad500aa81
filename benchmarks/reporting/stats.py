"""The statistics of the reports: intervals over seeds, ranks, and tests over benchmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = [
    "Friedman",
    "Interval",
    "average_ranks",
    "bootstrap_difference",
    "chance_of_separation",
    "cliques",
    "critical_difference",
    "friedman",
    "relative_loss",
    "signed_rank_p",
]

_RESAMPLES = 10_000


class Interval(NamedTuple):
    """Where a mean lies with 95 % confidence, as far as the bootstrap can tell."""

    low: float
    high: float


class Friedman(NamedTuple):
    """Friedman's χ² with its degrees of freedom and p, and Iman and Davenport's F with its p."""

    chi2: float
    freedom: int
    p: float
    f: float
    f_p: float


def average_ranks(values: Sequence[float]) -> list[float]:
    """Ranks `[k]` from 1 for the least value; equal values share the mean of their ranks.

    What differs by rounding alone is equal: by 1e-12 of the largest value.
    """
    found = np.asarray(values, dtype=np.float64)
    scale = np.abs(found).max(initial=0.0) or 1.0
    return [float(rank) for rank in stats.rankdata((found / scale).round(12))]


def relative_loss(
    values: NDArray[np.float64], baseline: NDArray[np.float64], higher_is_better: Sequence[bool]
) -> NDArray[np.float64]:
    """`benchmarks.metrics.delta_m` of many rows at once: `[..., K]` and `[..., K]` → `[...]`."""
    signs = np.where(np.asarray(higher_is_better), -1.0, 1.0)
    found: NDArray[np.float64] = (signs * (values - baseline) / baseline).mean(-1) * 100
    return found


def bootstrap_difference(
    values: NDArray[np.float64],
    baseline: NDArray[np.float64],
    higher_is_better: Sequence[bool],
    other: NDArray[np.float64] | None = None,
    seed: int = 0,
) -> Interval | None:
    """The 95 % percentile bootstrap interval of Δm, or of the difference of two methods' Δm.

    Seeds are drawn with replacement, of the method and of the baseline each on their own, so that
    the interval has the noise of both (Efron & Tibshirani, *An Introduction to the Bootstrap*,
    1993, chapter 13).

    Args:
        values: the method's metrics, one row a seed `[S, K]`.
        baseline: the baseline's `[S', K]`.
        higher_is_better: `[K]`.
        other: the metrics of the method whose Δm is taken off `[S'', K]`.
        seed: of the resampling.

    Returns:
        None for a single seed, which says nothing of the others.
    """
    parts = [values, baseline] if other is None else [values, baseline, other]
    if len(values) < 2:
        return None
    generator = np.random.default_rng(seed)
    means = []
    for part in parts:
        drawn = generator.integers(len(part), size=(_RESAMPLES, len(part)))
        means.append(part[drawn].mean(1))
    found = relative_loss(means[0], means[1], higher_is_better)
    if other is not None:
        found = found - relative_loss(means[2], means[1], higher_is_better)
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(float(low), float(high))


def chance_of_separation(first: int, second: int) -> float:
    """How often all values of one sample lie below all of another of the same distribution."""
    return 1 / math.comb(first + second, first)


def friedman(ranks: NDArray[np.float64]) -> Friedman | None:
    """Whether methods differ at all, given their ranks `[N benchmarks, k methods]`.

    Friedman's test and Iman and Davenport's less conservative F, as in Demšar, *Statistical
    Comparisons of Classifiers over Multiple Data Sets*, JMLR 7, 2006
    (https://jmlr.org/papers/v7/demsar06a.html), with the correction for ties.

    Returns:
        None for fewer than two benchmarks or three methods, or where all ranks are equal.
    """
    benchmarks, methods = ranks.shape
    if benchmarks < 2 or methods < 3 or np.ptp(ranks) == 0:
        return None
    chi2, p = stats.friedmanchisquare(*ranks.T)
    freedom = methods - 1
    rest = benchmarks * freedom - chi2
    f = math.inf if rest <= 0 else (benchmarks - 1) * chi2 / rest
    f_p = float(stats.f.sf(f, freedom, freedom * (benchmarks - 1)))
    return Friedman(float(chi2), freedom, float(p), float(f), f_p)


def critical_difference(methods: int, benchmarks: int, level: float = 0.05) -> float:
    """The difference of two mean ranks from which on Nemenyi's test calls it significant.

        CD = q_α · √(k (k + 1) / (6 N))

    with k methods, N benchmarks and q_α the Studentized range's quantile over √2 (Demšar, JMLR 7,
    2006, section 3.2.2).
    """
    q = float(stats.studentized_range.ppf(1 - level, methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * benchmarks))


def cliques(mean_ranks: Sequence[float], difference: float) -> list[tuple[float, float]]:
    """First and last rank of each largest group that lies within a critical difference."""
    ordered = sorted(mean_ranks)
    groups: list[tuple[float, float]] = []
    for start in ordered:
        end = max(rank for rank in ordered if rank - start < difference)
        if end > start and (not groups or end > groups[-1][1]):
            groups.append((start, end))
    return groups


def signed_rank_p(differences: Sequence[float]) -> float:
    """The p of Wilcoxon's signed-rank test of one number a benchmark, two-sided.

    Demšar's choice for two methods over several data sets. Differences of 0 are left out.
    """
    found = [difference for difference in differences if difference != 0]
    if not found:
        return 1.0
    return float(stats.wilcoxon(found).pvalue)
