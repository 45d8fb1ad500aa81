"""`python -m gradbal` prints the table of methods, in Markdown, as it stands in the README."""

from __future__ import annotations

import sys
from pathlib import Path

from gradbal.registry import info, list_aggregators

__all__ = ["differences", "filled", "main", "methods_table"]


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


def differences() -> str:
    """A bullet for every method that known implementations compute otherwise.

    Example:
        >>> differences().splitlines()[0].startswith("- **`aligned_mtl`**: ")
        True
    """
    notes = {name: info(name).note for name in list_aggregators()}
    return "\n".join(f"- **`{name}`**: {note}" for name, note in notes.items() if note)


_BLOCKS = {
    ("<!-- methods: printed by python -m gradbal -->", "<!-- end of methods -->"): methods_table,
    (
        "<!-- differences: printed by python -m gradbal --differences -->",
        "<!-- end of differences -->",
    ): differences,
}


def filled(text: str) -> str:
    """The text with what is printed between each pair of markers.

    Raises:
        ValueError: the text does not have all the markers.
    """
    for (first, last), printed in _BLOCKS.items():
        before, start, rest = text.partition(first)
        _, end, after = rest.partition(last)
        if not (start and end):
            raise ValueError(f"the file must have the lines {first!r} and {last!r}, found not both")
        text = f"{before}{start}\n{printed()}\n{end}{after}"
    return text


def main(arguments: list[str]) -> int:
    """Prints the table of methods, or the `--differences`; `--write FILE` puts both into a file.

    Returns 2 for other arguments.
    """
    if not arguments:
        print(methods_table())
        return 0
    if arguments == ["--differences"]:
        print(differences())
        return 0
    if len(arguments) == 2 and arguments[0] == "--write":
        path = Path(arguments[1])
        path.write_text(filled(path.read_text()))
        return 0
    print(
        "python -m gradbal takes nothing, --differences or --write FILE, "
        f"found {' '.join(arguments)}",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
