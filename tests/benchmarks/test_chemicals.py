import gzip
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import chemicals
from benchmarks.data import chemicals as data
from benchmarks.errors import BenchmarkError
from benchmarks.training import Learner, evaluate, train
from tests.benchmarks.packing import is_cached, put, wheel

CRC, SYRRES, YAWS, HEATS = data._TABLES
NAN = float("nan")


def _cas(number):
    return f"{number}-00-{number % 10}"


def _files():
    """Alcohols of 1 to 60 carbons whose properties are sums over their atoms, and what is no such.

    Molecule 100 is 3 in another stereochemistry, 101 has a metal, 102 is a salt, 103 has no SMILES.
    """
    smiles = {n: "C" * n + "O" for n in range(1, 61)} | {
        100: "C[C@@H](O)C",
        101: "C[Zn]C",
        102: "CC(=O)[O-].[Na+]",
    }
    formulas = {100: "C3H8O", 101: "C2H6Zn", 102: "C2H3NaO2"}
    keys = {100: "SKELETON3-ANOTHER-N"}
    identifiers = [
        [
            *(str(n), _cas(n), formulas.get(n, f"C{n}H{2 * n + 2}O"), "1.0", line, "inchi"),
            *(keys.get(n, f"SKELETON{n}-ISOMER-N"), "a name"),
        ]
        for n, line in smiles.items()
    ]
    everything = [*smiles, 103]
    tables = {
        CRC: [["CAS", "Name", "Tm", "Tb", "rho", "RI"]]
        + [[_cas(n), "x", 200 + n, 300 + n, 900 + n, 1.3 + n / 500] for n in everything],
        # Without dashes, as some tables have it.
        SYRRES: [["CAS", "Chemical", "logP"]]
        + [[_cas(n).replace("-", ""), "x", n / 2] for n in everything if n % 2],
        YAWS: [["CAS", "Chemical", "Tc", "Pc", "Vc", "omega"]]
        + [[_cas(n), "x", 21483 if n == 5 else 500, 3e6, 3e-4, ""] for n in everything if n < 40],
        HEATS: [["CAS", "name", "Hfg", "S0g"], [_cas(7), "x", -100000.0, 300]],
    }
    tables[CRC][3][2] = ""  # the melting point of 3
    text = {
        path: "\n".join("\t".join(map(str, row)) for row in rows).encode()
        for path, rows in tables.items()
    }
    text[SYRRES] = gzip.compress(text[SYRRES])
    small, large = data._IDENTIFIERS
    for path, rows in ((small, identifiers[:20]), (large, identifiers[20:])):
        text[path] = "\n".join("\t".join(row) for row in rows).encode()
    return text


@pytest.fixture
def root(tmp_path, monkeypatch):
    return put(monkeypatch, data, wheel(_files()), tmp_path / "data")


def _settings(name, sizes=(40, 8, 10)):
    names = ("train_size", "validation_size", "test_size")
    settings = {"four": chemicals.CHEMICALS, "eleven": chemicals.CHEMICALS_11}[name].presets
    return replace(settings["quick"].settings, **dict(zip(names, sizes, strict=True)))


