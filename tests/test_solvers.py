"""The small solvers against cvxpy, closed forms and hard inputs."""

import cvxpy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradbal import solvers
from gradbal.solvers import (
    Solution,
    SolverWarning,
    _active_set,
    _block_pivoting,
    checked,
    cosine_matrix,
    fair_newton,
    least_norm,
    nonnegative_qp,
    nonnegative_qps,
    pinv_times,
    positive_part,
    project_simplex,
    simplex_qp,
)


def cosines(size, rank, seed):
    rng = np.random.default_rng(seed)
    j = rng.standard_normal((size, rank)) + 0.2
    return cosine_matrix(j @ j.T)[0]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("size", "rank"), [(2, 2), (5, 9), (12, 30), (12, 6)])
def test_nonnegative_qp(size, rank, seed):
    h = cosines(size, rank, seed)
    b = h @ np.random.default_rng(seed + 1).standard_normal(size)
    found = nonnegative_qp(h, b)
    z = cvxpy.Variable(size)
    objective = 0.5 * cvxpy.quad_form(z, cvxpy.psd_wrap(h)) - b @ z
    problem = cvxpy.Problem(cvxpy.Minimize(objective), [z >= 0])
    problem.solve(solver=cvxpy.CLARABEL)
    value = 0.5 * found.x @ h @ found.x - b @ found.x
    assert (found.x >= 0).all()
    assert found.residual < 1e-12
    assert value == pytest.approx(problem.value, abs=1e-7)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("size", "rank"), [(1, 1), (2, 2), (5, 9), (12, 30), (12, 6), (40, 60)])
def test_many_nonnegative_qps_are_as_many_single_ones(size, rank, seed):
    h = cosines(size, rank, seed)
    b = h @ np.random.default_rng(seed + 1).standard_normal((size, 7))
    found = nonnegative_qps(h, b)
    assert found.residual < 1e-11
    assert (found.x >= 0).all()
    for column, z in zip(b.T, found.x.T, strict=True):
        gap = z - nonnegative_qp(h, column).x
        # Where h is singular z is not unique, but Hz is.
        assert np.abs(h @ gap).max() < 1e-6 * np.abs(column).max()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("size", "rank"), [(2, 2), (5, 9), (12, 30), (12, 6)])
def test_simplex_qp(size, rank, seed):
    rng = np.random.default_rng(seed)
    h, c, a = cosines(size, rank, seed), rng.standard_normal(size), rng.uniform(0.1, 10, size)
    found = simplex_qp(h, c, a)
    y = cvxpy.Variable(size)
    objective = 0.5 * cvxpy.quad_form(y, cvxpy.psd_wrap(h)) + c @ y
    problem = cvxpy.Problem(cvxpy.Minimize(objective), [y >= 0, a @ y == 1])
    problem.solve(solver=cvxpy.CLARABEL)
    value = 0.5 * found.x @ h @ found.x + c @ found.x
    assert (found.x >= 0).all()
    assert a @ found.x == pytest.approx(1, rel=1e-12)
    assert found.residual < 1e-12
    assert value == pytest.approx(problem.value, abs=1e-7 * max(1, abs(problem.value)))


@pytest.mark.parametrize("spread", [1e3, 1e6, 1e12])
def test_simplex_qp_with_spread_constraint(spread):
    a = spread ** np.linspace(0, 1, 7)
    h = cosines(7, 20, 0)
    found = simplex_qp(h, np.zeros(7), a)
    assert found.residual < 1e-12
    assert a @ found.x == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("size", "rank"), [(1, 1), (2, 2), (5, 9), (12, 30), (12, 6), (40, 60)])
@pytest.mark.parametrize("spread", [1.0, 1e6])
def test_least_norm_is_the_simplex_qp_without_a_linear_term(size, rank, seed, spread):
    h = cosines(size, rank, seed)
    a = spread ** np.random.default_rng(seed).uniform(-0.5, 0.5, size)
    found, wanted = least_norm(h, a), simplex_qp(h, np.zeros(size), a)
    assert (found.x >= 0).all()
    assert a @ found.x == pytest.approx(1, rel=1e-12)
    assert found.residual < 1e-12
    # The minimiser need not be unique, but Hy is.
    assert np.abs(h @ (found.x - wanted.x)).max() < 1e-7 * wanted.x.sum()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("size", "rank"), [(2, 2), (5, 9), (12, 30), (12, 6), (40, 60)])
def test_exchanging_many_entries_ends_where_the_active_set_does(size, rank, seed):
    h = cosines(size, rank, seed)
    b = h @ np.random.default_rng(seed + 1).standard_normal(size)
    found, wanted = _block_pivoting(h, b, 1.0), _active_set(h, b, 1.0)
    if found is None:
        assert rank < size
    else:
        assert np.abs(h @ (found.x - wanted.x)).max() < 1e-7 * np.abs(b).max()


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("width", [22, 60])
def test_opposite_rows_are_not_answered_by_huge_multiples(seed, width):
    # They fulfil the conditions up to rounding of themselves, and make a direction of it.
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((20, width))
    j = np.concatenate([rows, -rng.uniform(0.1, 10, (20, 1)) * rows])[rng.permutation(40)]
    h = cosine_matrix(j @ j.T)[0]
    found = nonnegative_qps(h, -h)
    assert found.residual < 1e-11
    assert found.x.max() < 1e6
    # Every row is projected on the directions orthogonal to all others: on nothing.
    assert np.abs(h @ (np.eye(40) + found.x)).max() < 1e-9
    assert nonnegative_qp(h, -h[0]).x.max() < 1e6


def test_a_singular_problem_ends_with_a_small_residual():
    h = np.array([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]])
    assert nonnegative_qp(h, -h[:, 0]).residual < 1e-12
    found = simplex_qp(h, np.zeros(3), np.ones(3))
    assert found.x @ h @ found.x < 1e-15


