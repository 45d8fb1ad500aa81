"""What `backward` reads from an accelerator: nothing in the Jacobian routine, one matrix for a
Gramian method, nothing for a scalarizer; and no upload that waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.amp import GradScaler
from torch.optim import SGD

import gradbal
from benchmarks.accelerator import DEVICE, Accelerator, Traffic
from gradbal import MultiTaskOptimizer, NonFiniteError
from gradbal.aggregators.base import Aggregator, DoubleSamplingAggregator
from gradbal.aggregators.famo import FAMO
from gradbal.aggregators.imtl import IMTL
from gradbal.aggregators.marigold import Marigold
from gradbal.jacobian import BLOCK, SMALL, Rows, combine, cross_gramian, gramian
from tests.states import root_at_zero
from tests.zoo import ZOO, Plain, make, optimizer, targets

N_TASKS = Plain.n_tasks
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "scaled": {},
    "own": {"heads": "own"},
    "weighted": {"heads": "weighted"},
    "match_sum": {"match_sum": True},
    "log": {"loss_transform": "log"},
    "drop": {"nonfinite": "drop"},
    "reused": {"update_every": 2},
}


# These evaluate closures, which is not what a step of `backward` is.
LOOKS_AGAIN = (gradbal.BilevelAggregator, FAMO, Marigold)


def _accepts(aggregator: str, choice: str) -> bool:
    try:
        optimizer(nn.Linear(1, 1), aggregator, **OPTIONS[choice])
    except (ValueError, NotImplementedError):
        return False
    if isinstance(gradbal.create(aggregator), LOOKS_AGAIN):
        return False
    return gradbal.info(aggregator).promises.min_tasks <= N_TASKS


NAMES = [name for name in gradbal.list_aggregators() if _accepts(name, "default")]
CHOICES = [(name, choice) for name in NAMES for choice in OPTIONS if _accepts(name, choice)]
SCALARIZERS = [name for name in NAMES if gradbal.info(name).kind == "scalarizer"]
GATHERING = [
    name
    for name in NAMES
    if not gradbal.create(name).needs_features and not hasattr(gradbal.create(name), "n_batches")
]


@pytest.fixture
def device() -> Iterator[Accelerator]:
    with Accelerator() as entered:
        yield entered


def _scaler() -> GradScaler:
    """Enabled without a driver: it scales where the losses are, whatever device it is made for."""
    return GradScaler("cpu", init_scale=8.0)


Change = Callable[[list[Tensor], Plain], list[Tensor]]


def _batches(device: Accelerator) -> list[Tensor]:
    """The same batch on the device and on the host."""
    batch = make("Plain").batch()
    return [device.put(batch), batch]


def _backward(
    model: Plain,
    batch: Tensor,
    opt: MultiTaskOptimizer,
    change: Change | None = None,
    at_features: bool = False,
    **how: Any,
) -> None:
    """One call, with what the method consumes besides the losses."""
    z = model.trunk(batch)
    if at_features or opt.aggregator.needs_features:
        how["features"] = z
    n_others = getattr(opt.aggregator, "n_batches", 1) - 1
    how.setdefault("independent", [model.losses(batch + i + 1.0) for i in range(n_others)])
    losses = targets([head(z) for head in model.heads])
    opt.backward(losses if change is None else change(losses, model), **how)


def _check(seen: Traffic, aggregator: Aggregator, n_groups: int = 1) -> None:
    """What a step with fresh weights may ask for."""
    assert all(u.numel <= N_TASKS for u in seen.up)
    assert len(seen.up) <= 3
    if isinstance(aggregator, gradbal.Scalarizer):
        # Losses may be on their way to the host, for which nobody waits.
        assert not seen.waits
        assert sum(d.numel for d in seen.down) <= N_TASKS
        return
    # With the Gramian come the losses, and an extreme of each task's other gradients.
    (first, *others) = seen.waits
    assert first.numel <= (n_groups * N_TASKS + 2) * N_TASKS
    if isinstance(aggregator, gradbal.JacobianAggregator):
        # Its own Gramian, if it has one, and the weights.
        assert all(t.numel <= N_TASKS**2 for t in others)
    elif isinstance(aggregator, IMTL):
        # Its learned factors, which live where the losses are.
        assert [t.numel for t in others] == [N_TASKS]
    else:
        assert not others


def _raised(losses: list[Tensor], model: Plain) -> list[Tensor]:
    """By one, so that their logarithms are positive."""
    return [l + 1.0 for l in losses]


@pytest.mark.parametrize(("aggregator", "choice"), CHOICES)
def test_a_step(device: Accelerator, aggregator: str, choice: str) -> None:
    model = device.put(make("Plain"))
    batch = device.put(model.batch())
    opt = optimizer(model, aggregator, **OPTIONS[choice])
    scaler = _scaler() if choice == "scaled" else None
    for step in range(2):
        opt.zero_grad()
        with device.watched() as seen:
            _backward(model, batch, opt, _raised, grad_scaler=scaler)
        if choice == "reused" and step == 1:
            assert not seen.waits
        else:
            _check(seen, opt.aggregator)
        if scaler is None:
            opt.step()
        else:
            scaler.step(opt)
            scaler.update()


def test_famo_reads_nothing_before_or_after_the_step(device: Accelerator) -> None:
    model = device.put(make("Plain"))
    batch = device.put(model.batch())
    opt = optimizer(model, "famo")
    for _ in range(2):
        opt.zero_grad()
        with device.watched() as seen:
            _backward(model, batch, opt, _raised)
            opt.update(_raised(model.losses(batch), model))
        assert not seen.waits
        opt.step()


@pytest.mark.parametrize("aggregator", GATHERING)
def test_micro_batches(device: Accelerator, aggregator: str) -> None:
    model = device.put(make("Plain"))
    batch = device.put(model.batch())
    opt = optimizer(model, aggregator)
    for _ in range(2):
        for _ in range(2):
            with device.watched() as seen:
                _backward(model, batch, opt, accumulate=True)
            assert not [*seen.waits, *seen.down]
        with device.watched() as seen:
            _backward(model, batch, opt)
        _check(seen, opt.aggregator)
        opt.step()


@pytest.mark.parametrize("aggregator", SCALARIZERS)
def test_the_step_of_a_scalarizer_waits_for_no_more_than_the_losses(
    device: Accelerator, aggregator: str
) -> None:
    model = device.put(make("Plain"))
    opt = optimizer(model, aggregator)
    _backward(model, device.put(model.batch()), opt)
    with device.watched() as seen:
        opt.step()
    assert not seen.waits


def _trained(model: Plain, batch: Tensor, opt: MultiTaskOptimizer) -> list[Tensor]:
    for _ in range(3):
        torch.manual_seed(1)
        opt.zero_grad()
        _backward(model, batch, opt)
        opt.step()
    return list(model.parameters())


# One number for each column is drawn where the columns are, and not the same on every device.
DRAWS_THERE = [
    name
    for name in NAMES
    if gradbal.info(name).kind == "jacobian" and not gradbal.info(name).promises.deterministic
]


@pytest.mark.parametrize("aggregator", [name for name in NAMES if name not in DRAWS_THERE])
def test_training_is_that_of_the_cpu(device: Accelerator, aggregator: str) -> None:
    found, wanted = device.put(make("Plain")), make("Plain")
    opt, plain = optimizer(found, aggregator), optimizer(wanted, aggregator)
    there = _trained(found, device.put(found.batch()), opt)
    for p, q in zip(there, _trained(wanted, wanted.batch(), plain), strict=True):
        torch.testing.assert_close(device.look(p), q.detach(), rtol=1e-12, atol=0)
    if plain.weights is not None:
        assert opt.weights.device == DEVICE
        torch.testing.assert_close(device.look(opt.weights), plain.weights, rtol=1e-12, atol=0)


# `torch.autocast("cpu")` is not for tensors of other devices.
@pytest.mark.parametrize("name", [name for name in ZOO if name != "Autocast"])
@pytest.mark.parametrize("aggregator", ["uw", "upgrad"])
def test_every_model(device: Accelerator, aggregator: str, name: str) -> None:
    found, wanted = device.put(make(name)), make(name)
    for model, batch in ((found, device.put(found.batch())), (wanted, wanted.batch())):
        opt = optimizer(model, aggregator)
        for _ in range(2):
            torch.manual_seed(1)
            opt.zero_grad()
            losses = model.losses(batch)
            with device.watched() as seen:
                opt.backward(losses)
            if model is found:
                kinds = [d.numel for d in seen.waits]
                n = len(losses)
                assert kinds == ([] if aggregator == "uw" else [(n + 2) * n])
            opt.step()
    for p, q in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(device.look(p), q.detach(), rtol=1e-12, atol=1e-15)


class _AtLastLayer(gradbal.GramianAggregator):
    """Probes the trunk's weight; all the tasks weigh the same."""

    probed: Tensor

    def probed_parameters(self) -> list[Tensor]:
        return [self.probed]

    def weights(self, gramian: Tensor, losses: Tensor | None = None) -> Tensor:
        return torch.full_like(gramian[0], 0.5)


