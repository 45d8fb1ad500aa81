"""ExcessMTL: its recurrences by hand, invariants, baselines, the stated divergences, state."""

import numpy as np
import pytest
import torch
from torch import Tensor

import gradbal
from gradbal.aggregators.excess_mtl import excess_mtl
from tests.aggregators.inputs import random_rows

J = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


def weights(jacobians: list[Tensor], **hyperparameters: object) -> list[Tensor]:
    method = gradbal.create("excess_mtl", **hyperparameters)
    found = []
    for j in jacobians:
        method.direction(j)
        found.append(method.last_weights)
    return found


def test_two_steps_by_hand():
    method = gradbal.create("excess_mtl", step_size=2.0)
    torch.testing.assert_close(method.direction(J), torch.tensor([1.5, 0.5]).double())
    # S = (9, 1), E⁰ = (3, 1). Then S = (9 + 16, 1 + 0) and E = (16/5, 0).
    d = method.direction(torch.tensor([[4.0, 0.0], [0.0, 0.0]]).double())
    w = np.exp(2 * 16 / 15) / (np.exp(2 * 16 / 15) + 1)
    torch.testing.assert_close(d, torch.tensor([4 * w, 0.0]).double())
    torch.testing.assert_close(method.last_weights, torch.tensor([w, 1 - w]))


def test_it_is_a_loop_of_the_formulas():
    rng = np.random.default_rng(0)
    method = gradbal.create("excess_mtl", step_size=0.3)
    squares, w = np.zeros((4, 9)), np.full(4, 0.25)
    for k in range(8):
        j = rng.standard_normal((4, 9)) * [[1], [1e-3], [50], [2]]
        squares += j**2
        excess = (j**2 / np.sqrt(squares)).sum(1)
        if k == 0:
            first = excess
        else:
            w = w * np.exp(0.3 * excess / first)
            w /= w.sum()
        np.testing.assert_allclose(method.direction(torch.from_numpy(j)), w @ j, rtol=1e-12)
        np.testing.assert_allclose(method.last_weights, w, rtol=1e-12)
        assert torch.equal(method.last_head_weights, method.last_weights)


def test_the_first_estimate_is_the_l1_norm():
    j = torch.from_numpy(random_rows(3, 8, 0, spread=1e6))
    method = gradbal.create("excess_mtl")
    method.direction(j)
    torch.testing.assert_close(torch.tensor(method.baseline).double(), j.abs().sum(1))
    assert torch.equal(method.rows, j.abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4, 1e8])
def test_divergence_scaling_one_loss_changes_no_weight(scale, dtype):
    # With 1e-7 beside the squares a small gradient would seem to fall faster.
    jacobians = [torch.randn(3, 20, dtype=dtype) for _ in range(6)]
    scales = torch.tensor([[1.0], [scale], [1.0]], dtype=dtype)
    options = {"step_size": 0.5}
    one = weights(jacobians, **options)
    other = weights([scales * j for j in jacobians], **options)
    for w, scaled in zip(one, other, strict=True):
        torch.testing.assert_close(w, scaled, rtol=1e-5, atol=0)
    # And the update is there at all.
    assert float((one[-1] - 1 / 3).abs().max()) > 0.01


def test_squares_beyond_float32_do_no_harm():
    for scale in (1e-30, 1e30):
        options = {"step_size": 0.5}
        small = weights([J.float() * scale, J.float() * scale * 2], **options)
        torch.testing.assert_close(small, weights([J, 2 * J], **options), rtol=1e-5, atol=0)


def test_divergence_the_baseline_call_updates_nothing():
    (w,) = weights([torch.tensor([[100.0], [1.0]]).double()], step_size=1.0)
    assert w.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("warmup", [1, 3])
def test_the_baseline_is_the_mean_of_the_warm_up(warmup):
    jacobians = [J * scale for scale in (1.0, 3.0, 2.0, 5.0)]
    method = gradbal.create("excess_mtl", step_size=1.0, warmup=warmup)
    squares, excesses = 0.0, []
    for k, j in enumerate(jacobians):
        method.direction(j)
        g = j.diagonal().numpy()
        squares = squares + g**2
        excesses.append(g**2 / np.sqrt(squares))
        if k < warmup:
            assert method.last_weights.tolist() == [0.5, 0.5]
    mean = np.mean(excesses[:warmup], 0)
    np.testing.assert_allclose(np.array(method.baseline) / warmup, mean)
    # The two rows are proportional: ratios are equal, and equal ratios move nothing.
    np.testing.assert_allclose(method.last_weights, [0.5, 0.5])


def test_warm_up_matters_to_the_weights():
    jacobians = [torch.diag(torch.tensor(v)).double() for v in ([1.0, 1.0], [3.0, 1.0], [1.0, 1.0])]
    *_, w = weights(jacobians, step_size=1.0, warmup=2)
    # E: 1 and 1; 9/√10 and 1/√2; 1/√11 and 1/√3.
    first = 2 * (1 / np.sqrt(11)) / (1 + 9 / np.sqrt(10))
    second = 2 * (1 / np.sqrt(3)) / (1 + 1 / np.sqrt(2))
    wanted = np.exp([first, second]) / np.exp([first, second]).sum()
    np.testing.assert_allclose(w, wanted)


