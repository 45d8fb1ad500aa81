"""Dynamic weight average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range, integer
from gradbal.aggregators._means import EpochsMixin
from gradbal.aggregators._scalar import check_losses
from gradbal.aggregators.base import Scalarizer
from gradbal.registry import Promises, register

__all__ = ["DWA", "dwa"]


@register(
    "dwa",
    title="End-to-End Multi-Task Learning with Attention",
    venue="CVPR",
    year=2019,
    url="https://arxiv.org/abs/1803.10704",
    consumes="losses, epochs",
    promises=Promises(
        heads="weighted", degree=1, gain=lambda a, t, n: float(t), linear_row_scaling=True
    ),
)
class DWA(EpochsMixin, Scalarizer):
    """Dynamic weight average: tasks whose losses fall slower than the others' get more weight.

    Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019,
    https://arxiv.org/abs/1803.10704. With L_i(e) the mean loss of task i over epoch e, in epoch e
    `r_i = L_i(e−1)/L_i(e−2)` and `w_i = T exp(r_i/τ)/Σ_j exp(r_j/τ)`; in the first two epochs
    w_i = 1. The weights sum to T, and neither they nor their changes depend on the losses' scales.

    Call `opt.end_epoch()` after every epoch, or give `window`.

    Args:
        temperature: τ > 0; the paper's is 2. A large one gives equal weights.
        window: None, where `end_epoch()` tells the epochs, or the number of steps that takes an
            epoch's place.

    Raises:
        ValueError: an argument out of range, a negative loss, or another number of tasks.

    Warns:
        RuntimeWarning: `end_epoch()` was not called in the first 10,000 steps.

    Note:
        The authors and LibMTL count epochs, as here; the codes of Nash-MTL and Aligned-MTL windows
        of 25 steps, `window=25`. Every step counts the same in the mean of its epoch, whatever its
        batch. r_i = 1 where L_i(e−2) is zero. A task that sat out an epoch keeps the mean that it
        had before.

    Example:
        >>> import torch
        >>> method = DWA(window=1)
        >>> for losses in ([4.0, 4.0], [2.0, 4.0]):  # the first one falls
        ...     method.observe(torch.tensor(losses))
        >>> method.loss_weights(torch.tensor([2.0, 4.0]))
        tensor([0.8756, 1.1244])
    """

    linear = True
    state_names = (*EpochsMixin.state_names, "last", "previous")

    def __init__(self, temperature: float = 2.0, window: int | None = None) -> None:
        in_range("temperature", temperature, 0, bounds="(]")
        if window is not None:
            integer("window", window, 1)
        self.temperature = temperature
        self.window = window
        # Mean losses [T] of the last two epochs.
        self.last: Tensor | None = None
        self.previous: Tensor | None = None

    def scalarize(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`Σ w_i ℓ_i` from losses `[T]`.

        Args:
            losses: `[T]`, or `[k]` when `tasks` names the k tasks that take part; then their
                weights sum to k.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: a loss is negative, or T differs from before.
        """
        check_losses(self.name, losses, tasks, zero=True)
        if tasks is None:
            self.prepare(len(losses), losses)
        if self.last is None or self.previous is None:
            return losses.sum()
        last, previous = self.last, self.previous
        if tasks is not None:
            last, previous = last[list(tasks)], previous[list(tasks)]
        return (dwa(last, previous, self.temperature).to(losses) * losses).sum()

    def observe(self, losses: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Adds the losses `[T]` of a step to its epoch's.

        Raises:
            ValueError: a loss is negative.
        """
        check_losses(self.name, losses if tasks is None else losses[list(tasks)], tasks, zero=True)
        self.add(losses, tasks)
        if self.count_step(self.window, "`window`, a number of steps"):
            self._close()

    def end_epoch(self) -> None:
        """Ends an epoch, unless it had no step or `window` counts them."""
        if self.window is None and self.steps > 0:
            self._close()

    def _close(self) -> None:
        unknown = float("nan") if self.last is None else self.last
        self.previous, self.last = self.last, self.means(unknown)
        self.next_epoch()


def dwa(last: Tensor, previous: Tensor, temperature: float = 2.0) -> Tensor:
    """`w_i = T exp(r_i/τ)/Σ_j exp(r_j/τ)`, `r = last/previous`.

    Args:
        last: `[T]`, mean losses of the last epoch.
        previous: `[T]`, mean losses of the one before.
        temperature: τ.

    Returns:
        `w [T]`, of sum T. r_i = 1 where it is not finite.
    """
    r = last / previous
    r = torch.where(r.isfinite(), r, 1.0)
    return len(r) * (r / temperature).softmax(0)
