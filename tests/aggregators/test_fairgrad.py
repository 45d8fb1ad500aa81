"""FairGrad: closed forms, its limits, cvxpy, optimality at every scale and every α."""

import numpy as np
import pytest
import torch

import gradbal
from gradbal.aggregators.fairgrad import fairgrad
from gradbal.aggregators.nash_mtl import nash_mtl
from gradbal.solvers import cosine_matrix, fair_newton
from tests.aggregators.inputs import FAMILIES, Case, random_rows
from tests.aggregators.reference import fair, least_norm

ALPHAS = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0)
alphas = pytest.mark.parametrize("alpha", ALPHAS)


def gramian(j):
    return torch.from_numpy(j @ j.T)


@alphas
@pytest.mark.parametrize("seed", range(40))
def test_closed_form_for_two_orthogonal_or_equally_long_rows(alpha, seed):
    rng = np.random.default_rng(seed)
    squares = torch.from_numpy(10 ** rng.uniform(-6, 6, 2))
    power = -alpha / (1 + alpha)
    torch.testing.assert_close(
        fairgrad(torch.diag(squares), alpha=alpha), squares**power, rtol=1e-9, atol=0
    )
    n, cosine = 10 ** rng.uniform(-3, 3), rng.uniform(-0.99, 0.99)
    g = n**2 * torch.tensor([[1, cosine], [cosine, 1]], dtype=torch.float64)
    wanted = torch.full((2,), (n**2 * (1 + cosine)) ** power, dtype=torch.float64)
    torch.testing.assert_close(fairgrad(g, alpha=alpha), wanted, rtol=1e-9, atol=0)


@alphas
@pytest.mark.parametrize("n_tasks", [3, 5, 10])
@pytest.mark.parametrize("spread", [1.0, 1e6])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_optimality(alpha, n_tasks, spread, scale):
    for seed in range(10):
        j = (random_rows(n_tasks, 15, seed, spread) - 0.3) * scale
        w = fairgrad(gramian(j), alpha=alpha).numpy()
        n = np.linalg.norm(j, axis=1)
        gains, wanted = j @ (w @ j), w ** (-1 / alpha)
        size = np.maximum(n * (w @ n), wanted)
        assert (w > 0).all()
        assert (np.abs(gains - wanted) / size).max() < 1e-12


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize(("n_tasks", "width"), [(2, 3), (3, 20), (10, 40)])
def test_it_maximises_the_fair_utility(alpha, n_tasks, width):
    j = np.abs(random_rows(n_tasks, width, 0, spread=4.0))  # every pair agrees: not stationary
    j /= np.linalg.norm(j)
    wanted = fair(j, alpha)
    found = fairgrad(gramian(j), alpha=alpha).numpy() @ j
    assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize("spread", [1.0, 1e6])
def test_alpha_one_is_nash(spread):
    for seed in range(30):
        g = gramian(random_rows(6, 15, seed, spread) - 0.3)
        torch.testing.assert_close(fairgrad(g, alpha=1.0), nash_mtl(g), rtol=1e-9, atol=0)
    near = [fairgrad(g, alpha=a) for a in (1 - 1e-6, 1 + 1e-6)]
    torch.testing.assert_close(sum(near) / 2, nash_mtl(g), rtol=1e-9, atol=0)


def test_small_alpha_is_the_sum_and_large_alpha_points_like_mgda():
    j = np.abs(random_rows(4, 9, 3)) + 0.2
    torch.testing.assert_close(
        fairgrad(gramian(j), alpha=1e-3), torch.ones(4, dtype=torch.float64), rtol=1e-2, atol=0
    )
    d, least = fairgrad(gramian(j), alpha=10.0).numpy() @ j, least_norm(j)
    assert d @ least > 0.99 * np.linalg.norm(d) * np.linalg.norm(least)


@alphas
def test_homogeneous_of_its_degree(alpha):
    j = torch.from_numpy(random_rows(5, 15, 0, 100.0))
    method = gradbal.create("fairgrad", alpha=alpha)
    for scale in (1e-8, 1e-4, 1e4, 1e8):
        wanted = scale ** ((1 - alpha) / (1 + alpha)) * method.direction(j)
        torch.testing.assert_close(method.direction(scale * j), wanted, rtol=1e-9, atol=0)


@alphas
def test_equal_rows_and_a_single_task(alpha):
    g = torch.randn(9, dtype=torch.float64) * 7
    method = gradbal.create("fairgrad", alpha=alpha)
    for n_tasks in (1, 2, 5):
        gain = n_tasks * (n_tasks * g @ g) ** (-alpha / (1 + alpha))
        torch.testing.assert_close(method.direction(g.expand(n_tasks, -1)), gain * g)


@alphas
@pytest.mark.parametrize("family", FAMILIES)
def test_the_solver_converges_on_every_family(alpha, family):
    for seed in range(10):
        j = Case(family, 2 + seed, 12, seed).jacobian().numpy()
        c, n, _ = cosine_matrix(j @ j.T)
        if len(n):
            solution = fair_newton(c, n, alpha, 1e-10)
            assert solution.residual < 1e-10
            assert solution.iterations < 200


@pytest.mark.parametrize("ratio", [1e-3, 1.0, 50.0])
def test_opposite_gradients_give_something_finite(ratio):
    g = torch.randn(6, dtype=torch.float64)
    for alpha in ALPHAS:
        d = gradbal.create("fairgrad", alpha=alpha).direction(torch.stack([g, -ratio * g]))
        assert d.isfinite().all()
    # Where Nash's solution goes to zero, so does this one.
    assert float(gradbal.create("fairgrad").direction(torch.stack([g, -ratio * g])).norm()) < 1e-4


def test_norms_and_heads():
    j = torch.from_numpy(random_rows(3, 30, 1, 100.0))
    g = j @ j.T
    method = gradbal.create("fairgrad", alpha=2.0, max_norm=1e-3)
    assert float(method.direction(j).norm()) == pytest.approx(1e-3)
    # Task-specific gradients are not scaled to the norm.
    torch.testing.assert_close(method.head_weights(method.weights(g), g), fairgrad(g, alpha=2.0))
    stationary = 9 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    capped = method.head_weights(method.weights(stationary), stationary)
    torch.testing.assert_close(capped, torch.full_like(capped, 100 * 9 ** (-2 / 3)))
    assert gradbal.info("fairgrad").promises.heads == "own"


def test_bad_hyperparameters():
    with pytest.raises(ValueError, match=r"`alpha` must be in \(0, 10\], found 0"):
        gradbal.create("fairgrad", alpha=0)
    with pytest.raises(ValueError, match=r"`alpha` must be in \(0, 10\], found 11"):
        gradbal.create("fairgrad", alpha=11)
    with pytest.raises(TypeError, match="`alpha` must be a number"):
        gradbal.create("fairgrad", alpha="fair")
    with pytest.raises(ValueError, match="`max_norm`"):
        gradbal.create("fairgrad", max_norm=-1)
