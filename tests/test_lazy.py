"""Losses given as functions, against the same losses as tensors and against plain autograd."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import gradbal
from gradbal import MultiTaskOptimizer, NonFiniteError
from gradbal.jacobian import Found
from tests.gradients import assert_gradients, expected, task_gradients
from tests.states import assert_same, fresh, snapshot, trained
from tests.zoo import METHODS, ZOO, Zoo, fits, keywords, make, optimizer, takes

NAN = float("nan")
SCALARIZERS = [name for name in METHODS if gradbal.info(name).kind == "scalarizer"]
KINDS = ["sum", "uw", "rlw", "gls", "upgrad", "graddrop", "m_config"]
"""Known weights, learned ones, random ones, weights of the losses, Gramian, Jacobian, turns."""

Functions = list[Callable[[], Tensor]]


def functions(model: Zoo, batch: Tensor) -> Functions:
    """One a task, each with a forward pass of its own."""
    return [lambda i=i: model.losses(batch)[i] for i in range(model.n_tasks)]


def evaluate(each: Functions) -> list[Tensor]:
    return [function() for function in each]


def compare(name: str, aggregator: str, heads: str | None, steps: int = 2) -> None:
    """Steps with functions against plain `autograd.grad` of the same losses."""
    model = make(name)
    batch = model.batch()
    opt = optimizer(model, aggregator, heads=heads)
    reference = copy.deepcopy(opt.aggregator)
    for _ in range(steps):
        if not getattr(reference, "per_parameter_state", False):
            reference = copy.deepcopy(opt.aggregator)
        rows, values = task_gradients(model, lambda twin: evaluate(functions(twin, batch)))
        opt.zero_grad()
        opt.backward(functions(model, batch))
        tolerance = max(model.rounding, model.tolerance)
        assert_gradients(model, expected(reference, rows, values, heads), tolerance)
        torch.testing.assert_close(opt.losses.double(), values, rtol=1e-6, atol=0)
        opt.step()


@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("aggregator", METHODS)
def test_gradients_of_every_method(aggregator: str, heads: str) -> None:
    if not fits(aggregator, "PartlyShared", heads):
        heads = gradbal.info(aggregator).promises.heads
    compare("PartlyShared", aggregator, heads)


@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("aggregator", ["sum", "gls", "upgrad"])
@pytest.mark.parametrize("name", ZOO)
def test_gradients_of_every_model(name: str, aggregator: str, heads: str) -> None:
    compare(name, aggregator, heads, steps=3 if name == "ChangingGraph" else 2)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"update_every": 2},
    {"loss_transform": "log"},
    {"match_sum": True},
    {"nonfinite": "skip"},
    {"nonfinite": "drop"},
]


def _pair(aggregator: str, **options: Any) -> list[tuple[Zoo, MultiTaskOptimizer]]:
    """Twice the same run, one for functions and one for tensors."""
    runs = []
    for _ in range(2):
        model = make("Plain")
        sgd = SGD(model.parameters(), lr=0.05, momentum=0.9)
        runs.append((model, MultiTaskOptimizer(sgd, aggregator, **keywords(aggregator) | options)))
    return runs


def _assert_close(runs: list[tuple[Zoo, MultiTaskOptimizer]]) -> None:
    (model, opt), (twin, other) = runs
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(opt.losses, other.losses)
    if other.weights is None:
        assert opt.weights is None
    else:
        torch.testing.assert_close(opt.weights, other.weights)
    for key in ("tasks", "steps", "skipped", "dropped"):
        assert opt.diagnostics()[key] == other.diagnostics()[key]
    for p, q in zip(opt.aggregator.parameters(), other.aggregator.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def _fits(aggregator: str, options: dict[str, Any]) -> bool:
    gain = gradbal.create(aggregator).promises.gain
    return takes(aggregator, **options) and not (
        options.get("match_sum") and (gain is None or aggregator not in ("mean", "upgrad", "mgda"))
    )


@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize(
    ("aggregator", "options"), [(m, o) for m in METHODS for o in OPTIONS if _fits(m, o)], ids=str
)
def test_runs_are_those_of_tensors(aggregator: str, options: dict[str, Any], heads: str) -> None:
    if takes(aggregator, heads=heads):
        options = {**options, "heads": heads}
    runs = _pair(aggregator, **options)
    for _ in range(4):
        for lazily, (model, opt) in zip((True, False), runs, strict=True):
            opt.zero_grad()
            each = functions(model, model.batch())
            opt.backward(each if lazily else evaluate(each))
            opt.step()
    _assert_close(runs)


@pytest.mark.parametrize("lazy_parts", [(True, True, True), (False, True, True), (True, False)])
@pytest.mark.parametrize("options", [{}, {"update_every": 2}, {"nonfinite": "drop"}], ids=str)
@pytest.mark.parametrize("aggregator", METHODS)
def test_micro_batches_add_up(
    aggregator: str, options: dict[str, Any], lazy_parts: tuple[bool, ...]
) -> None:
    if not takes(aggregator, **options):
        options = {}
    runs = _pair(aggregator, **options)
    for _ in range(2):
        for lazily, (model, opt) in zip((True, False), runs, strict=True):
            opt.zero_grad()
            chunks = model.batch().chunk(len(lazy_parts))
            for i, (part, is_lazy) in enumerate(zip(chunks, lazy_parts, strict=True)):
                each = functions(model, part)
                given = each if lazily and is_lazy else evaluate(each)
                opt.backward(given, accumulate=i < len(chunks) - 1)
            opt.step()
    _assert_close(runs)


@pytest.mark.parametrize("options", [{}, {"update_every": 2}], ids=str)
@pytest.mark.parametrize("aggregator", METHODS)
def test_a_scaled_run_is_that_of_tensors(aggregator: str, options: dict[str, Any]) -> None:
    if not takes(aggregator, **options):
        options = {}
    runs = _pair(aggregator, **options)
    for lazily, (model, opt) in zip((True, False), runs, strict=True):
        scaler = GradScaler("cpu", init_scale=1024.0)
        for _ in range(3):
            opt.zero_grad()
            each = functions(model, model.batch())
            opt.backward(each if lazily else evaluate(each), grad_scaler=scaler)
            scaler.step(opt)
            scaler.update()
    _assert_close(runs)


@pytest.mark.parametrize("aggregator", KINDS)
def test_an_overflow_is_the_scalers(aggregator: str) -> None:
    model, opt = trained(aggregator)
    before = copy.deepcopy(model.state_dict())
    scaler = GradScaler("cpu", init_scale=1024.0)
    opt.zero_grad()
    spoiled = [lambda: model.losses(model.batch())[0] * NAN, *functions(model, model.batch())[1:]]
    opt.backward(spoiled, grad_scaler=scaler)
    scaler.step(opt)
    scaler.update()
    assert_same(model.state_dict(), before)
    assert scaler.get_scale() == 512.0


# One task at a time.


class _Payload:
    """What the graph of one task holds on to."""


class _Holding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, payload: _Payload) -> Tensor:
        ctx.payload = payload
        return x * 1.0

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@pytest.mark.parametrize("how", ["step", "accumulate", "retain_graph"])
@pytest.mark.parametrize("options", [{}, {"update_every": 2}, {"nonfinite": "drop"}], ids=str)
@pytest.mark.parametrize("aggregator", KINDS)
def test_a_graph_is_dead_when_the_next_forward_starts(
    aggregator: str, options: dict[str, Any], how: str
) -> None:
    if not takes(aggregator, **options):
        options = {}
    model = make("Plain")
    opt = optimizer(model, aggregator, **options)
    payloads: list[weakref.ref[_Payload]] = []
    calls: list[int] = []

    def forward(i: int) -> Tensor:
        assert all(ref() is None for ref in payloads), "an earlier task's graph is alive"
        calls.append(i)
        payload = _Payload()
        payloads.append(weakref.ref(payload))
        z = _Holding.apply(model.trunk(model.batch()), payload)
        return (model.heads[i](z) - i).square().mean()

    gc.disable()
    try:
        for step in range(3):
            keep = {"accumulate": how == "accumulate" and step == 1}
            if how == "retain_graph":
                keep = {"retain_graph": True}
            opt.backward([lambda i=i: forward(i) for i in range(3)], **keep)
            assert payloads[-1]() is None
            if not keep.get("accumulate"):
                opt.step()
    finally:
        gc.enable()
    assert calls == [0, 1, 2] * 3, "each function is called once a step, in order"


def _peak(run: Callable[[], None]) -> int:
    """The most bytes of activations that graphs held at any time."""
    held, most = 0, 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal held, most
            self.tensor = tensor
            held += tensor.nbytes
            most = max(most, held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        run()
    return most


@pytest.mark.parametrize("aggregator", KINDS)
def test_activations_of_one_task_at_a_time(aggregator: str) -> None:
    layers = [layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.Tanh())]
    trunk = nn.Sequential(*layers)
    heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(4))
    model = nn.ModuleList([trunk, heads])
    opt = optimizer(model, aggregator)
    batches = torch.randn(4, 512, 16)
    each = [lambda i=i: heads[i](trunk(batches[i])).square().mean() + 1 for i in range(4)]
    one = _peak(lambda: each[0]())
    eager = _peak(lambda: opt.backward([function() for function in each]))
    lazy = [_peak(lambda: opt.backward(each)) for _ in range(2)]
    # Weights are saved as well, by reference: they are the same for all tasks.
    assert eager > 3.5 * one
    assert max(lazy) <= 1.01 * one


# What is refused, and what errors leave behind.


def _boom() -> Tensor:
    raise RuntimeError("the third forward fails")


def _changed_to(**entries: Any) -> Callable[[Functions], Any]:
    return lambda each: {**dict(zip("abc", each, strict=True)), **entries}


REFUSED: dict[str, tuple[type[Exception], str, Callable[[Functions], Any]]] = {
    "exception": (RuntimeError, "the third forward fails", lambda f: [*f[:2], _boom]),
    "no scalar": (ValueError, "task 2 must be a scalar", lambda f: [*f[:2], lambda: f[2]()[None]]),
    "no graph": (ValueError, "task 1 must have a graph", lambda f: [f[0], f[1]().detach, f[2]]),
    "no tensor": (TypeError, "task 2 must be a tensor, found float", lambda f: [*f[:2], float]),
    "None": (TypeError, "task 0 must be a tensor, found NoneType", lambda f: [print, *f[1:]]),
    "integer": (
        TypeError,
        "task 2 must be floating-point",
        lambda f: [*f[:2], lambda: torch.tensor(3)],
    ),
    "another device": (
        ValueError,
        "one device, found cpu and meta for task 1",
        lambda f: [f[0], lambda: torch.ones((), device="meta", requires_grad=True), f[2]],
    ),
    "tensors among them": (
        TypeError,
        "all tensors or all functions, found Tensor for task 1",
        lambda f: [f[0], f[1](), f[2]],
    ),
    "too few": (ValueError, "must stay 3", lambda f: f[:2]),
    "other names": (ValueError, "tasks must stay 0, 1, 2", _changed_to()),
    "odd keys": (TypeError, "strings or integers", lambda f: {(): f[0]}),
    "NaN": (NonFiniteError, "task 1", lambda f: [f[0], lambda: f[1]() * NAN, f[2]]),
    "two NaNs": (
        NonFiniteError,
        "task 0, 2",
        lambda f: [lambda: f[0]() * NAN, f[1], lambda: f[2]() * NAN],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("options", [{}, {"update_every": 3}], ids=str)
@pytest.mark.parametrize("aggregator", [*SCALARIZERS, "upgrad", "graddrop", "m_config", "cr_mogm"])
def test_errors_change_nothing(aggregator: str, options: dict[str, Any], case: str) -> None:
    if not takes(aggregator, **options):
        options = {}
    model, opt = trained(aggregator, **options)
    twin, other = copy.deepcopy((model, opt))
    before = snapshot(model, opt)
    error, message, change = REFUSED[case]
    with pytest.raises(error, match=message):
        opt.backward(change(functions(model, model.batch())))
    assert_same(snapshot(model, opt), before)
    for m, o in ((model, opt), (twin, other)):
        o.zero_grad()
        o.backward(functions(m, m.batch()))
        o.step()
    assert_same(snapshot(model, opt), snapshot(twin, other))


@pytest.mark.parametrize("aggregator", METHODS)
def test_errors_of_the_first_step_change_nothing(aggregator: str) -> None:
    model, opt = fresh(aggregator)
    before = snapshot(model, opt)
    with pytest.raises(RuntimeError, match="third forward"):
        opt.backward([*functions(model, model.batch())[:2], _boom])
    assert_same(snapshot(model, opt), before)
    # Another number of tasks is no change then.
    opt.backward(functions(model, model.batch())[:2])
    assert opt.diagnostics()["tasks"] == [0, 1]


@pytest.mark.parametrize("aggregator", ["uw", "upgrad", "m_config"])
def test_an_error_gives_up_pending_micro_batches(aggregator: str) -> None:
    model, opt = fresh(aggregator)
    twin, other = copy.deepcopy((model, opt))
    if aggregator != "uw":
        opt.backward(functions(model, model.batch()), accumulate=True)
    with pytest.raises(RuntimeError, match="third forward"):
        opt.backward([*functions(model, model.batch())[:2], _boom], accumulate=True)
    opt.backward(functions(model, model.batch()))
    other.backward(functions(twin, twin.batch()))
    assert_same(snapshot(model, opt), snapshot(twin, other))


def test_what_functions_cannot_serve_is_refused_before_any_is_called() -> None:
    model = make("Plain")
    never: list[Callable[[], Tensor]] = [_boom] * 3

    class Short:
        name = "short"

        def take(self, *args: Any) -> Found:
            raise AssertionError

    opt = optimizer(model, "upgrad")
    opt._balancer.engine = Short()
    with pytest.raises(ValueError, match=r'"?short.*jacobian="loop"'):
        opt.backward(never)
    with pytest.raises(ValueError, match=r"`features` need the losses themselves.*functions"):
        optimizer(model, "upgrad").backward(never, features=model.trunk(model.batch()))
    with pytest.raises(ValueError, match=r"step\(closure\)"):
        optimizer(model, "marigold").backward(never)
    for p in model.parameters():
        assert p.grad is None


@pytest.mark.parametrize("aggregator", ["marigold", "moml"])
def test_methods_that_need_all_losses_at_once_refuse_functions(aggregator: str) -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.1), aggregator)
    closures = [lambda: functions(model, model.batch())]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"'{aggregator}' needs all losses at once.*functions"):
        opt.step(*(closures * (2 if aggregator == "moml" else 1)))
    assert_same(model.state_dict(), before)


def test_reentrant_checkpointing_is_refused() -> None:
    for aggregator in ("sum", "gls", "upgrad"):
        model = make("PartlyShared")
        opt = optimizer(model, aggregator)

        def loss(i: int, model: Zoo = model) -> Tensor:
            z = checkpoint(model.trunk, model.batch().requires_grad_(), use_reentrant=True)
            return model.heads[i](model.middle(z)).square().mean() + 1

        with pytest.raises((ValueError, RuntimeError), match="reentrant"):
            opt.backward([lambda i=i: loss(i) for i in range(3)])
        assert all(p.grad is None for p in model.parameters())


# NaN in one task.


def _spoiled(model: Zoo, lazily: bool) -> Any:
    each = functions(model, model.batch())
    each[1] = lambda: model.losses(model.batch())[1] * NAN
    return each if lazily else evaluate(each)


# The turns of "m_config" come before the values, as on accelerators: see the test after this one.
@pytest.mark.parametrize("nonfinite", ["skip", "drop"])
@pytest.mark.parametrize("update_every", [1, 2])
@pytest.mark.parametrize("aggregator", sorted({*METHODS} - {"m_config"}))
def test_a_loss_that_is_not_finite(aggregator: str, update_every: int, nonfinite: str) -> None:
    options: dict[str, Any] = {"nonfinite": nonfinite}
    if takes(aggregator, update_every=update_every):
        options["update_every"] = update_every
    runs = _pair(aggregator, **options)
    for bad in (False, True, False, True, False):
        for lazily, (model, opt) in zip((True, False), runs, strict=True):
            opt.zero_grad()
            each = functions(model, model.batch())
            good = each if lazily else evaluate(each)
            opt.backward(_spoiled(model, lazily) if bad else good)
            opt.step()
    _assert_close(runs)
    told = runs[0][1].diagnostics()
    assert told["skipped"] == (2 if nonfinite == "skip" else 0)
    assert told["dropped"] == ({} if nonfinite == "skip" else {1: 2})


def test_a_dropped_task_loses_its_turn() -> None:
    model = make("Plain")
    sgd = SGD(model.parameters(), lr=0.05)
    opt = MultiTaskOptimizer(sgd, "m_config", per_step=1, nonfinite="drop")
    for bad in (False, True, False, False):
        opt.zero_grad()
        opt.backward(_spoiled(model, True) if bad else functions(model, model.batch()))
        opt.step()
    assert opt.diagnostics()["skipped"] == 1
    assert opt.diagnostics()["steps"] == 3
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("aggregator", ["sum", "gls", "upgrad"])
def test_skip_leaves_out_the_step_of_all_its_micro_batches(aggregator: str) -> None:
    model, opt = fresh(aggregator, nonfinite="skip")
    before = copy.deepcopy(model.state_dict())
    opt.backward(_spoiled(model, True), accumulate=True)
    opt.backward(functions(model, model.batch()))
    opt.step()
    assert_same(model.state_dict(), before)
    assert opt.diagnostics()["skipped"] == 1


@pytest.mark.parametrize("aggregator", ["sum", "upgrad"])
def test_logarithms_of_losses_that_are_not_positive_are_refused(aggregator: str) -> None:
    model, opt = trained(aggregator, loss_transform="log")
    before = snapshot(model, opt)
    each = functions(model, model.batch())
    with pytest.raises(ValueError, match=r"positive losses, found -.* for task 1"):
        opt.backward([each[0], lambda: -each[1](), each[2]])
    assert_same(snapshot(model, opt), before)


# The order of tasks, random numbers, hooks, and what else a training step meets.


@pytest.mark.parametrize("aggregator", ["constant", "upgrad"])
def test_a_dict_keeps_the_order_of_the_first_step(aggregator: str) -> None:
    model = make("Plain")
    options = {"weights": [1.0, 2.0, 3.0]} if aggregator == "constant" else {}
    opt = optimizer(model, aggregator, **options)
    each = dict(zip("abc", functions(model, model.batch()), strict=True))
    order: list[str] = []

    def noted(name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            order.append(name)
            return each[name]()

        return call

    outcomes = []
    for names in ("abc", "cab", "bca"):
        opt.zero_grad()
        opt.backward({name: noted(name) for name in names})
        outcomes.append([p.grad for p in model.parameters()])
    assert order == list("abc" * 3)
    assert_same(outcomes[1], outcomes[0])
    assert_same(outcomes[2], outcomes[0])
    assert opt.diagnostics()["tasks"] == ["a", "b", "c"]
    # The same tasks as tensors, and back.
    opt.zero_grad()
    opt.backward({name: each[name]() for name in "cba"})
    for p, g in zip(model.parameters(), outcomes[0], strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=0)


@pytest.mark.parametrize("aggregator", KINDS)
@pytest.mark.parametrize("name", ["BatchNorm", "Dropout"])
def test_forwards_are_ordinary_ones(name: str, aggregator: str) -> None:
    """Random numbers and running statistics are those of T forward passes in a row."""
    model = make(name)
    twin = copy.deepcopy(model)
    opt = optimizer(model, aggregator)
    torch.manual_seed(7)
    for _ in range(2):
        opt.backward(functions(model, model.batch()))
    state = torch.get_rng_state()
    torch.manual_seed(7)
    for _ in range(2):
        evaluate(functions(twin, twin.batch()))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(dict(model.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.parametrize("aggregator", KINDS)
def test_hooks_of_parameters_run_once(aggregator: str) -> None:
    model = make("Plain")
    opt = optimizer(model, aggregator)
    seen: list[str] = []
    for _ in range(2):
        seen.clear()
        handles = []
        for n, p in model.named_parameters():
            handles.append(p.register_hook(lambda g, n=n: seen.append(n)))
            handles.append(
                p.register_post_accumulate_grad_hook(lambda p, n=n: seen.append(f"after {n}"))
            )
        opt.backward(functions(model, model.batch()))
        names = [n for n, p in model.named_parameters() if p.grad is not None]
        assert sorted(seen) == sorted([*names, *(f"after {n}" for n in names)])
        for handle in handles:
            handle.remove()
        opt.zero_grad()


def test_a_hook_registered_by_a_function_stays() -> None:
    model = make("Plain")
    opt = optimizer(model, "upgrad")
    opt.backward(functions(model, model.batch()))
    seen: list[Tensor] = []
    each = functions(model, model.batch())

    def registering() -> Tensor:
        model.trunk[0].weight.register_hook(seen.append)
        return each[1]()

    opt.backward([each[0], registering, each[2]])
    assert len(seen) == 1


def test_gradients_add_up_without_zero_grad() -> None:
    for aggregator in ("sum", "upgrad"):
        model = make("Plain")
        opt = optimizer(model, aggregator)
        opt.backward(functions(model, model.batch()))
        once = [p.grad.clone() for p in model.parameters()]
        opt.backward(functions(model, model.batch()))
        for p, g in zip(model.parameters(), once, strict=True):
            torch.testing.assert_close(p.grad, 2 * g)


@pytest.mark.parametrize("aggregator", ["sum", "gls", "upgrad"])
def test_a_part_in_common_is_gone_after_the_first_pass(aggregator: str) -> None:
    model, opt = trained(aggregator)
    before = snapshot(model, opt)
    z = model.trunk(model.batch())
    each = [lambda i=i: (model.heads[i](z) - i).square().mean() + 1 for i in range(3)]
    with pytest.raises(RuntimeError, match="second time"):
        opt.backward(each)
    assert_same(snapshot(model, opt), before)


@pytest.mark.parametrize("aggregator", ["sum", "gls", "upgrad"])
def test_retain_graph_lets_functions_have_a_part_in_common(aggregator: str) -> None:
    model = make("Plain")
    twin = copy.deepcopy(model)
    opt, other = optimizer(model, aggregator), optimizer(twin, aggregator)
    z = model.trunk(model.batch())
    each = [lambda i=i: (model.heads[i](z) - i).square().mean() + 1 for i in range(3)]
    opt.backward(each, retain_graph=True)
    z.sum().backward()
    y = twin.trunk(twin.batch())
    other.backward([(twin.heads[i](y) - i).square().mean() + 1 for i in range(3)])
    twin.trunk(twin.batch()).sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("aggregator", ["sum", "gls", "upgrad"])
def test_explicit_shared_parameters(aggregator: str) -> None:
    model = make("PartlyShared")
    twin = copy.deepcopy(model)
    pair = []
    for m in (model, twin):
        shared = list(m.trunk.parameters())
        pair.append(optimizer(m, aggregator, shared_params=shared, heads="own"))
    pair[0].backward(functions(model, model.batch()))
    pair[1].backward(twin.losses(twin.batch()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_nothing_in_common_is_refused_where_gradients_are_needed() -> None:
    layers = nn.ModuleList(nn.Linear(3, 1) for _ in range(2))
    x = torch.randn(4, 3)
    each = [lambda i=i: layers[i](x).square().mean() for i in range(2)]
    optimizer(layers, "sum").backward(each)
    opt = optimizer(layers, "upgrad")
    layers.zero_grad()
    with pytest.raises(ValueError, match="reached by two or more losses"):
        opt.backward(each)
    assert all(p.grad is None for p in layers.parameters())


@pytest.mark.parametrize("aggregator", ["modo", "sdmgrad"])
@pytest.mark.parametrize("lazy_parts", [(True, True, True), (False, True, False)])
def test_independent_batches(aggregator: str, lazy_parts: tuple[bool, ...]) -> None:
    n_batches = gradbal.create(aggregator).n_batches
    runs = _pair(aggregator, nonfinite="drop")
    for bad in (False, True, False):
        for lazily, (model, opt) in zip((True, False), runs, strict=True):
            opt.zero_grad()
            given: list[Any] = []
            batches = model.batch().repeat(2, 1).chunk(n_batches)
            for batch, is_lazy in zip(batches, lazy_parts, strict=False):
                each = functions(model, batch)
                if bad and len(given) == 1:
                    each[2] = lambda model=model: model.losses(model.batch())[2] * NAN
                given.append(each if lazily and is_lazy else evaluate(each))
            opt.backward(given[0], independent=given[1:])
            opt.step()
    _assert_close(runs)
    assert runs[0][1].diagnostics()["dropped"] == {2: 1}


@pytest.mark.parametrize("aggregator", ["famo", "uw", "upgrad", "m_config"])
def test_a_closure_may_return_functions(aggregator: str) -> None:
    runs = _pair(aggregator)
    for _ in range(3):
        for lazily, (model, opt) in zip((True, False), runs, strict=True):
            each = functions(model, model.batch())
            opt.step((lambda each=each: each) if lazily else lambda each=each: evaluate(each))
    _assert_close(runs)


@pytest.mark.parametrize("aggregator", ["uw", "upgrad"])
def test_lbfgs_evaluates_functions_again(aggregator: str) -> None:
    values = []
    for lazily in (True, False):
        model = make("Plain")
        lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=3)
        if aggregator == "uw":
            opt = MultiTaskOptimizer(lbfgs, "sum")
        else:
            opt = MultiTaskOptimizer(lbfgs, aggregator)
        each = functions(model, model.batch())
        opt.step((lambda each=each: each) if lazily else lambda each=each: evaluate(each))
        values.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*values, strict=True):
        torch.testing.assert_close(p, q)


def test_gradnorm_at_a_layer_works_on_functions() -> None:
    runs = []
    for _ in range(2):
        model = make("Plain")
        sgd = SGD(model.parameters(), lr=0.05, momentum=0.9)
        layer = model.trunk[0].weight
        runs.append((model, MultiTaskOptimizer(sgd, "gradnorm", layer=layer)))
    for _ in range(3):
        for lazily, (model, opt) in zip((True, False), runs, strict=True):
            opt.zero_grad()
            each = functions(model, model.batch())
            opt.backward(each if lazily else evaluate(each))
            opt.step()
    _assert_close(runs)


def test_sparse_gradients_of_a_scalarizer() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    opt = optimizer(embedding, "sum")
    each = [lambda i=i: embedding(torch.tensor([i, 2])).square().sum() for i in range(3)]
    opt.backward(each)
    got = embedding.weight.grad.to_dense()
    embedding.weight.grad = None
    sum(function() for function in each).backward()
    torch.testing.assert_close(got, embedding.weight.grad.to_dense())


def test_functions_are_evaluated_with_a_graph_under_no_grad() -> None:
    model = make("Plain")
    opt = optimizer(model, "upgrad")
    with torch.no_grad():
        opt.backward(functions(model, model.batch()))
    assert all(p.grad is not None for p in model.parameters())


def test_the_run_continues_from_a_checkpoint() -> None:
    model, opt = trained("rlw")
    twin, other = fresh("rlw")
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for m, o in ((model, opt), (twin, other)):
        o.zero_grad()
        o.backward(functions(m, m.batch()))
        o.step()
    assert_same(snapshot(model, opt), snapshot(twin, other))
