"""The report as one HTML page that needs nothing besides itself."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.reporting.document import Document

__all__ = ["html"]


def html(document: Document) -> str:
    """The page's text. Everything is escaped but the pictures, which `svg.embed` has cleaned."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html").render(document=document)
