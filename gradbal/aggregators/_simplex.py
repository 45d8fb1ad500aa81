"""State of the methods whose weights move on the probability simplex from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gradbal.aggregators._arguments import same_tasks

__all__ = ["SimplexStateMixin"]


class SimplexStateMixin:
    """For methods with `λ [T]` on the simplex as their state, 1/T at first."""

    name: ClassVar[str]
    per_task_state: ClassVar[bool] = True
    state_names: ClassVar[tuple[str, ...]] = ("simplex_weights",)
    simplex_weights: Tensor | None

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that T is as before.

        Raises:
            ValueError: it is not.
        """
        if self.simplex_weights is not None:
            same_tasks(self.name, len(self.simplex_weights), n_tasks)

    def taking_part(self, n_tasks: int, tasks: Sequence[int] | None) -> Tensor:
        """λ of the tasks that take part, `[k]`, float64 on the host, sum one."""
        if tasks is None:
            self.prepare(n_tasks, torch.empty(0))
            if self.simplex_weights is None:
                self.simplex_weights = torch.full((n_tasks,), 1.0 / n_tasks, dtype=torch.float64)
            return self.simplex_weights
        if self.simplex_weights is None:
            return torch.full((n_tasks,), 1.0 / n_tasks, dtype=torch.float64)
        part = self.simplex_weights[list(tasks)]
        total = part.sum()
        return part / total if total > 0 else torch.full_like(part, 1.0 / n_tasks)

    def keep(self, weights: Tensor, tasks: Sequence[int] | None) -> None:
        """Stores λ; those of tasks that sit out stay, as does what the others have in total."""
        weights = weights.detach().to("cpu", torch.float64)
        if tasks is None:
            self.simplex_weights = weights
        elif self.simplex_weights is not None:
            kept = self.simplex_weights.clone()
            kept[list(tasks)] = weights * kept[list(tasks)].sum()
            self.simplex_weights = kept

    def reset(self) -> None:
        """Back to 1/T."""
        self.simplex_weights = None
