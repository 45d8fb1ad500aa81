"""DB-MTL: its recurrences by hand, equal norms, the stated divergences, state."""

import numpy as np
import pytest
import torch

import gradbal
from gradbal.aggregators.db_mtl import db_mtl
from tests.aggregators.inputs import random_rows
from tests.zoo import make

J = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


def test_two_steps_by_hand():
    method = gradbal.create("db_mtl", beta=0.5)
    # ĝ = ((1, 0), (0, 2)) and m = ĝ/2: norms ½ and 1, so α = (2, 1).
    d = method.direction(J, torch.tensor([3.0, 0.5]))
    torch.testing.assert_close(d, torch.tensor([1.0, 1.0]).double())
    torch.testing.assert_close(method.last_weights, torch.tensor([2 / 3, 2.0]).double())
    torch.testing.assert_close(method.last_head_weights, torch.tensor([1 / 3, 2.0]).double())
    # ĝ = ((0, 3), (0, 4)): m = ((¼, 3/2), (0, 5/2)).
    d = method.direction(torch.tensor([[0.0, 3.0], [0.0, 2.0]]).double(), torch.tensor([1.0, 0.5]))
    alpha = 2.5 / np.hypot(0.25, 1.5)
    torch.testing.assert_close(d, torch.tensor([0.25 * alpha, 1.5 * alpha + 2.5]).double())


@pytest.mark.parametrize("correction", [False, True])
def test_it_is_a_loop_of_the_formulas(correction):
    rng = np.random.default_rng(0)
    method = gradbal.create("db_mtl", beta=0.8, beta_sigma=0.5, bias_correction=correction)
    m, zeros = np.zeros((4, 9)), 1.0
    for k in range(1, 8):
        j, losses = rng.standard_normal((4, 9)), rng.uniform(0.1, 5, 4)
        unit = j / losses[:, None]
        m = unit + 0.8 / k**0.5 * (m - unit)
        zeros *= 0.8 / k**0.5
        mean = m / (1 - zeros) if correction else m
        n = np.linalg.norm(mean, axis=1)
        found = method.direction(torch.from_numpy(j), torch.from_numpy(losses))
        np.testing.assert_allclose(found, (n.max() / n) @ mean, rtol=1e-12)
        np.testing.assert_allclose(method.last_weights, n.max() / n / losses, rtol=1e-12)
        np.testing.assert_allclose(method.last_head_weights, 1 / losses, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaling_a_loss_changes_nothing(beta, scale, dtype):
    one, other = (gradbal.create("db_mtl", beta=beta) for _ in range(2))
    scales = torch.tensor([1.0, scale, 3.0], dtype=dtype)
    for _ in range(4):
        j, losses = torch.randn(3, 20, dtype=dtype), torch.rand(3, dtype=dtype) + 0.1
        d = one.direction(j, losses)
        scaled = other.direction(scales[:, None] * j, scales * losses)
        torch.testing.assert_close(scaled, d, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spread", [1.0, 1e6])
def test_every_task_contributes_the_same_length(spread):
    method = gradbal.create("db_mtl")
    for seed in range(4):
        method.direction(torch.from_numpy(random_rows(5, 9, seed, spread)))
    lengths = method.last_weights * method.rows.norm(dim=1)
    torch.testing.assert_close(lengths, method.rows.norm(dim=1).max().expand(5))


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_norms_neither_overflow_nor_vanish_in_float32(scale):
    j = torch.tensor([[1.0, 2.0], [-2.0, 1.0]]) * scale
    d = gradbal.create("db_mtl", beta=0.0).direction(j)
    torch.testing.assert_close(d, j.sum(0), rtol=1e-6, atol=0)
    tiny = torch.tensor([1e-200, 1e-190], dtype=torch.float64)
    assert db_mtl(tiny).tolist() == pytest.approx([1e10, 1.0])


def test_divergence_nothing_is_added_to_small_losses_and_norms():
    j = torch.tensor([[1e-9, 0.0], [0.0, 1e-12]], dtype=torch.float64)
    d = gradbal.create("db_mtl", beta=0.0).direction(j, torch.tensor([1e-9, 1e-10]).double())
    torch.testing.assert_close(d, torch.tensor([1.0, 1.0]).double())


def test_divergence_the_reported_weights_are_those_of_d():
    method = gradbal.create("db_mtl", beta=0.0)
    j, losses = torch.from_numpy(random_rows(4, 9, 0)), torch.tensor([0.1, 1.0, 2.0, 30.0])
    torch.testing.assert_close(method.direction(j, losses), method.last_weights @ j)
    assert method.combines
    assert not gradbal.create("db_mtl").combines


def test_the_first_step_is_small_unless_corrected():
    j = torch.from_numpy(random_rows(3, 9, 0))
    full = gradbal.create("db_mtl", beta=0.0).direction(j)
    torch.testing.assert_close(gradbal.create("db_mtl").direction(j), 0.1 * full)
    for sigma in (0.0, 0.5):
        method = gradbal.create("db_mtl", beta_sigma=sigma, bias_correction=True)
        # With constant gradients every corrected step is that of the gradients themselves.
        for _ in range(5):
            torch.testing.assert_close(method.direction(j), full)


def test_without_averaging_there_is_no_state():
    method = gradbal.create("db_mtl", beta=0.0)
    before = method.state_dict()
    method.direction(J)
    assert method.state_dict() == before
    assert not method.per_parameter_state
    # So another graph is no error.
    model = make("ChangingGraph")
    opt = gradbal.MultiTaskOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), "db_mtl", beta=0.0, update_every=2
    )
    for _ in range(4):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        opt.step()


