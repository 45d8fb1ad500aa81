"""Files of records, one JSON line each, that are written as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from benchmarks.errors import BadInput
from benchmarks.files import write_whole

__all__ = ["Lines"]

R = TypeVar("R")


class Lines(Generic[R]):
    """Records of one kind, in a folder that is made if need be.

    Args:
        path: of the file.
        kind: the dataclass of the records.

    Raises:
        BadInput: the folder cannot be made.
    """

    def __init__(self, path: Path, kind: Callable[..., R]) -> None:
        self.path = path
        self._kind = kind
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(
                f"`--out` must be a folder that can be written to, found {path.parent}: "
                f"{error.strerror or error}"
            ) from error

    def read(self) -> list[R]:
        """What is there; lines that are no such records are left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(self._kind(**json.loads(line)))
            except (ValueError, TypeError):
                continue
        return records

    def write(self, records: Iterable[R]) -> None:
        """These and no others: a new file in the place of the old one."""
        found: list[Any] = list(records)
        lines = [json.dumps(asdict(r), allow_nan=False, ensure_ascii=False) for r in found]
        text = "".join(f"{line}\n" for line in lines)
        write_whole(self.path, lambda target: target.write_text(text, encoding="utf-8"))
