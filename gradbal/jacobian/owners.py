"""Which instance each row of a layer's output belongs to, found by experiment.

Every instance's loss is multiplied by a power of two of its own, digit by digit of a code, and the
backward pass repeated. Where instances do not mix, a row of gradients changes by exactly the factor
of the one instance it belongs to, whatever the precision; where they do, it changes otherwise: by
parts whose factors differ by up to 2¹⁵, so that even a small part shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Codes", "Owners", "Reading", "arrange", "merged"]

Ids = NDArray[np.int64]

UNKNOWN = -1
"""The owner of a row without a gradient: it could be anyone's."""

_TOLERANCE = 1e-3
"""Of a row's largest entry: kernels that add in an order of their own are off by some rounding."""


@dataclass(frozen=True)
class Codes:
    """A code for each of B instances, and the factors that spell it.

    owners: code → instance, or `UNKNOWN`. factors: `[passes, B]`, powers of two. levels: how many
    different ones.
    """

    owners: Ids
    factors: Tensor
    levels: int

    @staticmethod
    def draw(n: int, like: Tensor, levels: int) -> Codes:
        """Distinct codes for n instances; factors of the dtype and device of `like`."""
        passes = 1
        while levels**passes < n:
            passes += 1
        # In no order, lest neighbours always share their digits.
        codes = np.random.default_rng(0).permutation(levels**passes)[:n]
        owners = np.full(levels**passes, UNKNOWN)
        owners[codes] = np.arange(n)
        digits = np.stack([codes // levels**k % levels for k in range(passes)])
        factors = torch.as_tensor(np.exp2(digits - levels // 2))
        return Codes(owners, factors.to(like.device, like.dtype), levels)


class Reading:
    """What the passes tell of the rows of one tensor.

    Args:
        base: gradients of the sum of the losses.
        rows: how many of their leading dimensions are of rows.
        codes: what the losses of the next passes are multiplied by.
    """

    def __init__(self, base: Tensor, rows: int, codes: Codes) -> None:
        self._shape = base.shape[:rows]
        self._base = base = self._flat(base)
        self._codes = codes
        self._size, self._where = base.abs().max(1, keepdim=True)
        self._told = (self._size > faint(base)) & self._size.isfinite()
        self._code = torch.zeros_like(self._size, dtype=torch.long)
        self._good = torch.ones_like(self._told)

    def add(self, number: int, other: Tensor) -> None:
        """Takes in the gradients of the pass of that number."""
        base, told, half = self._base, self._told, self._codes.levels // 2
        other = self._flat(other)
        ratio = other.gather(1, self._where) / torch.where(told, base.gather(1, self._where), 1.0)
        digit = ratio.log2().round()
        factor = digit.exp2()
        off = (other - factor * base).abs().amax(1, keepdim=True)
        right = (off <= _TOLERANCE * factor * self._size) & (-half <= digit) & (digit < half)
        small = other.abs().amax(1, keepdim=True) <= faint(base) * 2.0**half
        self._good &= torch.where(told, right, small | ~self._size.isfinite())
        place = self._codes.levels**number
        self._code += torch.where(right, digit + half, 0.0).long() * place

    def owners(self) -> Ids | None:
        """The owner of each row, `UNKNOWN` where it is zero, too small to tell, or not
        finite; None if a row belongs to several instances."""
        if not bool(self._good.all()):
            return None
        known = self._told.flatten().cpu().numpy()
        found: Ids = self._codes.owners[self._code.flatten().cpu().numpy()]
        found = np.where(known, found, UNKNOWN)
        return None if (found[known] == UNKNOWN).any() else found.reshape(self._shape)

    def _flat(self, gradient: Tensor) -> Tensor:
        return _wide(gradient).reshape(self._shape.numel(), -1)


def faint(like: Tensor) -> float:
    """Up to this size a row's entries may lose digits when they are multiplied by the factors."""
    return torch.finfo(like.dtype).tiny * 2.0**16


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@dataclass(frozen=True)
class Owners:
    """How the rows along one dimension of a tensor belong to B instances.

    n: B. dim: the dimension of the rows. shape: of all leading dimensions. ids: `[*shape]`, owners
    as far as known. whose: `[R]`, the owner of each row along the dimension. blocks: (k, m), where
    row `(i·B + b)·m + j` is instance b's, i < k, j < m. index: `[B, S]`, the rows of each instance
    where they are in no such order, filled up with the number of rows. loose: rows that are in no
    instance's, if there are any. unsure: `[*shape]`, rows that never had a gradient when looked at,
    or None.
    """

    n: int
    dim: int
    shape: tuple[int, ...]
    ids: Ids
    whose: Tensor
    blocks: tuple[int, int] | None = None
    index: Tensor | None = None
    loose: Tensor | None = None
    unsure: Tensor | None = None

    @property
    def n_seen(self) -> int:
        """How many instances have a row of their own for sure."""
        return len(np.unique(self.ids[self.ids != UNKNOWN]))

    def apart(self, tensor: Tensor) -> Tensor:
        """The rows of each instance, `[B, S, …]`, of a tensor with these leading dimensions."""
        rows = tensor if self.dim == 0 else tensor.movedim(self.dim, 0)
        rest = rows.shape[1:]
        if self.index is not None:
            # NaN of nobody in particular is everyone's.
            zero = rows.new_zeros(1, *rest)
            if self.loose is not None:
                zero = zero * rows[self.loose].sum(0, keepdim=True)
            return torch.cat([rows, zero])[self.index]
        assert self.blocks is not None
        k, m = self.blocks
        if k == 1:
            return rows.reshape(self.n, m, *rest)
        return rows.reshape(k, self.n, m, *rest).movedim(1, 0).reshape(self.n, k * m, *rest)

    def doubt(self, gradients: Tensor) -> Tensor | None:
        """0-dim, whether a row that never had a gradient has one now; None if there is no such
        row."""
        if self.unsure is None:
            return None
        rows = gradients.reshape(*self.shape, -1).abs().amax(-1)
        return (self.unsure & ~(rows <= faint(gradients))).any()


def arrange(ids: Ids, n: int, device: torch.device) -> Owners | None:
    """Finds the dimension along which rows change hands, and their order.

    Args:
        ids: owners, one dimension for each leading one of the tensor.
        n: B.
        device: of the tensor.

    Returns:
        None if there is no such dimension.
    """
    dims = [(dim, along) for dim in range(ids.ndim) if (along := _along(ids, dim)) is not None]
    choices = [(dim, *order) for dim, along in dims for order in _orders(along, n)]
    if choices:
        # Several differ in rows that have no gradient so far.
        dim, k, m = choices[0]
        unsure = ids == UNKNOWN
        if len(choices) == 1:
            # All other rows at an index go with those that are known there.
            others = tuple(d for d in range(ids.ndim) if d != dim)
            unsure = np.broadcast_to(unsure.all(others, keepdims=True), ids.shape)
        whose = np.arange(ids.shape[dim]) // m % n
        return Owners(
            n, dim, ids.shape, ids, _on(whose, device), (k, m), unsure=_any(unsure, device)
        )
    for dim, along in dims:
        return Owners(
            n,
            dim,
            ids.shape,
            ids,
            _on(along, device),
            index=_on(_index(along, n), device),
            loose=_any(np.flatnonzero(along == UNKNOWN), device),
            unsure=_any(ids == UNKNOWN, device),
        )
    return None


def _on(values: NDArray[Any], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def _any(values: NDArray[Any], device: torch.device) -> Tensor | None:
    """The values, or None where there is no index or no truth among them."""
    none = len(values) == 0 if values.dtype != np.bool_ else not values.any()
    return None if none else _on(values, device)


def merged(new: Ids, before: Owners | None, n: int, device: torch.device) -> Owners | None:
    """As `arrange`, with what an earlier look told of rows that have no gradient now."""
    if before is not None and before.ids.shape == new.shape:
        old = before.ids
        both = np.where(new == UNKNOWN, old, new)
        if not ((old != both) & (old != UNKNOWN)).any():
            found = arrange(both, n, device)
            if found is not None:
                return found
    return arrange(new, n, device)


def _along(ids: Ids, dim: int) -> Ids | None:
    """The one owner at each index of a dimension; None where one has several."""
    rows = np.moveaxis(ids, dim, 0).reshape(ids.shape[dim], -1)
    highest = rows.max(1)
    agree = (rows == highest[:, None]) | (rows == UNKNOWN)
    return highest if agree.all() else None


def _orders(along: Ids, n: int) -> list[tuple[int, int]]:
    """The regular orders (k, m) that fit the owners of the rows."""
    size = len(along)
    if size % n:
        return []
    rows = np.arange(size)
    known = along != UNKNOWN
    found = []
    for m in range(size // n, 0, -1):
        if (size // n) % m == 0 and (rows // m % n == along)[known].all():
            found.append((size // n // m, m))
    return found


def _index(along: Ids, n: int) -> Ids:
    """`[B, S]`: the rows of each instance, filled up with the number of rows; by one at least where
    there are rows of nobody."""
    counts = np.bincount(along[along != UNKNOWN], minlength=n)
    index = np.full((n, int(counts.max()) + int((along == UNKNOWN).any())), len(along))
    taken = np.zeros(n, dtype=np.int64)
    for row, owner in enumerate(along.tolist()):
        if owner != UNKNOWN:
            index[owner, taken[owner]] = row
            taken[owner] += 1
    return index
