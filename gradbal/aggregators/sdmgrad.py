"""Stochastic direction-oriented multi-objective gradient descent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range, one_of, preference
from gradbal.aggregators._gramians import as_weights
from gradbal.aggregators._simplex import SimplexStateMixin
from gradbal.aggregators.base import DoubleSamplingAggregator
from gradbal.registry import Promises, register
from gradbal.solvers import Array, project_simplex

__all__ = ["SDMGrad", "sdmgrad"]


@register(
    "sdmgrad",
    title="Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms",
    venue="NeurIPS",
    year=2023,
    url="https://arxiv.org/abs/2305.18409",
    consumes="Jacobians of 3 independent batches",
    cost="3 times T backwards",
    promises=Promises(
        heads="own",
        degree=1,
        gain=lambda a, t, n: 1.0,
        simplex=True,
        zero_rows_inactive=False,
        settles=False,
    ),
)
class SDMGrad(SimplexStateMixin, DoubleSamplingAggregator):
    """MGDA regularised towards a preferred direction, its weights found by stochastic gradients.

    Xiao, Ban and Ji, "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic
    Algorithms", NeurIPS 2023, https://arxiv.org/abs/2305.18409. The aim is
    `argmin |Jᵀ(w + λp)|²` over the probability simplex, p the preference. With Jacobians J₁, J₂, J₃
    of independent batches, `A = J₁J₂ᵀ/s²`, `s = mean_i √max(A_ii, 0)`, K times
    `v ← μv + A(w + λp)`, `w ← Π(w − ηv)` from the last step's w and v = 0; then
    `d = J₃ᵀ(w + λp)/(1 + λ)`. λ = 0 is close to MGDA, λ → ∞ the preferred direction.

    Call `backward(losses, independent=(losses_b, losses_c))`, the batches 1, 2 and 3 in this order.

    Args:
        lam: λ ≥ 0; the official runs have 0.3.
        lr: η > 0.
        momentum: μ in [0, 1).
        n_iter: K ≥ 1.
        pref: p, non-negative, one entry for each task; it is divided by its sum. None is 1/T each.
        batches: 3, or 1: one batch for everything, whose `JJᵀ` is a biased estimate.
        heads_from: task-specific parameters get the mean of "all" batches' gradients, or the
            "last" batch's.

    Raises:
        ValueError: an argument out of range, or `pref` has not one entry for each task.

    Note:
        In the official code the three gradient buffers are one tensor, so that no double sampling
        takes place, and d is multiplied by T and clipped to norm 1. Here batches are independent
        and d is as in the paper; `match_sum=True` multiplies by T. Where no `A_ii` is positive w
        stays as it is.

    Example:
        >>> import torch
        >>> SDMGrad(lam=0.0, lr=0.5, n_iter=99).step(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.2000, 0.8000])
    """

    def __init__(
        self,
        lam: float = 0.3,
        lr: float = 10.0,
        momentum: float = 0.5,
        n_iter: int = 20,
        pref: Sequence[float] | None = None,
        batches: int = 3,
        heads_from: str = "all",
    ) -> None:
        in_range("lam", lam, 0)
        in_range("lr", lr, 0, bounds="(]")
        in_range("momentum", momentum, 0, 1, bounds="[)")
        if isinstance(n_iter, bool) or not isinstance(n_iter, int) or n_iter < 1:
            raise ValueError(f"`n_iter` must be a positive integer, found {n_iter!r}")
        one_of("batches", batches, (1, 3))
        one_of("heads_from", heads_from, ("all", "last"))
        if pref is not None:
            pref = preference("pref", pref, None, 0.0).tolist()
            if not sum(pref) > 0:
                raise ValueError(f"`pref` must have a positive entry, found {pref}")
        self.lam = lam
        self.lr = lr
        self.momentum = momentum
        self.n_iter = n_iter
        self.pref = pref
        self.batches = batches
        self.heads_from = heads_from
        self.simplex_weights = None

    @property
    def n_batches(self) -> int:
        """1 or 3."""
        return self.batches

    @property
    def shares(self) -> tuple[float, ...]:
        """All of the last batch."""
        return (0.0, 0.0, 1.0) if self.batches == 3 else (1.0,)

    @property
    def head_shares(self) -> tuple[float, ...]:
        """Equal, or all of the last batch."""
        return super().head_shares if self.heads_from == "all" else self.shares

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that T is as before and that `pref` has T entries.

        Raises:
            ValueError: one of them is not so.
        """
        preference("pref", self.pref, n_tasks, 0.0)
        super().prepare(n_tasks, like)

    def step(self, products: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """K steps of w; returns `(w + λp)/(1 + λ) [T]`.

        Args:
            products: `J₁J₂ᵀ [T, T]`, or `[k, k]` when `tasks` names the k tasks that take part.
            tasks: indices of the tasks that take part; None for all. The others keep their weights.

        Raises:
            ValueError: another number of tasks than before.
        """
        before = self.taking_part(len(products), tasks)
        chosen = self.pref
        if chosen is not None and tasks is not None:
            chosen = [chosen[i] for i in tasks]
        p = torch.from_numpy(preference("pref", chosen, len(products), 1.0))
        p = p / p.sum() if p.sum() > 0 else torch.full_like(p, 1.0 / len(p))
        w = sdmgrad(before, products, p, self.lam, self.lr, self.momentum, self.n_iter)
        self.keep(w, tasks)
        return ((w + self.lam * p) / (1.0 + self.lam)).to(products.device, products.dtype)


def sdmgrad(
    weights: Tensor,
    products: Tensor,
    pref: Tensor,
    lam: float = 0.3,
    lr: float = 10.0,
    momentum: float = 0.5,
    n_iter: int = 20,
) -> Tensor:
    """K steps of projected gradient descent with momentum, from `w`.

    Args:
        weights: `w [T]` on the simplex.
        products: `J₁J₂ᵀ [T, T]`.
        pref: `p [T]` on the simplex.
        lam, lr, momentum, n_iter: see `SDMGrad`.

    Returns:
        `w [T]` on the simplex, dtype and device of `weights`.
    """
    a, w, p = (x.detach().to("cpu", torch.float64).numpy() for x in (products, weights, pref))
    scale = float(np.sqrt(np.maximum(np.diagonal(a), 0.0)).mean())
    if scale == 0.0:
        return weights
    a = a / scale / scale
    velocity: Array = np.zeros_like(w)
    for _ in range(n_iter):
        velocity = momentum * velocity + a @ (w + lam * p)
        w = project_simplex(w - lr * velocity)
    return as_weights(w, weights)
