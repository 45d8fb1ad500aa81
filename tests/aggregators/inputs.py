"""Jacobians that break careless aggregators, by family."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import gradbal
from gradbal.aggregators.base import Aggregator

WELL_POSED = ("normal", "non_stationary", "imbalanced", "conflict_under_imbalance")
FAMILIES = (
    *WELL_POSED,
    "low_rank",
    "zero",
    "strongly_stationary",
    "weakly_stationary",
    "near_parallel",
    "duplicated",
    "opposite",
    "zero_row",
)


@dataclass(frozen=True)
class Case:
    """A family of Jacobians and what draws one member of it."""

    family: str
    n_tasks: int
    width: int
    seed: int

    def jacobian(self) -> Tensor:
        """`[T, P]`, float64."""
        return torch.from_numpy(np.ascontiguousarray(_MAKE[self.family](self)))


def cases(families: tuple[str, ...] = FAMILIES) -> st.SearchStrategy[Case]:
    """Draws a case: T in 1..8 and sometimes 40, P in 1..200."""
    return st.builds(
        Case,
        st.sampled_from(families),
        st.one_of(st.integers(1, 8), st.just(40)),
        st.integers(1, 200),
        st.integers(0, 2**31),
    )


def suited(name: str, case: Case) -> Case:
    """The case, with as many tasks as the method needs."""
    least = gradbal.info(name).promises.min_tasks
    return case if case.n_tasks >= least else replace(case, n_tasks=least)


def make(name: str, seed: int = 0, **hyperparameters: object) -> Aggregator:
    """A fresh aggregator; random ones get a generator with this seed."""
    if "generator" in gradbal.info(name).hyperparameters:
        hyperparameters["generator"] = torch.Generator().manual_seed(seed)
    return gradbal.create(name, **hyperparameters)


def weights_of(aggregator: Aggregator, jacobian: Tensor) -> Tensor | None:
    """`w [T]` of a first step, in float64; None for a method that has none."""
    fresh = copy.deepcopy(aggregator)
    fresh.reset()
    wide = jacobian.double()
    if fresh.category == "gramian":
        return fresh.weights(wide @ wide.T, torch.ones(len(wide), dtype=wide.dtype))
    if fresh.category == "scalarizer":
        return fresh.loss_weights(torch.ones(len(wide), dtype=wide.dtype))
    if fresh.category == "closure":
        return fresh.step(wide @ wide.T)
    fresh.direction(wide, torch.ones(len(wide), dtype=wide.dtype))
    return None if fresh.last_weights is None else fresh.last_weights.double()


def terms(aggregator: Aggregator, jacobian: Tensor) -> float:
    """The size of the terms that add up to d: what its rounding errors are relative to."""
    w = weights_of(aggregator, jacobian)
    n = jacobian.double().norm(dim=1)
    if w is not None:
        return float(w.abs() @ n)
    fresh = copy.deepcopy(aggregator)
    fresh.reset()
    # A direction that is scaled may be longer than the rows.
    return float(torch.maximum(n.sum(), fresh.direction(jacobian.double()).norm()))


def _orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    q, r = np.linalg.qr(rng.standard_normal((rows, columns)))
    return q * np.sign(np.diagonal(r))


def _with_left_factors(rng: np.random.Generator, left: np.ndarray, width: int) -> np.ndarray:
    """Left factors times |N(0, 1)| singular values times random right factors."""
    k = min(left.shape[1], width)
    if k == 0:
        return np.zeros((len(left), width))
    values = np.abs(rng.standard_normal(k))
    return (left[:, :k] * values) @ _orthonormal(rng, width, k).T


def _complement(rng: np.random.Generator, vectors: np.ndarray) -> np.ndarray:
    """An orthonormal basis, randomly turned, of what is orthogonal to the columns."""
    size, k = vectors.shape
    basis = np.linalg.qr(np.hstack([vectors, rng.standard_normal((size, size))]))[0][:, k:size]
    if basis.shape[1] == 0:
        return basis
    return basis @ _orthonormal(rng, basis.shape[1], basis.shape[1])


def _normal(case: Case, rank: int | None = None) -> np.ndarray:
    rng = np.random.default_rng(case.seed)
    rank = min(case.n_tasks, case.width) if rank is None else rank
    return _with_left_factors(rng, _orthonormal(rng, case.n_tasks, rank), case.width)


def _low_rank(case: Case) -> np.ndarray:
    return _normal(case, max(1, min(case.n_tasks, case.width) // 2))


def _strongly_stationary(case: Case) -> np.ndarray:
    rng = np.random.default_rng(case.seed)
    v = rng.uniform(0.1, 1.0, (case.n_tasks, 1))
    return _with_left_factors(rng, _complement(rng, v), case.width)


def _weakly_stationary(case: Case) -> np.ndarray:
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


def _non_stationary(case: Case) -> np.ndarray:
    rng = np.random.default_rng(case.seed)
    u = rng.uniform(0.1, 1.0, (case.n_tasks, 1))
    left = np.hstack([u / np.linalg.norm(u), _complement(rng, u)])
    return _with_left_factors(rng, left, case.width)


def _imbalanced(case: Case) -> np.ndarray:
    rng = np.random.default_rng(case.seed + 1)
    return _normal(case) * 10 ** rng.uniform(-6, 6, (case.n_tasks, 1))


def _near_parallel(case: Case) -> np.ndarray:
    j = _normal(case)
    rng = np.random.default_rng(case.seed + 1)
    j[-1] = j[0] + 1e-6 * np.linalg.norm(j[0]) * rng.standard_normal(case.width)
    return j


def _duplicated(case: Case) -> np.ndarray:
    j = _normal(case)
    j[-1] = j[0]
    return j


def _opposite(case: Case) -> np.ndarray:
    j = _normal(case)
    if case.n_tasks > 1:
        j[-1] = -np.random.default_rng(case.seed).uniform(0.1, 10) * j[0]
    return j


def _zero_row(case: Case) -> np.ndarray:
    j = _normal(case)
    j[case.seed % case.n_tasks] = 0.0
    return j


def _conflict_under_imbalance(case: Case) -> np.ndarray:
    j = _normal(case)
    if case.n_tasks > 1 and case.width > 1:
        rng = np.random.default_rng(case.seed)
        a, b = _orthonormal(rng, case.width, 2).T
        j[0], j[1] = a, (-0.9 * a + np.sqrt(1 - 0.81) * b) * 10.0 ** -rng.integers(2, 4)
    return j


_MAKE = {
    "normal": _normal,
    "low_rank": _low_rank,
    "zero": lambda case: np.zeros((case.n_tasks, case.width)),
    "strongly_stationary": _strongly_stationary,
    "weakly_stationary": _weakly_stationary,
    "non_stationary": _non_stationary,
    "imbalanced": _imbalanced,
    "near_parallel": _near_parallel,
    "duplicated": _duplicated,
    "opposite": _opposite,
    "zero_row": _zero_row,
    "conflict_under_imbalance": _conflict_under_imbalance,
}


def random_rows(n_tasks: int, width: int, seed: int, spread: float = 1.0) -> np.ndarray:
    """Gaussian rows that lean to one side, with log-uniform scales; `[T, P]`."""
    rng = np.random.default_rng(seed)
    j = rng.standard_normal((n_tasks, width)) + 0.3
    return j * spread ** rng.uniform(-0.5, 0.5, (n_tasks, 1))
