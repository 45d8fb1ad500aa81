"""Jacobians that break careless aggregators, by family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "FAMILIES",
    "SCALES",
    "WELL_POSED",
    "Case",
    "describe",
    "hard_jacobian",
    "random_jacobian",
]

Array = NDArray[np.float64]

SCALES = (1e-8, 1e-4, 1.0, 1e4, 1e8)
"""What a whole Jacobian is multiplied by."""


@dataclass(frozen=True)
class Case:
    """A family of Jacobians and what draws one member of it.

    Attributes:
        family: one of `FAMILIES`.
        n_tasks, width: T and P, at least 1.
        seed: of everything that is drawn.
    """

    family: str
    n_tasks: int
    width: int
    seed: int

    def jacobian(self) -> Tensor:
        """`[T, P]`, float64."""
        return torch.from_numpy(np.ascontiguousarray(_MAKE[self.family](self)))


def describe(family: str) -> str:
    """One sentence on what the family is."""
    return " ".join((_MAKE[family].__doc__ or "").split())


def hard_jacobian(rng: np.random.Generator, family: str) -> Tensor:
    """A member of a family, T in 2..8 or, one time in ten, 40, P in T..200, times one of `SCALES`.

    Args:
        rng: draws shape, entries and scale.
        family: one of `FAMILIES`.

    Returns:
        `[T, P]`, float64.
    """
    n_tasks = 40 if rng.random() < 0.1 else int(rng.integers(2, 9))
    width = int(rng.integers(n_tasks, 201))
    scale = float(rng.choice(SCALES))
    return scale * Case(family, n_tasks, width, int(rng.integers(2**31))).jacobian()


def random_jacobian(rng: np.random.Generator, spread: float, scale: float) -> Tensor:
    """A Gaussian Jacobian `[T, P]`, T in 2..10 and P in T..200, with rescaled rows.

    Args:
        rng: draws shape, entries and row scales.
        spread: largest over smallest row scale; the scales are log-uniform between.
        scale: what everything is multiplied by.

    Returns:
        `[T, P]`, float64.
    """
    n_tasks = int(rng.integers(2, 11))
    width = int(rng.integers(n_tasks, 201))
    rows = rng.standard_normal((n_tasks, width))
    rows *= spread ** rng.uniform(-0.5, 0.5, (n_tasks, 1)) * scale
    return torch.from_numpy(rows)


def _orthonormal(rng: np.random.Generator, rows: int, columns: int) -> Array:
    q, r = np.linalg.qr(rng.standard_normal((rows, columns)))
    return np.asarray(q * np.sign(np.diagonal(r)))


def _with_left_factors(rng: np.random.Generator, left: Array, width: int) -> Array:
    """Left factors times |N(0, 1)| singular values times random right factors."""
    k = min(left.shape[1], width)
    if k == 0:
        return np.zeros((len(left), width))
    values = np.abs(rng.standard_normal(k))
    return np.asarray((left[:, :k] * values) @ _orthonormal(rng, width, k).T)


def _complement(rng: np.random.Generator, vectors: Array) -> Array:
    """An orthonormal basis, randomly turned, of what is orthogonal to the columns."""
    size, k = vectors.shape
    basis = np.linalg.qr(np.hstack([vectors, rng.standard_normal((size, size))]))[0][:, k:size]
    if basis.shape[1] == 0:
        return basis
    return basis @ _orthonormal(rng, basis.shape[1], basis.shape[1])


def _normal(case: Case, rank: int | None = None) -> Array:
    """Random singular vectors, singular values |N(0, 1)|."""
    rng = np.random.default_rng(case.seed)
    rank = min(case.n_tasks, case.width) if rank is None else rank
    return _with_left_factors(rng, _orthonormal(rng, case.n_tasks, rank), case.width)


def _low_rank(case: Case) -> Array:
    """As normal, of half the rank."""
    return _normal(case, max(1, min(case.n_tasks, case.width) // 2))


def _strongly_stationary(case: Case) -> Array:
    """A positive combination of all rows vanishes."""
    rng = np.random.default_rng(case.seed)
    v = rng.uniform(0.1, 1.0, (case.n_tasks, 1))
    return _with_left_factors(rng, _complement(rng, v), case.width)


def _weakly_stationary(case: Case) -> Array:
    """A positive combination of some rows vanishes, of all rows none."""
    if case.n_tasks < 2:
        return np.zeros((case.n_tasks, case.width))
    rng = np.random.default_rng(case.seed)
    u = rng.uniform(0.1, 1.0, case.n_tasks)
    cut = int(rng.integers(1, case.n_tasks))
    first, second = u.copy(), u.copy()
    first[cut:], second[:cut] = 0.0, 0.0
    rest = _complement(rng, np.stack([first, second], 1))
    left = np.hstack([(second / np.linalg.norm(second))[:, None], rest])
    return _with_left_factors(rng, left, case.width)


def _non_stationary(case: Case) -> Array:
    """A positive vector is a left singular vector: d = Jᵀu gains in every task."""
    rng = np.random.default_rng(case.seed)
    u = rng.uniform(0.1, 1.0, (case.n_tasks, 1))
    left = np.hstack([u / np.linalg.norm(u), _complement(rng, u)])
    return _with_left_factors(rng, left, case.width)


def _imbalanced(case: Case) -> Array:
    """As normal, each row times 10^U(−6, 6)."""
    rng = np.random.default_rng(case.seed + 1)
    return _normal(case) * 10 ** rng.uniform(-6, 6, (case.n_tasks, 1))


def _near_parallel(case: Case) -> Array:
    """As normal, the last row the first plus noise, 1e-6 of its norm in every entry."""
    j = _normal(case)
    rng = np.random.default_rng(case.seed + 1)
    j[-1] = j[0] + 1e-6 * np.linalg.norm(j[0]) * rng.standard_normal(case.width)
    return j


def _duplicated(case: Case) -> Array:
    """As normal, the last row equal to the first."""
    j = _normal(case)
    j[-1] = j[0]
    return j


def _opposite(case: Case) -> Array:
    """As normal, the last row the first times −U(0.1, 10)."""
    j = _normal(case)
    if case.n_tasks > 1:
        j[-1] = -np.random.default_rng(case.seed).uniform(0.1, 10) * j[0]
    return j


def _zero_row(case: Case) -> Array:
    """As normal, one row zero."""
    j = _normal(case)
    j[case.seed % case.n_tasks] = 0.0
    return j


def _conflict_under_imbalance(case: Case) -> Array:
    """As normal, two unit rows at cosine −0.9, one of them times 1e-2 or 1e-3."""
    j = _normal(case)
    if case.n_tasks > 1 and case.width > 1:
        rng = np.random.default_rng(case.seed)
        a, b = _orthonormal(rng, case.width, 2).T
        j[0], j[1] = a, (-0.9 * a + np.sqrt(1 - 0.81) * b) * 10.0 ** -rng.integers(2, 4)
    return j


def _zero(case: Case) -> Array:
    """Nothing but zeros."""
    return np.zeros((case.n_tasks, case.width))


_MAKE: dict[str, Callable[[Case], Array]] = {
    "normal": _normal,
    "non_stationary": _non_stationary,
    "imbalanced": _imbalanced,
    "conflict_under_imbalance": _conflict_under_imbalance,
    "low_rank": _low_rank,
    "zero": _zero,
    "strongly_stationary": _strongly_stationary,
    "weakly_stationary": _weakly_stationary,
    "near_parallel": _near_parallel,
    "duplicated": _duplicated,
    "opposite": _opposite,
    "zero_row": _zero_row,
}

FAMILIES = tuple(_MAKE)
"""The names of all families, the well-posed first."""

WELL_POSED = FAMILIES[:4]
"""Those on which a rounding error changes no method's result much."""
