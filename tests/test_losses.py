"""The forms in which losses come, and how often each head is walked."""

import copy
from collections import namedtuple
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import METHODS, make, optimizer, targets

Three = namedtuple("Three", ["a", "b", "c"])


def _gradients(aggregator: str, form, steps: int = 1, **options: object) -> list[Tensor]:
    model = make("Plain")
    opt = optimizer(model, aggregator, **options)
    for _ in range(steps):
        opt.backward(form(model.losses(model.batch())))
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("aggregator", METHODS)
@pytest.mark.parametrize(
    "form",
    [tuple, torch.stack, lambda l: Three(*l), lambda l: dict(zip("abc", l, strict=True))],
    ids=["tuple", "stack", "namedtuple", "dict"],
)
def test_every_form_gives_the_gradients_of_the_list(aggregator: str, form) -> None:
    torch.testing.assert_close(
        _gradients(aggregator, form), _gradients(aggregator, list), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("aggregator", METHODS)
def test_a_dict_may_change_its_order(aggregator: str) -> None:
    order = iter(["abc", "cab", "bca"])

    def form(losses: list[Tensor]) -> dict[str, Tensor]:
        named = dict(zip("abc", losses, strict=True))
        return {key: named[key] for key in next(order)}

    turned = _gradients(aggregator, form, steps=3)
    torch.testing.assert_close(
        turned, _gradients(aggregator, list, steps=3), rtol=1e-12, atol=1e-14
    )


def test_weights_and_losses_stay_in_the_first_order() -> None:
    model = make("Plain")
    opt = optimizer(model, "mgda")
    losses = model.losses(model.batch())
    opt.backward(dict(zip("abc", losses, strict=True)), retain_graph=True)
    first = opt.weights.clone()
    opt.backward({"c": losses[2], "a": losses[0], "b": losses[1]})
    torch.testing.assert_close(opt.weights, first)
    torch.testing.assert_close(opt.losses, torch.stack(losses).detach())
    assert opt.diagnostics()["tasks"] == ["a", "b", "c"]


def test_integer_keys_are_tasks_too() -> None:
    model = make("Plain")
    opt = optimizer(model, "upgrad")
    opt.backward(dict(zip((7, 3, 5), model.losses(model.batch()), strict=True)))
    assert opt.diagnostics()["tasks"] == [7, 3, 5]


@pytest.mark.parametrize("aggregator", METHODS)
@pytest.mark.parametrize("form", [list, torch.stack, torch.cat], ids=["list", "stack", "vector"])
def test_one_task(aggregator: str, form) -> None:
    layer = nn.Linear(3, 1).double()
    loss = layer(torch.ones(2, 3).double()).square().mean()
    (g,) = torch.autograd.grad(loss, [layer.weight], retain_graph=True)
    opt = optimizer(layer, aggregator)
    opt.backward(form([loss.reshape(1) if form is torch.cat else loss]))
    got = layer.weight.grad
    # Whatever the method's gain, the direction is the gradient's.
    torch.testing.assert_close(got / got.norm(), g / g.norm())


class _Counted(torch.autograd.Function):
    """The identity; `passes[key]` counts the backward passes through it."""

    passes: ClassVar[dict[object, int]] = {}

    @staticmethod
    def forward(ctx, x: Tensor, key: object) -> Tensor:
        ctx.key = key
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        _Counted.passes[ctx.key] = _Counted.passes.get(ctx.key, 0) + 1
        return grad, None


def _count_passes(aggregator: str, form, **options: object) -> dict[object, int]:
    model = make("Plain")
    opt = optimizer(model, aggregator, **options)
    _Counted.passes.clear()
    z = _Counted.apply(model.trunk(model.batch()), "trunk")
    outputs = [_Counted.apply(head(z), i) for i, head in enumerate(model.heads)]
    opt.backward(form(targets(outputs)))
    return dict(_Counted.passes)


@pytest.mark.parametrize("form", [list, torch.stack], ids=["list", "stack"])
@pytest.mark.parametrize("heads", ["own", "weighted"])
def test_a_gradient_method_walks_each_head_once(form, heads: str) -> None:
    counts = _count_passes("upgrad", form, heads=heads)
    assert counts == {"trunk": 3, 0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize("form", [list, torch.stack], ids=["list", "stack"])
@pytest.mark.parametrize("aggregator", ["mean", "sum", "rlw", "uw"])
def test_a_scalarizer_makes_one_pass(aggregator: str, form) -> None:
    assert _count_passes(aggregator, form) == {"trunk": 1, 0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize("aggregator", METHODS)
def test_stack_of_several_dtypes(aggregator: str) -> None:
    def mixed(losses: list[Tensor]) -> list[Tensor]:
        return [losses[0].float(), losses[1], losses[2].float()]

    stacked = _gradients(aggregator, lambda l: torch.stack(mixed(l)))
    torch.testing.assert_close(
        stacked, _gradients(aggregator, lambda l: mixed(l)), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("aggregator", METHODS)
def test_a_vector_that_is_no_stack(aggregator: str) -> None:
    """Every loss reaches the whole layer, so that nothing tells slices of it apart."""
    layer = nn.Linear(4, 3).double()
    batch = torch.randn(6, 4).double()
    wanted = torch.tensor([1.0, -2.0, 4.0]).double()
    twin = copy.deepcopy(layer)
    one = optimizer(layer, aggregator)
    one.backward((layer(batch) - wanted).square().mean(0))
    two = optimizer(twin, aggregator)
    two.backward([(twin(batch)[:, i] - wanted[i]).square().mean() for i in range(3)])
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one.losses, two.losses)


@pytest.mark.parametrize("aggregator", ["mean", "upgrad"])
def test_retain_graph_allows_a_second_pass(aggregator: str) -> None:
    model = make("Plain")
    opt = optimizer(model, aggregator)
    losses = model.losses(model.batch())
    opt.backward(losses, retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    opt.zero_grad()
    opt.backward(losses)
    torch.testing.assert_close([p.grad for p in model.parameters()], first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        opt.backward(losses)


@pytest.mark.parametrize("aggregator", METHODS)
def test_half_precision_losses_are_weighed_in_float32(aggregator: str) -> None:
    layer = nn.Linear(4, 2)
    opt = optimizer(layer, aggregator)
    y = layer(torch.randn(8, 4))
    opt.backward([y[:, 0].square().mean().bfloat16(), (y[:, 1] - y[:, 0]).square().mean().half()])
    assert opt.losses.dtype == torch.float32
    assert layer.weight.grad.dtype == torch.float32
    assert bool(layer.weight.grad.isfinite().all())
