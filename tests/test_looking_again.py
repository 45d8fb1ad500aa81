"""Closures that are called again: no grad, the same random numbers, no traces left."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam

import gradbal
from gradbal import MultiTaskOptimizer
from tests.states import assert_same, snapshot
from tests.zoo import make

BILEVEL = ["moml", "auto_lambda", "forum"]
AGAIN: list[tuple[str, dict[str, Any]]] = [
    ("famo", {}),
    ("marigold", {}),
    ("marigold", {"estimator": "forward", "scope": "all"}),
    ("marigold", {"estimator": "free"}),
    *((name, {}) for name in BILEVEL),
    ("moml", {"model_batch": "train+val", "norm": "loss"}),
]


class Noisy(nn.Module):
    """BatchNorm and dropout before two heads; remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh())
        self.a, self.b = nn.Linear(8, 1), nn.Linear(8, 2)
        self.calls: list[tuple[bool, Tensor]] = []
        self.double()

    def losses(self, x: Tensor) -> list[Tensor]:
        dropped = self.trunk[2](torch.ones(64, dtype=torch.float64))
        self.calls.append((torch.is_grad_enabled(), dropped))
        z = self.trunk(x)
        return [(self.a(z) - 1).square().mean() + 1, (self.b(z) + 2).square().mean() + 0.5]


def _batch(seed: int) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _step(model: Any, opt: MultiTaskOptimizer, seed: int) -> Any:
    closures = [lambda: model.losses(_batch(seed))]
    if opt.aggregator.name in BILEVEL:
        closures.append(lambda: model.losses(_batch(seed + 100)))
    return opt.step(*closures)


@pytest.mark.parametrize(("name", "options"), AGAIN)
def test_extra_calls_draw_the_same_numbers_and_leave_no_trace(
    name: str, options: dict[str, Any]
) -> None:
    model = Noisy()
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.01), name, **options)
    # What one plain forward pass does to buffers and random state.
    twin = Noisy()
    torch.manual_seed(5)
    twin.losses(_batch(0))
    random = torch.random.get_rng_state()
    torch.manual_seed(5)
    _step(model, opt, 0)
    assert torch.equal(torch.random.get_rng_state(), random)
    for (n, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(b, c), n
    assert len(model.calls) > 1
    assert model.calls[0][0], "the first call is with grad"
    if name not in BILEVEL:
        assert not any(grad for grad, _ in model.calls[1:])
        for _, mask in model.calls[1:]:
            assert torch.equal(mask, model.calls[0][1])
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("name", "options"), AGAIN)
def test_a_resumed_run_is_the_same_bit_for_bit(
    name: str, options: dict[str, Any], tmp_path: Any
) -> None:
    def fresh() -> tuple[Noisy, MultiTaskOptimizer]:
        model = Noisy()
        return model, MultiTaskOptimizer(Adam(model.parameters(), lr=0.01), name, **options)

    def train(model: Noisy, opt: MultiTaskOptimizer, steps: range) -> None:
        for k in steps:
            torch.manual_seed(k)
            _step(model, opt, k)
            opt.end_epoch()

    model, opt = fresh()
    train(model, opt, range(3))
    torch.save([model.state_dict(), opt.state_dict()], tmp_path / "c.pt")
    train(model, opt, range(3, 6))
    other, resumed = fresh()
    weights, state = torch.load(tmp_path / "c.pt", weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(other, resumed, range(3, 6))
    assert_same(snapshot(other, resumed), snapshot(model, opt))


@pytest.mark.parametrize("name", ["famo", "marigold"])
def test_a_checkpoint_between_backward_step_and_update(name: str, tmp_path: Any) -> None:
    options = {"estimator": "free"} if name == "marigold" else {}

    def fresh() -> tuple[Any, MultiTaskOptimizer]:
        model = make("Plain")
        return model, MultiTaskOptimizer(SGD(model.parameters(), lr=0.01), name, **options)

    def act(model: Any, opt: MultiTaskOptimizer, what: str) -> None:
        losses = [l + 1 for l in model.losses(model.batch())]
        if what == "backward":
            opt.zero_grad()
            opt.backward(losses)
        elif what == "step":
            opt.step()
        else:
            opt.update(losses)

    script = ["backward", "step", "update"] * 3
    for cut in range(3, 7):
        model, opt = fresh()
        for what in script[:cut]:
            act(model, opt, what)
        grads = [p.grad.clone() for p in model.parameters()]
        torch.save([model.state_dict(), opt.state_dict()], tmp_path / "c.pt")
        other, resumed = fresh()
        weights, state = torch.load(tmp_path / "c.pt", weights_only=True)
        other.load_state_dict(weights)
        for p, g in zip(other.parameters(), grads, strict=True):
            p.grad = g
        resumed.load_state_dict(state)
        for what in script[cut:]:
            act(model, opt, what)
            act(other, resumed, what)
        assert_same(snapshot(other, resumed), snapshot(model, opt))


@pytest.mark.parametrize("name", BILEVEL)
def test_bilevel_methods_name_the_closure_that_is_missing(name: str) -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), name)
    before = snapshot(model, opt)

    def closure() -> list[Tensor]:
        return model.losses(model.batch())

    with pytest.raises(ValueError, match=rf"'{name}'.*found no val_closure"):
        opt.step(closure)
    with pytest.raises(ValueError, match=rf"'{name}'.*found no closure and no val_closure"):
        opt.step()
    with pytest.raises(ValueError, match=rf"'{name}'.*step\(closure, val_closure\).*`backward`"):
        opt.backward(closure())
    with pytest.raises(ValueError, match=r"number of losses must stay 3.*found 2"):
        opt.step(closure, lambda: closure()[:2])
    with pytest.raises(gradbal.NonFiniteError, match="task 1"):
        opt.step(
            lambda: [l * (float("nan") if i == 1 else 1) for i, l in enumerate(closure())], closure
        )
    assert_same(snapshot(model, opt), before)


