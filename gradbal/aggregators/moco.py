"""Multi-objective descent with tracked gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range, one_of
from gradbal.aggregators._gramians import as_weights, symmetric_float64
from gradbal.aggregators._row_state import RowStateMixin
from gradbal.aggregators.base import JacobianAggregator
from gradbal.jacobian import combine
from gradbal.registry import Promises, register
from gradbal.solvers import project_simplex

__all__ = ["MoCo", "moco"]

_PROJECTIONS = ("simplex", "softmax")


def _gain(aggregator: MoCo, n_tasks: int, norm: float) -> float:
    return aggregator.beta / norm if aggregator.normalize else aggregator.beta


@register(
    "moco",
    title="Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Approach",
    venue="ICLR",
    year=2023,
    url="https://arxiv.org/abs/2210.12624",
    promises=Promises(heads="own", gain=_gain, simplex=True, zero_rows_inactive=False),
)
class MoCo(RowStateMixin, JacobianAggregator):
    """Multi-objective gradient with correction: a step towards MGDA on averages of the gradients.

    Fernando, Shen, Liu, Chaudhury, Murugesan and Chen, "Mitigating Gradient Bias in Multi-objective
    Learning: A Provably Convergent Approach", ICLR 2023, https://arxiv.org/abs/2210.12624. The rows
    of Y `[T, P]`, zero at first, track the gradients, and the weights λ `[T]`, 1/T at first, take
    one step of projected gradient descent on `½|Yᵀλ|²`. At step k = 1, 2, ...

        Y ← Y − β_k (Y − J),   β_k = β/k^σ_β
        λ ← Π(λ − γ_k (YYᵀ + ρI) λ),   γ_k = γ/k^σ_γ
        d = Yᵀλ

    with Π the projection on the probability simplex. With a constant J, Y goes to J; and with
    β_k = 1 and `γ < 2/λ_max(JJᵀ)`, d goes to MGDA's.

    Args:
        beta: β, above 0. Official runs have 0.5, and 0.05 to 0.99; 5 on a toy problem.
        beta_sigma: σ_β, 0 or more. The official 0.5; 0 on NYUv2.
        gamma: γ, 0 or more; 0.1. It has to be small against `1/λ_max(YYᵀ)`.
        gamma_sigma: σ_γ, 0 or more. The official 0.5; 0 on NYUv2.
        rho: ρ, 0 or more: pulls λ towards equal weights. The official 0.
        projection: Π, "simplex", or "softmax" of the same entries.
        normalize: track `ℓ_i g_i/|g_i|` in place of g_i.
        scale_free: divide YYᵀ by its trace, so that λ, and γ that suits, do not depend on the scale
            of the losses.

    Raises:
        ValueError: an argument out of range; other numbers of tasks or of shared scalars than at
            the first step; `normalize` without losses.

    Note:
        The paper moves the parameters with Y and λ of before the update, the official code and
        gradbal with those of after it. Nothing corrects for Y being zero at first: the first d is
        `βJᵀλ`. LibMTL is `projection="softmax", normalize=True`. A softmax of numbers in [0, 1] is
        close to equal weights, and what λ was before is forgotten; unlike there, no 1e-8 is added
        to the norms. `scale_free` is gradbal's own. When tasks sit a step out, the others share
        what weight they had together.

    Example:
        >>> import torch
        >>> MoCo().direction(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([0.4812, 0.2594])
    """

    weighted = True
    per_parameter_state = True
    state_names = ("rows", "shares", "step")

    def __init__(
        self,
        beta: float = 0.5,
        beta_sigma: float = 0.5,
        gamma: float = 0.1,
        gamma_sigma: float = 0.5,
        rho: float = 0.0,
        projection: str = "simplex",
        normalize: bool = False,
        scale_free: bool = False,
    ) -> None:
        in_range("beta", beta, 0, bounds="(]")
        in_range("beta_sigma", beta_sigma, 0)
        in_range("gamma", gamma, 0)
        in_range("gamma_sigma", gamma_sigma, 0)
        in_range("rho", rho, 0)
        one_of("projection", projection, _PROJECTIONS)
        one_of("normalize", normalize, (False, True))
        one_of("scale_free", scale_free, (False, True))
        self.beta = beta
        self.beta_sigma = beta_sigma
        self.gamma = gamma
        self.gamma_sigma = gamma_sigma
        self.rho = rho
        self.projection = projection
        self.normalize = normalize
        self.scale_free = scale_free
        self.shares: list[float] | None = None
        self.step = 0

    def reset(self) -> None:
        """Y, λ and k go back to zero, 1/T and zero."""
        super().reset()
        self.shares, self.step = None, 0

    def direction(
        self,
        jacobian: Tensor,
        losses: Tensor | None = None,
        tasks: Sequence[int] | None = None,
    ) -> Tensor:
        """`d = Yᵀλ [P]` of Y and λ after their update.

        Args:
            jacobian: `[T, P]`, or `[k, P]` when `tasks` names the k tasks that take part.
            losses: `[T]` or `[k]`; used with `normalize`.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: another T or P than before; `normalize` and no losses.
        """
        if self.normalize and losses is None:
            raise ValueError("MoCo with normalize=True needs the losses, found None")
        indices = self._indices(jacobian, tasks)
        before, rows = self._next_rows(jacobian, indices)
        shares = np.asarray(self.shares or [1.0 / len(rows)] * len(rows))
        self.step += 1
        beta = self.beta / self.step**self.beta_sigma
        gamma = self.gamma / self.step**self.gamma_sigma
        for position, (i, row) in enumerate(zip(indices, jacobian.detach(), strict=True)):
            tracked = row.to(rows.dtype)
            if self.normalize:
                assert losses is not None
                norm = torch.linalg.vector_norm(tracked, dtype=torch.float64)
                norm = self.summed(norm.square()).sqrt()
                factor = torch.where(norm > 0, losses[position].to(norm) / norm, 0.0)
                tracked = tracked * factor.to(tracked)
            torch.lerp(before[i], tracked, beta, out=rows[i])
        part = rows if len(indices) == len(rows) else rows[indices]
        total = float(shares[indices].sum())
        begin = shares[indices] / total if total > 0 else np.full(len(part), 1.0 / len(part))
        # Where γG is large, λ hangs on digits of G that float32 products do not have.
        g = self.product(part, lambda g: not self.scale_free and gamma * float(g.trace()) > 1.0)
        w = moco(
            g,
            torch.from_numpy(begin),
            gamma,
            rho=self.rho,
            projection=self.projection,
            scale_free=self.scale_free,
        )
        shares[indices] = w.numpy() * total
        self.shares = shares.tolist()
        self.last_weights = self.last_head_weights = w
        return combine(w, part).to(jacobian.dtype)


def moco(
    gramian: Tensor,
    weights: Tensor,
    gamma: float,
    *,
    rho: float = 0.0,
    projection: str = "simplex",
    scale_free: bool = False,
) -> Tensor:
    """`λ ← Π(λ − γ(G + ρI)λ)`.

    Args:
        gramian: `G = YYᵀ [T, T]`.
        weights: λ `[T]`, on the probability simplex.
        gamma: γ, 0 or more.
        rho, projection, scale_free: see `MoCo`.

    Returns:
        λ `[T]` after the step, dtype and device of the Gramian.
    """
    g = symmetric_float64(gramian)
    before = weights.detach().to("cpu", torch.float64).numpy()
    trace = float(np.trace(g))
    if scale_free and trace > 0.0:
        g = g / trace
    step = gamma * (g @ before + rho * before)
    # What all entries have in common moves nothing, and could bury λ in its rounding.
    moved = before - (step - step.min())
    if projection == "simplex":
        return as_weights(project_simplex(moved), gramian)
    odds = np.exp(moved - moved.max())
    return as_weights(odds / odds.sum(), gramian)
