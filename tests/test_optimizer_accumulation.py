"""accumulate=True, update_every and loss_transform."""

import copy
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import gradbal
from gradbal import MultiTaskOptimizer
from tests.gradients import assert_gradients, expected, jacobian, shared_names, task_gradients
from tests.zoo import METHODS, make, optimizer, takes, targets

GRAMIAN = [name for name in METHODS if gradbal.info(name).kind == "gramian"]
EXTRA = ["log_sum", "largest_entries"]


@pytest.fixture(scope="module", autouse=True)
def _more_methods() -> Iterator[None]:
    @gradbal.register("log_sum")
    class LogSum(gradbal.Scalarizer):
        """Sum of the logarithms, whose weights depend on the losses."""

        def scalarize(self, losses: Tensor) -> Tensor:
            return losses.log().sum()

    @gradbal.register("largest_entries")
    class LargestEntries(gradbal.JacobianAggregator):
        """The entry of largest absolute value in each column."""

        def direction(self, jacobian: Tensor, losses: Tensor | None = None) -> Tensor:
            return jacobian.gather(0, jacobian.abs().argmax(0, keepdim=True))[0]

    yield
    for name in EXTRA:
        gradbal.registry.unregister(name)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("heads", [None, "own", "weighted"])
@pytest.mark.parametrize("name", ["Plain", "PartlyShared", "HeadOnly"])
@pytest.mark.parametrize("aggregator", [*METHODS, *EXTRA])
def test_micro_batches_are_one_batch(
    aggregator: str, name: str, heads: str | None, pieces: int
) -> None:
    if aggregator == "largest_entries":
        heads = None
    model = make(name)
    batch = model.batch()
    twin = copy.deepcopy(model)
    whole = optimizer(twin, aggregator, heads=heads)
    whole.backward(twin.losses(batch))
    opt = optimizer(model, aggregator, heads=heads)
    for i, part in enumerate(batch.chunk(pieces)):
        losses = [l / pieces for l in model.losses(part)]
        opt.backward(losses, accumulate=i < pieces - 1)
    assert_gradients(model, _gradients(twin), 1e-8)
    torch.testing.assert_close(opt.losses, whole.losses)
    if whole.weights is not None:
        torch.testing.assert_close(opt.weights, whole.weights)
    assert opt.diagnostics()["steps"] == 1


@pytest.mark.parametrize("aggregator", [*METHODS, *EXTRA])
def test_accumulation_over_two_steps(aggregator: str) -> None:
    """Nothing of the first step is left in the second."""
    model = make("Plain")
    twin = copy.deepcopy(model)
    opt, whole = optimizer(model, aggregator), optimizer(twin, aggregator)
    batch = model.batch()
    for _ in range(3):
        whole.zero_grad()
        whole.backward(twin.losses(batch))
        whole.step()
        opt.zero_grad()
        for i, part in enumerate(batch.chunk(2)):
            opt.backward([l / 2 for l in model.losses(part)], accumulate=i == 0)
        opt.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("aggregator", [*GRAMIAN, "log_sum", "largest_entries"])
def test_nothing_is_written_before_the_last_micro_batch(aggregator: str) -> None:
    model = make("Plain")
    opt = optimizer(model, aggregator)
    opt.backward(model.losses(model.batch()), accumulate=True)
    assert all(p.grad is None for p in model.parameters())
    assert opt.weights is None
    assert opt.diagnostics()["steps"] == 0


@pytest.mark.parametrize("heads", [None, "own", "weighted"])
@pytest.mark.parametrize("aggregator", [*GRAMIAN, "log_sum"])
def test_the_graph_may_change_between_micro_batches(aggregator: str, heads: str | None) -> None:
    """Shared is what two losses reach in all the micro-batches together."""
    model = make("ChangingGraph")
    batch = model.batch()
    opt = optimizer(model, aggregator, heads=heads)
    reference = copy.deepcopy(opt.aggregator)
    rows, values = task_gradients(
        model,
        lambda twin: [
            a + b for a, b in zip(twin.losses(batch[:3]), twin.losses(batch[3:]), strict=True)
        ],
    )
    opt.backward(model.losses(batch[:3]), accumulate=True)
    opt.backward(model.losses(batch[3:]))
    names = shared_names(rows)
    assert {"left.weight", "right.weight"} <= set(names)
    if aggregator == "log_sum":
        w = 1 / values
        j = jacobian(rows, names)
        want = dict(
            zip(
                names,
                (w @ j).split([model.get_parameter(n).numel() for n in names]),
                strict=True,
            )
        )
        for n in names:
            torch.testing.assert_close(model.get_parameter(n).grad.view(-1), want[n])
    else:
        assert_gradients(model, expected(reference, rows, values, heads), 1e-7)


