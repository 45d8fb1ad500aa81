"""The lines of `pareto.jsonl`: one for each learned front and each trajectory."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.pareto.learning import MU, hypervolume, learn
from benchmarks.pareto.problems import PROBLEMS
from benchmarks.pareto.quadratics import QUADRATICS, stationarity, trajectory
from benchmarks.versions import versions

__all__ = ["Job", "Record", "make", "select"]

_versions = functools.cache(versions)


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        problem: in `PROBLEMS` or `QUADRATICS`.
        method: a scalarizer of the former, an aggregator of the latter.
        number: the seed, or the number of the starting point.
        steps: of the training; as many as the authors' on quadratics.
    """

    problem: str
    method: str
    number: int
    steps: int

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that stand for all that decides the numbers."""
        identity = [self.problem, self.method, self.number, self.steps, MU, _versions()]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Record:
    """What came of a job.

    Attributes:
        problem, method, number, steps, fingerprint: of the job.
        hypervolume: of a learned front, against 1.1 in both normalized objectives, 0 where the
            training ended in NaN; None for trajectories.
        stationarity: the length of the shortest convex combination of the gradients at a
            trajectory's end; None for learned fronts.
        points: the learned front `[100, 2]`, normalized, without NaN; or the trajectory.
        versions: of what the numbers depend on.
    """

    problem: str
    method: str
    number: int
    steps: int
    fingerprint: str
    hypervolume: float | None
    stationarity: float | None
    points: list[list[float]]
    versions: dict[str, str]


def make(job: Job, after_steps: Callable[[int], None]) -> Record:
    """Does the job."""
    volume = length = None
    if job.problem in PROBLEMS:
        problem = PROBLEMS[job.problem]
        points = learn(problem, job.method, job.number, job.steps, after_steps)
        # On F2 and F5 the derivative at x1 = 0 is infinite, where the weighted sum may lead: the
        # network is NaN from there on, and what is left of the front dominates nothing.
        points = points[points.isfinite().all(1)]
        volume = hypervolume(points) if len(points) else 0.0
    else:
        quadratic = QUADRATICS[job.problem]
        points = trajectory(quadratic, job.method, job.number)
        length = stationarity(quadratic, points[-1])
        after_steps(job.steps)
    return Record(
        problem=job.problem,
        method=job.method,
        number=job.number,
        steps=job.steps,
        fingerprint=job.fingerprint,
        hypervolume=volume,
        stationarity=length,
        points=[[round(x, 7) for x in point] for point in points.tolist()],
        versions=_versions(),
    )


def select(jobs: Sequence[Job], records: Sequence[Record]) -> list[Record]:
    """The records of these jobs, in their order."""
    mine = {record.fingerprint: record for record in records}
    return [mine[job.fingerprint] for job in jobs if job.fingerprint in mine]
