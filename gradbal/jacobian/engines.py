"""The engines behind `jacobian=`, and what the two kinds of them answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from gradbal.jacobian.graph import Root
from gradbal.jacobian.instance import Instance
from gradbal.jacobian.loop import Loop

__all__ = ["ENGINES", "Engine", "Found", "GramianEngine", "RowsEngine", "make_engine"]

ENGINES = ("auto", "loop", "vmap", "gramian", "instance", "sketch")
"""The values of `jacobian=`."""


@runtime_checkable
class RowsEngine(Protocol):
    """Takes the rows of the Jacobian; works for every method."""

    name: str

    def rows(
        self, roots: Sequence[Root], parameters: Sequence[Tensor], retain_graph: bool
    ) -> Iterator[tuple[Tensor | None, ...]]:
        """For each root its gradients with respect to the parameters, None where it has none.

        They are read before the next ones are asked for.
        """
        ...


@dataclass(frozen=True)
class Found:
    """What an engine knows when it has no rows.

    gramian: `[T, T]`, float64, on the device; zero for tasks that sit out. extremes: `[T]`, for
    each task an entry that is not finite where a gradient of its own parameters is not. shared: the
    shared parameters.
    """

    gramian: Tensor
    extremes: Tensor
    shared: list[Tensor]


@runtime_checkable
class GramianEngine(Protocol):
    """Finds the Gramian without the rows; for methods that it suffices."""

    name: str

    def take(
        self,
        roots: Sequence[Root],
        parameters: Sequence[Tensor],
        shared_parameters: list[Tensor] | None,
        sit_out: frozenset[int],
    ) -> Found:
        """The Gramian of the shared parameters; the graph is kept.

        Args:
            roots: for each of T losses, where its backward pass starts and with which cotangent.
            parameters: n leaf tensors that require grad.
            shared_parameters: an explicit set of shared ones, or None to detect them.
            sit_out: tasks whose row and column are left zero.

        Raises:
            ValueError: no parameter is reached by two losses, or a sparse gradient.
        """
        ...


Engine = RowsEngine | GramianEngine | Instance


def make_engine(name: str) -> Engine:
    """The engine of that name.

    Raises:
        NotImplementedError: it is not there yet.
    """
    if name == "instance":
        return Instance()
    if name not in ("auto", "loop"):
        raise NotImplementedError(f'`jacobian="{name}"` is not there yet; use "loop"')
    return Loop()