@pytest.mark.parametrize("aggregator", ["upgrad", "log_sum", "mean"])
def test_other_tasks_between_micro_batches_are_refused(aggregator: str) -> None:
    model = make("Plain")
    opt = optimizer(model, aggregator)
    losses = model.losses(model.batch())
    opt.backward(losses, accumulate=True, retain_graph=True)
    with pytest.raises(ValueError, match="must stay 3"):
        opt.backward(losses[:2])


def test_unfreezing_between_micro_batches_is_refused() -> None:
    model = make("Frozen")
    opt = optimizer(model, "upgrad")
    opt.backward(model.losses(model.batch()), accumulate=True)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="stay the same while gradients accumulate"):
        opt.backward(model.losses(model.batch()))
    assert all(p.grad is None for p in model.parameters())
    opt.backward(model.losses(model.batch()))


class _Counted(torch.autograd.Function):
    passes: ClassVar[int] = 0

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        _Counted.passes += 1
        return grad


@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("aggregator", ["upgrad", "nash_mtl", "mgda"])
def test_update_every(aggregator: str, heads: str) -> None:
    model = make("Plain")
    opt = optimizer(model, aggregator, update_every=3, heads=heads)
    plain = optimizer(copy.deepcopy(model), aggregator).aggregator
    for step in range(7):
        rows, values = task_gradients(model, lambda twin: twin.losses(model.batch()))
        names = shared_names(rows)
        j = jacobian(rows, names)
        if step % 3 == 0:
            w = plain.weights(j @ j.T, values)
            head_w = plain.head_weights(w, j @ j.T)
        opt.zero_grad()
        _Counted.passes = 0
        z = _Counted.apply(model.trunk(model.batch()))
        opt.backward(targets([head(z) for head in model.heads]))
        assert _Counted.passes == (3 if step % 3 == 0 else 1)
        torch.testing.assert_close(opt.weights, w, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(opt.losses, values)
        got = torch.cat([model.get_parameter(n).grad.view(-1) for n in names])
        torch.testing.assert_close(got, w @ j, rtol=1e-6, atol=1e-9)
        for i, head in enumerate(model.heads):
            factor = head_w[i] if heads == "weighted" else 1.0
            want = factor * rows[i][f"heads.{i}.weight"]
            torch.testing.assert_close(head.weight.grad, want, rtol=1e-6, atol=1e-9)
        opt.step()


@pytest.mark.parametrize("aggregator", ["rlw", "uw"])
def test_update_every_of_a_scalarizer(aggregator: str) -> None:
    model = make("Plain")
    opt = optimizer(model, aggregator, update_every=2)
    seen = []
    for _ in range(4):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        opt.step()
        seen.append(opt.weights)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
    torch.testing.assert_close(seen[2], seen[3], rtol=0, atol=0)
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("aggregator", ["upgrad", "mgda"])
def test_update_every_counts_accumulated_steps(aggregator: str) -> None:
    model = make("Plain")
    twin = copy.deepcopy(model)
    opt = optimizer(model, aggregator, update_every=2)
    whole = optimizer(twin, aggregator, update_every=2)
    batch = model.batch()
    for _ in range(4):
        whole.zero_grad()
        whole.backward(twin.losses(batch))
        whole.step()
        opt.zero_grad()
        for i, part in enumerate(batch.chunk(2)):
            opt.backward([l / 2 for l in model.losses(part)], accumulate=i == 0)
        opt.step()
        torch.testing.assert_close(opt.weights, whole.weights)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("heads", [None, "own", "weighted"])
@pytest.mark.parametrize("update_every", [1, 2])
@pytest.mark.parametrize("aggregator", [m for m in METHODS if takes(m, loss_transform="log")])
def test_log_transform_is_passing_log_losses(
    aggregator: str, update_every: int, heads: str | None
) -> None:
    model = make("Plain")
    twin = copy.deepcopy(model)
    options = {"heads": heads, "update_every": update_every}
    opt = optimizer(model, aggregator, loss_transform="log", **options)
    other = optimizer(twin, aggregator, **options)
    for _ in range(2):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        opt.step()
        other.zero_grad()
        other.backward([l.log() for l in twin.losses(twin.batch())])
        other.step()
        assert_gradients(model, _gradients(twin), 1e-8)
        torch.testing.assert_close(opt.losses.log(), other.losses)


def test_a_direction_that_is_a_row_is_not_overwritten() -> None:
    class First(gradbal.JacobianAggregator):
        """The first row itself, not a copy."""

        def direction(self, jacobian: Tensor, losses: Tensor | None = None) -> Tensor:
            return jacobian[0]

    model = make("Plain")
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), First())
    rows, _ = task_gradients(model, lambda twin: twin.losses(model.batch()))
    for times in (1, 2, 3):
        opt.backward(model.losses(model.batch()))
        got = model.trunk[0].weight.grad
        torch.testing.assert_close(got, times * rows[0]["trunk.0.weight"])
