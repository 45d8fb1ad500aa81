"""What others' code gives on the same problems, from `published.csv`.

Hypervolumes: the STCH authors' own script, https://github.com/Xi-L/STCH, with seeds 0 to 2 set.
Quadratics: TorchJD 0.18 with the settings of https://github.com/TorchJD/trajectories.
"""

from __future__ import annotations

import csv
import functools
from importlib.resources import files
from typing import NamedTuple

__all__ = ["NOTES", "End", "Volume", "ends", "volumes"]


class Volume(NamedTuple):
    """Mean and standard deviation over the runs; None for a single one."""

    mean: float
    spread: float | None


class End(NamedTuple):
    """The last point, and the length of the shortest convex combination of the gradients there."""

    x1: float
    x2: float
    stationarity: float


@functools.cache
def _rows() -> list[dict[str, str]]:
    text = files("benchmarks.pareto").joinpath("published.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def volumes() -> dict[tuple[str, str], Volume]:
    """By problem and method."""
    return {
        (r["problem"], r["method"]): Volume(
            float(r["hypervolume"]), float(r["spread"]) if r["spread"] else None
        )
        for r in _rows()
        if r["hypervolume"]
    }


def ends() -> dict[tuple[str, str, int], End]:
    """By problem, method and number of the starting point."""
    return {
        (r["problem"], r["method"], int(r["start"])): End(
            float(r["x1"]), float(r["x2"]), float(r["stationarity"])
        )
        for r in _rows()
        if r["x1"]
    }


NOTES = {
    "upgrad": "TorchJD adds 1e-7 to the Gramian's diagonal; ours is exact, and with two objectives "
    "the same as PCGrad but for its length.",
    "dualproj": "TorchJD adds 1e-7 to the Gramian's diagonal; ours is exact.",
    "imtl_g": "TorchJD's pseudo-inverse cuts small singular values off. Of orthogonal gradients "
    "the exact weights are as 1/|g_i|, and d vanishes with the shorter one, so that the exact "
    "method stops where that does.",
    "cagrad": "TorchJD does not move where one gradient is zero; near stationary points its conic "
    "solver is not exact.",
    "nash_mtl": "TorchJD takes linearised steps of a convex solver; ours solves G a = 1/a.",
    "aligned_mtl": "Which singular values count as zero differs.",
    "graddrop": "Random: other draws.",
    "rgw": "Random: other draws.",
}
"""By method, why its end points and TorchJD's differ where they do."""
