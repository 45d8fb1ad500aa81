"""Primary and secondary tasks: closed form, the projection by cvxpy, optimality."""

import numpy as np
import pytest
import torch

import gradbal
from tests.aggregators.inputs import random_rows
from tests.aggregators.reference import project_on_dual_cone


@pytest.mark.parametrize("seed", range(200))
def test_closed_form_for_one_secondary_task(seed):
    j = torch.from_numpy(random_rows(2, 5, seed, spread=1e6) - 0.3)
    g = j @ j.T
    wanted = torch.stack([torch.ones(()).double(), (-g[0, 1] / g[1, 1]).clamp(min=0)])
    found = gradbal.create("primary").weights(g)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    flipped = gradbal.create("primary", primary=1).weights(g.flip(0, 1)).flip(0)
    torch.testing.assert_close(flipped, wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("n_tasks", "width"), [(3, 20), (5, 8), (5, 3), (10, 40)])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_it_is_the_projection_of_the_primary_gradient(n_tasks, width, beta):
    for seed in range(3):
        j = random_rows(n_tasks, width, seed, spread=10.0) - 0.3
        j /= np.linalg.norm(j[1])
        others = np.delete(j, 1, 0)
        method = gradbal.create("primary", primary=1, secondary_weight=beta)
        found = method.direction(torch.from_numpy(j)).numpy()
        wanted = project_on_dual_cone(others, j[1] + beta * others.sum(0))
        size = 1 + beta * np.linalg.norm(others, axis=1).sum()
        assert np.linalg.norm(found - wanted) < 1e-5 * size


@pytest.mark.parametrize("n_tasks", [3, 5, 10])
@pytest.mark.parametrize("spread", [1.0, 1e6])
def test_optimality(n_tasks, spread):
    for seed in range(20):
        j = random_rows(n_tasks, 12, seed, spread) - 0.3
        w = gradbal.create("primary").weights(torch.from_numpy(j @ j.T)).numpy()
        n, d = np.linalg.norm(j, axis=1), w @ j
        gains = j @ d / n / (w @ n)
        assert w[0] == 1
        assert (w >= 0).all()
        assert gains[1:].min() > -1e-12
        assert np.abs(gains[1:][w[1:] > 0]).max(initial=0) < 1e-12
        assert j[0] @ d == pytest.approx(d @ d, abs=1e-12 * (w @ n) * n[0])
        assert np.linalg.norm(d) <= n[0] * (1 + 1e-12)


def test_the_scale_of_a_secondary_loss_changes_nothing():
    j = torch.from_numpy(random_rows(4, 9, 0) - 0.3)
    scales = torch.tensor([[1.0], [1e-4], [1e3], [7.0]], dtype=torch.float64)
    one, other = (gradbal.create("primary").direction(x) for x in (j, scales * j))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_degenerate_cases():
    g = torch.randn(6, dtype=torch.float64)
    method = gradbal.create("primary")
    torch.testing.assert_close(method.direction(g[None]), g)
    assert float(method.direction(torch.stack([g, -50 * g])).norm()) < 1e-7
    torch.testing.assert_close(method.direction(torch.stack([g, 0 * g])), g)
    assert not method.direction(torch.stack([0 * g, g])).any()


def test_tasks_that_sit_out():
    j = torch.from_numpy(random_rows(3, 9, 0) - 0.3)
    method = gradbal.create("primary", primary=2, secondary_weight=0.5)
    part = j[[0, 2]] @ j[[0, 2]].T
    wanted = gradbal.create("primary", primary=1, secondary_weight=0.5).weights(part)
    assert torch.equal(method.weights(part, tasks=[0, 2]), wanted)
    # Without the primary task there is nothing to project but the secondary ones' share.
    assert not gradbal.create("primary", primary=1).weights(part, tasks=[0, 2]).any()


def test_bad_hyperparameters():
    with pytest.raises(TypeError, match="`primary` must be an integer, found 'depth'"):
        gradbal.create("primary", primary="depth")
    with pytest.raises(ValueError, match=r"`primary` must be in \[0, inf\)"):
        gradbal.create("primary", primary=-1)
    with pytest.raises(ValueError, match="`secondary_weight` must be in"):
        gradbal.create("primary", secondary_weight=-1.0)
    method = gradbal.create("primary", primary=2)
    with pytest.raises(ValueError, match="the index of one of 2 tasks, found 2"):
        method.weights(torch.eye(2))
