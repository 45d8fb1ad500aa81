"""Log losses, and gradients of equal length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range, one_of
from gradbal.aggregators._row_state import RowStateMixin
from gradbal.aggregators.base import JacobianAggregator
from gradbal.jacobian import combine
from gradbal.registry import Promises, register
from gradbal.solvers import ZERO_ROW

__all__ = ["DBMTL", "db_mtl"]


def _gain(aggregator: DBMTL, n_tasks: int, norm: float) -> float:
    return n_tasks if aggregator.bias_correction else n_tasks * (1.0 - aggregator.beta)


@register(
    "db_mtl",
    title="Dual-Balancing for Multi-Task Learning",
    venue="arXiv",
    year=2023,
    url="https://arxiv.org/abs/2308.12029",
    consumes="losses, Jacobian",
    promises=Promises(heads="weighted", degree=1, gain=_gain),
)
class DBMTL(RowStateMixin, JacobianAggregator):
    """Dual balancing: averaged gradients of the log losses, all brought to the largest one's norm.

    Lin, Jiang, Ye, Zhang, Chen, Chen, Liu and Kwok, "Dual-Balancing for Multi-Task Learning", 2023,
    https://arxiv.org/abs/2308.12029. The rows m_i of the average `[T, P]` are zero at first. At
    step k = 1, 2, ...

        ĝ_i = ∇ log ℓ_i = g_i/ℓ_i
        m_i ← ĝ_i + β_k (m_i − ĝ_i),   β_k = β/k^σ
        d = Σ α_i m_i,   α_i = max_j |m_j| / |m_i|

    All `α_i m_i` have the same norm, and multiplying a loss by a constant changes nothing. Losses
    have to be positive. The weights `α_i/ℓ_i` are reported, and task-specific parameters get
    `∇ log ℓ_i`, that is `1/ℓ_i` times their gradient.

    Args:
        beta: β, in [0, 1). 0.9; the paper has 0.1 to 0.9. With 0 there is no state: `d = Jᵀw`.
        beta_sigma: σ, 0 or more. 0; 0.5 in the paper.
        bias_correction: divide m_i by what share of it is not the zeros that it began with,
            `1 − Π β_k` over the steps of task i, which is `1 − βᵏ` with σ = 0.

    Raises:
        ValueError: an argument out of range; a loss that is not positive; other numbers of tasks
            or of shared scalars than at the first step.

    Note:
        As in the authors' code, d is `1 − β` times too small at the first step and grows from there
        unless `bias_correction` is on. That code adds 1e-8 to losses and norms; here nothing is
        added, and a task with `|m_i|` at most 1e-12 of the largest has α_i = 0. It reports weights
        of one. The logarithm is part of the method, so `loss_transform="log"` is refused.

    Example:
        >>> import torch
        >>> method = DBMTL(beta=0.0)
        >>> method.direction(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([3.0, 0.5]))
        tensor([2., 2.])
    """

    weighted = True
    logarithmic = True
    state_names = ("rows", "zeros", "step")

    def __init__(
        self, beta: float = 0.9, beta_sigma: float = 0.0, bias_correction: bool = False
    ) -> None:
        in_range("beta", beta, 0, 1, bounds="[)")
        in_range("beta_sigma", beta_sigma, 0)
        one_of("bias_correction", bias_correction, (False, True))
        self.beta = beta
        self.beta_sigma = beta_sigma
        self.bias_correction = bias_correction
        # For each task the share of its average that is still the zeros it began with.
        self.zeros: list[float] | None = None
        self.step = 0

    @property
    def per_parameter_state(self) -> bool:  # type: ignore[override]
        """Whether there is an average to keep."""
        return self.beta > 0

    @property
    def combines(self) -> bool:  # type: ignore[override]
        """Whether d is made from the gradients of this step alone."""
        return self.beta == 0

    def reset(self) -> None:
        """The average goes back to zero."""
        super().reset()
        self.zeros, self.step = None, 0

    def direction(
        self,
        jacobian: Tensor,
        losses: Tensor | None = None,
        tasks: Sequence[int] | None = None,
    ) -> Tensor:
        """`d = Σ α_i m_i [P]`.

        Args:
            jacobian: `[T, P]`, or `[k, P]` when `tasks` names the k tasks that take part.
            losses: `[T]` or `[k]`, positive; None is ones.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: a loss is not positive; another T or P than before.
        """
        indices = self._indices(jacobian, tasks)
        inverse = torch.ones(len(indices), dtype=torch.float64)
        if losses is not None:
            values = losses.detach().to("cpu", torch.float64)
            for i, value in zip(indices, values.tolist(), strict=True):
                if not value > 0:
                    raise ValueError(
                        f"`db_mtl` needs positive losses, found {value:g} for task {i}; "
                        "add an offset to that loss"
                    )
            inverse = 1.0 / values
        part, factors = jacobian.detach(), inverse
        if self.beta > 0:
            part, factors = self._average(part, inverse, indices)
        norms = [torch.linalg.vector_norm(row, dtype=torch.float64) for row in part]
        norm = self.summed(torch.stack(norms).square()).sqrt()
        alpha = db_mtl(norm.cpu() * factors)
        self.last_weights, self.last_head_weights = alpha * inverse, inverse
        return combine(alpha * factors, part).to(jacobian.dtype)

    def _average(
        self, jacobian: Tensor, inverse: Tensor, indices: list[int]
    ) -> tuple[Tensor, Tensor]:
        """The rows of the average after their update, and what corrects each for its zeros."""
        before, rows = self._next_rows(jacobian, indices)
        zeros = [1.0] * len(rows) if self.zeros is None else [*self.zeros]
        self.step += 1
        beta = self.beta / self.step**self.beta_sigma
        for i, row, factor in zip(indices, jacobian, inverse.tolist(), strict=True):
            torch.lerp(before[i], row.to(rows.dtype) * factor, 1.0 - beta, out=rows[i])
            zeros[i] *= beta
        self.zeros = zeros
        factors = torch.ones_like(inverse)
        if self.bias_correction:
            factors /= 1.0 - torch.tensor([zeros[i] for i in indices], dtype=torch.float64)
        return (rows if len(indices) == len(rows) else rows[indices]), factors


def db_mtl(norms: Tensor) -> Tensor:
    """`α_i = max_j |m_j| / |m_i|`.

    Args:
        norms: `|m_i| [T]`.

    Returns:
        α `[T]`; 0 where `|m_i|` is at most 1e-12 of the largest, 1 everywhere if all are zero.
    """
    largest = norms.max()
    if not largest > 0:
        return torch.ones_like(norms)
    return torch.where(norms > ZERO_ROW * largest, largest / norms, 0.0)
