"""Optimizers in several threads do not disturb each other."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradbal import MultiTaskOptimizer
from tests.drive import DRIVERS, Driver, driver
from tests.states import assert_same, snapshot

KINDS = ["uw", "dwa", "upgrad", "gradvac(groups=matrix)", "moco", "graddrop", "mgda_ub", "famo"]
CLOSURES = ["marigold", "marigold(estimator=central)", "moml", "auto_lambda", "forum", "modo"]


class Norm(nn.Module):
    """Three tasks on a trunk with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))
        self.double()

    def losses(self, batch: Tensor) -> list[Tensor]:
        z = self.trunk(batch)
        return [(head(z) - (-2.0) ** i).square().mean() + 1 for i, head in enumerate(self.heads)]


class WithNorm(Driver):
    def model(self) -> nn.Module:
        return Norm()


@pytest.fixture(autouse=True)
def _switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def all_of(model: nn.Module, opt: MultiTaskOptimizer) -> dict[str, Any]:
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return snapshot(model, opt) | {"buffers": buffers, "checkpoint": opt.state_dict()}


def in_threads(work: list[Callable[[], Any]]) -> list[Any]:
    """What each returns, all begun at once."""
    start = threading.Barrier(len(work))

    def begin(each: Callable[[], Any]) -> Any:
        # The number of threads within an operator is a thread's own.
        torch.set_num_threads(1)
        start.wait()
        return each()

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(begin, work))


@pytest.mark.parametrize("first", KINDS + CLOSURES)
def test_two_threads_are_as_one_after_the_other(first: str) -> None:
    others = ["marigold", "upgrad"]
    methods = [WithNorm(*DRIVERS[name], gather=True) for name in [first, *others]]

    def train(method: Driver, pair: tuple[nn.Module, MultiTaskOptimizer]) -> dict[str, Any]:
        method.run(*pair, range(12))
        return all_of(*pair)

    # Made one after the other, since parameters are drawn from the common generator.
    pairs = [(m, m.fresh()) for m in methods]
    want = [train(*pair) for pair in pairs]
    pairs = [(m, m.fresh()) for m in methods]
    found = in_threads([lambda pair=pair: train(*pair) for pair in pairs])
    assert_same(found, want)


@pytest.mark.parametrize("name", ["marigold", "moml"])
def test_running_statistics_while_another_thread_looks_again(name: str) -> None:
    # While one thread calls its closure again, another goes forward: its module keeps what it saw.
    method = WithNorm(*DRIVERS[name])
    model, opt = method.fresh()
    other = Norm()
    want = Norm()
    batch = method.batch(0, 0)
    want.losses(batch)
    looking, seen = threading.Event(), threading.Event()
    calls = 0

    def closure() -> list[Tensor]:
        nonlocal calls
        calls += 1
        losses = model.losses(batch)
        if calls == 2:
            looking.set()
            assert seen.wait(20)
        return losses

    def look() -> None:
        both = (closure, closure) if name == "moml" else (closure,)
        opt.step(*both)

    def go_forward() -> None:
        assert looking.wait(20)
        other.losses(batch)
        seen.set()

    before = nn.Module.__call__
    in_threads([look, go_forward])
    assert calls >= 2
    assert nn.Module.__call__ is before
    assert_same(dict(other.named_buffers()), dict(want.named_buffers()))


def test_hooks_of_one_thread_stay_while_another_takes_gradients() -> None:
    # Hooks on parameters are held back while rows are taken: those of the own model alone.
    method = driver("upgrad")
    pairs = [method.fresh() for _ in range(2)]
    counts = [0, 0]
    for k, (model, _) in enumerate(pairs):

        def count(grad: Tensor, k: int = k) -> None:
            counts[k] += 1

        for p in model.parameters():
            p.register_hook(count)
    in_threads([lambda pair=pair: method.run(*pair, range(20)) for pair in pairs])
    assert counts == [20 * 8] * 2
