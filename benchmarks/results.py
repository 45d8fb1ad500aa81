"""The results file: one JSON line for each finished run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.benchmark import Benchmark, Settings
from benchmarks.errors import BadInput
from benchmarks.versions import versions

__all__ = [
    "Metrics",
    "Record",
    "ResultsFile",
    "Run",
    "Trial",
    "best_by_run",
    "fingerprint",
    "versions",
]

Metrics = Mapping[str, Mapping[str, float]]
"""Values by task and measure."""


class Trial(NamedTuple):
    """What is tuned: learning rate, weight decay, and dropout of the shared features."""

    lr: float
    weight_decay: float
    dropout: float

    @classmethod
    def of(cls, settings: Settings) -> Trial:
        """The part of the settings that is tuned."""
        return cls(settings.lr, settings.weight_decay, settings.dropout)

    def within(self, settings: Settings) -> Settings:
        """The settings with this in place of their own."""
        return replace(settings, **self._asdict())


class Run(NamedTuple):
    """What tells the runs of a table apart."""

    method: str
    seed: int
    architecture: str
    trial: Trial


@dataclass(frozen=True)
class Record:
    """One run: a benchmark, method, architecture and seed, and what came of it.

    Attributes:
        fingerprint: of the versions and of the settings but for the trial; only records with the
            same one are compared.
        error: None for a run that ended well, else the exception in one line; a failed run has no
            metrics.
        test, validation: the metrics on the two held-out sets.
        aggregator: the method with its hyperparameters, in words.
        step_time: duration of a training step over that of one with `sum(losses).backward()`;
            None where it could not be measured. The sum is that of the benchmark's own network,
            whatever the architecture.
        train_seconds: time of the training steps; CPU time on one thread.
        settings, versions: in full, for the reader; `fingerprint` stands for them.
        parameters: how many numbers are trained, over all networks of the run; None in files from
            before it was written.
        step_seconds: duration of a training step; None where it could not be measured, and in files
            from before it was written.
        processes: how many trained together. Batches are the same whatever their number, and so
            are the metrics up to rounding; the step's time is not.
        curve: an entry for each epoch, see `benchmarks.training.train`; empty where several
            networks were trained.
        peak_bytes: most tensor memory at once in a training step, above the parameters and the
            optimizer's state; None where it could not be measured.
        threads: of PyTorch.
    """

    benchmark: str
    method: str
    architecture: str
    seed: int
    fingerprint: str
    error: str | None
    test: Metrics
    validation: Metrics
    aggregator: str
    step_time: float | None
    train_seconds: float
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    parameters: int | None = None
    step_seconds: float | None = None
    processes: int = 1
    curve: Sequence[Mapping[str, Any]] = field(default_factory=list)
    peak_bytes: int | None = None
    threads: int = 1

    @property
    def trial(self) -> Trial:
        """What of the settings is tuned."""
        found = self.settings
        return Trial(found["lr"], found.get("weight_decay", 0.0), found.get("dropout", 0.0))

    @property
    def run(self) -> Run:
        """Which run this is."""
        return Run(self.method, self.seed, self.architecture, self.trial)


class ResultsFile:
    """`results.jsonl` in a folder, made when the first record is appended.

    A record is appended by a single write of its whole line, then forced to disk. Against writing
    the file anew and renaming it, two programs with the same folder lose none of each other's
    records, and a crash can cost no more than the line being written. Such a cut line is skipped by
    the reader, and the next record starts on a line of its own.

    Raises:
        BadInput: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "results.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab"):
                pass
        except OSError as error:
            raise BadInput(
                f"`--out` must be a folder that can be written to, found {folder}: "
                f"{error.strerror or error}"
            ) from error

    def append(self, record: Record) -> None:
        """Add one record; it is on disk when this returns."""
        line = json.dumps(asdict(record), allow_nan=False, ensure_ascii=False) + "\n"
        with self.path.open("ab+", buffering=0) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(size - 1, 0))
            if stream.read(1) not in (b"", b"\n"):
                line = "\n" + line
            stream.write(line.encode())
            os.fsync(stream.fileno())

    def read(self) -> tuple[list[Record], int]:
        """All records in the order of writing, and the number of lines that are none."""
        records = []
        unreadable = 0
        # Bytes, since a line may be cut in the middle of a character.
        for line in self.path.read_bytes().splitlines():
            if not line:
                continue
            try:
                records.append(Record(**json.loads(line)))
            except (ValueError, TypeError):
                unreadable += 1
        return records, unreadable


def best_by_run(records: Iterable[Record]) -> dict[Run, Record]:
    """One record for each run: the latest that ended well, else the latest."""
    best: dict[Run, Record] = {}
    for record in records:
        key = record.run
        if record.error is None or key not in best or best[key].error is not None:
            best[key] = record
    return best


def fingerprint(benchmark: Benchmark, settings: Settings, architecture: str | None = None) -> str:
    """Twelve hex digits that stand for the settings, the benchmark's revision and the versions.

    What is tuned is not part of them: the trials of a method belong to one table.

    Args:
        benchmark, settings: what is run.
        architecture: a name; the benchmark's own network if left out.
    """
    found = versions()
    fixed = {name: value for name, value in asdict(settings).items() if name not in Trial._fields}
    identity = {
        "benchmark": benchmark.name,
        "architecture": architecture or benchmark.architecture,
        "revision": benchmark.revision,
        "settings": fixed,
        "gradbal": found["gradbal"],
        "torch": found["torch"],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
