"""Weights by how much each task's training helps the primary tasks' validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradbal._closures import length
from gradbal.aggregators._arguments import in_range, one_of
from gradbal.aggregators._meta import MetaMixin, softmax_jacobian
from gradbal.aggregators.base import BilevelAggregator
from gradbal.registry import Promises, register

if TYPE_CHECKING:
    from gradbal._closures import Evaluations

__all__ = ["AutoLambda"]


@register(
    "auto_lambda",
    title="Auto-Lambda: Disentangling Dynamic Task Relationships",
    venue="TMLR",
    year=2022,
    url="https://arxiv.org/abs/2202.03091",
    consumes="training and validation closures",
    cost="3 backwards, 3 forwards",
    promises=Promises(heads="weighted", zero_rows_inactive=False),
)
class AutoLambda(MetaMixin, BilevelAggregator):
    """Loss weights that lower the primary tasks' validation losses after the next training step.

    Liu et al., "Auto-Lambda: Disentangling Dynamic Task Relationships", TMLR 2022,
    https://arxiv.org/abs/2202.03091. With training losses ℓ, a virtual step of the optimizer goes
    to `θ' = θ − η(m + Σ λ_i ∇ℓ_i + κθ)`, η its learning rate (that of each param group), m its
    momentum and κ its weight decay. With `v = η∇ Σ_{i∈P} ℓ_i^val(θ')` over the primary tasks P, the
    derivative by λ_i is `−⟨∇ℓ_i(θ), v⟩`, which two forward passes give for all tasks:
    `q_i = (ℓ_i(θ + εv) − ℓ_i(θ − εv))/(2ε)`, `ε = fd_eps/|v|`. λ takes an Adam step along `−q`,
    then the parameters move by `Σ λ_i ∇ℓ_i`.

    Call `step(closure, val_closure)`. All trained parameters are taken alike, heads too.

    Args:
        init: every first λ_i; with "softmax" the first weights are 1/T whatever it is.
        meta_lr: of λ; the official runs have 1e-4 for NYUv2 and 3e-5 for Cityscapes.
        primary: indices of the primary tasks; None is all.
        fd_eps: the length of the displacement `εv`.
        clamp_min: the least λ_i, or None: they may become negative.
        param: "raw", λ itself; "softmax", the weights are the softmax of what is trained.

    Raises:
        ValueError: an argument out of range; a primary task that is not there.

    Note:
        LibMTL takes the softmax, makes every task primary, leaves momentum and decay out of the
        virtual step, and crashes with its default number of inner steps; the official validation
        loader is the training set shuffled anew. Here all is as in the paper, θ is restored from
        a copy, and buffers are put back after the extra passes. The virtual step has SGD's
        momentum, also in place of what other optimizers do, without dampening and Nesterov's term,
        as in the official code. Where a displaced loss is not finite λ stays as it is.

    Example:
        >>> import torch
        >>> from gradbal import MultiTaskOptimizer
        >>> layer = torch.nn.Linear(2, 2)
        >>> def closure(x):
        ...     return lambda: list((layer(x) - 1).square().mean(0))
        >>> opt = MultiTaskOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), "auto_lambda")
        >>> losses = opt.step(closure(torch.randn(8, 2)), closure(torch.randn(8, 2)))
        >>> opt.weights.shape
        torch.Size([2])
    """

    def __init__(
        self,
        init: float = 0.1,
        meta_lr: float = 1e-4,
        primary: Sequence[int] | None = None,
        fd_eps: float = 0.01,
        clamp_min: float | None = None,
        param: str = "raw",
    ) -> None:
        in_range("init", init)
        in_range("meta_lr", meta_lr, 0)
        in_range("fd_eps", fd_eps, 0, bounds="(]")
        if clamp_min is not None:
            in_range("clamp_min", clamp_min)
        one_of("param", param, ("raw", "softmax"))
        if primary is not None and (
            not primary or not all(isinstance(i, int) and i >= 0 for i in primary)
        ):
            raise ValueError(f"`primary` must be indices of tasks, found {primary!r}")
        self.init = init
        self.meta_lr = meta_lr
        self.primary = None if primary is None else list(primary)
        self.fd_eps = fd_eps
        self.clamp_min = clamp_min
        self.param = param

    def _first_alpha(self, n_tasks: int) -> float:
        return float(self.init)

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Makes λ, or checks that it has T entries.

        Raises:
            ValueError: T differs from before, or a primary task is not there.
        """
        if self.primary is not None and max(self.primary) >= n_tasks:
            raise ValueError(
                f"`primary` must be indices below {n_tasks}, the number of tasks, found "
                f"{self.primary}"
            )
        super().prepare(n_tasks, like)

    def _weights(self) -> Tensor:
        assert self.alpha is not None
        return self.alpha if self.param == "raw" else self.alpha.softmax(0)

    def step(self, evaluations: Evaluations) -> Tensor:
        """One step of λ; returns the weights `[T]`."""
        assert self.alpha is not None
        chosen = torch.zeros_like(self.alpha)
        chosen[slice(None) if self.primary is None else self.primary] = 1.0
        shift = evaluations.virtual_step(evaluations.gradient(self._weights()))
        with evaluations.moved(shift):
            v = evaluations.learning_rates() * evaluations.gradient(chosen, "validation")
        norm = length([v])
        if norm > 0.0:
            epsilon = self.fd_eps / norm
            with evaluations.moved(epsilon * v):
                ahead = evaluations.losses().double()
            with evaluations.moved(-epsilon * v):
                behind = evaluations.losses().double()
            gradient = (behind - ahead) / (2.0 * epsilon)
            if not bool(gradient.isfinite().all()):
                return self._weights()
            if self.param == "softmax":
                gradient = softmax_jacobian(self.alpha.to(gradient)) @ gradient
            self.train_alpha(gradient)
            if self.clamp_min is not None:
                self.alpha = self.alpha.clamp_min(self.clamp_min)
        return self._weights()
