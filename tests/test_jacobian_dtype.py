"""`jacobian_dtype`: what is rounded, by how much, and what is not."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import gradbal
from gradbal import MultiTaskOptimizer
from tests.gradients import assert_gradients, expected, task_gradients
from tests.zoo import METHODS, ZOO, make, optimizer

BF16 = torch.bfloat16
JACOBIAN = [n for n in METHODS if gradbal.info(n).kind == "jacobian"]
# Half of the distance between two neighbours, relative to them.
ROUNDING = 2.0**-8 / 2


class _Wide(nn.Module):
    """More entries than are computed with in float64 anyway."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(60, 700), nn.Tanh(), nn.Linear(700, 90))
        self.heads = nn.ModuleList(nn.Linear(90, 4) for _ in range(3))
        self.register_buffer("x", torch.randn(16, 60))
        self.register_buffer("y", torch.randn(3, 16, 4))

    def shared(self) -> list[Tensor]:
        return list(self.trunk.parameters())

    def features(self) -> Tensor:
        z: Tensor = self.trunk(self.x)
        return z

    def losses(self, z: Tensor | None = None) -> list[Tensor]:
        z = self.features() if z is None else z
        pairs = zip(self.heads, self.y, strict=True)
        return [(head(z) - y).square().mean() for head, y in pairs]

    def rows(self) -> Tensor:
        """J `[T, P]` by plain autograd."""
        grads = [torch.autograd.grad(l, self.shared(), retain_graph=True) for l in self.losses()]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])

    def direction(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.shared()])


def _step(aggregator: str = "upgrad", **keywords: Any) -> tuple[_Wide, MultiTaskOptimizer]:
    model = _Wide()
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), aggregator, **keywords)
    opt.backward(model.losses())
    return model, opt


def _distance(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("aggregator", ["upgrad", "mgda", "nash_mtl"])
def test_the_direction_is_that_of_float32_rows_up_to_rounding(aggregator: str) -> None:
    want = _step(aggregator)[0].direction()
    found = _step(aggregator, jacobian_dtype=BF16)[0].direction()
    assert found.dtype == torch.float32
    # Below the first no entry was rounded.
    assert ROUNDING / 10 <= _distance(found, want) <= ROUNDING


def test_products_and_sums_are_of_the_rounded_rows_and_not_rounded_themselves() -> None:
    model, opt = _step(jacobian_dtype=BF16)
    j = model.rows().to(BF16).double()
    want = j @ j.T
    scale = want.diagonal().sqrt()
    assert float(((opt.gramian - want) / scale / scale[:, None]).abs().max()) <= 1e-6
    assert _distance(model.direction(), opt.weights.double() @ j) <= 1e-6


@pytest.mark.parametrize("name", ZOO)
def test_every_model_can_keep_rows_in_half_precision(name: str) -> None:
    model = make(name)
    batch = model.batch()
    opt = optimizer(model, "mean" if name == "LeafLoss" else "imtl_g", jacobian_dtype=BF16)
    for _ in range(2):
        reference = copy.deepcopy(opt.aggregator)
        rows, values = task_gradients(model, lambda twin: twin.losses(batch))
        opt.zero_grad()
        opt.backward(model.losses(batch))
        want = expected(reference, rows, values, None)
        # A few rows that lie close together: their weights feel the rounding more than their sum.
        assert_gradients(model, want, 0.05)
        opt.step()


@pytest.mark.parametrize("aggregator", JACOBIAN)
def test_methods_that_look_at_the_rows(aggregator: str) -> None:
    keywords: dict[str, Any] = {}
    if "generator" in gradbal.info(aggregator).hyperparameters:
        keywords["generator"] = torch.Generator().manual_seed(1)
    again = copy.deepcopy(keywords)
    model, opt = _step(aggregator, **keywords, jacobian_dtype=BF16)
    method = gradbal.create(aggregator, **again)
    losses = torch.stack(model.losses()).detach()
    want = method.direction(model.rows().to(BF16).double(), losses)
    for _ in range(4):
        opt.zero_grad()
        opt.backward(model.losses())
        want = method.direction(model.rows().to(BF16).double(), losses)
    assert _distance(model.direction(), want) <= 4 * ROUNDING
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_micro_batches_add_up() -> None:
    found, want = _Wide(), _Wide()
    for model, dtype in ((found, BF16), (want, None)):
        opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), jacobian_dtype=dtype)
        for accumulate in (True, True, False):
            opt.backward([l / 3 for l in model.losses()], accumulate=accumulate)
    distance = _distance(found.direction(), want.direction())
    assert ROUNDING / 10 <= distance <= 3 * ROUNDING


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_with_pending_rows(how: str) -> None:
    model = _Wide()
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), jacobian_dtype=BF16)
    opt.backward(model.losses(), accumulate=True)
    pair = (model, opt)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    for m, o in ((model, opt), (twin, other)):
        o.backward(m.losses())
    assert torch.equal(model.direction(), twin.direction())
    assert other._balancer.rows.jacobian.dtype == BF16


