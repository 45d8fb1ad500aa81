"""MOML, Auto-Lambda, FORUM: hypergradients against second-order autograd, duals against cvxpy."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import cvxpy
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import gradbal
from gradbal import MultiTaskOptimizer
from gradbal.aggregators.forum import forum
from gradbal.aggregators.moml import moml
from tests.aggregators.reference import least_norm

BILEVEL = ["moml", "auto_lambda", "forum"]


class Net(nn.Module):
    """T regressions from a common layer, with one frozen and one unused parameter."""

    def __init__(self, n_tasks: int = 3, smooth: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.trunk = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        self.heads = nn.Parameter(torch.randn(n_tasks, 3, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(n_tasks, dtype=torch.float64), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.smooth = smooth

    def losses_at(self, trunk: Tensor, heads: Tensor, batch: Tensor) -> list[Tensor]:
        z = batch @ trunk.T
        out = torch.tanh(z) @ heads.T if self.smooth else z.sum(1, keepdim=True) + heads.sum(1)
        return [(o - (-1.5) ** i).square().mean() for i, o in enumerate((out * self.frozen).T)]

    def closure(self, batch: Tensor) -> Callable[[], list[Tensor]]:
        return lambda: self.losses_at(self.trunk, self.heads, batch)

    def copies(self) -> list[Tensor]:
        return [p.detach().clone().requires_grad_() for p in (self.trunk, self.heads)]


def _batches(n: int = 1) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(2)
    return [
        tuple(torch.randn(8, 4, dtype=torch.float64, generator=draw) for _ in range(2))
        for _ in range(n)
    ]


def _watched(
    model: Net, optimizer: Optimizer, name: str, **options: Any
) -> tuple[MultiTaskOptimizer, list[Tensor]]:
    """The optimizer, and the gradients that come to its meta-parameters."""
    opt = MultiTaskOptimizer(optimizer, name, **options)
    found: list[Tensor] = []
    plain = opt.aggregator.train_alpha

    def train_alpha(gradient: Tensor) -> None:
        found.append(gradient.detach().clone())
        plain(gradient)

    opt.aggregator.train_alpha = train_alpha
    return opt, found


def _step(opt: MultiTaskOptimizer, model: Net, pair: tuple[Tensor, Tensor]) -> list[Tensor]:
    return opt.step(*(model.closure(b) for b in pair))


def _weighted(losses: list[Tensor], weights: Tensor) -> Tensor:
    return (weights * torch.stack(losses)).sum()


def _flat(tensors: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


# MOML


def _moml_rows(
    model: Net, pair: tuple[Tensor, Tensor], alpha: Tensor, rates: tuple[float, float]
) -> Tensor:
    """H `[T, T]` by autograd through the virtual step."""
    alpha = alpha.detach().requires_grad_()
    theta = model.copies()
    total = _weighted(model.losses_at(*theta, pair[0]), alpha.softmax(0))
    grads = torch.autograd.grad(total, theta, create_graph=True)
    moved = [p - eta * g for p, g, eta in zip(theta, grads, rates, strict=True)]
    upper = model.losses_at(*moved, pair[1])
    return torch.stack([torch.autograd.grad(f, alpha, retain_graph=True)[0] for f in upper])


@pytest.mark.parametrize("n_tasks", [2, 3, 6])
def test_momls_hypergradient_of_each_validation_loss(n_tasks: int) -> None:
    model, (pair,) = Net(n_tasks), _batches()
    alpha, eta = torch.randn(n_tasks, dtype=torch.float64), 0.2
    theta = model.copies()
    lower = model.losses_at(*theta, pair[0])
    train = torch.stack([_flat(torch.autograd.grad(f, theta, retain_graph=True)) for f in lower])
    step = eta * alpha.softmax(0) @ train
    sizes = [p.numel() for p in theta]
    moved = [
        (p - s.view(p.shape)).detach().requires_grad_()
        for p, s in zip(theta, step.split(sizes), strict=True)
    ]
    upper = model.losses_at(*moved, pair[1])
    rows = torch.stack([_flat(torch.autograd.grad(f, moved, retain_graph=True)) for f in upper])
    products = eta * rows @ train.T
    wanted = _moml_rows(model, pair, alpha, (eta, eta))
    for k in range(n_tasks):
        h = moml(alpha, products[k : k + 1], "none")
        torch.testing.assert_close(h, wanted[k], rtol=1e-10, atol=1e-14)
        assert abs(float(h.sum())) < 1e-13 * float(h.abs().max())


@pytest.mark.parametrize("norm", ["l2", "none", "loss"])
@pytest.mark.parametrize("inner_lr", [None, 0.3])
def test_moml_descends_all_validation_losses(norm: str, inner_lr: float | None) -> None:
    model = Net()
    groups = [{"params": [model.trunk], "lr": 0.1}, {"params": [model.heads], "lr": 0.02}]
    opt, found = _watched(model, SGD(groups), "moml", norm=norm, inner_lr=inner_lr, meta_lr=0.1)
    rates = (0.1, 0.02) if inner_lr is None else (inner_lr, inner_lr)
    for pair in _batches(4):
        alpha = opt.aggregator.alpha
        alpha = torch.zeros(3).double() if alpha is None else alpha.clone()
        h = _moml_rows(model, pair, alpha, rates)
        if norm == "l2":
            h = h / h.norm(dim=1, keepdim=True)
        elif norm == "loss":
            theta = model.copies()
            total = _weighted(model.losses_at(*theta, pair[0]), alpha.softmax(0))
            grads = torch.autograd.grad(total, theta)
            moved = [p - eta * g for p, g, eta in zip(theta, grads, rates, strict=True)]
            h = h / torch.stack(model.losses_at(*moved, pair[1])).detach()[:, None]
        wanted = torch.from_numpy(least_norm(h.numpy()))
        _step(opt, model, pair)
        scale = float(h.norm(dim=1).max())
        torch.testing.assert_close(found[-1], wanted, rtol=0, atol=1e-6 * scale)
        assert abs(float(found[-1].sum())) < 1e-13 * scale
        # No validation loss is ascended by the step of α, to first order.
        assert float((h @ found[-1]).min()) > -1e-9 * scale**2


def test_momls_adam_steps_and_model_steps() -> None:
    model, twin = Net(), Net()
    sgd = SGD([model.trunk, model.heads], lr=0.1, momentum=0.9)
    opt, found = _watched(model, sgd, "moml", meta_lr=0.05)
    plain = SGD([twin.trunk, twin.heads], lr=0.1, momentum=0.9)
    alpha = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = Adam([alpha], lr=0.05)
    for pair in _batches(5):
        _step(opt, model, pair)
        alpha.grad = found[-1]
        adam.step()
        torch.testing.assert_close(opt.aggregator.alpha, alpha.detach(), rtol=1e-12, atol=0)
        weights = alpha.detach().softmax(0)
        torch.testing.assert_close(opt.weights, weights)
        assert weights[0] != weights[1]
        plain.zero_grad()
        _weighted(twin.losses_at(twin.trunk, twin.heads, pair[0]), weights).backward()
        plain.step()
        torch.testing.assert_close(model.trunk, twin.trunk)


def test_momls_first_model_step_with_frozen_alpha_is_uniform() -> None:
    model, (pair,) = Net(), _batches()
    opt = MultiTaskOptimizer(SGD([model.trunk], lr=0.1), "moml", meta_lr=0.0)
    _step(opt, model, pair)
    assert opt.weights.tolist() == [pytest.approx(1 / 3)] * 3


def test_moml_on_both_batches() -> None:
    model, (pair,) = Net(), _batches()
    opt = MultiTaskOptimizer(
        SGD([model.trunk, model.heads], lr=0.1), "moml", model_batch="train+val", meta_lr=0.1
    )
    twin = copy.deepcopy(model)
    _step(opt, model, pair)
    weights = opt.aggregator.alpha.softmax(0)
    total = sum(_weighted(twin.losses_at(twin.trunk, twin.heads, b), weights) for b in pair) / 2
    wanted = torch.autograd.grad(total, twin.trunk)[0]
    torch.testing.assert_close(model.trunk.grad, wanted)
    assert opt.weights is None


def test_tasks_that_count_alike_leave_momls_alpha() -> None:
    # Equal training gradients: H is zero but for rounding, which norm="l2" would blow up.
    alpha = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64)
    products = torch.tensor([[1.0], [3.0], [-0.1]], dtype=torch.float64).expand(3, 3)
    assert not moml(alpha, products).any()
    assert not moml(alpha, torch.zeros(3, 3, dtype=torch.float64)).any()
    # One validation loss that does not care takes no part.
    products = torch.tensor([[1.0, 1.0, 1.0], [3.0, 1.0, -1.0], [2.0, 0.0, 1.0]]).double()
    torch.testing.assert_close(moml(alpha, products), moml(alpha, products[1:]))
    model, (pair,) = Net(2), _batches()
    opt, found = _watched(model, SGD([model.trunk], lr=0.1), "moml")

    def same() -> list[Tensor]:
        return [model.closure(pair[0])()[0]] * 2

    opt.step(same, model.closure(pair[1]))
    assert not found
    assert opt.aggregator.moments is None


def test_momls_norm_by_losses_needs_positive_ones() -> None:
    model, (pair,) = Net(), _batches()
    opt = MultiTaskOptimizer(SGD([model.trunk], lr=0.1), "moml", norm="loss")
    validation = model.closure(pair[1])
    with pytest.raises(ValueError, match=r"'moml' with norm='loss' needs positive.*add an offset"):
        opt.step(model.closure(pair[0]), lambda: [l - 100 for l in validation()])
    assert opt.aggregator.alpha is None


# Auto-Lambda


def _auto_lambda_gradient(
    model: Net,
    pair: tuple[Tensor, Tensor],
    weights: Callable[[Tensor], Tensor],
    lam: Tensor,
    primary: list[int],
    optimizer: Optimizer,
) -> Tensor:
    """By autograd through the virtual step of SGD, with what the optimizer remembers."""
    lam = lam.detach().requires_grad_()
    theta = model.copies()
    total = _weighted(model.losses_at(*theta, pair[0]), weights(lam))
    grads = torch.autograd.grad(total, theta, create_graph=True)
    moved = []
    for p, g, real in zip(theta, grads, (model.trunk, model.heads), strict=True):
        (group,) = (g for g in optimizer.param_groups if any(real is q for q in g["params"]))
        m = optimizer.state.get(real, {}).get("momentum_buffer")
        m = 0.0 if m is None else group["momentum"] * m
        moved.append(p - group["lr"] * (m + g + group["weight_decay"] * p))
    upper = model.losses_at(*moved, pair[1])
    return torch.autograd.grad(sum(upper[i] for i in primary), lam)[0]


def _two_groups(model: Net) -> SGD:
    return SGD(
        [
            {"params": [model.trunk], "lr": 0.05, "weight_decay": 0.1},
            {"params": [model.heads, model.unused], "lr": 0.2},
            {"params": [model.frozen]},
        ],
        lr=1.0,
        momentum=0.9,
    )


@pytest.mark.parametrize("primary", [None, [0], [2, 1]])
@pytest.mark.parametrize("param", ["raw", "softmax"])
@pytest.mark.parametrize("smooth", [False, True])
def test_auto_lambdas_hypergradient(primary: list[int] | None, param: str, smooth: bool) -> None:
    model = Net(smooth=smooth)
    sgd = _two_groups(model)
    # On quadratics central differences are exact, however long.
    fd_eps = 1e-4 if smooth else 1.0
    opt, found = _watched(
        model, sgd, "auto_lambda", primary=primary, param=param, meta_lr=0.05, fd_eps=fd_eps
    )
    weights: Callable[[Tensor], Tensor] = {
        "raw": lambda v: v,
        "softmax": lambda v: v.softmax(0),
    }[param]
    for k, pair in enumerate(_batches(4)):
        lam = opt.aggregator.alpha
        lam = torch.full((3,), 0.1, dtype=torch.float64) if lam is None else lam.clone()
        assert bool(sgd.state) == (k > 0)
        chosen = primary or [0, 1, 2]
        wanted = _auto_lambda_gradient(model, pair, weights, lam, chosen, sgd)
        _step(opt, model, pair)
        error = float((found[-1] - wanted).norm() / wanted.norm())
        assert error < (1e-6 if smooth else 1e-11)


def test_auto_lambdas_differences_are_exact_on_quadratics() -> None:
    model, (pair,) = Net(smooth=False), _batches()
    eta = 0.1
    sgd = SGD([model.trunk, model.heads], lr=eta)
    opt, found = _watched(model, sgd, "auto_lambda", primary=[0])
    theta = model.copies()
    lower = model.losses_at(*theta, pair[0])
    j = torch.stack([_flat(torch.autograd.grad(l, theta, retain_graph=True)) for l in lower])
    shift = (eta * 0.1 * j.sum(0)).split([p.numel() for p in theta])
    moved = [
        (p - s.view(p.shape)).detach().requires_grad_() for p, s in zip(theta, shift, strict=True)
    ]
    v = _flat(torch.autograd.grad(model.losses_at(*moved, pair[1])[0], moved, allow_unused=True))
    _step(opt, model, pair)
    torch.testing.assert_close(found[0], -eta * j @ v, rtol=1e-10, atol=1e-13)


def test_auto_lambdas_adam_steps_and_model_steps() -> None:
    model, twin = Net(), Net()
    opt, found = _watched(model, _two_groups(model), "auto_lambda", meta_lr=0.05)
    plain = _two_groups(twin)
    lam = torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True)
    adam = Adam([lam], lr=0.05)
    for pair in _batches(5):
        _step(opt, model, pair)
        lam.grad = found[-1]
        adam.step()
        torch.testing.assert_close(opt.weights, lam.detach(), rtol=1e-12, atol=0)
        plain.zero_grad()
        _weighted(twin.losses_at(twin.trunk, twin.heads, pair[0]), lam.detach()).backward()
        plain.step()
        torch.testing.assert_close(model.trunk, twin.trunk)
        torch.testing.assert_close(model.heads, twin.heads)
    assert float(lam.detach().max() - lam.detach().min()) > 0.05
    assert model.frozen.grad is None
    assert model.unused.grad is None
    assert bool((model.unused == 1).all())


def test_a_task_that_helps_gains_weight() -> None:
    model, (pair,) = Net(2, smooth=False), _batches()
    opt = MultiTaskOptimizer(SGD([model.trunk], lr=0.01), "auto_lambda", primary=[0], meta_lr=0.01)
    target = model.closure(pair[0])

    def losses() -> list[Tensor]:
        first = target()[0]
        return [first, 10 - first]  # learns the opposite

    opt.step(losses, losses)
    assert opt.weights.tolist() == pytest.approx([0.11, 0.09])


def test_the_floor_of_auto_lambda() -> None:
    model, (pair,) = Net(2, smooth=False), _batches()
    target = model.closure(pair[0])

    def losses() -> list[Tensor]:
        first = target()[0]
        return [first, 10 - first]

    for floor, least in ((None, -0.1), (0.0, 0.0)):
        opt = MultiTaskOptimizer(
            SGD([model.trunk], lr=1e-3), "auto_lambda", primary=[0], meta_lr=0.2, clamp_min=floor
        )
        opt.step(losses, losses)
        assert float(opt.weights[1]) == pytest.approx(least)


@pytest.mark.parametrize("name", BILEVEL)
def test_weights_go_with_their_tasks(name: str) -> None:
    options: dict[str, Any] = {"primary": [0, 2]} if name == "auto_lambda" else {}
    order = [2, 0, 1]
    runs = []
    for permuted in (False, True):
        model = Net()
        if permuted and name == "auto_lambda":
            options["primary"] = [order.index(i) for i in (0, 2)]
        opt = MultiTaskOptimizer(SGD([model.trunk], lr=0.1), name, meta_lr=0.1, **options)
        for pair in _batches(3):
            closures = [model.closure(b) for b in pair]
            if permuted:
                opt.step(*[lambda c=c: [c()[i] for i in order] for c in closures])
            else:
                opt.step(*closures)
        runs.append((opt.aggregator.alpha, model.trunk.detach()))
    torch.testing.assert_close(runs[1][0], runs[0][0][order], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-7, atol=1e-10)
    assert len(runs[0][0].unique()) == 3


def test_no_validation_gradient_leaves_lambda() -> None:
    model, (pair,) = Net(), _batches()
    opt, found = _watched(model, SGD([model.trunk], lr=0.1), "auto_lambda")
    opt.step(model.closure(pair[0]), lambda: [1.0 + 0 * model.trunk.sum()] * 3)
    assert not found
    assert opt.weights.tolist() == [0.1] * 3
    assert model.trunk.grad is not None


def test_a_displaced_loss_that_is_not_finite_leaves_lambda() -> None:
    model, (pair,) = Net(), _batches()
    opt, found = _watched(model, SGD([model.trunk], lr=0.1), "auto_lambda")
    calls = itertools.count()

    def train() -> list[Tensor]:
        factor = 1.0 if next(calls) == 0 else math.inf
        return [factor * l for l in model.closure(pair[0])()]

    opt.step(train, model.closure(pair[1]))
    assert not found
    assert opt.weights.tolist() == [0.1] * 3


# FORUM


def _dual_by_cvxpy(upper: np.ndarray, h: np.ndarray, phi: float) -> tuple[np.ndarray, float, float]:
    """λ, ν and the value of `½|Σ λ_i u_i + νh|² − νφ|h|²`."""
    lam, nu = cvxpy.Variable(len(upper)), cvxpy.Variable()
    # In units of h, whose length may be far from one.
    unit = np.linalg.norm(h)
    value = 0.5 * cvxpy.sum_squares(upper.T @ lam + nu * (h / unit)) - nu * phi * unit
    problem = cvxpy.Problem(cvxpy.Minimize(value), [lam >= 0, nu >= 0, cvxpy.sum(lam) == 1])
    problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return lam.value, float(nu.value) / unit, float(problem.value)


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", ["generic", "parallel", "opposite", "in the span", "equal rows"])
def test_forums_dual(n_tasks: int, kind: str) -> None:
    rng = np.random.default_rng(n_tasks)
    cases = set()
    for trial in range(12):
        upper = rng.standard_normal((n_tasks, 9))
        h = rng.standard_normal(9)
        if kind in ("parallel", "opposite"):
            h = (1 if kind == "parallel" else -1) * upper[0]
        elif kind == "in the span":
            h = rng.standard_normal(n_tasks) @ upper
        elif kind == "equal rows":
            upper[:] = upper[0]
        upper /= np.linalg.norm(upper, axis=1, keepdims=True)
        h *= 10.0 ** rng.uniform(-3, 3) / np.linalg.norm(h)
        phi = (0.0, 0.1, 1.0, 5.0)[trial % 4]
        u, b = torch.from_numpy(upper), torch.from_numpy(upper @ h)
        found = forum(u @ u.T, b, float(h @ h), phi)
        w = found.weights.numpy()
        assert w.min() >= 0
        assert w.sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(found.pi, phi - upper @ h / (h @ h), rtol=1e-12)
        nu = max(0.0, float(w @ found.pi.numpy()))
        cases.add(nu > 0)
        value = 0.5 * np.sum((w @ upper + nu * h) ** 2) - nu * phi * (h @ h)
        wanted, wanted_nu, least = _dual_by_cvxpy(upper, h, phi)
        assert value <= least + 1e-9 * max(1.0, abs(least))
        if kind == "generic":
            np.testing.assert_allclose(w, wanted, atol=1e-5)
            assert nu == pytest.approx(wanted_nu, abs=1e-5 / np.linalg.norm(h))
    assert cases == ({True} if kind == "opposite" else {True, False})


def test_forums_dual_without_a_constraint_is_mgdas() -> None:
    u = torch.randn(3, 5, dtype=torch.float64)
    found = forum(u @ u.T, torch.zeros(3), 0.0, 0.1)
    torch.testing.assert_close(found.weights, gradbal.create("mgda").weights(u @ u.T))
    assert not found.pi.any()


def _forum_step(
    model: Net, pair: tuple[Tensor, Tensor], alpha: Tensor, n_steps: int, rate: float, phi: float
) -> dict[str, Any]:
    """∇q, the unit rows and the exact λ, worked out with a plain loop, autograd and cvxpy."""
    alpha = alpha.detach().requires_grad_()
    theta = model.copies()
    moved = theta
    for _ in range(n_steps):
        total = _weighted(model.losses_at(*moved, pair[0]), alpha.detach().softmax(0))
        grads = torch.autograd.grad(total, moved)
        moved = [
            (p - rate * g).detach().requires_grad_() for p, g in zip(moved, grads, strict=True)
        ]
    there = [l.detach() for l in model.losses_at(*moved, pair[0])]
    here = model.losses_at(*theta, pair[0])
    q = _weighted(here, alpha.softmax(0)) - _weighted(there, alpha.softmax(0))
    meta, *omega = torch.autograd.grad(q, [alpha, *theta])
    upper = [
        _flat(torch.autograd.grad(f, theta, retain_graph=True))
        for f in model.losses_at(*theta, pair[1])
    ]
    rows = torch.stack([g / g.norm() for g in upper])
    h = torch.cat([meta, _flat(omega)])
    whole = torch.cat([torch.zeros(len(rows), len(alpha)).double(), rows], 1)
    lam = torch.from_numpy(_dual_by_cvxpy(whole.numpy(), h.numpy(), phi)[0])
    return {"h": h, "rows": whole, "lam": lam}


@pytest.mark.parametrize("phi", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_forum_step_by_step(phi: float, n_steps: int) -> None:
    model = Net()
    rate, kappas = 0.05, [1.0, 1.0, 2**-0.75, 2**-0.75, 3**-0.75]
    opt, found = _watched(
        model,
        SGD([model.trunk, model.heads], lr=0.05),
        "forum",
        phi=phi,
        inner_lr=rate,
        inner_steps=n_steps,
        meta_lr=0.05,
    )
    average = torch.zeros(3, dtype=torch.float64)
    for k, pair in enumerate(_batches(5)):
        alpha = opt.aggregator.alpha
        alpha = torch.zeros(3).double() if alpha is None else alpha.clone()
        ref = _forum_step(model, pair, alpha, n_steps, rate, phi)
        _step(opt, model, pair)
        average = average + kappas[k] * (ref["lam"] - average)
        torch.testing.assert_close(opt.aggregator.average, average, rtol=0, atol=1e-5)
        assert float(opt.aggregator.average.min()) >= 0
        assert float(opt.aggregator.average.sum()) == pytest.approx(1, abs=1e-12)
        h, size = ref["h"], float(ref["h"] @ ref["h"])
        lam = opt.aggregator.average
        nu = max(0.0, float(lam @ (phi - ref["rows"] @ h / size)))
        g = lam @ ref["rows"] + nu * h
        torch.testing.assert_close(found[-1], g[:3], rtol=1e-8, atol=1e-12)
        grads = _flat([model.trunk.grad, model.heads.grad])
        torch.testing.assert_close(grads, g[3:], rtol=1e-8, atol=1e-12)
        # The constraint falls at least as fast as asked for, and just so where it has to be helped.
        gain = float(torch.cat([found[-1], grads]) @ h)
        assert gain >= phi * size * (1 - 1e-9) - 1e-12
        if nu > 0:
            assert gain == pytest.approx(phi * size, rel=1e-8, abs=1e-12)
        if k % 2 == 1:
            opt.end_epoch()
    assert opt.weights is None


def test_forums_inner_loop_ends_where_it_diverges() -> None:
    model, (pair,) = Net(smooth=False), _batches()
    opt, found = _watched(
        model, SGD([model.trunk, model.heads], lr=0.0), "forum", inner_lr=1e6, phi=10.0
    )
    _step(opt, model, pair)
    # The first inner step leaves every bound: ω_K = ω, and there is nothing for α.
    assert not found[0].any()
    assert bool(model.trunk.grad.isfinite().all())


def test_forum_at_the_optimum_of_the_training_losses() -> None:
    model, (pair,) = Net(), _batches()
    opt, found = _watched(model, SGD([model.trunk], lr=0.1), "forum", inner_steps=4)
    opt.step(lambda: [1 + 0 * model.trunk.sum()] * 3, model.closure(pair[1]))
    assert not found[0].any()
    rows = [
        torch.autograd.grad(f, model.trunk, retain_graph=True)[0].flatten()
        for f in model.closure(pair[1])()
    ]
    # Taken after the step, so at another point: only the direction of the first step is compared.
    opt2 = MultiTaskOptimizer(SGD([model.trunk], lr=0.0), "forum")
    opt2.step(lambda: [1 + 0 * model.trunk.sum()] * 3, model.closure(pair[1]))
    units = torch.stack([g / g.norm() for g in rows])
    wanted = torch.from_numpy(least_norm(units.numpy()))
    torch.testing.assert_close(model.trunk.grad.flatten(), wanted, rtol=0, atol=1e-6)


def test_a_validation_loss_with_no_gradient_is_pareto_stationary_for_forum() -> None:
    model, (pair,) = Net(), _batches()
    opt = MultiTaskOptimizer(SGD([model.trunk], lr=0.1), "forum", phi=0.0)
    validation = model.closure(pair[1])
    opt.step(model.closure(pair[0]), lambda: [*validation()[:2], 1 + 0 * model.trunk.sum()])
    assert bool(model.trunk.grad.isfinite().all())


# What all three have in common.


@pytest.mark.parametrize("name", BILEVEL)
@pytest.mark.parametrize("wrapped", ["sgd", "adam"])
def test_parameters_move_by_the_wrapped_optimizers_step_alone(name: str, wrapped: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 3))
    with torch.no_grad():
        net[0].weight *= 10.0 ** torch.randn(20, 4)
    params = list(net.parameters())
    inner = SGD(params, lr=0.3) if wrapped == "sgd" else Adam(params, lr=0.3, weight_decay=0.1)
    options = {"inner_lr": 0.3} if name == "moml" else {}
    opt = MultiTaskOptimizer(inner, name, **options)
    before: list[Tensor] = []

    def look(*_: Any) -> None:
        before.extend(p.detach().clone() for p in params)

    inner.register_step_pre_hook(look)
    start = [p.detach().clone() for p in params]
    x = torch.randn(9, 4)
    opt.step(*[lambda s=s: list((net(x) - s).square().mean(0)) for s in (1.0, 2.0)])
    # Bit for bit where they were, when the step begins.
    assert all(torch.equal(p, q) for p, q in zip(before, start, strict=True))
    assert not torch.equal(params[0], start[0])


@pytest.mark.parametrize("name", BILEVEL)
def test_frozen_and_unused_parameters_get_no_gradient(name: str) -> None:
    model = Net()
    opt = MultiTaskOptimizer(_two_groups(model), name)
    for pair in _batches(3):
        _step(opt, model, pair)
    assert model.frozen.grad is None
    assert model.unused.grad is None
    assert bool((model.unused == 1).all())
    assert model.trunk.grad is not None


@pytest.mark.parametrize("name", BILEVEL)
def test_adam_as_the_wrapped_optimizer(name: str) -> None:
    """It has no momentum buffer: the virtual steps are without."""
    model = Net()
    adam = Adam([model.trunk, model.heads], lr=0.01, weight_decay=0.1)
    opt, found = _watched(model, adam, name, meta_lr=0.1)
    first = sum(l.item() for l in model.closure(_batches()[0][0])())
    for pair in _batches(1) * 20:
        lam = opt.aggregator.alpha
        if name == "auto_lambda" and lam is not None:
            chosen = [0, 1, 2]
            wanted = _auto_lambda_gradient(model, pair, lambda v: v, lam, chosen, adam)
        elif name == "moml" and lam is not None:
            h = _moml_rows(model, pair, lam, (0.01, 0.01))
            wanted = torch.from_numpy(least_norm((h / h.norm(dim=1, keepdim=True)).numpy()))
        _step(opt, model, pair)
        if name != "forum" and lam is not None:
            torch.testing.assert_close(found[-1], wanted, rtol=1e-2, atol=1e-6)
    assert sum(l.item() for l in model.closure(_batches()[0][0])()) < first


@pytest.mark.parametrize("name", BILEVEL)
def test_one_task(name: str) -> None:
    model = Net(1)
    opt, found = _watched(model, SGD([model.trunk, model.heads], lr=0.1), name)
    for pair in _batches(3):
        _step(opt, model, pair)
    assert bool(model.trunk.isfinite().all())
    if name == "moml":
        assert opt.weights.tolist() == [1.0]
        assert not found
    elif name == "forum":
        assert opt.aggregator.average.tolist() == [1.0]
        assert not torch.cat(found).any()


@pytest.mark.parametrize("name", ["moml", "auto_lambda"])
def test_an_optimizer_without_learning_rate_is_told_so(name: str) -> None:
    class Fixed(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:
            """Nothing."""

    model, (pair,) = Net(), _batches()
    opt = MultiTaskOptimizer(Fixed([model.trunk]), name)
    with pytest.raises(ValueError, match=r"virtual steps need a learning rate `lr` in every"):
        _step(opt, model, pair)
    if name == "moml":
        _step(MultiTaskOptimizer(Fixed([model.trunk]), name, inner_lr=0.1), model, pair)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("moml", {"inner_lr": 0.0}, "`inner_lr` must be in"),
        ("moml", {"meta_lr": -1.0}, "`meta_lr` must be in"),
        ("moml", {"norm": "l1"}, "`norm` must be one of 'none', 'l2', 'loss'"),
        ("moml", {"model_batch": "val"}, "`model_batch` must be one of 'train', 'train"),
        ("auto_lambda", {"primary": []}, "`primary` must be indices of tasks"),
        ("auto_lambda", {"primary": [-1]}, "`primary` must be indices of tasks"),
        ("auto_lambda", {"fd_eps": 0.0}, "`fd_eps` must be in"),
        ("auto_lambda", {"param": "log"}, "`param` must be one of 'raw', 'softmax'"),
        ("forum", {"inner_lr": 0.0}, "`inner_lr` must be in"),
        ("forum", {"inner_steps": 0}, "`inner_steps` must be a positive integer"),
        ("forum", {"phi": -0.1}, "`phi` must be in"),
    ],
)
def test_bad_hyperparameters(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gradbal.create(name, **options)


def test_a_primary_task_that_is_not_there() -> None:
    model, (pair,) = Net(), _batches()
    opt = MultiTaskOptimizer(SGD([model.trunk], lr=0.1), "auto_lambda", primary=[3])
    with pytest.raises(ValueError, match=r"`primary` must be indices below 3.*found \[3\]"):
        _step(opt, model, pair)


@pytest.mark.parametrize("name", BILEVEL)
def test_reset_is_a_fresh_start(name: str) -> None:
    model = Net()
    start = copy.deepcopy(model.state_dict())
    opt, found = _watched(model, SGD([model.trunk], lr=0.1), name, meta_lr=0.1)
    (pair,) = _batches()
    _step(opt, model, pair)
    opt.end_epoch()
    _step(opt, model, pair)
    opt.aggregator.reset()
    model.load_state_dict(start)
    _step(opt, model, pair)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    if name == "forum":
        assert opt.aggregator.epoch == 0


def _forum(**options):
    theta = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = MultiTaskOptimizer(torch.optim.SGD([theta], lr=0.01), "forum", **options)

    def losses():
        return [(theta - 1).square().sum() + 1, (theta + 1).square().sum() + 1]

    return opt, losses


def test_forum_counts_epochs_in_windows_of_steps():
    opt, losses = _forum(window=2)
    seen = []
    for _ in range(5):
        opt.step(losses, losses)
        seen.append((opt.aggregator.epoch, opt.aggregator.steps))
    assert seen == [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    with pytest.raises(ValueError, match="`window` must be in"):
        _forum(window=0)


def test_forum_warns_when_no_epoch_ever_ends():
    opt, losses = _forum()
    opt.aggregator.steps = 9_998
    opt.step(losses, losses)
    with pytest.warns(RuntimeWarning, match=r"'forum'.*end_epoch\(\).*10,000 steps.*`window`"):
        opt.step(losses, losses)


def test_forum_with_a_validation_gradient_that_is_zero():
    # |λ₁u + νh|² over λ₁ ≤ 1: all the weight on the zero row leaves ν = φ.
    upper = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    dual = forum(upper, torch.tensor([0.5, 0.0], dtype=torch.float64), 1.0, 0.1)
    torch.testing.assert_close(dual.weights, torch.tensor([0.0, 1.0], dtype=torch.float64))
    none = forum(0 * upper, torch.zeros(2, dtype=torch.float64), 1.0, 0.1)
    assert float(none.weights.sum()) == pytest.approx(1)
