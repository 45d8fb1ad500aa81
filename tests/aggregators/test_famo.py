"""FAMO: its recurrence by hand and against torch.optim.Adam, its ways to look again, bounds."""

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam

import gradbal
from gradbal import MultiTaskOptimizer
from tests.states import assert_same, snapshot
from tests.zoo import make


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _official(
    pairs: list[tuple[Tensor, Tensor]], lr: float, gamma: float, bounds: Tensor | float = 0.0
) -> tuple[list[Tensor], Tensor]:
    """ŵ of each step and ξ at the end, as in the official class: autograd and torch's own Adam."""
    xi = torch.zeros(len(pairs[0][0]), dtype=torch.float64, requires_grad=True)
    adam = Adam([xi], lr=lr, weight_decay=gamma)
    weights = []
    for before, after in pairs:
        losses = before.clone().requires_grad_()
        z = xi.detach().softmax(0)
        c = (z / (losses - bounds)).sum().detach()
        weights.append(torch.autograd.grad(((losses - bounds).log() * z / c).sum(), losses)[0])
        delta = (before - bounds).log() - (after - bounds).log()
        (xi.grad,) = torch.autograd.grad(xi.softmax(0), xi, delta)
        adam.step()
    return weights, xi.detach()


def _pairs(n_steps: int, n_tasks: int, scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    draws = torch.rand(n_steps, 2, n_tasks, dtype=torch.float64) + 0.2
    return [(scale * before, scale * after) for before, after in draws]


def test_two_steps_by_hand() -> None:
    famo = gradbal.create("famo", gamma=0.0)
    # Equal logits: ŵ ∝ 1/ℓ.
    torch.testing.assert_close(famo.step(_vector(1.0, 3.0), _vector(0.5, 3.0)), _vector(0.75, 0.25))
    # δ = (ln 2, 0), ξ.grad = (δ₁/4, −δ₁/4); the first step of Adam is lr times its sign.
    torch.testing.assert_close(famo.logits, _vector(-0.025, 0.025), rtol=1e-6, atol=0)
    # The task that fell more weighs less.
    odds = math.exp(-0.05)
    wanted = _vector(odds / (1 + odds), 1 / (1 + odds))
    torch.testing.assert_close(famo.step(_vector(2.0, 2.0), _vector(2.0, 2.0)), wanted)
    # δ = 0: the second step of Adam goes on with the momenta, 0.9·0.1 g of 0.19 and 0.999·0.001 g²
    # of 0.001999.
    mean, square = 0.09 / 0.19, 0.000999 / 0.001999
    move = 0.025 * mean / math.sqrt(square)
    wanted = _vector(-0.025 - move, 0.025 + move)
    torch.testing.assert_close(famo.logits, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("n_tasks", [2, 5])
def test_many_steps_are_those_of_the_official_class(gamma: float, n_tasks: int) -> None:
    pairs = _pairs(30, n_tasks)
    famo = gradbal.create("famo", lr=0.1, gamma=gamma)
    found = [famo.step(before, after) for before, after in pairs]
    wanted, logits = _official(pairs, 0.1, gamma)
    assert_close = torch.testing.assert_close
    for w, v in zip(found, wanted, strict=True):
        assert_close(w, v, rtol=1e-12, atol=0)
        assert float(w.min()) > 0
        assert float(w.sum()) == pytest.approx(1, rel=1e-14)
    assert_close(famo.logits, logits, rtol=1e-12, atol=1e-14)


def test_a_bound_for_each_task() -> None:
    pairs, bounds = _pairs(10, 3), [0.1, -2.0, 0.0]
    famo = gradbal.create("famo", min_losses=bounds)
    found = [famo.step(before, after) for before, after in pairs]
    for w, v in zip(found, _official(pairs, 0.025, 1e-3, _vector(*bounds))[0], strict=True):
        torch.testing.assert_close(w, v, rtol=1e-12, atol=0)
    everywhere = gradbal.create("famo", min_losses=-2.0)
    w = everywhere.loss_weights(_vector(1.0, 4.0))
    torch.testing.assert_close(w, _vector(2 / 3, 1 / 3))


def test_weights_are_the_objectives_derivative() -> None:
    famo = gradbal.create("famo", min_losses=[0.1, 0.2, -1.0])
    famo.step(*_pairs(1, 3)[0])
    losses = (torch.rand(3, dtype=torch.float64) + 0.5).requires_grad_()
    (wanted,) = torch.autograd.grad(famo.scalarize(losses), losses)
    torch.testing.assert_close(famo.loss_weights(losses), wanted)


def _logit_gradient(before: Tensor, after: Tensor, logits: Tensor) -> Tensor:
    """ξ.grad as it enters Adam, read from the first moment: `(1 − 0.9) g` with no decay."""
    famo = gradbal.create("famo", gamma=0.0)
    famo.loss_weights(before)
    famo.logits = logits.clone()
    famo.update(after)
    return 10 * famo.moments["mean"]


def test_the_logits_gradient() -> None:
    logits = _vector(0.3, -1.0, 2.0, 0.0)
    before, after = _pairs(1, 4)[0]
    g = _logit_gradient(before, after, logits)
    assert float(g.abs().max()) > 1e-2
    assert abs(float(g.sum())) < 1e-15
    # The same relative fall for all: nothing to correct.
    assert float(_logit_gradient(before, 0.7 * before, logits).abs().max()) < 1e-15
    # Each loss in units of its own.
    units = _vector(1e-8, 1.0, 30.0, 1e8)
    torch.testing.assert_close(_logit_gradient(units * before, units * after, logits), g)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_of_all_losses_changes_nothing(scale: float, dtype: torch.dtype) -> None:
    plain, scaled = gradbal.create("famo"), gradbal.create("famo")
    for before, after in _pairs(5, 3):
        w = plain.step(before, after)
        v = scaled.step((scale * before).to(dtype), (scale * after).to(dtype))
        assert v.dtype == dtype
        torch.testing.assert_close(
            v.double(), w, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0
        )


def test_losses_of_very_different_scales() -> None:
    famo = gradbal.create("famo")
    w = famo.loss_weights(torch.tensor([1e-30, 1.0, 1e30]))
    assert w.tolist() == [1.0, pytest.approx(1e-30), 0.0]
    famo.update(torch.tensor([1e-31, 1.0, 1e29]))
    assert bool(famo.logits.isfinite().all())
    assert torch.equal(famo.logits[0], famo.logits[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_losses(dtype: torch.dtype) -> None:
    famo = gradbal.create("famo")
    w = famo.step(torch.tensor([1.0, 3.0], dtype=dtype), torch.tensor([0.5, 3.0], dtype=dtype))
    assert w.dtype == dtype
    assert w.tolist() == [0.75, 0.25]
    assert famo.logits.dtype == torch.float32


def test_a_loss_at_its_bound_is_refused_before_anything_changes() -> None:
    layer = nn.Linear(2, 2)
    opt = MultiTaskOptimizer(Adam(layer.parameters(), lr=0.1), "famo", min_losses=[0.0, 0.5])
    opt_lazy = MultiTaskOptimizer(Adam(layer.parameters(), lr=0.1), "famo", lazy=True)

    def closure(second: float) -> Any:
        x = torch.ones(1, 2)
        return lambda: [1 + layer(x).square().sum(), second + 0 * layer(x).sum()]

    for made, bad in ((opt, 0.5), (opt_lazy, -1.0)):
        message = (
            rf"'famo' needs losses above `min_losses`, found {bad:g} for task 1; add an offset"
        )
        for _ in range(2):
            made.zero_grad()
            before = snapshot(layer, made)
            with pytest.raises(ValueError, match=message):
                made.step(closure(bad))
            assert_same(snapshot(layer, made), before)
            made.step(closure(1.0))


def test_a_bound_for_another_number_of_tasks_and_bad_hyperparameters() -> None:
    with pytest.raises(ValueError, match="`min_losses` must have one entry for each of 3 tasks"):
        gradbal.create("famo", min_losses=[0.0, 1.0]).loss_weights(torch.ones(3))
    for options, words in (
        ({"lr": -1.0}, "`lr` must be in"),
        ({"gamma": -1.0}, "`gamma` must be in"),
        ({"lazy": 1}, "`lazy` must be one of False, True"),
        ({"min_losses": [0.0, math.inf]}, "`min_losses` must be in"),
    ):
        with pytest.raises(ValueError, match=words):
            gradbal.create("famo", **options)
    famo = gradbal.create("famo")
    famo.loss_weights(torch.ones(3))
    with pytest.raises(ValueError, match="`famo` has 3 tasks, found 2"):
        famo.loss_weights(torch.ones(2))


def test_one_task_is_plain_sgd() -> None:
    model, twin = make("SingleTask"), make("SingleTask")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "famo")
    plain = SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        opt.step(lambda: model.losses(model.batch()))
        assert opt.weights.tolist() == [1.0]
        plain.zero_grad()
        twin.losses(twin.batch())[0].backward()
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def _losses(model: Any, batch: Tensor | None = None) -> dict[str, Tensor]:
    losses = model.losses(model.batch() if batch is None else batch)
    return dict(zip(("a", "b", "c"), (1 + l for l in losses), strict=True))


def _plain(**options: Any) -> tuple[Any, MultiTaskOptimizer]:
    model = make("Plain")
    return model, MultiTaskOptimizer(SGD(model.parameters(), lr=0.05), "famo", **options)


def test_the_closure_and_update_are_the_same() -> None:
    (model, opt), (twin, other) = _plain(), _plain()
    for _ in range(3):
        opt.step(lambda: _losses(model))
        other.zero_grad()
        other.backward(_losses(twin))
        other.step()
        with torch.no_grad():
            after = _losses(twin)
        # The order of the tasks is that of the first step; graphs and tensors are not needed.
        other.update({name: float(after[name]) for name in ("c", "a", "b")})
    assert_same(snapshot(model, opt), snapshot(twin, other))


def test_trajectory_of_a_model_against_the_official_class() -> None:
    model, opt = _plain()
    twin = make("Plain")
    pairs: list[tuple[Tensor, Tensor]] = []
    for _ in range(5):
        opt.step(lambda: _losses(model))
        # The twin: weights from all pairs so far, one step of gradient descent on Σ ŵ_i ℓ_i.
        losses = torch.stack(list(_losses(twin).values()))
        probe = [*pairs, (losses.detach(), losses.detach())]
        w = _official(probe, 0.025, 1e-3)[0][-1]
        torch.testing.assert_close(opt.weights, w, rtol=1e-10, atol=0)
        grads = torch.autograd.grad((w * losses).sum(), list(twin.parameters()))
        with torch.no_grad():
            for p, g in zip(twin.parameters(), grads, strict=True):
                p -= 0.05 * g
            pairs.append((losses.detach(), torch.stack(list(_losses(twin).values()))))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("closure", [False, True])
def test_lazy_takes_the_next_batch_for_the_losses_after_the_step(closure: bool) -> None:
    """The order of the official toy code: compare with the last losses, then weigh the new ones."""
    model, opt = _plain(lazy=True)
    batches = torch.randn(5, 6, 4, dtype=torch.float64)
    calls = 0
    seen: list[Tensor] = []
    for batch in batches:

        def losses(batch: Tensor = batch) -> dict[str, Tensor]:
            nonlocal calls
            calls += 1
            return _losses(model, batch)

        if closure:
            opt.step(losses)
        else:
            opt.zero_grad()
            opt.backward(losses())
            opt.step()
            opt.update([1.0, 1.0, 1.0])  # not wanted, not used
        seen.append(opt.losses)
        pairs = [*pairwise(seen), (seen[-1], seen[-1])]
        wanted = _official(pairs, 0.025, 1e-3)[0][-1]
        torch.testing.assert_close(opt.weights, wanted, rtol=1e-12, atol=0)
    assert calls == 5


def test_skip_leaves_the_whole_step_out() -> None:
    model, opt = _plain(nonfinite="skip")
    opt.step(lambda: _losses(model))
    opt.zero_grad()
    before = snapshot(model, opt)
    calls = 0

    def bad() -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        return {name: l * math.nan for name, l in _losses(model).items()}

    opt.step(bad)
    opt.backward(bad())
    opt.step()
    opt.update(bad())
    opt.zero_grad()
    assert_same(snapshot(model, opt), before)
    assert calls == 3
    assert opt.diagnostics()["skipped"] == 2
    opt.step(lambda: _losses(model))


def test_a_dropped_task_keeps_its_logit() -> None:
    model, opt = _plain(nonfinite="drop")
    opt.step(lambda: _losses(model))
    logits = opt.aggregator.logits.clone()

    def without_b() -> dict[str, Tensor]:
        losses = _losses(model)
        return {**losses, "b": losses["b"] * math.inf}

    opt.step(without_b)
    assert opt.weights[1] == 0.0
    assert float(opt.weights.sum()) == pytest.approx(1)
    values = torch.stack([opt.losses[0], opt.losses[2]])
    wanted = (logits[[0, 2]].softmax(0) / values) / (logits[[0, 2]].softmax(0) / values).sum()
    torch.testing.assert_close(opt.weights[[0, 2]], wanted)
    assert opt.aggregator.logits[1] == logits[1]
    assert not torch.equal(opt.aggregator.logits, logits)
    assert opt.diagnostics()["dropped"] == {"b": 1}


def test_a_loss_that_is_not_finite_after_the_step_does_not_count() -> None:
    both, one = gradbal.create("famo", gamma=0.0), gradbal.create("famo", gamma=0.0)
    both.step(_vector(1.0, 2.0, 3.0), _vector(0.5, math.inf, 3.0))
    one.step(_vector(1.0, 3.0), _vector(0.5, 3.0))
    assert both.logits[1] == 0.0
    torch.testing.assert_close(both.logits[[0, 2]], one.logits)


def test_with_a_grad_scaler() -> None:
    def run(scale: float | None) -> tuple[nn.Module, MultiTaskOptimizer]:
        model = make("Plain").float()
        model.dtype = torch.float32
        opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.05), "famo")
        scaler = GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for _ in range(3):
            opt.zero_grad()
            opt.backward(_losses(model), grad_scaler=scaler)
            scaler.step(opt)
            scaler.update()
            opt.update(_losses(model))
        return model, opt

    model, opt = run(2.0**16)
    twin, plain = run(None)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    torch.testing.assert_close(opt.aggregator.logits, plain.aggregator.logits)


def test_a_step_that_the_grad_scaler_skips_teaches_nothing() -> None:
    model = make("Plain").float()
    model.dtype = torch.float32
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.05), "famo", gamma=0.0)
    scaler = GradScaler("cpu", init_scale=2.0**127)
    weights = copy.deepcopy(model.state_dict())
    # Weights are on the simplex, so that these gradients times the scale overflow.
    opt.backward({n: 100 * l for n, l in _losses(model).items()}, grad_scaler=scaler)
    assert not bool(model.trunk[0].weight.grad.isfinite().all())
    scaler.step(opt)
    scaler.update()
    opt.update({n: 100 * l for n, l in _losses(model).items()})
    assert_same(dict(model.state_dict()), dict(weights))
    assert opt.aggregator.logits is None
    opt.zero_grad()
    opt.backward(_losses(model), grad_scaler=scaler)
    assert bool(opt.weights.isfinite().all())