class _ByLayer(gradbal.GramianAggregator):
    """Every parameter is a column group."""

    def weights(self, gramian: Tensor, losses: Tensor | None = None) -> Tensor:
        return gramian.diagonal().rsqrt()

    def column_groups(self, shapes: Sequence[torch.Size]) -> list[int]:
        return [shape.numel() for shape in shapes]

    def group_weights(self, gramians: Tensor, losses: Tensor | None = None) -> Tensor:
        return torch.stack([self.weights(g) for g in gramians])


class _Signs(gradbal.JacobianAggregator):
    """The sign of the mean, with weights of its own for the heads; they stay on the device."""

    weighted = True
    combines = True

    def direction(self, jacobian: Tensor, losses: Tensor | None = None) -> Tensor:
        self.last_weights = self.last_head_weights = jacobian.new_full((len(jacobian),), 0.5)
        return jacobian.mean(0).sign()


class _InTurn(_Signs):
    """One task a step."""

    weighted = False
    combines = False

    def tasks_in_turn(self, n_tasks: int, **how: Any) -> list[int]:
        return [1]


class _Pair(DoubleSamplingAggregator):
    n_batches = 2
    shares = (0.25, 0.75)

    def step(self, products: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        return products.abs().sum(1)


def _kind(name: str, model: Plain) -> Aggregator:
    made = {c.__name__: c for c in (_AtLastLayer, _ByLayer, _Signs, _InTurn, _Pair)}[name]()
    if isinstance(made, _AtLastLayer):
        made.probed = model.trunk[0].weight
    return made


KINDS = ["_AtLastLayer", "_ByLayer", "_Signs", "_InTurn", "_Pair"]


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_through_backward(device: Accelerator, kind: str, scaled: bool) -> None:
    models = [device.put(make("Plain")), make("Plain")]
    for model, batch in zip(models, _batches(device), strict=True):
        aggregator = _kind(kind, model)
        opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), aggregator)
        scaler = _scaler() if scaled else None
        with device.watched() as seen:
            _backward(model, batch, opt, grad_scaler=scaler)
        if model is models[0]:
            # The one row that takes part is picked by an index.
            seen.up = [u for u in seen.up if kind != "_InTurn" or "index" not in u.operator]
            _check(seen, aggregator, n_groups=2 if kind == "_ByLayer" else 1)
            if kind == "_Signs":
                # The matrix, then the weights and those of the heads.
                assert [t.numel for t in seen.waits] == [15, 3, 3]
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(device.look(p.grad), q.grad, rtol=1e-12, atol=0)


