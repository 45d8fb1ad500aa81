"""The toy's table: on the screen, as CSV and as Markdown, with others' numbers beside ours."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence

from rich.table import Table

from benchmarks.toy.descent import NEAR
from benchmarks.toy.published import NOTES, UPPER_HALF, Found, published
from benchmarks.toy.records import Record
from benchmarks.toy.settings import Setting

__all__ = ["differences", "remarks", "screen_table", "to_csv", "to_markdown"]

_FAR = 0.02
"""End points of the same curve whose x1 differ by more than this are remarked on."""


def screen_table(setting: Setting, records: Sequence[Record], steps: int) -> Table:
    """x1 at the end for each method and start, with others' in the lines below."""
    table = Table(
        title=f"toy, {setting.summary}: x1 after {steps:,} steps of Adam",
        caption=f"✗: not on the Pareto front, with the gap (on it: below {NEAR} %); –: no number, "
        "see below. Steps: until the front was reached, median over the starts.",
    )
    for name in _header(setting):
        table.add_column(name, justify="left" if name in ("method", "code") else "right")
    for cells in _lines(setting, records, steps):
        if cells[0]:
            table.add_section()
        table.add_row(*cells, style=None if cells[1] == "gradbal" else "dim")
    return table


def remarks(setting: Setting, records: Sequence[Record], steps: int) -> list[str]:
    """Sentences below the table: what failed, and what differs from others' numbers and why."""
    found = []
    for label, mine in _by_label(records).items():
        reasons: dict[str, list[Record]] = {}
        for record in mine:
            if record.error is not None:
                reasons.setdefault(_reason(record.error), []).append(record)
        for reason, failed in reasons.items():
            where = [f"{_point(r.first)} at step {r.failed_at:,}" for r in failed]
            if len(failed) == len(mine) and not any(r.failed_at for r in failed):
                where = ["every start at once"]
            found.append(f"{label}: {reason} (from {', '.join(where)})")
    if steps == setting.steps:
        found += differences(setting, records)
    return found


def differences(setting: Setting, records: Sequence[Record]) -> list[str]:
    """A line for each method that does not end where the official code, or the replica, does."""
    found = []
    theirs = published(setting.name)
    for label, mine in _by_label(records).items():
        for source in ("official", "replica"):
            parts, above = [], False
            for record in mine:
                other = theirs.get((label, source, record.start))
                part = None if other is None else _difference(record, other)
                if part:
                    parts.append(f"from {_point(record.first)} {part}")
                    above = above or record.first[1] > 0
            if parts:
                why = [NOTES[label]] if label in NOTES else []
                why += [UPPER_HALF] if above else []
                what = f"{label} against the {source} code: {'; '.join(parts)}"
                found.append(". ".join([what, " ".join(why)]).rstrip())
    return found


