import re
import zipfile
from collections import Counter

import numpy as np
import pytest

from benchmarks.data import chemicals
from benchmarks.data.fetch import cache_dir
from benchmarks.data.molecules import NAMED, WIDTH, counts, parse_smiles
from tests.benchmarks.packing import is_cached


def _formula(molecule):
    """Atoms by element, hydrogens too."""
    return Counter(molecule.symbols) + Counter({"H": sum(molecule.hydrogens)})


def _named(smiles):
    return dict(zip(NAMED, counts(parse_smiles(smiles)).tolist(), strict=False))


@pytest.mark.parametrize(
    ("smiles", "formula"),
    [
        ("C", {"C": 1, "H": 4}),
        ("CCO", {"C": 2, "O": 1, "H": 6}),
        ("CC(=O)O", {"C": 2, "O": 2, "H": 4}),
        ("C#N", {"C": 1, "N": 1, "H": 1}),
        ("C1=CC=CC=C1", {"C": 6, "H": 6}),
        ("c1ccccc1", {"C": 6, "H": 6}),
        ("c1cc[nH]c1", {"C": 4, "N": 1, "H": 5}),
        ("CS(=O)(=O)C", {"C": 2, "S": 1, "O": 2, "H": 6}),
        ("C[N+](=O)[O-]", {"C": 1, "N": 1, "O": 2, "H": 3}),
        ("N[C@@H](C)C(=O)O", {"C": 3, "N": 1, "O": 2, "H": 7}),
        ("F/C=C\\Cl", {"C": 2, "F": 1, "Cl": 1, "H": 2}),
        ("C%10CCCC%10", {"C": 5, "H": 10}),
        ("C[Si](C)(C)Br", {"C": 3, "Si": 1, "Br": 1, "H": 9}),
        ("[13CH4]", {"C": 1, "H": 4}),
        ("[Fe++].[Cl-].[Cl-]", {"Fe": 1, "Cl": 2}),
    ],
)
def test_formulas(smiles, formula):
    assert _formula(parse_smiles(smiles)) == formula


@pytest.mark.parametrize(
    "smiles", ["", "C(", "C)", "C1CC", "1CC", "C?C", "[C", "[]", "C[12]C", "C]"]
)
def test_what_is_no_smiles(smiles):
    with pytest.raises(ValueError, match="`smiles` must"):
        parse_smiles(smiles)


def test_rings():
    naphthalene = parse_smiles("C1=CC=C2C=CC=CC2=C1")
    assert naphthalene.rings == [6, 6]
    assert len(naphthalene.ringed) == 10
    apart = parse_smiles("CC1CC1CCC2CCCC2")
    assert apart.rings == [3, 5]
    assert len(apart.ringed) == 8  # and not the chain between them
    assert parse_smiles("C1.C1").rings == []
    assert _named("C1CCCCCCC1")["ring_7_and_more"] == 1


def test_named_counts_of_nitromethyl_phenol():
    found = _named("C1=CC(=CC=C1C[N+](=O)[O-])O")
    expected = {
        "C": 7,
        "N": 1,
        "O": 3,
        "single": 7,
        "double": 4,
        "ring_6": 1,
        "hydrogens": 7,
        "donors": 1,
    }
    expected |= {"positive": 1, "negative": 1, "branches": 3, "in_rings": 6, "atoms": 11}
    assert {name: value for name, value in found.items() if value} == expected


def test_counts_do_not_depend_on_how_the_line_is_written():
    lines = ["CC(=O)OCC#N", "N#CCOC(C)=O", "O=C(C)OCC#N", "C(#N)COC(=O)C"]
    rows = [counts(parse_smiles(line)) for line in lines]
    assert all(np.array_equal(row, rows[0]) for row in rows)


def test_every_atom_counts_once_for_each_radius():
    row = counts(parse_smiles("CC(C)CC1=CC=C(C=C1)C(C)C(=O)O"))
    assert row.shape == (WIDTH,)
    assert row[len(NAMED) :].sum() == 3 * 15


def test_isomers_differ():
    rows = {counts(parse_smiles(line)).tobytes() for line in ("CCCO", "CC(C)O", "CCOC", "C=CC(O)O")}
    assert len(rows) == 4


def test_the_same_numbers_in_every_process():
    # Taken from one run; Python's own hashes would differ in the next.
    assert np.flatnonzero(counts(parse_smiles("CO"))[len(NAMED) :]).tolist() == [
        6,
        71,
        132,
        623,
        747,
        926,
    ]


@pytest.mark.skipif(not is_cached(chemicals.ARCHIVE), reason="the wheel has not been fetched")
def test_formulas_of_the_real_tables():
    """PubChem gives both the line and the formula of each molecule."""
    path = cache_dir() / chemicals.ARCHIVE.file_name
    with zipfile.ZipFile(path) as file:
        lines = file.read(chemicals._IDENTIFIERS[0]).decode().splitlines()
    wrong = 0
    for line in lines:
        _, _, formula, _, smiles, *_ = line.split("\t")
        written = re.fullmatch(r"(?:[A-Z][a-z]?[0-9]*)+", formula)  # without charges and isotopes
        if written is None:
            continue
        expected = Counter()
        for element, number in re.findall(r"([A-Z][a-z]?)([0-9]*)", formula):
            expected["H" if element in "DT" else element] += int(number or 1)
        wrong += _formula(parse_smiles(smiles)) != expected
    assert len(lines) > 1800
    assert wrong == 0
