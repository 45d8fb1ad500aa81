"""Primary and secondary tasks: closed form, the projection by cvxpy, optimality, and the iteration
that takes the place of the solve."""

import copy
import math

import numpy as np
import pytest
import torch

import gradbal
from tests.aggregators.inputs import random_rows
from tests.aggregators.reference import project_on_dual_cone
from tests.states import assert_same, root_at_zero, snapshot
from tests.zoo import make


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


def iterative(**keywords):
    return gradbal.create("primary", mode="iterative", **keywords)


def opposed(n_tasks, width, seed, spread):
    """Rows of which the secondary ones are against the primary one, in part and on the whole."""
    j = torch.from_numpy(random_rows(n_tasks, width, seed, spread) - 0.3)
    j[1:] -= j[1:].norm(dim=1, keepdim=True) * j[0] / j[0].norm()
    return j


@pytest.mark.parametrize(("n_tasks", "width"), [(2, 5), (3, 20), (5, 8)])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("lr", [0.3, 1.0, 1.9])
def test_the_iteration_converges_to_the_projection_on_fixed_gradients(n_tasks, width, beta, lr):
    for seed in (1, 2):
        j = opposed(n_tasks, width, seed, spread=1e6)
        g = j @ j.T
        method = iterative(lr=lr, secondary_weight=beta)
        for _ in range(1000):
            w = method.weights(g)
        wanted = gradbal.create("primary", secondary_weight=beta).direction(j)
        size = float(w @ j.norm(dim=1))
        assert float((w @ j - wanted).norm()) < 1e-9 * size
        assert beta > 0 or (w[1:] > 0).any()


def test_two_steps_by_hand():
    # |g_0| = 1, g_1 = 4u, g_2 = v/10 with ⟨u, g_0⟩ = −0.8, ⟨v, g_0⟩ = −0.6, ⟨u, v⟩ = 0; L = 1.
    j = torch.tensor([[1.0, 0.0], [-3.2, 2.4], [-0.06, -0.08]], dtype=torch.float64)
    method = iterative(lr=0.5)
    # ν = ½(0.8, 0.6); λ_1 = 0.4/4, λ_2 = 0.3/0.1.
    w = method.weights(j @ j.T)
    torch.testing.assert_close(w, torch.tensor([1.0, 0.1, 3.0], dtype=torch.float64))
    # ν = (0.4, 0.3) − ½((0.4, 0.3) − (0.8, 0.6)) = (0.6, 0.45).
    w = method.weights(j @ j.T)
    torch.testing.assert_close(w, torch.tensor([1.0, 0.15, 4.5], dtype=torch.float64))
    # A task that now agrees: ν_1 = max(0, 0.6 − ½(0.6 + 0.8)), ν_2 = 0.45 − ½(0.45 − 0.6).
    j[1] *= -1
    w = method.weights(j @ j.T)
    torch.testing.assert_close(w, torch.tensor([1.0, 0.0, 5.25], dtype=torch.float64))


def test_the_step_is_divided_by_the_largest_eigenvalue():
    # Two secondary tasks with the same gradient: L = 2, and a step of 1 would overshoot.
    j = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [-0.6, 0.8]], dtype=torch.float64)
    w = iterative().weights(j @ j.T)
    torch.testing.assert_close(w, torch.tensor([1.0, 0.3, 0.3], dtype=torch.float64))
    torch.testing.assert_close(w @ j, gradbal.create("primary").direction(j))


def test_one_secondary_task_is_exact_at_every_step():
    exact, method = gradbal.create("primary", primary=1), iterative(primary=1)
    for seed in range(50):
        j = torch.from_numpy(random_rows(2, 5, seed, spread=1e6) - 0.3)
        torch.testing.assert_close(method.weights(j @ j.T), exact.weights(j @ j.T))


@pytest.mark.parametrize("lr", [0.2, 1.0])
def test_the_scales_of_the_losses_change_nothing_in_the_iteration(lr):
    generator = torch.Generator().manual_seed(0)
    plain, scaled = iterative(lr=lr), iterative(lr=lr)
    # At every step other ones.
    for step in range(20):
        j = opposed(4, 9, step, spread=1.0)
        s = 10 ** (8 * torch.rand(4, 1, generator=generator, dtype=torch.float64) - 4)
        s[0] = 1.0
        d = plain.direction(j)
        torch.testing.assert_close(scaled.direction(s * j), d, rtol=1e-9, atol=1e-12)
    d = plain.direction(j)
    torch.testing.assert_close(scaled.direction(1e8 * j), 1e8 * d, rtol=1e-9, atol=1e-4)


