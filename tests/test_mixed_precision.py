"""Autocast with normalisation layers, and `GradScaler` with real overflows, under every engine."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD

from gradbal import MultiTaskOptimizer
from tests.gradients import assert_gradients, expected, task_gradients
from tests.states import assert_same
from tests.test_engines import ENGINES, ONE_PASS
from tests.zoo import keywords, targets

EVERY = {**ENGINES, "auto": {}}

NORMS = {
    "BatchNorm": lambda: nn.BatchNorm1d(256),
    "GroupNorm": lambda: nn.GroupNorm(4, 256),
    "LayerNorm": lambda: nn.LayerNorm(256),
}

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Rounding of one operation."""


class _Normalised(nn.Module):
    """Three tasks; of so many parameters that "auto" tries every engine."""

    def __init__(self, norm: str, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.half = dtype
        self.trunk = nn.Sequential(
            nn.Linear(16, 256), NORMS[norm](), nn.GELU(), nn.Linear(256, 128), nn.ReLU()
        )
        self.heads = nn.ModuleList(nn.Linear(128, 1) for _ in range(3))

    def losses(self, batch: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", self.half):
            z = self.trunk(batch)
            outputs = [head(z) for head in self.heads]
        assert outputs[0].dtype == self.half
        return targets([o.float() for o in outputs])


def _batch(step: int) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step))


def _optimizer(model: nn.Module, aggregator: str, engine: str) -> MultiTaskOptimizer:
    options: dict[str, Any] = {"jacobian": engine} | EVERY[engine] | keywords(aggregator)
    return MultiTaskOptimizer(SGD(model.parameters(), lr=0.01, momentum=0.9), aggregator, **options)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("engine", EVERY)
def test_gradients_are_those_of_one_task_at_a_time(
    engine: str, norm: str, dtype: torch.dtype
) -> None:
    model = _Normalised(norm, dtype)
    opt = _optimizer(model, "upgrad", engine)
    # One pass rounds the sum of the tasks' gradients where the reference rounds each of them.
    tolerance = UNIT[dtype] if engine in ONE_PASS else 1e-5
    engines = set()
    for step in range(14 if engine == "auto" else 3):
        reference = copy.deepcopy(opt.aggregator)
        batch = _batch(step)
        rows, values = task_gradients(model, lambda twin, batch=batch: twin.losses(batch))
        opt.zero_grad()
        opt.backward(model.losses(batch))
        engines.add(opt.diagnostics()["engine"])
        assert_gradients(model, expected(reference, rows, values, None), tolerance)
        opt.step()
    assert engine != "auto" or engines >= {"loop", "gramian"}


STATEFUL = {
    "gramian": ["upgrad", "primary", "pcgrad", "gradvac", "gradnorm", "imtl"],
    "jacobian": ["moco", "graddrop", "db_mtl", "m_config"],
    "scalarizer": ["rlw", "uw", "dwa", "imtl_l", "cosmos"],
}
OVERFLOWS = [
    (engine, name)
    for engine in EVERY
    for kind, names in STATEFUL.items()
    for name in names
    # These engines find the Gramian alone.
    if kind == "gramian" or engine not in ("gramian", "sketch")
]


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize(("engine", "aggregator"), OVERFLOWS)
def test_an_overflow_lowers_the_scale_and_nothing_else(
    engine: str, aggregator: str, dtype: torch.dtype
) -> None:
    model = _Normalised("BatchNorm", dtype)
    opt = _optimizer(model, aggregator, engine)
    # bfloat16 has the exponents of float32.
    most = 2.0**19 if dtype == torch.float16 else 2.0**127
    scaler = GradScaler("cpu", init_scale=most)
    skipped = taken = 0
    while taken < 2:
        opt.zero_grad()
        parts = [dict(model.named_parameters()), opt.optimizer.state_dict()]
        before = copy.deepcopy(parts)
        state = copy.deepcopy(opt.aggregator.state_dict())
        scale = scaler.get_scale()
        opt.backward(model.losses(_batch(skipped + taken)), grad_scaler=scaler)
        scaler.step(opt)
        scaler.update()
        if scaler.get_scale() == scale:
            assert not torch.equal(model.trunk[0].weight, before[0]["trunk.0.weight"])
            assert all(bool(p.isfinite().all()) for p in model.parameters())
            taken += 1
            continue
        assert scaler.get_scale() == scale / 2
        opt.zero_grad()
        parts = [dict(model.named_parameters()), opt.optimizer.state_dict()]
        assert_same(parts, before)
        assert_same(opt.aggregator.state_dict(), state)
        skipped += 1
        assert skipped < 20
    assert skipped > 0
