"""Training to a Pareto stationary point: two convex quadratics, plain gradient steps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import gradbal
from gradbal import MultiTaskOptimizer

STEPS, RATE, WIDTH = 3000, 0.1, 10


class _Quadratics:
    """`ℓ_i = ½(x − a_i)ᵀH_i(x − a_i) + ½`, eigenvalues of H_i between 0.1 and 1."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        shape = (2, WIDTH, WIDTH)
        turns, _ = torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=draw))
        values = 0.1 + 0.9 * torch.rand(2, WIDTH, dtype=torch.float64, generator=draw)
        self.hessians = turns @ torch.diag_embed(values) @ turns.mT
        self.optima = torch.randn(2, WIDTH, dtype=torch.float64, generator=draw)
        self.start = 3 * torch.randn(WIDTH, dtype=torch.float64, generator=draw)

    def losses(self, x: Tensor) -> Tensor:
        e = x - self.optima
        return 0.5 * torch.einsum("ti,tij,tj->t", e, self.hessians, e) + 0.5

    def rows(self, x: Tensor) -> Tensor:
        return torch.einsum("tij,tj->ti", self.hessians, x - self.optima)

    def least_norm(self, x: Tensor) -> float:
        """The distance of the segment between both gradients from zero."""
        a, b = self.rows(x)
        t = float((b @ (b - a) / ((a - b) @ (a - b))).clamp(0, 1))
        return float((t * a + (1 - t) * b).norm())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mgda", {}),
        ("cagrad", {"c": 0.5}),
        ("upgrad", {}),
        ("aligned_mtl", {}),
        ("config", {}),
        ("imtl_g", {}),
        ("sdmgrad", {"batches": 1}),
        ("modo", {"gamma": 0.01}),
        ("famo", {}),
        ("marigold", {}),
    ],
)
def test_it_ends_at_a_pareto_stationary_point(name: str, options: dict[str, Any]) -> None:
    problem = _Quadratics()
    x = nn.Parameter(problem.start.clone())
    assert problem.least_norm(x.detach()) > 0.5
    method = gradbal.create(name, **options)
    if gradbal.info(name).kind == "closure" and name not in ("sdmgrad", "modo"):
        opt = MultiTaskOptimizer(SGD([x], lr=RATE), method)
        for _ in range(STEPS):
            opt.step(lambda: list(problem.losses(x)))
    else:
        with torch.no_grad():
            for _ in range(STEPS):
                x -= RATE * method.direction(problem.rows(x))
    assert problem.least_norm(x.detach()) < 1e-2
