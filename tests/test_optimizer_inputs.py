"""What is refused, with which words, and that nothing has changed then."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import gradbal
from gradbal import MultiTaskOptimizer, NonFiniteError
from tests.states import assert_same, fresh, root_at_zero, snapshot, trained
from tests.zoo import METHODS, make, optimizer, takes

SCALARIZERS = [name for name in METHODS if gradbal.info(name).kind == "scalarizer"]
GRAMIAN = [name for name in METHODS if gradbal.info(name).kind == "gramian"]


NAN, INF = float("nan"), float("inf")
BAD_LOSSES: dict[str, tuple[type[Exception], str, Any]] = {
    "empty list": (ValueError, "at least one", lambda l: []),
    "empty dict": (ValueError, "at least one", lambda l: {}),
    "empty tensor": (ValueError, "at least one", lambda l: torch.stack(l)[:0]),
    "0-dim tensor": (ValueError, "1-D", lambda l: sum(l)),
    "2-D tensor": (ValueError, "1-D", lambda l: torch.stack(l)[None]),
    "one loss not scalar": (
        ValueError,
        r"task 1 must be a scalar.*\[1\]",
        lambda l: [l[0], l[1][None], l[2]],
    ),
    "one loss without graph": (
        ValueError,
        "task 1 must have a graph",
        lambda l: [l[0], l[1].detach(), l[2]],
    ),
    "stack without graph": (ValueError, "graph", lambda l: torch.stack(l).detach()),
    "stack with a piece without graph": (
        ValueError,
        "task 1 must have a graph",
        lambda l: torch.stack([l[0], l[1].detach(), l[2]]),
    ),
    "integer loss": (
        TypeError,
        "task 2 must be floating-point.*int64",
        lambda l: [l[0], l[1], torch.tensor(3)],
    ),
    "integer tensor": (TypeError, "floating-point.*int64", lambda l: torch.tensor([1, 2, 3])),
    "complex loss": (
        TypeError,
        "task 0 must be floating-point.*complex",
        lambda l: [l[0] + 1j, l[1], l[2]],
    ),
    "a float": (TypeError, "task 0 must be a tensor.*float", lambda l: [0.5, l[1], l[2]]),
    "a generator": (TypeError, "list, tuple or dict", lambda l: (x for x in l)),
    "a set": (TypeError, "list, tuple or dict", set),
    "None": (TypeError, "list, tuple or dict", lambda l: None),
    "a string": (TypeError, "list, tuple or dict", lambda l: "losses"),
    "two devices": (
        ValueError,
        "one device, found cpu, meta",
        lambda l: [l[0], l[1], torch.ones((), device="meta", requires_grad=True) * 2],
    ),
    "tuple as a key": (
        TypeError,
        "keys of losses must be strings or integers",
        lambda l: {("a", 0): l[0], "b": l[1], "c": l[2]},
    ),
}
OTHER_TASKS: dict[str, tuple[str, Any]] = {
    "fewer": ("number of losses must stay 3.*found 2", lambda l: l[:2]),
    "more": ("number of losses must stay 3.*found 4", lambda l: [*l, l[0] * 2]),
    "a dict": ("tasks must stay 0, 1, 2", lambda l: dict(zip("abc", l, strict=True))),
    "fewer in a stack": ("number of losses must stay 3", lambda l: torch.stack(l[:2])),
}


@pytest.mark.parametrize("make_one", [fresh, trained])
@pytest.mark.parametrize("aggregator", ["uw", "upgrad"])
@pytest.mark.parametrize("bad", BAD_LOSSES)
def test_bad_losses_change_nothing(bad: str, aggregator: str, make_one) -> None:
    error, words, spoil = BAD_LOSSES[bad]
    model, opt = make_one(aggregator)
    before = snapshot(model, opt)
    with pytest.raises(error, match=words):
        opt.backward(spoil(model.losses(model.batch())))
    assert_same(snapshot(model, opt), before)


@pytest.mark.parametrize("aggregator", METHODS)
@pytest.mark.parametrize("other", OTHER_TASKS)
def test_other_tasks_than_before_change_nothing(other: str, aggregator: str) -> None:
    words, change = OTHER_TASKS[other]
    model, opt = trained(aggregator)
    before = snapshot(model, opt)
    with pytest.raises(ValueError, match=words):
        opt.backward(change(model.losses(model.batch())))
    assert_same(snapshot(model, opt), before)


def test_other_keys_than_before_change_nothing() -> None:
    model = make("Plain")
    opt = optimizer(model, "upgrad")

    def named(names: str) -> dict[str, Tensor]:
        return dict(zip(names, model.losses(model.batch()), strict=True))

    opt.backward(named("abc"))
    before = snapshot(model, opt)
    for keys, words in (("abd", "must stay 'a', 'b', 'c', found 'a', 'b', 'd'"),):
        with pytest.raises(ValueError, match=words):
            opt.backward(named(keys))
    with pytest.raises(ValueError, match="'a', 'b', 'c'"):
        opt.backward(model.losses(model.batch()))
    assert_same(snapshot(model, opt), before)


@pytest.mark.parametrize("make_one", [fresh, trained])
@pytest.mark.parametrize("aggregator", METHODS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_names_the_tasks(aggregator: str, value: float, make_one) -> None:
    model, opt = make_one(aggregator)
    before = snapshot(model, opt)
    losses = model.losses(model.batch())
    with pytest.raises(NonFiniteError, match=r"losses must be finite.*task 0, 2") as caught:
        opt.backward([losses[0] * value, losses[1], losses[2] * value])
    assert caught.value.tasks == [0, 2]
    assert_same(snapshot(model, opt), before)
    opt.backward(model.losses(model.batch()))


def test_the_tasks_of_a_dict_are_named() -> None:
    model, opt = fresh("upgrad")
    losses = dict(zip("abc", model.losses(model.batch()), strict=True))
    losses["b"] = losses["b"] * NAN
    with pytest.raises(NonFiniteError, match="'b'") as caught:
        opt.backward(losses)
    assert caught.value.tasks == ["b"]


@pytest.mark.parametrize("make_one", [fresh, trained])
@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("where", ["trunk", "head"])
@pytest.mark.parametrize("aggregator", GRAMIAN)
def test_a_gradient_that_is_not_finite_names_the_task(
    aggregator: str, where: str, heads: str, make_one
) -> None:
    model, opt = make_one(aggregator, heads=heads)
    before = snapshot(model, opt)
    losses = model.losses(model.batch())
    spoiled = model.trunk[0].weight if where == "trunk" else model.heads[1].weight
    losses[1] = losses[1] + root_at_zero(spoiled)
    with pytest.raises(NonFiniteError, match=r"gradients must be finite.*task 1;") as caught:
        opt.backward(losses)
    assert caught.value.tasks == [1]
    assert_same(snapshot(model, opt), before)
    opt.backward(model.losses(model.batch()))


def test_a_new_number_of_tasks_is_taken_after_a_failed_first_step() -> None:
    model, opt = fresh("uw")
    losses = model.losses(model.batch())
    with pytest.raises(NonFiniteError):
        opt.backward([losses[0] * NAN, losses[1]])
    opt.backward(losses)
    assert len(opt.weights) == 3


@pytest.mark.parametrize("aggregator", [m for m in METHODS if takes(m, loss_transform="log")])
def test_the_log_of_a_loss_needs_positive_losses(aggregator: str) -> None:
    for value in (0.0, -1.0):
        model, opt = fresh(aggregator, loss_transform="log")
        before = snapshot(model, opt)
        losses = dict(zip("abc", model.losses(model.batch()), strict=True))
        losses["b"] = losses["b"] * value
        with pytest.raises(ValueError, match=r"positive losses.*task 'b'"):
            opt.backward(losses)
        assert_same(snapshot(model, opt), before)


@pytest.mark.parametrize("aggregator", GRAMIAN)
def test_losses_must_share_a_parameter(aggregator: str) -> None:
    heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(2))
    opt = optimizer(heads, aggregator)
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="two or more losses"):
        opt.backward([head(x).square().mean() for head in heads])
    assert all(p.grad is None for p in heads.parameters())


@pytest.mark.parametrize("aggregator", GRAMIAN)
def test_shared_params_that_no_loss_reaches(aggregator: str) -> None:
    model = make("Unused")
    opt = optimizer(model, aggregator, shared_params=model.unused.parameters())
    with pytest.raises(ValueError, match="shared_params"):
        opt.backward(model.losses(model.batch()))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("aggregator", METHODS)
def test_a_model_that_is_all_frozen(aggregator: str) -> None:
    model, opt = fresh(aggregator)
    losses = model.losses(model.batch())
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="at least one parameter must require grad"):
        opt.backward(losses)


@pytest.mark.parametrize("aggregator", METHODS)
def test_step_before_backward_is_the_wrapped_optimizers(aggregator: str) -> None:
    model = make("Plain")
    before = [p.detach().clone() for p in model.parameters()]
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.5), aggregator)
    assert opt.step() is None
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)
        p.grad = torch.ones_like(p)
    opt.step()
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5)
