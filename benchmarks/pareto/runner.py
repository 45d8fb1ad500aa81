"""Runs what is missing of the Pareto tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from benchmarks.jobs import progress_of, share_out
from benchmarks.lines import Lines
from benchmarks.pareto.records import Job, Record, make, select

__all__ = ["execute"]


def execute(jobs: Sequence[Job], results: Lines[Record], workers: int, console: Console) -> None:
    """Do the jobs that are not in the file, and add them to it, each when it is done.

    Args:
        jobs: what is to be there.
        results: the file.
        workers: the number of processes.
        console: where progress is shown.
    """
    records = results.read()
    known = {record.fingerprint for record in select(jobs, records)}
    missing = [job for job in jobs if job.fingerprint not in known]
    if known:
        found = f"{len(known)} of {len(jobs)} runs found in {results.path}"
        console.print(found, soft_wrap=True, markup=False)
    # The long ones first.
    missing.sort(key=lambda job: job.steps, reverse=True)
    with progress_of(console) as progress:
        bar = progress.add_task("learning", total=sum(job.steps for job in missing))
        ending = share_out(make, missing, workers, lambda n: progress.advance(bar, n))
        for done, (job, record) in enumerate(ending, start=1):
            records.append(record)
            results.write(records)
            label = f"{job.problem} {job.method} {job.number} ({done} of {len(missing)})"
            progress.update(bar, description=label)
            if not console.is_terminal:
                console.print(label, markup=False)
