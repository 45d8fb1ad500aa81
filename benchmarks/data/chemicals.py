"""Measured properties of organic molecules, from tables in the chemicals package.

The wheel on PyPI (MIT) is read as an archive. Its tables are compilations of their own: melting and
boiling points, densities and refractive indices of the *CRC Handbook of Chemistry and Physics*,
octanol-water coefficients of Syracuse Research Corporation, and critical properties, acentric
factors, enthalpies and entropies of formation of C. L. Yaws' collections, which hold estimates
beside measurements. SMILES are PubChem's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.fetch import Archive, Member, cache_dir, read_members
from benchmarks.data.molecules import ELEMENTS, counts, parse_smiles
from benchmarks.data.packed import gunzip
from benchmarks.data.parsed import Arrays, parsed
from benchmarks.errors import BenchmarkError

__all__ = ["ARCHIVE", "PROPERTIES", "Molecules", "load_molecules"]

ARCHIVE = Archive(
    registry="pypi",
    name="chemicals",
    version="1.5.2",
    sha256="f85ef7f36e77fee634686c26562929ee61026cd548d89cebd57b2251ca843d6e",
    wheel="py3-none-any",
)
_IDENTIFIERS = [
    f"chemicals/Identifiers/chemical identifiers pubchem {size}.tsv" for size in ("small", "large")
]
_TABLES = {
    "chemicals/Misc/Physical Constants of Organic Compounds.csv": ("Tm", "Tb", "rho", "RI"),
    "chemicals/Environment/Syrres logP data.csv.gz": ("logP",),
    "chemicals/Critical Properties/Yaws Collection.tsv": ("Tc", "Pc", "Vc", "omega"),
    "chemicals/Reactions/Yaws Hf S0 (g).tsv": ("Hfg", "S0g"),
}

PROPERTIES = tuple(name for names in _TABLES.values() for name in names)
"""Columns of the table: K, K, kg/m³, 1, 1 (log10), K, Pa, m³/mol, 1, J/mol, J/(mol K)."""

_PLAUSIBLE = {
    "Tc": (200.0, 1500.0),
    "Pc": (3e5, 1.5e7),
    "Vc": (4e-5, 5e-3),
    "omega": (0.02, 2.5),
    "rho": (1.0, 3e4),
    "S0g": (1.0, 1e5),
}
"""Yaws' collection has critical temperatures up to 21,483 K; what is outside is left out."""

_CACHE_FORM = 2  # of the parsed file


@dataclass(frozen=True)
class Molecules:
    """Molecules in the order of their CAS numbers.

    Attributes:
        cas: `[N]` int64, the CAS number without its dashes.
        counts: `[N, WIDTH]` uint8, see `benchmarks.data.molecules`.
        values: `[N, 11]` float64, in the order of `PROPERTIES`; NaN where there is none.
        group: `[N]` int64, equal for molecules that differ in stereochemistry or isotopes alone.
    """

    cas: NDArray[np.int64]
    counts: NDArray[np.uint8]
    values: NDArray[np.float64]
    group: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.cas)


def load_molecules(data_root: Path | None = None) -> Molecules:
    """All organic molecules with a SMILES and at least one property; parsed once.

    Organic is what has carbon, no element besides H, C, N, O, F, Cl, Br, I, S, P, Si, B and Se, and
    is in one piece.

    Raises:
        BenchmarkError: the archive cannot be fetched, or holds something else.
    """
    root = cache_dir(data_root)
    path = root / f"chemicals-{ARCHIVE.sha256[:12]}-{_CACHE_FORM}.npz"
    arrays = parsed(path, lambda: _arrays(root))
    return Molecules(*(arrays[name] for name in ("cas", "counts", "values", "group")))


def _arrays(root: Path) -> Arrays:
    """What the archive holds, as it is kept."""
    paths = [*_IDENTIFIERS, *_TABLES]
    contents = read_members([Member(ARCHIVE, path, 128 << 20) for path in paths], root)
    by_path = dict(zip(paths, contents, strict=True))
    values = _values(by_path)
    known = {
        cas: found
        for path in _IDENTIFIERS
        for cas, found in _identifiers(path, by_path[path])
        if cas in values
    }
    rows = [(cas, counts(parse_smiles(known[cas][0]))) for cas in sorted(known)]
    skeletons = {name: i for i, name in enumerate(sorted({known[cas][1] for cas in known}))}
    return {
        "cas": np.array([cas for cas, _ in rows], dtype=np.int64),
        "counts": np.array([row for _, row in rows], dtype=np.uint8),
        "values": np.array([values[cas] for cas, _ in rows]),
        "group": np.array([skeletons[known[cas][1]] for cas, _ in rows], dtype=np.int64),
    }


def _values(by_path: dict[str, bytes]) -> dict[int, list[float]]:
    """By CAS number the properties `[11]`, NaN where there is none, of all that have one."""
    found: dict[int, list[float]] = {}
    column = 0
    for path, names in _TABLES.items():
        content = by_path[path]
        if path.endswith(".gz"):
            content = gunzip(content, 128 << 20, path)
        lines = _lines(path, content)
        _, heading = next(lines, (1, [""]))
        if heading[0] != "CAS" or tuple(heading[2:]) != names:
            raise BenchmarkError(
                f"{path} must have the columns CAS, a name, {', '.join(names)}, found {heading}"
            )
        for number, line in lines:
            for offset, text in enumerate(line[2:]):
                if text.strip():
                    value = _number(path, number, text)
                    low, high = _PLAUSIBLE.get(names[offset], (-math.inf, math.inf))
                    if low <= value <= high:
                        row = found.setdefault(_cas(path, number, line[0]), [math.nan] * 11)
                        row[column + offset] = value
        column += len(names)
    return found


def _identifiers(path: str, content: bytes) -> Iterator[tuple[int, tuple[str, str]]]:
    """Of organic molecules the CAS number, the SMILES, and the InChIKey's block of the skeleton."""
    for number, line in _lines(path, content):
        if len(line) < 7:
            raise _unreadable(path, number, "an identifier, CAS number, formula, … and InChIKey")
        formula, smiles, key = line[2], line[4], line[6]
        elements = set(re.findall(r"[A-Z][a-z]?", formula))
        if "C" in elements and elements <= {*ELEMENTS, "H"} and "." not in smiles:
            yield _cas(path, number, line[1]), (smiles, key.split("-")[0])


def _lines(path: str, content: bytes) -> Iterator[tuple[int, list[str]]]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} must be text in UTF-8, found: {error}") from error
    return enumerate((line.split("\t") for line in text.splitlines()), start=1)


def _cas(path: str, number: int, text: str) -> int:
    digits = text.replace("-", "")
    if not digits.isdecimal():
        raise _unreadable(path, number, f"a CAS number, found {text!r}")
    return int(digits)


def _number(path: str, number: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _unreadable(path, number, f"numbers, found {text!r}")
    return value


def _unreadable(path: str, number: int, required: str) -> BenchmarkError:
    return BenchmarkError(f"line {number} of {path} must hold {required}")
