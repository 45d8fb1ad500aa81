"""A run that is cut at any point and goes on from its checkpoint is the same bit for bit."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gradbal
from gradbal import MultiTaskOptimizer
from gradbal.aggregators.base import BilevelAggregator
from tests.drive import DRIVERS, Call, Driver, driver
from tests.states import assert_same, snapshot
from tests.zoo import takes

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
