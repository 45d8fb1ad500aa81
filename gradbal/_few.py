"""Steps of few numbers, each like the one before.

On a network nobody notices a quarter of a millisecond a step. On a problem of a few numbers, as in
the toy examples of the papers, it is most of the step, and all of it is what Python takes for
choices that come out as they did the last time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradbal._losses import Names
from gradbal.aggregators.base import Aggregator, ClosureAggregator, GramianAggregator
from gradbal.jacobian import Rows, combine_rows, gradients, product_of_rows

__all__ = ["Few", "Taken", "are_alike"]

_HOST, _WIDE = torch.device("cpu"), torch.float64


class Taken(NamedTuple):
    """What the passes of a step have brought.

    losses, wide: `[T]`, the values, in their own dtype and in float64. gradients: for each loss n
    tensors, as an engine of rows gives them. rows: the same as plain floats, one list a loss; None
    where something is not as it was in the step before, or not finite.
    """

    losses: Tensor
    wide: Tensor
    gradients: list[tuple[Tensor | None, ...]]
    rows: list[list[float]] | None


def are_alike(aggregator: Aggregator) -> bool:
    """Whether all that a method's steps need of the gradients is one Gramian, at every step."""
    kind = type(aggregator)
    return (
        isinstance(aggregator, GramianAggregator)
        and not isinstance(aggregator, ClosureAggregator)
        and not aggregator.needs_features
        and kind.column_groups is GramianAggregator.column_groups
        and kind.probed_parameters is GramianAggregator.probed_parameters
        and kind.param_groups is Aggregator.param_groups
    )


@dataclass(frozen=True)
class Few:
    """The passes of an ordinary step of few numbers.

    Ordinary is one whose losses are a list, tuple or dict of 0-dim tensors on the host, all finite
    and of one dtype, whose parameters are shared by all losses, and have no hooks of the user's.

    names: of the tasks. parameters: n of them, all that the wrapped optimizer has. reach: what each
    loss reached in the step before: all of them.
    """

    names: Names
    parameters: list[Tensor]
    numbered: bool

    @classmethod
    def after(cls, names: Names, rows: Rows) -> Few | None:
        """For more steps like the one that these rows are of; None where it was not like that."""
        if not rows.are_few or not all(reach is not None and all(reach) for reach in rows.reach):
            return None
        if len(rows.shared) < len(rows.parameters):
            return None
        return cls(names, rows.parameters, names == tuple(range(len(names))))

    def take(self, losses: object, groups: Sequence[Mapping[str, Any]]) -> Taken | None:
        """Takes the T gradients; None, and nothing has happened, where the step is another one.

        Args:
            losses: as the user gave them.
            groups: the wrapped optimizer's param groups.
        """
        parameters = [p for group in groups for p in group["params"]]
        if len(parameters) != len(self.parameters) or not all(
            map(is_, parameters, self.parameters)
        ):
            return None
        for p in parameters:
            if not p.requires_grad or p._backward_hooks:
                return None
        found = self._listed(losses)
        if found is None or len(found) != len(self.names):
            return None
        values = []
        dtype = getattr(found[0], "dtype", None)
        for loss in found:
            if (
                type(loss) is not Tensor
                or loss.dim() != 0
                or not loss.is_cpu
                or not loss.requires_grad
                or loss.dtype is not dtype
            ):
                return None
            value = loss.item()
            if not isfinite(value):
                return None
            values.append(value)
        if dtype is not torch.float32 and dtype is not torch.float64:
            return None
        last = len(found) - 1
        taken = [gradients(loss, parameters, None, i < last) for i, loss in enumerate(found)]
        own = _tensor(values, dtype)
        wide = own if dtype is _WIDE else _tensor(values, _WIDE)
        return Taken(own, wide, taken, self._floats(taken))

    def _listed(self, losses: object) -> Sequence[Any] | None:
        if isinstance(losses, list | tuple):
            return losses if self.numbered else None
        if isinstance(losses, dict) and tuple(losses) == self.names:
            return list(losses.values())
        return None

    @staticmethod
    def _floats(taken: Sequence[tuple[Tensor | None, ...]]) -> list[list[float]] | None:
        rows = []
        for grads in taken:
            row: list[float] = []
            for g in grads:
                if g is None or g.layout is not torch.strided:
                    return None
                row += g.reshape(-1).tolist()
            rows.append(row)
        return rows if all(all(map(isfinite, row)) for row in rows) else None

    def gramian(self, rows: Sequence[Sequence[float]]) -> Tensor | None:
        """`JJᵀ [T, T]`, in float64; None where a square is more than that holds."""
        g = product_of_rows(rows)
        return None if any(not isfinite(g[i][i]) for i in range(len(g))) else _tensor(g, _WIDE)

    def deliver(self, weights: Tensor, rows: Sequence[Sequence[float]]) -> None:
        """Sends `Jᵀw` into `.grad` through AccumulateGrad; `weights [T]` are on the host."""
        direction, start, parts = combine_rows(weights.tolist(), rows), 0, []
        for p in self.parameters:
            end = start + p.numel()
            parts.append(_tensor(direction[start:end], p.dtype).view(p.shape))
            start = end
        torch.autograd.backward(self.parameters, parts)


def _tensor(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=_HOST)
