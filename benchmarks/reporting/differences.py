"""Which methods differ on one benchmark from single-task training and from the plain sum."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.benchmark import SINGLE_TASK, UNITARY
from benchmarks.reporting.stats import chance_of_separation
from benchmarks.reporting.summary import PLAIN, Summary

__all__ = ["SetFinding", "set_findings"]


@dataclass(frozen=True)
class SetFinding:
    """On one benchmark, which methods differ from a baseline beyond the bootstrap interval.

    Attributes:
        benchmark: its name.
        better_than_single, worse_than_single: whose interval of Δm lies below or above 0.
        plain: the plain baseline that stands here: unitary scalarisation, else the mean.
        better_than_plain, worse_than_plain: whose difference of Δm to it has its interval below or
            above 0; None without several seeds of it.
        chance: how often that would be so in either direction for equal methods, if all seeds have
            to lie on one side for it; None for a single seed.
    """

    benchmark: str
    better_than_single: tuple[str, ...]
    worse_than_single: tuple[str, ...]
    plain: str | None
    better_than_plain: tuple[str, ...] | None
    worse_than_plain: tuple[str, ...] | None
    chance: float | None


def set_findings(summary: Summary) -> SetFinding:
    """See there; the benchmark has to have a baseline."""
    lines = [line for line in summary.lines if line.interval is not None]
    others = [line for line in lines if line.entry.method != SINGLE_TASK]
    names = (UNITARY, *PLAIN)
    plain = next((found for m in names if (found := summary.line(m)) is not None), None)
    compared = []
    if plain is not None and len(plain.entry.good) > 1:
        compared = [
            (line, interval)
            for line in others
            if line is not plain and (interval := summary.against(line, plain)) is not None
        ]
    seeds = min((len(line.entry.good) for line in others), default=1)
    return SetFinding(
        benchmark=summary.benchmark.name,
        better_than_single=tuple(n.label for n in others if n.interval and n.interval.high < 0),
        worse_than_single=tuple(n.label for n in others if n.interval and n.interval.low > 0),
        plain=plain.label if plain is not None else None,
        better_than_plain=tuple(n.label for n, i in compared if i.high < 0) if compared else None,
        worse_than_plain=tuple(n.label for n, i in compared if i.low > 0) if compared else None,
        chance=chance_of_separation(seeds, seeds) if seeds > 1 else None,
    )
