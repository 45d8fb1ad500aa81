"""The methods that are convex problems, against cvxpy, closed forms and their own optimality."""

import math
from functools import partial

import numpy as np
import pytest
import torch

import gradbal
from benchmarks.jacobians import FAMILIES, hard_jacobian, random_jacobian
from benchmarks.residuals import RESIDUALS, worst_residuals
from gradbal.aggregators.cagrad import _by_bracket, _by_exchange, cagrad
from gradbal.aggregators.mgda import mgda
from gradbal.aggregators.nash_mtl import nash_mtl
from gradbal.aggregators.pcgrad import pcgrad
from gradbal.aggregators.upgrad import upgrad
from gradbal.solvers import cosine_matrix
from tests.aggregators.inputs import random_rows
from tests.aggregators.reference import (
    bargain,
    best_worst_gain,
    least_norm,
    project_on_dual_cone,
)

SIZES = [(2, 3), (3, 20), (5, 8), (5, 3), (10, 40)]

sizes = pytest.mark.parametrize(("n_tasks", "width"), SIZES)
seeds = pytest.mark.parametrize("seed", range(3))


def gramian(j):
    return torch.from_numpy(j @ j.T)


def close(found, wanted, tolerance, size=None):
    size = np.linalg.norm(wanted) if size is None else size
    assert np.linalg.norm(found - wanted) <= tolerance * size


@sizes
@seeds
def test_mgda_is_the_least_norm_point(n_tasks, width, seed):
    j = random_rows(n_tasks, width, seed, spread=10.0)
    found = mgda(gramian(j)).numpy() @ j
    close(found, least_norm(j), 1e-5, np.linalg.norm(j, axis=1).min())


@sizes
@seeds
def test_upgrad_is_the_mean_of_projections_on_the_dual_cone(n_tasks, width, seed):
    j = random_rows(n_tasks, width, seed, spread=100.0)
    found = upgrad(gramian(j), np.full(n_tasks, 1 / n_tasks)).numpy() @ j
    # One projection at a time on unit rows, since the solver's tolerance is absolute.
    n = np.linalg.norm(j, axis=1, keepdims=True)
    parts = n * [project_on_dual_cone(j, g) for g in j / n]
    close(found, parts.mean(0), 1e-5, n.mean())


@sizes
@seeds
def test_cagrad_helps_the_worst_task_as_much_as_possible(n_tasks, width, seed):
    j = random_rows(n_tasks, width, seed, spread=10.0)
    d = cagrad(gramian(j), 0.5).numpy() @ j
    mean = j.mean(0)
    assert np.linalg.norm(d - mean) == pytest.approx(0.5 * np.linalg.norm(mean), rel=1e-9)
    scale = np.linalg.norm(j, axis=1).max() * np.linalg.norm(mean)
    assert (j @ d).min() == pytest.approx(best_worst_gain(j, 0.5), abs=1e-7 * scale)


@sizes
@seeds
def test_nash_mtl_maximises_the_product_of_gains(n_tasks, width, seed):
    j = np.abs(random_rows(n_tasks, width, seed, spread=10.0))  # every pair agrees: not stationary
    close(nash_mtl(gramian(j)).numpy() @ j, bargain(j), 1e-5)


@pytest.mark.parametrize("name", list(RESIDUALS))
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_optimality_residuals_at_every_scale(name, scale):
    # CAGrad's gap is that of a maximum found by a root of a quadratic: half the digits are safe.
    limit = 1e-9 if name == "cagrad" else 1e-11
    draw = partial(random_jacobian, spread=1e6, scale=scale)
    assert worst_residuals(name, 50, draw, seed=1)[1] < limit


@pytest.mark.parametrize("name", list(RESIDUALS))
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "zero"])
def test_optimality_residuals_on_every_family(name, family):
    worst = worst_residuals(name, 20, partial(hard_jacobian, family=family), seed=1)[1]
    # NaN says that the method's condition is not defined on the family.
    assert not worst >= 1e-8


def test_every_registered_method_has_a_residual():
    names = gradbal.list_aggregators()
    with_direction = {n for n in names if hasattr(gradbal.info(n).cls, "direction")}
    assert set(RESIDUALS) == with_direction


