"""Every engine that takes gradients, on every model of the zoo, against plain `autograd.grad`."""

import copy
from typing import Any

import pytest
import torch

from tests.gradients import assert_gradients, expected, task_gradients
from tests.zoo import ZOO, make, optimizer

ENGINES: dict[str, dict[str, Any]] = {
    "gramian": {},
    "loop": {},
    # No model has more parameters than the sketch has entries: exact.
    "sketch": {},
    "vmap": {},
    "vmap, two at a time": {"jacobian": "vmap", "chunk_size": 2},
}
"""Engines that all models can be trained with, and the keywords that they are tested with."""

ONE_PASS = ("sketch",)
"""Engines that deliver by one backward pass of the weighted sum of the losses."""


@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("aggregator", ["upgrad", "cagrad"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ZOO)
def test_gradients_are_those_of_plain_autograd(
    name: str, engine: str, aggregator: str, heads: str
) -> None:
    model = make(name)
    batch = model.batch()
    opt = optimizer(model, aggregator, heads=heads, **{"jacobian": engine} | ENGINES[engine])
    reference = copy.deepcopy(opt.aggregator)
    tolerance = model.rounding if engine in ONE_PASS else model.tolerance
    for _ in range(3):
        reference = copy.deepcopy(opt.aggregator)
        rows, values = task_gradients(model, lambda twin: twin.losses(batch))
        opt.zero_grad()
        opt.backward(model.losses(batch))
        assert_gradients(model, expected(reference, rows, values, heads), tolerance)
        torch.testing.assert_close(opt.losses.double(), values, rtol=1e-6, atol=0)
        opt.step()
