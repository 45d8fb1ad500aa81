"""MoCo: its recurrences by hand, its limits, LibMTL's variant, state."""

import numpy as np
import pytest
import torch
from torch import Tensor

import gradbal
from gradbal.aggregators.moco import moco
from tests.aggregators.inputs import random_rows

J = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


def frozen(j: Tensor, steps: int, **hyperparameters: object):
    """The method and its last direction after some steps with the same Jacobian."""
    method = gradbal.create("moco", **hyperparameters)
    for _ in range(steps):
        d = method.direction(j)
    return method, d


def test_two_steps_by_hand():
    method = gradbal.create("moco", beta=0.5, beta_sigma=1.0, gamma=0.4, gamma_sigma=1.0)
    # y = J/2, G = diag(1, 1/4); 0.4 Gλ = (0.2, 0.05), and the projection adds 1/8 to both.
    d = method.direction(J)
    torch.testing.assert_close(method.last_weights, torch.tensor([0.425, 0.575]).double())
    torch.testing.assert_close(d, torch.tensor([0.425, 0.2875]).double())
    # β = 1/4, γ = 0.2: y = 5/8 J + ..., here with another J.
    d = method.direction(torch.tensor([[0.0, 4.0], [0.0, 1.0]]).double())
    # y = [[3/4, 1], [0, 5/8]], G = [[25/16, 5/8], [5/8, 25/64]].
    step = 0.2 * np.array([0.425 * 25 / 16 + 0.575 * 5 / 8, 0.425 * 5 / 8 + 0.575 * 25 / 64])
    w = np.array([0.425, 0.575]) - step
    w += (1 - w.sum()) / 2
    torch.testing.assert_close(method.last_weights, torch.from_numpy(w))
    torch.testing.assert_close(d, torch.tensor([0.75 * w[0], w[0] + 0.625 * w[1]]))


