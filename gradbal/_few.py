"""Steps of few numbers, each like the one before.

On a network nobody notices a quarter of a millisecond a step. On a problem of a few numbers, as in
the toy examples of the papers, it is most of the step, and all of it is what Python takes for
choices that come out as they did the last time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradbal._losses import Names
from gradbal.aggregators.base import Aggregator, ClosureAggregator, GramianAggregator
from gradbal.jacobian import Rows, combine_few, gradients, product_of_rows

__all__ = ["Few", "Taken", "are_alike"]

_HOST = torch.device("cpu")
_DTYPES = (torch.float32, torch.float64)


class Taken(NamedTuple):
    """What the passes of a step have brought.

    losses: `[T]`, the values. gradients: for each loss n tensors, as an engine of rows gives them.
    rows: the same as T lists of P floats; None where a loss reached less than in the step before,
    or a gradient is not dense.
    """

    losses: Tensor
    gradients: list[tuple[Tensor | None, ...]]
    rows: list[list[float]] | None


def are_alike(aggregator: Aggregator) -> bool:
    """Whether all that a method's steps need of the gradients is one Gramian, at every step."""
    if not isinstance(aggregator, GramianAggregator) or isinstance(aggregator, ClosureAggregator):
        return False
    kind = type(aggregator)
    return (
        not aggregator.needs_features
        and kind.column_groups is GramianAggregator.column_groups
        and kind.probed_parameters is GramianAggregator.probed_parameters
        and kind.param_groups is Aggregator.param_groups
    )


@dataclass(frozen=True)
class Few:
    """The passes of an ordinary step of few numbers.

    Ordinary is one whose losses are a list, tuple or dict of 0-dim tensors on the host, all finite
    and of one dtype, and each reaches all parameters, on which there are no hooks.

    names: of the tasks. rows: of the step before. parameters: n of them, all that the wrapped
    optimizer has. sizes: how many scalars each has. numbered: whether the tasks have no other names
    than numbers.
    """

    names: Names
    rows: Rows
    parameters: list[Tensor]
    sizes: list[int]
    numbered: bool

    @classmethod
    def after(cls, names: Names, rows: Rows) -> Few | None:
        """For more steps like the one that these rows are of; None where it was not like that."""
        if not rows.are_few or not all(reach is not None and all(reach) for reach in rows.reach):
            return None
        if len(rows.shared) < len(rows.parameters):
            return None
        sizes = [p.numel() for p in rows.parameters]
        return cls(names, rows, rows.parameters, sizes, names == tuple(range(len(names))))

    def take(self, losses: object, groups: Sequence[Mapping[str, Any]]) -> Taken | None:
        """Takes the T gradients; None, and nothing has happened, where the step is another one.

        Args:
            losses: as the user gave them.
            groups: the wrapped optimizer's param groups.
        """
        parameters = [p for group in groups for p in group["params"]]
        if not self.rows.fits(parameters, len(self.names)):
            return None
        for p in parameters:
            if not p.requires_grad or p._backward_hooks:
                return None
        found = self._listed(losses)
        if found is None or len(found) != len(self.names):
            return None
        dtype, values = getattr(found[0], "dtype", None), []
        if dtype not in _DTYPES:
            return None
        for loss in found:
            if type(loss) is not Tensor or loss.dtype is not dtype or not loss.is_cpu:
                return None
            if loss.dim() != 0 or not loss.requires_grad:
                return None
            value = loss.item()
            if not isfinite(value):
                return None
            values.append(value)
        last = len(found) - 1
        taken = [gradients(loss, parameters, None, i < last) for i, loss in enumerate(found)]
        rows: list[list[float]] = []
        for grads in taken:
            row: list[float] = []
            for g in grads:
                if g is None or g.layout is not torch.strided:
                    return Taken(_tensor(values, dtype), taken, None)
                row += g.tolist() if g.dim() == 1 else g.reshape(-1).tolist()
            rows.append(row)
        return Taken(_tensor(values, dtype), taken, rows)

    def _listed(self, losses: object) -> Sequence[Any] | None:
        if isinstance(losses, (list, tuple)):
            return losses if self.numbered else None
        if isinstance(losses, dict) and tuple(losses) == self.names:
            return list(losses.values())
        return None

    @staticmethod
    def gramian(taken: Taken) -> Tensor | None:
        """`JJᵀ [T, T]`, in float64; None where there are no rows, or something of them is not
        finite."""
        if taken.rows is None:
            return None
        products = product_of_rows(taken.rows)
        if not all(isfinite(row[i]) for i, row in enumerate(products)):
            return None
        return _tensor(products, torch.float64)

    def deliver(self, weights: Tensor, rows: Sequence[Sequence[float]]) -> None:
        """Sends `Jᵀw` into `.grad` through AccumulateGrad; `weights [T]` are on the host."""
        dtypes = [p.dtype for p in self.parameters]
        parts = combine_few(weights, rows, self.sizes, dtypes)
        for n, p in enumerate(self.parameters):
            if p.dim() != 1:
                parts[n] = parts[n].view(p.shape)
        torch.autograd.backward(self.parameters, parts)


def _tensor(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=_HOST)
