"""State for each task and shared parameter, which several methods keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["RowStateMixin"]


class RowStateMixin:
    """For methods that keep `rows [T, P]`, something about every gradient so far.

    They are zero at first, in the Jacobian's dtype or float32 where that is narrower: an average in
    half precision would round small steps away. They are on the Jacobian's device, also when a
    checkpoint came from another. State of T numbers is kept in lists, as the host needs it anyway.
    Gradients have to be finite, since what is not would stay: `MultiTaskOptimizer` sees to that.
    """

    name: ClassVar[str]
    per_task_state: ClassVar[bool] = True
    rows: Tensor | None = None
    _spare: Tensor | None = None
    _n_tasks: int | None = None

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that there is state for T tasks, or none yet.

        Raises:
            ValueError: T differs from before.
        """
        if self.rows is not None and len(self.rows) != n_tasks:
            raise ValueError(
                f"{self.name!r} has state for {len(self.rows)} tasks, found {n_tasks}; "
                "reset() begins anew"
            )
        self._n_tasks = n_tasks

    def reset(self) -> None:
        """Forgets all gradients so far."""
        self.rows = self._spare = self._n_tasks = None

    def _indices(self, jacobian: Tensor, tasks: Sequence[int] | None) -> list[int]:
        """The tasks that the Jacobian's rows are of.

        Raises:
            ValueError: T or P differs from before, or `tasks` does not fit.
        """
        n_rows, width = jacobian.shape
        if tasks is None:
            self.prepare(n_rows, jacobian)
            tasks = range(n_rows)
        elif self.rows is not None:
            self._n_tasks = len(self.rows)
        if self._n_tasks is None:
            raise ValueError(
                "the number of tasks must be known when some sit out: call prepare(n_tasks, like) "
                "before a first direction(..., tasks=...)"
            )
        indices = [int(i) for i in tasks]
        known = range(self._n_tasks)
        if len(indices) != n_rows or len(set(indices).intersection(known)) != n_rows:
            raise ValueError(
                f"`tasks` must be {n_rows} different indices below {self._n_tasks}, one for each "
                f"row of the Jacobian, found {indices}"
            )
        if self.rows is not None and self.rows.shape[1] != width:
            raise ValueError(
                f"{self.name!r} has state for {self.rows.shape[1]} shared scalars, found {width}; "
                "reset() begins anew"
            )
        return indices

    def _own_rows(self, jacobian: Tensor) -> Tensor:
        """`rows`, made if need be, on the Jacobian's device."""
        if self.rows is None:
            assert self._n_tasks is not None
            self.rows = torch.zeros(
                self._n_tasks,
                jacobian.shape[1],
                dtype=torch.promote_types(jacobian.dtype, torch.float32),
                device=jacobian.device,
            )
        elif self.rows.device != jacobian.device:
            self.rows = self.rows.to(jacobian.device)
        return self.rows

    def _next_rows(self, jacobian: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The rows so far, and those to come, which have all but the rows of `indices` already.

        The ones so far stay as they are until the step after next, so that a step that fails
        half-way can be undone.
        """
        rows, spare = self._own_rows(jacobian), self._spare
        if spare is None or spare.shape != rows.shape or spare.device != rows.device:
            spare = torch.empty_like(rows)
        for i in set(range(len(rows))).difference(indices):
            spare[i].copy_(rows[i])
        self.rows, self._spare = spare, rows
        return rows, spare

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_spare": None}
