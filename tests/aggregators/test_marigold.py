"""MARIGOLD: its estimates of J d on quadratics, its steps by hand, where its weights go."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import gradbal
from gradbal import MultiTaskOptimizer
from tests.states import assert_same, snapshot


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Quadratics(nn.Module):
    """`ℓ_i = scale_i (½(x − a_i)ᵀH_i(x − a_i) + ½|h_i − 1|² + 1)`, x shared, h_i of one task."""

    def __init__(self, n_tasks: int = 4, width: int = 6, spread: float = 10.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.x = nn.Parameter(torch.randn(width, dtype=torch.float64, generator=draw))
        self.h = nn.ParameterList(torch.full((2,), float(i)).double() for i in range(n_tasks))
        factors = torch.randn(n_tasks, width, width, dtype=torch.float64, generator=draw)
        self.hessians = factors @ factors.mT / width
        self.optima = torch.randn(n_tasks, width, dtype=torch.float64, generator=draw)
        self.scales = spread ** torch.linspace(-1, 1, n_tasks, dtype=torch.float64)
        self.calls: list[tuple[bool, Tensor, Tensor]] = []
        self.spoil: Callable[[int, Tensor], Tensor] = lambda call, loss: loss

    def losses(self) -> list[Tensor]:
        self.calls.append(
            (
                torch.is_grad_enabled(),
                self.x.detach().clone(),
                torch.cat([h.detach() for h in self.h]),
            )
        )
        result = []
        for scale, hessian, a, h in zip(
            self.scales, self.hessians, self.optima, self.h, strict=True
        ):
            e = self.x - a
            loss = scale * (0.5 * e @ hessian @ e + 0.5 * (h - 1).square().sum() + 1)
            result.append(self.spoil(len(self.calls) - 1, loss))
        return result

    def rows(self, transform: str) -> Tensor:
        """`[T, P]`: the shared parameters' gradients of the transformed losses."""
        losses = self.losses()
        self.calls.pop()
        if transform == "log":
            losses = [l.log() for l in losses]
        return torch.stack([torch.autograd.grad(l, self.x, retain_graph=True)[0] for l in losses])


