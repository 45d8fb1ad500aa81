"""Alignment of the gradients' principal components."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from gradbal.aggregators._arguments import in_range, one_of
from gradbal.aggregators._gramians import relative_cutoff, solve_active
from gradbal.aggregators._mixins import PreferenceMixin
from gradbal.aggregators.base import GramianAggregator
from gradbal.registry import Promises, register
from gradbal.solvers import Array, Indices, graded_eigh

__all__ = ["AlignedMTL", "aligned_mtl"]

_SCALES: dict[str, Callable[[Array], Any]] = {"min": np.min, "median": np.median, "mean": np.mean}


@register(
    "aligned_mtl",
    title="Independent Component Alignment for Multi-Task Learning",
    venue="CVPR",
    year=2023,
    url="https://arxiv.org/abs/2305.19000",
    promises=Promises(
        heads="own",
        degree=1,
        gain=lambda a, t, n: 1.0 if a.pref is None else float(sum(a.pref)),
        continuous=False,
    ),
)
class AlignedMTL(PreferenceMixin, GramianAggregator):
    """Turns and rescales the gradients until they are orthogonal and of equal length, and averages.

    Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023,
    https://arxiv.org/abs/2305.19000. With `G = V diag(λ) Vᵀ`, `B = √s V diag(λ^{−1/2}) Vᵀ` and s
    the least λ, the aligned rows `BJ` have condition number one; `d = (BJ)ᵀp`, `w = Bp`.
    Eigenvalues that count as zero are left out, so that d jumps where J loses rank. d may conflict.

    Args:
        scale: s is the "min", "median" or "mean" of the eigenvalues that count. With "min" (the
            paper's default) two nearly parallel gradients make d nearly vanish.
        pref: p, non-negative, one entry for each task; None is 1/T each. The paper has ones, and
            so a d that is T times longer.
        rtol: eigenvalues of G up to this part of the largest count as zero; None is 1e-12, and
            `10·T·eps` for a Gramian that is not in float64.

    Raises:
        ValueError: an unknown `scale`, or an argument out of range.

    Note:
        LibMTL sums over the tasks (p = 1), so that its d is T times longer, has "min" alone, and
        calls a function that torch 2 no longer has; TorchJD averages (p = 1/T) and has all three
        scales, as gradbal does. LibMTL's threshold is float32's rounding unit. A threshold below
        the rounding of the Gramian takes noise for the least eigenvalue where J has no full rank,
        and d all but vanishes. gradbal's follows the precision of the Gramian, and small
        eigenvalues are as accurate as large ones, however far apart the norms are.

    Example:
        >>> import torch
        >>> AlignedMTL().direction(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 0.5000])
    """

    def __init__(
        self,
        scale: str = "min",
        pref: Sequence[float] | None = None,
        rtol: float | None = None,
    ) -> None:
        one_of("scale", scale, tuple(_SCALES))
        if rtol is not None:
            in_range("rtol", rtol, 0, 1, bounds="[)")
        self.scale = scale
        self.rtol = rtol
        self._prefer(pref)

    def combination(self, gramian: Tensor, pref: Array) -> Tensor:
        """`w [T]` from the Gramian `[T, T]` and `p [T]`."""
        return aligned_mtl(gramian, pref, scale=self.scale, rtol=self.rtol)


def aligned_mtl(
    gramian: Tensor, pref: Array, *, scale: str = "min", rtol: float | None = None
) -> Tensor:
    """`w = √s V diag(λ^{−1/2}) Vᵀp`.

    Args:
        gramian: `[T, T]`.
        pref: `p [T]`.
        scale, rtol: see `AlignedMTL`.

    Returns:
        `w [T]`, dtype and device of the Gramian; zero for zero rows, 1/T everywhere if all are.
    """
    if rtol is None:
        rtol = relative_cutoff(gramian)

    def solve(c: Array, n: Array, active: Indices) -> Array:
        values, vectors = graded_eigh(c, n)
        keep = values > rtol * values.max()
        kept, v = values[keep], vectors[:, keep]
        s = float(_SCALES[scale](kept))
        return np.asarray(v @ (np.sqrt(s / kept) * (v.T @ pref[active])))

    return solve_active(gramian, 1.0 / len(gramian), solve)
