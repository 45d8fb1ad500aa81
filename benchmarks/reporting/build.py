"""From a folder of results to the report's document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.benchmark import UNITARY, Benchmark, Settings
from benchmarks.errors import BadInput
from benchmarks.report import words
from benchmarks.reporting.claims import findings
from benchmarks.reporting.differences import set_findings
from benchmarks.reporting.document import Document, Fact, Part, Table
from benchmarks.reporting.figures import pictures
from benchmarks.reporting.left import left_by_others
from benchmarks.reporting.looks import Looks, looks
from benchmarks.reporting.ranks import critical_difference_diagram
from benchmarks.reporting.selection import Selection, select
from benchmarks.reporting.summary import Overall, Summary, compare, summarise
from benchmarks.reporting.tables import (
    benchmark_tables,
    budget_table,
    overall_table,
    set_findings_table,
)
from benchmarks.results import Record, ResultsFile, Trial

__all__ = ["build", "read"]


def read(folder: Path, benchmarks: Mapping[str, Benchmark]) -> Document:
    """The report of what is in the folder.

    Raises:
        BadInput: there is nothing to report.
    """
    path = folder / "results.jsonl"
    # Opening it as results would make the folder and the file.
    records, unreadable = ResultsFile(folder).read() if path.is_file() else ([], 0)
    left = left_by_others(folder)
    if not records and not left:
        raise BadInput(
            f"`DIR` must have a results.jsonl with runs, or what `run toy` or `run pareto` leaves, "
            f"found {folder}; fill it with: python -m benchmarks run NAME --out {folder}"
        )
    return build(records, benchmarks, unreadable, left)


def build(
    records: Sequence[Record],
    benchmarks: Mapping[str, Benchmark],
    unreadable: int = 0,
    left: Sequence[Part] = (),
) -> Document:
    """The report of these records, with parts that others have left behind it."""
    selections, unknown = select(records, benchmarks)
    summaries = [summarise(selection) for selection in selections]
    overall = compare(summaries)
    found = looks([line.label for summary in summaries for line in summary.lines])
    parts = [_part(summary, found) for summary in summaries]
    names = ", ".join(words(summary.benchmark.name) for summary in summaries)
    return Document(
        title="gradbal: methods compared" + (f" on {names}" if len(summaries) == 1 else ""),
        overall=_overall(summaries, overall, found, unknown, unreadable),
        findings=tuple(findings(summaries, overall)),
        parts=(*parts, *left),
    )


def _overall(
    summaries: Sequence[Summary],
    overall: Overall,
    found: Mapping[str, Looks],
    unknown: Counter[str],
    unreadable: int,
) -> Part:
    records = [record for summary in summaries for record in summary.selection.records]
    facts = []
    if records:
        methods = dict.fromkeys(n.entry.method for summary in summaries for n in summary.lines)
        seconds = sum(record.train_seconds for record in records)
        failed = sum(record.error is not None for record in records)
        facts += [
            Fact("Benchmarks", ", ".join(words(s.benchmark.name) for s in summaries)),
            Fact("Methods", f"{len(methods)}: {', '.join(methods)}"),
            Fact("Seeds", ", ".join(map(str, sorted({record.seed for record in records})))),
            Fact(
                "Budget",
                f"{len(records):,} runs, {failed} of them failed, {_time(seconds)} of training "
                "steps",
            ),
            Fact("Versions", _versions(records)),
        ]
    if overall.friedman is not None and overall.difference is not None:
        test = overall.friedman
        facts.append(
            Fact(
                "Do methods differ?",
                f"Friedman's test of the ranks of {len(overall.methods)} methods on "
                f"{len(overall.benchmarks)} benchmarks: χ²({test.freedom}) = {test.chi2:.2f}, "
                f"p = {test.p:.2g}; Iman and Davenport's F = {test.f:.2f}, p = {test.f_p:.2g}. "
                f"Nemenyi's critical difference of mean ranks at 5 %: {overall.difference:.2f}.",
            )
        )
    if overall.left_out:
        missing = "; ".join(
            f"{method} (none on {', '.join(map(words, names))})"
            for method, names in overall.left_out.items()
        )
        facts.append(Fact("Not in the overall ranks", f"methods without a result: {missing}"))
    if overall.benchmarks_left_out:
        names = ", ".join(map(words, overall.benchmarks_left_out))
        facts.append(
            Fact("Not in the overall ranks", f"without a baseline, or just begun: {names}")
        )
    if unknown:
        names = ", ".join(f"{name} ({count} runs)" for name, count in unknown.items())
        facts.append(Fact("Left aside", f"benchmarks that this version does not know: {names}"))
    if unreadable:
        facts.append(Fact("Left aside", f"{unreadable} unreadable lines of results.jsonl"))
    diagram = critical_difference_diagram(overall, found)
    with_baseline = [summary for summary in summaries if summary.baseline is not None]
    tables = (
        overall_table(overall, summaries),
        set_findings_table([set_findings(summary) for summary in with_baseline]),
        budget_table(summaries) if summaries else None,
    )
    return Part(
        "overall",
        "All benchmarks together",
        tuple(facts),
        tuple(table for table in tables if table is not None),
        (diagram,) if diagram is not None else (),
    )


def _part(summary: Summary, found: Mapping[str, Looks]) -> Part:
    selection, benchmark = summary.selection, summary.benchmark
    settings = selection.records[-1].settings
    facts = [Fact("Data", _data(benchmark, settings))]
    shown = {name: value for name, value in settings.items() if name not in Trial._fields}
    if shown:
        facts.append(Fact("Settings", ", ".join(f"{words(k)} {v}" for k, v in shown.items())))
    facts += [
        Fact("Tasks", ", ".join(words(task.name) for task in benchmark.tasks)),
        Fact("Seeds", ", ".join(map(str, selection.seeds))),
        Fact("Tuning", _tuning(selection)),
    ]
    if summary.baseline is None:
        facts.append(
            Fact(
                "No baseline",
                "there is no single-task run that ended well, or one of its measures is not "
                "positive; so there is neither Δm nor Δp",
            )
        )
    if selection.left_aside:
        facts.append(
            Fact(
                "Left aside",
                f"{selection.left_aside} runs with other settings or versions than the newest, "
                f"{_time(selection.left_seconds)} of training steps",
            )
        )
    tables: tuple[Table, ...] = benchmark_tables(summary)
    return Part(
        benchmark.name,
        words(benchmark.name),
        tuple(facts),
        tables,
        tuple(pictures(summary, found)),
        _failures(selection),
    )


def _data(benchmark: Benchmark, settings: Mapping[str, object]) -> str:
    try:
        note = benchmark.note(Settings(**settings))  # type: ignore[arg-type]
    except TypeError:
        note = ""  # Written by a version with other settings.
    return benchmark.summary + (f"; {note}" if note else "")


def _tuning(selection: Selection) -> str:
    rates = sorted({trial.lr for trial in selection.grid})
    text = (
        f"by Δm on validation with seed {selection.seeds[0]}, the same learning rates for every "
        f"method: {', '.join(f'{rate:g}' for rate in rates)}"
    )
    more = [trial for trial in selection.grid if trial.weight_decay or trial.dropout]
    if more:
        decays = ", ".join(f"{decay:g}" for decay in sorted({t.weight_decay for t in more} - {0}))
        dropouts = ", ".join(f"{share:g}" for share in sorted({t.dropout for t in more} - {0}))
        text += f"; for {UNITARY} then weight decay {decays or '–'} and dropout {dropouts or '–'}"
    first = [record for record in selection.records if record.seed == selection.seeds[0]]
    seconds = sum(record.train_seconds for record in first)
    return f"{text}. {len(first)} runs, {_time(seconds)} of training steps"


def _failures(selection: Selection) -> tuple[str, ...]:
    """A line for each run that failed, of any trial."""
    return tuple(
        f"{record.method} on {record.architecture}, seed {record.seed}, learning rate "
        f"{record.trial.lr:g}: {record.error}"
        for record in selection.records
        if record.error is not None
    )


def _versions(records: Sequence[Record]) -> str:
    found: dict[str, set[str]] = {}
    for record in records:
        for name, version in record.versions.items():
            found.setdefault(name, set()).add(version)
    listed = [f"{name} {', '.join(sorted(versions))}" for name, versions in found.items()]
    threads = " or ".join(map(str, sorted({record.threads for record in records})))
    processes = " or ".join(map(str, sorted({record.processes for record in records})))
    return ", ".join([*listed, f"threads {threads}", f"processes a run {processes}"])


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
