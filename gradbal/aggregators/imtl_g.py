"""Impartial multi-task learning, gradient balance."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from gradbal.aggregators._arguments import one_of
from gradbal.aggregators._gramians import relative_cutoff, solve_active
from gradbal.aggregators.base import GramianAggregator
from gradbal.registry import Promises, register
from gradbal.solvers import Array, Indices, pinv_times

__all__ = ["IMTLG", "imtl_g"]


@register(
    "imtl_g",
    title="Towards Impartial Multi-task Learning",
    venue="ICLR",
    year=2021,
    url="https://openreview.net/forum?id=IMPnRXEWpvr",
    promises=Promises(heads="weighted", degree=1, gain=lambda a, t, n: 1.0, continuous=False),
)
class IMTLG(GramianAggregator):
    """The combination whose projections on all the gradients are equal.

    Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021,
    https://openreview.net/forum?id=IMPnRXEWpvr. `d = Jᵀw` with `Σ w_i = 1` and `⟨d, u_i⟩` equal for
    all unit gradients `u_i = g_i/|g_i|`. With `v = G⁺n`, n the norms, `w = v/(1ᵀv)`. Weights may be
    negative, and d may conflict.

    Args:
        guard: where `1ᵀv` is at most `1e-3 |v|₁`, divide by `|v|₁` instead. There the paper's
            formula (`guard=False`) explodes or ascends every loss. The guard is gradbal's.

    Note:
        LibMTL's IMTL is the hybrid with learned loss scales; it inverts a matrix, which is an error
        where two gradients coincide and NaN for a zero row, and leaves task-specific gradients
        unweighted. nash-mtl has this part alone and weights them, as gradbal does. TorchJD returns
        zero weights where `1ᵀv` is about zero. gradbal takes the pseudo-inverse of the cosine
        matrix, which agrees with the paper's formula where both exist, and has the `guard`.

    Example:
        >>> import torch
        >>> IMTLG().direction(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([0.7500, 0.7500])
    """

    def __init__(self, guard: bool = True) -> None:
        one_of("guard", guard, (False, True))
        self.guard = guard

    def weights(self, gramian: Tensor, losses: Tensor | None = None) -> Tensor:
        """`w [T]`, sum one unless the guard acts, from the Gramian `[T, T]`."""
        return imtl_g(gramian, guard=self.guard)


def imtl_g(gramian: Tensor, *, guard: bool = True) -> Tensor:
    """`w = v/(1ᵀv)`, `v = N⁻¹ C⁺ 1`.

    Eigenvalues of the cosine matrix up to 1e-12 of the largest count as zero, up to `10·T·eps` for
    a Gramian that is not in float64.

    Args:
        gramian: `[T, T]`.
        guard: see `IMTLG`.

    Returns:
        `w [T]`, dtype and device of the Gramian; zero for zero rows.
    """
    size = len(gramian)
    rtol = relative_cutoff(gramian)

    def solve(c: Array, n: Array, active: Indices) -> Array:
        y = pinv_times(c, np.ones_like(n), rtol)
        # C C⁺ 1 is what the range of C has of the vector of ones; nothing for opposite rows.
        reached = c @ y
        if reached @ reached <= (100 * rtol) ** 2 * len(n):
            y = np.ones_like(n)
        v = y / (n / n.min())
        total, absolute = v.sum(), np.abs(v).sum()
        if guard and total <= 1e-3 * absolute:
            return v / absolute  # type: ignore[no-any-return]
        return v / total  # type: ignore[no-any-return]

    return solve_active(gramian, 1.0 / size, solve)
