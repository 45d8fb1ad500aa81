"""Independent component alignment at a shared representation."""

from __future__ import annotations

from gradbal.aggregators.aligned_mtl import AlignedMTL
from gradbal.registry import Promises, register

__all__ = ["AlignedMTLUB"]


@register(
    "aligned_mtl_ub",
    title="Independent Component Alignment for Multi-Task Learning",
    venue="CVPR",
    year=2023,
    url="https://arxiv.org/abs/2305.19000",
    consumes="Gramian at the features",
    cost="T backwards of the heads, 1 of the trunk",
    promises=Promises(
        heads="own",
        degree=1,
        gain=lambda a, t, n: 1.0 if a.pref is None else float(sum(a.pref)),
        continuous=False,
    ),
)
class AlignedMTLUB(AlignedMTL):
    """Aligned-MTL on the gradients at the representation that the heads start from.

    Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023,
    https://arxiv.org/abs/2305.19000. With z the representation of the batch and
    `Z_i = ∂ℓ_i/∂z`, flattened over batch and features, the rows `Z` are aligned instead of J: with
    `ZZᵀ = V diag(λ) Vᵀ`, `w = √s V diag(λ^{−1/2}) Vᵀp`. Then one pass of `Σ w_i Z_i` goes through
    the trunk.

    Call `backward(losses, features=z)`. Arguments as for `AlignedMTL`, on the rows `Z_i`.

    Example:
        >>> import torch
        >>> from gradbal import MultiTaskOptimizer
        >>> trunk, a, b = (torch.nn.Linear(2, 2) for _ in range(3))
        >>> parameters = [*trunk.parameters(), *a.parameters(), *b.parameters()]
        >>> opt = MultiTaskOptimizer(torch.optim.SGD(parameters, lr=0.1), "aligned_mtl_ub")
        >>> z = trunk(torch.ones(4, 2))
        >>> opt.backward([a(z).square().mean(), b(z).square().mean()], features=z)
        >>> opt.gramian.shape
        torch.Size([2, 2])
    """

    @property
    def needs_features(self) -> bool:
        """True."""
        return True
