"""Cutting rows into training, validation and test rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.benchmark import Settings

__all__ = ["Cut", "cut", "share"]

Cut = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Indices of training, validation and test rows."""


def cut(groups: NDArray[np.int64], sizes: tuple[int, int, int], seed: int) -> Cut:
    """Random disjoint rows; rows of one group are never in two of the parts.

    Test rows are taken first, then validation rows, so that presets which differ in the number of
    training rows alone are judged on the same ones, and fewer training rows are some of the more.
    What is left of a group whose first rows fill a part is left out.

    Args:
        groups: by row, what it belongs to `[N]`; for instance its own number.
        sizes: how many training, validation and test rows.
        seed: decides the order.

    Raises:
        ValueError: there are fewer rows.
    """
    names, group = np.unique(groups, return_inverse=True)
    rank = np.random.default_rng(seed).permutation(len(names))[group]
    order = np.argsort(rank, kind="stable")
    parts = []
    for size in reversed(sizes):
        if size > len(order):
            raise ValueError(
                f"sizes must be at most the rows there are, found {sizes} of {len(groups)}, some "
                "of them in groups that must not be divided"
            )
        parts.append(order[:size].astype(np.int64))
        last = rank[order[size - 1]] if size else -1
        order = order[rank[order] > last]
    test, validation, train = parts
    return train, validation, test


def share(settings: Settings, rows: list[int]) -> list[tuple[int, int, int]]:
    """The sizes in the settings, divided among sets with these numbers of rows in proportion."""
    edges = np.cumsum([0, *rows]) / sum(rows)
    sizes = (settings.train_size, settings.validation_size, settings.test_size)
    parts = [np.diff(np.rint(edges * size).astype(int)).tolist() for size in sizes]
    return list(zip(*parts, strict=True))
