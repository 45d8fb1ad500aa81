"""Random loss weighting."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from gradbal.aggregators._arguments import one_of
from gradbal.aggregators._gramians import as_weights
from gradbal.aggregators._mixins import RandomMixin
from gradbal.aggregators.base import Scalarizer
from gradbal.registry import Promises, register

__all__ = ["DISTRIBUTIONS", "RLW", "rlw"]

DISTRIBUTIONS = ("normal", "uniform", "dirichlet", "bernoulli")


@register(
    "rlw",
    title="Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning",
    venue="TMLR",
    year=2022,
    url="https://arxiv.org/abs/2111.10603",
    promises=Promises(
        heads="weighted", degree=1, gain=lambda a, t, n: 1.0, simplex=True, deterministic=False
    ),
)
class RLW(RandomMixin, Scalarizer):
    """Random loss weighting: fresh weights on the simplex at every step.

    Lin et al., "Reasonable Effectiveness of Random Weighting", TMLR 2022,
    https://arxiv.org/abs/2111.10603. With x ~ N(0, I_T), `w = softmax(x)`; the other distributions
    are normalised to sum one. `E[w_i] = 1/T`.

    Args:
        distribution: "normal" (the paper's default, softmax of normals), "uniform" on [0, 1],
            "dirichlet" with all parameters one, or "bernoulli" with probability ½ (drawn again
            while all are zero).
        generator: a CPU generator; None makes one seeded from `torch.initial_seed()`.

    Raises:
        ValueError: an unknown distribution, or a generator that is not on the CPU.

    Note:
        The weights sum to one, not to T, as in LibMTL, nash-mtl and TorchJD: on average d is that
        of `mean`, not of `sum`.

    Example:
        >>> import torch
        >>> w = RLW().loss_weights(torch.tensor([3.0, 5.0]))
        >>> bool((w >= 0).all() and torch.isclose(w.sum(), torch.tensor(1.0)))
        True
    """

    linear = True
    state_names = ("generator",)

    def __init__(self, distribution: str = "normal", generator: Generator | None = None) -> None:
        one_of("distribution", distribution, DISTRIBUTIONS)
        self.distribution = distribution
        self._own(generator)

    def scalarize(self, losses: Tensor) -> Tensor:
        """`Σ w_i ℓ_i` from losses `[T]`, with weights drawn for this call."""
        w = rlw(len(losses), self.distribution, self.generator)
        return (as_weights(w.numpy(), losses) * losses).sum()


def rlw(n_tasks: int, distribution: str = "normal", generator: Generator | None = None) -> Tensor:
    """One draw of the weights.

    Args:
        n_tasks: T.
        distribution: see `RLW`.
        generator: a CPU generator; None uses torch's global one.

    Returns:
        `w [T]`, float64 on the CPU, non-negative, sum one.
    """
    x = torch.empty(n_tasks, dtype=torch.float64)
    if distribution == "normal":
        return x.normal_(generator=generator).softmax(0)
    if distribution == "uniform":
        x.uniform_(generator=generator)
    elif distribution == "dirichlet":
        # Dirichlet(1, …, 1) is a normalised vector of exponentials.
        x.exponential_(generator=generator)
    else:
        x.bernoulli_(0.5, generator=generator)
        while not bool(x.any()):
            x.bernoulli_(0.5, generator=generator)
    return x / x.sum()
