"""Every family of hard Jacobians is what its description says."""

import numpy as np
import pytest
import torch

from benchmarks.jacobians import FAMILIES, SCALES, Case, describe, hard_jacobian, random_jacobian

CASES = [(n_tasks, seed) for n_tasks in (2, 3, 8) for seed in range(5)]


def jacobians(family):
    return [Case(family, n_tasks, 20, seed).jacobian().numpy() for n_tasks, seed in CASES]


def left_null_vector(j):
    """The only one, with its largest entry positive."""
    left, values, _ = np.linalg.svd(j)
    assert values[-1] < 1e-12 * values[0]
    assert len(j) == 2 or values[-2] > 1e-6 * values[0]
    return left[:, -1] * np.sign(left[np.abs(left[:, -1]).argmax(), -1])


def test_normal_and_low_rank():
    for normal, low in zip(jacobians("normal"), jacobians("low_rank"), strict=True):
        assert np.linalg.matrix_rank(normal) == len(normal)
        assert np.linalg.matrix_rank(low) == len(low) // 2


def test_stationary_families():
    for j in jacobians("strongly_stationary"):
        assert (left_null_vector(j) > 1e-3).all()
    for j in jacobians("weakly_stationary"):
        v = left_null_vector(j)
        assert (v > -1e-12).all()
        assert (np.abs(v) < 1e-12).any()
    for j in jacobians("non_stationary"):
        vectors = np.linalg.eigh(j @ j.T)[1]
        assert ((vectors * np.sign(vectors[0])) > 0).all(0).any()


def test_rows_that_are_nearly_equal_equal_opposite_or_zero():
    for j in jacobians("near_parallel"):
        gap = np.linalg.norm(j[-1] - j[0]) / np.linalg.norm(j[0])
        assert 1e-6 < gap < 1e-5
    for j in jacobians("duplicated"):
        assert (j[-1] == j[0]).all()
    for j in jacobians("opposite"):
        assert j[0] @ j[-1] == pytest.approx(-np.linalg.norm(j[0]) * np.linalg.norm(j[-1]))
    for j in jacobians("zero_row"):
        assert (~j.any(1)).sum() == 1
    assert not np.any(jacobians("zero")[0])


def test_norms_far_apart():
    spreads = []
    for j in jacobians("imbalanced"):
        n = np.linalg.norm(j, axis=1)
        spreads.append(n.max() / n.min())
    assert max(spreads) > 1e6
    for j in jacobians("conflict_under_imbalance"):
        n = np.linalg.norm(j[:2], axis=1)
        assert j[0] @ j[1] == pytest.approx(-0.9 * n[0] * n[1])
        assert n[1] == pytest.approx(1e-2) or n[1] == pytest.approx(1e-3)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "zero"])
def test_drawing_members_of_a_family(family):
    rng, again = (np.random.default_rng(0) for _ in range(2))
    found = [hard_jacobian(rng, family) for _ in range(60)]
    assert {len(j) for j in found} == {2, 3, 4, 5, 6, 7, 8, 40}
    assert all(len(j) <= j.shape[1] <= 200 for j in found)
    sizes = [float(j.norm()) for j in found]
    assert max(sizes) / min(sizes) > 0.1 * SCALES[-1] / SCALES[0]
    assert torch.equal(found[0], hard_jacobian(again, family))
    assert describe(family).endswith(".")


def test_random_jacobians_have_the_spread_and_scale_asked_for():
    rng = np.random.default_rng(0)
    norms = torch.cat([random_jacobian(rng, 1e6, 1e-8).norm(dim=1) for _ in range(200)])
    assert norms.min() < 1e-9
    assert norms.max() > 1e-6
    assert norms.max() / norms.min() < 1e9
