"""Runs what is missing of the toy's table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console

import gradbal
from benchmarks.jobs import progress_of, share_out
from benchmarks.lines import Lines
from benchmarks.toy.descent import from_all_starts
from benchmarks.toy.records import Record, fingerprint, to_record
from benchmarks.toy.settings import Contestant, Setting

__all__ = ["ToyPlan", "execute"]


@dataclass(frozen=True)
class ToyPlan:
    """What is to be run: a setting, the methods, and how many steps."""

    setting: Setting
    contestants: tuple[Contestant, ...]
    steps: int

    def select(self, records: Sequence[Record]) -> list[Record]:
        """Those of the plan's trajectories, in its order."""
        marks = {c.label: fingerprint(self.setting, c, self.steps) for c in self.contestants}
        mine = {r.key: r for r in records if marks.get(r.label) == r.fingerprint}
        keys = [(c.label, k) for c in self.contestants for k in range(len(self.setting.starts))]
        return [mine[key] for key in keys if key in mine]


def execute(plan: ToyPlan, results: Lines[Record], workers: int, console: Console) -> None:
    """Make the plan's trajectories that are not in the file, and add them to it.

    Methods are shared out to the workers; each is written down when its last start is done.

    Args:
        plan: what is to be run.
        results: the file.
        workers: the number of processes.
        console: where progress is shown.
    """
    records = results.read()
    known = {r.label for r in plan.select(records)}
    missing = [c for c in plan.contestants if c.label not in known]
    if known:
        n, total = len(known), len(plan.contestants)
        console.print(f"{n} of {total} methods found in {results.path}", soft_wrap=True)
    if not missing:
        return
    # The slowest first, so that no worker is left with one of them at the end.
    missing.sort(key=_slowness, reverse=True)
    with progress_of(console) as progress:
        bar = progress.add_task("descending", total=plan.steps * len(missing))
        work = partial(from_all_starts, plan.setting, plan.steps)
        ending = share_out(work, missing, workers, lambda n: progress.advance(bar, n))
        for done, (contestant, found) in enumerate(ending, start=1):
            new = [to_record(plan.setting, path, plan.steps) for path in found]
            keys = {r.key for r in new}
            # Other settings, steps and versions stay beside these.
            marks = {r.fingerprint for r in new}
            records = [r for r in records if r.key not in keys or r.fingerprint not in marks]
            records += new
            results.write(records)
            # What ended early has made fewer steps.
            label = f"{contestant.label} ({done} of {len(missing)})"
            progress.update(bar, description=label)
            if not console.is_terminal:
                console.print(f"{label}: {sum(p.seconds for p in found):.1f} s", markup=False)
        progress.update(bar, completed=plan.steps * len(missing))


def _slowness(contestant: Contestant) -> int:
    """A rough rank, by what the method looks at."""
    kinds = ("scalarizer", "gramian", "jacobian", "closure")
    return kinds.index(gradbal.info(contestant.method).kind)
