"""MGDA by Frank-Wolfe: the paper's algorithm on the vectors, its limits, degenerate inputs."""

import math

import numpy as np
import pytest
import torch

import gradbal
from gradbal.aggregators.mgda import mgda
from tests.aggregators.inputs import random_rows


def frank_wolfe(j, iterations, tol):
    """On the vectors; the step by a fine search, not by its formula."""
    w = np.full(len(j), 1 / len(j))
    for _ in range(iterations):
        t = np.argmin(j @ (w @ j))
        a, b = w @ j, j[t] - w @ j
        low, high = 0.0, 1.0
        for _ in range(200):  # |a + γb|² is convex in γ
            thirds = low + (high - low) / 3, high - (high - low) / 3
            first, second = ((a + x * b) @ (a + x * b) for x in thirds)
            low, high = (low, thirds[1]) if first < second else (thirds[0], high)
        step = 0.5 * (low + high)
        w = (1 - step) * w + step * np.eye(len(j))[t]
        if step < tol:
            break
    return w


@pytest.mark.parametrize("n_tasks", [2, 3, 6])
@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("iterations", [1, 2, 10, 250])
def test_it_is_the_papers_algorithm(n_tasks, spread, iterations):
    for seed in range(5):
        j = random_rows(n_tasks, 9, seed, spread)
        found = mgda(torch.from_numpy(j @ j.T), solver="frank_wolfe", max_iter=iterations)
        wanted = frank_wolfe(j, iterations, 1e-3)
        assert np.linalg.norm((found.numpy() - wanted) @ j) < 1e-5 * np.linalg.norm(j)


@pytest.mark.parametrize("n_tasks", [2, 5, 10])
def test_it_ends_near_the_exact_answer(n_tasks):
    j = torch.from_numpy(random_rows(n_tasks, 30, 0))
    exact = gradbal.create("mgda").direction(j)
    loose = gradbal.create("mgda", solver="frank_wolfe").direction(j)
    tight = gradbal.create("mgda", solver="frank_wolfe", max_iter=20_000, tol=1e-6).direction(j)
    assert exact.norm() <= loose.norm() * (1 + 1e-12) <= 1.05 * exact.norm()
    assert (tight - exact).norm() <= (loose - exact).norm() * (1 + 1e-9)
    assert (tight - exact).norm() < 0.02 * exact.norm()


def test_the_iteration_limit_ends_it_without_a_warning():
    # tol = 0 never ends by itself: a copy in use does not count its iterations.
    j = torch.from_numpy(random_rows(7, 30, 0, 10.0))
    w = gradbal.create("mgda", solver="frank_wolfe", max_iter=50, tol=0.0).weights(j @ j.T)
    assert (w >= 0).all()
    assert float(w.sum()) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("solver", ["exact", "frank_wolfe"])
def test_a_dominated_task_does_not_leak(solver):
    # Steps kept in [0.001, 0.999] leave it a thousandth.
    j = torch.tensor([[1.0, 0.0], [5.0, 0.5]], dtype=torch.float64)
    assert gradbal.create("mgda", solver=solver).weights(j @ j.T).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("norm", ["none", "l2"])
@pytest.mark.parametrize("scale", [1e-150, 1e-8, 1.0, 1e8, 1e150])
def test_a_single_task_of_any_norm_has_all_the_weight(norm, scale):
    j = scale * torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    method = gradbal.create("mgda", norm=norm, solver="frank_wolfe")
    torch.testing.assert_close(method.direction(j), j[0])


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e5, 1e30, 1e150])
def test_the_weights_do_not_depend_on_the_scale_of_all_gradients(scale):
    # A search that starts from a least norm of 1e8 finds nothing for larger gradients.
    j = torch.from_numpy(random_rows(5, 9, 0))
    method = gradbal.create("mgda", solver="frank_wolfe")
    w = method.weights(scale * j @ (scale * j).T)
    torch.testing.assert_close(w, method.weights(j @ j.T), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", ["none", "l2"])
def test_zero_rows_as_in_the_exact_solver(norm):
    # Dividing a zero row by its norm gives NaN.
    j = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    method = gradbal.create("mgda", norm=norm, solver="frank_wolfe")
    assert method.weights(j @ j.T).tolist() == [0.5, 0.0, 0.5]
    assert not method.direction(j).any()
    kept = gradbal.create("mgda", norm=norm, solver="frank_wolfe", ignore_zero_rows=True)
    torch.testing.assert_close(kept.direction(j), j[1])
    assert method.weights(torch.zeros(3, 3)).tolist() == pytest.approx([1 / 3] * 3)


def test_opposite_rows_cancel_and_equal_rows_stay():
    g = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    method = gradbal.create("mgda", solver="frank_wolfe")
    assert float(method.direction(torch.stack([g, -g])).norm()) < 1e-12
    torch.testing.assert_close(method.direction(torch.stack([g, g, g])), g)
    twice = torch.stack([g, g, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)])
    w = method.weights(twice @ twice.T)
    assert w.isfinite().all()
    assert float(w.sum()) == pytest.approx(1)


@pytest.mark.parametrize("norm", ["l2", "loss", "loss+"])
def test_rows_are_normalised_for_the_solve_alone(norm):
    j = torch.from_numpy(random_rows(4, 9, 0, 10.0))
    losses = torch.tensor([0.5, 2.0, 7.0, 1.0], dtype=torch.float64)
    lengths = j.norm(dim=1) if norm != "loss" else torch.ones(4)
    lengths = lengths * (losses if norm != "l2" else 1.0)
    method = gradbal.create("mgda", norm=norm, solver="frank_wolfe")
    units = j / lengths[:, None]
    w = torch.from_numpy(frank_wolfe(units.numpy(), 250, 1e-3))
    size = float(units.norm())
    assert float(((method.weights(j @ j.T, losses) - w) @ units).norm()) < 1e-5 * size
    torch.testing.assert_close(
        method.direction(j, losses), method.weights(j @ j.T, losses) @ j, rtol=1e-9, atol=1e-12
    )


def test_bad_hyperparameters():
    with pytest.raises(ValueError, match="`solver` must be one of 'exact', 'frank_wolfe'"):
        gradbal.create("mgda", solver="scipy")
    with pytest.raises(TypeError, match="`max_iter` must be an integer"):
        gradbal.create("mgda", max_iter=2.5)
    with pytest.raises(ValueError, match="`max_iter` must be in"):
        gradbal.create("mgda", max_iter=0)
    with pytest.raises(ValueError, match="`tol` must be in"):
        gradbal.create("mgda", tol=math.nan)