def two_rows(seed):
    j = torch.from_numpy(random_rows(2, 4, seed, spread=1e6)) - 0.3
    g = j @ j.T
    n = g.diagonal().sqrt()
    return g, n, float(g[0, 1] / n[0] / n[1])


@pytest.mark.parametrize("seed", range(200))
def test_closed_forms_for_two_tasks(seed):
    g, n, cosine = two_rows(seed)
    conflict = cosine < 0
    ones = torch.ones(2, dtype=torch.float64)
    projected = 1 - g[0, 1] / g.diagonal() if conflict else ones

    gamma = ((g[1, 1] - g[0, 1]) / (g[0, 0] + g[1, 1] - 2 * g[0, 1])).clamp(0, 1)
    expected = {
        "mgda": torch.stack([gamma, 1 - gamma]),
        "pcgrad": projected,
        "upgrad": 0.5 * projected,
        "nash_mtl": 1 / (n * math.sqrt(1 + cosine)),
        "imtl_g": n.flip(0) / n.sum(),
    }
    for name, w in expected.items():
        keywords = {"max_norm": 0.0} if name == "nash_mtl" else {}
        found = gradbal.create(name, **keywords).weights(g)
        torch.testing.assert_close(found, w, rtol=1e-9, atol=0, msg=lambda m, name=name: name + m)


def test_mgda_on_orthogonal_rows_weighs_by_inverse_squares():
    squares = torch.tensor([1.0, 4.0, 1e6, 1e-6], dtype=torch.float64)
    w = mgda(torch.diag(squares))
    torch.testing.assert_close(w, (1 / squares) / (1 / squares).sum(), rtol=1e-12, atol=0)


def test_mgda_does_not_change_when_a_row_comes_twice():
    j = torch.randn(4, 9, dtype=torch.float64)
    twice = torch.cat([j, j[:2]])
    d, d_twice = (gradbal.create("mgda").direction(x) for x in (j, twice))
    torch.testing.assert_close(d_twice, d, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["l2", "loss", "loss+"])
def test_mgda_normalises_for_the_solve_alone(norm):
    j = torch.randn(4, 9, dtype=torch.float64) * torch.tensor([[1.0], [10.0], [0.1], [3.0]])
    losses = torch.tensor([0.5, 2.0, 7.0, 1.0], dtype=torch.float64)
    divisor = {
        "l2": j.norm(dim=1),
        "loss": losses,
        "loss+": losses * j.norm(dim=1),
    }[norm]
    w = gradbal.create("mgda", norm=norm).weights(j @ j.T, losses)
    normalised = (j / divisor[:, None]).numpy()
    close(w.numpy() @ normalised, least_norm(normalised), 1e-6)
    torch.testing.assert_close(gradbal.create("mgda", norm=norm).direction(j, losses), w @ j)


def test_mgda_names_what_its_norm_lacks():
    g = torch.eye(2)
    with pytest.raises(ValueError, match="needs the losses, found None"):
        gradbal.create("mgda", norm="loss").weights(g)
    with pytest.raises(ValueError, match="needs positive losses"):
        gradbal.create("mgda", norm="loss+").weights(g, torch.tensor([1.0, 0.0]))


def test_mgda_stops_where_one_task_is_at_its_optimum_unless_told_otherwise():
    j = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert not gradbal.create("mgda").direction(j).any()
    kept = gradbal.create("mgda", ignore_zero_rows=True).direction(j)
    torch.testing.assert_close(kept, j[1])


@pytest.mark.parametrize("name", ["mgda", "upgrad", "pcgrad", "nash_mtl", "imtl_g"])
@pytest.mark.parametrize("ratio", [1e-3, 1.0, 50.0])
def test_opposite_gradients_cancel(name, ratio):
    g = torch.randn(6, dtype=torch.float64)
    d = gradbal.create(name).direction(torch.stack([g, -ratio * g]))
    # Nash-MTL's ridge of 1e-10 leaves the root of that, in units of a gradient.
    assert float(d.norm()) < (1e-4 if name == "nash_mtl" else 1e-7) * float(g.norm())


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 3.0])
@pytest.mark.parametrize("spread", [1.0, 1e6])
def test_cagrad_finds_the_same_by_exchange_and_by_bracket(c, spread):
    settled = 0
    for seed in range(40):
        j = random_rows(2 + seed % 12, 20, seed, spread)
        h, n, _ = cosine_matrix(j @ j.T)
        n = n / n.max()
        q = h @ n / len(n)
        problem = h, q, 1 / n, c * math.sqrt(n @ q / len(n))
        found = _by_exchange(*problem)
        if found is not None:
            settled += 1
            y, length = _by_bracket(*problem)
            close(found[0], y, 1e-9)
            assert found[1] == pytest.approx(length, rel=1e-9)
    assert settled > 35


