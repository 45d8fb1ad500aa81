"""What a step costs beside autograd: microseconds on a problem of two numbers and two losses.

On networks the passes take so long that nothing else shows. The toy of CAGrad, Nash-MTL and FAMO
(Liu et al., NeurIPS 2021, https://arxiv.org/abs/2110.14048) has next to none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from benchmarks.speed.solvers import counterpart
from gradbal import MultiTaskOptimizer
from gradbal.aggregators.base import ClosureAggregator, Scalarizer

__all__ = ["METHODS", "TORCHJD", "Row", "Steps", "measure", "steps_of"]

METHODS = ("mgda", "upgrad", "pcgrad", "cagrad", "nash_mtl", "famo", "mean", "uw")
"""Those that are measured if none are named."""

TORCHJD = "TorchJD "
"""What the names of its methods begin with."""

_QUICK = ("mgda", "upgrad", "pcgrad")
"""Methods whose counterparts in TorchJD do not take milliseconds."""

_START = (-8.5, 7.5)
_WARM_UP = 20
_OPTIONS: dict[str, dict[str, Any]] = {"famo": {"min_losses": (-30.0, -30.0)}}

Step = Callable[[], None]


def losses_of(x: Tensor) -> list[Tensor]:
    """The two losses at `x [2]`, as in the official code, the first one times 0.1."""
    x1, x2 = x.unbind()
    above, below = (0.5 * x2).tanh().clamp(min=0), (-0.5 * x2).tanh().clamp(min=0)
    f1 = (0.5 * (-x1 - 7) - (-x2).tanh()).abs().clamp(min=5e-6).log() + 6
    f2 = (0.5 * (-x1 + 3) + (-x2).tanh() + 2).abs().clamp(min=5e-6).log() + 6
    bowl = 0.1 * (-x2 - 8) ** 2
    g1, g2 = ((-x1 + 7) ** 2 + bowl) / 10 - 20, ((-x1 - 7) ** 2 + bowl) / 10 - 20
    return [0.1 * (above * f1 + below * g1), above * f2 + below * g2]


@dataclass(frozen=True)
class Row:
    """One contestant.

    passes, forwards: backward and forward passes a step. step, plain, beyond: medians over the
    rounds of the microseconds of a step, of one of plain autograd with as many passes, and of the
    difference. ratio: the median of the two steps' ratio.
    """

    name: str
    passes: int
    forwards: int
    step: float
    plain: float
    beyond: float
    ratio: float


@dataclass(frozen=True)
class Steps:
    """A contestant: its training step, and how many backward and forward passes that has."""

    name: str
    passes: int
    forwards: int
    step: Step


def plain(passes: int, forwards: int, dtype: torch.dtype) -> Steps:
    """Autograd and Adam alone: `sum(losses).backward()`, or the sum of each loss's own gradient."""
    x = nn.Parameter(torch.tensor(_START, dtype=dtype))
    adam = Adam([x], lr=1e-3)

    def step() -> None:
        adam.zero_grad()
        first, second = losses_of(x)
        if passes == 1:
            (first + second).backward()  # type: ignore[no-untyped-call]
        else:
            (one,) = torch.autograd.grad(first, [x], retain_graph=True)
            (other,) = torch.autograd.grad(second, [x])
            x.grad = one + other
        adam.step()
        if forwards > 1:
            with torch.no_grad():
                losses_of(x)

    return Steps(f"autograd, {forwards} forward, {passes} backward", passes, forwards, step)


def steps_of(name: str, dtype: torch.dtype) -> Steps:
    """A method of gradbal's registry, or `TORCHJD` and the name of one that it has too.

    Raises:
        MissingExtra: TorchJD is not installed.
    """
    x = nn.Parameter(torch.tensor(_START, dtype=dtype))
    adam = Adam([x], lr=1e-3)
    if name.startswith(TORCHJD):
        aggregator = counterpart(name.removeprefix(TORCHJD), 2)
        from torchjd.autojac import backward, jac_to_grad

        def theirs() -> None:
            adam.zero_grad()
            backward(losses_of(x), inputs=[x], parallel_chunk_size=1)
            jac_to_grad([x], aggregator)
            adam.step()

        return Steps(name, 2, 1, theirs)
    optimizer = MultiTaskOptimizer(adam, name, **_OPTIONS.get(name, {}))
    method = optimizer.aggregator
    looks_after = isinstance(method, ClosureAggregator) and method.looks_after

    def ours() -> None:
        optimizer.zero_grad()
        optimizer.backward(losses_of(x))
        optimizer.step()
        if looks_after:
            with torch.no_grad():
                losses = losses_of(x)
            optimizer.update(losses)

    passes = 1 if isinstance(method, Scalarizer) else 2
    return Steps(name, passes, 1 + looks_after, ours)


def measure(
    names: Sequence[str], rounds: int, n_steps: int, dtype: torch.dtype = torch.float32
) -> Iterator[Row]:
    """Lets all contestants take steps in turn, round after round, on one thread.

    Args:
        names: of `gradbal`'s methods; TorchJD's counterparts of some take part beside them.
        rounds: at least 1.
        n_steps: of each contestant in a round, at least 1.
        dtype: of the parameter.

    Yields:
        First the plain steps, then a row for each contestant; once all rounds are over.

    Raises:
        MissingExtra: TorchJD is not installed.
    """
    theirs = [TORCHJD + name for name in names if name in _QUICK]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        chosen = [steps_of(name, dtype) for name in [*names, *theirs]]
        kinds = sorted({(each.passes, each.forwards) for each in chosen})
        plains = {kind: plain(*kind, dtype) for kind in kinds}
        contestants = [*plains.values(), *chosen]
        found = _rounds(contestants, rounds, n_steps)
    finally:
        torch.set_num_threads(before)
    for each in contestants:
        base = found[plains[each.passes, each.forwards].name]
        pairs = list(zip(found[each.name], base, strict=True))
        yield Row(
            each.name,
            each.passes,
            each.forwards,
            statistics.median(found[each.name]),
            statistics.median(base),
            statistics.median(mine - bare for mine, bare in pairs),
            statistics.median(mine / bare for mine, bare in pairs),
        )


def _rounds(contestants: Sequence[Steps], rounds: int, n_steps: int) -> dict[str, list[float]]:
    """Microseconds of CPU time that a step took, by contestant and round."""
    found: dict[str, list[float]] = {each.name: [] for each in contestants}
    for each in contestants:
        for _ in range(_WARM_UP):
            each.step()
    for number in range(rounds):
        turn = number % len(contestants)
        for each in [*contestants[turn:], *contestants[:turn]]:
            start = time.process_time()
            for _ in range(n_steps):
                each.step()
            found[each.name].append((time.process_time() - start) / n_steps * 1e6)
    return found
