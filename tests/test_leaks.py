"""Memory is flat over many steps, graphs are let go, and buffers are freed where that is asked."""

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.speed.memory import Training, live, lost_bytes, net_bytes
from gradbal.jacobian import ENGINES
from tests.states import assert_same, snapshot

WITH_BUFFERS = ("auto", "gramian", "loop", "vmap")
"""Engines that keep memory from step to step."""

SETTLED = 20
"""Steps after which "auto" has made its choice."""

CASES: list[tuple[str, dict[str, Any]]] = [(engine, {}) for engine in ENGINES]
CASES += [("loop", {"aggregator": name}) for name in ("moco", "famo")]
CASES += [("loop", {"update_every": 3})]


def _step(training: Training) -> None:
    training.step()
    if training.opt.aggregator.name == "famo":
        with torch.no_grad():
            training.opt.update(training.losses())


def _assert_flat(step: Callable[[], object], n_steps: int) -> None:
    """What other tests have left behind may come to light once; a leak grows again."""
    for _ in range(2):
        before = live()
        for _ in range(n_steps):
            step()
        after = live()
        if after[0] <= before[0] and after[1] <= before[1]:
            return
    pytest.fail(f"from {before} to {after} tensors and bytes")


@pytest.mark.parametrize(("engine", "options"), CASES, ids=str)
def test_memory_is_flat(engine: str, options: dict[str, Any]) -> None:
    training = Training(engine, **options)
    # For other methods than the engines' own fewer steps show the same.
    n_steps = 60 if options else 500
    for _ in range(SETTLED):
        _step(training)
    _assert_flat(lambda: _step(training), n_steps - SETTLED)
    if not options:
        # Python does not know of all that a graph holds; the allocator does.
        assert lost_bytes(training.step) == 0


def test_what_is_held_is_seen() -> None:
    training = Training("loop")
    training.step()
    before, kept = live(), []

    def lose() -> None:
        kept.append(training.losses()[0])

    # What the graph has saved: two activations of eight rows.
    assert net_bytes(lose) > 8 * 4 * (32 + 64)
    assert live()[0] > before[0]
    assert lost_bytes(lose) > 12 * 8 * 4 * (32 + 64)


@pytest.mark.parametrize("engine", ["gramian", "loop", "sketch"])
def test_memory_is_flat_while_tasks_come_and_go(engine: str) -> None:
    training = Training(engine)
    absent = itertools.cycle(range(4))

    def step() -> None:
        training.opt.zero_grad()
        losses, out = training.losses(), next(absent)
        training.opt.backward([l if i != out else None for i, l in enumerate(losses)])
        training.opt.step()

    for _ in range(SETTLED):
        step()
    _assert_flat(step, 40)


def test_one_tensor_a_step_is_not_flat() -> None:
    kept: list[Tensor] = []
    with pytest.raises(pytest.fail.Exception, match="tensors and bytes"):
        _assert_flat(lambda: kept.append(torch.zeros(3)), 5)


class _Payload:
    """What the graph holds on to."""


class _Holding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, payload: _Payload) -> Tensor:
        ctx.payload = payload
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@pytest.mark.parametrize("engine", ENGINES)
def test_no_graph_outlives_the_losses(engine: str) -> None:
    training = Training(engine)
    trunk = training.model[0]
    plain = trunk.forward
    alive: list[weakref.ref[_Payload]] = []

    def forward(x: Tensor) -> Tensor:
        payload = _Payload()
        alive.append(weakref.ref(payload))
        # Nothing mixes instances.
        return _Holding.apply(plain(x), payload)  # type: ignore[no-any-return]

    trunk.forward = forward
    for _ in range(16):
        losses = training.losses()
        assert alive[-1]() is not None, "the test does not see the graph"
        training.opt.zero_grad()
        training.opt.backward(losses)
        training.opt.step()
        del losses
        if alive[-1]() is not None:
            gc.collect()
        assert alive[-1]() is None


@pytest.mark.parametrize("engine", ["gramian", "instance", "loop", "sketch", "vmap"])
def test_what_the_graph_has_saved_is_freed_by_backward(engine: str) -> None:
    training = Training(engine)
    # The first step of "vmap" and of "gramian" tries whether a graph can be walked at once.
    training.step()
    losses = training.losses()
    training.opt.backward(losses)
    loss = losses[0] if isinstance(losses, list) else losses.sum()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


# Buffers.


def test_zero_grad_frees_gradients_and_keeps_buffers() -> None:
    training = Training("loop")
    training.step()
    before = live()[1]
    buffer = training.opt._balancer.rows.jacobian
    training.opt.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in training.model.parameters())
    n_scalars = sum(p.numel() for p in training.model.parameters())
    assert before - live()[1] == n_scalars * 4
    assert training.opt._balancer.rows.jacobian is buffer


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_buffers_are_freed_where_that_is_asked(engine: str, set_to_none: bool) -> None:
    training, twin = Training(engine), Training(engine)
    with torch.random.fork_rng():
        for _ in range(3):
            training.step(), twin.step()
    shared = training.opt.diagnostics()["shared"]
    training.opt.zero_grad(set_to_none)
    before = live()[1]
    training.opt.zero_grad(set_to_none, free_buffers=True)
    freed = before - live()[1]
    if engine in ("loop", "vmap", "auto"):
        assert freed >= 3 * 4 * shared
    elif engine == "gramian":
        assert freed > 0
    else:
        assert freed == 0
    assert training.opt.diagnostics()["shared"] == shared
    assert all((p.grad is None) == set_to_none for p in training.model.parameters())
    for _ in range(2):
        for each in (training, twin):
            each.opt.zero_grad()
            each.opt.backward(each.losses())
            each.opt.step()
        if engine != "auto":
            # The clock decides there which engine it is.
            after = snapshot(training.model, training.opt)
            assert_same(after, snapshot(twin.model, twin.opt))


def test_gradients_that_wait_are_kept() -> None:
    training, twin = Training("loop"), Training("loop")
    for each in (training, twin):
        each.opt.backward(each.losses(), accumulate=True)
    training.opt.zero_grad(free_buffers=True)
    for each in (training, twin):
        each.opt.backward(each.losses())
        each.opt.step()
    assert_same(
        snapshot(training.model, training.opt),
        snapshot(twin.model, twin.opt),
    )


def test_an_absent_task_is_still_known_when_buffers_are_freed() -> None:
    training = Training("loop")
    training.step()
    reach = training.opt._balancer.rows.reach
    training.opt.zero_grad(free_buffers=True)
    losses = training.losses()
    training.opt.backward([losses[0], None, losses[2]])
    assert training.opt._balancer.rows.reach == reach
