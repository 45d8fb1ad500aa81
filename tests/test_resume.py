"""A run that is cut at any point and goes on from its checkpoint is the same bit for bit."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

import gradbal
from benchmarks.accelerator import Accelerator
from gradbal import MultiTaskOptimizer, NonFiniteError
from gradbal.aggregators.base import BilevelAggregator
from tests.drive import DRIVERS, Call, Driver, driver
from tests.states import assert_same, entry, snapshot
from tests.zoo import make, takes

STEPS = 4
Cut = tuple[nn.Module, MultiTaskOptimizer]


def everything(model: nn.Module, opt: MultiTaskOptimizer) -> dict[str, Any]:
    """What the run has come to; gradients that a step has used are not in a checkpoint."""
    opt.zero_grad()
    seen = opt.diagnostics()
    # Known again from the next Jacobian on.
    del seen["shared"]
    return snapshot(model, opt) | {"checkpoint": opt.state_dict(), "seen": seen}


def through_a_file(model: nn.Module, opt: MultiTaskOptimizer) -> bytes:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    return file.getvalue()


def restored(driver: Driver, file: bytes) -> Cut:
    state = torch.load(io.BytesIO(file), weights_only=True)
    # The fresh instance draws other numbers, until the state is there.
    torch.manual_seed(99)
    model, opt = driver.fresh()
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["opt"])
    return model, opt


def copied(driver: Driver, pair: Cut) -> Cut:
    return copy.deepcopy(pair)


def saved_whole(driver: Driver, pair: Cut) -> Cut:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def checkpointed(driver: Driver, pair: Cut) -> Cut:
    return restored(driver, through_a_file(*pair))


def check_cuts(driver: Driver, way: Callable[[Driver, Cut], Cut], steps: range) -> None:
    """Cuts a run before every call of some steps."""
    calls = list(driver.calls(range(STEPS)))
    model, opt = driver.fresh()
    driver.run(model, opt, calls)
    want = everything(model, opt)
    model, opt = driver.fresh()
    n_cuts = 0
    for k, call in enumerate(calls):
        if call.step in steps:
            twin, other = way(driver, (model, opt))
            driver.run(twin, other, calls[k:])
            assert_same(everything(twin, other), want)
            n_cuts += 1
        driver.make(model, opt, call)
    assert_same(everything(model, opt), want)
    assert n_cuts >= len(steps)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("name", DRIVERS)
def test_a_checkpoint_before_any_call(name: str, gather: bool) -> None:
    steps = range(STEPS) if gather else range(2, 3)
    check_cuts(driver(name, gather=gather), checkpointed, steps)


@pytest.mark.parametrize("way", [copied, saved_whole])
@pytest.mark.parametrize("name", DRIVERS)
def test_a_copy_before_any_call(name: str, way: Callable[[Driver, Cut], Cut]) -> None:
    check_cuts(driver(name, gather=True), way, range(2, 3))


def uses_again(name: str) -> bool:
    """Whether a method may compute weights at every third step only."""
    method, keywords = DRIVERS[name]
    bilevel = isinstance(gradbal.create(method), BilevelAggregator)
    # Weights of column groups are known to be of groups only with the parameters.
    return takes(method, update_every=3) and not bilevel and "groups" not in keywords


@pytest.mark.parametrize("name", [n for n in DRIVERS if uses_again(n)])
def test_a_checkpoint_where_weights_are_used_again(name: str) -> None:
    trained = driver(name, gather=True, options={"update_every": 3})
    check_cuts(trained, checkpointed, range(2, 3))


SKIPPED = {
    "a micro-batch": frozenset([Call(1, "gather"), Call(2, "gather")]),
    "the last micro-batch": frozenset([Call(1, "backward"), Call(3, "backward")]),
}


@pytest.mark.parametrize("nonfinite", ["skip", "drop"])
@pytest.mark.parametrize("what", SKIPPED)
@pytest.mark.parametrize("name", ["mean", "uw", "dwa", "upgrad", "moco", "m_config", "imtl"])
def test_a_checkpoint_with_steps_left_out(name: str, what: str, nonfinite: str) -> None:
    options = {"nonfinite": nonfinite}
    trained = driver(name, gather=True, options=options, spoiled=SKIPPED[what])
    check_cuts(trained, checkpointed, range(STEPS))


@pytest.mark.parametrize("name", ["famo", "modo", "moml", "marigold", "mgda_ub"])
def test_a_checkpoint_with_steps_left_out_in_other_ways(name: str) -> None:
    spoiled = frozenset([Call(1, "backward"), Call(1, "step")])
    trained = driver(name, options={"nonfinite": "skip"}, spoiled=spoiled)
    if name == "famo":
        # A step that was left out has no losses after it.
        calls = [c for c in trained.calls(range(STEPS)) if c != Call(1, "update")]
        trained.calls = lambda steps: iter(c for c in calls if c.step in steps)
    check_cuts(trained, checkpointed, range(STEPS))


def fails(*args: Any) -> None:
    raise RuntimeError("no room")


def in_a_hook_before(opt: MultiTaskOptimizer) -> None:
    opt.register_load_state_dict_pre_hook(fails)


def in_a_hook_after(opt: MultiTaskOptimizer) -> None:
    opt.register_load_state_dict_post_hook(fails)


def in_the_wrapped_optimizer(opt: MultiTaskOptimizer) -> None:
    class Broken(Adam):
        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state)
            fails()

    opt.optimizer.__class__ = Broken


@pytest.mark.parametrize("where", [in_a_hook_before, in_a_hook_after, in_the_wrapped_optimizer])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("name", ["uw", "imtl", "rlw", "moco", "famo", "cr_mogm(inner=pcgrad)"])
def test_a_load_that_fails_half_way_changes_nothing(
    name: str, bare: bool, where: Callable[[MultiTaskOptimizer], None]
) -> None:
    method = driver(name, gather=True)
    model, opt = method.fresh()
    method.run(model, opt, range(3))
    state = opt.state_dict()
    if bare:
        del state["param_groups"][0]["gradbal"]
    # In mid-accumulation: there are gradients to lose.
    method.run(model, opt, [c for c in method.calls(range(3, 4)) if c.what != "backward"][:2])
    twin, other = copied(method, (model, opt))
    where(opt)
    held = opt.param_groups, opt.state, opt.aggregator.parameters()
    before = snapshot(model, opt) | opt.state_dict()
    with pytest.raises(RuntimeError, match="no room"):
        opt.load_state_dict(state)
    assert_same(snapshot(model, opt) | opt.state_dict(), before)
    assert opt.param_groups is held[0]
    assert opt.state is held[1]
    assert all(p is q for p, q in zip(opt.aggregator.parameters(), held[2], strict=True))
    for pair in ((model, opt), (twin, other)):
        method.run(*pair, list(method.calls(range(3, 5)))[2:])
    assert_same(everything(model, opt), everything(twin, other))


def other_shapes() -> MultiTaskOptimizer:
    model = make("Plain")
    model.heads[1] = nn.Linear(6, 1)
    return MultiTaskOptimizer(Adam(model.parameters()), "upgrad")


def other_losses() -> MultiTaskOptimizer:
    return driver("upgrad", options={"loss_transform": "log"}).fresh()[1]


def another_method_inside() -> MultiTaskOptimizer:
    return driver("cr_mogm(inner=pcgrad)").fresh()[1]


def fewer_parameters() -> MultiTaskOptimizer:
    return MultiTaskOptimizer(Adam(make("Plain").trunk.parameters()), "upgrad")


REFUSED = {
    "shapes": (other_shapes, r"shape \[1, 5\] for parameter 4 of param group 0, found \[1, 6\]"),
    "losses": (other_losses, r"loss_transform=None, found 'log'"),
    "parameters": (fewer_parameters, r"param groups of \[8\] parameters, found \[2\]"),
    "inner": (another_method_inside, r"'mgda' is required, found one of 'pcgrad'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_difference_is_named(name: str) -> None:
    make_other, words = REFUSED[name]
    method = driver("cr_mogm" if name == "inner" else "upgrad", gather=True)
    model, opt = method.fresh()
    method.run(model, opt, list(method.calls(range(2)))[:-1])
    before = snapshot(model, opt) | opt.state_dict()
    with pytest.raises(ValueError, match=words):
        opt.load_state_dict(make_other().state_dict())
    assert_same(snapshot(model, opt) | opt.state_dict(), before)


@pytest.mark.parametrize("name", DRIVERS)
def test_a_checkpoint_is_plain_and_small(name: str) -> None:
    method = driver(name, gather=True)
    model, opt = method.fresh()
    method.run(model, opt, range(3))
    assert all(is_plain(v) for v in (opt.state_dict(), opt.aggregator.state_dict()))
    # Gradients that a step has used are not kept; what a method has for each of them is its own.
    assert entry(opt)["grads"] is None
    assert entry(opt)["balancer"]["rows"] is None


def is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(is_plain(v) for pair in value.items() for v in pair)
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (Tensor, bool, int, float, str)


def test_numpys_numbers_become_plain_ones() -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(Adam(model.parameters()), "cagrad", c=np.float64(0.25))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    _, other = driver("cagrad").fresh()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert type(other.aggregator.c) is float
    assert other.aggregator.c == 0.25


# On another device.


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    # Nothing is drawn there, and there is no driver that could be asked.
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.empty(0))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    with Accelerator() as entered:
        yield entered


def of_host(value: Any) -> Any:
    """The same with tensors on the host."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {k: of_host(v) for k, v in value.items()}
    return [of_host(v) for v in value] if isinstance(value, list | tuple) else value