def test_features(device: Accelerator) -> None:
    model = device.put(make("Plain"))
    opt = optimizer(model, "upgrad")
    batch = device.put(model.batch())
    with device.watched() as seen:
        _backward(model, batch, opt, at_features=True)
    _check(seen, opt.aggregator)


# Where the Gramian alone does not say enough.

WIDE = SMALL // 3 + BLOCK


def _wide(kind: str) -> Tensor:
    """`[3, WIDE]` in float32, too large to be computed with in float64 from the start."""
    rows = torch.randn(3, WIDE)
    if kind == "nearly dependent":
        rows[2] = rows[0] + rows[1] + 1e-3 * rows[2]
    elif kind == "zero":
        rows[1] = 0.0
    elif kind == "tiny":
        rows[1] *= 1e-22
    return rows


@pytest.mark.parametrize(
    ("kind", "downloads", "reads"),
    [("ordinary", 1, 0), ("nearly dependent", 2, 0), ("zero", 1, 1), ("tiny", 2, 1)],
)
def test_a_second_look(device: Accelerator, kind: str, downloads: int, reads: int) -> None:
    rows = _wide(kind)
    results = []
    for j in (device.put(rows), rows):
        p = nn.Parameter(torch.ones_like(j[0]))
        opt = MultiTaskOptimizer(SGD([p], lr=0.1), "upgrad")
        losses = [(row * p).sum() for row in j]
        with device.watched() as seen:
            opt.backward(losses)
        results.append((p.grad, opt.weights))
        if j is not rows:
            assert [d.numel for d in seen.down] == [N_TASKS * (N_TASKS + 2)] * downloads
            assert len(seen.reads) == reads
            assert not [u for u in seen.up if u.waits]
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(device.look(found), wanted)


