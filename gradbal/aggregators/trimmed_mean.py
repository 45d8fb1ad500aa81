"""Coordinatewise trimmed mean."""

from __future__ import annotations

import torch
from torch import Tensor

from gradbal.aggregators._arguments import integer
from gradbal.aggregators.base import JacobianAggregator
from gradbal.jacobian import CHUNK
from gradbal.registry import Promises, register

__all__ = ["TrimmedMean", "trimmed_mean"]


@register(
    "trimmed_mean",
    title="Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
    venue="ICML",
    year=2018,
    url="https://arxiv.org/abs/1803.01498",
    promises=Promises(
        heads="own",
        degree=1,
        gain=lambda a, t, n: 1.0,
        zero_rows_inactive=False,
        min_tasks=3,
    ),
)
class TrimmedMean(JacobianAggregator):
    """In every coordinate the mean without the largest and the smallest values.

    Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML
    2018, https://arxiv.org/abs/1803.01498. In each coordinate the b largest and the b smallest of
    the T values are left out and the other `T − 2b` averaged. Up to b gradients may be arbitrary.
    Made for copies of one gradient from several workers, it leaves out the tasks that differ.

    Args:
        trim: b ≥ 0, at most `(T − 1)/2`; 0 is the mean, `(T − 1)/2` for odd T the median.

    Raises:
        ValueError: `trim` is negative, or there are too few tasks.

    Note:
        The paper leaves out a part β of the values at each end, here `b/T`. A zero is a value like
        any other, also where it stands for a parameter that a task does not reach.

    Example:
        >>> import torch
        >>> TrimmedMean().direction(torch.tensor([[1.0, 0.0], [9.0, -9.0], [2.0, 0.2]]))
        tensor([2., 0.])
    """

    def __init__(self, trim: int = 1) -> None:
        integer("trim", trim)
        self.trim = trim

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that there are enough tasks.

        Raises:
            ValueError: there are fewer than `2·trim + 1`.
        """
        _check(n_tasks, self.trim)

    def direction(self, jacobian: Tensor, losses: Tensor | None = None) -> Tensor:
        """`d [P]` from the Jacobian `[T, P]`.

        Raises:
            ValueError: fewer than `2·trim + 1` tasks.
        """
        return trimmed_mean(jacobian, self.trim)


def trimmed_mean(jacobian: Tensor, trim: int = 1) -> Tensor:
    """The mean of all but the `trim` largest and smallest values of each column.

    Args:
        jacobian: `[T, P]`.
        trim: b in 0..(T − 1)/2.

    Returns:
        `d [P]`, dtype and device of the Jacobian. Half-precision rows are averaged in float32.

    Raises:
        ValueError: `trim` is too large for T.
    """
    _check(len(jacobian), trim)
    chunks = torch.split(jacobian.detach(), CHUNK, 1)
    return torch.cat([_middle_mean(list(chunk), trim) for chunk in chunks])


def _middle_mean(values: list[Tensor], trim: int) -> Tensor:
    """The mean of the middle values of each entry of T vectors, in their dtype.

    Rounds of a bubble sort, one from each end, carry the largest to the back and the smallest to
    the front. `torch.sort` takes five to ten times as long, and makes an index for every entry.
    """
    for done in range(trim):
        last = len(values) - 1 - done
        for i in range(done, last):
            _order(values, i)
        for i in reversed(range(done, last - 1)):
            _order(values, i)
    kept = torch.stack(values[trim : len(values) - trim])
    wide = torch.promote_types(kept.dtype, torch.float32)
    return kept.mean(0, dtype=wide).to(kept.dtype)


def _order(values: list[Tensor], i: int) -> None:
    a, b = values[i], values[i + 1]
    values[i], values[i + 1] = torch.minimum(a, b), torch.maximum(a, b)


def _check(n_tasks: int, trim: int) -> None:
    if n_tasks < 2 * trim + 1:
        raise ValueError(
            f"the trimmed mean with trim={trim} needs at least {2 * trim + 1} tasks, "
            f"found {n_tasks}"
        )
