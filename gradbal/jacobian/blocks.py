"""Gradients of several losses at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Block"]


@dataclass(frozen=True)
class Block:
    """The gradients of t losses.

    tasks: their places among the roots, ascending. stacked: index → `[t, *shape]`, for parameters
    that all of them reach; emptied when it is written. single: for each of them, index → gradient
    of the others it reaches.
    """

    tasks: Sequence[int]
    stacked: dict[int, Tensor]
    single: Sequence[dict[int, Tensor]]

    def rows(self, n_parameters: int) -> list[tuple[Tensor | None, ...]]:
        """For each of the t losses its gradients, None where it has none."""
        parts = {k: g.unbind() for k, g in self.stacked.items()}
        found = [{k: p[t] for k, p in parts.items()} | own for t, own in enumerate(self.single)]
        return [tuple(row.get(k) for k in range(n_parameters)) for row in found]
