"""DualProj: closed form, projection by cvxpy, optimality, conflicts that known code leaves."""

import math

import numpy as np
import pytest
import torch

import gradbal
from gradbal.aggregators.dualproj import dualproj
from tests.aggregators.inputs import random_rows
from tests.aggregators.reference import project_on_dual_cone


def uniform(n_tasks):
    return np.full(n_tasks, 1 / n_tasks)


@pytest.mark.parametrize("seed", range(200))
def test_closed_form_for_two_tasks(seed):
    rng = np.random.default_rng(seed)
    j = torch.from_numpy(rng.standard_normal((2, 5)) * 10 ** rng.uniform(-3, 3, (2, 1)))
    g, p = j @ j.T, torch.from_numpy(rng.uniform(0, 1, 2))
    r = g @ p
    wanted = torch.where(r < 0, p - r / g.diagonal(), p)
    found = gradbal.create("dualproj", pref=p.tolist()).weights(g)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("n_tasks", "width"), [(3, 20), (5, 8), (5, 3), (10, 40)])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_projection_on_the_dual_cone(n_tasks, width, seed):
    j = random_rows(n_tasks, width, seed, spread=10.0) - 0.3
    found = dualproj(torch.from_numpy(j @ j.T), uniform(n_tasks)).numpy() @ j
    size = np.linalg.norm(j, axis=1).mean()
    assert np.linalg.norm(found - project_on_dual_cone(j, j.mean(0))) <= 1e-5 * size


@pytest.mark.parametrize("n_tasks", [3, 5, 10])
@pytest.mark.parametrize("spread", [1.0, 1e6])
def test_optimality(n_tasks, spread):
    for seed in range(20):
        j = random_rows(n_tasks, 12, seed, spread) - 0.3
        w = dualproj(torch.from_numpy(j @ j.T), uniform(n_tasks)).numpy()
        n = np.linalg.norm(j, axis=1)
        gains = j @ (w @ j) / n / (w @ n)
        assert (w >= 1 / n_tasks).all()
        assert gains.min() > -1e-12
        assert np.abs(gains[w > 1 / n_tasks]).max(initial=0) < 1e-12


def test_without_conflict_it_is_the_preferred_combination():
    j = torch.rand(4, 9, dtype=torch.float64)
    pref = [0.5, 0.0, 2.0, 1.0]
    d = gradbal.create("dualproj", pref=pref).direction(j)
    torch.testing.assert_close(d, torch.tensor(pref, dtype=torch.float64) @ j)
    torch.testing.assert_close(gradbal.create("dualproj").direction(j), j.mean(0))


def test_upgrad_adds_up_the_projections_of_single_tasks():
    j = torch.randn(5, 9, dtype=torch.float64)
    parts = [gradbal.create("dualproj", pref=e.tolist()).direction(j) for e in torch.eye(5)]
    torch.testing.assert_close(
        torch.stack(parts).mean(0), gradbal.create("upgrad").direction(j), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize("scale", [1e-8, 1.0])
def test_no_conflict_with_a_small_row_or_between_small_rows(ratio, scale):
    # An absolute ridge leaves the first, a threshold on the trace the second.
    a = torch.tensor([1.0, 0.0], dtype=torch.float64) * scale
    b = torch.tensor([-0.9, math.sqrt(0.19)], dtype=torch.float64) * ratio * scale
    d = gradbal.create("dualproj").direction(torch.stack([a, b]))
    assert float(b @ d) >= -1e-12 * float(b.norm() * d.norm())
    assert float(a @ d) > 0


@pytest.mark.parametrize("ratio", [1e-3, 1.0, 50.0])
def test_opposite_gradients_cancel(ratio):
    g = torch.randn(6, dtype=torch.float64)
    d = gradbal.create("dualproj").direction(torch.stack([g, -ratio * g]))
    assert float(d.norm()) < 1e-7 * float(g.norm())


def test_a_task_at_its_optimum_does_not_stop_the_others_and_gets_no_share():
    j = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(gradbal.create("dualproj").direction(j), 0.5 * j[1])


def test_preferences_go_with_their_tasks_and_are_checked():
    j = torch.randn(3, 9, dtype=torch.float64)
    method = gradbal.create("dualproj", pref=[0.5, 9.0, 2.0])
    part = j[[0, 2]]
    found = method.weights(part @ part.T, tasks=[0, 2])
    wanted = gradbal.create("dualproj", pref=[0.5, 2.0]).weights(part @ part.T)
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="one entry for each of 2 tasks, found 3"):
        method.prepare(2, j)
    with pytest.raises(ValueError, match="non-negative"):
        gradbal.create("dualproj", pref=[1.0, -1.0])
    assert not gradbal.create("dualproj", pref=[0.0] * 3).direction(j).any()
