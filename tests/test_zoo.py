"""Every model of the zoo under every method, against plain `torch.autograd.grad`."""

import copy
import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradbal
from tests.gradients import assert_gradients, expected, shared_names, task_gradients
from tests.zoo import (
    METHODS,
    ZOO,
    Plain,
    fits,
    keywords,
    make,
    optimizer,
    targets,
    trains_plainly,
)

ALL = [name for name in gradbal.list_aggregators() if trains_plainly(name)]
GRAMIAN = [name for name in METHODS if gradbal.info(name).kind == "gramian"]
COMBINATIONS = [
    (name, aggregator, heads)
    for name in ZOO
    for aggregator in ALL
    for heads in (None, "own", "weighted")
    if fits(aggregator, name, heads)
]


@pytest.mark.parametrize(("name", "aggregator", "heads"), COMBINATIONS)
def test_gradients_are_the_aggregated_jacobian(
    name: str, aggregator: str, heads: str | None
) -> None:
    model = make(name)
    batch = model.batch()
    opt = optimizer(model, aggregator, heads=heads)
    reference = copy.deepcopy(opt.aggregator)
    for _ in range(3 if name == "ChangingGraph" else 2):
        if not getattr(reference, "per_parameter_state", False):
            # The columns of such state are in the order of memory, those of `rows` are not.
            reference = copy.deepcopy(opt.aggregator)
        rows, values = task_gradients(model, lambda twin: twin.losses(batch))
        opt.zero_grad()
        losses = model.losses(batch)
        assert len(losses) == model.n_tasks
        opt.backward(losses)
        single_pass = gradbal.info(aggregator).kind == "scalarizer"
        tolerance = model.rounding if single_pass else model.tolerance
        assert_gradients(model, expected(reference, rows, values, heads), tolerance)
        torch.testing.assert_close(opt.losses.double(), values, rtol=1e-6, atol=0)
        opt.step()


@pytest.mark.parametrize(
    ("name", "aggregator"),
    [
        (name, aggregator)
        for name in ("Plain", "PartlyShared", "HeadOnly", "SingleTask", "BatchNorm")
        for aggregator in ALL
        if fits(aggregator, name, None)
    ],
)
def test_gradients_add_up_without_zero_grad(name: str, aggregator: str) -> None:
    model = make(name)
    batch = model.batch()
    once = copy.deepcopy(model)
    first = optimizer(once, aggregator)
    first.backward(once.losses(batch))
    want = {n: p.grad.clone() for n, p in once.named_parameters() if p.grad is not None}
    once.zero_grad()
    first.backward(once.losses(batch))
    for n in want:
        want[n] += once.get_parameter(n).grad

    opt = optimizer(model, aggregator)
    opt.backward(model.losses(batch))
    opt.backward(model.losses(batch))
    assert_gradients(model, want, 1e-12)


@pytest.mark.parametrize("name", ZOO)
def test_default_detection_agrees_with_explicit_shared_params(name: str) -> None:
    model = make(name)
    batch = model.batch()
    rows, _ = task_gradients(model, lambda twin: twin.losses(batch))
    twin = copy.deepcopy(model)
    chosen = dict(twin.named_parameters())
    explicit = optimizer(twin, "upgrad", shared_params=[chosen[n] for n in shared_names(rows)])
    with torch.random.fork_rng():
        explicit.backward(twin.losses(batch))
    opt = optimizer(model, "upgrad")
    opt.backward(model.losses(batch))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)


@pytest.mark.parametrize("aggregator", METHODS)
def test_parameters_outside_the_optimizer_get_nothing(aggregator: str) -> None:
    model = make("Plain")
    outside = {"trunk.0.bias", "heads.2.weight"}
    inside = [p for n, p in model.named_parameters() if n not in outside]
    sgd = torch.optim.SGD(inside, lr=0.1)
    opt = gradbal.MultiTaskOptimizer(sgd, aggregator, **keywords(aggregator))
    batch = model.batch().requires_grad_()
    opt.backward(model.losses(batch))
    assert batch.grad is None
    for n, p in model.named_parameters():
        assert (p.grad is None) == (n in outside)


@pytest.mark.parametrize("aggregator", METHODS)
def test_model_buffers_are_not_touched(aggregator: str) -> None:
    model = make("BatchNorm")
    losses = model.losses(model.batch())
    before = {n: b.clone() for n, b in model.named_buffers()}
    optimizer(model, aggregator).backward(losses)
    for n, b in model.named_buffers():
        assert torch.equal(b, before[n])


