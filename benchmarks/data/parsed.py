"""Keeping what has been parsed beside the archive that it is from."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Arrays", "parsed"]

Arrays = Mapping[str, NDArray[Any]]


def parsed(path: Path, parse: Callable[[], Arrays]) -> Arrays:
    """The arrays of the file at `path`, or if there is none of `parse`, which are then kept there.

    The file appears when it is whole; a damaged one is made anew, and a folder that can only be
    read costs the time of parsing on each call. Its name must tell archive and form apart.
    """
    if path.is_file():
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                return dict(file)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass
    arrays = parse()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".parsing-", dir=path.parent) as folder:
            draft = Path(folder) / path.name
            np.savez_compressed(draft, **arrays)  # type: ignore[arg-type]
            os.replace(draft, path)
    return arrays