@pytest.mark.parametrize("seed", range(20))
def test_fair_newton_takes_few_steps(seed):
    c = np.abs(cosines(8, 12, seed))
    np.fill_diagonal(c, 1.0)
    c = positive_part(c)
    found = fair_newton(c, np.ones(8), 1.0, 1e-10)
    assert found.residual < 1e-13
    assert found.iterations <= 9
    assert np.abs(found.x * (c @ found.x) - 1).max() < 1e-13


def test_fair_newton_keeps_its_ridge_where_there_is_no_solution_without():
    c = np.array([[1.0, -1], [-1, 1]])
    found = fair_newton(c, np.ones(2), 1.0, 1e-10)
    assert found.x == pytest.approx([1e5, 1e5], rel=1e-6)
    assert found.residual < 1e-12


def test_cosine_matrix_leaves_zero_rows_out_relative_to_the_largest():
    g = np.diag([1e-30, 0.0, 1e-60, 1e-50])
    c, n, active = cosine_matrix(g)
    assert active.tolist() == [0, 3]
    assert n == pytest.approx([1e-15, 1e-25])
    assert np.array_equal(c, np.eye(2))
    assert cosine_matrix(np.zeros((3, 3)))[2].size == 0


def test_positive_part_removes_what_rounding_made_negative():
    noisy = np.array([[1.0, 1 + 1e-8], [1 + 1e-8, 1.0]])
    assert np.linalg.eigvalsh(noisy)[0] < 0
    cleaned = positive_part(noisy)
    assert np.linalg.eigvalsh(cleaned)[0] > -1e-15
    assert np.abs(cleaned - noisy).max() < 2e-8
    definite = cosines(4, 9, 0)
    np.testing.assert_allclose(positive_part(definite), definite, atol=1e-14)


@pytest.mark.parametrize("rank", [2, 5])
def test_pinv_times(rank):
    c = cosines(5, rank, 0)
    b = np.random.default_rng(1).standard_normal(5)
    wanted = np.linalg.pinv(c, rcond=1e-10) @ b
    np.testing.assert_allclose(pinv_times(c, b, 1e-12), wanted, atol=1e-9)


def test_pinv_times_of_eigenvalues_that_are_rounding_of_both_signs():
    # Two rows and one opposite: 1/λ of the two errors cancels in the trace of the "inverse".
    v = np.array([1.0, 1.0, -1.0])
    turned = np.linalg.qr(np.stack([v, [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], 1))[0]
    for noise in (1e-16, 3e-15):
        c = turned @ np.diag([3.0, noise, -noise]) @ turned.T
        c = 0.5 * (c + c.T)
        np.testing.assert_allclose(pinv_times(c, np.ones(3), 1e-12), v / 9.0, atol=1e-13)


def test_pinv_times_solves_nearly_equal_rows():
    # The inverse's entries are 1e10; formed and multiplied, they would leave 1e-6 of a residual.
    c = np.full((5, 5), 1.0 - 1e-10) + 1e-10 * np.eye(5)
    assert np.abs(c @ pinv_times(c, np.ones(5), 1e-12) - 1.0).max() < 1e-12


def test_an_unsolved_problem_warns_with_the_numbers():
    with pytest.warns(SolverWarning, match=r"a test: residual 1\.0e-03 after 7 iterations"):
        x = checked(Solution(np.ones(2), 1e-3, 7), "a test")
    assert np.array_equal(x, np.ones(2))
    with pytest.warns(SolverWarning, match="residual nan"):
        checked(Solution(np.ones(2), float("nan"), 1), "a test")
    assert solvers.RESIDUAL == 1e-8


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40),
    st.sampled_from([0.0, 1.0, -1e12]),
)
def test_projection_on_the_simplex(entries, offset):
    v = np.asarray(entries) + offset
    w = project_simplex(v)
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1, abs=1e-12)
    # The KKT conditions: v − w is one number where w > 0 and not more elsewhere.
    theta = (v - w)[w > 0]
    rounding = 1e-12 * (1 + np.abs(v).max())
    assert np.ptp(theta) <= rounding
    assert ((v - w)[w == 0] <= theta.min() + rounding).all()


@pytest.mark.parametrize("size", [1, 2, 5, 40])
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_project_simplex(size, spread):
    v = spread * np.random.default_rng(size).standard_normal(size)
    w = cvxpy.Variable(size)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(w - v)), [w >= 0, cvxpy.sum(w) == 1])
    problem.solve(solver=cvxpy.CLARABEL)
    np.testing.assert_allclose(project_simplex(v), w.value, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8, 1e16])
@pytest.mark.parametrize("shift", [0.0, -1e6, 1e6])
def test_project_simplex_optimality(scale, shift):
    # w is the projection of v if v − w is θ where w is positive, and at most θ elsewhere.
    for seed in range(50):
        v = scale * np.random.default_rng(seed).standard_normal(7) + shift
        w = project_simplex(v)
        gap = (v - v.max()) - w
        theta = gap[w > 0].mean()
        assert (w >= 0).all()
        assert w.sum() == pytest.approx(1, abs=1e-14)
        assert np.abs(gap[w > 0] - theta).max() < 1e-14
        assert (gap[w == 0] <= theta + 1e-14).all()


def test_project_simplex_leaves_its_points_and_splits_ties():
    w = np.array([0.25, 0.0, 0.75])
    np.testing.assert_allclose(project_simplex(w), w, atol=1e-16)
    np.testing.assert_allclose(project_simplex(np.full(4, 1e16)), np.full(4, 0.25), atol=1e-16)
    assert project_simplex(np.array([5.0, -1e300])).tolist() == [1.0, 0.0]