def _watched(model: Quadratics, lr: float = 0.01, **options: Any) -> tuple[Any, list[Tensor]]:
    """An optimizer, and the estimates q that come to its method."""
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=lr), "marigold", **options)
    found: list[Tensor] = []
    plain = opt.aggregator.step

    def step(q: Tensor) -> Tensor:
        found.append(q.clone())
        return plain(q)

    opt.aggregator.step = step
    return opt, found


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("n_tasks", [2, 4, 10])
def test_central_differences_are_exact_on_quadratics(n_tasks: int) -> None:
    model = Quadratics(n_tasks)
    opt, found = _watched(model, transform="identity")
    for _ in range(5):
        j = model.rows("identity")
        weights = opt.aggregator.taking_part(n_tasks, None).clone()
        opt.step(model.losses)
        # The model's gradient is that of the weights from before the look.
        torch.testing.assert_close(model.x.grad, weights @ j, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(opt.weights, weights)
        assert _error(found[-1], j @ (weights @ j)) < 1e-11
        assert not torch.equal(opt.aggregator.simplex_weights, weights)
    assert len(found) == 5


def _errors(transform: str, estimator: str, sizes: tuple[float, float]) -> list[float]:
    errors = []
    for eps in sizes:
        model = Quadratics()
        j = model.rows(transform)
        opt, found = _watched(model, transform=transform, estimator=estimator, eps=eps)
        opt.step(model.losses)
        errors.append(_error(found[0], j @ j.mean(0)))
    return errors


def test_errors_of_the_estimators_in_the_displacement() -> None:
    coarse, fine = _errors("log", "central", (2e-3, 1e-3))
    assert coarse < 1e-4
    assert coarse / fine == pytest.approx(4, rel=0.05)
    for transform in ("log", "identity"):
        coarse, fine = _errors(transform, "forward", (2e-3, 1e-3))
        assert coarse < 0.05
        assert coarse / fine == pytest.approx(2, rel=0.05)


def test_the_free_estimate_is_the_fall_of_the_losses_over_the_learning_rate() -> None:
    errors = []
    for lr in (2e-4, 1e-4):
        model = Quadratics()
        j = model.rows("log")
        opt, found = _watched(model, lr=lr, estimator="free")
        losses = opt.step(model.losses)
        assert len(model.calls) == 2
        after = model.losses()
        fall = torch.stack([(l / m).log().detach() for l, m in zip(losses, after, strict=True)])
        torch.testing.assert_close(found[0], fall / lr, rtol=1e-9, atol=0)
        # Heads move too, which the shared rows do not see.
        heads = torch.stack(
            [
                torch.autograd.grad(l.log(), h)[0].square().sum() / 4
                for l, h in zip(model.losses(), model.h, strict=True)
            ]
        )
        errors.append(_error(found[0], j @ j.mean(0) + heads))
    assert errors[0] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_the_free_estimate_by_update_and_with_no_learning_rate() -> None:
    model, twin = Quadratics(), Quadratics()
    opt, found = _watched(model, estimator="free")
    other, seen = _watched(twin, estimator="free")
    for _ in range(3):
        opt.step(model.losses)
        other.zero_grad()
        other.backward(twin.losses())
        other.step()
        other.update([l.item() for l in twin.losses()])
    assert_same(found, seen)
    # A warm-up starts from zero: no step, nothing to learn from.
    opt.param_groups[0]["lr"] = 0.0
    opt.step(model.losses)
    assert len(found) == 3
    opt.step(model.losses)
    del opt.param_groups[0]["lr"]
    opt.aggregator.learning_rate = None
    opt.aggregator.loss_weights(torch.ones(4))
    with pytest.raises(ValueError, match=r"'marigold' with estimator='free' needs the learning"):
        opt.aggregator.update(torch.ones(4))


def test_two_steps_by_hand() -> None:
    method = gradbal.create("marigold", gamma=0.05)
    # s = 4: (0.45, 0.5), then 0.025 each onto the simplex.
    torch.testing.assert_close(method.step(_vector(4.0, 0.0)), _vector(0.475, 0.525))
    # s stays: (0.475 − 0.0125, 0.525 − 0.025), then 0.01875 each.
    torch.testing.assert_close(method.step(_vector(1.0, 2.0)), _vector(0.48125, 0.51875))
    assert method.scale == 4.0
    # κ = ¼: s = max(1, 2); ρ = 1 takes 0.05 λ away besides.
    method = gradbal.create("marigold", gamma=0.05, scale_decay=0.25, rho=1.0)
    method.step(_vector(4.0, 0.0))
    a, b = 0.475 * 0.95 - 0.025, 0.525 * 0.95 - 0.05
    rest = (1 - a - b) / 2
    torch.testing.assert_close(method.step(_vector(1.0, 2.0)), _vector(a + rest, b + rest))
    assert method.scale == 2.0
    method = gradbal.create("marigold", gamma=0.5, step_rule="exp")
    torch.testing.assert_close(method.step(_vector(-4.0, 4.0)), _vector(0.5, -0.5).softmax(0))
    # In units of s = 4: exponents −½·(2/4) and 0.
    wanted = _vector(0.5 - 0.25, -0.5).softmax(0)
    torch.testing.assert_close(method.step(_vector(2.0, 0.0)), wanted)


def test_weights_leave_and_come_back_to_the_faces_of_the_simplex() -> None:
    method = gradbal.create("marigold", gamma=1.0)
    assert method.step(_vector(8.0, 0.0, 0.0)).tolist() == [0.0, 0.5, 0.5]
    assert float(method.step(_vector(-8.0, 0.0, 0.0))[0]) > 0.5


@pytest.mark.parametrize(("step_rule", "gamma"), [("simplex", 0.02), ("exp", 0.3)])
def test_with_exact_estimates_the_weights_go_to_mgdas(step_rule: str, gamma: float) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        j = torch.randn(5, 6, dtype=torch.float64) + 0.3
        g = j @ j.T
        wanted = gradbal.create("mgda").weights(g)
        method = gradbal.create("marigold", gamma=gamma, step_rule=step_rule)
        w = torch.full((5,), 0.2, dtype=torch.float64)
        for _ in range(4000):
            w = method.step(g @ w)
        torch.testing.assert_close(w, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("transform", ["log", "identity"])
def test_with_frozen_parameters_the_weights_go_to_mgdas(transform: str) -> None:
    model = Quadratics(3, spread=2.0)
    start = model.x.detach().clone()
    opt, _ = _watched(model, lr=0.0, transform=transform, gamma=1.0)
    for _ in range(300):
        opt.step(model.losses)
    j = model.rows(transform)
    wanted = gradbal.create("mgda").weights(j @ j.T)
    assert 0.34 < float(wanted.max()) < 0.99, "neither a vertex nor equal weights"
    assert torch.equal(model.x, start)
    torch.testing.assert_close(opt.aggregator.simplex_weights, wanted, rtol=0, atol=1e-5)


def test_weights_stay_on_the_simplex_and_the_scale_never_falls() -> None:
    model = Quadratics(5)
    opt, found = _watched(model, lr=0.02, gamma=0.3)
    largest = 0.0
    for _ in range(60):
        opt.step(model.losses)
        largest = max(largest, float(found[-1].abs().max()))
        assert opt.aggregator.scale == largest
        w = opt.aggregator.simplex_weights
        assert float(w.min()) >= 0
        assert float(w.sum()) == pytest.approx(1, rel=1e-12)
    assert float(found[-1].abs().max()) < largest


def test_the_scale_of_a_loss_changes_nothing_with_log() -> None:
    def run(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model = Quadratics(3)
        model.scales = scales
        opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.05), "marigold")
        for _ in range(10):
            losses = opt.step(model.losses)
        values = torch.stack([l.detach() for l in losses])
        return opt.aggregator.simplex_weights, model.x.detach(), opt.weights * values

    plain, scaled = run(torch.ones(3).double()), run(_vector(1e-8, 1.0, 1e8))
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("exponent", [-100, -60, 60])
def test_the_scale_of_all_losses_changes_no_weights_without_log(exponent: int) -> None:
    # In float32 the squares of such gradients are out of range.
    runs = []
    for scale in (1.0, 2.0**exponent):
        model = Quadratics(3).float()
        model.scales = scale * torch.ones(3)
        model.hessians, model.optima = model.hessians.float(), model.optima.float()
        opt, found = _watched(model, lr=0.0, transform="identity", gamma=0.5)
        for _ in range(3):
            opt.step(model.losses)
        runs.append(opt.aggregator.simplex_weights)
    assert not torch.equal(runs[0], torch.full_like(runs[0], 1 / 3))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-3, atol=1e-4)
    assert len(found) == 3


