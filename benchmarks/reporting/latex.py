"""The report's tables for LaTeX, with booktabs."""

from __future__ import annotations

import re

from benchmarks.reporting.document import Document, Table

__all__ = ["escape", "latex"]

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
    "−": "$-$",
    "Δ": r"$\Delta$",
    "χ": r"$\chi$",
    "²": r"$^2$",
    "³": r"$^3$",
    "µ": r"$\mu$",
    "τ": r"$\tau$",
    "α": r"$\alpha$",
    "°": r"$^\circ$",
}

_MOST_ROWS = 60

_HEAD = r"""% Needs \usepackage{booktabs}, and \usepackage[T1]{fontenc}.
"""


def latex(document: Document) -> str:
    """The text of tables.tex: a table environment for each table, to be \\input."""
    tables = [t for part in (document.overall, *document.parts) for t in part.tables]
    blocks = [
        _table(table) if len(table.rows) <= _MOST_ROWS else _too_long(table) for table in tables
    ]
    return _HEAD + "\n".join(blocks)


def escape(text: str) -> str:
    """The text as LaTeX prints it, with a minus sign before digits."""
    escaped = "".join(_SPECIAL.get(letter, letter) for letter in " ".join(text.split()))
    return re.sub(r"(?<![\w.)}-])-(?=\d)", "$-$", escaped)


def _too_long(table: Table) -> str:
    return f"% {table.name} has {len(table.rows)} rows, more than a page; see the other formats.\n"


def _table(table: Table) -> str:
    columns = "l" + ("r" if table.numeric else "p{0.2\\linewidth}") * (len(table.header) - 1)
    environment = "table*" if table.wide or len(table.header) > 6 else "table"
    rows = [
        " & ".join(rf"\textbf{{{escape(c.text)}}}" if c.best else escape(c.text) for c in row)
        for row in table.rows
    ]
    lines = [
        rf"\begin{{{environment}}}",
        r"\centering\small",
        rf"\caption{{{escape(' '.join([table.caption, table.note]))}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(escape, table.header)) + r" \\",
        r"\midrule",
        *(rf"{row} \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        rf"\end{{{environment}}}",
        "",
    ]
    return "\n".join(lines)
