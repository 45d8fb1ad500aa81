"""MultiTaskOptimizer is the optimizer that it wraps: groups, hooks, formats."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import gradbal
from gradbal import MultiTaskOptimizer
from tests.gradients import assert_gradients, expected, task_gradients
from tests.states import assert_same, fresh, snapshot
from tests.zoo import METHODS, WITH_HEADS, accepts, fits, keywords, make, optimizer


def _wrap(optimizer: Optimizer, aggregator: str = "upgrad", **options: Any) -> MultiTaskOptimizer:
    return MultiTaskOptimizer(optimizer, aggregator, **options)


def _train(model: nn.Module, opt: MultiTaskOptimizer, steps: int = 1) -> None:
    for _ in range(steps):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        opt.step()


def test_it_is_an_optimizer_and_delegates() -> None:
    model = make("Plain")
    sgd = SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt = _wrap(sgd)
    assert isinstance(opt, Optimizer)
    assert opt.optimizer is sgd
    assert opt.param_groups is sgd.param_groups
    assert opt.state is sgd.state
    assert opt.defaults is sgd.defaults
    _train(model, opt)
    assert opt.state is sgd.state
    assert "momentum_buffer" in opt.state[next(model.parameters())]
    text = repr(opt)
    assert "SGD" in text
    assert "UPGrad" in text


def test_the_default_method_is_upgrad() -> None:
    opt = MultiTaskOptimizer(SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    assert opt.aggregator.name == "upgrad"


def test_an_instance_serves_as_aggregator() -> None:
    method = gradbal.create("cagrad", c=0.3)
    opt = MultiTaskOptimizer(SGD(nn.Linear(2, 2).parameters(), lr=0.1), method)
    assert opt.aggregator is method


@pytest.mark.parametrize("aggregator", ["mean", "uw", "upgrad"])
def test_step_hooks_run_once(aggregator: str) -> None:
    model, opt = fresh(aggregator)
    calls: list[str] = []
    opt.register_step_pre_hook(lambda *args: calls.append("mine before"))
    opt.register_step_post_hook(lambda *args: calls.append("mine after"))
    opt.optimizer.register_step_pre_hook(lambda *args: calls.append("its before"))
    handle = opt.optimizer.register_step_post_hook(lambda *args: calls.append("its after"))
    _train(model, opt)
    assert calls == ["mine before", "its before", "mine after", "its after"]
    handle.remove()
    calls.clear()
    _train(model, opt)
    assert calls == ["mine before", "its before", "mine after"]


@pytest.mark.parametrize("aggregator", METHODS)
def test_groups_with_their_own_learning_rates(aggregator: str) -> None:
    model = make("Plain")
    groups = [
        {"params": model.trunk.parameters(), "lr": 0.1},
        {"params": model.heads.parameters(), "lr": 0.001},
    ]
    before = copy.deepcopy(model.state_dict())
    opt = _wrap(SGD(groups, lr=1.0), aggregator, **keywords(aggregator))
    opt.backward(model.losses(model.batch()))
    opt.step()
    for name, p in model.named_parameters():
        lr = 0.1 if name.startswith("trunk") else 0.001
        torch.testing.assert_close(p.detach(), before[name] - lr * p.grad)


@pytest.mark.parametrize("aggregator", METHODS)
def test_add_param_group_in_mid_run(aggregator: str) -> None:
    model = make("Plain")
    sgd = SGD(model.heads.parameters(), lr=0.01)
    opt = _wrap(sgd, aggregator, heads="own", **keywords(aggregator))
    if gradbal.info(aggregator).kind in ("gramian", "jacobian"):
        # With the heads alone nothing is shared yet.
        with pytest.raises(ValueError, match="two or more"):
            opt.backward(model.losses(model.batch()))
    opt.add_param_group({"params": list(model.trunk.parameters()), "lr": 0.5})
    assert opt.optimizer.param_groups[-1]["lr"] == 0.5
    for _ in range(2):
        reference = copy.deepcopy(opt.aggregator)
        rows, values = task_gradients(model, lambda twin: twin.losses(model.batch()))
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        assert_gradients(model, expected(reference, rows, values, "own"), 1e-7)
        opt.step()


@pytest.mark.parametrize("aggregator", [m for m in METHODS if fits(m, "ChangingGraph", None)])
def test_a_frozen_layer_is_unfrozen_in_mid_run(aggregator: str) -> None:
    model = make("Frozen")
    opt = optimizer(model, aggregator)
    for step in range(4):
        model.requires_grad_(step in (1, 2))
        model.heads.requires_grad_(True)
        model.trunk[0].bias.requires_grad_(True)
        reference = copy.deepcopy(opt.aggregator)
        rows, values = task_gradients(model, lambda twin: twin.losses(model.batch()))
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        assert_gradients(model, expected(reference, rows, values, None), 1e-7)
        opt.step()


@pytest.mark.parametrize(
    "make_wrapped",
    [
        lambda p: Adam(p, foreach=True),
        lambda p: Adam(p, fused=True),
        lambda p: AdamW(p, weight_decay=0.1, amsgrad=True),
        lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=False),
        lambda p: RMSprop(p),
    ],
    ids=["foreach", "fused", "AdamW", "SGD", "RMSprop"],
)
@pytest.mark.parametrize("aggregator", ["sum", "uw", "upgrad"])
def test_the_step_is_the_wrapped_optimizers(aggregator: str, make_wrapped) -> None:
    model = make("Plain")
    twin = copy.deepcopy(model)
    opt, bare = _wrap(make_wrapped(model.parameters()), aggregator), make_wrapped(twin.parameters())
    for _ in range(3):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        opt.step()
        bare.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_mean_trains_as_plain_pytorch_does() -> None:
    model = make("Plain")
    twin = copy.deepcopy(model)
    opt, bare = _wrap(Adam(model.parameters()), "mean"), Adam(twin.parameters())
    for _ in range(5):
        _train(model, opt)
        bare.zero_grad()
        torch.stack(twin.losses(twin.batch())).mean().backward()
        bare.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_zero_grad() -> None:
    model, opt = fresh("upgrad")
    opt.backward(model.losses(model.batch()))
    opt.zero_grad(set_to_none=False)
    assert all(not bool(p.grad.any()) for p in model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("aggregator", "heads"), WITH_HEADS)
def test_hooks_on_parameters_run_once_and_act(aggregator: str, heads: str) -> None:
    model = make("Plain")
    twin = copy.deepcopy(model)
    plain = optimizer(twin, aggregator, heads=heads)
    plain.backward(twin.losses(twin.batch()))

    calls: dict[str, list[str]] = {"tensor": [], "accumulated": []}
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: calls["tensor"].append(name) or 3 * g)
        p.register_post_accumulate_grad_hook(lambda p, name=name: calls["accumulated"].append(name))
    opt = optimizer(model, aggregator, heads=heads)
    names = sorted(n for n, _ in model.named_parameters())
    for times in (1, 2):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        assert sorted(calls["tensor"]) == sorted(names * times)
        assert sorted(calls["accumulated"]) == sorted(names * times)
        if times == 1:
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p.grad, 3 * q.grad, rtol=1e-9, atol=1e-12)


def test_hooks_stay_removable() -> None:
    model, opt = fresh("upgrad")
    weight = model.trunk[0].weight
    handle = weight.register_hook(lambda g: 0 * g)
    opt.backward(model.losses(model.batch()))
    assert not bool(weight.grad.any())
    handle.remove()
    opt.backward(model.losses(model.batch()))
    assert bool(weight.grad.any())


def test_hooks_survive_an_error() -> None:
    model, opt = fresh("upgrad")
    weight = model.trunk[0].weight
    calls: list[Tensor] = []
    weight.register_hook(calls.append)
    losses = model.losses(model.batch())
    opt.backward(losses)
    with pytest.raises(RuntimeError, match="second time"):
        opt.backward(losses)
    opt.backward(model.losses(model.batch()))
    assert len(calls) == 2


@pytest.mark.parametrize("aggregator", ["mean", "upgrad"])
def test_clipping_acts_on_the_result(aggregator: str) -> None:
    model, opt = fresh(aggregator)
    opt.backward(model.losses(model.batch()))
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    torch.testing.assert_close(norm, plain.norm())
    clipped = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(clipped, plain * 1e-3 / (norm + 1e-6))


@pytest.mark.parametrize("aggregator", ["mean", "upgrad"])
@pytest.mark.parametrize("heads", ["own", "weighted"])
def test_memory_formats_are_those_of_plain_backward(aggregator: str, heads: str) -> None:
    model = make("ChannelsLast")
    twin = copy.deepcopy(model)
    sum(twin.losses(twin.batch())).backward()
    optimizer(model, aggregator, heads=heads).backward(model.losses(model.batch()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad.stride() == q.grad.stride()


def test_diagnostics_are_plain_numbers() -> None:
    x = nn.Parameter(torch.tensor([0.0, 0.0], dtype=torch.float64))
    opt = _wrap(SGD([x], lr=0.1), "mgda")
    assert opt.diagnostics()["weights"] is None
    opt.backward({"a": 3 * x[0] + 4 * x[1] + 1, "b": -x[0] + 2})
    found = opt.diagnostics()
    assert found["gradient_norms"] == pytest.approx([5.0, 1.0])
    assert found["cosines"][0] == pytest.approx([1.0, -0.6])
    assert found["conflicts"] == 1
    assert found["losses"] == [1.0, 2.0]
    assert found["shared"] == 2
    assert found["steps"] == 1
    assert found["tasks"] == ["a", "b"]
    assert sum(found["weights"]) == pytest.approx(1.0)
    torch.testing.assert_close(opt.gramian, torch.tensor([[25.0, -3.0], [-3.0, 1.0]]).double())
    for outcome in (opt.weights, opt.gramian, opt.losses):
        assert not outcome.requires_grad


def test_what_a_scalarizer_knows() -> None:
    model, opt = fresh("mean")
    opt.backward(model.losses(model.batch()))
    assert opt.gramian is None
    assert opt.diagnostics()["cosines"] is None
    torch.testing.assert_close(opt.weights, torch.full((3,), 1 / 3).double())


@pytest.mark.parametrize("aggregator", METHODS)
def test_backward_inside_autocast(aggregator: str) -> None:
    model, twin = make("Autocast"), make("Autocast")
    opt, other = optimizer(model, aggregator), optimizer(twin, aggregator)
    opt.backward(model.losses(model.batch()))
    with torch.autocast("cpu", torch.bfloat16):
        other.backward(twin.losses(twin.batch()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", [list, torch.stack], ids=["list", "stack"])
@pytest.mark.parametrize(("aggregator", "heads"), WITH_HEADS)
def test_a_common_parameter_left_out_of_shared_params(aggregator: str, heads: str, form) -> None:
    """It gets the sum of what heads get: own gradients, or weighted ones."""
    model = make("Plain")
    rows, _ = task_gradients(model, lambda twin: twin.losses(model.batch()))
    opt = optimizer(model, aggregator, shared_params=[model.trunk[0].weight], heads=heads)
    opt.backward(form(model.losses(model.batch())))
    factors = [1.0] * 3
    if heads == "weighted":
        # Each head tells what its task's gradients were multiplied by.
        parts = [f"heads.{i}.bias" for i in range(3)]
        factors = [float(model.get_parameter(n).grad / rows[i][n]) for i, n in enumerate(parts)]
    want = sum(f * row["trunk.0.bias"] for f, row in zip(factors, rows, strict=True))
    torch.testing.assert_close(model.trunk[0].bias.grad, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("aggregator", METHODS)
def test_losses_without_any_gradient_give_zeros(aggregator: str) -> None:
    model = make("Plain")
    opt = optimizer(model, aggregator)
    level = 0.0 if accepts(aggregator, 0.0, 0.0) and not opt.aggregator.logarithmic else 1.0
    opt.backward([l * 0 + level for l in model.losses(model.batch())])
    assert all(not bool(p.grad.any()) for p in model.parameters())
    assert opt.weights is None or bool(opt.weights.isfinite().all())


@pytest.mark.parametrize("aggregator", METHODS)
def test_one_loss_twice_and_gradients_disabled(aggregator: str) -> None:
    model = make("Plain")
    opt = optimizer(model, aggregator)
    a, b, _ = model.losses(model.batch())
    reference = copy.deepcopy(opt.aggregator)
    rows, values = task_gradients(
        model, lambda twin: [twin.losses(twin.batch())[k] for k in (0, 1, 0)]
    )
    with torch.no_grad():
        opt.backward([a, b, a])
    assert_gradients(model, expected(reference, rows, values, None), 1e-6)


def test_parameters_that_are_empty_or_transposed() -> None:
    empty = nn.Parameter(torch.zeros(0))
    turned = nn.Parameter(torch.randn(4, 6).t())
    twin = nn.Parameter(turned.detach().clone(memory_format=torch.preserve_format))
    opt = _wrap(SGD([empty, turned], lr=0.1), "sum", heads="own")
    opt.backward([turned.square().sum() + empty.sum(), turned.sum().square() + empty.sum()])
    (twin.square().sum() + twin.sum().square()).backward()
    torch.testing.assert_close(turned.grad, twin.grad)
    assert turned.grad.stride() == twin.grad.stride()
    assert empty.grad.shape == (0,)


def test_a_step_without_shared_parameters_does_no_harm() -> None:
    model = make("Plain")
    twin = copy.deepcopy(model)
    opt, other = optimizer(model, "upgrad"), optimizer(twin, "upgrad")
    for o, m in ((opt, model), (other, twin)):
        o.backward(m.losses(m.batch()))
        o.zero_grad()
    features = torch.ones(1, 5).double()
    with pytest.raises(ValueError, match="two or more losses"):
        opt.backward([head(features).sum() for head in model.heads])
    for o, m in ((opt, model), (other, twin)):
        o.backward(m.losses(m.batch()))
    assert_same(snapshot(model, opt), snapshot(twin, other))


def test_learnable_weights_stay_the_optimizers_after_loading() -> None:
    model, opt = fresh("uw")
    other_model, other = fresh("uw")
    _train(other_model, other, 2)
    opt.load_state_dict(other.state_dict())
    assert opt.param_groups[-1]["params"][0] is opt.aggregator.learned
    before = opt.aggregator.learned.detach().clone()
    _train(model, opt)
    assert not torch.equal(opt.aggregator.learned, before)


def test_calls_that_a_method_has_no_use_for_change_nothing() -> None:
    model, opt = fresh("uw")
    _train(model, opt)
    before = snapshot(model, opt)
    opt.update(model.losses(model.batch()))
    opt.update(dict(zip("abc", model.losses(model.batch()), strict=True)))
    opt.update(torch.ones(3))
    opt.end_epoch()
    assert_same(snapshot(model, opt), before)


@pytest.mark.parametrize(("aggregator", "heads"), WITH_HEADS)
def test_no_two_gradients_share_memory(aggregator: str, heads: str) -> None:
    """Autograd hands out one tensor for both terms of a sum."""
    model = make("Plain")
    a, b = (nn.Parameter(torch.ones(6, 1).double()) for _ in range(2))
    parameters = [*model.parameters(), a, b]
    opt = _wrap(SGD(parameters, lr=0.1), aggregator, heads=heads, **keywords(aggregator))
    losses = model.losses(model.batch())
    opt.backward([losses[0] + (a + b).square().mean(), *losses[1:]])
    spans = [(p.grad.data_ptr(), p.grad.data_ptr() + p.grad.nbytes) for p in parameters]
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