def test_displacements_and_calls() -> None:
    for estimator, steps in (("central", [-1.0, 1.0]), ("forward", [-1.0])):
        model = Quadratics()
        opt, _ = _watched(model, estimator=estimator)
        start = model.x.detach().clone()
        opt.step(model.losses)
        assert [grad for grad, _, _ in model.calls] == [True] + [False] * len(steps)
        d = model.x.grad
        length = 1e-3 * (1 + start.norm())
        for sign, (_, x, _) in zip(steps, model.calls[1:], strict=True):
            torch.testing.assert_close(x - start, sign * length * d / d.norm(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scope", ["shared", "all"])
def test_heads_are_displaced_only_with_scope_all(scope: str) -> None:
    model = Quadratics()
    opt, found = _watched(model, scope=scope, transform="identity")
    j = model.rows("identity")
    opt.step(model.losses)
    heads = [h for _, _, h in model.calls]
    assert torch.equal(heads[0], heads[1]) == (scope == "shared")
    wanted = j @ j.mean(0)
    if scope == "all":
        own = torch.stack(
            [s * (h - 1) for s, h in zip(model.scales, heads[0].split(2), strict=True)]
        )
        wanted = wanted + own.square().sum(1) / 4
    assert _error(found[0], wanted) < 1e-11


def test_explicit_shared_parameters_are_those_displaced() -> None:
    model = Quadratics()
    opt, _ = _watched(model, shared_params=[model.h[2]])
    opt.step(model.losses)
    (_, x, h), (_, x_moved, h_moved), _ = model.calls
    assert torch.equal(x, x_moved)
    assert (h != h_moved).nonzero().flatten().tolist() == [4, 5]


@pytest.mark.parametrize("estimator", ["central", "forward"])
def test_parameters_are_back_bit_for_bit(estimator: str) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 3))
    with torch.no_grad():
        layer[0].weight *= 10.0 ** torch.randn(30, 4)
    before = [p.detach().clone() for p in layer.parameters()]
    opt = MultiTaskOptimizer(
        SGD(layer.parameters(), lr=0.0), "marigold", eps=3.0, estimator=estimator
    )
    x = torch.randn(9, 4)
    for _ in range(3):
        opt.step(lambda: list(1 + layer(x).square().mean(0)))
    assert all(torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True))
    assert opt.aggregator.scale > 0


@pytest.mark.parametrize("estimator", ["central", "forward"])
def test_a_displaced_loss_that_is_not_finite(estimator: str) -> None:
    model = Quadratics()
    opt, found = _watched(model, estimator=estimator)
    probes = 2 if estimator == "central" else 1
    start = model.x.detach().clone()
    # The first displacement fails: halved once.
    model.spoil = lambda call, loss: loss * (math.inf if 1 <= call <= probes else 1)
    opt.step(model.losses)
    distances = [float((x - start).norm()) for _, x, _ in model.calls[1:]]
    assert len(distances) == 2 * probes
    assert distances[-1] == pytest.approx(distances[0] / 2, rel=1e-6)
    assert len(found) == 1
    # Both fail: λ and s stay, the model is trained all the same.
    weights, scale = opt.aggregator.simplex_weights.clone(), opt.aggregator.scale
    model.calls.clear()
    before = model.x.detach().clone()
    model.spoil = lambda call, loss: loss - loss.detach() - 1 if call >= 1 else loss
    opt.step(model.losses)
    assert len(model.calls) == 1 + 2 * probes
    assert len(found) == 1
    assert torch.equal(opt.aggregator.simplex_weights, weights)
    assert opt.aggregator.scale == scale
    assert not torch.equal(model.x, before)