# NaN and inf.


def _infinite(losses: list[Tensor], model: Plain) -> list[Tensor]:
    return [losses[0], losses[1] + float("inf"), losses[2]]


def _no_gradient(losses: list[Tensor], model: Plain) -> list[Tensor]:
    return [losses[0], losses[1] + root_at_zero(model.trunk[0].weight), losses[2]]


def _no_head_gradient(losses: list[Tensor], model: Plain) -> list[Tensor]:
    return [losses[0], losses[1] + root_at_zero(model.heads[1].weight), losses[2]]


SPOILED = [_infinite, _no_gradient, _no_head_gradient]


# A method that probes some parameters sees no gradient of the others, as a scalarizer sees none.
WAYS = [
    (way, change)
    for way in ["UPGrad", "micro-batches", "features", *KINDS]
    for change in SPOILED
    if (way, change) != ("_AtLastLayer", _no_head_gradient)
]


@pytest.mark.parametrize(("way", "change"), WAYS)
@pytest.mark.parametrize("policy", ["skip", "drop"])
def test_what_is_not_finite_is_found_without_another_read(
    device: Accelerator, way: str, change: Change, policy: str
) -> None:
    outcomes = []
    models = [device.put(make("Plain")), make("Plain")]
    for model, batch in zip(models, _batches(device), strict=True):
        aggregator = _kind(way, model) if way in KINDS else gradbal.create("upgrad")
        opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), aggregator, nonfinite=policy)
        with device.watched() as seen:
            _backward(
                model, batch, opt, change, way == "features", accumulate=way == "micro-batches"
            )
            if way == "micro-batches":
                _backward(model, batch, opt)
        if model is models[0]:
            n_weights = 2 if isinstance(aggregator, _Signs) and policy == "drop" else 0
            assert len([*seen.down, *seen.reads]) <= 1 + n_weights
        opt.step()
        outcomes.append((opt._balancer.n_dropped, opt._n_skipped))
    assert outcomes[0] == outcomes[1]
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(device.look(p), q.detach(), rtol=1e-12, atol=0)


def test_a_task_is_dropped_from_a_single_pass(device: Accelerator) -> None:
    models = [device.put(make("Plain")), make("Plain")]
    for model, batch in zip(models, _batches(device), strict=True):
        opt = optimizer(model, "upgrad", nonfinite="drop", update_every=2)
        for change in (None, _infinite):
            opt.zero_grad()
            with device.watched() as seen:
                _backward(model, batch, opt, change)
            opt.step()
        if model is models[0]:
            # Before the pass, and so not again.
            assert [t.numel for t in [*seen.down, *seen.reads]] == [3]
        assert opt._n_skipped == 0
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(device.look(p), q.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("change", SPOILED)
def test_an_error_names_the_task(device: Accelerator, change: Change) -> None:
    model = device.put(make("Plain"))
    opt = optimizer(model, "upgrad")
    with pytest.raises(NonFiniteError) as error:
        _backward(model, device.put(model.batch()), opt, change)
    assert error.value.tasks == [1]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("policy", ["raise", "skip", "drop"])
@pytest.mark.parametrize("aggregator", ["mean", "uw"])
def test_a_scalarizer_finds_out_in_step(device: Accelerator, aggregator: str, policy: str) -> None:
    model, wanted = device.put(make("Plain")), make("Plain")
    opt = optimizer(model, aggregator, nonfinite=policy)
    with device.watched() as seen:
        _backward(model, device.put(model.batch()), opt, _infinite)
    assert not seen.waits
    if policy == "raise":
        with pytest.raises(NonFiniteError) as error:
            opt.step()
        assert error.value.tasks == [1]
    else:
        opt.step()
        assert opt._n_skipped == 1
    for p, q in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(device.look(p), q)


def test_an_independent_batch_is_looked_at_too(device: Accelerator) -> None:
    model = device.put(make("Plain"))
    batch = device.put(model.batch())
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), _Pair())
    other = _infinite(model.losses(batch), model)
    with pytest.raises(NonFiniteError) as error:
        _backward(model, batch, opt, independent=[other])
    assert error.value.tasks == [1]


# The Jacobian routine.


