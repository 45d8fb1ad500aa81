"""IMTL-L and the hybrid IMTL: closed forms, training of the factors, heads."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import gradbal
from gradbal import MultiTaskOptimizer
from tests.zoo import make


def _with_factors(name: str, factors: torch.Tensor, **options: object) -> gradbal.Aggregator:
    method = gradbal.create(name, **options)
    method.prepare(len(factors), factors)
    method.parameters()[0].data = factors.log()
    return method


def test_hybrid_is_imtl_g_on_scaled_rows() -> None:
    j = torch.randn(4, 9, dtype=torch.float64)
    factors = torch.tensor([0.1, 3.0, 1.0, 20.0], dtype=torch.float64)
    for guard in (True, False):
        d = _with_factors("imtl", factors, guard=guard).direction(j)
        wanted = gradbal.create("imtl_g", guard=guard).direction(factors[:, None] * j)
        torch.testing.assert_close(d, wanted)


def test_hybrid_closed_form_for_two_tasks() -> None:
    # d = n₁n₂/(n₁ + n₂)(u₁ + u₂) with the norms of the scaled rows.
    j = torch.randn(2, 5, dtype=torch.float64)
    factors = torch.tensor([2.0, 0.25], dtype=torch.float64)
    n = factors * j.norm(dim=1)
    u = j / j.norm(dim=1, keepdim=True)
    d = _with_factors("imtl", factors).direction(j)
    torch.testing.assert_close(d, n.prod() / n.sum() * u.sum(0))


def test_the_guard_keeps_the_hybrid_from_ascending_every_loss() -> None:
    # Row norms far apart and cosines for which 1ᵀv < 0: without the guard d ascends every loss.
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(200):
        j = torch.randn(3, 4, dtype=torch.float64, generator=generator)
        j *= 10.0 ** torch.randn(3, 1, dtype=torch.float64, generator=generator)
        plain = _with_factors("imtl", torch.ones(3).double(), guard=False).direction(j)
        guarded = _with_factors("imtl", torch.ones(3).double()).direction(j)
        ascends = bool((j @ plain < 0).all())
        found += ascends
        assert not (j @ guarded < 0).all()
    assert found > 5


@pytest.mark.parametrize("name", ["imtl_l", "imtl"])
def test_factors_settle_at_the_inverse_of_frozen_losses(name: str) -> None:
    theta = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = MultiTaskOptimizer(SGD([theta], lr=0.0), name, lr=0.3)
    losses = torch.tensor([0.01, 1.0, 40.0], dtype=torch.float64)
    for _ in range(400):
        opt.zero_grad()
        # Values frozen, gradients not.
        opt.backward([l + theta.sum() - theta.sum().detach() for l in losses])
        opt.step()
    torch.testing.assert_close(opt.aggregator.learned.detach().exp(), 1 / losses, rtol=1e-6, atol=0)


def test_imtl_l_is_twice_uncertainty_weighting_with_the_sign_of_s_turned() -> None:
    losses = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    s = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    mine = _with_factors("imtl_l", s.exp())
    uw = gradbal.create("uw")
    uw.prepare(3, losses)
    uw.learned.data = -s
    torch.testing.assert_close(mine.scalarize(losses), 2 * uw.scalarize(losses))


@pytest.mark.parametrize("heads", [None, "weighted", "own"])
def test_heads_get_the_scaled_losses_gradients(heads: str | None) -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "imtl", heads=heads)
    opt.backward(model.losses(model.batch()))
    opt.aggregator.learned.data = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    opt.zero_grad()
    losses = model.losses(model.batch())
    want = [
        torch.autograd.grad(l, h.weight, retain_graph=True)[0]
        for l, h in zip(losses, model.heads, strict=True)
    ]
    opt.backward(losses)
    factors = torch.ones(3) if heads == "own" else opt.aggregator.learned.detach().exp()
    for f, g, head in zip(factors, want, model.heads, strict=True):
        torch.testing.assert_close(head.weight.grad, f * g)
    # ∂/∂s of Σ e^s ℓ − s.
    values = torch.stack([l.detach() for l in losses])
    s = opt.aggregator.learned
    torch.testing.assert_close(s.grad, s.detach().exp() * values - 1)


@pytest.mark.parametrize("name", ["imtl_l", "imtl"])
def test_factors_are_not_decayed_and_have_their_own_rate(name: str) -> None:
    model = make("Plain")
    adam = Adam(model.parameters(), lr=0.1, weight_decay=0.5)
    opt = MultiTaskOptimizer(adam, name, lr=0.025)
    assert opt.param_groups[-1]["weight_decay"] == 0.0
    assert opt.param_groups[-1]["lr"] == 0.025
    assert opt.param_groups[-1]["params"][0] is opt.aggregator.learned
    saved = copy.deepcopy(opt)
    assert saved.param_groups[-1]["params"][0] is saved.aggregator.learned


@pytest.mark.parametrize("name", ["imtl_l", "imtl"])
def test_a_loss_below_zero_cannot_blow_its_factor_up(name: str) -> None:
    theta = nn.Parameter(torch.zeros(2))
    opt = MultiTaskOptimizer(SGD([theta], lr=0.0), name, lr=5.0)
    for _ in range(30):
        opt.zero_grad()
        opt.backward([theta.sum() - 1.0, (theta - 1).square().sum()])
        assert float(opt.aggregator.learned.detach().max()) <= 20.0
        opt.step()
    assert bool(theta.grad.isfinite().all())


@pytest.mark.parametrize("name", ["imtl_l", "imtl"])
def test_the_number_of_tasks_is_kept(name: str) -> None:
    method = gradbal.create(name)
    method.direction(torch.eye(3))
    with pytest.raises(ValueError, match=f"`{name}` has 3 tasks, found 2"):
        method.direction(torch.eye(2))