def test_tables_are_joined_by_cas_number(root):
    molecules = data.load_molecules(root)
    numbers = [cas // 1000 for cas in molecules.cas]
    assert sorted(numbers) == [*range(1, 61), 100]  # organic ones with a SMILES
    row = {n: molecules.values[i] for i, n in enumerate(numbers)}
    np.testing.assert_allclose(
        row[7], [207, 307, 907, 1.314, 3.5, 500, 3e6, 3e-4, NAN, -1e5, 300], equal_nan=True
    )
    assert np.isnan(row[60][4:]).all()
    assert np.isnan(row[4][4])
    assert np.isnan(row[5][5])  # a critical temperature of 21,483 K
    group = dict(zip(numbers, molecules.group, strict=True))
    assert group[3] == group[100]
    assert len(set(molecules.group)) == 60


def test_the_second_call_reads_what_was_parsed(root):
    first = data.load_molecules(root)
    (root / data.ARCHIVE.file_name).unlink()
    second = data.load_molecules(root)
    for name in ("cas", "counts", "values", "group"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize(
    ("path", "old", "new", "message"),
    [
        (CRC, b"Tm\tTb", b"Tb\tTm", "must have the columns CAS, a name, Tm, Tb, rho, RI"),
        (CRC, b"\t305\t", b"\tnan\t", "line 6 of .* must hold numbers, found 'nan'"),
        (CRC, b"\t305\t", b"\twarm\t", "must hold numbers, found 'warm'"),
        (CRC, b"5-00-5", b"five", "must hold a CAS number, found 'five'"),
        (CRC, b"CAS", b"\xff", "must be text in UTF-8"),
        (data._IDENTIFIERS[0], b"\tinchi", b"", "line 1 .* must hold an identifier"),
    ],
)
def test_files_of_another_form(tmp_path, monkeypatch, path, old, new, message):
    files = _files()
    assert old in files[path]
    files[path] = files[path].replace(old, new)
    if path == data._IDENTIFIERS[0]:
        files[path] = files[path].replace(b"\ta name", b"")
    root = put(monkeypatch, data, wheel(files), tmp_path / "data")
    with pytest.raises(BenchmarkError, match=message):
        data.load_molecules(root)


def test_four_properties_are_of_molecules_that_have_them_all(root):
    splits = chemicals.CHEMICALS.load(_settings("four"), root)
    everything = torch.cat([splits.train.targets["Tb"], splits.test.targets["Tb"]])
    assert list(splits.train.targets) == ["Tm", "Tb", "rho", "RI"]
    assert not any(y.isnan().any() for y in splits.train.targets.values())
    scale = chemicals.FOUR["Tb"]
    found = (everything * scale.spread + scale.center - 300).round().int().tolist()
    assert 3 not in found
    assert len(set(found)) == 50


def test_missing_labels_are_nan(root):
    splits = chemicals.CHEMICALS_11.load(_settings("eleven", (45, 5, 10)), root)
    total = sum((~part.targets["Hfg"].isnan()).sum() for part in (splits.train, splits.test))
    assert total <= 1
    boiling = splits.train.targets["Tb"] * chemicals.ELEVEN["Tb"].spread
    number = (boiling + chemicals.ELEVEN["Tb"].center - 300).round().int()
    odd = (number % 2 == 1) | (number == 100)
    assert torch.equal(splits.train.targets["logP"].isnan(), ~(odd & (number != 100)))


def test_targets_are_logarithms_where_the_scale_says_so(root):
    molecules = data.load_molecules(root)
    splits = chemicals.splits_of(molecules, _settings("four"))
    scales = chemicals.FOUR
    boiling = splits.test.targets["Tb"].double() * scales["Tb"].spread + scales["Tb"].center
    density = splits.test.targets["rho"].double() * scales["rho"].spread + scales["rho"].center
    torch.testing.assert_close(density.exp(), boiling + 600, atol=0.01, rtol=0)


def test_isomers_are_in_one_part(root):
    molecules = data.load_molecules(root)
    for seed in range(30):
        order = np.random.default_rng(seed).permutation(len(molecules))
        names = ("cas", "counts", "values", "group")
        mixed = data.Molecules(*(getattr(molecules, name)[order] for name in names))
        splits = chemicals.splits_of(mixed, _settings("eleven", (40, 9, 10)))
        scale = chemicals.ELEVEN["Tb"]
        parts = [
            set((part.targets["Tb"] * scale.spread + scale.center - 300).round().int().tolist())
            for part in (splits.train, splits.validation, splits.test)
        ]
        assert [len(p & {3, 100}) for p in parts].count(1) <= 1  # both in one, or one left out
        assert sum(map(len, parts)) == len(set.union(*parts))


@pytest.mark.parametrize("method", ["mean", "single"])
def test_it_learns(root, method):
    settings = replace(_settings("four"), epochs=60, batch_size=8)
    splits = chemicals.CHEMICALS.load(settings, root)
    tasks = chemicals.CHEMICALS.tasks if method == "mean" else chemicals.CHEMICALS.tasks[1:2]
    learner = Learner(chemicals.CHEMICALS, settings, tasks, "mean" if len(tasks) > 1 else None, 0)
    train(learner, splits, settings, 0, lambda: None)
    # A guess is wrong by 15 K.
    assert evaluate(learner, splits.test)["Tb"]["mae"] < 6


@pytest.mark.skipif(not is_cached(data.ARCHIVE), reason="the wheel has not been fetched")
@pytest.mark.parametrize("name", ["four", "eleven"])
def test_the_real_tables(name):
    benchmark = {"four": chemicals.CHEMICALS, "eleven": chemicals.CHEMICALS_11}[name]
    scales = {"four": chemicals.FOUR, "eleven": chemicals.ELEVEN}[name]
    molecules = data.load_molecules()
    assert (~np.isnan(molecules.values[:, :4]).any(1)).sum() == 1899
    assert len(molecules) == 13_224
    splits = chemicals.splits_of(molecules, benchmark.presets["default"].settings)
    for task, scale in scales.items():
        # The constants are the training rows'.
        target = splits.train.targets[task].double().numpy()
        assert np.nanmean(target) == pytest.approx(0, abs=1e-3)
        assert np.nanstd(target) == pytest.approx(1, abs=1e-3)
        assert (~splits.test.targets[task].isnan()).sum() > 200
        assert scale.spread > 0
    # Handbook values of benzene: 278.67 K, 353.24 K, 876.5 kg/m³, 1.5011; Tc 562 K, Pc 4.9 MPa.
    row = molecules.values[list(molecules.cas).index(71432)]
    np.testing.assert_allclose(row[:7], [278.67, 353.2, 876.5, 1.5011, 2.13, 562, 4.9e6], rtol=2e-2)
