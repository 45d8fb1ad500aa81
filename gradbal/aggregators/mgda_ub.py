"""Multiple-gradient descent at a shared representation."""

from __future__ import annotations

from gradbal.aggregators.mgda import MGDA
from gradbal.registry import Promises, register

__all__ = ["MGDAUB"]


@register(
    "mgda_ub",
    title="Multi-Task Learning as Multi-Objective Optimization",
    venue="NeurIPS",
    year=2018,
    url="https://arxiv.org/abs/1810.04650",
    consumes="Gramian at the features",
    cost="T backwards of the heads, 1 of the trunk",
    promises=Promises(
        heads="weighted",
        degree=1,
        gain=lambda a, t, n: 1.0,
        non_conflicting=True,
        simplex=True,
    ),
)
class MGDAUB(MGDA):
    """MGDA on the gradients at the representation that the heads start from: an upper bound.

    Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018,
    https://arxiv.org/abs/1810.04650. With z the representation of the batch and
    `Z_i = ∂ℓ_i/∂z`, flattened over batch and features, `w = argmin |Σ w_i Z_i|²` over the
    probability simplex; then one pass of `Σ w_i Z_i` through the trunk. Since
    `|Jᵀw| ≤ |∂z/∂θ| |Zᵀw|`, this minimises an upper bound of MGDA's objective; where `∂z/∂θ` has
    full row rank the two are zero together.

    Call `backward(losses, features=z)`. Arguments as for `MGDA`, on the rows `Z_i`.

    Note:
        LibMTL adds the rows up over the batch before it solves, which is a different and no longer
        an upper bound. Here rows are flattened, as in the paper.

    Example:
        >>> import torch
        >>> from gradbal import MultiTaskOptimizer
        >>> trunk, a, b = (torch.nn.Linear(2, 2) for _ in range(3))
        >>> parameters = [*trunk.parameters(), *a.parameters(), *b.parameters()]
        >>> opt = MultiTaskOptimizer(torch.optim.SGD(parameters, lr=0.1), "mgda_ub")
        >>> z = trunk(torch.ones(4, 2))
        >>> opt.backward([a(z).square().mean(), b(z).square().mean()], features=z)
        >>> opt.gramian.shape
        torch.Size([2, 2])
    """

    @property
    def needs_features(self) -> bool:
        """True."""
        return True
