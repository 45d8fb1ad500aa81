"""Checkpoints, copies and pickles continue the run bit for bit."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from gradbal import MultiTaskOptimizer
from gradbal._checkpoint import decode, encode
from tests.states import assert_same, fresh, snapshot
from tests.zoo import METHODS, make, takes


def _run(model: nn.Module, opt: MultiTaskOptimizer, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        opt.step()


def _through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


OPTIONS = [{}, {"update_every": 3}, {"nonfinite": "skip"}]


@pytest.mark.parametrize(
    ("aggregator", "options"), [(m, o) for m in METHODS for o in OPTIONS if takes(m, **o)], ids=str
)
def test_a_checkpoint_continues_bit_for_bit(aggregator: str, options: dict[str, Any]) -> None:
    model, opt = fresh(aggregator, **options)
    _run(model, opt, 4)
    checkpoint = _through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    torch.manual_seed(99)
    twin, other = fresh(aggregator, **options)
    twin.load_state_dict(checkpoint["model"])
    other.load_state_dict(checkpoint["opt"])
    _run(model, opt, 4)
    torch.randn(7)
    _run(twin, other, 4)
    assert_same(snapshot(twin, other), snapshot(model, opt))
    assert_same(other.state_dict(), opt.state_dict())


@pytest.mark.parametrize("aggregator", METHODS)
def test_a_checkpoint_before_the_first_step(aggregator: str) -> None:
    model, opt = fresh(aggregator)
    checkpoint = _through_a_file(opt.state_dict())
    torch.manual_seed(99)
    twin, other = fresh(aggregator)
    other.load_state_dict(checkpoint)
    _run(model, opt, 2)
    _run(twin, other, 2)
    assert_same(snapshot(twin, other), snapshot(model, opt))


@pytest.mark.parametrize("aggregator", METHODS)
def test_loading_goes_back_in_time(aggregator: str) -> None:
    model, opt = fresh(aggregator)
    _run(model, opt, 2)
    weights, state = copy.deepcopy(model.state_dict()), _through_a_file(opt.state_dict())
    _run(model, opt, 3)
    want = snapshot(model, opt)
    model.load_state_dict(weights)
    opt.load_state_dict(state)
    _run(model, opt, 3)
    assert_same(snapshot(model, opt), want)


def test_hyperparameters_and_counts_are_restored() -> None:
    model, opt = fresh("cagrad", c=0.2, nonfinite="skip")
    _run(model, opt, 2)
    losses = model.losses(model.batch())
    opt.backward([losses[0] * float("nan"), *losses[1:]])
    _, other = fresh("cagrad", c=0.7)
    other.load_state_dict(_through_a_file(opt.state_dict()))
    assert other.aggregator.c == 0.2
    diagnostics = other.diagnostics()
    assert (diagnostics["steps"], diagnostics["skipped"]) == (2, 1)
    assert diagnostics["tasks"] == [0, 1, 2]


def _of_another_method() -> MultiTaskOptimizer:
    model, opt = fresh("mgda")
    _run(model, opt, 1)
    return opt


def _of_other_tasks() -> MultiTaskOptimizer:
    model, opt = fresh("uw")
    opt.backward(model.losses(model.batch())[:2])
    opt.step()
    return opt


def _of_named_tasks() -> MultiTaskOptimizer:
    model, opt = fresh("uw")
    opt.backward(dict(zip("abc", model.losses(model.batch()), strict=True)))
    opt.step()
    return opt


def _of_another_size() -> MultiTaskOptimizer:
    model = make("Plain")
    opt = MultiTaskOptimizer(Adam(model.trunk.parameters()), "uw")
    _run(model, opt, 1)
    return opt


def _of_more_groups() -> MultiTaskOptimizer:
    model = make("Plain")
    groups = [{"params": model.trunk.parameters()}, {"params": model.heads.parameters()}]
    opt = MultiTaskOptimizer(Adam(groups), "uw")
    _run(model, opt, 1)
    return opt


REFUSED = {
    "another method": (_of_another_method, "'uw' is required, found one of 'mgda'"),
    "other tasks": (_of_other_tasks, r"\[0, 1, 2\], found \[0, 1\]"),
    "named tasks": (_of_named_tasks, r"\[0, 1, 2\], found \['a', 'b', 'c'\]"),
    "another size": (_of_another_size, "group"),
    "more groups": (_of_more_groups, "group"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_that_does_not_fit_changes_nothing(name: str) -> None:
    make_other, words = REFUSED[name]
    state = _through_a_file(make_other().state_dict())
    model, opt = fresh("uw")
    _run(model, opt, 2)
    before = snapshot(model, opt)
    with pytest.raises(ValueError, match=words):
        opt.load_state_dict(state)
    assert_same(snapshot(model, opt), before)
    _run(model, opt, 1)


def test_a_checkpoint_of_another_format_is_refused() -> None:
    _, opt = fresh("upgrad")
    state = opt.state_dict()
    entry = decode(state["param_groups"][0]["gradbal"])
    state["param_groups"][0]["gradbal"] = encode({**entry, "format": 999})
    with pytest.raises(ValueError, match=r"format.*999"):
        opt.load_state_dict(state)


@pytest.mark.parametrize("aggregator", METHODS)
def test_a_bare_optimizers_checkpoint_loads(aggregator: str) -> None:
    bare_model = make("Plain")
    bare = Adam(bare_model.parameters(), lr=0.5)
    for _ in range(3):
        bare.zero_grad()
        sum(bare_model.losses(bare_model.batch())).backward()
        bare.step()
    model, opt = fresh(aggregator)
    model.load_state_dict(bare_model.state_dict())
    opt.load_state_dict(_through_a_file(bare.state_dict()))
    first = next(model.parameters())
    assert opt.param_groups[0]["lr"] == 0.5
    assert_same(opt.state[first]["exp_avg"], bare.state[next(bare_model.parameters())]["exp_avg"])
    _run(model, opt, 2)


@pytest.mark.parametrize("aggregator", METHODS)
def test_a_checkpoint_loads_into_the_bare_optimizer(aggregator: str) -> None:
    model, opt = fresh(aggregator)
    _run(model, opt, 2)
    twin = make("Plain")
    bare = Adam(twin.parameters())
    bare.load_state_dict(_through_a_file(opt.state_dict()))
    assert bare.param_groups[0]["lr"] == 0.01
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same(bare.state[q], opt.state[p])
    # And back, with what the method had by then.
    sum(twin.losses(twin.batch())).backward()
    bare.step()
    _, other = fresh(aggregator)
    other.load_state_dict(_through_a_file(bare.state_dict()))
    assert_same(other.aggregator.state_dict(), opt.aggregator.state_dict())


@pytest.mark.parametrize("aggregator", ["upgrad", "pcgrad"])
def test_the_checkpoint_is_the_wrapped_ones_with_one_more_entry(aggregator: str) -> None:
    model, opt = fresh(aggregator)
    _run(model, opt, 1)
    state = opt.state_dict()
    assert state["param_groups"][0].pop("gradbal")
    assert_same(state, opt.optimizer.state_dict())


def _copies(how: str, model: nn.Module, opt: MultiTaskOptimizer) -> Any:
    if how == "deepcopy":
        return copy.deepcopy((model, opt))
    return pickle.loads(pickle.dumps((model, opt)))


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("aggregator", METHODS)
def test_copies_continue_identically(aggregator: str, how: str, steps: int) -> None:
    model, opt = fresh(aggregator)
    _run(model, opt, steps)
    twin, other = _copies(how, model, opt)
    before = snapshot(model, opt)
    _run(twin, other, 3)
    assert_same(snapshot(model, opt), before)
    _run(model, opt, 3)
    assert_same(snapshot(twin, other), snapshot(model, opt))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("aggregator", ["mean", "uw", "upgrad"])
def test_copies_keep_pending_gradients(aggregator: str, heads: str, how: str) -> None:
    model, opt = fresh(aggregator, heads=heads)
    _run(model, opt, 1)
    opt.zero_grad()
    opt.backward(model.losses(model.batch()[:3]), accumulate=True)
    twin, other = _copies(how, model, opt)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # Copies of parameters come without `.grad`, in plain PyTorch too.
        q.grad = copy.deepcopy(p.grad)
    for m, o in ((model, opt), (twin, other)):
        o.backward(m.losses(m.batch()[3:]))
        o.step()
    assert_same(snapshot(twin, other), snapshot(model, opt))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_with_a_scheduler(how: str) -> None:
    model, opt = fresh("upgrad")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    _run(model, opt, 1)
    scheduler.step()
    twin, other = _copies(how, model, opt)
    assert other.param_groups[0]["lr"] == 0.005
    _run(twin, other, 1)
    _run(model, opt, 1)
    assert_same(snapshot(twin, other), snapshot(model, opt))


@pytest.mark.parametrize("wrapped", [SGD, AdamW])
def test_state_dict_hooks_of_the_wrapped_optimizer_run(wrapped: type) -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(wrapped(model.parameters(), lr=0.1), "upgrad")
    calls: list[str] = []
    opt.register_state_dict_post_hook(lambda o, state: calls.append("saved"))
    opt.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    opt.load_state_dict(opt.state_dict())
    assert calls == ["saved", "loaded"]


@pytest.mark.parametrize("aggregator", METHODS)
def test_the_global_random_state_is_left_alone(aggregator: str) -> None:
    model, opt = fresh(aggregator)
    losses = model.losses(model.batch())
    before = torch.get_rng_state()
    opt.backward(losses)
    opt.step()
    assert torch.equal(torch.get_rng_state(), before)
