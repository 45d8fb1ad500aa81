"""Models in training, and comparisons of everything that belongs to them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from gradbal import MultiTaskOptimizer
from gradbal._checkpoint import decode
from tests.zoo import make


def snapshot(model: nn.Module, opt: MultiTaskOptimizer) -> dict[str, Any]:
    """Everything that an error must leave as it is."""
    return copy.deepcopy(
        {
            "parameters": [p.detach() for p in model.parameters()],
            "gradients": [None if p.grad is None else p.grad for p in model.parameters()],
            "optimizer": opt.optimizer.state_dict(),
            "aggregator": opt.aggregator.state_dict(),
            "outcome": [opt.weights, opt.losses],
            "tasks": opt.diagnostics()["tasks"],
            "steps": opt.diagnostics()["steps"],
        }
    )


def entry(opt: MultiTaskOptimizer) -> dict[str, Any]:
    """What a checkpoint has besides the wrapped optimizer's state."""
    return decode(opt.state_dict()["param_groups"][0]["gradbal"])


def assert_same(a: Any, b: Any) -> None:
    """Equal bit for bit, in tensors inside lists and dicts too."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif a == a:
        assert a == b
    else:
        assert b != b


def trained(aggregator: str, **options: Any) -> tuple[nn.Module, MultiTaskOptimizer]:
    """A model and Adam after two steps with gradients present: there is state to spoil."""
    model = make("Plain")
    opt = MultiTaskOptimizer(Adam(model.parameters(), lr=0.01), aggregator, **options)
    for _ in range(2):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        opt.step()
    return model, opt


def fresh(aggregator: str, **options: Any) -> tuple[nn.Module, MultiTaskOptimizer]:
    model = make("Plain")
    return model, MultiTaskOptimizer(Adam(model.parameters(), lr=0.01), aggregator, **options)


def root_at_zero(x: Tensor) -> Tensor:
    """Zero, with a gradient that is not a number."""
    return (x * 0.0).square().sum().sqrt()
