"""Problems with known Pareto fronts, of points in the unit cube.

F1 to F6 are those of Lin et al., "Pareto Set Learning for Expensive Multi-Objective Optimization",
NeurIPS 2022, https://arxiv.org/abs/2210.08495, as in the code of Lin et al., "Smooth Tchebycheff
Scalarization for Multi-Objective Optimization", ICML 2024, https://arxiv.org/abs/2402.19078. The
RE problems are of Tanabe & Ishibuchi, "An Easy-to-use Real-world Multi-objective Optimization
Problem Suite", Applied Soft Computing 2020, https://arxiv.org/abs/2009.12867.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

__all__ = ["PROBLEMS", "Problem"]

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Two objectives of n variables.

    Attributes:
        name: in the table.
        n_variables: n.
        objectives: from points `[B, n]` in the unit cube, objectives `[B, 2]`.
        ideal, nadir: the least and the largest values on the Pareto front.
        best: the hypervolume of the Pareto front itself.
        front: the second objective on the front, as a function of the first, both normalized; None
            where there is no closed form.
    """

    name: str
    n_variables: int
    objectives: Function
    ideal: tuple[float, float]
    nadir: tuple[float, float]
    best: float
    front: Callable[[Tensor], Tensor] | None = None

    def normalized(self, points: Tensor) -> Tensor:
        """Objectives of points `[B, n]` in units of the front: ideal 0, nadir 1; `[B, 2]`."""
        ideal, nadir = (torch.tensor(p, dtype=points.dtype) for p in (self.ideal, self.nadir))
        return (self.objectives(points) - ideal) / (nadir - ideal)


def _parabola(x: Tensor) -> Tensor:
    """How far the other variables are from `(2x1 − 1)²`; `[B, n − 1]`."""
    return x[:, 1:] - (2.0 * x[:, :1] - 1.0).square()


def _powers(x: Tensor) -> Tensor:
    """The same from powers of x1, another for each variable."""
    i = torch.arange(2, x.shape[1] + 1, dtype=x.dtype)
    return x[:, 1:] - x[:, :1] ** (0.5 * (1.0 + 3.0 * (i - 2.0) / (x.shape[1] - 2.0)))


def _waves(x: Tensor) -> Tensor:
    """The same from waves along x1, sines and cosines in turn."""
    i = torch.arange(2, x.shape[1] + 1)
    angle = 4.0 * math.pi * x[:, :1] + i * math.pi / x.shape[1]
    wave = torch.where(i % 2 == 0, angle.sin(), angle.cos())
    return 2.0 * x[:, 1:] - 1.0 - 0.8 * x[:, :1] * wave


def _f(x: Tensor, distance: Function, convex: bool) -> Tensor:
    """`f1 = a x1` and `f2 = b h(x1/b)`, h the front; a and b are 1 and the mean square distances of
    every second variable from the Pareto set."""
    y = distance(x).square()
    even, odd = y[:, ::2].mean(1), y[:, 1::2].mean(1)  # i = 2, 4, … and i = 3, 5, …
    a, b = 1.0 + odd, 1.0 + even
    shape = _convex if convex else _concave
    return torch.stack([a * x[:, 0], b * shape(x[:, 0] / b)], 1)


def _convex(f1: Tensor) -> Tensor:
    return 1.0 - f1.sqrt()


def _concave(f1: Tensor) -> Tensor:
    return 1.0 - f1.square()


def _re21(x: Tensor) -> Tensor:
    """Four bar truss design: volume and displacement of a joint."""
    least = torch.tensor([1.0, math.sqrt(2.0), math.sqrt(2.0), 1.0], dtype=x.dtype)
    x1, x2, x3, x4 = (least + x * (3.0 - least)).unbind(1)
    root = math.sqrt(2.0)
    volume = 200.0 * (2.0 * x1 + root * x2 + x3.sqrt() + x4)
    displacement = 0.01 * (2.0 / x1 + 2.0 * root / x2 - 2.0 * root / x3 + 2.0 / x4)
    return torch.stack([volume, displacement], 1)


def _re24(x: Tensor) -> Tensor:
    """Hatch cover design: weight, and by how much the constraints are violated."""
    x1, x2 = 0.5 + 3.5 * x[:, 0], 0.5 + 49.5 * x[:, 1]
    young, loads = 700_000.0, 4500.0 / (x1 * x2)
    constraints = torch.stack(
        [
            1.0 - loads / 700.0,
            1.0 - 1800.0 / x2 / 450.0,
            1.0 - 562_000.0 / (young * x1 * x2.square()) / 1.5,
            1.0 - loads * 100.0 / (young * x1.square()),
        ]
    )
    return torch.stack([x1 + 120.0 * x2, (-constraints).clamp(min=0.0).sum(0)], 1)


def _front_problem(name: str, distance: Function, convex: bool) -> Problem:
    # The area between the front and the reference point (1.1, 1.1).
    best = 0.21 + (2.0 / 3.0 if convex else 1.0 / 3.0)
    objectives = partial(_f, distance=distance, convex=convex)
    front = _convex if convex else _concave
    return Problem(name, 6, objectives, (0.0, 0.0), (1.0, 1.0), best, front)


PROBLEMS = {
    problem.name: problem
    for problem in (
        _front_problem("f1", _parabola, convex=True),
        _front_problem("f2", _powers, convex=True),
        _front_problem("f3", _waves, convex=True),
        _front_problem("f4", _parabola, convex=False),
        _front_problem("f5", _powers, convex=False),
        _front_problem("f6", _waves, convex=False),
        # Of the least volume, all variables at their lower bounds; of the least displacement, all
        # but x3 at their upper ones. The nadir and the best hypervolume are the STCH authors'.
        Problem(
            "re21",
            4,
            _re21,
            (200.0 * (5.0 + 2.0**0.25), 0.01 * (4.0 / 3.0 + 2.0 * math.sqrt(2.0) / 3.0 - 2.0)),
            (2886.3695604236013, 0.039999999999998245),
            0.8886,
        ),
        Problem("re24", 2, _re24, (60.5, 0.0), (481.608088535, 44.2819047619), 1.1713),
    )
}
"""By name."""
