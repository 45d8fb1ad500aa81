"""ConFIG: closed form, equal angles, the vectors themselves, no conflict at full rank."""

import numpy as np
import pytest
import torch
from hypothesis import given

import gradbal
from tests.aggregators.inputs import cases, random_rows


@pytest.mark.parametrize("seed", range(200))
def test_closed_form_for_two_tasks(seed):
    j = random_rows(2, 5, seed, spread=1e6) - 0.3
    n = np.linalg.norm(j, axis=1, keepdims=True)
    wanted = 0.5 * n.sum() * (j / n).sum(0)
    found = gradbal.create("config").direction(torch.from_numpy(j)).numpy()
    assert np.linalg.norm(found - wanted) < 1e-10 * np.linalg.norm(wanted)


@pytest.mark.parametrize("n_tasks", [3, 5, 10])
@pytest.mark.parametrize("spread", [1.0, 1e6])
def test_equal_angles_and_the_length_of_the_projections(n_tasks, spread):
    for seed in range(20):
        j = torch.from_numpy(random_rows(n_tasks, 15, seed, spread) - 0.3)
        d = gradbal.create("config").direction(j)
        cosines = j @ d / j.norm(dim=1) / d.norm()
        assert (cosines > 0).all()
        torch.testing.assert_close(cosines, cosines[:1].expand(n_tasks), rtol=1e-9, atol=0)
        assert float((j @ d).sum() / d.norm()) == pytest.approx(float(d.norm()), rel=1e-9)


@pytest.mark.parametrize(("n_tasks", "width"), [(3, 20), (5, 3), (10, 4)])
def test_it_is_the_pseudo_inverse_of_the_unit_rows(n_tasks, width):
    # Also with fewer columns than rows, where the angles cannot all be met.
    rng = np.random.default_rng(0)
    for _ in range(20):
        j = rng.standard_normal((n_tasks, width)) * 10 ** rng.uniform(-2, 2, (n_tasks, 1))
        a = rng.uniform(0.5, 2.0, n_tasks)
        n = np.linalg.norm(j, axis=1, keepdims=True)
        x = np.linalg.pinv(j / n) @ a
        x /= np.linalg.norm(x)
        lengths = {"projection": (j @ x).sum(), "norm of mean": np.linalg.norm(j.mean(0)), 2.5: 2.5}
        for length, wanted in lengths.items():
            method = gradbal.create("config", a=a.tolist(), length=length)
            found = method.direction(torch.from_numpy(j)).numpy()
            assert np.linalg.norm(found - wanted * x) < 1e-9 * n.max()


@given(case=cases(("normal", "imbalanced", "non_stationary", "conflict_under_imbalance")))
def test_no_task_is_conflicted_with_at_full_rank(case):
    j = case.jacobian()
    units = torch.nn.functional.normalize(j)
    if len(j) > j.shape[1] or torch.linalg.cond(units) > 1e4:
        return
    d = gradbal.create("config").direction(j)
    assert (j @ d > 0).all()


def test_the_direction_does_not_depend_on_the_scale_of_a_loss():
    j = torch.from_numpy(random_rows(4, 9, 0) - 0.3)
    scales = torch.tensor([[1e-4], [1.0], [1e3], [7.0]], dtype=torch.float64)
    one, other = (gradbal.create("config").direction(x) for x in (j, scales * j))
    torch.testing.assert_close(one / one.norm(), other / other.norm(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ratio", [1e-3, 1.0, 50.0])
def test_opposite_gradients_cancel(ratio):
    g = torch.randn(6, dtype=torch.float64)
    assert not gradbal.create("config").direction(torch.stack([g, -ratio * g])).any()


def test_identical_gradients_count_once_in_the_angle_and_each_in_the_length():
    # A least-squares solver that assumes full rank fails here.
    u = torch.eye(2, dtype=torch.float64)
    d = gradbal.create("config").direction(torch.stack([u[0], u[0], u[1]]))
    torch.testing.assert_close(d, 1.5 * u.sum(0))


def test_angles_go_with_their_tasks():
    j = torch.from_numpy(random_rows(3, 9, 0))
    method = gradbal.create("config", a=[1.0, 2.0, 3.0])
    d = method.direction(j)
    cosines = j @ d / j.norm(dim=1) / d.norm()
    torch.testing.assert_close(cosines / cosines[0], torch.tensor([1.0, 2.0, 3.0]).double())
    part = j[1:]
    wanted = gradbal.create("config", a=[2.0, 3.0]).weights(part @ part.T)
    assert torch.equal(method.weights(part @ part.T, tasks=[1, 2]), wanted)


def test_bad_hyperparameters():
    with pytest.raises(ValueError, match=r"`a` must be positive, found \[1.0, 0.0\]"):
        gradbal.create("config", a=[1, 0])
    with pytest.raises(ValueError, match="one entry for each of 2 tasks, found 3"):
        gradbal.create("config", a=[1, 1, 1]).prepare(2, torch.zeros(()))
    with pytest.raises(ValueError, match="`length` must be one of 'projection', 'norm of mean'"):
        gradbal.create("config", length="sum")
    with pytest.raises(ValueError, match="`length` must be in"):
        gradbal.create("config", length=0.0)
