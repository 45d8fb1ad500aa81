"""`python -m gradbal` prints the table of methods, in Markdown, as it stands in the README."""

from __future__ import annotations

import sys

from gradbal.registry import info, list_aggregators

__all__ = ["main", "methods_table"]


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


def main(arguments: list[str]) -> int:
    """Prints the table; 2 when there are arguments, since it takes none."""
    if arguments:
        print(f"python -m gradbal takes no arguments, found {' '.join(arguments)}", file=sys.stderr)
        return 2
    print(methods_table())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
