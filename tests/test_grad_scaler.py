"""GradScaler around the balanced gradient; on the CPU it works as on an accelerator."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD

import gradbal
from gradbal import MultiTaskOptimizer
from tests.states import assert_same, root_at_zero
from tests.zoo import METHODS, keywords, make, takes

GRAMIAN = [name for name in METHODS if gradbal.info(name).kind == "gramian"]
RANDOM = [
    name
    for name in METHODS
    if gradbal.info(name).kind == "scalarizer" and not gradbal.info(name).promises.deterministic
]
"""They have drawn before anyone sees the overflow: it is undone when the gradients are cleared."""


def _model(aggregator: str, **options: object) -> tuple[nn.Module, MultiTaskOptimizer]:
    model = make("Plain").float()
    model.dtype = torch.float32
    sgd = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, MultiTaskOptimizer(sgd, aggregator, **keywords(aggregator) | options)


def _assert_close(model: nn.Module, twin: nn.Module) -> None:
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


OPTIONS = [
    {},
    {"heads": "own"},
    {"heads": "weighted"},
    {"update_every": 2},
    {"loss_transform": "log"},
]


@pytest.mark.parametrize(
    ("aggregator", "options"), [(m, o) for m in METHODS for o in OPTIONS if takes(m, **o)], ids=str
)
def test_the_scale_changes_nothing(aggregator: str, options: dict[str, object]) -> None:
    model, opt = _model(aggregator, **options)
    twin, plain = _model(aggregator, **options)
    scaler = GradScaler("cpu", init_scale=65536.0)
    for _ in range(3):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()), grad_scaler=scaler)
        scaler.step(opt)
        scaler.update()
        plain.zero_grad()
        plain.backward(twin.losses(twin.batch()))
        plain.step()
        torch.testing.assert_close(opt.losses, plain.losses, rtol=1e-4, atol=0)
        torch.testing.assert_close(opt.weights, plain.weights, rtol=1e-3, atol=1e-6)
    assert scaler.get_scale() == 65536.0
    _assert_close(model, twin)
    if aggregator == "uw":
        torch.testing.assert_close(*(o.aggregator.learned for o in (opt, plain)))


@pytest.mark.parametrize("aggregator", METHODS)
def test_the_gradient_lands_scaled(aggregator: str) -> None:
    model, opt = _model(aggregator)
    twin, plain = _model(aggregator)
    scaler = GradScaler("cpu", init_scale=1024.0)
    opt.backward(model.losses(model.batch()), grad_scaler=scaler)
    plain.backward(twin.losses(twin.batch()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad / 1024.0, q.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("aggregator", METHODS)
def test_micro_batches(aggregator: str) -> None:
    model, opt = _model(aggregator)
    twin, plain = _model(aggregator)
    scaler = GradScaler("cpu", init_scale=65536.0)
    for i, part in enumerate(model.batch().chunk(2)):
        opt.backward([l / 2 for l in model.losses(part)], accumulate=i == 0, grad_scaler=scaler)
    scaler.step(opt)
    scaler.update()
    plain.backward(twin.losses(twin.batch()))
    plain.step()
    _assert_close(model, twin)


@pytest.mark.parametrize("aggregator", METHODS)
def test_unscale_and_clip_in_between(aggregator: str) -> None:
    model, opt = _model(aggregator)
    twin, plain = _model(aggregator)
    scaler = GradScaler("cpu", init_scale=65536.0)
    opt.backward(model.losses(model.batch()), grad_scaler=scaler)
    scaler.unscale_(opt)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    scaler.step(opt)
    plain.backward(twin.losses(twin.batch()))
    want = nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    plain.step()
    torch.testing.assert_close(norm, want, rtol=1e-4, atol=0)
    _assert_close(model, twin)


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "drop"])
@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("aggregator", METHODS)
def test_an_overflow_is_left_to_the_scaler(aggregator: str, where: str, nonfinite: str) -> None:
    model, opt = _model(aggregator, nonfinite=nonfinite)
    scaler = GradScaler("cpu", init_scale=1024.0)
    opt.backward(model.losses(model.batch()), grad_scaler=scaler)
    scaler.step(opt)
    scaler.update()
    before = copy.deepcopy([model.state_dict(), opt.optimizer.state_dict()])
    state = copy.deepcopy(opt.aggregator.state_dict())
    twin, other = copy.deepcopy((model, opt))

    opt.zero_grad()
    losses = model.losses(model.batch())
    if where == "loss":
        losses[1] = losses[1] * float("inf")
    else:
        losses[1] = losses[1] + root_at_zero(model.trunk[0].weight)
    opt.backward(losses, grad_scaler=scaler)
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same([model.state_dict(), opt.optimizer.state_dict()], before)
    opt.zero_grad()
    assert_same(opt.aggregator.state_dict(), state)

    for m, o in ((model, opt), (twin, other)):
        o.zero_grad()
        o.backward(m.losses(m.batch()), grad_scaler=scaler)
        scaler.step(o)
        scaler.update()
    assert_same(model.state_dict(), twin.state_dict())


Pair = tuple[nn.Module, MultiTaskOptimizer]


def _copied(pair: Pair) -> Pair:
    return copy.deepcopy(pair)


def _resumed(pair: Pair) -> Pair:
    file = io.BytesIO()
    torch.save([each.state_dict() for each in pair], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    model, opt = _model(pair[1].aggregator.name)
    opt.load_state_dict(states[1])
    model.load_state_dict(states[0])
    return model, opt


def _cleared_by_the_model(pair: Pair) -> Pair:
    pair[0].zero_grad()
    # The model does not know of the method's own weights.
    for p in pair[1].aggregator.parameters():
        p.grad = None
    return pair


def _left_alone(pair: Pair) -> Pair:
    pair[1].zero_grad()
    return pair


def _at_the_end_of_an_epoch(pair: Pair) -> Pair:
    pair[1].end_epoch()
    return pair


def _scaled_step(pair: Pair, scaler: GradScaler, factor: float = 1.0) -> None:
    model, opt = pair
    opt.backward([l * factor for l in model.losses(model.batch())], grad_scaler=scaler)
    scaler.step(opt)
    scaler.update()


@pytest.mark.parametrize(
    "way", [_left_alone, _cleared_by_the_model, _copied, _resumed, _at_the_end_of_an_epoch]
)
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("aggregator", [*RANDOM, "uw", "imtl", "dwa", "upgrad", "moco", "pcgrad"])
def test_a_run_with_an_overflow_goes_on_as_one_without(
    aggregator: str, at: int, way: Callable[[Pair], Pair]
) -> None:
    scaler = GradScaler("cpu", init_scale=1024.0)
    pair, twin = _model(aggregator), _model(aggregator)
    for factor in (1.0,) * at + (float("inf"), 1.0, 1.0):
        if factor == 1.0:
            twin[1].zero_grad()
            _scaled_step(twin, scaler)
        (way if way is _cleared_by_the_model else _left_alone)(pair)
        _scaled_step(pair, scaler, factor)
        if factor != 1.0:
            assert scaler.get_scale() == 512.0
            pair = way(pair)
            if way is _at_the_end_of_an_epoch:
                twin[1].end_epoch()
    assert_same(pair[0].state_dict(), twin[0].state_dict())
    assert_same(pair[1].aggregator.state_dict(), twin[1].aggregator.state_dict())


@pytest.mark.parametrize("aggregator", RANDOM)
def test_what_several_backward_passes_have_drawn_is_kept(aggregator: str) -> None:
    pair, twin = _model(aggregator), _model(aggregator)
    scaler = GradScaler("cpu", init_scale=1024.0)
    for step in range(2):
        for (model, opt), scale in ((pair, scaler), (twin, None)):
            opt.zero_grad()
            for part in model.batch().chunk(2):
                opt.backward(model.losses(part), grad_scaler=scale)
            if step == 0:
                opt.backward(model.losses(part), accumulate=True, grad_scaler=scale)
                opt.backward(model.losses(part), grad_scaler=scale)
        scaler.step(pair[1])
        scaler.update()
        twin[1].step()
    assert_same(pair[1].aggregator.state_dict(), twin[1].aggregator.state_dict())
    _assert_close(pair[0], twin[0])


@pytest.mark.parametrize("aggregator", [*RANDOM, "moco", "uw"])
def test_a_step_of_the_wrapped_optimizer_is_a_step(aggregator: str) -> None:
    pair, twin = _model(aggregator), _model(aggregator)
    scaler = GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        pair[1].zero_grad()
        pair[1].backward(pair[0].losses(pair[0].batch()), grad_scaler=scaler)
        scaler.step(pair[1].optimizer)
        scaler.update()
        twin[1].zero_grad()
        twin[1].backward(twin[0].losses(twin[0].batch()))
        twin[1].step()
    pair[1].zero_grad()
    states = [each[1].aggregator.state_dict()["state"] for each in (pair, twin)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-6)
    _assert_close(pair[0], twin[0])


def test_losses_after_a_step_that_was_left_out_teach_nothing() -> None:
    model = make("Plain").float()
    model.dtype = torch.float32
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.05), "famo")
    scaler = GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, float("inf"), 1.0):
        opt.zero_grad()
        before = copy.deepcopy(opt.aggregator.state_dict())
        _scaled_step((model, opt), scaler, factor)
        with torch.no_grad():
            opt.update(model.losses(model.batch()))
        if factor == 1.0:
            with pytest.raises(AssertionError):
                assert_same(opt.aggregator.state_dict(), before)
        else:
            assert_same(opt.aggregator.state_dict(), before)


def test_a_real_overflow_in_half_precision() -> None:
    layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 1)])
    opt = MultiTaskOptimizer(SGD(layers.parameters(), lr=1e-3), "upgrad")
    scaler = GradScaler("cpu", init_scale=2.0**24)
    before = layers[0].weight.detach().clone()
    steps = 0
    while torch.equal(before, layers[0].weight):
        opt.zero_grad()
        with torch.autocast("cpu", torch.float16):
            z = layers[0](torch.ones(2, 3))
            y = layers[1](z)
        opt.backward([y.float().sum(), z.float().square().sum()], grad_scaler=scaler)
        scaler.step(opt)
        scaler.update()
        steps += 1
        assert steps < 30
    assert steps > 1
    assert bool(layers[0].weight.isfinite().all())


def test_a_disabled_scaler_is_as_none() -> None:
    model, opt = _model("nash_mtl")
    twin, plain = _model("nash_mtl")
    scaler = GradScaler("cpu", enabled=False)
    opt.backward(model.losses(model.batch()), grad_scaler=scaler)
    scaler.step(opt)
    scaler.update()
    plain.backward(twin.losses(twin.batch()))
    plain.step()
    assert_same(model.state_dict(), twin.state_dict())