def test_divergence_a_task_without_gradient_at_first_gets_its_baseline_later():
    def rows(*values: float) -> Tensor:
        return torch.diag(torch.tensor(values)).double()

    found = weights([rows(1, 1, 0), rows(1, 2, 0), rows(1, 1, 4), rows(1, 1, 4)], step_size=1.0)
    # At the second step the two others share 2/3: E/E⁰ is 1/√2 and 4/√5.
    parts = np.exp([1 / np.sqrt(2), 4 / np.sqrt(5)])
    np.testing.assert_allclose(found[1], [*(2 / 3 * parts / parts.sum()), 1 / 3])
    # The third has its first gradient, and still its weight; at the fourth it moves.
    assert float(found[2][2]) == pytest.approx(1 / 3)
    ratios = [1 / np.sqrt(4), 1 / np.sqrt(7), 1 / np.sqrt(2)]
    moved = found[2].numpy() * np.exp(ratios)
    np.testing.assert_allclose(found[3], moved / moved.sum())
    for w in found:
        assert float(w.sum()) == pytest.approx(1)


def test_equal_ratios_and_no_step_move_nothing():
    w = torch.tensor([0.7, 0.2, 0.1]).double()
    torch.testing.assert_close(excess_mtl(w.log(), torch.full((3,), 5.0).double(), 3.0), w.log())
    jacobians = [torch.randn(3, 9, dtype=torch.float64) for _ in range(4)]
    for found in weights(jacobians, step_size=0.0):
        torch.testing.assert_close(found, torch.full((3,), 1 / 3).double())


def test_weights_may_reach_a_corner_but_stay_finite():
    log_w = torch.tensor([0.5, 0.5]).double().log()
    for _ in range(1000):
        log_w = excess_mtl(log_w, torch.tensor([1e300, 1.0]).double(), 1.0)
    # One step is at most e²⁰, and 1000 of them are less than 10^-8000.
    assert log_w[1] == pytest.approx(-1000 * 19, rel=1e-3)
    assert log_w.exp().tolist() == [1.0, 0.0]


def test_the_other_normalisation():
    jacobians = [torch.randn(3, 9, dtype=torch.float64) for _ in range(4)]
    one = weights(jacobians, step_size=0.5)
    many = weights(jacobians, step_size=0.5, normalize="sum_to_T")
    for w, v in zip(one, many, strict=True):
        torch.testing.assert_close(3 * w, v)
    d = gradbal.create("excess_mtl", normalize="sum_to_T").direction(jacobians[0])
    torch.testing.assert_close(d, jacobians[0].sum(0))


@pytest.mark.parametrize("case", ["single", "all_zero", "equal", "opposite"])
def test_degenerate_rows(case):
    g = torch.randn(7, dtype=torch.float64)
    rows = {
        "single": [g],
        "all_zero": [0 * g, 0 * g],
        "equal": [g, g, g],
        "opposite": [g, -g],
    }[case]
    for w in weights([torch.stack(rows)] * 4, step_size=1.0):
        torch.testing.assert_close(w, torch.full_like(w, 1 / len(rows)))


def test_the_others_share_the_weight_that_they_had():
    method = gradbal.create("excess_mtl", step_size=0.5)
    for scale in (1.0, 2.0):
        method.direction(torch.from_numpy(random_rows(3, 8, int(scale))))
    before, row = torch.tensor(method.log_weights).exp(), method.rows[1].clone()
    j = torch.from_numpy(random_rows(3, 8, 5))
    d = method.direction(j[[2, 0]], tasks=[2, 0])
    after = torch.tensor(method.log_weights).exp()
    assert float(after[1]) == pytest.approx(float(before[1]))
    assert float(after.sum()) == pytest.approx(1)
    assert torch.equal(method.rows[1], row)
    torch.testing.assert_close(method.last_weights.float(), after[[2, 0]] / (1 - after[1]))
    torch.testing.assert_close(d, method.last_weights @ j[[2, 0]])
    # What the present ones moved by does not depend on who is absent.
    both = gradbal.create("excess_mtl", step_size=0.5)
    for scale in (1.0, 2.0):
        both.direction(torch.from_numpy(random_rows(3, 8, int(scale))))
    both.direction(j)
    odds = torch.tensor(both.log_weights)
    moved = torch.tensor(method.log_weights)
    torch.testing.assert_close(odds[2] - odds[0], moved[2] - moved[0])


def test_half_precision_squares_are_added_up_in_float32():
    j = torch.ones(2, 4, dtype=torch.bfloat16)
    method = gradbal.create("excess_mtl")
    for _ in range(900):
        method.direction(j)
    assert method.rows.dtype == torch.float32
    # In bfloat16 a sum of ones ends at 256.
    torch.testing.assert_close(method.rows, torch.full((2, 4), 30.0))


def test_bad_hyperparameters():
    with pytest.raises(ValueError, match="`step_size` must be in"):
        gradbal.create("excess_mtl", step_size=-1)
    with pytest.raises(TypeError, match=r"`warmup` must be an integer, found 1\.5"):
        gradbal.create("excess_mtl", warmup=1.5)
    with pytest.raises(ValueError, match="`warmup` must be in"):
        gradbal.create("excess_mtl", warmup=-1)
    with pytest.raises(ValueError, match="`normalize` must be one of 'sum_to_one', 'sum_to_T'"):
        gradbal.create("excess_mtl", normalize=True)
