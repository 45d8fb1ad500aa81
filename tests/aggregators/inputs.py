"""Draws hard Jacobians for hypothesis, makes aggregators, and measures what they return."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import gradbal
from benchmarks.jacobians import FAMILIES, WELL_POSED, Case
from gradbal.aggregators.base import Aggregator

__all__ = [
    "DIRECT",
    "FAMILIES",
    "WELL_POSED",
    "Case",
    "cases",
    "make",
    "random_rows",
    "suited",
    "terms",
    "weights_of",
]


DIRECT = [n for n in gradbal.list_aggregators() if hasattr(gradbal.info(n).cls, "direction")]
"""What works on a Jacobian: all methods but the bilevel ones, which work on closures."""


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
    if isinstance(fresh, gradbal.Scalarizer):
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


def random_rows(n_tasks: int, width: int, seed: int, spread: float = 1.0) -> np.ndarray:
    """Gaussian rows that lean to one side, with log-uniform scales; `[T, P]`."""
    rng = np.random.default_rng(seed)
    j = rng.standard_normal((n_tasks, width)) + 0.3
    return j * spread ** rng.uniform(-0.5, 0.5, (n_tasks, 1))
