"""Pareto-set learning: one network that gives a solution for every preference.

As in the code of Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization",
ICML 2024, https://arxiv.org/abs/2402.19078: at each step the network is trained on the scalarized
objectives of some random preferences, added up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.errors import MissingExtra
from benchmarks.pareto.problems import Problem
from gradbal.aggregators.stch_scalar import stch_scalar
from gradbal.aggregators.tchebycheff import tchebycheff

__all__ = ["MU", "SCALARIZERS", "hypervolume", "learn", "scalarized"]

MU = 0.01
"""μ of the smooth maximum."""

_PREFERENCES = 10
"""A step."""

_SHOWN = 100
"""Preferences that the learned front is taken at."""


def _weighted_sum(losses: Tensor, pref: Tensor) -> Tensor:
    return (pref * losses).sum()


SCALARIZERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "constant": _weighted_sum,
    "tchebycheff": tchebycheff,
    "stch_scalar": partial(stch_scalar, mu=MU),
}
"""What the methods of these names make of losses `[T]` and a preference `[T]`."""


def scalarized(method: str, losses: Tensor, pref: Tensor) -> Tensor:
    """`[B]`: the method on losses `[B, T]`, with a preference of its own for each row of them."""
    found: Tensor = torch.func.vmap(SCALARIZERS[method])(losses, pref)
    return found


class ParetoSet(nn.Module):
    """Preferences `[B, 2]` to points of the unit cube `[B, n]`.

    Args:
        n_variables: n.
    """

    def __init__(self, n_variables: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, n_variables),
            nn.Sigmoid(),
        )

    def forward(self, pref: Tensor) -> Tensor:
        """In float64, which the problems are evaluated in."""
        found: Tensor = self.layers(pref).double()
        return found


def learn(
    problem: Problem,
    method: str,
    seed: int,
    steps: int,
    after_steps: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """Trains a network and returns its front, normalized objectives `[100, 2]`.

    Args:
        problem: what is minimised.
        method: in `SCALARIZERS`.
        seed: of the network and the preferences.
        steps: of Adam, with a learning rate of 0.001.
        after_steps: called now and then with the number of steps since the last call.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ParetoSet(problem.n_variables)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(steps):
        # Uniform on the simplex.
        first = torch.rand(_PREFERENCES, 1, generator=generator)
        pref = torch.cat([first, 1.0 - first], 1)
        losses = problem.normalized(network(pref))
        optimizer.zero_grad()
        total = scalarized(method, losses, pref.double()).sum()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            after_steps((step % 100) + 1)
    first = torch.linspace(0.0, 1.0, _SHOWN)[:, None]
    with torch.no_grad():
        return problem.normalized(network(torch.cat([first, 1.0 - first], 1)))


def hypervolume(front: Tensor) -> float:
    """Of normalized objectives `[B, 2]`, against 1.1 in both.

    Raises:
        MissingExtra: moocore is not installed.
    """
    try:
        import moocore
    except ModuleNotFoundError as error:
        raise MissingExtra("moocore", "the hypervolume") from error
    return float(moocore.hypervolume(front.numpy(), ref=[1.1, 1.1]))