@pytest.mark.parametrize("name", ZOO)
def test_the_jacobian_routine_moves_nothing(device: Accelerator, name: str) -> None:
    model = device.put(make(name))
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = model.losses(device.put(model.batch()))
    rows, other = Rows(), Rows()
    with device.watched() as seen:
        roots = [(l, torch.ones_like(l)) for l in losses]
        rows.take(roots, parameters, retain_graph=True)
        rows.pending = True
        rows.take(roots, parameters, retain_graph=True)
        other.take(roots, parameters, sit_out=frozenset([0]) if len(losses) > 1 else frozenset())
        gramian(rows.jacobian, exact=True)
        cross_gramian(rows.jacobian, other.jacobian)
        rows.head_extremes()
        rows.columns(parameters)
        rows.mix([rows, other], [0.5, 0.5], [0.5, 0.5])
        w = gramian(rows.jacobian).sum(1)
        rows.deliver(combine(w, rows.jacobian), [0.5] * len(losses))
    assert not [*seen.down, *seen.up, *seen.reads]
    assert any(p.grad is not None for p in parameters)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [5, WIDE, (1 << 18) + 1])
def test_gramian_and_combination_move_nothing(
    device: Accelerator, width: int, dtype: torch.dtype
) -> None:
    j = torch.randn(2, width, device="cuda").to(dtype)
    with device.watched() as seen:
        combine(gramian(j).sum(1), j)
        gramian(j, exact=True)
    assert not [*seen.down, *seen.up, *seen.reads]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2, 3000])
def test_the_jacobian_routine_without_data(width: int, dtype: torch.dtype) -> None:
    """Fake tensors have no data: a read of them is an error."""
    with FakeTensorMode():
        trunk = nn.Linear(width, width, dtype=dtype)
        heads = [nn.Linear(width, 1, dtype=dtype) for _ in range(3)]
        parameters = [*trunk.parameters(), *(p for head in heads for p in head.parameters())]
        z = trunk(torch.ones(4, width, dtype=dtype)).tanh()
        losses = [head(z).square().mean() for head in heads]
        rows = Rows()
        rows.take([(l, torch.ones_like(l)) for l in losses], parameters)
        g = gramian(rows.jacobian)
        with pytest.raises(DataDependentOutputException):
            g[0, 0].item()
        direction = combine(g.sum(1), rows.jacobian)
        extremes = rows.head_extremes()
        rows.deliver(direction, [1.0, 0.5, None])
    n_shared = width * (width + 1)
    assert (rows.jacobian.shape, rows.jacobian.dtype) == ((3, n_shared), dtype)
    assert (g.shape, g.dtype) == ((3, 3), torch.float64)
    assert (direction.shape, direction.dtype) == ((n_shared,), dtype)
    assert extremes.shape == (3,)
    for p in parameters[:-2]:
        assert (p.grad.shape, p.grad.dtype) == (p.shape, p.dtype)
    assert [p.grad for p in parameters[-2:]] == [None, None]


# Parameters of a method's own do not go to "meta" from another device.
WITHOUT_OWN = [name for name in SCALARIZERS if not gradbal.create(name).parameters()]


@pytest.mark.parametrize("aggregator", WITHOUT_OWN)
def test_a_scalarizer_needs_no_data(aggregator: str) -> None:
    """On the device "meta" there is none, and a read is an error."""
    model = make("Plain").to("meta")
    opt = optimizer(model, aggregator)
    for how in ({}, {"accumulate": True}, {}):
        _backward(model, model.batch().to("meta"), opt, **how)
    assert all(p.grad.shape == p.shape for p in model.parameters())


# How much is done beside the passes.

FREE = {"alias", "as_strided", "detach", "expand", "select", "slice", "split_with_sizes", "t"}
FREE |= {"transpose", "unbind", "unsqueeze", "view", "new_empty_strided"}


def _kernels(seen: Traffic) -> Counter[str]:
    """Operators that compute or copy, by name."""
    names = Counter(name.split(".")[1] for name in seen.operators)
    return Counter({name: n for name, n in names.items() if name not in FREE})


def test_few_operators_beside_the_passes(device: Accelerator) -> None:
    model = device.put(make("Plain").float())
    parameters = list(model.parameters())
    opt = optimizer(model, "mgda")
    for _ in range(2):
        opt.zero_grad()
        losses = model.losses(device.put(torch.randn(6, 4)))
        with device.watched() as passes:
            for l in losses:
                torch.autograd.grad(l, parameters, retain_graph=True, allow_unused=True)
        with device.watched() as seen:
            opt.backward(losses)
    extra = _kernels(seen)
    extra.subtract(_kernels(passes))
    # Every gradient is copied when it is delivered, as autograd does with one that others hold.
    assert extra["copy_"] <= len(parameters)
    assert extra.total() <= len(parameters) + 24
