"""Fashion-MNIST: 70,000 small grey images of clothes in ten classes.

From *Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms* (Xiao et
al., 2017, https://arxiv.org/abs/1708.07747), MIT. Debian 12 has it as a package, which is read as
an archive and need not be installed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.data.fetch import Archive, Member, cache_dir, read_members
from benchmarks.data.images import Images, images_of, split_by_class
from benchmarks.data.packed import gunzip
from benchmarks.data.parsed import parsed

__all__ = ["ARCHIVE", "load_fashion", "load_fashion_5k"]

ARCHIVE = Archive(
    registry="debian",
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
_MEMBERS = tuple(
    f"./usr/share/datasets/fashion-mnist/{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
_LIMIT = 64 << 20
_SAMPLE = 5000
_SAMPLE_SEED = 1708_07747
_CACHE_FORM = 1  # of the file with the sample


def load_fashion(data_root: Path | None = None) -> tuple[Images, Images]:
    """Its own 60,000 training and 10,000 test images, in their official order.

    Raises:
        BenchmarkError: the archive cannot be fetched; see `benchmarks.data.fetch.fetch`.
    """
    members = [Member(ARCHIVE, path, _LIMIT) for path in _MEMBERS]
    packed = read_members(members, cache_dir(data_root))
    return images_of(
        [gunzip(content, _LIMIT, path) for path, content in zip(_MEMBERS, packed, strict=True)]
    )


def load_fashion_5k(data_root: Path | None = None) -> Images:
    """5,000 of its training images, 500 a class, always the same ones.

    Raises:
        BenchmarkError: see `load_fashion`.
    """
    path = cache_dir(data_root) / f"fashion-5k-{ARCHIVE.sha256[:12]}-{_CACHE_FORM}.npz"

    def sample() -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
        images, _ = load_fashion(data_root)
        fraction = min(_SAMPLE / len(images), 1.0)
        rows, _ = split_by_class(images.labels, (fraction, 1 - fraction), _SAMPLE_SEED)
        found = images.take(rows)
        return {"images": found.images, "labels": found.labels}

    arrays = parsed(path, sample)
    return Images(arrays["images"], arrays["labels"])
