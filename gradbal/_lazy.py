"""Losses given as functions: each is evaluated right before its own backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradbal._losses import Names, check_loss, check_names, in_order
from gradbal.jacobian import Root

__all__ = ["LazyLosses", "are_functions", "evaluated", "read_functions"]

Function = Callable[[], Tensor]


class LazyLosses:
    """T losses that are evaluated one after another, each function called once.

    A loss with its graph is handed out and not kept.

    Args:
        names: of the tasks, in the order of evaluation.
        functions: T of them, without arguments.
    """

    def __init__(self, names: Names, functions: Sequence[Function]) -> None:
        self.names = names
        self._functions = functions
        self._values: list[Tensor] = []
        self._first: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """`[T]`, detached, once all functions have been called."""
        assert len(self._values) == len(self.names)
        return torch.stack(self._values)

    def like(self) -> Tensor:
        """Ones `[T]` with the losses' dtype and device; calls the first function."""
        if not self._values:
            self._first = self._evaluate(0)
        return torch.ones_like(self._values[0]).repeat(len(self.names))

    def roots(self, cotangent: Callable[[str | int, Tensor], Tensor]) -> LazyRoots:
        """Where the backward passes start, each to be asked for when the one before is done.

        Args:
            cotangent: what a loss is multiplied by, from the task's name and its detached value.
        """
        return LazyRoots(self, cotangent)

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
        name = self.names[i]
        with torch.enable_grad():
            loss = self._functions[i]()
        check_loss(name, loss)
        if self._values and loss.device != self._values[0].device:
            raise ValueError(
                f"losses must be on one device, found {self._values[0].device} and {loss.device} "
                f"for task {name!r}"
            )
        self._values.append(loss.detach())
        return loss


class LazyRoots:
    """The roots of lazy losses, which are evaluated when they are made."""

    def __init__(
        self, losses: LazyLosses, cotangent: Callable[[str | int, Tensor], Tensor]
    ) -> None:
        self._losses = losses
        self._cotangent = cotangent

    def __len__(self) -> int:
        return len(self._losses.names)

    def make(self, i: int) -> Root:
        """The loss of task i, with what it is multiplied by."""
        loss, value = self._losses.take(i)
        return loss, self._cotangent(self._losses.names[i], value).to(loss.dtype)


def are_functions(losses: object) -> bool:
    """Whether any entry is a function."""
    if isinstance(losses, Mapping):
        losses = list(losses.values())
    return isinstance(losses, list | tuple) and any(map(callable, losses))


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
        if not callable(function):
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
        return {name: function() for name, function in losses.items()}
    return [function() for function in losses]
