"""Smooth Tchebycheff scalarization, as its authors run it for multi-task learning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range, integer
from gradbal.aggregators._means import EpochsMixin
from gradbal.aggregators._scalar import check_losses, precise
from gradbal.aggregators.base import Scalarizer
from gradbal.registry import Promises, register

__all__ = ["STCH", "stch"]


@register(
    "stch",
    title="Smooth Tchebycheff Scalarization for Multi-Objective Optimization",
    venue="ICML",
    year=2024,
    url="https://arxiv.org/abs/2402.19078",
    consumes="losses, epochs",
    promises=Promises(
        heads="weighted", degree=1, gain=lambda a, t, n: float(t), linear_row_scaling=True
    ),
)
class STCH(EpochsMixin, Scalarizer):
    """A smooth maximum of the losses, each relative to its mean at the end of a warm-up.

    Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024,
    https://arxiv.org/abs/2402.19078, in the form of the authors' multi-task code. In epochs
    0 … W the objective is `Σ log ℓ_i`; the mean losses of epoch W are the nadir N. From then on it
    is `T μ log Σ_i (ℓ_i/N_i)^{1/μ}`, with `w_i = T softmax(log(ℓ/N)/μ)_i/ℓ_i`. Multiplying a loss
    by a constant changes nothing, if it is from the start. At μ = 1 the direction is that of the
    fixed weights 1/N_i.

    Call `opt.end_epoch()` after every epoch, or give `warmup_steps`.

    Args:
        mu: μ > 0, 1 in the authors' multi-task runs; near 0 the largest `ℓ_i/N_i` alone counts.
        warmup: W ≥ 0, in epochs; 4 in the authors' runs.
        warmup_steps: None, where `end_epoch()` tells the epochs, or the number of steps that takes
            the place of the W + 1 epochs; their last (W + 1)-th part gives the nadir.

    Raises:
        ValueError: an argument out of range, a loss that is not positive, or another number of
            tasks.

    Warns:
        RuntimeWarning: `end_epoch()` was not called in the first 10,000 steps.

    Note:
        The authors subtract the largest exponent and do not add it again, which changes the value
        alone, and add 1e-20 to the losses inside the logarithm; here they have to be positive.
        Nothing of the warm-up is in their checkpoints. `N_i = 1` for a task that sat out all of
        epoch W. `stch_scalar` is the scalarization itself.

    Example:
        >>> import torch
        >>> method = STCH(warmup=0, warmup_steps=1)
        >>> method.observe(torch.tensor([2.0, 8.0]))
        >>> method.loss_weights(torch.tensor([1.0, 4.0]))  # both are half of what they were
        tensor([1.0000, 0.2500])
    """

    logarithmic = True
    state_names = (*EpochsMixin.state_names, "nadir")

    def __init__(self, mu: float = 1.0, warmup: int = 4, warmup_steps: int | None = None) -> None:
        in_range("mu", mu, 0, bounds="(]")
        integer("warmup", warmup, 0)
        if warmup_steps is not None:
            integer("warmup_steps", warmup_steps, 1)
        self.mu = mu
        self.warmup = warmup
        self.warmup_steps = warmup_steps
        # N [T], from the end of the warm-up on.
        self.nadir: Tensor | None = None

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`Σ log ℓ_i` in the warm-up, `T μ log Σ_i (ℓ_i/N_i)^{1/μ}` after it, from losses `[T]`.

        Args:
            losses: `[T]`, or `[k]` when `tasks` names the k tasks that take part, T being k then.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: a loss is not positive, or T differs from before.
        """
        check_losses(self.name, losses, tasks)
        if tasks is None:
            self.prepare(len(losses), losses)
        if self.nadir is None:
            return precise(losses).log().sum().to(losses.dtype)
        return stch(losses, self.nadir if tasks is None else self.nadir[list(tasks)], self.mu)

    def observe(self, losses: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Counts a step of the warm-up, and adds its losses `[T]` where they belong to the nadir.

        Raises:
            ValueError: a loss is not positive.
        """
        if self.nadir is not None:
            return
        check_losses(self.name, losses if tasks is None else losses[list(tasks)], tasks)
        if self._counts():
            self.add(losses, tasks)
        if self.count_step(self.warmup_steps, "`warmup_steps`"):
            self._settle()

    def end_epoch(self) -> None:
        """Ends an epoch of the warm-up, unless it had no step or `warmup_steps` counts them."""
        if self.nadir is not None or self.warmup_steps is not None or self.steps == 0:
            return
        if self.epoch == self.warmup:
            self._settle()
        else:
            self.next_epoch()

    def _counts(self) -> bool:
        """Whether the losses of this step belong to the nadir."""
        if self.warmup_steps is None:
            return self.epoch == self.warmup
        last_part = max(1, self.warmup_steps // (self.warmup + 1))
        return self.steps >= self.warmup_steps - last_part

    def _settle(self) -> None:
        self.nadir = self.means(1.0)
        self.next_epoch()


def stch(losses: Tensor, nadir: Tensor, mu: float = 1.0) -> Tensor:
    """`T μ log Σ_i (ℓ_i/N_i)^{1/μ}`, by log-sum-exp.

    Args:
        losses: `[T]`, positive.
        nadir: `N [T]`, positive.
        mu: μ.

    Returns:
        0-dim.
    """
    logs = precise(losses).log() - precise(nadir).log()
    return (len(losses) * mu * torch.logsumexp(logs / mu, 0)).to(losses.dtype)
