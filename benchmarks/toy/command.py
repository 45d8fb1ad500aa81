"""`python -m benchmarks run toy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.errors import BadInput
from benchmarks.special import ending, wide_console

__all__ = ["toy"]


def toy(
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME…",
            help="Methods to run, one or several after the option; all of them if left out. "
            "pcgrad+clip, cagrad+clip and graddrop+clip are the forms of FAMO's code.",
        ),
    ] = None,
    setting: Annotated[
        str, typer.Option(help="nash_famo, or cagrad for that paper's own starts and scale.")
    ] = "nash_famo",
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Steps of Adam; the papers' if left out.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the results; results/toy if left out."),
    ] = None,
    workers: Annotated[
        int, typer.Option(metavar="N", help="Processes that share the methods out.")
    ] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="2,000 steps.")] = False,
) -> None:
    """The two-objective toy of CAGrad, Nash-MTL and FAMO: table and trajectories.

    Finished methods are kept: the same command goes on where it was interrupted.
    """
    folder = Path("results/toy") if out is None else out
    with ending():
        _run(methods, setting, steps, folder, workers, quick)


def _run(
    methods: list[str] | None,
    name: str,
    steps: int | None,
    folder: Path,
    workers: int,
    quick: bool,
) -> None:
    for option, value in (("--steps", steps), ("--workers", workers)):
        if value is not None and value < 1:
            raise BadInput(f"`{option}` must be at least 1, found {value}")

    from benchmarks.files import write_texts
    from benchmarks.known import check_known
    from benchmarks.lines import Lines
    from benchmarks.toy.picture import write_pictures
    from benchmarks.toy.records import Record
    from benchmarks.toy.runner import ToyPlan, execute
    from benchmarks.toy.settings import SETTINGS, contestants, unsuited
    from benchmarks.toy.table import remarks, screen_table, to_csv, to_markdown

    check_known("--setting", name, list(SETTINGS))
    setting = SETTINGS[name]
    everyone = {contestant.label: contestant for contestant in contestants(setting)}
    for method in methods or ():
        check_known("--methods", method, list(everyone))
    chosen = [everyone[label] for label in dict.fromkeys(methods or everyone)]
    left_out = {c.label: reason for c in chosen if (reason := unsuited(c)) is not None}
    chosen = [contestant for contestant in chosen if contestant.label not in left_out]
    n_steps = steps or (setting.quick_steps if quick else setting.steps)

    console = wide_console()
    plan = ToyPlan(setting, tuple(chosen), n_steps)
    results = Lines(folder / "toy.jsonl", Record)
    execute(plan, results, workers, console)
    records = plan.select(results.read())
    console.print(screen_table(setting, records, n_steps))
    lines = [f"{label}: {reason}" for label, reason in left_out.items()]
    lines += remarks(setting, records, n_steps)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    text = to_markdown(setting, records, n_steps, left_out)
    contents = {"toy.csv": to_csv(setting, records, n_steps), "toy.md": text}
    texts = write_texts(folder, contents)
    written = [results.path, *texts, *write_pictures(setting, records, folder)]
    console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True, markup=False)
