"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

__all__ = ["write_texts", "write_whole"]


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in its place."""
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        write(draft)
        os.replace(draft, path)


def write_texts(folder: Path, contents: Mapping[str, str]) -> list[Path]:
    """Write texts into files of these names, each as a whole; returns the files."""
    written = [folder / name for name in contents]
    for path, text in zip(written, contents.values(), strict=True):
        write_whole(path, partial(Path.write_text, data=text, encoding="utf-8"))
    return written
