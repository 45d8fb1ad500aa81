"""Multi-objective meta-learning of loss weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range, one_of
from gradbal.aggregators._meta import MetaMixin
from gradbal.aggregators.base import BilevelAggregator
from gradbal.aggregators.mgda import mgda
from gradbal.jacobian import cross_gramian
from gradbal.registry import Promises, register

if TYPE_CHECKING:
    from gradbal._closures import Evaluations

__all__ = ["MOML", "moml"]


@register(
    "moml",
    title="Multi-Objective Meta Learning",
    venue="NeurIPS",
    year=2021,
    url="https://arxiv.org/abs/2102.07121",
    consumes="training and validation closures",
    cost="2T + 1 backwards, 1 forward",
    promises=Promises(heads="weighted", simplex=True, zero_rows_inactive=False),
)
class MOML(MetaMixin, BilevelAggregator):
    """Loss weights whose next training step lowers all validation losses together.

    Ye et al., "Multi-Objective Meta Learning", NeurIPS 2021, https://arxiv.org/abs/2102.07121. With
    `p = softmax(α)`, training losses f and validation losses F, a virtual step goes to
    `θ' = θ − η Σ p_i ∇f_i(θ)`. The derivative of `F_i(θ')` by α is
    `h_i = −η S J_f ∇F_i(θ')`, `S = diag(p) − ppᵀ`, J_f the Jacobian of f at θ: from the products of
    training and validation gradients alone, no second derivatives. α takes an Adam step along
    `Hᵀw`, w MGDA's weights of the rows h_i; then the parameters move by `Σ softmax(α)_i ∇f_i`.

    Call `step(closure, val_closure)`. All trained parameters are taken alike, heads too.

    Args:
        inner_lr: η; None is the wrapped optimizer's learning rate, that of each param group.
        meta_lr: of α.
        norm: rows h_i are divided by their length ("l2"), by their validation loss ("loss"), or
            not ("none").
        model_batch: the parameters move by the gradients of the "train" batch, or by the mean of
            both batches' ("train+val").

    Raises:
        ValueError: an argument out of range; with norm="loss" a validation loss that is not
            positive.

    Note:
        The official code differentiates through the virtual step; for one step the closed form
        above is the same. Several steps would need second derivatives and are left out. LibMTL's
        default of five inner steps crashes, it splits the training
        batch instead of using validation data, and its extra forwards move BatchNorm's statistics;
        here there is one inner step, on the closures given, and buffers are put back.

    Example:
        >>> import torch
        >>> from gradbal import MultiTaskOptimizer
        >>> layer = torch.nn.Linear(2, 2)
        >>> def closure(x):
        ...     return lambda: list((layer(x) - 1).square().mean(0))
        >>> opt = MultiTaskOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), "moml")
        >>> losses = opt.step(closure(torch.randn(8, 2)), closure(torch.randn(8, 2)))
        >>> round(float(opt.weights.sum()), 6)
        1.0
    """

    def __init__(
        self,
        inner_lr: float | None = None,
        meta_lr: float = 1e-3,
        norm: str = "l2",
        model_batch: str = "train",
    ) -> None:
        if inner_lr is not None:
            in_range("inner_lr", inner_lr, 0, bounds="(]")
        in_range("meta_lr", meta_lr, 0)
        one_of("norm", norm, ("none", "l2", "loss"))
        one_of("model_batch", model_batch, ("train", "train+val"))
        self.inner_lr = inner_lr
        self.meta_lr = meta_lr
        self.norm = norm
        self.model_batch = model_batch

    @property
    def gives_gradient(self) -> bool:
        """With both batches."""
        return self.model_batch == "train+val"

    def step(self, evaluations: Evaluations) -> Tensor:
        """One step of α; returns `softmax(α) [T]`, or the gradient `[P]` of both batches."""
        assert self.alpha is not None
        eta = evaluations.learning_rates() if self.inner_lr is None else self.inner_lr
        train = evaluations.jacobian()
        p = self.alpha.softmax(0)
        with evaluations.moved(-eta * (p.to(train) @ train)):
            validation = eta * evaluations.jacobian("validation")
            values = evaluations.losses("validation") if self.norm == "loss" else None
        if values is not None and not bool((values > 0).all()):
            raise ValueError(
                "'moml' with norm='loss' needs positive validation losses, found "
                f"{values.tolist()}; add an offset or use norm='l2'"
            )
        gradient = moml(self.alpha, cross_gramian(validation, train), self.norm, values)
        if bool(gradient.any()):
            self.train_alpha(gradient)
        p = self.alpha.softmax(0)
        if not self.gives_gradient:
            return p
        return 0.5 * (p.to(train) @ train + evaluations.gradient(p, "validation"))


def moml(alpha: Tensor, products: Tensor, norm: str = "l2", values: Tensor | None = None) -> Tensor:
    """The common descent direction `Hᵀw` of all validation losses, in α.

    Args:
        alpha: `α [T]`.
        products: `[T, T]`, `η⟨∇F_i(θ'), ∇f_k(θ)⟩`.
        norm: see `MOML`.
        values: `F(θ') [T]`, for norm="loss".

    Returns:
        `[T]`, the gradient for α; zero where every row of H is, up to the products' rounding.
    """
    wide = products.detach().double()
    p = alpha.to(wide).softmax(0)
    # Rows of −S times the products; where training gradients count alike, nothing but rounding.
    gaps = wide - (wide @ p)[:, None]
    gaps = gaps.where(gaps.abs() > 1e-12 * wide.abs().amax(1, keepdim=True), 0.0)
    h = -p * gaps
    if norm == "l2":
        lengths = torch.linalg.vector_norm(h, dim=1, keepdim=True)
        h = h / torch.where(lengths > 0, lengths, 1.0)
    elif norm == "loss":
        assert values is not None
        h = h / values.to(h)[:, None]
    return (mgda(h @ h.T, ignore_zero_rows=True) @ h).to(alpha.dtype)
