"""COSMOS: a scalarization that asks for losses in a preferred ratio."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from gradbal.aggregators._arguments import in_range, one_of
from gradbal.aggregators._gramians import as_weights
from gradbal.aggregators._mixins import RandomMixin
from gradbal.aggregators._scalar import ReferenceMixin, check_length, precise
from gradbal.aggregators.base import Scalarizer
from gradbal.registry import Promises, register

__all__ = ["COSMOS", "cosmos"]

_CONCENTRATION = 1.2


@register(
    "cosmos",
    title="Scalable Pareto Front Approximation for Deep Multi-Objective Learning",
    venue="ICDM",
    year=2021,
    url="https://arxiv.org/abs/2103.13392",
    promises=Promises(
        heads="weighted", degree=1, gain=lambda a, t, n: 1.0, linear_row_scaling=True
    ),
)
class COSMOS(ReferenceMixin, RandomMixin, Scalarizer):
    """The preferred mean of the losses, less a reward for losses in the preference's direction.

    Ruchte and Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective Learning",
    ICDM 2021, https://arxiv.org/abs/2103.13392. With the preference r the objective is
    `Σ r_i ℓ_i − λ cos(r, ℓ)`, `cos = ⟨r, ℓ⟩/(|r||ℓ|)`, and
    `w = r − λ (r/(|r||ℓ|) − cos ℓ/|ℓ|²)`. Weights can be **negative**.

    The whole method draws `r ~ Dirichlet(p)` at every step and feeds r to the network, so that one
    network holds the whole front:

        r = opt.aggregator.draw(n_tasks)
        opt.backward(model.losses(x, r))  # the losses depend on r, and so do their weights
        opt.step()

    Args:
        lam: λ ≥ 0; between 0.01 and 8 in the paper, by data set, and 2 in its code.
        pref: r, non-negative, one entry for each task, as it is; None is 1/T each. With
            `sample=True` p, all positive; None is 1.2 each, as in its code.
        sample: draw r for every step. A step without a `draw` before makes its own.
        generator: a CPU generator; None makes one seeded from `torch.initial_seed()`.

    Attributes:
        drawn: the last r `[T]` that was drawn, or None.

    Raises:
        ValueError: an argument out of range, not one preference for each task, or all losses zero.

    Example:
        >>> import torch
        >>> COSMOS(lam=1.0, pref=[0.5, 0.5]).loss_weights(torch.tensor([3.0, 4.0]))
        tensor([0.4774, 0.5170])
    """

    state_names = ("generator", "drawn", "fresh")

    def __init__(
        self,
        lam: float = 2.0,
        pref: Sequence[float] | None = None,
        sample: bool = False,
        generator: Generator | None = None,
    ) -> None:
        in_range("lam", lam, 0)
        one_of("sample", sample, (False, True))
        self._refer(pref)
        if sample and self.pref is not None and min(self.pref) <= 0:
            raise ValueError(f"`pref` must be positive where it is sampled, found {self.pref}")
        self.lam = lam
        self.sample = sample
        self._own(generator)
        self.drawn: Tensor | None = None
        # Whether it is for the step to come.
        self.fresh = False
        self._n_tasks = 0 if self.pref is None else len(self.pref)

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that `pref`, and an r that was drawn for this step, have T entries.

        Raises:
            ValueError: they have not.
        """
        super().prepare(n_tasks, like)
        if self.fresh and self.drawn is not None and len(self.drawn) != n_tasks:
            raise ValueError(f"`draw` was for {len(self.drawn)} tasks, found {n_tasks}")
        self._n_tasks = n_tasks

    def draw(self, n_tasks: int | None = None) -> Tensor:
        """Draws the preference of the next step.

        Args:
            n_tasks: T; None where `pref` or an earlier step tells it.

        Returns:
            `r [T]`, float64 on the CPU, on the probability simplex.

        Raises:
            ValueError: `sample` is False, or T is not known or not that of `pref`.
        """
        if not self.sample:
            raise ValueError("`draw` needs sample=True, found sample=False")
        known = self._n_tasks or (0 if self.drawn is None else len(self.drawn))
        n_tasks = n_tasks or known
        if n_tasks == 0:
            raise ValueError("`draw` needs `n_tasks` before the first step, found none")
        check_length("pref", self.pref, n_tasks)
        p = [_CONCENTRATION] * n_tasks if self.pref is None else self.pref
        seed = torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        self.drawn = torch.from_numpy(np.random.default_rng(int(seed)).dirichlet(p))
        self.fresh = True
        return self.drawn

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`Σ r_i ℓ_i − λ cos(r, ℓ)` from losses `[T]`.

        Args:
            losses: `[T]`, or `[k]` when `tasks` names the k tasks that take part.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: not one preference for each task, or all losses are zero.
        """
        if tasks is None:
            self.prepare(len(losses), losses)
        if losses.device.type == "cpu" and not bool(losses.any()):
            raise ValueError(f"{self.name!r} needs a loss that is not zero, found only zeros")
        if not self.sample:
            return cosmos(losses, self.preferred(losses, tasks), self.lam)
        if not self.fresh:
            self.draw()
        assert self.drawn is not None
        r = self.drawn if tasks is None else self.drawn[list(tasks)]
        return cosmos(losses, as_weights(r.numpy(), precise(losses.detach())), self.lam)

    def observe(self, losses: Tensor, tasks: Sequence[int] | None = None) -> None:
        """The step is taken: the next one needs an r of its own."""
        self.fresh = False

    def reset(self) -> None:
        """The generator goes back to where it was when the aggregator was made."""
        super().reset()
        self.drawn, self.fresh = None, False


def cosmos(losses: Tensor, pref: Tensor, lam: float = 2.0) -> Tensor:
    """`Σ r_i ℓ_i − λ ⟨r, ℓ⟩/(|r||ℓ|)`.

    Args:
        losses: `ℓ [T]`, not all zero.
        pref: `r [T]`, not all zero.
        lam: λ.

    Returns:
        0-dim.
    """
    values, r = precise(losses), precise(pref)
    mean = r @ values
    value: Tensor = mean - lam * mean / (r.norm() * values.norm())
    return value.to(losses.dtype)
