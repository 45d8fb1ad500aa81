"""Every built-in learning-rate scheduler drives the wrapped optimizer."""

import warnings
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from gradbal import MultiTaskOptimizer
from tests.zoo import make

SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.5**epoch),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.5),
    "StepLR": lambda o: schedulers.StepLR(o, 1, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 2], 0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.5, total_iters=3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.001, 0.1, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, 5),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.5)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.5)], o
    ),
    "SWALR": lambda o: SWALR(o, 0.001, anneal_epochs=2),
}


def test_every_builtin_scheduler_is_listed() -> None:
    builtin = {
        name
        for name, cls in vars(schedulers).items()
        if isinstance(cls, type)
        and issubclass(cls, schedulers.LRScheduler)
        and cls.__module__ == schedulers.__name__
        and not name.startswith("_")
    }
    assert builtin - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("aggregator", ["upgrad", "uw"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_move_the_learning_rates_of_the_wrapped(name: str, aggregator: str) -> None:
    model = make("Plain")
    # The method's own weights make a second group; a bare Adam gets one as well.
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    opt = MultiTaskOptimizer(Adam(groups, lr=0.01), aggregator)
    extra = [{"params": [torch.zeros(3, requires_grad=True)]}] if aggregator == "uw" else []
    bare = Adam([{"params": [torch.zeros(2, requires_grad=True)]}, *extra], lr=0.01)
    mine, theirs = SCHEDULERS[name](opt), SCHEDULERS[name](bare)
    rates = []
    for _ in range(4):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        opt.step()
        bare.step()
        for scheduler in (mine, theirs):
            with warnings.catch_warnings():
                # Chained schedulers pass `epoch`, which torch itself has deprecated.
                warnings.filterwarnings("ignore", "The epoch parameter", UserWarning)
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        rates.append([group["lr"] for group in opt.param_groups])
        assert rates[-1] == [group["lr"] for group in bare.param_groups]
    assert rates[0] != rates[-1] or name in ("CyclicLR", "CosineAnnealingWarmRestarts")
    assert len(rates[0]) == (2 if aggregator == "uw" else 1)
    assert opt.param_groups is opt.optimizer.param_groups


def test_a_scheduler_warns_when_step_was_forgotten() -> None:
    opt = MultiTaskOptimizer(SGD(make("Plain").parameters(), lr=0.1))
    scheduler = schedulers.StepLR(opt, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
