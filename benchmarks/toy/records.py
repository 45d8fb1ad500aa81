"""The lines of `toy.jsonl`: one for each trajectory."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.toy.descent import Path as Trajectory
from benchmarks.toy.settings import Contestant, Setting
from benchmarks.versions import versions

__all__ = ["Record", "fingerprint", "to_record"]

# Looking them up takes milliseconds.
_versions = functools.cache(versions)


@dataclass(frozen=True)
class Record:
    """One trajectory.

    Attributes:
        setting: the name of the setting.
        label, method, options, clip: the contestant.
        start: the number of the starting point.
        fingerprint: stands for all that decides the numbers.
        steps: that were to be made.
        first, end: the starting point and the last one.
        losses: L1 (with its scale) and L2 at the end.
        gap: to the front at the end, in percent of the front's span.
        reached: whether the end is on the front.
        steps_to_front: after so many steps it was on the front and stayed there, or None.
        error, failed_at: why and at which step it ended early, or None.
        microseconds: what the method took for a step, in the mean.
        trajectory: at most 400 times [step, x1, x2].
        versions: of what the numbers depend on.
    """

    setting: str
    label: str
    method: str
    options: dict[str, Any]
    clip: float | None
    start: int
    fingerprint: str
    steps: int
    first: list[float]
    end: list[float]
    losses: list[float]
    gap: float
    reached: bool
    steps_to_front: int | None
    error: str | None
    failed_at: int | None
    microseconds: float
    trajectory: list[list[float]]
    versions: dict[str, str]

    @property
    def key(self) -> tuple[str, int]:
        """Which trajectory it is."""
        return self.label, self.start


def fingerprint(setting: Setting, contestant: Contestant, steps: int) -> str:
    """Twelve hex digits that stand for all that decides where the trajectories go."""
    identity = [asdict(setting), asdict(contestant), steps, _versions()]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def to_record(setting: Setting, trajectory: Trajectory, steps: int) -> Record:
    """The line of a trajectory."""
    contestant = trajectory.contestant
    made = steps if trajectory.failed_at is None else max(trajectory.failed_at, 1)
    return Record(
        setting=setting.name,
        label=contestant.label,
        method=contestant.method,
        options=dict(contestant.options),
        clip=contestant.clip,
        start=trajectory.start,
        fingerprint=fingerprint(setting, contestant, steps),
        steps=steps,
        first=list(setting.starts[trajectory.start]),
        end=list(trajectory.end),
        losses=list(trajectory.losses),
        gap=trajectory.gap,
        reached=trajectory.settled is not None,
        steps_to_front=trajectory.settled,
        error=trajectory.error,
        failed_at=trajectory.failed_at,
        microseconds=round(1e6 * trajectory.seconds / made, 2),
        trajectory=[[step, round(x1, 5), round(x2, 5)] for step, x1, x2 in trajectory.points],
        versions=_versions(),
    )