def test_a_small_gradient_leaves_no_large_multiplier_behind():
    j = opposed(3, 9, 0, spread=1.0)
    method = iterative(lr=0.5)
    method.direction(torch.stack([j[0], 1e-8 * j[1], j[2]]))
    assert float(method.direction(j).norm()) <= float(j[0].norm()) * 3


def test_the_iteration_on_degenerate_gradients():
    g = torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(iterative().direction(g[None]), g)
    assert float(iterative().direction(torch.stack([g, -50 * g])).norm()) < 1e-12
    zero = iterative()
    torch.testing.assert_close(zero.direction(torch.stack([g, 0 * g, -g])), 0 * g)
    assert zero.weights(torch.zeros(3, 3)).tolist() == [1, 1, 1]
    before = zero.multipliers
    assert before.tolist() == pytest.approx([0, 0, 1])
    # Without a primary gradient there is nothing to learn from.
    assert not zero.direction(torch.stack([0 * g, g, -2 * g])).any()
    assert torch.equal(zero.multipliers, before)


def test_multipliers_stay_with_tasks_that_sit_out():
    j = opposed(4, 9, 0, spread=10.0)
    method, part = iterative(primary=1), iterative(primary=1)
    j = j[[1, 0, 2, 3]]
    for each in (method, part):
        each.weights(j @ j.T)
    before = method.multipliers
    some = j[[0, 1, 3]]
    w = method.weights(some @ some.T, tasks=[0, 1, 3])
    assert method.multipliers[2] == before[2] > 0
    assert not torch.equal(method.multipliers[[0, 3]], before[[0, 3]])
    part.multipliers = before[[0, 1, 3]]
    assert torch.equal(part.weights(some @ some.T), w)
    before = method.multipliers
    some = j[[0, 3]]
    w = method.weights(some @ some.T, tasks=[0, 3])
    assert torch.equal(method.multipliers, before)
    assert not w.any()


def trained(**keywords):
    model = make("Plain")
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    opt = gradbal.MultiTaskOptimizer(sgd, iterative(lr=0.3), **keywords)
    return model, opt


def steps(model, opt, n):
    for _ in range(n):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        opt.step()


def test_the_iteration_goes_on_from_a_checkpoint():
    model, opt = trained()
    steps(model, opt, 3)
    assert opt.aggregator.multipliers.any()
    state = copy.deepcopy((model.state_dict(), opt.state_dict()))
    steps(model, opt, 3)
    twin, other = trained()
    twin.load_state_dict(state[0])
    other.load_state_dict(state[1])
    steps(twin, other, 3)
    assert_same(snapshot(twin, other), snapshot(model, opt))
    opt.aggregator.reset()
    assert opt.aggregator.multipliers is None


def test_another_number_of_tasks_is_an_error():
    model, opt = trained()
    steps(model, opt, 1)
    before = snapshot(model, opt)
    with pytest.raises(ValueError, match="3"):
        opt.backward(model.losses(model.batch())[:2])
    assert_same(snapshot(model, opt), before)
    method = iterative()
    method.weights(torch.eye(3))
    with pytest.raises(ValueError, match="`primary` has 3 tasks, found 4"):
        method.weights(torch.eye(4))


def test_the_first_step_of_the_iteration_may_lack_a_task():
    model, opt = trained(nonfinite="drop")
    losses = model.losses(model.batch())
    losses[1] = losses[1] + root_at_zero(model.trunk[0].weight)
    opt.backward(losses)
    assert opt.weights[1] == 0
    assert len(opt.aggregator.multipliers) == 3
    assert opt.aggregator.multipliers[1] == 0
    assert math.isclose(float(opt.weights[0]), 1)


def test_bad_hyperparameters():
    with pytest.raises(TypeError, match="`primary` must be an integer, found 'depth'"):
        gradbal.create("primary", primary="depth")
    with pytest.raises(ValueError, match=r"`primary` must be in \[0, inf\)"):
        gradbal.create("primary", primary=-1)
    with pytest.raises(ValueError, match="`secondary_weight` must be in"):
        gradbal.create("primary", secondary_weight=-1.0)
    with pytest.raises(ValueError, match="`mode` must be one of 'exact', 'iterative'"):
        gradbal.create("primary", mode="fast")
    for lr in (0.0, 2.0):
        with pytest.raises(ValueError, match=rf"`lr` must be in \(0, 2\), found {lr}"):
            gradbal.create("primary", lr=lr)
    method = gradbal.create("primary", primary=2)
    with pytest.raises(ValueError, match="the index of one of 2 tasks, found 2"):
        method.weights(torch.eye(2))
