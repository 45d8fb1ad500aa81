"""Impartial multi-task learning: gradient balance on top of loss balance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradbal.aggregators._arguments import one_of
from gradbal.aggregators._learned import LearnedMixin
from gradbal.aggregators.base import GramianAggregator
from gradbal.aggregators.imtl_g import imtl_g
from gradbal.aggregators.imtl_l import imtl_l
from gradbal.registry import Promises, register

__all__ = ["IMTL", "imtl"]


@register(
    "imtl",
    title="Towards Impartial Multi-task Learning",
    venue="ICLR",
    year=2021,
    url="https://openreview.net/forum?id=IMPnRXEWpvr",
    consumes="Gramian and losses",
    promises=Promises(
        heads="weighted",
        degree=1,
        gain=lambda a, t, n: float(torch.tensor(float(a.init)).exp()),
        continuous=False,
    ),
)
class IMTL(LearnedMixin, GramianAggregator):
    """`imtl_g` for the shared parameters, on losses that `imtl_l` has brought to the same scale.

    Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021,
    https://openreview.net/forum?id=IMPnRXEWpvr. Learned factors `e^{s_i}` minimise
    `Σ e^{s_i} ℓ_i − s_i`. Task-specific parameters get the gradients of the scaled losses,
    `e^{s_i} ∇ℓ_i`; the shared ones the combination of the rows `e^{s_i} g_i` whose projections on
    all of them are equal.

    The log-factors `s [T]` join the wrapped optimizer as a param group of their own.

    Args:
        init, lr, weight_decay, clamp: of s, as for `IMTLL`.
        guard: as for `IMTLG`.

    Raises:
        ValueError: an argument out of range.

    Note:
        LibMTL trains s with the main optimizer's weight decay and inverts a matrix that is singular
        when two gradients coincide. Here s has no decay, and the pseudo-inverse of the cosine
        matrix is taken. `heads="own"` gives task-specific parameters the plain gradients, without
        the factors.

    Example:
        >>> import torch
        >>> IMTL().direction(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([0.7500, 0.7500])
    """

    def __init__(
        self,
        init: float = 0.0,
        lr: float | None = None,
        weight_decay: float = 0.0,
        clamp: float | None = 20.0,
        guard: bool = True,
    ) -> None:
        one_of("guard", guard, (False, True))
        self._learn(init, lr, weight_decay, clamp)
        self.guard = guard
        # The factors of the last weights, which go to the heads as well.
        self._factors: Tensor | None = None

    def weights(
        self,
        gramian: Tensor,
        losses: Tensor | None = None,
        tasks: Sequence[int] | None = None,
    ) -> Tensor:
        """`w [T]` on the unscaled rows, from the Gramian `[T, T]`.

        Args:
            gramian: `[T, T]`, or `[k, k]` when `tasks` names the k tasks that take part.
            losses: not used; s is trained on them.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: another number of tasks than before.
        """
        if tasks is None and len(gramian) != self._n_tasks:
            self.prepare(len(gramian), gramian)
        s = self.clamped().detach()
        s = s if tasks is None else s[list(tasks)]
        self._factors = s.to(gramian.device, torch.float64).exp()
        return imtl(gramian, self._factors, guard=self.guard)

    def head_weights(self, weights: Tensor, gramian: Tensor) -> Tensor:
        """`e^{s_i} [T]`, of the last weights."""
        assert self._factors is not None
        return self._factors.to(weights)

    def objective(self, losses: Tensor, **taking_part: Any) -> Tensor:
        """`Σ e^{s_i} ℓ_i − s_i`, which s is trained on; 0-dim."""
        tasks = taking_part.get("tasks")
        return imtl_l(losses, self.learned if tasks is None else self.learned[list(tasks)])


def imtl(gramian: Tensor, factors: Tensor, *, guard: bool = True) -> Tensor:
    """`w_i = f_i v_i`, v the weights of `imtl_g` for the rows `f_i g_i`.

    Args:
        gramian: `[T, T]`.
        factors: `f [T]`, positive.
        guard: see `IMTLG`.

    Returns:
        `w [T]`, dtype and device of the Gramian; zero for zero rows.
    """
    # Factors change no cosine: v is that of `imtl_g`, normalised by another sum. With its guard
    # the sign of v is not lost.
    v = imtl_g(gramian).double()
    scaled = v / factors.to(v)
    total, absolute = scaled.sum(), scaled.abs().sum()
    divisor = absolute if guard and total <= 1e-3 * absolute else total
    return (v / divisor).to(gramian.dtype)