def test_micro_batches_are_one_batch() -> None:
    (model, opt), (twin, other) = _plain(), _plain()
    batch = torch.randn(8, 4, dtype=torch.float64)
    for _ in range(3):
        opt.zero_grad()
        halves = batch.split(4)
        opt.backward({n: l / 2 for n, l in _losses(model, halves[0]).items()}, accumulate=True)
        opt.backward({n: l / 2 for n, l in _losses(model, halves[1]).items()})
        opt.step()
        opt.update(_losses(model, batch))
        other.step(lambda: _losses(twin, batch))
        torch.testing.assert_close(opt.weights, other.weights.double())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    torch.testing.assert_close(opt.aggregator.logits, other.aggregator.logits)


def test_weights_that_are_used_again_are_compared_over_one_step() -> None:
    model, opt = _plain(update_every=2)
    pairs = []
    for k in range(6):
        opt.zero_grad()
        opt.backward(_losses(model))
        opt.step()
        after = _losses(model)
        opt.update(after)
        if k % 2 == 0:
            pairs.append((opt.losses, torch.stack([l.detach() for l in after.values()])))
    torch.testing.assert_close(opt.aggregator.logits, _official(pairs, 0.025, 1e-3)[1])


def test_heads_get_their_tasks_weight() -> None:
    model, opt = _plain()
    losses = _losses(model)
    own = [
        torch.autograd.grad(l, head.weight, retain_graph=True)[0]
        for l, head in zip(losses.values(), model.heads, strict=True)
    ]
    opt.backward(losses)
    for w, g, head in zip(opt.weights, own, model.heads, strict=True):
        torch.testing.assert_close(head.weight.grad, w * g)


def test_reset_is_a_fresh_start() -> None:
    famo = gradbal.create("famo")
    before, after = _pairs(1, 3)[0]
    first = famo.step(before, after)
    famo.loss_weights(before)
    famo.reset()
    assert torch.equal(famo.step(before, after), first)
