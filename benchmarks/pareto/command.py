"""`python -m benchmarks run pareto`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.errors import BadInput
from benchmarks.special import ending, wide_console

__all__ = ["pareto"]


def pareto(
    problems: Annotated[
        str | None,
        typer.Option(help="Of f1 … f6, re21, re24, ewq and cqf, comma-separated; all if left out."),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME…",
            help="Scalarizers (constant, tchebycheff, stch_scalar) for the learned fronts, "
            "aggregators for the quadratics, one or several after the option; all if left out.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Of the learned fronts: 0 … N−1.")] = 3,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Of Pareto-set learning; 2,000 if left out.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the results; results/pareto if left out."),
    ] = None,
    workers: Annotated[
        int, typer.Option(metavar="N", help="Processes that share the runs out.")
    ] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="f4 and ewq, 200 steps and one seed.")
    ] = False,
) -> None:
    """Pareto-set learning on STCH's problems, and UPGrad's convex quadratics.

    Finished runs are kept: the same command goes on where it was interrupted.
    """
    folder = Path("results/pareto") if out is None else out
    chosen = problems or ("f4,ewq" if quick else None)
    with ending():
        _run(
            None if chosen is None else [name.strip() for name in chosen.split(",")],
            methods,
            1 if quick else seeds,
            steps or (200 if quick else 2000),
            folder,
            workers,
        )


def _run(
    names: list[str] | None,
    methods: list[str] | None,
    seeds: int,
    steps: int,
    folder: Path,
    workers: int,
) -> None:
    for option, value in (("--steps", steps), ("--workers", workers), ("--seeds", seeds)):
        if value < 1:
            raise BadInput(f"`{option}` must be at least 1, found {value}")

    from benchmarks.files import write_texts
    from benchmarks.known import check_known
    from benchmarks.lines import Lines
    from benchmarks.pareto.learning import SCALARIZERS
    from benchmarks.pareto.picture import write_pictures
    from benchmarks.pareto.problems import PROBLEMS
    from benchmarks.pareto.quadratics import AGGREGATORS, QUADRATICS
    from benchmarks.pareto.records import Job, Record, select
    from benchmarks.pareto.runner import execute
    from benchmarks.pareto.table import remarks, screen_tables, to_csv, to_markdown

    for name in names or ():
        check_known("--problems", name, [*PROBLEMS, *QUADRATICS])
    for method in methods or ():
        check_known("--methods", method, [*SCALARIZERS, *AGGREGATORS])
    jobs = []
    for name in dict.fromkeys(names or [*PROBLEMS, *QUADRATICS]):
        learned = name in PROBLEMS
        numbers = seeds if learned else len(QUADRATICS[name].starts)
        each = steps if learned else QUADRATICS[name].steps
        for method in SCALARIZERS if learned else AGGREGATORS:
            if methods is None or method in methods:
                jobs += [Job(name, method, number, each) for number in range(numbers)]
    if not jobs:
        raise BadInput(
            "`--methods` must name scalarizers for learned fronts or aggregators for quadratics, "
            f"found {' '.join(methods or [])} for {', '.join(names or [])}"
        )

    console = wide_console()
    results = Lines(folder / "pareto.jsonl", Record)
    execute(jobs, results, workers, console)
    records = select(jobs, results.read())
    for table in screen_tables(records):
        console.print(table)
    for line in remarks(records):
        console.print(line, soft_wrap=True, markup=False)
    contents = {"pareto.csv": to_csv(records), "pareto.md": to_markdown(records)}
    texts = write_texts(folder, contents)
    written = [results.path, *texts, *write_pictures(records, folder)]
    console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True, markup=False)
