"""Uncertainty weighting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradbal.aggregators._arguments import one_of
from gradbal.aggregators._gramians import as_weights
from gradbal.aggregators._learned import LearnedMixin
from gradbal.aggregators.base import Scalarizer
from gradbal.registry import Promises, register

__all__ = ["UW", "uw"]

_FACTOR = {"regression": 0.5, "classification": 1.0}


def _gain(aggregator: UW, n_tasks: int, norm: float) -> float:
    kinds = aggregator.kinds(n_tasks)
    return sum(_FACTOR[k] for k in kinds) * float(torch.tensor(-float(aggregator.init)).exp())


@register(
    "uw",
    title="Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics",
    venue="CVPR",
    year=2018,
    url="https://arxiv.org/abs/1705.07115",
    promises=Promises(heads="weighted", degree=1, gain=_gain, linear_row_scaling=True),
)
class UW(LearnedMixin, Scalarizer):
    """Uncertainty weighting: each task has a learned log-variance.

    Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry
    and Semantics", CVPR 2018, https://arxiv.org/abs/1705.07115. With s_i = log σ_i² the objective
    is `Σ a_i e^{−s_i} ℓ_i + ½ s_i`, a_i = ½ for a Gaussian (regression) likelihood and 1 for
    classification. For a frozen loss the optimum is `s_i = log(2 a_i ℓ_i)`, where the weight
    `a_i e^{−s_i}` is `1/(2ℓ_i)`.

    The log-variances `s [T]` join the wrapped optimizer as a param group of their own.

    Args:
        init: the first s_i, in [-10, 10].
        kind: "regression", "classification", or one of the two for each task. The paper's
            Gaussian form by default.
        lr: learning rate of s; None takes the wrapped optimizer's (nash-mtl and FAMO use 0.025).
        weight_decay: of s; 0, since decay would pull every variance to one.
        clamp: s is kept in [-clamp, clamp], or None. A loss that stays at or below zero would
            otherwise drive its weight to infinity; this bound is gradbal's, not the paper's.

    Raises:
        ValueError: an argument out of range, or as many kinds as tasks are not given.

    Note:
        LibMTL starts s at -0.5 (`init=-0.5`), has a_i = ½ for classification too, and gives s the
        model's weight decay, which pulls it to zero (`weight_decay` here); SamsungLabs has a_i = 1
        for every task (`kind="classification"`), auto-lambda starts at -0.7, and nash-mtl at 0 with
        a_i = ½ and `lr=0.025`. gradbal starts at 0 with a_i by `kind`, and s has a param group of
        its own without decay.

    Example:
        >>> import torch
        >>> UW().loss_weights(torch.tensor([1.0, 5.0]))
        tensor([0.5000, 0.5000])
    """

    linear = True

    def __init__(
        self,
        init: float = 0.0,
        kind: str | Sequence[str] = "regression",
        lr: float | None = None,
        weight_decay: float = 0.0,
        clamp: float | None = 10.0,
    ) -> None:
        self._learn(init, lr, weight_decay, clamp)
        for k in [kind] if isinstance(kind, str) else kind:
            one_of("kind", k, tuple(_FACTOR))
        self.kind = kind if isinstance(kind, str) else list(kind)

    def kinds(self, n_tasks: int) -> list[str]:
        """The kind of each task; ValueError if another number was given."""
        if isinstance(self.kind, str):
            return [self.kind] * n_tasks
        if len(self.kind) != n_tasks:
            raise ValueError(
                f"`kind` must have one entry for each of {n_tasks} tasks, found {len(self.kind)}"
            )
        return self.kind

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that there are T log-variances, if there are any yet.

        Raises:
            ValueError: T differs from before, or from the number of kinds.
        """
        self.kinds(n_tasks)
        super().prepare(n_tasks, like)

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`Σ a_i e^{−s_i} ℓ_i + ½ s_i` from losses `[T]`.

        Args:
            losses: `[T]`, or `[k]` when `tasks` names the k tasks that take part.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: another number of tasks than before.
        """
        if tasks is None:
            self.prepare(len(losses), losses)
        s = self.clamped()
        kinds = self.kinds(len(s))
        if tasks is None:
            return uw(losses, s, kinds)
        return uw(losses, s[list(tasks)], [kinds[i] for i in tasks])


def uw(losses: Tensor, log_variance: Tensor, kinds: Sequence[str]) -> Tensor:
    """`Σ a_i e^{−s_i} ℓ_i + ½ s_i`.

    Args:
        losses: `[T]`.
        log_variance: `s [T]`.
        kinds: T times "regression" (a_i = ½) or "classification" (a_i = 1).

    Returns:
        0-dim.
    """
    factor = as_weights(np.array([_FACTOR[k] for k in kinds]), losses)
    return (factor * torch.exp(-log_variance) * losses + 0.5 * log_variance).sum()