def test_cagrad_leaves_stationary_points_to_the_bracket():
    h = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert _by_exchange(h, h @ [1.0, 0.5], np.array([1.0, 2.0]), 0.1) is None


def test_cagrad_without_a_ball_is_the_mean_and_with_a_huge_one_points_like_mgda():
    j = torch.from_numpy(random_rows(4, 9, 0))
    torch.testing.assert_close(gradbal.create("cagrad", c=0.0).direction(j), j.mean(0))
    d = cagrad(j @ j.T, 1e6) @ j
    least = torch.from_numpy(least_norm(j.numpy()))
    assert float(torch.cosine_similarity(d, least, 0)) > 1 - 1e-6


@pytest.mark.parametrize("rescale", [0, 1, 2])
def test_cagrad_rescaling(rescale):
    j = torch.from_numpy(random_rows(3, 9, 0))
    raw = cagrad(j @ j.T, 0.4) @ j
    divisor = {0: 1.0, 1: 1 + 0.4**2, 2: 1.4}[rescale]
    d = gradbal.create("cagrad", c=0.4, rescale=rescale).direction(j)
    torch.testing.assert_close(d, raw / divisor)


def test_cagrad_still_lowers_the_mean_at_a_pareto_stationary_point():
    # 2g and −g: stationary for MGDA, but the mean gradient is g/2.
    g = torch.tensor([1.0, 2.0], dtype=torch.float64)
    j = torch.stack([2 * g, -g])
    d = gradbal.create("cagrad", c=0.5, rescale=0).direction(j)
    assert float(d @ j.mean(0)) > 0
    assert (d - j.mean(0)).norm() <= 0.5 * j.mean(0).norm() * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1e-12])
@pytest.mark.parametrize("name", ["upgrad", "cagrad", "mgda", "nash_mtl"])
def test_tiny_gradients_are_balanced_like_large_ones(name, scale):
    # Known implementations take Gramians of trace below 1e-4 for zero.
    j = torch.tensor([[1.0, 0.0, 1.0], [-2.0, 1.0, 0.0]], dtype=torch.float64)
    w = gradbal.create(name).weights(j @ j.T)
    w_tiny = gradbal.create(name).weights(j @ j.T * scale**2)
    if name == "nash_mtl":
        w_tiny = w_tiny * scale
    torch.testing.assert_close(w_tiny, w, rtol=1e-10, atol=0)


@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize("name", ["upgrad", "mgda", "nash_mtl"])
def test_no_conflict_with_a_small_row(name, ratio):
    # An absolute ridge leaves a conflict with the small row that an absolute test does not see.
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([-0.9, math.sqrt(0.19)], dtype=torch.float64) * ratio
    d = gradbal.create(name).direction(torch.stack([a, b]))
    assert float(b @ d) >= -1e-9 * ratio * float(d.norm())
    assert float(a @ d) >= -1e-9 * float(d.norm())


def test_pcgrad_orders_matter_and_leave_the_task_itself_out():
    j = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [-0.6, -1.0]], dtype=torch.float64)
    g = j @ j.T
    one = pcgrad(g, torch.tensor([[1, 2], [0, 2], [0, 1]]))
    other = pcgrad(g, torch.tensor([[2, 1], [2, 0], [1, 0]]))
    assert not torch.allclose(one, other)
    from gradbal.aggregators.pcgrad import random_orders

    orders = random_orders(5, torch.Generator().manual_seed(1))
    assert orders.shape == (5, 4)
    for i, order in enumerate(orders):
        assert sorted(order.tolist()) == [k for k in range(5) if k != i]


