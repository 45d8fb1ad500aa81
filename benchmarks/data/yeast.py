"""Yeast: 2,417 genes, 103 numbers of each, and to which of 14 functional classes it belongs.

From *A Kernel Method for Multi-Labelled Classification* (Elisseeff & Weston, NeurIPS 2001,
https://papers.nips.cc/paper/1964-a-kernel-method-for-multi-labelled-classification). The table lies
in a wheel of the river package on PyPI (BSD-3-Clause), which is read as an archive.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.fetch import Archive, Member, cache_dir, read_member
from benchmarks.data.packed import gunzip
from benchmarks.errors import BenchmarkError

__all__ = ["ARCHIVE", "FEATURES", "LABELS", "Genes", "load_yeast"]

ARCHIVE = Archive(
    registry="pypi",
    name="river",
    version="0.26.1",
    sha256="6a11e1a9749beec3ea138efeb0205b2c5cea8d424e9deee306c8980faec01bef",
    wheel="cp311-cp311-manylinux_2_28_x86_64",
)
_MEMBER = "river/datasets/yeast.csv.gz"

FEATURES, LABELS = 103, 14


@dataclass(frozen=True)
class Genes:
    """Rows in the order of the file: `features` `[N, 103]` float32, `labels` `[N, 14]` bool."""

    features: NDArray[np.float32]
    labels: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.labels)


def load_yeast(data_root: Path | None = None) -> Genes:
    """All genes.

    Raises:
        BenchmarkError: the archive cannot be fetched, or holds something else.
    """
    packed = read_member(Member(ARCHIVE, _MEMBER), cache_dir(data_root))
    text = gunzip(packed, 16 << 20, _MEMBER).decode("ascii", "replace")
    heading, *lines = csv.reader(io.StringIO(text, newline="")) or [[]]
    names = [f"Att{i + 1}" for i in range(FEATURES)] + [f"Class{i + 1}" for i in range(LABELS)]
    if heading != names:
        raise BenchmarkError(f"{_MEMBER} must have the columns Att1 … Class14, found {heading}")
    try:
        table = np.array(lines, dtype=np.float64).reshape(-1, len(names))
    except ValueError as error:
        raise BenchmarkError(f"{_MEMBER} must hold rows of numbers, found: {error}") from error
    features, labels = table[:, :FEATURES], table[:, FEATURES:]
    if not np.isfinite(features).all() or not np.isin(labels, (0, 1)).all():
        raise BenchmarkError(f"{_MEMBER} must hold numbers, then labels of 0 and 1, found others")
    return Genes(features.astype(np.float32), labels == 1)
