"""The tables of a report."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from benchmarks.benchmark import SINGLE_TASK, Measure, Task
from benchmarks.report import Stat, cell, measures_of, words
from benchmarks.reporting.differences import SetFinding
from benchmarks.reporting.document import Cell, Table
from benchmarks.reporting.stats import Interval
from benchmarks.reporting.summary import Line, Overall, Summary
from benchmarks.results import Trial

__all__ = ["benchmark_tables", "budget_table", "overall_table", "set_findings_table"]

_MOST_COLUMNS = 8
"""Measures that a printed table has room for; of more it gets the means over the tasks."""

_DASH = Cell("–")


def benchmark_tables(summary: Summary) -> tuple[Table, ...]:
    """Results, what they cost, and for many tasks the measures one by one."""
    measures = measures_of(summary.benchmark)
    if len(measures) <= _MOST_COLUMNS:
        return _results(summary, measures), _cost(summary)
    return _results(summary, ()), _cost(summary), _by_task(summary, measures)


def overall_table(overall: Overall, summaries: Sequence[Summary]) -> Table | None:
    """Δm on every benchmark and the mean rank, best first."""
    if not overall.methods:
        return None
    by_name = {summary.benchmark.name: summary for summary in summaries}
    columns = []
    for name in overall.benchmarks:
        found = [by_name[name].line(method) for method in overall.methods]
        lines = [line for line in found if line is not None]
        columns.append(_column([line.row.delta_m for line in lines], True, lines))
    pairs = list(zip(overall.methods, overall.mean_ranks, strict=True))
    best = min((rank for method, rank in pairs if method != SINGLE_TASK), default=None)
    columns.append([Cell(f"{r:.2f}", r, r == best and m != SINGLE_TASK) for m, r in pairs])
    rows = [(Cell(m), *cells) for m, *cells in zip(overall.methods, *columns, strict=True)]
    rows.sort(key=lambda row: row[-1].value or 0)
    return Table(
        "overall",
        "Δm on the test sets in percent against single-task training (mean ± sample standard "
        "deviation over seeds, lower is better), and the mean over the benchmarks of the rank by "
        "it (1 is best). In bold the best of a column, single-task aside.",
        ("method", *map(words, overall.benchmarks), "mean rank"),
        tuple(rows),
    )


def set_findings_table(found: Sequence[SetFinding]) -> Table | None:
    """Which methods differ from the baselines on which benchmark."""
    if not found:
        return None
    rows = []
    for each in found:
        lists = (
            each.better_than_single,
            each.worse_than_single,
            each.better_than_plain,
            each.worse_than_plain,
        )
        names = ["–" if methods is None else ", ".join(methods) or "none" for methods in lists]
        rows.append(tuple(map(Cell, [words(each.benchmark), *names])))
    plains = sorted({each.plain for each in found if each.plain}) or ["unitary"]
    chances = [each.chance for each in found if each.chance is not None]
    note = "Not corrected for the number of comparisons."
    if chances:
        note = (
            "With so few seeds an interval leaves out 0 about where all seeds lie on one side, "
            f"which happens to equal methods in {100 * max(chances):.2g} % of cases in each "
            f"direction; {note[0].lower()}{note[1:]}"
        )
    plain = " or ".join(plains)
    return Table(
        "beyond-intervals",
        "Methods whose 95 % bootstrap interval lies entirely on one side: of Δm (against "
        f"single-task training) and of the difference of Δm to {plain}.",
        (
            "benchmark",
            "better than single-task",
            "worse than single-task",
            f"better than {plain}",
            f"worse than {plain}",
        ),
        tuple(rows),
        note,
        numeric=False,
    )


def budget_table(summaries: Sequence[Summary]) -> Table:
    """How many runs were made, and how long they took."""
    rows = []
    for summary in summaries:
        selection = summary.selection
        seconds = sum(record.train_seconds for record in selection.records)
        failed = sum(record.error is not None for record in selection.records)
        numbers = (len(selection.entries), len(selection.seeds), len(selection.grid))
        rows.append(
            (
                Cell(words(summary.benchmark.name)),
                *(Cell(str(number), number) for number in (*numbers, len(selection.records))),
                Cell(str(failed), failed),
                Cell(f"{seconds:,.0f}", seconds),
                Cell(str(selection.left_aside), selection.left_aside),
            )
        )
    totals = [sum(row[place].value or 0 for row in rows) for place in range(4, 8)]
    rows.append(
        (Cell("all"), _DASH, _DASH, _DASH, *(Cell(f"{total:,.0f}", total) for total in totals))
    )
    return Table(
        "budget",
        "What was run. Trials: different learning rates, weight decays and dropouts with the "
        "lowest seed. Seconds: of training steps, all runs together. Left aside: runs with other "
        "settings or versions in the same file.",
        ("benchmark", "methods", "seeds", "trials", "runs", "failed", "seconds", "left aside"),
        tuple(rows),
    )


def _results(summary: Summary, measures: Sequence[tuple[Task, Measure]]) -> Table:
    lines = summary.lines
    header = ["method", "trial"]
    columns = [[_name(line) for line in lines], [_trial(line.entry.trial, line) for line in lines]]
    for task, measure in measures:
        header.append(_heading(task, measure))
        stats = [_scaled(line.row.test[task.name, measure.name], measure) for line in lines]
        columns.append(_column(stats, not measure.higher_is_better, lines, measure.digits))
    shown = [measure for _, measure in measures]
    if not measures:
        shown = _common(summary)
        for measure in shown:
            header.append(f"mean {measure.name}{' %' if measure.percent else ''}")
            means = [_over_tasks(summary, line, measure) for line in lines]
            columns.append(_column(means, not measure.higher_is_better, lines, measure.digits))
    columns.append(_column([line.row.delta_m for line in lines], True, lines))
    columns.append([_interval(line.interval) for line in lines])
    columns.append(_column([line.row.delta_p for line in lines], False, lines))
    columns.append(_ranks(lines))
    columns.append([_seeds(line) for line in lines])
    header += ["Δm %", "95 % interval", "Δp %", "rank", "seeds"]
    seeds = max((line.row.seeds for line in lines), default=0)
    caption = "Test set" + (", mean ± sample standard deviation over seeds" if seeds > 1 else "")
    caption += (
        f"; {_arrows(shown)}Δm: lower is better, Δp: higher is better, both against the mean of "
        "the single-task runs; rank: mean over all metrics. In bold the best, single-task aside."
    )
    if seeds > 1:
        caption += (
            " Intervals of Δm: percentile bootstrap over the seeds of method and baseline, rough "
            f"with {seeds} seeds."
        )
    return Table(
        f"{_id(summary)}-results",
        caption,
        tuple(header),
        tuple(zip(*columns, strict=True)),
        _unfinished(summary),
        wide=len(measures) > 4,
    )


def _cost(summary: Summary) -> Table:
    rows = []
    for line in summary.lines:
        row, reached = line.row, line.reached
        seeds = len(line.entry.good)
        some = f" ({reached.seeds} of {seeds})" if reached and reached.seeds < seeds else ""
        milliseconds = None if row.step_seconds is None else 1000 * row.step_seconds
        mebibytes = None if line.peak_bytes is None else line.peak_bytes / 2**20
        share = None if line.conflicts is None else 100 * line.conflicts
        rows.append(
            (
                Cell(line.label),
                _number(row.step_time, "{:.2f} ×"),
                _number(milliseconds, "{:.1f}"),
                _number(line.train_seconds, "{:.1f}"),
                _number(mebibytes, "{:.1f}"),
                _number(row.parameters, "{:,}"),
                _number(reached.epochs if reached else None, "{:g}" + some),
                _number(reached.seconds if reached else None, "{:.1f}" + some),
                _number(share, "{:.0f}"),
                _number(line.cosine, "{:.2f}"),
            )
        )
    caption = (
        "Time and memory. Step: over that of the plain sum; seconds: training steps of a run; "
        "peak: tensors of one training step above network and optimizer; conflicts: share of pairs "
        "of tasks whose gradients have a negative inner product."
    )
    if summary.target is not None:
        caption += (
            " To target: epochs and seconds until Δm on validation is as low as where plain "
            f"averaging ends on average ({summary.target:.2f} %), median over seeds; – if never."
        )
    return Table(
        f"{_id(summary)}-cost",
        caption,
        (
            "method",
            "step",
            "ms a step",
            "seconds",
            "peak MiB",
            "parameters",
            "epochs to target",
            "seconds to target",
            "conflicts %",
            "cosine",
        ),
        tuple(rows),
    )


def _by_task(summary: Summary, measures: Sequence[tuple[Task, Measure]]) -> Table:
    """Tasks downwards and methods across, since there are more of the first."""
    lines = [line for line in summary.lines if line.entry.good]
    rows = []
    for task, measure in measures:
        stats = [_scaled(line.row.test[task.name, measure.name], measure) for line in lines]
        cells = _column(stats, not measure.higher_is_better, lines, measure.digits)
        rows.append((Cell(_heading(task, measure)), *cells))
    return Table(
        f"{_id(summary)}-tasks",
        f"Test set, task by task; {_arrows(m for _, m in measures)}in bold the best, single-task "
        "aside.",
        ("task", *(line.label for line in lines)),
        tuple(rows),
        wide=True,
    )


def _id(summary: Summary) -> str:
    return summary.benchmark.name.replace("_", "-")


def _name(line: Line) -> Cell:
    return Cell(line.label + ("" if line.entry.finished else " *"))


def _unfinished(summary: Summary) -> str:
    """What is still missing, method by method."""
    missing = []
    for line in summary.lines:
        entry = line.entry
        words = []
        if entry.tried < entry.trials:
            words.append(f"{entry.tried} of {entry.trials} trials")
        if entry.missing_seeds:
            seeds = len(summary.selection.seeds)
            words.append(f"{seeds - entry.missing_seeds} of {seeds} seeds")
        if words:
            missing.append(f"{line.label} ({', '.join(words)})")
    return f"* not finished: {', '.join(missing)}." if missing else ""


def _heading(task: Task, measure: Measure) -> str:
    return f"{words(task.name)} {words(measure.name)}{' %' if measure.percent else ''}"


def _arrows(measures: Iterable[Measure]) -> str:
    """Which way is better, once for each name of a measure."""
    ways = {words(m.name): "higher" if m.higher_is_better else "lower" for m in measures}
    return "".join(f"{name}: {way} is better; " for name, way in ways.items())


def _trial(trial: Trial, line: Line) -> Cell:
    text = f"{trial.lr:g}"
    if trial.weight_decay:
        text += f", decay {trial.weight_decay:g}"
    if trial.dropout:
        text += f", dropout {trial.dropout:g}"
    return Cell(text, trial.lr)


def _seeds(line: Line) -> Cell:
    good, failed = line.row.seeds, line.row.failed
    return Cell(f"{good}, {failed} failed" if failed else str(good), good)


def _ranks(lines: Sequence[Line]) -> list[Cell]:
    known = [n.rank for n in lines if n.rank is not None and n.entry.method != SINGLE_TASK]
    return [
        _DASH
        if line.rank is None
        else Cell(
            f"{line.rank:.2f}",
            line.rank,
            line.entry.method != SINGLE_TASK and line.rank == min(known),
        )
        for line in lines
    ]


def _interval(interval: Interval | None) -> Cell:
    if interval is None:
        return _DASH
    return Cell(f"[{interval.low:.2f}, {interval.high:.2f}]", interval.low)


def _number(value: float | None, form: str) -> Cell:
    return _DASH if value is None else Cell(form.format(value), value)


def _scaled(stat: Stat | None, measure: Measure) -> Stat | None:
    if stat is None or not measure.percent:
        return stat
    return Stat(100 * stat.mean, None if stat.spread is None else 100 * stat.spread)


def _common(summary: Summary) -> list[Measure]:
    """The measures that all tasks have."""
    tasks = summary.benchmark.tasks
    shared = set.intersection(*({measure.name for measure in task.measures} for task in tasks))
    return [measure for measure in tasks[0].measures if measure.name in shared]


def _over_tasks(summary: Summary, line: Line, measure: Measure) -> Stat | None:
    tasks = summary.benchmark.tasks
    means = [
        statistics.fmean(record.test[task.name][measure.name] for task in tasks)
        for record in line.entry.good
    ]
    return _scaled(Stat.of(means), measure)


def _column(
    stats: Sequence[Stat | None],
    lower: bool,
    lines: Sequence[Line],
    digits: int = 2,
) -> list[Cell]:
    """A cell for each line, the best of them marked; single-task is the baseline, and never is."""
    rivals = [line.entry.method != SINGLE_TASK for line in lines]
    means = [s.mean for s, rival in zip(stats, rivals, strict=True) if s is not None and rival]
    best = (min(means) if lower else max(means)) if means else None
    return [
        _DASH
        if stat is None
        else Cell(cell(stat, 1, digits), stat.mean, rival and stat.mean == best)
        for stat, rival in zip(stats, rivals, strict=True)
    ]