def test_a_gradient_of_zero_leaves_the_weights_and_asks_nothing() -> None:
    model = Quadratics(2)
    model.hessians[1], model.scales = model.hessians[0], torch.ones(2).double()
    with torch.no_grad():
        model.x.zero_()
        model.optima[0], model.optima[1] = 1.0, -1.0
    opt, found = _watched(model, transform="identity")
    opt.step(model.losses)
    assert not model.x.grad.any()
    assert len(model.calls) == 1
    assert not found
    assert opt.aggregator.simplex_weights.tolist() == [0.5, 0.5]


def test_one_task_has_all_the_weight() -> None:
    model = Quadratics(1)
    opt, found = _watched(model, gamma=5.0)
    for _ in range(3):
        opt.step(model.losses)
        assert opt.aggregator.simplex_weights.tolist() == [1.0]
    assert len(found) == 3


def test_a_loss_that_is_not_positive_is_refused_before_anything_changes() -> None:
    model = Quadratics(2)
    opt = MultiTaskOptimizer(Adam(model.parameters(), lr=0.1), "marigold")

    def bad() -> dict[str, Tensor]:
        a, b = model.losses()
        return {"a": a, "b": b - b.detach() - 0.5}

    words = r"'marigold' with transform='log' needs positive losses, found -0.5 for task 1; add an"
    for _ in range(2):
        opt.zero_grad()
        before = snapshot(model, opt)
        with pytest.raises(ValueError, match=words):
            opt.step(bad)
        assert_same(snapshot(model, opt), before)
        opt.step(lambda: dict(zip("ab", model.losses(), strict=True)))
    other = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "marigold", transform="identity")
    other.step(bad)


def test_dropped_tasks_and_skipped_steps_leave_the_weights() -> None:
    model = Quadratics(3)
    opt, found = _watched(model, nonfinite="drop")
    opt.step(model.losses)
    weights = opt.aggregator.simplex_weights.clone()

    def bad() -> list[Tensor]:
        a, b, c = model.losses()
        return [a, b * math.nan, c]

    losses = opt.step(bad)
    assert torch.equal(opt.aggregator.simplex_weights, weights)
    part = weights[[0, 2]] / weights[[0, 2]].sum()
    values = torch.stack([losses[0], losses[2]]).detach()
    torch.testing.assert_close(opt.weights[[0, 2]], part / values)
    assert opt.weights[1] == 0.0
    assert len(found) == 1
    skipping = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "marigold", nonfinite="skip")
    before = model.x.detach().clone()
    model.calls.clear()
    skipping.step(bad)
    assert len(model.calls) == 1
    assert torch.equal(model.x, before)


@pytest.mark.parametrize("transform", ["log", "identity"])
def test_weights_are_the_objectives_derivative(transform: str) -> None:
    method = gradbal.create("marigold", transform=transform)
    method.step(_vector(1.0, -2.0, 0.5))
    losses = _vector(0.3, 2.0, 7.0).requires_grad_()
    (wanted,) = torch.autograd.grad(method.scalarize(losses), losses)
    torch.testing.assert_close(method.loss_weights(losses), wanted)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 0.0}, "`gamma` must be in"),
        ({"scale_decay": 1.5}, "`scale_decay` must be in"),
        ({"rho": -1.0}, "`rho` must be in"),
        ({"eps": 0.0}, "`eps` must be in"),
        ({"transform": "sqrt"}, "`transform` must be one of 'log', 'identity'"),
        ({"step_rule": "adam"}, "`step_rule` must be one of 'simplex', 'exp'"),
        ({"estimator": "random"}, "`estimator` must be one of 'central', 'forward', 'free'"),
        ({"scope": "heads"}, "`scope` must be one of 'shared', 'all'"),
    ],
)
def test_bad_hyperparameters(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gradbal.create("marigold", **options)


def test_the_number_of_tasks_is_kept_and_reset_is_a_fresh_start() -> None:
    method = gradbal.create("marigold")
    first = method.step(_vector(1.0, 2.0, 3.0)).clone()
    with pytest.raises(ValueError, match="`marigold` has 3 tasks, found 2"):
        method.step(_vector(1.0, 2.0))
    method.reset()
    assert torch.equal(method.step(_vector(1.0, 2.0, 3.0)), first)
