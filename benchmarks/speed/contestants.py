"""What `speed engines` runs against each other: calls that turn fresh losses into gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.speed.models import Heads
from benchmarks.speed.solvers import COUNTERPARTS, counterpart
from gradbal import MultiTaskOptimizer
from gradbal.jacobian import ENGINES

__all__ = [
    "AUTOGRAM",
    "BARE",
    "PLAIN",
    "TORCHJD",
    "Contestant",
    "available_engines",
    "contestant",
    "opponents",
]

BARE = "bare passes"
"""T calls of `autograd.grad` whose results are thrown away: the floor of what takes T passes."""

PLAIN = "plain sum"
"""`sum(losses).backward()`."""

TORCHJD = "TorchJD"
"""`mtl_backward` and `jac_to_grad` with all their defaults."""

AUTOGRAM = "TorchJD autogram"
"""`autogram.Engine` over the trunk, weights of its Gramian, one weighted backward pass."""

_SETTINGS: dict[str, tuple[int | None, bool]] = {
    TORCHJD: (None, False),
    "TorchJD chunk=1": (1, False),
    "TorchJD chunk=4": (4, False),
    "TorchJD gramian": (None, True),
    "TorchJD gramian chunk=1": (1, True),
}
"""Label → `parallel_chunk_size` and `optimize_gramian_computation`."""

_PER_INSTANCE = "instance"
"""The engine that takes one loss an instance, and not a list of task losses."""

_TRIALS, _MOST_TRIALS = 8, 40
_SAME_FOR = 5
"""Calls that "auto" gets before it is measured, and for how many it has to name the same engine."""

Call = Callable[[Tensor, list[Tensor]], None]


@dataclass(frozen=True)
class Contestant:
    """A name, the model whose losses it takes, and what it does with them.

    optimizer: gradbal's, for an engine.
    """

    name: str
    model: Heads
    call: Call
    optimizer: MultiTaskOptimizer | None = None

    def prepare(self, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What is never timed: a fresh graph, and no gradients."""
        self.clear_gradients()
        return self.model.features_and_losses(batch)

    def clear_gradients(self) -> None:
        """Gives them up, rather than to set them to zero."""
        for p in self.model.parameters():
            p.grad = None

    def warm_up(self, batch: Tensor) -> None:
        """Makes buffers, and lets an engine that tries others settle on one."""
        self.call(*self.prepare(batch))
        if self.name != "auto":
            return
        reported = [self.engine]
        while len(reported) < _TRIALS or len(set(reported[-_SAME_FOR:])) > 1:
            if len(reported) == _MOST_TRIALS:
                break
            self.call(*self.prepare(batch))
            reported.append(self.engine)

    @property
    def engine(self) -> str | None:
        """The engine that ran, which is another than asked for where "auto" chose."""
        if self.optimizer is None:
            return None
        return str(self.optimizer.diagnostics()["engine"])


def available_engines(method: str) -> list[str]:
    """The values of `jacobian=` that take a list of losses, and are there."""
    found = []
    for name in ENGINES:
        parameters = nn.Linear(1, 1).parameters()
        try:
            MultiTaskOptimizer(SGD(parameters, lr=0.0), method, jacobian=name)
        except NotImplementedError:
            continue
        except ValueError:
            # It is there, and refuses the method: the table says so.
            pass
        if name != _PER_INSTANCE:
            found.append(name)
    return found


def opponents(method: str, n_tasks: int) -> list[str]:
    """Everything that is not an engine of ours, floor first; TorchJD where it has the method."""
    names = [BARE, PLAIN]
    if method in COUNTERPARTS:
        # Four rows at a time are all of them up to T = 4.
        names += [n for n, (chunk, _) in _SETTINGS.items() if chunk is None or chunk < n_tasks]
        names.append(AUTOGRAM)
    return names


def contestant(name: str, model: Heads, method: str) -> Contestant:
    """The contestant of that name.

    Args:
        name: of `available_engines` or `opponents`.
        model: its own for `AUTOGRAM`, which hooks the modules.
        method: of gradbal's registry.

    Raises:
        MissingExtra: TorchJD is not installed.
        NotImplementedError, ValueError: the engine is not there, or not for this method.
        TypeError: TorchJD's aggregator has no weights that a Gramian gives.
    """
    if name == BARE:
        return Contestant(name, model, _bare(model))
    if name == PLAIN:
        return Contestant(name, model, _plain)
    if name == AUTOGRAM:
        return Contestant(name, model, _autogram(model, counterpart(method, len(model.heads))))
    if name in _SETTINGS:
        call = _autojac(model, counterpart(method, len(model.heads)), *_SETTINGS[name])
        return Contestant(name, model, call)
    optimizer = MultiTaskOptimizer(SGD(model.parameters(), lr=0.0), method, jacobian=name)
    return Contestant(name, model, lambda _, losses: optimizer.backward(losses), optimizer)


def _bare(model: Heads) -> Call:
    parameters: Sequence[Tensor] = list(model.parameters())

    def call(features: Tensor, losses: list[Tensor]) -> None:
        for i, loss in enumerate(losses, 1):
            torch.autograd.grad(loss, parameters, retain_graph=i < len(losses), allow_unused=True)

    return call


def _plain(features: Tensor, losses: list[Tensor]) -> None:
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]


def _autojac(model: Heads, aggregator: Any, chunk: int | None, by_gramian: bool) -> Call:
    from torchjd.autojac import jac_to_grad, mtl_backward

    shared = list(model.trunk.parameters())
    options = {"optimize_gramian_computation": True} if by_gramian else {}

    def call(features: Tensor, losses: list[Tensor]) -> None:
        mtl_backward(losses, features=features, parallel_chunk_size=chunk)
        jac_to_grad(shared, aggregator, **options)

    return call


def _autogram(model: Heads, aggregator: Any) -> Call:
    from torchjd.autogram import Engine

    weighting = getattr(aggregator, "gramian_weighting", None)
    if weighting is None:
        raise TypeError(f"{type(aggregator).__name__} has no weights that a Gramian gives")
    engine = Engine(model.trunk, batch_dim=None)

    def call(features: Tensor, losses: list[Tensor]) -> None:
        stacked = torch.stack(losses)
        weights = weighting(engine.compute_gramian(stacked))
        stacked.backward(weights)  # type: ignore[no-untyped-call]

    return call
