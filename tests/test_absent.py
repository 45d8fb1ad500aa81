"""None among the losses: the task is absent from the batch, sits out, and its state waits."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import gradbal
from gradbal import MultiTaskOptimizer
from tests.gradients import assert_gradients, expected, task_gradients
from tests.states import assert_same, entry, fresh, snapshot, trained
from tests.zoo import METHODS, Plain, fits, make, optimizer, takes, targets

ENGINES = ("auto", "loop", "vmap", "gramian", "sketch")
IN_TURN = ("auto", "loop", "vmap")
"""Engines that losses given as functions can be trained with."""


def _without(losses: list[Any], *tasks: int) -> list[Any]:
    return [None if i in tasks else loss for i, loss in enumerate(losses)]


def _functions(model: Plain) -> list[Any]:
    """Each with a graph of its own."""

    def one(head: nn.Module, i: int) -> Tensor:
        return (head(model.trunk(model.batch())) - (-2.0) ** i).square().mean() + 1

    return [lambda head=head, i=i: one(head, i) for i, head in enumerate(model.heads)]


def _options(aggregator: str, heads: str) -> dict[str, Any]:
    known = gradbal.info(aggregator).hyperparameters
    options: dict[str, Any] = {"heads": heads} if takes(aggregator, heads=heads) else {}
    if "generator" in known:
        options["generator"] = torch.Generator().manual_seed(4)
    return options


def _assert_as_without(model: nn.Module, opt: MultiTaskOptimizer, alone: Any, other: Any) -> None:
    """Task 1 has sat out: everything is as in a run of tasks 0 and 2."""
    for n, p in model.named_parameters():
        want = alone.get_parameter(n).grad
        assert (p.grad is None) == (want is None), n
        if want is not None:
            torch.testing.assert_close(p.grad, want, rtol=1e-9, atol=1e-12, msg=n)
    assert (opt.weights is None) == (other.weights is None)
    if other.weights is not None:
        torch.testing.assert_close(opt.weights[[0, 2]], other.weights, rtol=1e-9, atol=0)
        assert float(opt.weights[1]) == 0
    assert opt.losses.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(opt.losses[[0, 2]], other.losses, rtol=0, atol=0)


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "drop"])
@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("aggregator", METHODS)
def test_the_first_step_is_that_of_the_other_tasks(
    aggregator: str, heads: str, nonfinite: str
) -> None:
    options = _options(aggregator, heads)
    alone, other = fresh(aggregator, **copy.deepcopy(options))
    other.backward([l for l in _without(alone.losses(alone.batch()), 1) if l is not None])
    model, opt = fresh(aggregator, nonfinite=nonfinite, **options)
    opt.backward(_without(model.losses(model.batch()), 1))
    _assert_as_without(model, opt, alone, other)
    told = opt.diagnostics()
    assert told["absent"] == {1: 1}
    assert told["dropped"] == {}
    assert told["skipped"] == 0
    assert told["tasks"] == [0, 1, 2]


@pytest.mark.parametrize("jacobian", ENGINES)
def test_every_engine_leaves_the_task_out(jacobian: str) -> None:
    model = make("Plain")
    opt = optimizer(model, "upgrad", jacobian=jacobian)
    # Who is absent changes; what is absent first is known later, and the other way round.
    for absent in ((1,), (), (0, 2), (2,), (0,), ()):
        there = [i for i in range(3) if i not in absent]
        pick = lambda twin, there=there: [twin.losses(twin.batch())[i] for i in there]  # noqa: E731
        rows, values = task_gradients(model, pick)
        trunk = {n for n, _ in model.named_parameters() if n.startswith("trunk")}
        want = expected(copy.deepcopy(opt.aggregator), rows, values, "own")
        if len(there) == 1:
            # A head that one task reaches is not shared because the others are absent.
            want = {n: g for row in rows for n, g in row.items()}
            assert trunk < want.keys()
        opt.zero_grad()
        opt.backward(_without(model.losses(model.batch()), *absent))
        assert_gradients(model, want, 1e-12)
        assert opt.gramian is not None
        assert not bool(opt.gramian[list(absent)].any())
        opt.step()
    assert opt.diagnostics()["absent"] == {0: 2, 1: 1, 2: 2}


@pytest.mark.parametrize("form", ["list", "tuple", "dict"])
@pytest.mark.parametrize("aggregator", ["uw", "upgrad"])
def test_forms(aggregator: str, form: str) -> None:
    alone, other = fresh(aggregator)
    other.backward([l for l in _without(alone.losses(alone.batch()), 1) if l is not None])
    model, opt = fresh(aggregator)
    losses: Any = _without(model.losses(model.batch()), 1)
    if form == "tuple":
        losses = tuple(losses)
    if form == "dict":
        losses = dict(zip("abc", losses, strict=True))
    opt.backward(losses)
    _assert_as_without(model, opt, alone, other)
    assert opt.diagnostics()["absent"] == {"b" if form == "dict" else 1: 1}


@pytest.mark.parametrize("jacobian", IN_TURN)
@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("aggregator", ["mean", "uw", "upgrad", "rlw", "dwa", "pcgrad"])
def test_functions(aggregator: str, heads: str, jacobian: str) -> None:
    options = _options(aggregator, heads)
    model, opt = fresh(aggregator, jacobian=jacobian, **copy.deepcopy(options))
    twin, other = fresh(aggregator, jacobian=jacobian, **options)
    for absent in ((0,), (1,), (), (0, 2)):
        opt.zero_grad(), other.zero_grad()
        opt.backward(_without(_functions(model), *absent))
        other.backward(_without([f() for f in _functions(twin)], *absent))
        for n, p in model.named_parameters():
            want = twin.get_parameter(n).grad
            assert (p.grad is None) == (want is None), n
            if want is not None:
                torch.testing.assert_close(p.grad, want, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(opt.losses, other.losses, rtol=0, atol=0, equal_nan=True)
        opt.step(), other.step()
    assert opt.diagnostics()["absent"] == {0: 2, 1: 1, 2: 1}


@pytest.mark.parametrize("aggregator", METHODS)
def test_a_task_that_comes_now_and_then(aggregator: str) -> None:
    model, opt = fresh(aggregator, heads="own")
    for k in range(6):
        opt.zero_grad()
        opt.backward(_without(model.losses(model.batch()), *((1,) if k % 2 else ())))
        head = model.heads[1].weight
        if gradbal.info(aggregator).hyperparameters.get("per_step") is None:
            assert (head.grad is not None) == (k % 2 == 0)
        opt.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert opt.diagnostics()["absent"] == {1: 3}
    assert opt.diagnostics()["steps"] == 6


@pytest.mark.parametrize("empty", [[None] * 3, (None,) * 3, {0: None, 1: None, 2: None}])
@pytest.mark.parametrize("make_one", [fresh, trained])
@pytest.mark.parametrize("aggregator", ["uw", "upgrad"])
def test_none_for_all_is_refused(aggregator: str, make_one: Any, empty: Any) -> None:
    model, opt = make_one(aggregator)
    before = snapshot(model, opt)
    with pytest.raises(ValueError, match=r"at least one loss must be there, found None for all 3"):
        opt.backward(empty)
    assert_same(snapshot(model, opt), before)


@pytest.mark.parametrize("aggregator", ["uw", "upgrad"])
@pytest.mark.parametrize("nonfinite", ["skip", "drop"])
def test_beside_a_loss_that_is_not_finite(aggregator: str, nonfinite: str) -> None:
    model, opt = fresh(aggregator, nonfinite=nonfinite)
    losses = _without(model.losses(model.batch()), 1)
    losses[0] = losses[0] * float("nan")
    opt.backward(losses)
    told = opt.diagnostics()
    if nonfinite == "skip":
        assert told["skipped"] == 1
        assert told["absent"] == {}
    else:
        assert told["absent"] == {1: 1}
        assert told["dropped"] == {0: 1}
        assert bool(model.heads[2].weight.grad.isfinite().all())
    losses = _without(model.losses(model.batch()), 1, 2)
    losses[0] = losses[0] * float("nan")
    opt.backward(losses)
    # Nobody is left.
    assert opt.diagnostics()["skipped"] == (2 if nonfinite == "skip" else 1)


@pytest.mark.parametrize("aggregator", ["uw", "upgrad", "graddrop"])
def test_absence_is_no_error_to_raise(aggregator: str) -> None:
    model, opt = fresh(aggregator, nonfinite="raise")
    losses = _without(model.losses(model.batch()), 1)
    losses[0] = losses[0] * float("nan")
    with pytest.raises(gradbal.NonFiniteError) as caught:
        opt.backward(losses)
    assert caught.value.tasks == [0]


# Micro-batches: a task takes part with those that it is in.


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("aggregator", ["mean", "rlw", "uw", "upgrad", "pcgrad", "moco"])
@pytest.mark.parametrize("absent", [((1,), ()), ((), (1,)), ((1,), (0,)), ((1,), (1,))])
def test_micro_batches(aggregator: str, heads: str, lazy: bool, absent: Any) -> None:
    options = _options(aggregator, heads)
    model, opt = fresh(aggregator, **copy.deepcopy(options))
    twin, other = fresh(aggregator, **options)
    # The same sums at once, of the batches that each task is in.
    counts = [sum(i not in batch for batch in absent) for i in range(3)]
    whole = twin.losses(twin.batch())
    other.backward([l * n if n else None for l, n in zip(whole, counts, strict=True)])
    for k, batch in enumerate(absent):
        losses = _functions(model) if lazy else model.losses(model.batch())
        opt.backward(_without(losses, *batch), accumulate=k == 0)
    for n, p in model.named_parameters():
        want = twin.get_parameter(n).grad
        assert (p.grad is None) == (want is None), n
        if want is not None:
            torch.testing.assert_close(p.grad, want, rtol=1e-9, atol=1e-12, msg=n)
    torch.testing.assert_close(opt.losses, other.losses, equal_nan=True)
    assert opt.diagnostics()["absent"] == other.diagnostics()["absent"]


def test_a_checkpoint_between_micro_batches() -> None:
    model, opt = fresh("upgrad")
    opt.backward(_without(model.losses(model.batch()), 1), accumulate=True)
    twin, other = fresh("upgrad")
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(opt.state_dict())
    for m, o in ((model, opt), (twin, other)):
        o.backward(_without(m.losses(m.batch()), 0))
        o.step()
    assert_same(snapshot(model, opt), snapshot(twin, other))
    assert opt.diagnostics()["absent"] == {}


# What an absent task reaches.


class _Pair(nn.Module):
    """A layer of tasks 0 and 1 alone, behind one of all three."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.both = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
        self.heads = nn.ModuleList(nn.Linear(3, 1).double() for _ in range(3))

    def losses(self, form: str) -> list[Any]:
        x = torch.ones(4, 3, dtype=torch.float64)

        def one(i: int) -> Tensor:
            z = torch.tanh(self.trunk(x))
            z = z if i == 2 else torch.tanh(self.both(z))
            return targets([z, z, self.heads[i](z)])[2] * (1.0 + i)

        return [(lambda i=i: one(i)) if form == "functions" else one(i) for i in range(3)]


