"""Tchebycheff scalarization."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradbal.aggregators._arguments import in_range
from gradbal.aggregators._scalar import ReferenceMixin, precise
from gradbal.aggregators.base import Scalarizer
from gradbal.registry import Promises, register

__all__ = ["Tchebycheff", "tchebycheff"]


@register(
    "tchebycheff",
    title="On the Relationship of the Tchebycheff Norm and the Efficient Frontier of "
    "Multiple-Criteria Objectives",
    venue="Multiple Criteria Decision Making",
    year=1976,
    url="https://doi.org/10.1007/978-3-642-87563-2_5",
    promises=Promises(
        heads="weighted",
        degree=1,
        gain=lambda a, t, n: 1.0 / t + a.augment,
        linear_row_scaling=True,
        permutation_invariant=False,
    ),
)
class Tchebycheff(ReferenceMixin, Scalarizer):
    """The largest weighted loss above an ideal point: only the worst task descends.

    Bowman, "On the Relationship of the Tchebycheff Norm and the Efficient Frontier of
    Multiple-Criteria Objectives", Multiple Criteria Decision Making 1976,
    https://doi.org/10.1007/978-3-642-87563-2_5. The objective is `max_i p_i(ℓ_i − z_i)`: the task
    that attains it has the weight p_i, the others none. With ρ > 0, `ρ Σ p_i(ℓ_i − z_i)` is added,
    and p_i ρ to every weight. Every Pareto optimum is the least value for some p.

    Args:
        augment: ρ ≥ 0; 0 is the plain maximum.
        pref: p, non-negative, one entry for each task, as it is; None is 1/T each.
        ideal: z, the least values that the losses can have; None is zeros. Losses may be below.

    Raises:
        ValueError: an argument out of range, or of another length than the losses.

    Note:
        Of several tasks that attain the maximum the first one descends, which is a subgradient.

    Example:
        >>> import torch
        >>> Tchebycheff(pref=[0.75, 0.25]).loss_weights(torch.tensor([1.0, 2.0]))
        tensor([0.7500, 0.0000])
    """

    def __init__(
        self,
        augment: float = 0.0,
        pref: Sequence[float] | None = None,
        ideal: Sequence[float] | None = None,
    ) -> None:
        in_range("augment", augment, 0)
        self._refer(pref, ideal)
        self.augment = augment

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`max_i p_i(ℓ_i − z_i) + ρ Σ p_i(ℓ_i − z_i)` from losses `[T]`.

        Args:
            losses: `[T]`, or `[k]` when `tasks` names the k tasks that take part.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: not one preference or ideal value for each task.
        """
        p, z = self.preferred(losses, tasks), self.least(losses, tasks)
        return tchebycheff(losses, p, z, self.augment)


def tchebycheff(
    losses: Tensor, pref: Tensor, ideal: Tensor | float = 0.0, augment: float = 0.0
) -> Tensor:
    """`max_i p_i(ℓ_i − z_i) + ρ Σ p_i(ℓ_i − z_i)`.

    Args:
        losses: `ℓ [T]`.
        pref: `p [T]`.
        ideal: `z [T]`, or one number for all.
        augment: ρ.

    Returns:
        0-dim; its derivative goes to the first of several that are the largest.
    """
    y = pref * (precise(losses) - ideal)
    # `max` would spread it over all of them, and plain indexing would read from an accelerator.
    largest = y.gather(0, y.argmax(0, keepdim=True)).sum()
    return (largest + augment * y.sum() if augment else largest).to(losses.dtype)
