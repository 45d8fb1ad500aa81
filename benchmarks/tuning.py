"""Which learning rate, weight decay and dropout each method is run with: chosen on validation."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.benchmark import SINGLE_TASK, Benchmark, Settings
from benchmarks.metrics import delta_m
from benchmarks.results import Metrics, Record, Trial

__all__ = ["Row", "Tuning", "chosen_trials", "score"]

Row = tuple[str, str]
"""A line of a table: method and architecture."""


@dataclass(frozen=True)
class Tuning:
    """What is tried with the lowest seed, before the other seeds are run.

    Every method has the same learning rates. Unitary scalarisation, the strong baseline of *In
    Defense of the Unitary Scalarization for Deep Multi-Task Learning* (Kurin et al., NeurIPS 2022,
    https://arxiv.org/abs/2201.04122), then has every pair of a weight decay and a dropout at its
    best learning rate.

    Attributes:
        lr_factors: times the benchmark's learning rate, each positive.
        weight_decays: of unitary scalarisation, each at least 0.
        dropouts: of unitary scalarisation, each in [0, 1).
    """

    lr_factors: tuple[float, ...] = (0.3, 1.0, 3.0)
    weight_decays: tuple[float, ...] = (0.0, 1e-4)
    dropouts: tuple[float, ...] = (0.0, 0.2)

    def __post_init__(self) -> None:
        self._check("lr_factors", lambda x: x > 0, "positive")
        self._check("weight_decays", lambda x: x >= 0, "at least 0")
        self._check("dropouts", lambda x: 0 <= x < 1, "in [0, 1)")

    def _check(self, name: str, holds: Callable[[float], bool], words: str) -> None:
        values = getattr(self, name)
        if not values or not all(math.isfinite(x) and holds(x) for x in values):
            found = ", ".join(map(str, values)) or "none"
            raise ValueError(f"`{name}` must be one or more numbers, each {words}, found {found}")

    def grid(self, settings: Settings) -> list[Trial]:
        """What is tried for every method."""
        trial = Trial.of(settings)
        # Rounded, since 0.3 times a rate like 0.002 is no number that anyone would write.
        rates = [float(f"{factor * settings.lr:.4g}") for factor in dict.fromkeys(self.lr_factors)]
        return [trial._replace(lr=rate) for rate in rates]

    def regularised(self, best: Trial) -> list[Trial]:
        """What else is tried for unitary scalarisation, once its learning rate is known."""
        pairs = itertools.product(self.weight_decays, self.dropouts)
        trials = [best._replace(weight_decay=decay, dropout=share) for decay, share in pairs]
        return [trial for trial in dict.fromkeys(trials) if trial != best]


def score(benchmark: Benchmark, validation: Metrics, reference: Metrics) -> float:
    """Δm on validation data against a reference, in percent; lower is better.

    Measures in which the reference has no number above 0 are left out: nothing is a share of them.
    Where the run itself has no number, nothing is worse.
    """
    values, baseline, higher = [], [], []
    for task in benchmark.tasks:
        for measure in task.measures:
            base = reference[task.name][measure.name]
            if 0 < base < math.inf:
                values.append(validation[task.name][measure.name])
                baseline.append(base)
                higher.append(measure.higher_is_better)
    if not all(map(math.isfinite, values)):
        return math.inf
    return delta_m(values, baseline, higher) if values else 0.0


def chosen_trials(benchmark: Benchmark, records: Iterable[Record]) -> dict[Row, Trial]:
    """For each method and architecture the trial with the best score, of those that ended well.

    Only the runs with the lowest seed take part, and only their validation measures. The reference
    is the single-task run with the middle learning rate; without one the first trial is taken.
    """
    good = [record for record in records if record.error is None]
    lowest = min((record.seed for record in good), default=0)
    by_row: dict[Row, list[Record]] = {}
    for record in good:
        if record.seed == lowest:
            by_row.setdefault((record.method, record.architecture), []).append(record)
    reference = _reference(by_row.get((SINGLE_TASK, benchmark.architecture), []))
    return {row: _best(benchmark, tried, reference) for row, tried in by_row.items()}


def _reference(singles: Sequence[Record]) -> Metrics | None:
    if not singles:
        return None
    middle = statistics.median_low(record.trial.lr for record in singles)
    return next(record.validation for record in singles if record.trial.lr == middle)


def _best(benchmark: Benchmark, tried: Sequence[Record], reference: Metrics | None) -> Trial:
    if reference is None:
        return tried[0].trial
    scores: Mapping[Trial, float] = {
        record.trial: score(benchmark, record.validation, reference) for record in tried
    }
    return min(scores, key=scores.__getitem__)
