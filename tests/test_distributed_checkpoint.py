"""`torch.distributed.checkpoint`: its own functions, unmodified, in one process."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import SGD, Adam

import gradbal
from gradbal import MultiTaskOptimizer
from tests.drive import DRIVERS, Driver, driver
from tests.states import assert_same, snapshot

pytestmark = [
    # That it works without a process group is what is tested.
    pytest.mark.filterwarnings("ignore:torch.distributed is.* unavailable or uninitialized"),
    # torch 2.4's own.
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed"),
]

LEARNED = [n for n, (m, k) in DRIVERS.items() if gradbal.create(m, **k).param_groups()]
OTHERS = [n for n in DRIVERS if n not in LEARNED]


def trained(driver: Driver) -> tuple[nn.Module, MultiTaskOptimizer]:
    model, opt = driver.fresh()
    driver.run(model, opt, range(3))
    opt.zero_grad()
    return model, opt


def goes_on_alike(driver: Driver, a: Any, b: Any) -> None:
    for model, opt in (a, b):
        driver.run(model, opt, range(3, 5))
    assert_same(snapshot(*b), snapshot(*a))
    assert_same(b[1].state_dict(), a[1].state_dict())


@pytest.mark.parametrize("name", OTHERS)
def test_get_and_set_state_dict(name: str, tmp_path: Path) -> None:
    method = driver(name)
    model, opt = trained(method)
    weights, state = get_state_dict(model, opt)
    dcp.save({"model": weights, "opt": state}, checkpoint_id=tmp_path)
    twin, other = method.fresh()
    weights, state = get_state_dict(twin, other)
    read = {"model": weights, "opt": state}
    dcp.load(read, checkpoint_id=tmp_path)
    set_state_dict(twin, other, model_state_dict=read["model"], optim_state_dict=read["opt"])
    goes_on_alike(method, (model, opt), (twin, other))


@pytest.mark.parametrize("name", LEARNED)
def test_methods_with_weights_of_their_own_load_the_state_themselves(
    name: str, tmp_path: Path
) -> None:
    # `set_state_dict` asks for the name that each parameter of the optimizer has in the model.
    method = driver(name)
    model, opt = trained(method)
    weights, state = get_state_dict(model, opt)
    dcp.save({"model": weights, "opt": state}, checkpoint_id=tmp_path)
    twin, other = method.fresh()
    weights, state = get_state_dict(twin, other)
    read = {"model": weights, "opt": state}
    dcp.load(read, checkpoint_id=tmp_path)
    twin.load_state_dict(read["model"])
    other.load_state_dict(read["opt"])
    goes_on_alike(method, (model, opt), (twin, other))


@pytest.mark.parametrize("name", DRIVERS)
def test_the_step_that_makes_the_optimizers_state_changes_nothing(name: str) -> None:
    method = driver(name)
    model, opt = method.fresh()
    plain = method.model()
    bare = method.wrapped(plain.parameters())
    aggregator, parameters = opt.aggregator.state_dict(), snapshot(model, opt)["parameters"]
    state = get_optimizer_state_dict(model, opt)
    assert_same(opt.aggregator.state_dict(), aggregator)
    assert_same(snapshot(model, opt)["parameters"], parameters)
    assert opt.diagnostics()["steps"] == 0
    if name in OTHERS:
        want = get_optimizer_state_dict(plain, bare)
        assert_same(state["state"], want["state"])
    # And the run begins as it would have.
    method.run(model, opt, range(2))


@pytest.mark.parametrize("name", ["upgrad", "moco", "rlw", "moml"])
@pytest.mark.parametrize(
    "options",
    [StateDictOptions(full_state_dict=True), StateDictOptions(cpu_offload=True)],
    ids=["full", "cpu_offload"],
)
def test_options_of_get_and_set(name: str, options: StateDictOptions) -> None:
    # Of Adam, `full_state_dict` makes `betas` a list.
    method = driver(name, wrapped=lambda parameters: SGD(parameters, lr=0.01, momentum=0.9))
    model, opt = trained(method)
    # In one process, and without a file, the two would have the same tensors.
    state = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
    twin, other = method.fresh()
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, other, state, options=options)
    goes_on_alike(method, (model, opt), (twin, other))


@pytest.mark.parametrize("name", DRIVERS)
def test_as_a_stateful(name: str, tmp_path: Path) -> None:
    # What torch reads is what the fresh optimizer's state has: that is all where it has no state.
    method = driver(name, wrapped=lambda parameters: SGD(parameters, lr=0.01))
    model, opt = trained(method)
    assert isinstance(opt, Stateful)
    dcp.save({"model": model, "opt": opt}, checkpoint_id=tmp_path)
    twin, other = method.fresh()
    dcp.load({"model": twin, "opt": other}, checkpoint_id=tmp_path)
    goes_on_alike(method, (model, opt), (twin, other))


def test_a_stateful_after_a_step(tmp_path: Path) -> None:
    method = driver("moco")
    model, opt = trained(method)
    dcp.save({"model": model, "opt": opt}, checkpoint_id=tmp_path)
    twin, other = method.fresh()
    method.run(twin, other, range(1))
    dcp.load({"model": twin, "opt": other}, checkpoint_id=tmp_path)
    goes_on_alike(method, (model, opt), (twin, other))


def test_a_stateful_without_the_optimizers_state_is_refused(tmp_path: Path) -> None:
    method = driver("upgrad", wrapped=lambda parameters: Adam(parameters, lr=0.01))
    model, opt = trained(method)
    dcp.save({"model": model, "opt": opt}, checkpoint_id=tmp_path)
    twin, other = method.fresh()
    before = snapshot(twin, other)
    with pytest.raises(ValueError, match=r"state of 8 parameters, found none.*get_state_dict"):
        dcp.load({"opt": other}, checkpoint_id=tmp_path)
    assert_same(snapshot(twin, other), before)


def test_in_mid_accumulation(tmp_path: Path) -> None:
    method = driver("upgrad", gather=True, wrapped=lambda parameters: SGD(parameters, lr=0.01))
    calls = list(method.calls(range(3)))
    model, opt = method.fresh()
    method.run(model, opt, calls[:-3])
    assert calls[-4].what == "gather"
    dcp.save({"model": model, "opt": opt}, checkpoint_id=tmp_path)
    twin, other = method.fresh()
    dcp.load({"model": twin, "opt": other}, checkpoint_id=tmp_path)
    for pair in ((model, opt), (twin, other)):
        method.run(*pair, calls[-3:])
    goes_on_alike(method, (model, opt), (twin, other))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["upgrad", "dwa", "cosmos(sample=True)", "famo"])
def test_with_a_process_group(name: str, tmp_path: Path, process_group: None) -> None:
    test_get_and_set_state_dict(name, tmp_path / "checkpoint")
