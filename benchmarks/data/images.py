"""Small grey images with a class each, and the files that MNIST and its relatives come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.errors import BenchmarkError

__all__ = ["Images", "images_of", "parse_idx", "split_by_class"]


@dataclass(frozen=True)
class Images:
    """Grey images `[N, 28, 28]`, uint8 in 0..255, and their classes `[N]`, int64 in 0..9."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: NDArray[np.int64]) -> Images:
        """The images at `index` `[M]`, in that order."""
        return Images(self.images[index], self.labels[index])


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


def images_of(contents: Sequence[bytes]) -> tuple[Images, Images]:
    """Training and test images, from files of images and labels in IDX form, in this order."""
    images, labels, test_images, test_labels = (
        parse_idx(content, dimensions=dimensions)
        for content, dimensions in zip(contents, (3, 1, 3, 1), strict=True)
    )
    return (
        Images(images, labels.astype(np.int64)),
        Images(test_images, test_labels.astype(np.int64)),
    )


def parse_idx(content: bytes, dimensions: int) -> NDArray[np.uint8]:
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
