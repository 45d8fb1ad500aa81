"""Checkpoints of several processes, read by fewer, and processes that die."""

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tests.processes import PATIENCE, Workers, workers
from tests.test_distributed import FSDP, Divided, values

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is.* unavailable or uninitialized",
    "ignore::FutureWarning:torch.distributed",
)

STEPS = range(3), range(3, 6)
METHODS = ["upgrad", "dwa", "moco", "m_config", "graddrop", "cosmos(sample=True)"]


def divided(name: str, how: str) -> Divided:
    method, _, rest = name.partition("(")
    return Divided(method, {"sample": True} if rest else {}, how=how)


def saved(name: str, how: str, folder: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        driver = divided(name, how)
        model, opt = driver.fresh()
        driver.run(model, opt, STEPS[0])
        weights, state = get_state_dict(model, opt)
        dcp.save({"model": weights, "opt": state}, checkpoint_id=folder)


def resumed(name: str, how: str, folder: str) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        driver = divided(name, how)
        model, opt = driver.fresh()
        weights, state = get_state_dict(model, opt)
        dcp.load({"model": weights, "opt": state}, checkpoint_id=folder)
        set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state)
        driver.run(model, opt, STEPS[1])
    return values(model)


def uninterrupted(name: str) -> list[Tensor]:
    driver = divided(name, "alone")
    model, opt = driver.fresh()
    for steps in STEPS:
        driver.run(model, opt, steps)
    return values(model)


@pytest.mark.parametrize("how", ["ddp", "plain", pytest.param("fsdp", marks=FSDP)])
def test_saved_by_four_loaded_by_two_and_by_one(how: str, tmp_path: Path) -> None:
    with workers(4) as four:
        for name in METHODS:
            four.run(saved, name, how, str(tmp_path / name))
    with workers(2) as two:
        for name in METHODS:
            wanted = uninterrupted(name)
            for found in two.run(resumed, name, how, str(tmp_path / name)):
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)
            alone = resumed(name, "alone", str(tmp_path / name))
            torch.testing.assert_close(alone, wanted, rtol=1e-9, atol=1e-12, msg=name)


def before_the_step(how: str) -> bool:
    """A checkpoint between `backward` and `step` holds `.grad`, whoever has which part of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        driver = divided("moco", how)
        model, opt = driver.fresh()
        driver.run(model, opt, STEPS[0])
        calls = [c for c in driver.calls(range(3, 4)) if c.what in ("zero_grad", "backward")]
        driver.run(model, opt, calls)
        weights = model.state_dict()
        # As after a file: torch's own state is handed over as it is.
        state = copy.deepcopy(opt.state_dict())
        twin, other = driver.fresh()
        twin.load_state_dict(weights)
        other.load_state_dict(state)
        opt.step()
        other.step()
    return all(map(torch.equal, values(model), values(twin)))


@pytest.mark.parametrize("how", ["ddp", "plain", pytest.param("fsdp", marks=FSDP)])
def test_between_backward_and_step(how: str) -> None:
    with workers(2) as two:
        assert two.run(before_the_step, how) == [True, True]


def copies_of_shards() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        driver = divided("moco", "fsdp")
        model, opt = driver.fresh()
        driver.run(model, opt, STEPS[0])
        twin = copy.deepcopy(opt)
        assert twin.state_dict()["param_groups"] == opt.state_dict()["param_groups"]
        opt.backward(model(driver.batch(9, 0)), accumulate=True)
        for take in (opt.state_dict, lambda: copy.deepcopy(opt)):
            with pytest.raises(ValueError, match="must not wait for more of them"):
                take()
        opt.backward(model(driver.batch(9, 1)))
        opt.step()
        opt.zero_grad()
        return isinstance(opt.state_dict(), dict)


@FSDP
def test_copies_of_shards() -> None:
    with workers(2) as two:
        assert two.run(copies_of_shards) == [True, True]


def dies(how: str, when: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        driver = divided("upgrad", how)
        model, opt = driver.fresh()
        driver.run(model, opt, range(2))
        losses = model(driver.batch(2, 0))
        if dist.get_rank() == 1 and when == "before":
            os._exit(9)
        if dist.get_rank() == 1:
            # In the middle of its backward passes.
            losses[1].grad_fn.register_prehook(lambda grads: os._exit(9))
        try:
            opt.backward(losses)
            opt.step()
        except Exception as error:
            return type(error).__name__
    return "nothing"


@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("how", ["ddp", "plain", pytest.param("fsdp", marks=FSDP)])
def test_a_process_that_dies(how: str, when: str) -> None:
    """The others end with an error, and none waits for ever."""
    processes = Workers(2)
    try:
        found = answers_of_survivors(processes, dies, how, when)
    finally:
        processes.stop()
    assert found == ["RuntimeError"]


def answers_of_survivors(processes: Workers, function: Any, *args: Any) -> list[str]:
    for end in processes.ends:
        end.send((function, args))
    first, second = processes.ends
    assert first.poll(2 * PATIENCE), "the other one waits for ever"
    with pytest.raises(EOFError):
        second.recv()
    error, result = first.recv()
    assert not error, error
    return [result]