@pytest.mark.parametrize("projection", ["simplex", "softmax"])
def test_it_is_a_loop_of_the_formulas(projection):
    rng = np.random.default_rng(0)
    options = {"beta": 0.7, "beta_sigma": 0.3, "gamma": 0.05, "gamma_sigma": 0.2, "rho": 0.4}
    method = gradbal.create("moco", projection=projection, **options)
    y, w = np.zeros((4, 9)), np.full(4, 0.25)
    for k in range(1, 8):
        j = rng.standard_normal((4, 9))
        y = y - 0.7 / k**0.3 * (y - j)
        v = w - 0.05 / k**0.2 * (y @ y.T + 0.4 * np.eye(4)) @ w
        if projection == "softmax":
            w = np.exp(v) / np.exp(v).sum()
        else:
            low, high = v.min() - 1, v.max()
            for _ in range(100):
                theta = (low + high) / 2
                low, high = (theta, high) if np.maximum(v - theta, 0).sum() > 1 else (low, theta)
            w = np.maximum(v - theta, 0)
        np.testing.assert_allclose(method.direction(torch.from_numpy(j)), w @ y, rtol=1e-12)
        np.testing.assert_allclose(method.last_weights, w, atol=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_with_frozen_rows_it_goes_to_mgda(seed):
    j = torch.from_numpy(random_rows(4, 10, seed, spread=3.0) - 0.3)
    gamma = 1.9 / float(torch.linalg.eigvalsh(j @ j.T)[-1])
    _, d = frozen(j, 3000, beta=1, beta_sigma=0, gamma=gamma, gamma_sigma=0)
    wanted = gradbal.create("mgda").direction(j)
    torch.testing.assert_close(d, wanted, rtol=1e-6, atol=1e-6 * float(j.abs().max()))


def test_a_constant_jacobian_is_tracked():
    j = torch.from_numpy(random_rows(3, 8, 0))
    method, _ = frozen(j, 2000)
    # What is left is Π (1 − ½/√k).
    torch.testing.assert_close(method.rows, j, rtol=1e-9, atol=0)
    exactly, _ = frozen(j, 1, beta=1.0)
    assert torch.equal(exactly.rows, j)


@pytest.mark.parametrize("beta", [0.05, 0.5, 0.99])
def test_divergence_nothing_corrects_the_first_step(beta):
    j = torch.from_numpy(random_rows(3, 8, 0))
    method, d = frozen(j, 1, beta=beta)
    torch.testing.assert_close(d, beta * method.last_weights @ j)
    _, quiet = frozen(j, 1, beta=beta, gamma=0.0)
    torch.testing.assert_close(quiet, beta * j.mean(0))


def test_divergence_d_is_made_after_the_update():
    # In the paper's order the first d would be zero, as Y is.
    method, d = frozen(J, 1)
    torch.testing.assert_close(d, method.last_weights @ method.rows)
    assert d.any()


def test_divergence_libmtl_is_softmax_of_rows_as_long_as_their_losses():
    rng = np.random.default_rng(3)
    method = gradbal.create("moco", projection="softmax", normalize=True)
    y, w = np.zeros((3, 6)), np.full(3, 1 / 3)
    for k in range(1, 6):
        j, losses = rng.standard_normal((3, 6)), rng.uniform(0.1, 3, 3)
        rows = j / np.linalg.norm(j, axis=1, keepdims=True) * losses[:, None]
        y = y - 0.5 / k**0.5 * (y - rows)
        logits = w - 0.1 / k**0.5 * (y @ y.T) @ w
        w = np.exp(logits) / np.exp(logits).sum()
        d = method.direction(torch.from_numpy(j), torch.from_numpy(losses))
        np.testing.assert_allclose(d, w @ y, rtol=1e-12)
    # Rows of zeros stay zeros, and small ones are not made smaller.
    tiny = torch.tensor([[0.0, 0.0], [1e-30, 0.0]])
    method.reset()
    method.direction(tiny, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(method.rows, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    with pytest.raises(ValueError, match="normalize=True needs the losses, found None"):
        gradbal.create("moco", normalize=True).direction(J)


def test_rho_pulls_towards_equal_weights():
    w = moco(torch.zeros(2, 2), torch.tensor([0.9, 0.1]).double(), 0.25, rho=1.0)
    torch.testing.assert_close(w, torch.tensor([0.8, 0.2]))


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_free_is_homogeneous(scale, dtype):
    jacobians = torch.randn(5, 3, 20, dtype=dtype)
    one, other = (gradbal.create("moco", scale_free=True) for _ in range(2))
    for j in jacobians:
        d, scaled = one.direction(j), other.direction(j * scale)
        torch.testing.assert_close(scaled, scale * d, rtol=1e-4, atol=1e-6 * scale)
        torch.testing.assert_close(one.last_weights, other.last_weights, rtol=1e-4, atol=1e-6)


def test_a_large_step_ends_in_a_corner_and_stays_finite():
    for scale in (1e8, 1e18):
        method, d = frozen(J * scale, 3)
        torch.testing.assert_close(method.last_weights, torch.tensor([0.0, 1.0]).double())
        assert d.isfinite().all()


def test_large_gradients_in_float32_give_the_weights_of_float64():
    # γG is large here: float32 products would leave the weights off by 1e-4.
    j = (torch.randn(3, 200_000) + 0.001) * 0.5
    weights = []
    for dtype in (torch.float32, torch.float64):
        method = gradbal.create("moco", gamma=1e-3)
        method.direction(j.to(dtype))
        weights.append(method.last_weights)
    torch.testing.assert_close(*weights, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rows", ["single", "zero_row", "all_zero", "equal", "opposite"])
def test_degenerate_rows(rows):
    g = torch.randn(7, dtype=torch.float64)
    zero = torch.zeros_like(g)
    cases = {
        "single": ([g], 0.5 * g),
        "all_zero": ([zero, zero], zero),
        "equal": ([g, g, g], 0.5 * g),
        "opposite": ([g, -g], zero),
        # The weight moves to the zero row, where the least norm is.
        "zero_row": ([g, zero], None),
    }
    given, wanted = cases[rows]
    method, d = frozen(torch.stack(given), 1)
    if wanted is None:
        assert method.last_weights[1] > 0.5
    else:
        torch.testing.assert_close(d, wanted)


def test_the_others_share_the_weight_that_they_had():
    method = gradbal.create("moco", gamma=0.3)
    j = torch.from_numpy(random_rows(3, 8, 1))
    method.direction(j)
    before, row = list(method.shares), method.rows[1].clone()
    alone = gradbal.create("moco", gamma=0.3)
    alone.load_state_dict(method.state_dict())
    part = before[0] + before[2]
    alone.rows, alone.shares = method.rows[[0, 2]], [before[0] / part, before[2] / part]
    d = method.direction(j[[2, 0]], tasks=[2, 0])
    torch.testing.assert_close(alone.direction(j[[0, 2]]), d)
    torch.testing.assert_close(method.last_weights, alone.last_weights.flip(0))
    assert method.shares[1] == before[1]
    assert torch.equal(method.rows[1], row)
    assert sum(method.shares) == pytest.approx(1)


def test_what_takes_part_may_have_had_no_weight():
    method = gradbal.create("moco", gamma=10.0, gamma_sigma=0.0)
    method.direction(torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.1, 0.1]]))
    assert method.shares == [0.0, 0.0, 1.0]
    d = method.direction(torch.eye(2), tasks=[0, 1])
    assert d.isfinite().all()
    assert float(method.last_weights.sum()) == pytest.approx(1)
    assert method.shares == [0.0, 0.0, 1.0]


def test_half_precision_gradients_are_tracked_in_float32():
    j = torch.ones(2, 4, dtype=torch.bfloat16)
    method = gradbal.create("moco", beta=0.001, beta_sigma=0.0)
    for _ in range(2000):
        d = method.direction(j)
    assert method.rows.dtype == torch.float32
    assert d.dtype == torch.bfloat16
    # In bfloat16 the average would stop where 0.001 (1 − y) is less than half a digit of y.
    assert float(method.rows.min()) > 0.86
    torch.testing.assert_close(method.rows, torch.full((2, 4), 1 - 0.999**2000), rtol=1e-3, atol=0)


def test_bad_hyperparameters():
    for name in ("beta", "beta_sigma", "gamma", "gamma_sigma", "rho"):
        with pytest.raises(ValueError, match=f"`{name}` must be in"):
            gradbal.create("moco", **{name: -0.1})
    with pytest.raises(ValueError, match=r"`beta` must be in \(0, inf\), found 0"):
        gradbal.create("moco", beta=0)
    with pytest.raises(ValueError, match="`projection` must be one of 'simplex', 'softmax'"):
        gradbal.create("moco", projection="ball")
    with pytest.raises(ValueError, match="`normalize` must be one of False, True, found 1"):
        gradbal.create("moco", normalize=1)
    with pytest.raises(ValueError, match="`scale_free`"):
        gradbal.create("moco", scale_free="yes")


def test_training_ends_at_a_pareto_stationary_point():
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(2, 10, generator=generator, dtype=torch.float64) + 0.5
    centres = torch.randn(2, 10, generator=generator, dtype=torch.float64)
    x = torch.nn.Parameter(torch.zeros(10, dtype=torch.float64))
    opt = gradbal.MultiTaskOptimizer(torch.optim.SGD([x], lr=0.1), "moco")
    for _ in range(3000):
        opt.zero_grad()
        opt.backward([(s * (x - c).square()).sum() for s, c in zip(scales, centres, strict=True)])
        opt.step()
    j = 2 * scales * (x.detach() - centres)
    assert float(gradbal.create("mgda").direction(j).norm()) < 1e-2
    assert float(j.norm()) > 1
