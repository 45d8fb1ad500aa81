"""`python -m gradbal` prints the table of methods, in Markdown, as it stands in the README."""

from __future__ import annotations

import sys
from pathlib import Path

from gradbal.registry import info, list_aggregators

__all__ = ["main", "methods_table"]

_START, _END = "<!-- methods: printed by python -m gradbal -->", "<!-- end of methods -->"


def methods_table() -> str:
    """Every registered method: name, paper, venue, what it consumes, cost of a step.

    Example:
        >>> print(methods_table().splitlines()[0])
        | name | paper | venue | consumes | cost of a step |
    """
    rows = [("name", "paper", "venue", "consumes", "cost of a step"), ("---",) * 5]
    for name in list_aggregators():
        entry = info(name)
        paper = f"[{entry.title}]({entry.url})" if entry.url else entry.title
        venue = f"{entry.venue} {entry.year}" if entry.year else entry.venue
        rows.append((f"`{name}`", paper, venue, entry.consumes, entry.cost))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_table(text: str) -> str:
    """The text with the table of methods between its two markers.

    Raises:
        ValueError: the text does not have both markers.
    """
    before, start, rest = text.partition(_START)
    _, end, after = rest.partition(_END)
    if not (start and end):
        raise ValueError(f"the file must have the lines {_START!r} and {_END!r}, found not both")
    return f"{before}{start}\n{methods_table()}\n{end}{after}"


def main(arguments: list[str]) -> int:
    """Prints the table, or writes it into a file with `--write FILE`; 2 for other arguments."""
    if not arguments:
        print(methods_table())
        return 0
    if len(arguments) == 2 and arguments[0] == "--write":
        path = Path(arguments[1])
        path.write_text(with_table(path.read_text()))
        return 0
    print(
        f"python -m gradbal takes nothing or --write FILE, found {' '.join(arguments)}",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