class _Kept:
    """What the graph holds on to."""


class _Holding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kept: _Kept) -> Tensor:
        ctx.kept = kept
        return x * 1.0

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@pytest.mark.parametrize("form", ["list", "stack", "vector"])
@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("aggregator", ["uw", "upgrad"])
def test_the_graph_dies_with_the_losses(aggregator: str, heads: str, form: str) -> None:
    model = make("Plain")
    opt = optimizer(model, aggregator, heads=heads)
    for _ in range(2):
        kept = _Kept()
        z = _Holding.apply(model.trunk(model.batch()), kept)
        losses: Sequence[Tensor] | Tensor = targets([head(z) for head in model.heads])
        if form != "list":
            losses = torch.stack(losses)
        if form == "vector":
            losses = losses * 1.0
        opt.backward(losses)
        alive = weakref.ref(kept)
        del kept
        assert alive() is not None, "the test does not see the graph"
        del losses, z
        if alive() is not None:
            gc.collect()
        assert alive() is None


def _live_tensors() -> int:
    return sum(1 for o in gc.get_objects() if issubclass(type(o), Tensor))


@pytest.mark.parametrize("name", ["Checkpointed", "ChangingGraph"])
@pytest.mark.parametrize("aggregator", ["uw", "upgrad"])
def test_number_of_live_tensors_is_flat(aggregator: str, name: str) -> None:
    model = make(name)
    batch = model.batch()
    opt = optimizer(model, aggregator)

    def steps(n: int) -> int:
        for _ in range(n):
            opt.zero_grad()
            opt.backward(model.losses(batch))
            opt.step()
        gc.collect()
        return _live_tensors()

    first = steps(4)
    assert steps(50) == first


@pytest.mark.parametrize("aggregator", GRAMIAN)
def test_sparse_gradients_are_refused(aggregator: str) -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    opt = optimizer(embedding, aggregator)
    z = embedding(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"dense.*sparse=False"):
        opt.backward([z.sum(), z.square().sum()])
    assert embedding.weight.grad is None


@pytest.mark.parametrize("aggregator", METHODS)
def test_complex_parameters_are_refused(aggregator: str) -> None:
    layer = nn.Linear(3, 2, dtype=torch.complex64)
    opt = optimizer(layer, aggregator)
    z = layer(torch.ones(1, 3, dtype=torch.complex64)).abs()
    with pytest.raises(ValueError, match=r"real.*complex64"):
        opt.backward([z.sum(), z.square().sum()])
    assert layer.weight.grad is None


@pytest.mark.parametrize("aggregator", ["mean", "upgrad"])
@pytest.mark.parametrize("name", ["Plain", "PartlyShared"])
def test_reentrant_checkpointing_is_refused(name: str, aggregator: str) -> None:
    # The graph does not show what is inside; the trunk would silently stay as it is.
    model = make(name)
    opt = optimizer(model, aggregator)
    z = checkpoint(model.trunk, model.batch().requires_grad_(), use_reentrant=True)
    if name == "PartlyShared":
        z = model.middle(z)
    with pytest.raises((ValueError, RuntimeError), match="reentrant"):
        opt.backward(targets([head(z) for head in model.heads]))
    assert all(p.grad is None for p in model.parameters())


class _Sliced(Plain):
    """The same losses as `Plain`, as one tensor that no `torch.stack` made."""

    def vector(self, batch: Tensor) -> Tensor:
        z = self.trunk(batch)
        outputs = torch.cat([head(z) for head in self.heads], 1)
        wanted = torch.tensor([1.0, -2.0, 4.0], dtype=self.dtype)
        return (outputs - wanted).square().mean(0) + 1.0


@pytest.mark.parametrize("aggregator", METHODS)
def test_a_vector_that_is_no_stack_needs_shared_params(aggregator: str) -> None:
    torch.manual_seed(3)
    model = _Sliced().double()
    batch = model.batch()
    opt = optimizer(model, aggregator, shared_params=model.trunk.parameters(), heads="own")
    rows, values = task_gradients(model, lambda twin: twin.losses(batch))
    reference = copy.deepcopy(opt.aggregator)
    opt.backward(model.vector(batch))
    assert_gradients(model, expected(reference, rows, values, "own"), 1e-7)
