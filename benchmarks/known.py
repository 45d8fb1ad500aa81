"""Names that the command line may take."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from benchmarks.errors import BadInput

__all__ = ["check_known"]


def check_known(option: str, found: str, known: Sequence[str]) -> None:
    """Raises BadInput, with the near misses, where a name is not known."""
    if found not in known:
        close = difflib.get_close_matches(found, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
        raise BadInput(f"`{option}` must name what `list` shows, found {found!r}; {hint}")
