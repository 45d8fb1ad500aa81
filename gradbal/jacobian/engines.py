"""The engines behind `jacobian=`, and what the two kinds of them answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

from torch import Tensor

from gradbal.jacobian.blocks import Block
from gradbal.jacobian.graph import Absent, Reach, Root
from gradbal.jacobian.instance import Instance

__all__ = [
    "ENGINES",
    "WITHOUT_ROWS",
    "Engine",
    "Found",
    "GramianEngine",
    "Kept",
    "RowsEngine",
    "finds_gramian",
    "takes_rows",
]

ENGINES = ("auto", "loop", "vmap", "gramian", "instance", "sketch")
"""The values of `jacobian=`."""

WITHOUT_ROWS = ("gramian", "instance", "sketch")
"""Those that keep no rows."""


class RowsEngine(Protocol):
    """Takes the rows of the Jacobian; works for every method."""

    @property
    def name(self) -> str:
        """What took the last rows."""
        ...

    @property
    def follows_graph(self) -> bool:
        """Whether the graph of a loss tells which parameters have a gradient."""
        ...

    def rows(
        self, roots: Sequence[Root], parameters: Sequence[Tensor], retain_graph: bool
    ) -> Iterator[tuple[Tensor | None, ...] | Block]:
        """For each root its gradients with respect to the parameters, None where it has none.

        Several roots' may come as one block; either they are blocks all, or none is. They are read
        before the next ones are asked for.
        """
        ...


@dataclass(frozen=True)
class Kept:
    """Gradients in a form of the engine's own, from which all else can be had without a pass.

    rows: `[T, ·]`, zero where a task's gradients are. exact: the Gramian again, with products in
    float64. deliver: sends the combination of the gradients into `.grad`, from weights `[T]` of the
    tasks and what each one's own gradients are multiplied by, None for a task that sits out.
    """

    rows: Tensor
    exact: Callable[[], Tensor]
    deliver: Callable[[Tensor, Sequence[float | Tensor | None]], None]


@dataclass(frozen=True)
class Found:
    """What an engine knows when it has no rows.

    gramian: `[T, T]`, float64, on the device; zero for tasks that sit out. extremes: `[T]`, for
    each task an entry that is not finite where a gradient of its own parameters is not. shared: the
    shared parameters. reach: for each task, which parameters it reaches, as far as that is known.
    kept: where a backward pass is not needed any more; otherwise None.
    """

    gramian: Tensor
    extremes: Tensor
    shared: list[Tensor]
    reach: list[Reach | None]
    kept: Kept | None = None


class GramianEngine(Protocol):
    """Finds the Gramian without the rows; for methods that it suffices."""

    name: str

    def take(
        self,
        roots: Sequence[Root | Absent],
        parameters: Sequence[Tensor],
        shared_parameters: list[Tensor] | None,
        sit_out: frozenset[int],
        retain_graph: bool = False,
    ) -> Found:
        """The Gramian of the shared parameters.

        Args:
            roots: for each of T losses, where its backward pass starts and with which cotangent.
            parameters: n leaf tensors that require grad.
            shared_parameters: an explicit set of shared ones, or None to detect them.
            sit_out: tasks whose row and column are left zero; those that are absent among them.
            retain_graph: keep the graph even where no other pass has to follow.

        Raises:
            ValueError: no parameter is reached by two losses, or a sparse gradient.
        """
        ...


Engine = RowsEngine | GramianEngine | Instance


def takes_rows(engine: Any) -> TypeGuard[RowsEngine]:
    """Whether an engine is one of rows; asked at every step, so that it looks at one name."""
    return hasattr(engine, "rows")


def finds_gramian(engine: Any) -> TypeGuard[GramianEngine]:
    """Whether it is one of the Gramian."""
    return hasattr(engine, "take")
