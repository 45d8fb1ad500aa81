"""`Aggregator.observe`: once for every step that is taken, with the losses of that step."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import LBFGS, SGD

import gradbal
from gradbal import MultiTaskOptimizer, NonFiniteError
from tests.states import entry, root_at_zero
from tests.zoo import Plain, make

NAN = float("nan")


class Scalar(gradbal.Scalarizer):
    """The sum of the losses; remembers them."""

    per_task_state = True

    def __init__(self) -> None:
        self.seen: list[tuple[list[float], Sequence[int] | None]] = []

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        return losses.sum()

    def observe(self, losses: Tensor, tasks: Sequence[int] | None = None) -> None:
        assert not losses.requires_grad
        self.seen.append((losses.tolist(), tasks))


class Gramian(gradbal.GramianAggregator):
    """The sum of the gradients; remembers the losses."""

    per_task_state = True

    def __init__(self) -> None:
        self.seen: list[tuple[list[float], Sequence[int] | None]] = []

    def weights(
        self, gramian: Tensor, losses: Tensor | None = None, tasks: Sequence[int] | None = None
    ) -> Tensor:
        return torch.ones_like(gramian[0])

    observe = Scalar.observe


KINDS = pytest.mark.parametrize("kind", [Scalar, Gramian])


def _start(kind: type, **options: Any) -> tuple[Plain, MultiTaskOptimizer, list[Any]]:
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.01), kind(), **options)
    return model, opt, opt.aggregator.seen


def _values(model: nn.Module) -> list[float]:
    return [float(l.detach()) for l in model.losses(model.batch())]


@KINDS
def test_once_a_step_before_the_parameters_move(kind: type) -> None:
    model, opt, seen = _start(kind)
    for n in range(1, 4):
        want = _values(model)
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        assert len(seen) == n - 1
        opt.step()
        assert seen[-1] == (pytest.approx(want), None)
        opt.step()
        assert len(seen) == n


@KINDS
def test_only_the_last_backward_before_the_step(kind: type) -> None:
    model, opt, seen = _start(kind)
    opt.backward([2 * l for l in model.losses(model.batch())])
    opt.backward(model.losses(model.batch()))
    opt.step()
    assert seen == [(pytest.approx(_values(make("Plain"))), None)]


@KINDS
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_not_for_a_step_that_is_left_out(kind: type, policy: str) -> None:
    model, opt, seen = _start(kind, nonfinite=policy)
    losses = model.losses(model.batch())
    losses[1] = losses[1] * NAN
    if policy == "raise":
        with pytest.raises(NonFiniteError):
            opt.backward(losses)
    else:
        opt.backward(losses)
    opt.step()
    assert seen == []


@KINDS
def test_who_took_part(kind: type) -> None:
    model, opt, seen = _start(kind, nonfinite="drop")
    want = _values(model)
    losses = model.losses(model.batch())
    losses[1] = losses[1] * NAN
    opt.backward(losses)
    opt.step()
    (values, tasks) = seen[0]
    assert list(tasks) == [0, 2]
    assert [values[0], values[2]] == pytest.approx([want[0], want[2]])


@KINDS
def test_micro_batches_are_one_step(kind: type) -> None:
    model, opt, seen = _start(kind)
    want = _values(model)
    for i, part in enumerate(model.batch().chunk(2)):
        opt.backward([l / 2 for l in model.losses(part)], accumulate=i == 0)
    opt.step()
    assert seen == [(pytest.approx(want), None)]


@KINDS
def test_as_the_method_sees_them(kind: type) -> None:
    model, opt, seen = _start(kind, loss_transform="log")
    want = torch.tensor(_values(model)).log().tolist()
    opt.backward(model.losses(model.batch()))
    opt.step()
    assert seen == [(pytest.approx(want), None)]


@KINDS
def test_every_step_between_two_refreshes_of_the_weights(kind: type) -> None:
    model, opt, seen = _start(kind, update_every=3)
    for _ in range(4):
        opt.zero_grad()
        opt.backward(model.losses(model.batch()))
        opt.step()
    assert len(seen) == 4


@KINDS
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_for_an_overflow_that_a_scaler_skips(kind: type, where: str) -> None:
    model, opt, seen = _start(kind)
    scaler = GradScaler("cpu", init_scale=1024.0)
    want = _values(model)
    for bad in (True, False):
        opt.zero_grad()
        losses = model.losses(model.batch())
        if bad:
            weight = model.trunk[0].weight
            spoiled = losses[1] * float("inf") if where == "loss" else root_at_zero(weight)
            losses[1] = losses[1] + spoiled
        opt.backward(losses, grad_scaler=scaler)
        scaler.step(opt)
        scaler.update()
    assert seen == [(pytest.approx(want), None)]


@KINDS
def test_a_closure_that_is_asked_again_is_one_step(kind: type) -> None:
    model = make("Plain")
    lbfgs = LBFGS(model.parameters(), max_iter=4)
    opt = MultiTaskOptimizer(lbfgs, kind())
    want, calls = _values(model), []

    def closure() -> list[Tensor]:
        calls.append(len(opt.aggregator.seen))
        return model.losses(model.batch())

    opt.step(closure)
    assert len(calls) > 2
    # It is told before the first of the evaluations that follow.
    assert calls[:2] == [0, 1]
    assert opt.aggregator.seen == [(pytest.approx(want), None)]
    assert entry(opt)["balancer"]["unobserved"] is None


@KINDS
@pytest.mark.parametrize("n_bad", [0, 1])
def test_a_checkpoint_between_backward_and_step(kind: type, n_bad: int) -> None:
    model, opt, seen = _start(kind, nonfinite="drop")
    opt.backward([l * NAN if i < n_bad else l for i, l in enumerate(model.losses(model.batch()))])
    state = copy.deepcopy(opt.state_dict())
    opt.step()
    _, other, seen_there = _start(kind, nonfinite="drop")
    other.load_state_dict(state)
    other.step()
    assert len(seen_there) == 1
    assert seen_there[0][0][n_bad:] == seen[0][0][n_bad:]
    assert seen_there[0][1] == seen[0][1] == ([1, 2] if n_bad else None)
    assert entry(opt)["balancer"]["unobserved"] is None


def test_direction_is_a_step_too() -> None:
    method = Scalar()
    method.direction(torch.eye(2), torch.tensor([3.0, 4.0], requires_grad=True))
    assert method.seen == [([3.0, 4.0], None)]


class Root(gradbal.Scalarizer):
    """The sum of the roots: NaN for a loss below zero."""

    def scalarize(self, losses: Tensor) -> Tensor:
        return losses.sqrt().sum()


@pytest.mark.parametrize(
    ("options", "offset", "bad"),
    [
        ({}, 0.0, []),
        ({}, -100.0, [1]),
        ({"update_every": 2}, -100.0, [1]),
        # log ℓ_0 < 0 by itself.
        ({"loss_transform": "log"}, 0.0, [0]),
    ],
)
def test_what_is_looked_at_late(options: dict[str, Any], offset: float, bad: list[int]) -> None:
    # On an accelerator nothing is read before the step, which then looks at one number a task.
    model = make("Plain")
    opt = MultiTaskOptimizer(SGD(model.parameters(), lr=0.01), Root(), **options)
    losses = [l - 1.0 for l in model.losses(model.batch())]
    losses[1] = losses[1] + offset
    values = torch.stack(losses).detach()
    opt.backward(losses)
    found = opt._balancer.found_late()
    assert [i for i, x in enumerate(found.tolist()) if not abs(x) < float("inf")] == bad
    good = [i for i in range(3) if i not in bad]
    wanted = values.log() if "loss_transform" in options else values
    torch.testing.assert_close(found[good], wanted[good])