def test_methods_that_look_around_need_a_closure() -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "marigold")
    with pytest.raises(ValueError, match=r"'marigold'.*step\(closure\).*`backward`"):
        opt.backward(model.losses(model.batch()))
    with pytest.raises(ValueError, match=r"'marigold'.*step\(closure\), found no closure"):
        opt.step()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("name", "options"), [("famo", {}), ("marigold", {"estimator": "free"})])
def test_methods_that_look_after_say_when_nobody_looked(name: str, options: dict[str, Any]) -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), name, **options)

    def losses() -> list[Tensor]:
        return [l + 1 for l in model.losses(model.batch())]

    opt.backward(losses())
    opt.step()
    before = snapshot(model, opt)
    with pytest.raises(ValueError, match=rf"'{name}'.*update\(losses\)"):
        opt.backward(losses())
    assert_same(snapshot(model, opt), before)
    with pytest.raises(ValueError, match=r"losses of \[0, 1, 2\] are required, found \[0, 1\]"):
        opt.update(losses()[:2])
    with pytest.raises(ValueError, match="must be scalars"):
        opt.update([torch.ones(2)] * 3)
    opt.update(losses())
    opt.backward(losses())


@pytest.mark.parametrize("name", ["mgda", "mean", "uw", "famo", "modo"])
def test_a_validation_closure_without_use_is_refused(name: str) -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), name)
    with pytest.raises(ValueError, match=f"'{name}' has no use for a `val_closure`"):
        opt.step(lambda: None, lambda: None)


def test_double_sampling_takes_no_closure() -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "modo")
    with pytest.raises(ValueError, match=r"'modo' takes independent batches"):
        opt.step(lambda: model.losses(model.batch()))


@pytest.mark.parametrize(("name", "options"), AGAIN)
def test_lbfgs_is_refused(name: str, options: dict[str, Any]) -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=f"'{name}' does not work with LBFGS"):
        MultiTaskOptimizer(LBFGS(layer.parameters()), name, **options)


@pytest.mark.parametrize(
    ("option", "value"),
    [("heads", "own"), ("update_every", 2), ("loss_transform", "log"), ("nonfinite", "drop")],
)
def test_options_that_a_bilevel_method_cannot_serve(option: str, value: Any) -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=f"{option} must be"):
        MultiTaskOptimizer(SGD(layer.parameters(), lr=0.1), "moml", **{option: value})


@pytest.mark.parametrize("name", BILEVEL)
def test_skip_leaves_the_whole_step_out(name: str) -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), name, nonfinite="skip")

    def good() -> list[Tensor]:
        return model.losses(model.batch())

    def bad() -> list[Tensor]:
        return [l * float("inf") for l in good()]

    opt.step(good, good)
    opt.zero_grad()
    before = snapshot(model, opt)
    opt.step(bad, good)
    opt.zero_grad()
    opt.step(good, bad)
    opt.zero_grad()
    assert_same(snapshot(model, opt), before)
    assert opt.diagnostics()["skipped"] == 2