def _pair(aggregator: str, **options: Any) -> tuple[_Pair, MultiTaskOptimizer]:
    torch.manual_seed(2)
    model = _Pair()
    return model, optimizer(model, aggregator, heads="own", **options)


CASES = [("upgrad", engine, "list") for engine in ENGINES]
CASES += [("upgrad", engine, "functions") for engine in IN_TURN]
CASES += [("constant", "loop", form) for form in ("list", "functions")]


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(("aggregator", "jacobian", "form"), CASES)
def test_what_it_reached_before_stays_shared(
    aggregator: str, jacobian: str, form: str, resumed: bool
) -> None:
    """Task 1 is absent: `both` has one task left, and is still no head."""
    extra = {"weights": [0.2, 0.3, 0.5]} if aggregator == "constant" else {}
    model, opt = _pair(aggregator, jacobian=jacobian, **extra)
    opt.backward(model.losses(form))
    if resumed:
        saved = opt.state_dict()
        model, opt = _pair(aggregator, jacobian=jacobian, **extra)
        opt.load_state_dict(saved)
    opt.zero_grad()
    opt.backward(_without(model.losses(form), 1))
    assert opt.weights is not None
    loss = model.losses("list")[0]
    (plain,) = torch.autograd.grad(loss, [model.both.weight])
    w = float(opt.weights[0])
    assert 0.1 < w < 0.9
    torch.testing.assert_close(model.both.weight.grad, w * plain)
    # Where it was never there, nobody knows.
    model, opt = _pair(aggregator, jacobian=jacobian, **extra)
    opt.backward(_without(model.losses(form), 1))
    torch.testing.assert_close(model.both.weight.grad, plain)
    # And now that it comes, somebody does.
    opt.zero_grad()
    opt.backward(model.losses(form))
    losses = model.losses("list")
    rows = [torch.autograd.grad(losses[i], model.both.weight)[0] for i in (0, 1)]
    want = opt.weights[0] * rows[0] + opt.weights[1] * rows[1]
    torch.testing.assert_close(model.both.weight.grad, want)


