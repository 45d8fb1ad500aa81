"""What others' code gives on the toy, from `published.csv`, and where ours has to differ.

"official" is the code of FAMO's authors, https://github.com/Cranial-XIX/FAMO, which has those of
Nash-MTL's authors for the other methods: float32, torch 2.13, 50,000 steps. Nash-MTL's convex
problem was handed to ECOS itself, since cvxpy no longer brings it. "replica" is a re-implementation
of the authors' methods in NumPy, float64, with the small problems solved exactly; its gradients are
not cut but where the label says so.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from importlib.resources import files

__all__ = ["NOTES", "UPPER_HALF", "Found", "published"]


@dataclass(frozen=True)
class Found:
    """Where a trajectory ends, by others' code.

    Attributes:
        source: "official" or "replica".
        end: x1 and x2, or None where they are NaN.
        losses: L1 (with its scale) and L2, or None.
        gap: to the front, in percent of its span, or None.
    """

    source: str
    end: tuple[float, float] | None
    losses: tuple[float, float] | None
    gap: float | None


@functools.cache
def published(setting: str) -> dict[tuple[str, str, int], Found]:
    """By label, source and number of the starting point."""
    text = files("benchmarks.toy").joinpath("published.csv").read_text(encoding="utf-8")
    found = {}
    for row in csv.DictReader(text.splitlines()):
        if row["setting"] != setting:
            continue
        end = (float(row["x1"]), float(row["x2"])) if row["x1"] else None
        losses = (float(row["l1"]), float(row["l2"])) if row["l1"] else None
        gap = float(row["gap_percent"]) if row["gap_percent"] else None
        key = row["label"], row["source"], int(row["start"])
        found[key] = Found(row["source"], end, losses, gap)
    return found


NOTES = {
    "mgda": "The official solver stops at weights 0.999 and 0.001 where one gradient alone is the "
    "min-norm point; ours goes to 1 and 0.",
    "nash_mtl": "The official code takes 20 linearised steps of a convex solver; ours solves "
    "G a = 1/a. Every point of the front is stationary, and small differences drift along it.",
    "cagrad": "Without FAMO's clip, as in Nash-MTL's code, which is stuck from (9, 9) too.",
    "cagrad+clip": "From (9, 9) the official code is stuck in float32; in float64 it is not, nor "
    "are we.",
    "pcgrad": "Without FAMO's clip, as in Nash-MTL's code, which is stuck from (9, 9) too.",
    "pcgrad+clip": "FAMO's code cuts the direction to length 1.",
    "graddrop+clip": "Random: other draws. FAMO's code cuts the direction to length 1.",
    "rlw": "Random: other draws.",
    "uw": "Negative losses let σ shrink without end. The official weights overflow float32 and the "
    "parameters freeze; ours keeps log σ² above −10.",
    "dwa": "Needs losses that are not negative, which the front's are. The official code divides "
    "by a mean loss near 0 until its weights are NaN; ours refuses.",
    "famo": "From (0, 0) the derivatives by x1 are 0 but for rounding, which decides for left or "
    "right.",
    "imtl_g": "From (0, 0) the derivatives by x1 are 0 but for rounding, which decides for left or "
    "right.",
    "aligned_mtl": "Which eigenvalues count as zero decides where it ends: from (9, −1) thresholds "
    "of 4e-16, 1e-10 and 2e-7 give x1 = −2.4, −2.8 and −5.6.",
    "fairgrad": "Every point of the front is stationary, and small differences drift along it.",
}
"""By label, why our numbers and others' differ where they do."""

UPPER_HALF = (
    "Where x2 starts above 0, the path over the ridges of log|·| is chaotic: gradients of up to "
    "1e5 enlarge every rounding."
)
"""Why any of them may differ from there."""