def there(device: Accelerator, name: str, **more: Any) -> Driver:
    """A method whose model and batches are on the device."""

    class There(Driver):
        def model(self) -> nn.Module:
            return device.put(super().model())

    method, keywords = DRIVERS[name]
    return There(method, keywords, place=device.put, **more)


def cuts(method: Driver, *before: str) -> tuple[dict[int, bytes], dict[str, Any]]:
    """Checkpoints in the third step before some calls, by the call's number; and the end."""
    found = {}
    model, opt = method.fresh()
    for k, call in enumerate(method.calls(range(STEPS))):
        if call.step == 2 and call.what in before:
            file = io.BytesIO()
            torch.save(of_host({"model": model.state_dict(), "opt": opt.state_dict()}), file)
            found[k] = file.getvalue()
        method.make(model, opt, call)
    return found, of_host(everything(model, opt))


@pytest.mark.parametrize(("before", "after"), ["dd", "hd", "dh"])
@pytest.mark.parametrize("name", DRIVERS)
def test_from_one_device_to_another(
    name: str, before: str, after: str, device: Accelerator
) -> None:
    methods = {"h": driver(name, gather=True), "d": there(device, name, gather=True)}
    # Before a step, the method has seen losses and not yet learnt from them.
    points = ("backward", "step", "update") if before == after else ("step",)
    files, want = cuts(methods[before], *points)
    method = methods[after]
    calls = list(method.calls(range(STEPS)))
    assert files
    for k, file in files.items():
        state = torch.load(io.BytesIO(file), weights_only=True)
        model = make("Plain")
        model.load_state_dict(state["model"])
        if after == "d":
            model = device.put(model)
        opt = method.optimizer(model)
        opt.load_state_dict(state["opt"])
        method.run(model, opt, calls[k:])
        found = of_host(everything(model, opt))
        if before == after:
            assert_same(found, want)
        elif name != "graddrop":
            # Which draws other numbers on each device. The rounding of sums is the device's own.
            parts = found["parameters"], want["parameters"]
            torch.testing.assert_close(*parts, rtol=1e-9, atol=1e-12)
        assert all(p.device.type == {"h": "cpu", "d": "cuda"}[after] for p in model.parameters())


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_losses_that_are_still_on_their_way(nonfinite: str, device: Accelerator) -> None:
    # What `step` looks at, after a `backward` that did not wait for the device.
    spoiled = frozenset([Call(0, "backward")])
    method = there(device, "mean", options={"nonfinite": nonfinite}, spoiled=spoiled)
    model, opt = method.fresh()
    method.run(model, opt, list(method.calls(range(1)))[:-1])
    state = opt.state_dict()
    copies = [copy.deepcopy(opt), method.fresh()[1], driver("mean").fresh()[1]]
    for other in copies[1:]:
        other._balancer.nonfinite = nonfinite
        other.load_state_dict(state)
    for each in (opt, *copies):
        if nonfinite == "raise":
            with pytest.raises(NonFiniteError, match="task 1"):
                each.step()
        else:
            each.step()
            assert each.diagnostics()["skipped"] == 1
        assert not each.state