@pytest.mark.parametrize("jacobian", ENGINES)
def test_what_absent_tasks_alone_reach_gets_nothing(jacobian: str) -> None:
    model, opt = _pair("upgrad", jacobian=jacobian)
    for absent in ((), (0, 1), ()):
        opt.zero_grad()
        opt.backward(_without(model.losses("list"), *absent))
        assert (model.both.weight.grad is None) == (absent == (0, 1))


def test_the_layout_does_not_change_from_step_to_step() -> None:
    model, opt = _pair("upgrad", jacobian="loop")
    opt.backward(model.losses("list"))
    buffer = opt._balancer.rows.jacobian
    for absent in ((1,), (0,), (), (0, 1), (2,)):
        opt.backward(_without(model.losses("list"), *absent))
        assert opt._balancer.rows.jacobian is buffer


def test_a_changed_graph_beside_an_absent_task() -> None:
    model, opt = _pair("upgrad", jacobian="loop")
    opt.backward(model.losses("list"))
    opt.zero_grad()
    # Task 2 goes through `both` now, as tasks 0 and 1 have done.
    losses = model.losses("list")
    losses[2] = losses[2] + model.both.weight.square().sum()
    opt.backward(_without(losses, 1))
    assert opt._balancer.rows.reach[1] is not None
    torch.manual_seed(2)
    twin = _Pair()
    shared = [*twin.trunk.parameters(), *twin.both.parameters()]
    other = optimizer(twin, "upgrad", heads="own", shared_params=shared)
    losses = twin.losses("list")
    losses[2] = losses[2] + twin.both.weight.square().sum()
    other.backward([losses[0], losses[2]])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("aggregator", [m for m in METHODS if not fits(m, "ChangingGraph", None)])
