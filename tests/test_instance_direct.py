"""jacobian="instance" in one pass, once a graph is known: against one plain pass an instance."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradbal
from gradbal.jacobian import Instance, held, instance
from tests.test_instance import (
    CASES,
    KNOWS_SHAPES,
    B,
    Case,
    _NoReads,
    assert_close,
    assert_step,
    drawn_apart,
    gradient,
    make,
    optimizer,
    rows_of,
)

pytestmark = pytest.mark.skipif(
    not KNOWS_SHAPES, reason="torch 2.4 does not tell the shapes that this goes by"
)

ONE_PASS = [
    "ChannelsLast",
    "Convolutions",
    "Dropout",
    "FlattenedSequences",
    "FrozenWeight",
    "LongSequences",
    "Mean",
    "NeighbouringViews",
    "NoBias",
    "OtherDimensions",
    "Perceptron",
    "Sequences",
    "SequencesFirst",
    "Single",
    "SingleConvolutions",
    "Table",
]
"""Cases whose operations tell that instances stay apart, and whose parameters are all in layers."""


class _Table(Case):
    """Not among the cases of the other file."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4, padding_idx=1)
        self.head = nn.Linear(4, 1)

    def batch(self) -> Tensor:
        return torch.tensor([[0, 3], [3, 3], [1, 0], [2, 1], [4, 2], [2, 3]])

    def losses(self, batch: Tensor) -> Tensor:
        return drawn_apart(self.head(torch.tanh(self.table(batch))))


