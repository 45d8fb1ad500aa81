"""One number for many metrics: the change against single-task training, in the two usual forms."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["delta_m", "delta_p"]


def delta_m(
    values: Sequence[float], baseline: Sequence[float], higher_is_better: Sequence[bool]
) -> float:
    r"""Mean relative loss against a baseline over all metrics, in percent; lower is better.

    The Δm of *Multi-Task Learning as a Bargaining Game* (Navon et al., ICML 2022,
    https://arxiv.org/abs/2202.01017) and its successors:

        Δm = 100/K · Σ_k (−1)^{δ_k} (M_k − B_k) / B_k

    with K metrics, M_k the method's value, B_k the baseline's (single-task training), and δ_k = 1
    where higher is better, else 0. Every metric has the same share, so a task with five metrics
    counts five times; `delta_p` counts tasks. Negative: better than the baseline on average.

    Args:
        values: the method's metrics `[K]`.
        baseline: the baseline's metrics `[K]`, none of them 0.
        higher_is_better: one flag a metric `[K]`.

    Raises:
        ValueError: the lengths differ, there is no metric, or a baseline is 0 or not finite.

    Example:
        >>> delta_m([0.5, 3.0], baseline=[0.4, 2.0], higher_is_better=[True, False])
        12.5
    """
    gains = _gains(values, baseline, higher_is_better)
    return -100 * math.fsum(gains) / len(gains)


def delta_p(
    values: Sequence[Sequence[float]],
    baseline: Sequence[Sequence[float]],
    higher_is_better: Sequence[Sequence[bool]],
) -> float:
    r"""Mean over tasks of each task's mean relative gain, in percent; higher is better.

    The Δp of *LibMTL* (Lin & Zhang, JMLR 2023, https://arxiv.org/abs/2203.14338):

        Δp = 100/T · Σ_t 1/M_t · Σ_m (−1)^{w_tm} (B_tm − N_tm) / B_tm

    with T tasks, M_t metrics of task t, N_tm the method's value, B_tm the baseline's, and w_tm = 1
    where higher is better, else 0. Every task has the same share. With one metric a task
    Δp = −Δm; otherwise the two differ in more than the sign.

    Args:
        values: the method's metrics, one sequence a task `[T][M_t]`.
        baseline: the baseline's metrics, same shape, none of them 0.
        higher_is_better: one flag a metric, same shape.

    Raises:
        ValueError: the shapes differ, there is no task or an empty one, or a baseline is 0 or not
            finite.

    Example:
        >>> delta_p([[0.5], [3.0, 2.0]], [[0.4], [2.0, 2.0]], [[True], [False, False]])
        0.0
    """
    _check_lengths("tasks", len(values), len(baseline), len(higher_is_better))
    tasks = [
        _gains(task, base, flags)
        for task, base, flags in zip(values, baseline, higher_is_better, strict=True)
    ]
    return 100 * math.fsum(math.fsum(gains) / len(gains) for gains in tasks) / len(tasks)


def _gains(
    values: Sequence[float], baseline: Sequence[float], higher_is_better: Sequence[bool]
) -> list[float]:
    """Relative gains `[K]`, positive where `values` is better than `baseline`."""
    _check_lengths("metrics", len(values), len(baseline), len(higher_is_better))
    for reference in baseline:
        if reference == 0 or not math.isfinite(reference):
            raise ValueError(f"`baseline` must be finite and not 0, found {reference}")
    return [
        (value - reference) / reference * (1 if higher else -1)
        for value, reference, higher in zip(values, baseline, higher_is_better, strict=True)
    ]


def _check_lengths(what: str, values: int, baseline: int, higher_is_better: int) -> None:
    if not values == baseline == higher_is_better or values == 0:
        raise ValueError(
            "`values`, `baseline` and `higher_is_better` must be of one length, at least 1, "
            f"found {values}, {baseline} and {higher_is_better} {what}"
        )
