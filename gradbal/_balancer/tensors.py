"""Small tensors with one entry for each task, of which some may sit a step out."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["only", "rows_of", "scaled", "spread_out", "sum_of", "unscaled"]


def rows_of(rows: Tensor, present: list[int]) -> Tensor:
    """What belongs to the tasks that take part. The row of one that sits out may hold NaN, which no
    weight takes away; where all take part nothing is copied, nor an index sent to the device."""
    return rows if len(present) == len(rows) else rows[present]


def sum_of(a: Tensor, b: Tensor, a_lacks: frozenset[int], b_lacks: frozenset[int]) -> Tensor:
    """`a + b [T]`, of which either may lack entries that the other has."""
    if not (a_lacks or b_lacks):
        return a + b
    pairs = enumerate(zip(a.unbind(), b.unbind(), strict=True))
    parts = [y if i in a_lacks else x if i in b_lacks else x + y for i, (x, y) in pairs]
    return torch.stack(parts)


def only(weights: Tensor, present: list[int]) -> Tensor:
    """The weights, with zeros for the tasks that sit out."""
    if len(present) == len(weights):
        return weights
    kept = torch.zeros_like(weights)
    kept[present] = weights[present]
    return kept


def spread_out(values: Tensor | None, like: Tensor, present: list[int], size: int = 0) -> Tensor:
    """`[T]`, float64 on the host, zero for the tasks that sit out."""
    result = torch.zeros(size or len(like), dtype=torch.float64)
    if values is not None:
        result[present] = values.detach().double().cpu()
    return result


def scaled(factors: Tensor, scale: Tensor | None) -> Tensor:
    """The factors with a loss scale."""
    return factors if scale is None else factors * scale.to(factors)


def unscaled(g: Tensor, scale: Tensor | None) -> Tensor:
    """The Gramian without a loss scale."""
    return g if scale is None else g / scale.to(g) ** 2
