"""Random loss weighting, under the name that some libraries give it."""

from __future__ import annotations

from gradbal.aggregators.rlw import RLW
from gradbal.registry import register

__all__ = ["Random"]


@register(
    "random",
    title="Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning",
    venue="TMLR",
    year=2022,
    url="https://arxiv.org/abs/2111.10603",
)
class Random(RLW):
    """Fresh random weights on the simplex at every step: `rlw` by its other name.

    Lin et al., "Reasonable Effectiveness of Random Weighting", TMLR 2022,
    https://arxiv.org/abs/2111.10603. Arguments as in `RLW`.

    Example:
        >>> import torch
        >>> w = Random().loss_weights(torch.tensor([3.0, 5.0]))
        >>> bool((w >= 0).all() and torch.isclose(w.sum(), torch.tensor(1.0)))
        True
    """
