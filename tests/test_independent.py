"""`backward(losses, independent=…)`: Jacobians of independent batches."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD

import gradbal
from gradbal import MultiTaskOptimizer
from tests.gradients import jacobian, shared_names, task_gradients
from tests.states import assert_same, snapshot
from tests.zoo import Plain, make

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("modo", {}),
    ("modo", {"batches": 3, "scale_free": True}),
    ("sdmgrad", {}),
    ("sdmgrad", {"lr": 0.2, "heads_from": "last"}),
]


def _batches(n: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(n)]


def _optimizer(model: nn.Module, name: str, options: dict[str, Any]) -> MultiTaskOptimizer:
    return MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), name, **options)


def _backward(model: Plain, opt: MultiTaskOptimizer, batches: list[Tensor], **more: Any) -> None:
    losses = [model.losses(b) for b in batches]
    opt.backward(losses[0], independent=losses[1:], **more)


@pytest.mark.parametrize("heads", [None, "weighted"])
@pytest.mark.parametrize(("name", "options"), METHODS)
def test_gradients_by_plain_autograd(name: str, options: dict[str, Any], heads: str) -> None:
    model = make("Plain")
    opt = _optimizer(model, name, {**options, "heads": heads})
    n = opt.aggregator.n_batches
    for seed in range(3):
        reference = copy.deepcopy(opt.aggregator)
        batches = _batches(n, seed)
        taken = [task_gradients(model, lambda twin, b=b: twin.losses(b))[0] for b in batches]
        names = shared_names(taken[0])
        j = [jacobian(rows, names) for rows in taken]
        w = reference.step(j[0] @ j[1].T)
        d = sum(c * (w @ jb) for c, jb in zip(reference.shares, j, strict=True))
        opt.zero_grad()
        _backward(model, opt, batches)
        found = torch.cat([model.get_parameter(p).grad.flatten() for p in names])
        torch.testing.assert_close(found, d)
        torch.testing.assert_close(opt.weights, w)
        for i, head in enumerate(model.heads):
            parts = [rows[i][f"heads.{i}.weight"] for rows in taken]
            own = sum(c * g for c, g in zip(reference.head_shares, parts, strict=True))
            factor = w[i] if heads == "weighted" else 1.0
            torch.testing.assert_close(head.weight.grad, factor * own)
        opt.step()


def test_the_estimate_is_unbiased_over_pairs_of_batches() -> None:
    # Two equally likely batches: over the four ordered pairs E[J₁J₂ᵀ] is E[J]E[J]ᵀ exactly, which
    # the mean of JJᵀ is not.
    model = make("Plain")
    j = []
    for b in _batches(2):
        rows = task_gradients(model, lambda twin, b=b: twin.losses(b))[0]
        j.append(jacobian(rows, shared_names(rows)))
    mean = (j[0] + j[1]) / 2
    found = []
    for a, b in itertools.product(_batches(2), repeat=2):
        seen: list[Tensor] = []
        opt = _optimizer(model, "modo", {})
        step = opt.aggregator.step
        opt.aggregator.step = lambda g, step=step, seen=seen: seen.append(g) or step(g)
        _backward(model, opt, [a, b])
        found += seen
    torch.testing.assert_close(torch.stack(found).mean(0), mean @ mean.T)
    biased = (j[0] @ j[0].T + j[1] @ j[1].T) / 2
    assert not torch.allclose(biased, mean @ mean.T, rtol=1e-2)


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_a_loss_scale_changes_nothing(name: str, options: dict[str, Any]) -> None:
    model, twin = make("Plain"), make("Plain")
    opt, plain = _optimizer(model, name, options), _optimizer(twin, name, options)
    scaler = GradScaler("cpu", init_scale=4096.0)
    for seed in range(2):
        batches = _batches(opt.aggregator.n_batches, seed)
        opt.zero_grad()
        _backward(model, opt, batches, grad_scaler=scaler)
        scaler.step(opt)
        scaler.update()
        plain.zero_grad()
        _backward(twin, plain, batches)
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("where", [0, 1, -1])
@pytest.mark.parametrize(("name", "options"), METHODS)
def test_nan_in_any_batch_is_seen(name: str, options: dict[str, Any], where: int) -> None:
    model = make("Plain")
    opt = _optimizer(model, name, options)
    batches = _batches(opt.aggregator.n_batches)
    losses = [model.losses(b) for b in batches]
    losses[where][1] = losses[where][1] + (model.trunk[0].weight * 0).square().sum().sqrt()
    before = snapshot(model, opt)
    with pytest.raises(gradbal.NonFiniteError, match="task 1"):
        opt.backward(losses[0], independent=losses[1:])
    assert_same(snapshot(model, opt), before)

    dropping = _optimizer(model, name, {**options, "nonfinite": "drop"})
    losses = [model.losses(b) for b in batches]
    losses[where][1] = losses[where][1] * float("nan")
    dropping.backward(losses[0], independent=losses[1:])
    assert float(dropping.weights[1]) == 0.0
    assert float(dropping.weights.sum()) == pytest.approx(1)
    assert model.heads[1].weight.grad is None
    assert bool(model.trunk[0].weight.grad.isfinite().all())


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_a_resumed_run_is_the_same(name: str, options: dict[str, Any], tmp_path: Any) -> None:
    model = make("Plain")
    opt = _optimizer(model, name, options)

    def train(model: Plain, opt: MultiTaskOptimizer, seeds: range) -> None:
        for seed in seeds:
            opt.zero_grad()
            _backward(model, opt, _batches(opt.aggregator.n_batches, seed))
            opt.step()

    train(model, opt, range(2))
    torch.save([model.state_dict(), opt.state_dict()], tmp_path / "c.pt")
    train(model, opt, range(2, 4))
    twin = make("Plain")
    other = _optimizer(twin, name, options)
    weights, state = torch.load(tmp_path / "c.pt", weights_only=True)
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    train(twin, other, range(2, 4))
    assert_same(snapshot(twin, other), snapshot(model, opt))


def test_what_is_missing_is_named() -> None:
    model = make("Plain")
    losses = [model.losses(b) for b in _batches(3)]
    cases = [
        ("sdmgrad", {}, losses[:1], r"'sdmgrad' takes 3 independent.*must have 2.*found 1"),
        ("modo", {}, [], r"'modo' takes 2 independent.*must have 1.*found 0"),
        ("modo", {"batches": 3}, losses[:1], "must have 2"),
        ("mgda", {}, losses[:1], r"'mgda' takes 1 independent.*must have 0.*found 1"),
        ("mean", {}, losses[:1], "'mean' takes 1"),
    ]
    for name, options, independent, words in cases:
        opt = _optimizer(model, name, options)
        before = snapshot(model, opt)
        with pytest.raises(ValueError, match=words):
            opt.backward(losses[0], independent=independent)
        assert_same(snapshot(model, opt), before)
    opt = _optimizer(model, "modo", {})
    with pytest.raises(ValueError, match="number of losses must stay 3"):
        opt.backward(losses[0], independent=[losses[1][:2]])
    with pytest.raises(ValueError, match="accumulate=True"):
        opt.backward(losses[0], independent=losses[1:2], accumulate=True)
    assert all(p.grad is None for p in model.parameters())


def test_one_batch_is_an_option_of_sdmgrad() -> None:
    model = make("Plain")
    opt = _optimizer(model, "sdmgrad", {"batches": 1, "lr": 0.05, "n_iter": 20_000})
    opt.backward(model.losses(model.batch()))
    g = opt.gramian
    w = opt.weights * 1.3 - 0.1
    gains = g @ opt.weights
    # Converged, it is the minimiser of |Jᵀ(w + λp)|² on the simplex.
    assert (w > -1e-9).all()
    assert (gains >= w @ gains - 1e-6 * gains.abs().max()).all()