@pytest.mark.parametrize("value", [0.0, -2.5, float("nan")])
def test_a_loss_that_is_not_positive_is_an_error(value):
    method = gradbal.create("db_mtl")
    method.direction(J, torch.tensor([1.0, 2.0]))
    before = method.state_dict()
    with pytest.raises(ValueError, match=rf"positive losses, found {value:g} for task 1; add an"):
        method.direction(J, torch.tensor([1.0, value]))
    # The index is that of the task, when some sit out.
    with pytest.raises(ValueError, match="for task 1"):
        method.direction(J[1:], torch.tensor([value]), tasks=[1])
    after = method.state_dict()
    assert torch.equal(after["state"].pop("rows"), before["state"].pop("rows"))
    assert after == before


def test_the_logarithm_is_not_taken_twice():
    layer = torch.nn.Linear(2, 2)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="loss_transform must be None for 'db_mtl'"):
        gradbal.MultiTaskOptimizer(sgd, "db_mtl", loss_transform="log")


@pytest.mark.parametrize("case", ["single", "zero_row", "all_zero", "equal", "opposite"])
def test_degenerate_rows(case):
    g = torch.randn(7, dtype=torch.float64)
    rows, wanted, alpha = {
        "single": ([g], g, [1.0]),
        "zero_row": ([0 * g, g, 2 * g], 4 * g, [0.0, 2.0, 1.0]),
        "all_zero": ([0 * g, 0 * g], 0 * g, [1.0, 1.0]),
        "equal": ([g, g, g], 3 * g, [1.0, 1.0, 1.0]),
        "opposite": ([g, -4 * g], 0 * g, [4.0, 1.0]),
    }[case]
    method = gradbal.create("db_mtl", bias_correction=True)
    torch.testing.assert_close(method.direction(torch.stack(rows)), wanted)
    torch.testing.assert_close(method.last_weights, torch.tensor(alpha).double())


def test_a_task_that_comes_late_is_corrected_by_its_own_steps():
    method = gradbal.create("db_mtl", bias_correction=True)
    j = torch.from_numpy(random_rows(3, 9, 0))
    method.prepare(3, j)
    for _ in range(3):
        d = method.direction(j[:2], tasks=[0, 1])
        torch.testing.assert_close(d, gradbal.create("db_mtl", beta=0.0).direction(j[:2]))
    assert not method.rows[2].any()
    d = method.direction(j)
    torch.testing.assert_close(d, gradbal.create("db_mtl", beta=0.0).direction(j))
    assert method.zeros == pytest.approx([0.9**4, 0.9**4, 0.9])


def test_half_precision_gradients_are_averaged_in_float32():
    j = torch.ones(2, 4, dtype=torch.bfloat16)
    method = gradbal.create("db_mtl", beta=0.999)
    for _ in range(2000):
        d = method.direction(j, torch.ones(2, dtype=torch.bfloat16))
    assert method.rows.dtype == torch.float32
    assert d.dtype == torch.bfloat16
    torch.testing.assert_close(method.rows, torch.full((2, 4), 1 - 0.999**2000), rtol=1e-3, atol=0)


def test_bad_hyperparameters():
    with pytest.raises(ValueError, match=r"`beta` must be in \[0, 1\), found 1"):
        gradbal.create("db_mtl", beta=1)
    with pytest.raises(ValueError, match="`beta_sigma` must be in"):
        gradbal.create("db_mtl", beta_sigma=-1)
    with pytest.raises(ValueError, match="`bias_correction` must be one of False, True"):
        gradbal.create("db_mtl", bias_correction=None)
