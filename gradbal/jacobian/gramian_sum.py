"""The Gramian of per-instance losses as it adds up."""

from __future__ import annotations

import torch
from torch import Tensor

from gradbal.jacobian.per_instance import Gathered, Outer, Part, in_float64
from gradbal.jacobian.products import SMALL, gramian

__all__ = ["GramianSum"]


class GramianSum:
    """The Gramian as it adds up, of the shared parameters and of the others."""

    def __init__(self, n: int, device: torch.device, chosen: frozenset[int], exact: bool) -> None:
        self.narrow = False
        self.exact = exact
        self._shared = torch.zeros(n, n, dtype=torch.float64, device=device)
        self._others = torch.zeros_like(self._shared)
        self._chosen = chosen
        self._few: dict[tuple[bool, torch.device], list[Tensor]] = {}

    def add(self, found: dict[int, Part], narrow: bool = False) -> None:
        """Adds the parts of one layer: a weight's, and a bias's that follows it.

        Args:
            found: by the parameter's index.
            narrow: whether they come from half precision.
        """
        self.narrow |= narrow
        if self.exact:
            found = {k: in_float64(part) for k, part in found.items()}
        apart = {k in self._chosen for k in found}
        first, *rest = found.values()
        if isinstance(first, Outer) and rest and len(apart) == 1:
            self.add_gramian(next(iter(found)), first.gramian(with_bias=True))
            return
        for k, part in found.items():
            if isinstance(part, Gathered) and part.rows.numel() <= SMALL // 4:
                self._add_few(k, part.rows.reshape(len(part.rows), -1))
            else:
                self.add_gramian(k, part.gramian())

    def add_gramian(self, k: int, gram: Tensor) -> None:
        """Adds that of parameter k."""
        into = self._shared if k in self._chosen else self._others
        into += gram.to(into.device)

    def close(self, taken: Tensor | None) -> tuple[Tensor, Tensor]:
        """The Gramian of the shared parameters, and the squares of the others' gradients.

        Args:
            taken: `[B]`, which instances take part, where not all do.
        """
        for key in [*self._few]:
            self._add_together(key)
        g, extremes = self._shared, self._others.diagonal()
        if taken is None:
            return g, extremes
        g = torch.where(taken & taken[:, None], g, 0.0)
        return g, torch.where(taken, extremes, 0.0)

    def _add_few(self, k: int, rows: Tensor) -> None:
        # A product for each bias and each gain would cost more than all of it at once.
        key = k in self._chosen, rows.device
        waiting = self._few.setdefault(key, [])
        waiting.append(rows)
        if sum(each.numel() for each in waiting) > SMALL:
            self._add_together(key)

    def _add_together(self, key: tuple[bool, torch.device]) -> None:
        into = self._shared if key[0] else self._others
        into += gramian(torch.cat(self._few.pop(key), 1)).to(into.device)
