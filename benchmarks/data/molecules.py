"""Numbers of a molecule's parts, read from its SMILES line: no chemistry package is needed.

A molecule becomes `WIDTH` counts. The first are of what has a name: elements, bonds, rings by size,
hydrogens, charges, branches. The others are of circular fragments: an atom with its hydrogens,
charge, neighbours and rings; the same with the atoms around it; and with those around these. As in
*Extended-Connectivity Fingerprints* (Rogers & Hahn, J. Chem. Inf. Model. 2010,
https://doi.org/10.1021/ci100050t), a fragment is known by a hash of its centre and of the sorted
hashes around it, and each counts in the place that its hash falls into. Geometry is left out.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["ELEMENTS", "NAMED", "WIDTH", "Molecule", "counts", "parse_smiles"]

ELEMENTS = ("C", "N", "O", "F", "Cl", "Br", "I", "S", "P", "Si", "B", "Se")
_RINGS = ("ring_3", "ring_4", "ring_5", "ring_6", "ring_7_and_more")
_OTHERS = ("hydrogens", "donors", "positive", "negative", "branches", "in_rings", "atoms")
_BONDS = {"-": 1.0, "=": 2.0, "#": 3.0, ":": 1.5, "/": 1.0, "\\": 1.0, "$": 4.0}
NAMED = (*ELEMENTS, "other", "single", "double", "triple", *_RINGS, *_OTHERS)
"""What is counted by its name, in this order."""

WIDTH = 1024
_RADIUS = 2

_TOKEN = re.compile(r"(\[[^\[\]]+\]|Br|Cl|[BCNOSPFI]|[bcnosp]|[-=#:/\\$]|[().]|%[0-9]{2}|[0-9])")
_BRACKET = re.compile(
    r"\[[0-9]*(?P<symbol>[A-Za-z][a-z]?|\*)@{0,2}(?:H(?P<hydrogens>[0-9]?))?"
    r"(?P<charge>\++[0-9]*|-+[0-9]*)?(?::[0-9]+)?\]"
)
# Outside of brackets an atom has hydrogens up to the next of its element's usual valences.
_VALENCES = {"B": (3,), "C": (4,), "N": (3, 5), "O": (2,), "P": (3, 5), "S": (2, 4, 6)}
_AROMATIC = set("bcnops")


@dataclass
class Molecule:
    """Atoms and bonds.

    Attributes:
        symbols, charges, hydrogens: one entry an atom.
        neighbours: by atom, the orders of its bonds by the atom at their other end.
        rings: for each bond that closes a ring, the size of the smallest ring that it is in.
        ringed: the atoms in rings.
    """

    symbols: list[str] = field(default_factory=list)
    charges: list[int] = field(default_factory=list)
    hydrogens: list[int] = field(default_factory=list)
    neighbours: list[dict[int, float]] = field(default_factory=list)
    rings: list[int] = field(default_factory=list)
    ringed: set[int] = field(default_factory=set)


def parse_smiles(smiles: str) -> Molecule:
    """Read a SMILES line; stereochemistry and isotopes are passed over.

    Raises:
        ValueError: it is none.
    """
    molecule = Molecule()
    closures: list[tuple[int, int]] = []
    open_rings: dict[str, tuple[int, float | None]] = {}
    branches: list[int | None] = []
    last: int | None = None
    order: float | None = None
    bare: list[int] = []  # atoms whose hydrogens are not written
    aromatic: set[int] = set()

    def bond(first: int, second: int, order: float | None) -> None:
        both = first in aromatic and second in aromatic
        value = order if order is not None else 1.5 if both else 1.0
        molecule.neighbours[first][second] = molecule.neighbours[second][first] = value

    place = 0
    for match in _TOKEN.finditer(smiles):
        if match.start() != place:
            break
        place, token = match.end(), match.group()
        if token in _BONDS:
            order = _BONDS[token]
        elif token == ".":
            last = None
        elif token == "(":
            branches.append(last)
        elif token == ")":
            if not branches:
                raise ValueError(f"`smiles` must close what it opens, found {smiles!r}")
            last = branches.pop()
        elif token[0] == "%" or token.isdigit():
            if last is None:
                raise ValueError(f"`smiles` must have an atom before a ring, found {smiles!r}")
            if token in open_rings:
                start, earlier = open_rings.pop(token)
                # One cycle for each closing bond: together they hold every bond of every cycle.
                molecule.ringed.update(_path(molecule, start, last))
                bond(start, last, order if order is not None else earlier)
                closures.append((start, last))
            else:
                open_rings[token] = (last, order)
            order = None
        else:
            atom = len(molecule.symbols)
            symbol = _add_atom(molecule, token, smiles)
            if token[0] != "[":
                bare.append(atom)
            if symbol in _AROMATIC:
                aromatic.add(atom)
            if last is not None:
                bond(last, atom, order)
            last, order = atom, None
    if place != len(smiles) or branches or open_rings or not molecule.symbols:
        raise ValueError(f"`smiles` must be a line of SMILES, found {smiles!r}")
    for atom in bare:
        bonds = sum(molecule.neighbours[atom].values())
        usual = _VALENCES.get(molecule.symbols[atom], (1,))
        molecule.hydrogens[atom] = int(next((v - bonds for v in usual if v >= bonds), 0))
    for start, end in closures:
        if ring := _path(molecule, start, end):
            molecule.rings.append(len(ring))
    return molecule


def _add_atom(molecule: Molecule, token: str, smiles: str) -> str:
    """Adds an atom without bonds, and returns its symbol as it is written."""
    symbol, charge, hydrogens = token, 0, 0
    if token[0] == "[":
        found = _BRACKET.fullmatch(token)
        if found is None:
            raise ValueError(f"`smiles` must have atoms in brackets, found {token} in {smiles!r}")
        symbol = found["symbol"]
        if found["hydrogens"] is not None:
            hydrogens = int(found["hydrogens"] or 1)
        if sign := found["charge"]:
            digits = sign.lstrip("+-")
            charge = (int(digits) if digits else len(sign)) * (1 if sign[0] == "+" else -1)
    molecule.symbols.append(symbol.capitalize())
    molecule.charges.append(charge)
    molecule.hydrogens.append(hydrogens)
    molecule.neighbours.append({})
    return symbol


def _path(molecule: Molecule, start: int, end: int) -> list[int]:
    """The atoms of a shortest way from one atom to another that is not their bond, if any."""
    before: dict[int, int] = {start: start}
    waiting = deque([start])
    while waiting and end not in before:
        atom = waiting.popleft()
        for other in molecule.neighbours[atom]:
            if other not in before and (atom, other) != (start, end):
                before[other] = atom
                waiting.append(other)
    if end not in before:
        return []
    path = [end]
    while path[-1] != start:
        path.append(before[path[-1]])
    return path


def counts(molecule: Molecule) -> NDArray[np.uint8]:
    """The molecule's parts `[WIDTH]`, in the order of `NAMED`, then fragments; at most 255 each."""
    found: Counter[str] = Counter()
    atoms = range(len(molecule.symbols))
    for atom in atoms:
        symbol, hydrogens = molecule.symbols[atom], molecule.hydrogens[atom]
        found[symbol if symbol in ELEMENTS else "other"] += 1
        found["hydrogens"] += hydrogens
        found["donors"] += hydrogens if symbol in ("N", "O", "S") else 0
        found["positive"] += max(molecule.charges[atom], 0)
        found["negative"] += max(-molecule.charges[atom], 0)
        found["branches"] += len(molecule.neighbours[atom]) > 2
        for other, order in molecule.neighbours[atom].items():
            if other > atom:
                found["single" if order < 1.5 else "triple" if order > 2 else "double"] += 1
    for size in molecule.rings:
        found[_RINGS[min(size, 7) - 3]] += 1
    found["in_rings"], found["atoms"] = len(molecule.ringed), len(atoms)
    values = np.zeros(WIDTH, dtype=np.int64)
    values[: len(NAMED)] = [found[name] for name in NAMED]
    hashes = [_hash(_label(molecule, atom)) for atom in atoms]
    for radius in range(_RADIUS + 1):
        if radius:
            hashes = [_hash((hashes[atom], _around(molecule, atom, hashes))) for atom in atoms]
        for value in hashes:
            values[len(NAMED) + value % (WIDTH - len(NAMED))] += 1
    return np.minimum(values, 255).astype(np.uint8)


def _label(molecule: Molecule, atom: int) -> tuple[object, ...]:
    """What an atom is, alone."""
    return (
        molecule.symbols[atom],
        molecule.charges[atom],
        molecule.hydrogens[atom],
        len(molecule.neighbours[atom]),
        atom in molecule.ringed,
    )


def _around(molecule: Molecule, atom: int, hashes: list[int]) -> list[tuple[float, int]]:
    """The bonds of an atom with the hashes of what they lead to."""
    return sorted((order, hashes[other]) for other, order in molecule.neighbours[atom].items())


def _hash(value: object) -> int:
    """The same number in every process, which Python's own is not."""
    return zlib.crc32(repr(value).encode())