def test_pcgrad_mean_is_the_sum_over_tasks():
    j = torch.randn(3, 7)
    seeded = [torch.Generator().manual_seed(3) for _ in range(2)]
    total = gradbal.create("pcgrad", generator=seeded[0]).direction(j)
    mean = gradbal.create("pcgrad", reduction="mean", generator=seeded[1]).direction(j)
    torch.testing.assert_close(mean, total / 3)


@pytest.mark.parametrize("spread", [1.0, 1e6])
def test_nash_mtl_gains_and_length(spread):
    j = torch.from_numpy(random_rows(6, 30, 1, spread))
    w = nash_mtl(j @ j.T)
    d = w @ j
    torch.testing.assert_close(j @ d, 1 / w, rtol=1e-9, atol=0)
    assert float(d.norm()) == pytest.approx(math.sqrt(6), rel=1e-9)
    assert float(gradbal.create("nash_mtl").direction(j).norm()) == pytest.approx(1, rel=1e-9)
    # The norm is a bound: a longer one changes nothing.
    loose = gradbal.create("nash_mtl", max_norm=10.0).direction(j)
    torch.testing.assert_close(loose, d, rtol=1e-9, atol=0)


def test_nash_mtl_weights_heads_by_the_unclipped_solution_up_to_its_bound():
    j = torch.from_numpy(random_rows(3, 30, 1, 100.0))
    g = j @ j.T
    method = gradbal.create("nash_mtl")
    torch.testing.assert_close(method.head_weights(method.weights(g), g), nash_mtl(g))
    stationary = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    capped = method.head_weights(method.weights(stationary), stationary)
    torch.testing.assert_close(capped, torch.full_like(capped, 100.0))


def test_imtl_g_has_equal_projections_and_a_guard_against_ascent():
    j = torch.from_numpy(random_rows(4, 9, 2, 100.0))
    d = gradbal.create("imtl_g").direction(j)
    projections = (j @ d) / j.norm(dim=1)
    torch.testing.assert_close(projections, projections[:1].expand(4), rtol=1e-8, atol=0)
    # Here 1ᵀG⁺n is negative: the paper's formula moves up every loss.
    rng = np.random.default_rng(0)
    ascents = 0
    for _ in range(400):
        rows = torch.from_numpy(rng.standard_normal((3, 5)) * 10 ** rng.uniform(-2, 2, (3, 1)))
        paper = gradbal.create("imtl_g", guard=False).direction(rows)
        guarded = gradbal.create("imtl_g").direction(rows)
        if (rows @ paper < 0).all():
            ascents += 1
            assert (rows @ guarded > 0).all()
        assert guarded.norm() <= rows.norm(dim=1).max() * (1 + 1e-9)
    assert ascents > 4


def test_imtl_g_takes_identical_gradients():
    # The paper inverts a matrix that is singular here.
    j = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    d = gradbal.create("imtl_g").direction(j)
    projections = (j @ d) / j.norm(dim=1)
    torch.testing.assert_close(projections, projections[:1].expand(3), rtol=1e-9, atol=0)


def test_upgrad_preferences():
    j = torch.from_numpy(random_rows(3, 9, 0))
    g = j @ j.T
    parts = [gradbal.create("upgrad", pref=row.tolist()).weights(g) for row in torch.eye(3)]
    mixed = gradbal.create("upgrad", pref=[0.5, 2.0, 0.0]).weights(g)
    torch.testing.assert_close(mixed, 0.5 * parts[0] + 2 * parts[1])
    with pytest.raises(ValueError, match="one entry for each of 3 tasks"):
        gradbal.create("upgrad", pref=[1.0, 1.0]).weights(g)
    with pytest.raises(ValueError, match="non-negative"):
        gradbal.create("upgrad", pref=[1.0, -1.0])


def test_mgda_takes_many_tasks_without_an_iteration_limit():
    rng = np.random.default_rng(5)
    j = torch.from_numpy(rng.standard_normal((100, 300)) * 10 ** rng.uniform(-3, 3, (100, 1)))
    w = mgda(j @ j.T)
    d = w @ j
    gap = (j @ d - d @ d) / (j.norm(dim=1) * (w @ j.norm(dim=1)))
    assert float(gap.min()) > -1e-12