def made(name: str) -> Case:
    if name != "Table":
        return make(name)
    torch.manual_seed(3)
    return _Table().double()


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each step was one of a single pass."""
    seen: list[bool] = []
    take = Instance.take

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = take(*args, **kwargs)
        seen.append(found.direct)
        return found

    monkeypatch.setattr(Instance, "take", watched)
    return seen


def acquainted(
    model: Case, *args: Any, losses: Callable[[], Tensor] | None = None, **options: Any
) -> gradbal.MultiTaskOptimizer:
    """An optimizer that knows the graph: its next step is one of a single pass."""
    opt = optimizer(model, *args, **options)
    for _ in range(2):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()) if losses is None else losses())
    opt.zero_grad()
    return opt


@pytest.mark.parametrize("name", ONE_PASS)
def test_gradients_are_those_of_plain_autograd(name: str, direct: list[bool]) -> None:
    model = made(name)
    batch = model.batch()
    opt = optimizer(model)
    for step in range(7):
        # Other data at each step, in the same graph.
        turned = batch.roll(step, 0)
        assert_step(model, opt, lambda turned=turned: model.losses(turned), model.tolerance)
    assert direct == [False, False, True, False, True, True, True]


@pytest.mark.parametrize("name", [name for name in CASES if name not in [*ONE_PASS, "Autocast"]])
def test_other_graphs_have_two_passes(name: str, direct: list[bool]) -> None:
    model = made(name)
    opt = optimizer(model)
    for _ in range(3):
        try:
            opt.backward(model.losses(model.batch()))
        except ValueError:
            break
    assert not any(direct)


def test_half_precision(direct: list[bool]) -> None:
    # The rows of plain autograd are rounded to bfloat16 at every layer.
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).bfloat16()
    twin = copy.deepcopy(model).double()
    batch = torch.randn(B, 4)
    opt = optimizer(model, "imtl_g")
    for _ in range(3):
        rows = rows_of(twin, drawn_apart(twin(batch.double())))
        opt.zero_grad()
        opt.backward(drawn_apart(model(batch.bfloat16()).float()))
        assert opt.weights is not None
        assert_close(gradient(model), opt.weights.double() @ rows, 3e-2)
    assert direct == [False, False, True]


def test_one_step_in_so_many_has_two_passes(direct: list[bool]) -> None:
    model = made("Perceptron")
    opt = optimizer(model)
    for _ in range(70):
        opt.backward(model.losses(model.batch()))
    twice = [step for step, is_direct in enumerate(direct, 1) if not is_direct]
    # Those at which rows are looked at, and every sixteenth of the others.
    assert twice == [1, 2, 4, 8, 16, 21, 32, 38, 54, 64]


def test_gradients_that_differ_from_a_second_pass_are_not_used(
    direct: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    combined = held.Held.combined

    def off(*args: Any) -> list[tuple[Tensor, Tensor]]:
        (p, first), *others = combined(*args)
        return [(p, 1.001 * first), *others]

    monkeypatch.setattr(held.Held, "combined", off)
    model = made("Sequences")
    opt = optimizer(model)
    for _ in range(9):
        assert_step(model, opt, lambda: model.losses(model.batch()), 1e-9)
    assert not any(direct)


def test_a_parameter_that_is_forgotten_is_noticed(
    direct: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    combined = held.Held.combined
    monkeypatch.setattr(held.Held, "combined", lambda *args: combined(*args)[1:])
    model = made("Sequences")
    opt = optimizer(model)
    for _ in range(3):
        assert_step(model, opt, lambda: model.losses(model.batch()), 1e-9)
    assert not any(direct)


def test_gradients_that_do_not_agree_with_the_gramian_are_not_delivered(
    direct: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made("Sequences")
    opt = acquainted(model)
    combined = Instance.combined
    monkeypatch.setattr(
        Instance, "combined", lambda *args: [(p, 2.0 * g) for p, g in combined(*args)]
    )
    with pytest.raises(ValueError, match="instances must not mix"):
        opt.backward(model.losses(model.batch()))
    assert direct[-1]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("n_before", [2, 4, 6])
@pytest.mark.parametrize("how", ["mean", "order"])
def test_instances_that_meet_unseen_are_found_at_once(how: str, n_before: int) -> None:
    model = made("Sequences")
    batch, off = model.batch(), torch.zeros((), dtype=torch.float64)
    order = torch.eye(B, dtype=torch.float64)
    opt = optimizer(model)

    def losses() -> Tensor:
        z = model.layers(batch).flatten(1)
        if how == "mean":
            return drawn_apart(z + off * z.mean(0))
        return (order * z.square().sum(1)).sum(1)

    for _ in range(n_before):
        opt.backward(losses())
    opt.zero_grad()
    off.fill_(0.5)
    order = order.roll(1, 0)
    with pytest.raises(ValueError, match="instances must not mix"):
        opt.backward(losses())
    assert all(p.grad is None for p in model.parameters())


# Delivery.


def test_hooks_on_parameters_run_once(direct: list[bool]) -> None:
    model = made("Sequences")
    opt = acquainted(model)
    weight = model.layers[0].weight
    rows = rows_of(model, model.losses(model.batch()))
    heard: list[str] = []
    weight.register_hook(lambda g: heard.append("gradient") or 3.0 * g)
    weight.register_post_accumulate_grad_hook(lambda p: heard.append("accumulated"))
    opt.backward(model.losses(model.batch()))
    assert opt.weights is not None
    wanted = opt.weights @ rows
    wanted[: weight.numel()] *= 3.0
    assert direct[-1]
    assert heard == ["gradient", "accumulated"]
    assert_close(gradient(model), wanted, 1e-9)


def test_gradients_are_added_to_what_is_there(direct: list[bool]) -> None:
    model = made("Sequences")
    opt = acquainted(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {p: p.grad for p in model.parameters()}
    rows = rows_of(model, model.losses(model.batch()))
    opt.backward(model.losses(model.batch()))
    assert opt.weights is not None
    assert direct[-1]
    assert_close(gradient(model), 1.0 + opt.weights @ rows, 1e-9)
    # As an ordinary backward pass does, into the memory that is there.
    assert all(p.grad is before[p] for p in model.parameters())


def test_gradients_are_nobody_elses(direct: list[bool]) -> None:
    model = made("Sequences")
    opt = acquainted(model)
    opt.backward(model.losses(model.batch()))
    assert direct[-1]
    places = [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]
    assert len(set(places)) == len(places) == len(list(model.parameters()))
    once = gradient(model)
    model.layers[0].bias.grad.mul_(5.0)
    n = model.layers[0].weight.numel()
    assert torch.equal(gradient(model)[:n], once[:n])


@pytest.mark.parametrize("heads", ["own", "weighted"])
def test_other_parameters_than_the_shared_ones(heads: str, direct: list[bool]) -> None:
    model = made("Perceptron")
    shared = list(model.layers[0].parameters())
    opt = acquainted(model, shared_params=shared, heads=heads)
    rows = rows_of(model, model.losses(model.batch()))
    n = sum(p.numel() for p in shared)
    w = opt.aggregator.weights(rows[:, :n] @ rows[:, :n].T)
    others = w if heads == "weighted" else torch.ones_like(w)
    opt.backward(model.losses(model.batch()))
    assert direct[-1]
    assert_close(gradient(model), torch.cat([w @ rows[:, :n], others @ rows[:, n:]]), 1e-9)


def test_loss_scale_and_logarithms(direct: list[bool]) -> None:
    model = made("Sequences")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = optimizer(model, loss_transform="log")
    for _ in range(3):
        rows = rows_of(model, model.losses(model.batch()).log())
        opt.zero_grad()
        opt.backward(model.losses(model.batch()), grad_scaler=scaler)
        assert opt.gramian is not None
        assert_close(opt.gramian, rows @ rows.T, 1e-9)
        assert_close(gradient(model), 64.0 * opt.aggregator.direction(rows), 1e-7)
    assert direct[-1]


@pytest.mark.parametrize(
    "name", ["Perceptron", "Convolutions", "Sequences", "LongSequences", "OtherDimensions", "Table"]
)
def test_instances_that_are_not_finite_are_left_out(name: str, direct: list[bool]) -> None:
    model = made(name)
    batch, factors = model.batch(), torch.ones(B, dtype=torch.float64)
    if batch.is_floating_point():
        batch[[1, 4]] = float("nan")
    factors[[1, 4]] = float("nan")
    good = [0, 2, 3, 5]
    ones = torch.ones_like(factors)
    opt = acquainted(model, nonfinite="drop", losses=lambda: model.losses(model.batch()) * ones)
    rows = rows_of(model, model.losses(model.batch()))[good]
    wanted = opt.aggregator.weights(rows @ rows.T) @ rows
    opt.backward(model.losses(batch) * factors)
    assert direct[-1]
    assert_close(gradient(model), wanted, 1e-6)
    assert opt.diagnostics()["dropped"] == {1: 1, 4: 1}


def test_a_gradient_that_is_not_finite_changes_nothing(direct: list[bool]) -> None:
    model = made("Perceptron")
    batch, origin = model.batch(), torch.zeros(5, dtype=torch.float64)

    def losses() -> Tensor:
        z = model.layers[0](batch)
        return drawn_apart(model.layers[1:](z)) + (z - origin).square().sum(1).sqrt()

    opt = acquainted(model, losses=losses)
    # The root has no derivative at zero.
    origin = model.layers[0](batch).detach()[2]
    with pytest.raises(gradbal.NonFiniteError) as error:
        opt.backward(losses())
    assert direct[-1]
    assert error.value.tasks == [2]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("scale", [1e-25, 1e22])
@pytest.mark.parametrize("name", ["Single", "SingleConvolutions"])
def test_squares_beyond_float32(name: str, scale: float, direct: list[bool]) -> None:
    model = made(name)
    opt = acquainted(model, "imtl_g", losses=lambda: model.losses(model.batch()) * 1.0)
    rows = rows_of(model, model.losses(model.batch()) * scale)
    opt.backward(model.losses(model.batch()) * scale)
    assert direct[-1]
    assert opt.gramian is not None
    assert opt.weights is not None
    assert_close(opt.gramian, rows @ rows.T, 1e-6)
    assert_close(gradient(model), opt.weights.double() @ rows, 1e-5)


# The graph.


def test_the_graph_is_kept_if_that_is_asked_for(direct: list[bool]) -> None:
    model = made("Convolutions")
    opt = acquainted(model)
    losses = model.losses(model.batch())
    wanted = rows_of(model, losses).sum(0)
    opt.backward(losses, retain_graph=True)
    assert direct[-1]
    opt.zero_grad()
    losses.sum().backward()
    assert_close(gradient(model), wanted, 1e-9)


def test_the_graph_is_freed(direct: list[bool]) -> None:
    model = made("Convolutions")
    opt = acquainted(model)
    losses = model.losses(model.batch())
    opt.backward(losses)
    assert direct[-1]
    with pytest.raises(RuntimeError, match="second time"):
        losses.sum().backward()


def test_nothing_of_a_step_is_kept(direct: list[bool]) -> None:
    model = made("Perceptron")
    opt = acquainted(model)
    z = model.layers[:2](model.batch())
    alive = weakref.ref(z)
    seen: list[weakref.ref[Tensor]] = []
    z.register_hook(lambda g: seen.append(weakref.ref(g)))
    opt.backward(drawn_apart(model.layers[2](z)))
    del z
    gc.collect()
    assert direct[-1]
    assert alive() is None
    assert [gradient() for gradient in seen] == [None]


def test_layers_that_hide_what_they_have_saved(direct: list[bool]) -> None:
    model = made("Sequences")
    opt = acquainted(model)

    def hidden() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
            return model.losses(model.batch())

    for _ in range(3):
        assert_step(model, opt, hidden, 1e-9)
    assert not any(direct[2:])


def test_hooks_on_inner_tensors_that_treat_each_row_by_itself(direct: list[bool]) -> None:
    model = made("Perceptron")
    opt = optimizer(model)

    def reversed_gradients() -> Tensor:
        z = model.layers[:2](model.batch())
        z.register_hook(lambda g: -0.5 * g)
        return drawn_apart(model.layers[2](z))

    for _ in range(4):
        assert_step(model, opt, reversed_gradients, 1e-9)
    assert direct[2]


def test_hooks_on_inner_tensors_that_mix_rows_are_refused_where_rows_are_looked_at() -> None:
    model = made("Perceptron")
    z = model.layers[:2](model.batch())
    z.register_hook(lambda g: g - g.mean(0))
    with pytest.raises(ValueError, match="instances must not mix"):
        optimizer(model).backward(drawn_apart(model.layers[2](z)))


def test_batches_of_several_sizes(direct: list[bool]) -> None:
    model = made("Convolutions")
    batch = model.batch()
    opt = optimizer(model)
    for size in (B, B, B, 3, 3, 3, 1, B):
        assert_step(model, opt, lambda size=size: drawn_apart(model.layers(batch[:size])), 1e-9)
    assert direct == [False, False, True, False, False, True, False, False]


def test_squares_of_many_entries_add_up() -> None:
    # In float32 alone equal entries are off by 4e-3 here.
    like = torch.zeros((), dtype=torch.float64)
    tensors = [torch.full((10_000_001,), 1.1), torch.full((3, 5), 2.0), torch.tensor(3.0)]
    found = instance._square(tensors, like, exact=False)
    wanted = sum(float(t.double().square().sum()) for t in tensors)
    assert abs(float(found) / wanted - 1.0) < 1e-5


# Where nothing is waited for. Tensors of a pretended device are of a subclass, with which no layer
# is found, so it is the question for the device that is answered otherwise.


def test_an_accelerators_checks_are_read_before_a_step_of_one_pass(
    direct: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance, "_on_host", lambda tensor: False)
    model = made("Perceptron")
    opt = optimizer(model)
    for _ in range(13):
        assert_step(model, opt, lambda: model.losses(model.batch()), 1e-9)
    # After a check comes a step that reads it, with two passes so that it can look.
    twice = [step for step, is_direct in enumerate(direct, 1) if not is_direct]
    assert twice == [1, 2, 3, 4, 5, 8, 9]


def test_an_accelerators_gradients_that_differ_are_not_used(
    direct: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance, "_on_host", lambda tensor: False)
    combined = held.Held.combined

    def off(*args: Any) -> list[tuple[Tensor, Tensor]]:
        (p, first), *others = combined(*args)
        return [(p, 1.2 * first), *others]

    monkeypatch.setattr(held.Held, "combined", off)
    model = made("Sequences")
    opt = optimizer(model)
    for _ in range(9):
        assert_step(model, opt, lambda: model.losses(model.batch()), 1e-9)
    assert not any(direct)


def test_an_accelerators_step_of_one_pass_reads_nothing_more(
    direct: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance, "_on_host", lambda tensor: False)
    model = made("Convolutions")
    batch, ones = model.batch(), torch.ones(B, dtype=torch.float64)
    engine, parameters = Instance(), list(model.parameters())
    for step in range(1, 8):
        losses = model.losses(batch)
        with _NoReads() if step in (3, 5, 6, 7) else contextlib.nullcontext():
            found = engine.take(losses, ones, parameters, None, frozenset())
            pairs = list(
                zip(parameters, torch.autograd.grad(losses, parameters, ones), strict=True)
            )
            if found.direct:
                pairs = engine.combined(found, ones, ones, frozenset())
            engine.check(found, ones, ones, pairs, compare=not found.direct)
    assert direct == [False] * 5 + [True] * 2
