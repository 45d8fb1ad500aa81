"""The tables, the targets and the file of `speed engines`."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.speed.engines import Cell, Plan, Row

__all__ = [
    "COLUMNS",
    "SETTINGS",
    "Target",
    "environment",
    "model_table",
    "targets",
    "targets_table",
    "write",
]

COLUMNS: dict[str, tuple[str, str]] = {
    "over_bare": (
        "/ bare",
        "time over that of T bare autograd.grad passes whose results are thrown away",
    ),
    "over_plain": ("/ sum", "over sum(losses).backward()"),
    "over_torchjd": ("/ TorchJD", "over TorchJD with its defaults"),
    "over_best": ("/ its best", "over TorchJD in the fastest of the settings listed"),
    "memory": (
        "memory",
        "bytes at the peak above those of the bare passes, over those of T·P floats; buffers that "
        "stay from step to step are in them",
    ),
    "operators": ("operators", "dispatched in one call, without views"),
    "reads": ("waits", "for an accelerator by the host in one call, counted on a pretended one"),
}
"""Attribute of `Row` → heading and meaning."""

SETTINGS = (
    "TorchJD: mtl_backward and jac_to_grad; chunk: parallel_chunk_size; gramian: "
    "optimize_gramian_computation=True; autogram: autogram.Engine over the trunk, batch_dim=None, "
    "and one weighted backward pass."
)
"""What the names of TorchJD's settings mean."""

_SMALL, _LARGE = ("conv", "transformer"), ("mlp",)
_TASK_COUNTS = (3, 11)


def model_table(cells: Sequence[Cell], unit: str) -> Table:
    """The cells of one model."""
    table = Table(title=f"{cells[0].model}, P = {cells[0].n_shared:,} ({unit})")
    for heading in ("T", "threads", "rounds"):
        table.add_column(heading, justify="right")
    table.add_column("what", no_wrap=True)
    for heading, _ in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in cells:
        table.add_section()
        for number, row in enumerate(cell.rows):
            place = [cell.n_tasks, cell.threads, cell.rounds] if number == 0 else ["", "", ""]
            table.add_row(*map(str, place), _label(row), *(_shown(row, c) for c in COLUMNS))
    return table


def _label(row: Row) -> str:
    chosen = row.engine is not None and row.engine != row.name
    return f"{row.name} ({row.engine})" if chosen else row.name


def _shown(row: Row, column: str) -> str:
    value = getattr(row, column)
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


@dataclass(frozen=True)
class Target:
    """A figure that was aimed at. found: None where none of its cells was measured. cells: how many
    were, of how many."""

    what: str
    at_most: float
    found: float | None
    cells: tuple[int, int]


def targets(cells: Sequence[Cell]) -> list[Target]:
    """Those for the cells of one number of threads."""

    def values(name: str, column: str, models: Sequence[str]) -> list[float]:
        rows = [
            cell.row(name)
            for cell in cells
            if cell.model in models and cell.n_tasks in _TASK_COUNTS
        ]
        found = [None if row is None else getattr(row, column) for row in rows]
        return [value for value in found if value is not None]

    everywhere = (*_LARGE, *_SMALL)
    result = []
    for column, against, at_most in (
        ("over_bare", "T bare passes", 1.0),
        ("over_best", "TorchJD's best setting", 0.75),
        ("over_torchjd", "TorchJD's default", 0.6),
    ):
        found = values("auto", column, everywhere)
        mean = math.exp(sum(map(math.log, found)) / len(found)) if found else None
        what = f'"auto" over {against}: geometric mean of {", ".join(everywhere)}'
        result.append(Target(what, at_most, mean, (len(found), 6)))
    for column, models, what, at_most in (
        ("over_bare", _SMALL, "over T bare passes", 1.06),
        ("over_bare", _LARGE, "over T bare passes", 1.3),
        ("memory", everywhere, "peak extra memory over T·P floats", 1.1),
    ):
        found = values("loop", column, models)
        what = f'"loop" {what}: worst of {", ".join(models)}'
        count = len(found), len(models) * len(_TASK_COUNTS)
        result.append(Target(what, at_most, max(found, default=None), count))
    return result


def targets_table(found: Sequence[Target], threads: int) -> Table:
    """What was aimed at beside what was found."""
    title = f"Targets for T in {{{', '.join(map(str, _TASK_COUNTS))}}}, {threads} thread(s)"
    table = Table(title=title)
    table.add_column("what")
    for heading in ("at most", "found", "cells"):
        table.add_column(heading, justify="right")
    for target in found:
        shown = "–" if target.found is None else f"{target.found:.3f}"
        table.add_row(target.what, f"{target.at_most:.2f}", shown, "{} of {}".format(*target.cells))
    return table


def environment(plan: Plan) -> dict[str, Any]:
    """Where it ran, and how busy that machine is."""
    on_gpu = plan.device.type == "cuda"
    name = torch.cuda.get_device_name(plan.device) if on_gpu else "CPU"
    return {
        "device": name,
        "processors": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "torchjd": importlib.metadata.version("torchjd"),
    }


def write(path: Path, plan: Plan, cells: Sequence[Cell]) -> None:
    """All that was found so far, as JSON; a file that is there is replaced at once."""
    asked = {**asdict(plan), "device": str(plan.device)}
    found = {"plan": asked, "environment": environment(plan), "cells": [asdict(c) for c in cells]}
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)
