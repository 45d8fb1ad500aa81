"""The convex quadratics of UPGrad's authors, in the plane.

Quinton & Rey, "Jacobian Descent for Multi-Objective Optimization", 2024,
https://arxiv.org/abs/2406.16232; settings of https://github.com/TorchJD/trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gradbal
from gradbal.aggregators.mgda import mgda

__all__ = ["AGGREGATORS", "QUADRATICS", "Quadratic", "stationarity", "trajectory"]

Point = tuple[float, float]


@dataclass(frozen=True)
class Quadratic:
    """Two convex objectives of the plane.

    Attributes:
        name, summary: for the table and the picture.
        objectives: from points `[..., 2]`, `[..., 2]`.
        starts: the starting points.
        learning_rate, steps: of plain gradient descent.
        front: two ends of the Pareto set, or a curve of it; `[k, 2]`.
    """

    name: str
    summary: str
    objectives: Callable[[Tensor], Tensor]
    starts: tuple[Point, ...]
    learning_rate: float
    steps: int
    front: Tensor


def _ewq(x: Tensor) -> Tensor:
    return x.square()


def _rotation(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


_BASES = (
    _rotation(math.pi / 16) @ torch.diag(torch.tensor([1.0, 0.1], dtype=torch.float64)),
    _rotation(-math.pi / 16) @ torch.diag(torch.tensor([math.sqrt(3.0), 0.1], dtype=torch.float64)),
)
_MATRICES = tuple(basis @ basis.T for basis in _BASES)
_CENTRES = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)


def _cqf(x: Tensor) -> Tensor:
    parts = []
    for matrix, centre in zip(_MATRICES, _CENTRES, strict=True):
        offset = x - centre
        parts.append(((offset @ matrix) * offset).sum(-1))
    return torch.stack(parts, -1)


def _cqf_front(n: int = 201) -> Tensor:
    """Where `λ∇f1 + (1 − λ)∇f2 = 0`, for λ from 0 to 1."""
    points = []
    for share in torch.linspace(0.0, 1.0, n, dtype=torch.float64):
        a, b = share * _MATRICES[0], (1.0 - share) * _MATRICES[1]
        points.append(torch.linalg.solve(a + b, a @ _CENTRES[0] + b @ _CENTRES[1]))
    return torch.stack(points)


QUADRATICS = {
    quadratic.name: quadratic
    for quadratic in (
        Quadratic(
            "ewq",
            "element-wise quadratic, (x1², x2²)",
            _ewq,
            ((3.0, -2.0), (0.0, -3.0), (-4.0, 4.0), (-3.0, 4.0), (-3.5, -0.75)),
            0.075,
            50,
            torch.zeros(1, 2, dtype=torch.float64),
        ),
        Quadratic(
            "cqf",
            "convex quadratic form, (x − u_i)ᵀA_i(x − u_i)",
            _cqf,
            ((0.5, 0.5), (-1.0, 7.0), (0.0, 0.0), (1.0, 6.0)),
            0.05,
            500,
            _cqf_front(),
        ),
    )
}
"""By name."""

AGGREGATORS: dict[str, float] = {
    "upgrad": 1.0,
    "mgda": 1.0,
    "cagrad": 1.0,
    "nash_mtl": 2.0,
    "graddrop": 0.5,
    "imtl_g": 2.0,
    "aligned_mtl": 1.0,
    "dualproj": 1.0,
    "pcgrad": 0.5,
    "rgw": 1.0,
    "mean": 1.0,
}
"""The methods of the paper's table, and what the authors multiply the learning rate by."""


_OPTIONS = {"cagrad": {"c": 0.5, "rescale": 0}}
"""As in the authors' settings."""


def trajectory(quadratic: Quadratic, method: str, start: int) -> Tensor:
    """`[steps + 1, 2]`: where `MultiTaskOptimizer(SGD([x]), method)` goes, in float64.

    Args:
        quadratic: the objectives.
        method: in `AGGREGATORS`.
        start: the number of the starting point, which is the seed, too.
    """
    x = torch.nn.Parameter(torch.tensor(quadratic.starts[start], dtype=torch.float64))
    rate = quadratic.learning_rate * AGGREGATORS[method]
    options: dict[str, Any] = dict(_OPTIONS.get(method, {}))
    if "generator" in gradbal.info(method).hyperparameters:
        options["generator"] = torch.Generator().manual_seed(start)
    aggregator = gradbal.create(method, **options)
    opt = gradbal.MultiTaskOptimizer(torch.optim.SGD([x], lr=rate), aggregator)
    points = [x.detach().clone()]
    for _ in range(quadratic.steps):
        opt.zero_grad()
        opt.backward(list(quadratic.objectives(x)))
        opt.step()
        points.append(x.detach().clone())
    return torch.stack(points)


def stationarity(quadratic: Quadratic, point: Tensor) -> float:
    """The length of the shortest convex combination of the gradients at a point `[2]`."""
    x = point.detach().clone().requires_grad_()
    losses = quadratic.objectives(x)
    rows = torch.stack([torch.autograd.grad(l, x, retain_graph=True)[0] for l in losses])
    w = mgda(rows @ rows.T)
    return float(torch.linalg.vector_norm(w @ rows))
