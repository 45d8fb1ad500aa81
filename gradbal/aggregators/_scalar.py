"""What the methods that look at the losses alone have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from gradbal.aggregators._arguments import finite_numbers, preference
from gradbal.aggregators._gramians import as_weights

__all__ = [
    "ReferenceMixin",
    "check_length",
    "check_losses",
    "of_tasks",
    "positive_numbers",
    "precise",
    "some_positive",
]


def precise(losses: Tensor) -> Tensor:
    """The losses in float64, where the device has it."""
    return losses.float() if losses.device.type == "mps" else losses.double()


def check_losses(
    name: str, losses: Tensor, tasks: Sequence[int] | None = None, *, zero: bool = False
) -> None:
    """Refuses losses that are not positive.

    Only on the CPU, since reading would wait for an accelerator; there the NaN that comes of them
    is found before the step.

    Args:
        name: of the method.
        losses: those of the tasks that take part.
        tasks: their indices; None for all.
        zero: allow zero.

    Raises:
        ValueError: a loss is negative, or zero.
    """
    if losses.device.type != "cpu":
        return
    for i, value in enumerate(losses.tolist()):
        if value < 0 or (value == 0 and not zero):
            raise ValueError(
                f"{name!r} needs {'no negative losses' if zero else 'positive losses'}, found "
                f"{value:g} for task {i if tasks is None else tasks[i]}; add an offset to that loss"
            )


def check_length(name: str, values: Sequence[float] | None, n_tasks: int) -> None:
    """Checks that there is one number for each task; None is always right.

    Raises:
        ValueError: there is not.
    """
    if values is not None and len(values) != n_tasks:
        raise ValueError(
            f"`{name}` must have one entry for each of {n_tasks} tasks, found {len(values)}"
        )


def of_tasks(
    name: str,
    values: Sequence[float],
    losses: Tensor,
    tasks: Sequence[int] | None = None,
) -> Tensor:
    """The numbers of the tasks that take part, as a tensor like the losses `[k]`.

    Raises:
        ValueError: there is not one for each task.
    """
    if tasks is None:
        check_length(name, values, len(losses))
        return as_weights(np.asarray(values, dtype=np.float64), losses)
    return as_weights(np.asarray([values[i] for i in tasks]), losses)


def positive_numbers(name: str, value: Sequence[float]) -> list[float]:
    """A vector of finite positive numbers, as plain data.

    Raises:
        ValueError: it is not.
    """
    found: list[float] = finite_numbers(name, value).tolist()
    if min(found) <= 0:
        raise ValueError(f"`{name}` must be positive, found {found}")
    return found


def some_positive(name: str, values: list[float]) -> list[float]:
    """The same numbers, none negative; ValueError if all are zero."""
    if not sum(values) > 0:
        raise ValueError(f"`{name}` must have a positive entry, found {values}")
    return values


class ReferenceMixin:
    """For methods with a preference p and an ideal point z, which go with their tasks."""

    per_task_state: ClassVar[bool] = True
    pref: list[float] | None
    ideal: list[float] | None = None

    def _refer(self, pref: Sequence[float] | None, ideal: Sequence[float] | None = None) -> None:
        """Keeps both as plain data, checked but for their lengths."""
        if pref is not None:
            pref = some_positive("pref", preference("pref", pref, None, 0.0).tolist())
        self.pref = pref
        self.ideal = None if ideal is None else finite_numbers("ideal", ideal).tolist()

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that `pref` and `ideal` have T entries.

        Raises:
            ValueError: they have not.
        """
        check_length("pref", self.pref, n_tasks)
        check_length("ideal", self.ideal, n_tasks)

    def preferred(self, losses: Tensor, tasks: Sequence[int] | None) -> Tensor:
        """`p [k]` of the tasks that take part, as precise as can be; 1/k each where none was given.

        Raises:
            ValueError: no task that takes part is preferred, or the length is wrong.
        """
        like = precise(losses.detach())
        if self.pref is None:
            return torch.full_like(like, 1.0 / len(like))
        if tasks is not None:
            some_positive("pref", [self.pref[i] for i in tasks])
        return of_tasks("pref", self.pref, like, tasks)

    def least(self, losses: Tensor, tasks: Sequence[int] | None) -> Tensor | float:
        """`z [k]` of the tasks that take part, as precise as can be, or 0.

        Raises:
            ValueError: the length is wrong.
        """
        if self.ideal is None:
            return 0.0
        return of_tasks("ideal", self.ideal, precise(losses.detach()), tasks)