def to_csv(setting: Setting, records: Sequence[Record], steps: int) -> str:
    """A row for each trajectory, with others' end points beside ours where steps are as many."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    end = ["x1", "x2", "l1", "l2", "gap_percent"]
    ours = [*end, "reached", "steps_to_front", "microseconds", "error"]
    others = [f"{source}_{name}" for source in ("official", "replica") for name in end]
    writer.writerow(["setting", "method", "start", "start_x1", "start_x2", "steps", *ours, *others])
    theirs = published(setting.name) if steps == setting.steps else {}
    for r in records:
        row: list[object] = [r.setting, r.label, r.start, *r.first, r.steps]
        row += [*r.end, *r.losses, r.gap, int(r.reached), r.steps_to_front, r.microseconds, r.error]
        for source in ("official", "replica"):
            other = theirs.get((r.label, source, r.start))
            if other is None or other.end is None or other.losses is None:
                row += [None] * 5
            else:
                row += [*other.end, *other.losses, other.gap]
        writer.writerow(row)
    return text.getvalue()


def to_markdown(
    setting: Setting, records: Sequence[Record], steps: int, left_out: Mapping[str, str]
) -> str:
    """Both tables, the remarks, and where others' numbers are from.

    Args:
        setting, records, steps: what was run.
        left_out: by label, why a method was not.
    """
    lines = [f"# Toy, {setting.summary}", "", f"{steps:,} steps of Adam, x1 at the end.", ""]
    lines += _markdown_table(_header(setting), _lines(setting, records, steps))
    lines += [
        "",
        f"✗: not on the Pareto front, with the gap. The gap is the least ε by which a point of the "
        f"front is nowhere worse, in percent of the front's span; on the front: below {NEAR} %. "
        "Steps: until the front was reached, median over the starts. Official: the code of FAMO's "
        "authors (which has the other methods too), float32, 50,000 steps. Replica: the authors' "
        "methods in NumPy, float64, with the small problems solved exactly.",
        "",
    ]
    lines += [f"- {label}: {reason}" for label, reason in left_out.items()]
    lines += [f"- {remark}" for remark in remarks(setting, records, steps)]
    lines += ["", "## Every trajectory", ""]
    header = ["method", "start", "x1", "x2", "L1", "L2", "gap %", "steps", "official L1, L2, gap %"]
    theirs = published(setting.name) if steps == setting.steps else {}
    rows = []
    for r in records:
        numbers = [*r.end, *r.losses]
        other = theirs.get((r.label, "official", r.start)) or theirs.get(
            (r.label, "replica", r.start)
        )
        cells = [f"{value:.4f}" for value in numbers] + [f"{r.gap:.3f}"]
        if r.error is not None:
            cells = ["–"] * 5
        last = "–"
        if other is not None and other.losses is not None and other.gap is not None:
            last = f"{other.losses[0]:.4f}, {other.losses[1]:.4f}, {other.gap:.3f}"
            last += "" if other.source == "official" else " (replica)"
        steps_cell = "–" if r.steps_to_front is None else f"{r.steps_to_front:,}"
        rows.append([r.label, _point(r.first), *cells, steps_cell, last])
    lines += _markdown_table(header, rows)
    return "\n".join(lines) + "\n"


def _header(setting: Setting) -> list[str]:
    return ["method", "code", *map(_point, setting.starts), "reached", "steps", "µs"]


def _lines(setting: Setting, records: Sequence[Record], steps: int) -> list[list[str]]:
    # Others' numbers are of as many steps as theirs.
    theirs = published(setting.name) if steps == setting.steps else {}
    starts = range(len(setting.starts))
    lines = []
    for label, mine in _by_label(records).items():
        by_start = {r.start: r for r in mine}
        cells = [_cell(by_start.get(k)) for k in starts]
        needed = [r.steps_to_front for r in mine if r.steps_to_front is not None]
        # What failed at once says nothing about the time.
        times = [r.microseconds for r in mine if r.microseconds > 0]
        lines.append(
            [
                label,
                "gradbal",
                *cells,
                f"{len(needed)}/{len(mine)}",
                f"{statistics.median(needed):,.0f}" if needed else "–",
                f"{statistics.median(times):.0f}" if times else "–",
            ]
        )
        for source in ("official", "replica"):
            found = [theirs.get((label, source, k)) for k in starts]
            if not any(found):
                continue
            reached = sum(each is not None and _on_front(each) for each in found)
            cells = [_other_cell(each) for each in found]
            lines.append(["", source, *cells, f"{reached}/{len(found)}", "", ""])
    return lines


def _cell(record: Record | None) -> str:
    if record is None or record.error is not None:
        return "–"
    return f"{record.end[0]:.3f}" if record.reached else f"✗ {record.gap:.1f} %"


def _other_cell(found: Found | None) -> str:
    if found is None:
        return ""
    if found.end is None or found.gap is None:
        return "NaN"
    return f"{found.end[0]:.3f}" if _on_front(found) else f"✗ {found.gap:.1f} %"


def _on_front(found: Found) -> bool:
    return found.gap is not None and found.gap < NEAR


def _difference(record: Record, other: Found) -> str | None:
    mine = "no number" if record.error else "on the front" if record.reached else "not on the front"
    if other.end is None:
        return None if record.error else f"{mine}, theirs NaN"
    if record.reached != _on_front(other):
        return f"{mine}, theirs {'on the front' if _on_front(other) else 'not'}"
    apart = abs(record.end[0] - other.end[0])
    if record.reached and apart > _FAR:
        return f"x1 {record.end[0]:.3f}, theirs {other.end[0]:.3f}"
    return None


def _by_label(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.label, []).append(record)
    return found


def _reason(error: str) -> str:
    """Without the kind of the exception and the value that was found, which differs."""
    return error.removeprefix("ValueError: ").split(", found")[0]


def _point(point: Sequence[float]) -> str:
    return f"({point[0]:g}, {point[1]:g})".replace("-", "−")


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = [":--" if name in ("method", "code", "start") else "--:" for name in header]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]
