"""The commands that measure the engines of `jacobian=`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.errors import BadInput, BenchmarkError
from benchmarks.options import read_counts, stop

if TYPE_CHECKING:
    from benchmarks.speed.engines import Plan

__all__ = ["add_engine_commands"]

_WITH_ENGINES = ("gramian", "jacobian")
"""Kinds of methods that take a Jacobian, or its Gramian."""


def add_engine_commands(speed: typer.Typer) -> None:
    """Adds `engines`, `sketch`, `memory` and `instance` to `speed`."""
    speed.command()(engines)
    speed.command(name="sketch")(sketch_command)
    speed.command(name="memory")(memory_command)
    speed.command(name="instance")(instance_command)


def engines(
    models: Annotated[
        str, typer.Option(help="Comma-separated.")
    ] = "mlp,conv,resnet18,transformer,lstm",
    tasks: Annotated[str, typer.Option(help="Values of T, comma-separated.")] = "2,3,11,40",
    chosen: Annotated[
        str | None, typer.Option("--engines", help="Comma-separated; all if left out.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Measured rounds.")] = 21,
    threads: Annotated[str, typer.Option(help="Threads of torch, comma-separated.")] = "1,2",
    method: Annotated[str, typer.Option(help="The method, of both libraries.")] = "upgrad",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; cuda where there is one if left out.")
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(help="CPU time of a cell, after which it stops at three rounds or more."),
    ] = 20.0,
    memory: Annotated[float, typer.Option(help="GiB of tensors at once, at most.")] = 6.0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="All figures as JSON.")] = None,
) -> None:
    """Engines of `backward` against T bare autograd.grad passes, the plain sum and TorchJD."""
    from benchmarks.speed.engines import Cell, measure
    from benchmarks.speed.report import (
        COLUMNS,
        SETTINGS,
        environment,
        model_table,
        targets,
        targets_table,
    )
    from benchmarks.speed.report import write as write_json

    try:
        plan = _engines_plan(
            models, tasks, chosen, rounds, threads, method, device, seconds, memory
        )
    except BenchmarkError as error:
        stop(error)
    console = Console(highlight=False)
    # On fewer columns figures would be cut off.
    console.width = max(console.width, 140)
    on_gpu = plan.device.type == "cuda"
    unit = "wall clock, synchronised" if on_gpu else "CPU time"
    found: list[Cell] = []
    per_model = len(plan.task_counts) * len(plan.threads)
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("measuring", total=len(plan.models) * per_model)
            for cell in measure(plan):
                found.append(cell)
                progress.advance(task)
                if out is not None:
                    write_json(out, plan, found)
                if len(found) % per_model == 0:
                    console.print(model_table(found[-per_model:], unit))
    except BenchmarkError as error:
        stop(error)
    except OSError as error:
        stop(BadInput(f"`--out` must be a file that can be written, found {error}"))
    for heading, meaning in COLUMNS.values():
        console.print(f"{heading}: {meaning}")
    console.print(SETTINGS)
    missing = {
        f"{row.name}, {cell.model}, T = {cell.n_tasks}: {row.reason}"
        for cell in found
        for row in cell.rows
        if row.reason
    }
    for line in sorted(missing):
        console.print(line)
    for count in plan.threads:
        console.print(targets_table(targets([c for c in found if c.threads == count]), count))
    where = environment(plan)
    console.print(
        f"Median ratios of interleaved rounds, method {plan.method}, torch {where['torch']}, "
        f"TorchJD {where['torchjd']}, on {where['device']}; {where['processors']} processors, "
        f"load {where['load']} at the end."
    )
    if not on_gpu:
        console.print(
            "Not measured on a GPU: what is known of one are the operators and the waits."
        )


def _engines_plan(
    models: str,
    tasks: str,
    chosen: str | None,
    rounds: int,
    threads: str,
    method: str,
    device: str | None,
    seconds: float,
    memory: float,
) -> Plan:
    """Checks the command line, cheapest first."""
    from benchmarks.speed.models import MODELS

    names = models.split(",")
    unknown = [m for m in names if m not in MODELS]
    if unknown:
        raise BadInput(f"`--models` must be among {', '.join(MODELS)}, found {unknown[0]!r}")
    task_counts, thread_counts = read_counts(tasks), read_counts(threads, "--threads", 1)
    if rounds < 1 or not seconds > 0 or not memory > 0:
        raise BadInput(
            "`--rounds`, `--seconds` and `--memory` must be positive, found "
            f"{rounds}, {seconds:g}, {memory:g}"
        )

    import torch

    import gradbal
    from benchmarks.speed.contestants import available_engines
    from benchmarks.speed.engines import Plan

    known = [n for n in gradbal.list_aggregators() if gradbal.info(n).kind in _WITH_ENGINES]
    if method not in known:
        raise BadInput(f"`--method` must be among {', '.join(known)}, found {method!r}")
    engines = available_engines(method)
    kept = engines if chosen is None else chosen.split(",")
    unknown = [e for e in kept if e not in engines]
    if unknown:
        raise BadInput(f"`--engines` must be among {', '.join(engines)}, found {unknown[0]!r}")
    has_gpu = torch.cuda.is_available()
    if device not in (None, "cpu", "cuda"):
        raise BadInput(f"`--device` must be cpu or cuda, found {device!r}")
    if device == "cuda" and not has_gpu:
        raise BadInput("`--device` must be cpu where there is no GPU, found 'cuda'")
    where = torch.device(device or ("cuda" if has_gpu else "cpu"))
    return Plan(names, task_counts, kept, rounds, thread_counts, method, where, seconds, memory)


def sketch_command(
    models: Annotated[str, typer.Option(help="Comma-separated.")] = "lenet,resnet18,transformer",
    sizes: Annotated[
        str, typer.Option(help="Values of k, comma-separated.")
    ] = "1024,4096,16384,65536,262144",
    steps: Annotated[
        str, typer.Option(help="Steps of training before, rising, comma-separated.")
    ] = "0,50",
    seeds: Annotated[int, typer.Option(help="Of the sketch.")] = 20,
    average: Annotated[
        int, typer.Option(help="Steps over which errors are averaged as well; 0 for none.")
    ] = 0,
) -> None:
    """How far `jacobian="sketch"` is off: cosines, and directions of three methods."""
    from benchmarks.speed.sketch import METHODS, MODELS, Row, average_errors, measure, worst

    chosen = models.split(",")
    unknown = [m for m in chosen if m not in MODELS]
    if unknown:
        stop(BadInput(f"`--models` must be among {', '.join(MODELS)}, found {unknown[0]!r}"))
    ks, moments = read_counts(sizes, "--sizes", 1), read_counts(steps, "--steps", 0)
    if seeds < 1 or average < 0 or moments != sorted(moments):
        stop(
            BadInput(
                "`--seeds` must be positive, `--average` not negative and `--steps` rising, found "
                f"{seeds}, {average}, {steps!r}"
            )
        )
    console = Console(highlight=False)
    console.width = max(console.width, 96)
    rows: list[Row] = []
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("measuring", total=len(chosen) * len(moments) * len(ks))
            for row in measure(chosen, ks, moments, seeds):
                rows.append(row)
                progress.advance(task)
    except BenchmarkError as error:
        stop(error)
    table = Table(title="Errors of cosines, and angles to the exact direction")
    for heading in ("model", "P", "steps", "k", "rms", "largest", *METHODS):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in [*rows, *worst(rows)]:
        where = (
            (row.model, f"{row.n_shared:,}", str(row.n_steps)) if row.model else ("worst", "", "")
        )
        angles = [f"{row.angles[method]:.2f}°" for method in METHODS]
        table.add_row(*where, f"{row.size:,}", f"{row.rms:.4f}", f"{row.largest:.4f}", *angles)
    console.print(table)
    console.print(
        f"{seeds} seeds, T = 4 tasks on MNIST digits, batch 32, float32; angles are root mean "
        "squares over the seeds. A cosine c has a standard error of (1 − c²)/√k."
    )
    if average:
        console.print(
            f"Mean error of a cosine over {average} of Adam's steps, LeNet, k = 4,096, with fresh "
            "and with fixed signs:"
        )
        for what, (fresh, fixed) in average_errors(average, seeds).items():
            console.print(f"{what}: {fresh:.4f}, {fixed:.4f}")


def memory_command(
    steps: Annotated[str, typer.Option(help="Numbers of steps, comma-separated, rising.")] = (
        "1,10,100,500"
    ),
    chosen: Annotated[
        str | None, typer.Option("--engines", help="Comma-separated; all if left out.")
    ] = None,
) -> None:
    """Live tensors and their bytes after many steps, for every engine of `jacobian=`."""
    from benchmarks.speed.memory import WINDOW, measure
    from gradbal.jacobian import ENGINES

    counts = read_counts(steps, "--steps", 1)
    names = list(ENGINES) if chosen is None else chosen.split(",")
    unknown = [name for name in names if name not in ENGINES]
    if unknown or counts != sorted(counts):
        stop(
            BadInput(
                f"`--engines` must be among {', '.join(ENGINES)} and `--steps` rising, found "
                f"{chosen!r}, {steps!r}"
            )
        )
    console = Console(highlight=False)
    table = Table(title="Live tensors, and kB of their memory")
    table.add_column("engine")
    for heading in (*(f"step {count}" for count in counts), "lost bytes"):
        table.add_column(heading, justify="right")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(names))
        for curve in measure(counts, names):
            cells = [f"{n}, {size / 1e3:.1f}" for n, size in curve.live]
            table.add_row(curve.engine, *cells, str(curve.lost))
            progress.advance(task)
    console.print(table)
    console.print(
        f"Lost: what the allocator gave out and did not get back in {WINDOW} more steps, also to "
        "graphs, whose tensors Python does not know of."
    )


def instance_command(
    models: Annotated[str, typer.Option(help="Comma-separated.")] = "mlp,lenet,conv,transformer",
    batches: Annotated[str, typer.Option(help="Values of B, comma-separated.")] = "32,128",
    rounds: Annotated[int, typer.Option(help="Measured rounds.")] = 13,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    method: Annotated[str, typer.Option(help="A Gramian method.")] = "imtl_g",
) -> None:
    """Per-instance losses: the Gramian against a plain backward pass and TorchJD's engine."""
    from benchmarks.speed.instance import COLUMNS, MODELS, measure

    chosen = models.split(",")
    unknown = [m for m in chosen if m not in MODELS]
    sizes = read_counts(batches, "--batches")
    if unknown:
        stop(BadInput(f"`--models` must be among {', '.join(MODELS)}, found {unknown[0]!r}"))
    if rounds < 1 or threads < 1:
        stop(BadInput(f"`--rounds` and `--threads` must be positive, found {rounds}, {threads}"))
    console = Console(highlight=False)
    # On fewer columns figures would be cut off.
    console.width = max(console.width, 120)
    table = Table(title="CPU time over losses.sum().backward() (median ratio), and peak MB")
    for heading in (
        "model",
        "B",
        *COLUMNS,
        "MB plain",
        *(f"MB {c}" for c in COLUMNS),
        "difference",
    ):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    reasons = []
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("measuring", total=len(chosen) * len(sizes))
            for row in measure(chosen, sizes, rounds, threads, method):
                ratios = [row.ratios[c] for c in COLUMNS]
                peaks = [row.peaks.get(c) for c in ("plain", *COLUMNS)]
                table.add_row(
                    row.model,
                    str(row.batch),
                    *("–" if r is None else f"{r:.2f}" for r in ratios),
                    *("–" if p is None else f"{p / 1e6:.1f}" for p in peaks),
                    "–" if row.difference is None else f"{row.difference:.0e}",
                )
                if row.reason:
                    reasons.append(f"{row.model}, B = {row.batch}: TorchJD said {row.reason}")
                progress.advance(task)
    except BenchmarkError as error:
        stop(error)
    console.print(table)
    for line in reasons:
        console.print(line)
    for column, meaning in COLUMNS.items():
        console.print(f"{column}: {meaning}")
    console.print("difference: of TorchJD's Gramian from ours, relative to its largest entry")
    console.print(f"{rounds} rounds, {threads} thread(s), method {method}.")
