"""Losses given as functions: each is evaluated right before its own backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradbal._losses import Names, check_loss, check_names, in_order, stacked
from gradbal.jacobian import Absent, Reach, Root

__all__ = ["LazyLosses", "are_functions", "evaluated", "read_functions"]

Function = Callable[[], Tensor]


class LazyLosses:
    """T losses that are evaluated one after another, each function called once.

    A loss with its graph is handed out and not kept.

    Args:
        names: of the tasks, in the order of evaluation.
        functions: T of them, without arguments; None for a task that is missing, not for all.

    Attributes:
        lacking: tasks that are absent from this batch, here. missing: those that are absent from it
            in all processes.
        factors: `[T]`, what this process's losses count for beside those of others, or None.
        averaged: from this process's losses `[T]` to those of the whole batch.
    """

    def __init__(self, names: Names, functions: Sequence[Function | None]) -> None:
        self.names = names
        self.lacking = self.missing = frozenset(i for i, f in enumerate(functions) if f is None)
        self.factors: list[float] | None = None
        self.averaged: Callable[[Tensor], Tensor] = lambda values: values
        self._averaged: Tensor | None = None
        self._functions = functions
        self._values: dict[int, Tensor] = {}
        self._first: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """`[T]`, detached, NaN for missing tasks; once all functions have been called."""
        assert len(self._values) + len(self.lacking) == len(self.names)
        if self._averaged is None:
            mine = stacked([self._values.get(i) for i in range(len(self.names))])
            self._averaged = self.averaged(mine)
        return self._averaged

    def like(self) -> Tensor:
        """Ones `[T]` with the losses' dtype and device; calls the first function."""
        if not self._values:
            first = next(i for i in range(len(self.names)) if i not in self.lacking)
            self._first = self._evaluate(first)
        return torch.ones_like(next(iter(self._values.values()))).repeat(len(self.names))

    def roots(
        self,
        cotangent: Callable[[str | int, Tensor], Tensor],
        known: Sequence[Reach | None] | None = None,
    ) -> LazyRoots:
        """Where the backward passes start, each to be asked for when the one before is done.

        Args:
            cotangent: what a loss is multiplied by, from the task's name and its detached value.
            known: for each of T tasks what it reached before, for those that are missing.
        """
        return LazyRoots(self, cotangent, known)

    def take(self, i: int) -> tuple[Tensor, Tensor]:
        """The loss of task i with its graph, for the caller alone, and its value."""
        loss, self._first = self._first, None
        if loss is None:
            loss = self._evaluate(i)
        return loss, self._values[i]

    def is_finite(self, i: int) -> bool:
        """Whether the loss of task i, which is evaluated, is neither NaN nor infinite."""
        return bool(self._values[i].isfinite())

    def _evaluate(self, i: int) -> Tensor:
        name, function = self.names[i], self._functions[i]
        assert function is not None
        with torch.enable_grad():
            loss = function()
        check_loss(name, loss)
        device = next(iter(self._values.values()), loss).device
        if loss.device != device:
            raise ValueError(
                f"losses must be on one device, found {device} and {loss.device} for task {name!r}"
            )
        self._values[i] = loss.detach()
        return loss


class LazyRoots:
    """The roots of lazy losses, which are evaluated when they are made."""

    def __init__(
        self,
        losses: LazyLosses,
        cotangent: Callable[[str | int, Tensor], Tensor],
        known: Sequence[Reach | None] | None = None,
    ) -> None:
        self.missing = losses.lacking
        self._losses = losses
        self._cotangent = cotangent
        self._known = known

    def __len__(self) -> int:
        return len(self._losses.names)

    def make(self, i: int) -> Root | Absent:
        """The loss of task i, with what it is multiplied by."""
        if i in self.missing:
            return Absent(self._known[i] if self._known else None)
        loss, value = self._losses.take(i)
        cotangent = self._cotangent(self._losses.names[i], value)
        if self._losses.factors is not None:
            cotangent = cotangent * self._losses.factors[i]
        return loss, cotangent.to(loss.dtype)


def are_functions(losses: object) -> bool:
    """Whether any entry is a function."""
    if not isinstance(losses, list | tuple):
        if not isinstance(losses, Mapping):
            return False
        losses = list(losses.values())
    return any(map(callable, losses))


def read_functions(losses: object, names: Names | None) -> LazyLosses | None:
    """Checks losses that are given as functions, and calls none; None if they are not.

    Args:
        losses: as the user gave them.
        names: the tasks of the steps before, or None at the first.

    Raises:
        TypeError: some are functions and some are not.
        ValueError: other tasks than before.
    """
    if not are_functions(losses):
        return None
    if isinstance(losses, Mapping):
        losses = in_order(losses, names)
        found: Names = tuple(losses)
        functions = list(losses.values())
    else:
        assert isinstance(losses, list | tuple)
        functions = list(losses)
        found = tuple(range(len(functions)))
    for name, function in zip(found, functions, strict=True):
        if function is not None and not callable(function):
            raise TypeError(
                "losses must be all tensors or all functions, found "
                f"{type(function).__name__} for task {name!r} beside functions"
            )
    check_names(found, names)
    return LazyLosses(found, functions)


def evaluated(losses: Any) -> Any:
    """What functions among the losses return, in the same order; others as they are."""
    if not are_functions(losses):
        return losses
    if isinstance(losses, Mapping):
        return {name: None if f is None else f() for name, f in losses.items()}
    return [None if f is None else f() for f in losses]