@pytest.mark.parametrize("aggregator", ["upgrad", "mgda_ub", "aligned_mtl_ub"])
def test_at_a_representation(aggregator: str) -> None:
    directions = []
    for dtype in (None, BF16):
        model = _Wide()
        opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), aggregator, jacobian_dtype=dtype)
        z = model.features()
        opt.backward(model.losses(z), features=z)
        directions.append(model.direction())
    assert 0 < _distance(directions[1], directions[0]) <= 2 * ROUNDING


def test_of_independent_batches() -> None:
    directions = []
    for dtype in (None, BF16):
        model = _Wide()
        opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), "modo", jacobian_dtype=dtype)
        opt.backward(model.losses(), independent=[model.losses()])
        directions.append(model.direction())
    assert 0 < _distance(directions[1], directions[0]) <= 2 * ROUNDING


def test_the_rows_keep_a_dtype_that_is_narrow_enough() -> None:
    model = _Wide()
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), jacobian_dtype=torch.float32)
    model.to(BF16)
    opt.backward(model.losses())
    assert opt._balancer.rows.jacobian.dtype == BF16


@pytest.mark.parametrize(
    ("of", "dtype", "keywords", "error", "message"),
    [
        (torch.float32, torch.float16, {}, ValueError, "bfloat16, found torch.float16, in which"),
        (torch.float16, torch.float16, {}, ValueError, "bfloat16, found torch.float16, in which"),
        (torch.float32, torch.int32, {}, ValueError, "must be .* or None, found torch.int32"),
        (torch.float32, torch.float64, {}, ValueError, "narrower than .*float32, found .*float64"),
        (BF16, torch.float32, {}, ValueError, "narrower than .*bfloat16, found .*float32"),
        (torch.float16, BF16, {}, ValueError, "narrower than .*float16, found .*bfloat16"),
        (torch.float32, "bfloat16", {}, TypeError, "a torch.dtype or None, found 'bfloat16'"),
        (torch.float32, BF16, {"jacobian": "gramian"}, ValueError, 'None for jacobian="gramian"'),
        (torch.float32, BF16, {"jacobian": "sketch"}, ValueError, 'None for jacobian="sketch"'),
    ],
)
def test_what_is_refused(
    of: torch.dtype, dtype: Any, keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    sgd = SGD(nn.Linear(2, 2, dtype=of).parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        MultiTaskOptimizer(sgd, jacobian_dtype=dtype, **keywords)


@pytest.mark.parametrize("of", [torch.float64, torch.float32, BF16])
def test_the_dtype_of_the_parameters_is_always_right(of: torch.dtype) -> None:
    MultiTaskOptimizer(SGD(nn.Linear(2, 2, dtype=of).parameters(), lr=0.1), jacobian_dtype=of)