def test_state_for_each_parameter_refuses_a_task_that_reaches_others(aggregator: str) -> None:
    torch.manual_seed(2)
    model = _Pair()
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), aggregator)
    opt.backward(_without(model.losses("list"), 1))
    with pytest.raises(ValueError, match=r"shared parameters must stay the same"):
        opt.backward(model.losses("list"))


# Weights that are used again.


@pytest.mark.parametrize("aggregator", ["upgrad", "rlw"])
def test_weights_are_computed_anew_when_a_task_comes(aggregator: str) -> None:
    model, opt = fresh(aggregator, update_every=10, **_options(aggregator, "own"))
    seen = []
    for absent in ((1,), (1,), (), (1,), ()):
        opt.zero_grad()
        opt.backward(_without(model.losses(model.batch()), *absent))
        opt.step()
        seen.append(opt.weights.clone())
    assert float(seen[0][1]) == float(seen[1][1]) == 0
    assert torch.equal(seen[0], seen[1])
    assert float(seen[2][1]) > 0
    # From then on they are of all tasks.
    assert torch.equal(seen[2], seen[3])
    assert torch.equal(seen[3], seen[4])


@pytest.mark.parametrize("lazy", [False, True])
def test_weights_that_are_used_again_do_without_the_task(lazy: bool) -> None:
    model, opt = fresh("upgrad", update_every=2, heads="own")
    opt.backward(model.losses(model.batch()))
    w = opt.weights.clone()
    opt.zero_grad()
    losses = model.losses(model.batch())
    weight = model.trunk[0].weight
    g = [torch.autograd.grad(losses[i], weight, retain_graph=True)[0] for i in (0, 2)]
    given = _functions(model) if lazy else losses
    opt.backward(_without(given, 1))
    torch.testing.assert_close(weight.grad, w[0] * g[0] + w[2] * g[1])
    assert model.heads[1].weight.grad is None


