import math

import numpy as np
import pytest
from scipy import stats as reference

from benchmarks.metrics import delta_m
from benchmarks.reporting.stats import (
    average_ranks,
    bootstrap_difference,
    chance_of_separation,
    cliques,
    critical_difference,
    friedman,
    relative_loss,
    signed_rank_p,
)


def test_ranks_by_hand():
    assert average_ranks([0.3, 0.1, 0.3, 0.2]) == [3.5, 1, 3.5, 2]
    assert average_ranks([0.3, 0.1, 0.1 + 0.2, 0.0]) == [3.5, 2, 3.5, 1]
    assert average_ranks([0.0, 0.0]) == [1.5, 1.5]
    assert average_ranks([3e-9, 1e-9]) == [2, 1]


def test_critical_difference_of_demsar():
    # Demšar, JMLR 7, 2006, table 5a prints q, and section 3.2.2 the example: 4 algorithms on 14
    # data sets.
    for methods, q in {2: 1.960, 3: 2.343, 4: 2.569, 5: 2.728, 10: 3.164}.items():
        scale = math.sqrt(methods * (methods + 1) / (6 * 14))
        assert critical_difference(methods, 14) / scale == pytest.approx(q, abs=1.5e-3)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)


# Demšar's table 6: AUC of C4.5, with m, with cf, with both, on 14 data sets.
DEMSAR = [
    (0.763, 0.768, 0.771, 0.798),
    (0.599, 0.591, 0.590, 0.569),
    (0.954, 0.971, 0.968, 0.967),
    (0.628, 0.661, 0.654, 0.657),
    (0.882, 0.888, 0.886, 0.898),
    (0.936, 0.931, 0.916, 0.931),
    (0.661, 0.668, 0.609, 0.685),
    (0.583, 0.583, 0.563, 0.625),
    (0.775, 0.838, 0.866, 0.875),
    (1.000, 1.000, 1.000, 1.000),
    (0.940, 0.962, 0.965, 0.962),
    (0.619, 0.666, 0.614, 0.669),
    (0.972, 0.981, 0.9751, 0.975),
    (0.957, 0.978, 0.946, 0.970),
]


def test_friedman_of_demsar():
    ranks = np.array([average_ranks([-value for value in row]) for row in DEMSAR])
    assert ranks.mean(0) == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=1e-3)
    found = friedman(ranks)
    # He prints 9.28, without the correction for ties: three pairs and four equal in 14 rows of 4.
    ties = 1 - (3 * (2**3 - 2) + (4**3 - 4)) / (14 * (4**3 - 4))
    assert found.chi2 * ties == pytest.approx(9.28, abs=0.005)
    assert found.f == pytest.approx(13 * found.chi2 / (14 * 3 - found.chi2))
    assert (found.freedom, found.p) == (3, pytest.approx(reference.chi2.sf(found.chi2, 3)))


@pytest.mark.parametrize(
    "ranks", [[[1, 2, 3]], [[1, 2], [1, 2]], [[2, 2, 2], [2, 2, 2]]], ids=["one", "two", "equal"]
)
def test_no_test_of_too_little(ranks):
    assert friedman(np.array(ranks, dtype=float)) is None


def test_all_benchmarks_agreeing_is_significant():
    found = friedman(np.array([[1.0, 2, 3]] * 5))
    assert found.f == math.inf
    assert found.f_p == 0


def test_cliques_by_hand():
    assert cliques([1.0, 2.0, 4.0, 4.5], 1.5) == [(1.0, 2.0), (4.0, 4.5)]
    assert cliques([1.0, 2.0, 3.0], 1.5) == [(1.0, 2.0), (2.0, 3.0)]
    assert cliques([1.0, 2.0, 3.0], 5) == [(1.0, 3.0)]
    assert cliques([1.0, 3.0], 1.5) == []


def test_relative_loss_is_delta_m_of_each_row():
    generator = np.random.default_rng(1)
    values, baseline = generator.uniform(1, 2, (4, 3)), generator.uniform(1, 2, 3)
    flags = [True, False, True]
    expected = [delta_m(row, baseline, flags) for row in values.tolist()]
    assert relative_loss(values, baseline, flags).tolist() == pytest.approx(expected)


def test_interval_of_equal_seeds_is_a_point():
    values, baseline = np.full((3, 2), [0.5, 3.0]), np.full((3, 2), [0.4, 2.0])
    # 25 % better and 50 % worse.
    low, high = bootstrap_difference(values, baseline, [True, False])
    assert (low, high) == (pytest.approx(12.5), pytest.approx(12.5))
    other = np.full((2, 2), [0.4, 2.0])
    low, high = bootstrap_difference(values, baseline, [True, False], other)
    assert (low, high) == (pytest.approx(12.5), pytest.approx(12.5))


def test_interval_agrees_with_scipys_bootstrap():
    values = np.random.default_rng(2).normal(1, 0.1, (12, 1))
    low, high = bootstrap_difference(values, np.ones((12, 1)), [False])
    expected = reference.bootstrap(
        ((values[:, 0] - 1) * 100,), np.mean, method="percentile", n_resamples=20_000
    ).confidence_interval
    assert (low, high) == (
        pytest.approx(expected.low, abs=0.3),
        pytest.approx(expected.high, abs=0.3),
    )


def test_the_baselines_noise_widens_the_interval():
    values = np.random.default_rng(3).normal(1, 0.1, (5, 1))
    narrow = bootstrap_difference(values, np.ones((5, 1)), [False])
    noisy = np.random.default_rng(4).normal(1, 0.3, (5, 1))
    wide = bootstrap_difference(values, noisy / noisy.mean(), [False])
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_the_same_interval_every_time():
    values = np.random.default_rng(5).normal(1, 0.1, (5, 2))
    found = [bootstrap_difference(values, values, [True, False]) for _ in range(2)]
    assert found[0] == found[1]


def test_one_seed_has_no_interval():
    assert bootstrap_difference(np.ones((1, 2)), np.ones((3, 2)), [True, True]) is None


def test_chance_of_separation_by_counting():
    # 20 ways to say which three of six values are the first sample's; one is below all others.
    assert chance_of_separation(3, 3) == pytest.approx(1 / 20)


def test_signed_rank_by_counting():
    # All seven on one side: 2 of the 128 patterns of signs are as extreme.
    assert signed_rank_p([-1, -2, -3, -4, -5, -6, -7]) == pytest.approx(2 / 128)
    # The least one on the other side: 4 of them.
    assert signed_rank_p([1, -2, -3, -4, -5, -6, -7]) == pytest.approx(4 / 128)
    assert signed_rank_p([0.0, 0.0]) == 1
    assert signed_rank_p([0.0, -1, -2, -3, -4, -5, -6]) == pytest.approx(2 / 64)
