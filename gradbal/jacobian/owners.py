"""Which instance each row of a layer's output belongs to, found by experiment.

Every instance's loss is multiplied by a power of two of its own, digit by digit of a code, and the
backward pass repeated. Where instances do not mix, a row of gradients changes by exactly the factor
of the one instance it belongs to, whatever the precision; where they do, it changes otherwise: by
parts whose factors differ by up to 2¹⁵, so that even a small part shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Codes", "Owners", "arrange", "identify", "merged"]

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
    def draw(n: int, like: Tensor) -> Codes:
        """Distinct codes for n instances; factors of the dtype and device of `like`.

        Half precision without a wide exponent (float16) has few powers of two.
        """
        levels = 4 if like.dtype == torch.float16 else 16
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


def identify(base: Tensor, coded: Sequence[Tensor], codes: Codes) -> Ids | None:
    """The owner of each row; None if a row belongs to several instances.

    Args:
        base: gradients `[R, F]` of the sum of the losses.
        coded: for each pass, those of the losses multiplied by its factors.
        codes: what they were multiplied by.

    Returns:
        `[R]`, `UNKNOWN` for rows that are zero, too small to tell, or not finite.
    """
    base = base.float() if base.dtype in (torch.float16, torch.bfloat16) else base
    size, where = base.abs().max(1, keepdim=True)
    told = (size > faint(base, codes.levels)) & size.isfinite()
    code = torch.zeros_like(size)
    good = torch.ones_like(told)
    for k, other in enumerate(coded):
        other = other.to(base.dtype)
        ratio = other.gather(1, where) / torch.where(told, base.gather(1, where), 1.0)
        digit = ratio.log2().round()
        factor = digit.exp2()
        off = (other - factor * base).abs().amax(1, keepdim=True)
        right = (off <= _TOLERANCE * factor * size) & (digit.abs() <= codes.levels // 2)
        small = other.abs().amax(1, keepdim=True) <= faint(base, codes.levels) * 2.0**codes.levels
        good &= torch.where(told, right, small | ~size.isfinite())
        code += (digit + codes.levels // 2) * codes.levels**k
    if not bool(good.all()):
        return None
    known = told.squeeze(1).cpu().numpy()
    found = np.full(len(base), UNKNOWN)
    found[known] = codes.owners[code.squeeze(1).cpu().numpy()[known].astype(np.int64)]
    return None if (found[known] == UNKNOWN).any() else found


def faint(like: Tensor, levels: int) -> float:
    """Up to this size a row's entries lose digits when they are multiplied by the factors."""
    return torch.finfo(like.dtype).tiny * 2.0**levels


@dataclass(frozen=True)
class Owners:
    """How the rows along one dimension of a tensor belong to B instances.

    n: B. dim: the dimension of the rows. shape: of all leading dimensions. ids: `[*shape]`, owners
    as far as known. blocks: (k, m), where row `(i·B + b)·m + j` is instance b's, i < k, j < m.
    index: `[B, S]`, the rows of each instance where they are in no such order, filled up with the
    number of rows. unsure: `[*shape]`, rows that never had a gradient when looked at, or None.
    """

    n: int
    dim: int
    shape: tuple[int, ...]
    ids: Ids
    blocks: tuple[int, int] | None = None
    index: Tensor | None = None
    unsure: Tensor | None = None

    def apart(self, tensor: Tensor) -> Tensor:
        """The rows of each instance, `[B, S, …]`, of a tensor with these leading dimensions."""
        rows = tensor.movedim(self.dim, 0)
        rest = rows.shape[1:]
        if self.index is not None:
            return torch.cat([rows, rows.new_zeros(1, *rest)])[self.index]
        assert self.blocks is not None
        k, m = self.blocks
        if k == 1:
            return rows.reshape(self.n, m, *rest)
        return rows.reshape(k, self.n, m, *rest).movedim(1, 0).reshape(self.n, k * m, *rest)

    def doubt(self, gradients: Tensor) -> Tensor | None:
        """0-dim, positive where a row that never had a gradient has one now."""
        if self.unsure is None:
            return None
        rows = gradients.reshape(*self.shape, -1).abs().amax(-1)
        return torch.where(self.unsure, rows, 0.0).amax().float()


def arrange(ids: Ids, n: int, device: torch.device) -> Owners | None:
    """Finds the dimension along which rows change hands, and their order.

    Args:
        ids: owners, one dimension for each leading one of the tensor.
        n: B.
        device: of the tensor.

    Returns:
        None if there is no such dimension.
    """
    choices = []
    for dim in range(ids.ndim):
        along = _along(ids, dim)
        if along is not None:
            choices += [(dim, along, blocks) for blocks in _orders(along, n)]
    if len(choices) == 1:
        dim, along, blocks = choices[0]
        # All other rows at an index go with those that are known there.
        seen = np.expand_dims(along != UNKNOWN, [d for d in range(ids.ndim) if d != dim])
        unsure = np.broadcast_to(~seen, ids.shape)
        return _owners(ids, n, dim, unsure, device, blocks)
    if choices:
        # They differ in rows that have no gradient so far.
        dim, along, blocks = choices[0]
        return _owners(ids, n, dim, ids == UNKNOWN, device, blocks)
    for dim in range(ids.ndim):
        along = _along(ids, dim)
        if along is not None:
            owners = _owners(ids, n, dim, ids == UNKNOWN, device, None)
            return replace(owners, index=_index(along, n, device))
    return None


def merged(new: Ids, old: Ids, n: int, device: torch.device) -> Owners | None:
    """As `arrange`, with what an earlier look told of rows that have no gradient now."""
    both = np.where(new == UNKNOWN, old, new)
    if (both != new).any() and not ((old != new) & (old != UNKNOWN) & (new != UNKNOWN)).any():
        found = arrange(both, n, device)
        if found is not None:
            return found
    return arrange(new, n, device)


def _owners(
    ids: Ids,
    n: int,
    dim: int,
    unsure: NDArray[np.bool_],
    device: torch.device,
    blocks: tuple[int, int] | None,
) -> Owners:
    mask = torch.tensor(unsure, device=device) if unsure.any() else None
    return Owners(n, dim, ids.shape, ids, blocks, None, mask)


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


def _index(along: Ids, n: int, device: torch.device) -> Tensor:
    """`[B, S]`: the rows of each instance, filled up with the number of rows."""
    counts = np.bincount(along[along != UNKNOWN], minlength=n)
    index = np.full((n, max(1, int(counts.max()))), len(along))
    taken = np.zeros(n, dtype=np.int64)
    for row, owner in enumerate(along.tolist()):
        if owner != UNKNOWN:
            index[owner, taken[owner]] = row
            taken[owner] += 1
    return torch.as_tensor(index, device=device)
