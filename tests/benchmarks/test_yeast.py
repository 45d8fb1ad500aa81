import csv
import gzip
import io
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import yeast
from benchmarks.data import yeast as data
from benchmarks.errors import BenchmarkError
from benchmarks.training import Learner, evaluate, train
from tests.benchmarks.packing import is_cached, put, wheel

QUICK = replace(
    yeast.YEAST.presets["quick"].settings, train_size=120, validation_size=40, test_size=40
)
HEADING = [f"Att{i}" for i in range(1, 104)] + [f"Class{i}" for i in range(1, 15)]


def _rows(count):
    """Genes whose class k is that of the k-th number's sign; the last two are one gene twice."""
    numbers = np.random.default_rng(0).normal(size=(count, 103)).round(6)
    numbers[-1] = numbers[-2]
    return [[*row, *(row[:14] > 0).astype(int)] for row in numbers]


def _archive(rows, heading=HEADING):
    text = io.StringIO()
    csv.writer(text).writerows([heading, *rows])
    return wheel({"river/datasets/yeast.csv.gz": gzip.compress(text.getvalue().encode())})


@pytest.fixture
def root(tmp_path, monkeypatch):
    return put(monkeypatch, data, _archive(_rows(200)), tmp_path / "data")


def test_rows_are_those_of_the_file(root):
    genes = data.load_yeast(root)
    rows = np.array(_rows(200))
    np.testing.assert_allclose(genes.features, rows[:, :103], rtol=1e-6)
    assert np.array_equal(genes.labels, rows[:, 103:] == 1)


@pytest.mark.parametrize(
    ("rows", "heading", "message"),
    [
        (_rows(3), [*HEADING[:-1], "Class15"], "columns Att1 … Class14"),
        ([row[:-1] for row in _rows(3)], HEADING, "rows of numbers"),
        ([["x", *row[1:]] for row in _rows(3)], HEADING, "rows of numbers"),
        ([["nan", *row[1:]] for row in _rows(3)], HEADING, "labels of 0 and 1"),
        ([[*row[:-1], 2] for row in _rows(3)], HEADING, "labels of 0 and 1"),
    ],
)
def test_files_of_another_form(tmp_path, monkeypatch, rows, heading, message):
    root = put(monkeypatch, data, _archive(rows, heading), tmp_path / "data")
    with pytest.raises(BenchmarkError, match=message):
        data.load_yeast(root)


def test_splits(root):
    splits = yeast.YEAST.load(QUICK, root)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [120, 40, 40]
    inputs = splits.train.inputs
    torch.testing.assert_close(inputs.mean(0), torch.zeros(103), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std(0, correction=0), torch.ones(103))
    seen = [{row.numpy().tobytes() for row in s.inputs} for s in (splits.train, splits.test)]
    assert not seen[0] & seen[1]
    for split in (splits.train, splits.test):
        assert list(split.targets) == [task.name for task in yeast.YEAST.tasks]


def test_a_gene_that_is_there_twice_is_in_one_part(root):
    genes = data.load_yeast(root)
    settings = replace(QUICK, train_size=100, validation_size=49, test_size=49)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        order = rng.permutation(200)
        shuffled = data.Genes(genes.features[order], genes.labels[order])
        splits = yeast.splits_of(shuffled, settings)
        parts = (splits.train, splits.validation, splits.test)
        rows = [{row.numpy().tobytes() for row in part.inputs} for part in parts]
        assert len(rows[0] & rows[1]) + len(rows[0] & rows[2]) + len(rows[1] & rows[2]) == 0


def test_it_learns(root):
    settings = replace(QUICK, epochs=20, lr=3e-3)
    splits = yeast.YEAST.load(settings, root)
    learner = Learner(yeast.YEAST, settings, yeast.YEAST.tasks, "upgrad", seed=0)
    train(learner, splits, settings, 0, lambda: None)
    areas = [found["auc"] for found in evaluate(learner, splits.test).values()]
    assert len(areas) == 14
    assert np.mean(areas) > 0.7  # 0.5 is a guess


@pytest.mark.skipif(not is_cached(data.ARCHIVE), reason="river's wheel has not been fetched")
def test_the_real_table():
    genes = data.load_yeast()
    assert genes.features.shape == (2417, 103)
    # Figures of the data set in the literature: 4.237 labels a gene, 198 different sets of labels.
    assert genes.labels.sum(1).mean() == pytest.approx(4.237, abs=5e-4)
    assert len(np.unique(genes.labels, axis=0)) == 198
    for name in ("default", "quick"):
        splits = yeast.splits_of(genes, yeast.YEAST.presets[name].settings)
        for split in (splits.train, splits.validation, splits.test):
            for target in split.targets.values():
                assert 3 <= target.sum() < len(target)
