"""Writes the report in the formats there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.benchmark import Benchmark
from benchmarks.errors import BadInput
from benchmarks.report import write_whole
from benchmarks.reporting.build import read
from benchmarks.reporting.document import Document
from benchmarks.reporting.html import html
from benchmarks.reporting.latex import latex
from benchmarks.reporting.markdown import markdown

__all__ = ["FORMATS", "write_report"]

FORMATS: Mapping[str, tuple[str, Callable[[Document], str]]] = {
    "html": ("report.html", html),
    "markdown": ("report.md", markdown),
    "latex": ("tables.tex", latex),
}
"""By format, the file's name and what makes its text."""


def write_report(
    folder: Path, out: Path, formats: tuple[str, ...], benchmarks: Mapping[str, Benchmark]
) -> list[Path]:
    """Report what is in a folder, each file whole or not at all; returns the files.

    Args:
        folder: with results.jsonl, or what `run toy` and `run pareto` leave.
        out: where the files go; made if it is not there.
        formats: keys of `FORMATS`.
        benchmarks: by name, what the records are of.

    Raises:
        BadInput: there is nothing to report, or `out` cannot be written to.
    """
    document = read(folder, benchmarks)
    texts = {FORMATS[name][0]: FORMATS[name][1](document) for name in formats}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            _write(out / name, text)
    except OSError as error:
        raise BadInput(
            f"`--out` must be a folder that can be written to, found {out}: "
            f"{error.strerror or error}"
        ) from error
    return [out / name for name in texts]


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))
