"""A generator, and preferences: what several methods of different kinds have."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gradbal.aggregators._arguments import preference
from gradbal.solvers import Array

__all__ = ["PreferenceMixin", "RandomMixin"]


class RandomMixin:
    """For methods that draw: their own generator, which is part of their state."""

    generator: torch.Generator
    _first_state: Tensor

    def _own(self, generator: torch.Generator | None) -> None:
        """Keeps `generator`, or a new one seeded from `torch.initial_seed()`."""
        if generator is None:
            generator = torch.Generator().manual_seed(torch.initial_seed())
        elif not isinstance(generator, torch.Generator):
            raise TypeError(f"`generator` must be a torch.Generator or None, found {generator!r}")
        elif generator.device.type != "cpu":
            raise ValueError(
                "`generator` must be on the CPU, where weights are drawn, "
                f"found one on {generator.device}"
            )
        self.generator = generator
        self._first_state = generator.get_state()

    def reset(self) -> None:
        """The generator goes back to where it was when the aggregator was made."""
        self.generator.set_state(self._first_state)


class PreferenceMixin:
    """For methods with `pref`, a non-negative weight for each task, that goes with its task."""

    per_task_state: ClassVar[bool] = True
    pref: list[float] | None

    def _prefer(self, pref: Sequence[float] | None) -> None:
        """Keeps `pref` as plain data, checked but for its length."""
        self.pref = None if pref is None else preference("pref", pref, None, 0.0).tolist()

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that `pref` has T entries.

        Raises:
            ValueError: it has not.
        """
        preference("pref", self.pref, n_tasks, 0.0)

    @abstractmethod
    def combination(self, gramian: Tensor, pref: Array) -> Tensor:
        """`w [T]` from the Gramian `[T, T]` and the preferences `p [T]`."""

    def weights(
        self,
        gramian: Tensor,
        losses: Tensor | None = None,
        tasks: Sequence[int] | None = None,
    ) -> Tensor:
        """`w [T]` from the Gramian `[T, T]`, with preferences of 1/T where none were given.

        Args:
            gramian: `[T, T]`, or `[k, k]` when `tasks` names the k tasks that take part.
            losses: not used.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: `pref` does not have one entry for each task.
        """
        pref = self.pref
        if pref is not None and tasks is not None:
            pref = [pref[i] for i in tasks]
        n_tasks = len(gramian)
        return self.combination(gramian, preference("pref", pref, n_tasks, 1.0 / n_tasks))
