"""Any registered method, trained in the way that it wants to be trained.

A step is a list of calls, such as `backward` or `end_epoch`, so that tests can do something between
any two of them. What a call does depends on the step's number alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import gradbal
from gradbal import MultiTaskOptimizer
from gradbal.aggregators.base import (
    BilevelAggregator,
    ClosureAggregator,
    DoubleSamplingAggregator,
)
from tests.zoo import make

__all__ = ["DRIVERS", "EPOCH", "Call", "Driver", "driver"]

EPOCH = 3
"""Steps in an epoch."""


class Call(NamedTuple):
    """step: its number. what: the method's name, "gather" for `backward(..., accumulate=True)`."""

    step: int
    what: str


@dataclass
class Driver:
    """One method with its keywords.

    name: of the method. keywords: its hyperparameters. options: of `MultiTaskOptimizer`. gather:
    gradients of each step come in two batches, where the method allows it. wrapped: makes the
    optimizer. spoiled: calls of which a loss is NaN. place: takes batches to where the model is.
    """

    name: str
    keywords: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    gather: bool = False
    wrapped: Callable[[Any], Optimizer] = lambda parameters: Adam(parameters, lr=0.01)
    spoiled: frozenset[Call] = frozenset()
    place: Callable[[Tensor], Tensor] = lambda batch: batch

    def model(self) -> nn.Module:
        """Three tasks on a common trunk; the same parameters every time."""
        return make("Plain")

    def optimizer(self, model: nn.Module) -> MultiTaskOptimizer:
        wrapped = self.wrapped(model.parameters())
        return MultiTaskOptimizer(wrapped, self.name, **self.options, **self.keywords)

    def fresh(self) -> tuple[nn.Module, MultiTaskOptimizer]:
        model = self.model()
        return model, self.optimizer(model)

    def calls(self, steps: range) -> Iterator[Call]:
        """What is called, in this order."""
        made = gradbal.create(self.name, **self.keywords)
        closure = isinstance(made, ClosureAggregator)
        for i in steps:
            if isinstance(made, BilevelAggregator) or (closure and made.looks_around):
                yield Call(i, "step")
            else:
                yield Call(i, "zero_grad")
                several = isinstance(made, DoubleSamplingAggregator) and made.n_batches > 1
                if self.gather and not several and not made.needs_features:
                    yield Call(i, "gather")
                yield Call(i, "backward")
                yield Call(i, "step")
                if closure and made.looks_after:
                    yield Call(i, "update")
            if i % EPOCH == EPOCH - 1:
                yield Call(i, "end_epoch")

    def run(self, model: nn.Module, opt: MultiTaskOptimizer, calls: Any) -> None:
        """Makes these calls: an iterable of them, or a range of steps."""
        for call in self.calls(calls) if isinstance(calls, range) else calls:
            self.make(model, opt, call)

    def make(self, model: nn.Module, opt: MultiTaskOptimizer, call: Call) -> None:
        """Makes one call."""
        what = call.what
        if what in ("zero_grad", "end_epoch"):
            getattr(opt, what)()
        elif what == "update":
            with torch.no_grad():
                opt.update(self.losses(model, call, 0))
        elif what == "gather":
            opt.backward(self.losses(model, call, 1), accumulate=True)
        elif what == "backward":
            self._backward(model, opt, call)
        elif isinstance(opt.aggregator, BilevelAggregator):
            opt.step(lambda: self.losses(model, call, 0), lambda: self.losses(model, call, 1))
        elif isinstance(opt.aggregator, ClosureAggregator) and opt.aggregator.looks_around:
            opt.step(lambda: self.losses(model, call, 0))
        else:
            assert what == "step"
            opt.step()

    def _backward(self, model: nn.Module, opt: MultiTaskOptimizer, call: Call) -> None:
        if opt.aggregator.needs_features:
            z = model.trunk(self.batch(call.step, 0))
            opt.backward([head(z).square().mean() + 1 for head in model.heads], features=z)
            return
        n = getattr(opt.aggregator, "n_batches", 1)
        others = [self.losses(model, call, k) for k in range(1, n)]
        opt.backward(self.losses(model, call, 0), independent=others)

    def losses(self, model: nn.Module, call: Call, which: int) -> list[Tensor]:
        """Of one of the step's batches."""
        found = model.losses(self.batch(call.step, which))
        if call in self.spoiled:
            found[1] = found[1] * float("nan")
        return found

    def batch(self, step: int, which: int) -> Tensor:
        draw = torch.Generator().manual_seed(100 * step + which)
        return self.place(torch.randn(6, 4, dtype=torch.float64, generator=draw))


_VARIANTS: dict[str, list[dict[str, Any]]] = {
    "cosmos": [{"sample": True}],
    "cr_mogm": [{"inner": "pcgrad"}, {"inner": "stch", "a": "lr"}, {"inner": "gradvac"}],
    "db_mtl": [{"beta": 0.5}],
    "dwa": [{"window": 2}],
    "famo": [{"lazy": True}],
    "forum": [{"window": 2}],
    "gradnorm": [{"initial_loss": "epoch"}],
    "gradvac": [{"groups": "matrix"}],
    "init_loss_inverse": [{"warmup": 2}],
    "m_config": [{"per_step": 2}],
    "marigold": [{"estimator": "free"}, {"estimator": "central"}],
    "modo": [{"batches": 3}],
    "moml": [{"model_batch": "train+val"}],
    "realtime_loss_inverse": [{"ema": 0.9}],
    "sdmgrad": [{"batches": 1}],
    "stch": [{"warmup_steps": 3}],
}
"""Keywords with which a method has other state, or is driven in another way."""

DRIVERS: dict[str, tuple[str, dict[str, Any]]] = {}
"""Every registered method, and its variants: a test's name → name and keywords."""

for _name in gradbal.list_aggregators():
    DRIVERS[_name] = _name, {}
    for _keywords in _VARIANTS.get(_name, ()):
        DRIVERS[f"{_name}({', '.join(f'{k}={v}' for k, v in _keywords.items())})"] = (
            _name,
            _keywords,
        )


def driver(name: str, **more: Any) -> Driver:
    """The driver of an entry of `DRIVERS`."""
    method, keywords = DRIVERS[name]
    return Driver(method, dict(keywords), **more)
