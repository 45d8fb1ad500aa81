"""CPU time of `direction(J)` against TorchJD's aggregator of the same name."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gradbal
from benchmarks.errors import MissingExtra
from gradbal.jacobian import combine, gramian

__all__ = [
    "COUNTERPARTS",
    "Row",
    "counterpart",
    "measure_against_floor",
    "measure_against_torchjd",
]

COUNTERPARTS: dict[str, str] = {
    "aligned_mtl": "AlignedMTL",
    "cagrad": "CAGrad",
    "config": "ConFIG",
    "dualproj": "DualProj",
    "fairgrad": "FairGrad",
    "graddrop": "GradDrop",
    "gradvac": "GradVac",
    "imtl_g": "IMTLG",
    "krum": "Krum",
    "mgda": "MGDA",
    "nash_mtl": "NashMTL",
    "pcgrad": "PCGrad",
    "trimmed_mean": "TrimmedMean",
    "upgrad": "UPGrad",
}
"""gradbal's name → TorchJD's class."""

Direction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One method at one T.

    ratio: median of our CPU time over the other's in the same round; None when the other could not
    run, or the method needs more tasks. reason: why the other could not.
    """

    method: str
    n_tasks: int
    ratio: float | None
    reason: str = ""


def counterpart(method: str, n_tasks: int) -> Any:
    """TorchJD's aggregator with its defaults (and our c, n_byzantine, trim where it has none).

    Raises:
        MissingExtra: TorchJD is not installed.
    """
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise MissingExtra("torchjd", "python -m benchmarks speed") from error
    arguments: dict[str, dict[str, Any]] = {
        "nash_mtl": {"n_tasks": n_tasks},
        "cagrad": {"c": 0.5},
        "fairgrad": {"alpha": 1.0},
        "krum": {"n_byzantine": 0},
        "trimmed_mean": {"trim_number": 1},
    }
    return getattr(aggregation, COUNTERPARTS[method])(**arguments.get(method, {}))


def _interleaved(ours: Direction, theirs: Direction, j: Tensor, rounds: int) -> float:
    ratios = []
    for number in range(-2, rounds):
        seconds = {}
        pair = [("ours", ours), ("theirs", theirs)]
        for name, direction in pair if number % 2 else pair[::-1]:
            start = time.process_time()
            direction(j)
            seconds[name] = time.process_time() - start
        if number >= 0:
            ratios.append(seconds["ours"] / seconds["theirs"])
    return statistics.median(ratios)


def measure_against_torchjd(
    methods: Sequence[str], task_counts: Sequence[int], rounds: int, width: int = 2000
) -> Iterator[Row]:
    """Times both libraries in turn on one Gaussian float32 Jacobian `[T, width]`.

    Args:
        methods: registered names; those without a counterpart are left out.
        task_counts: values of T.
        rounds: measured rounds; two more warm up.
        width: P.

    Raises:
        MissingExtra: TorchJD is not installed.
    """
    for method in methods:
        if method not in COUNTERPARTS:
            continue
        for n_tasks in task_counts:
            if n_tasks < gradbal.info(method).promises.min_tasks:
                yield Row(method, n_tasks, None)
                continue
            torch.manual_seed(0)
            j = torch.randn(n_tasks, width)
            try:
                theirs: Direction = counterpart(method, n_tasks)
                theirs(j)
            except MissingExtra:
                raise
            except Exception as error:  # what it depends on may be missing
                yield Row(method, n_tasks, None, f"{type(error).__name__}: {error}")
                continue
            ours = gradbal.create(method).direction  # type: ignore[attr-defined]
            yield Row(method, n_tasks, _interleaved(ours, theirs, j, rounds))


def measure_against_floor(
    methods: Sequence[str], task_counts: Sequence[int], rounds: int, width: int = 1_000_000
) -> Iterator[Row]:
    """Times Gramian methods against the blocked Gramian and one combination, their floor.

    Args:
        methods: registered names; only Gramian methods are measured.
        task_counts: values of T.
        rounds: measured rounds; two more warm up.
        width: P.
    """
    for method in methods:
        if gradbal.info(method).kind != "gramian":
            continue
        for n_tasks in task_counts:
            if n_tasks < gradbal.info(method).promises.min_tasks:
                yield Row(method, n_tasks, None)
                continue
            torch.manual_seed(0)
            j = torch.randn(n_tasks, width)
            w = torch.ones(n_tasks)

            def floor(j: Tensor, w: Tensor = w) -> Tensor:
                gramian(j)
                return combine(w, j)

            ours = gradbal.create(method).direction  # type: ignore[attr-defined]
            yield Row(method, n_tasks, _interleaved(ours, floor, j, rounds))