# Together with everything else that a step may have.


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("aggregator", ["mean", "uw", "upgrad", "graddrop"])
def test_grad_scaler(aggregator: str, lazy: bool) -> None:
    model, opt = fresh(aggregator, **_options(aggregator, "own"))
    twin, other = fresh(aggregator, **_options(aggregator, "own"))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = _functions(model) if lazy else model.losses(model.batch())
    opt.backward(_without(losses, 1), grad_scaler=scaler)
    other.backward(_without(twin.losses(twin.batch()), 1))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, 1024 * q.grad)
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 1024.0


@pytest.mark.parametrize("aggregator", ["mgda_ub", "aligned_mtl_ub", "upgrad"])
def test_features(aggregator: str) -> None:
    found = []
    for absent in (True, False):
        model = make("Plain")
        opt = optimizer(model, aggregator)
        z = model.trunk(model.batch())
        losses = targets([head(z) for head in model.heads])
        opt.backward(_without(losses, 1) if absent else [losses[0], losses[2]], features=z)
        assert model.heads[1].weight.grad is None
        found.append([model.trunk[0].weight.grad, model.heads[0].weight.grad])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("transform", ["mean", "uw", "upgrad"])
def test_loss_transform(transform: str) -> None:
    alone, other = fresh(transform, loss_transform="log")
    other.backward([l for l in _without(alone.losses(alone.batch()), 1) if l is not None])
    model, opt = fresh(transform, loss_transform="log")
    opt.backward(_without(model.losses(model.batch()), 1))
    _assert_as_without(model, opt, alone, other)


@pytest.mark.parametrize("aggregator", ["mean", "upgrad", "famo"])
def test_closures(aggregator: str) -> None:
    model, opt = fresh(aggregator)
    for absent in ((1,), (), (0,)):
        before = model.trunk[0].weight.detach().clone()
        opt.step(lambda absent=absent: _without(model.losses(model.batch()), *absent))
        assert not torch.equal(model.trunk[0].weight, before)
        assert bool(model.trunk[0].weight.isfinite().all())


def test_a_closure_that_is_asked_again() -> None:
    model = make("Plain")
    lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5, line_search_fn="strong_wolfe")
    opt = MultiTaskOptimizer(lbfgs, "mean")

    def losses() -> list[Any]:
        return _without(model.losses(model.batch()), 1)

    def total() -> float:
        return sum(l.item() for l in losses() if l is not None)

    first = total()
    opt.step(losses)
    assert total() < first


@pytest.mark.parametrize("aggregator", ["modo", "sdmgrad"])
def test_independent_batches_have_all_losses(aggregator: str) -> None:
    model, opt = fresh(aggregator)
    n = opt.aggregator.n_batches
    batches = [model.losses(model.batch()) for _ in range(n)]
    batches[-1] = _without(batches[-1], 1)
    before = snapshot(model, opt)
    with pytest.raises(ValueError, match=r"every loss must be there, found None for task 1"):
        opt.backward(batches[0], independent=batches[1:])
    assert_same(snapshot(model, opt), before)


@pytest.mark.parametrize("aggregator", ["moml", "auto_lambda", "forum"])
def test_methods_that_evaluate_again_have_all_losses(aggregator: str) -> None:
    model, opt = fresh(aggregator)
    before = copy.deepcopy(model.state_dict())

    def losses() -> list[Any]:
        return _without(model.losses(model.batch()), 1)

    with pytest.raises(ValueError, match=r"needs all losses at every step, found None"):
        opt.step(losses, losses)
    assert_same(model.state_dict(), before)


def test_a_checkpoint_counts_absence() -> None:
    model, opt = fresh("upgrad")
    opt.backward(_without(model.losses(model.batch()), 1))
    _, other = fresh("upgrad")
    other.load_state_dict(opt.state_dict())
    assert other.diagnostics()["absent"] == {1: 1}
    assert_same(entry(other), entry(opt))
