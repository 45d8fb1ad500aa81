"""The report's tables and findings as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.reporting.document import Document, Part, Table

__all__ = ["escape", "markdown"]


def markdown(document: Document) -> str:
    """The text of report.md."""
    blocks = [f"# {escape(document.title)}", *_part(document.overall)]
    if document.findings:
        blocks += ["## What papers claim, and what holds here", _findings(document)]
    for part in document.parts:
        blocks += _part(part)
    return "\n\n".join(blocks) + "\n"


def escape(text: str) -> str:
    """The text with what Markdown, or HTML in it, would read otherwise."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(text.split()))


def _part(part: Part) -> list[str]:
    blocks = [f"## {escape(part.title)}"]
    if part.facts:
        facts = (f"- {escape(fact.name)}: {escape(fact.text)}" for fact in part.facts)
        blocks.append("\n".join(facts))
    for table in part.tables:
        blocks += [escape(table.caption), _table(table)]
        if table.note:
            blocks.append(escape(table.note))
    if part.failures:
        blocks.append("Failed runs:")
        blocks.append("\n".join(f"- {escape(line)}" for line in part.failures))
    return blocks


def _table(table: Table) -> str:
    rows = [
        [f"**{escape(cell.text)}**" if cell.best else escape(cell.text) for cell in row]
        for row in table.rows
    ]
    align = "---:" if table.numeric else "---"
    lines = [_row([escape(name) for name in table.header])]
    lines.append(_row(["---", *[align] * (len(table.header) - 1)]))
    return "\n".join([*lines, *map(_row, rows)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _findings(document: Document) -> str:
    lines = [_row(["claim", "here", "our numbers", "published numbers", "claimed by"])]
    lines.append(_row(["---"] * 5))
    for finding in document.findings:
        sources = "; ".join(f"[{escape(s.title)}]({s.link})" for s in finding.sources)
        texts = (finding.claim, finding.verdict, finding.evidence, finding.published or "–")
        lines.append(_row([*map(escape, texts), sources]))
    return "\n".join(lines)
