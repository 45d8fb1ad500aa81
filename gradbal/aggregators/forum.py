"""First-order multi-gradient bilevel optimization of loss weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range, integer
from gradbal.aggregators._gramians import symmetric_float64
from gradbal.aggregators._means import warn_endless
from gradbal.aggregators._meta import MetaMixin, softmax_jacobian
from gradbal.aggregators.base import BilevelAggregator
from gradbal.aggregators.mgda import mgda
from gradbal.jacobian import cross_gramian, gramian
from gradbal.registry import Promises, register
from gradbal.solvers import checked, simplex_qp

if TYPE_CHECKING:
    from gradbal._closures import Evaluations

__all__ = ["FORUM", "forum"]


@register(
    "forum",
    title="A First-Order Multi-Gradient Algorithm for Multi-Objective Bi-Level Optimization",
    venue="ECAI",
    year=2024,
    url="https://arxiv.org/abs/2401.09257",
    consumes="training and validation closures, epochs",
    cost="T + 5 backwards, 6 forwards",
    promises=Promises(heads="weighted", zero_rows_inactive=False),
)
class FORUM(MetaMixin, BilevelAggregator):
    """Validation losses descend together, while the training objective is kept near its optimum.

    Ye et al., "A First-Order Multi-Gradient Algorithm for Multi-Objective Bi-Level Optimization",
    ECAI 2024, https://arxiv.org/abs/2401.09257. Upper level: the validation losses `F_i(ω)`. Lower
    level: `f(α, ω) = Σ softmax(α)_i f_i(ω)`, training losses. That ω is a lower-level optimum is
    replaced by the constraint `q = f(α, ω) − f(α, ω_K) ≤ 0`, ω_K the end of K steps of SGD from ω,
    taken as constant. With the unit vectors `∇F_i`, λ on the probability simplex and ν ≥ 0 minimise
    `½|Σ λ_i ∇F_i + ν∇q|² − νφ|∇q|²`; then `λ̄ ← λ̄ + κ_e(λ − λ̄)`, `κ_e = (e + 1)^{−3/4}` in epoch
    e, `ν = max(0, Σ λ̄_i π_i)`, `π_i = φ − ⟨∇q, ∇F_i⟩/|∇q|²`, and
    `g = Σ λ̄_i ∇F_i + ν∇q`. Its α-part goes to Adam, its ω-part to the wrapped optimizer.

    Call `step(closure, val_closure)`, and `end_epoch()` after each epoch, or give `window`. All
    trained parameters are taken alike, heads too.

    Args:
        inner_lr: of the K steps; the official runs have 0.1, 0.01 for QM9.
        inner_steps: K ≥ 1.
        phi: φ ≥ 0, how fast the constraint is to fall: `⟨g, ∇q⟩ ≥ φ|∇q|²`.
        meta_lr: of α.
        window: None, where `end_epoch()` tells the epochs, or the number of steps that takes an
            epoch's place.

    Raises:
        ValueError: an argument out of range.
        RuntimeWarning: `end_epoch()` was not called in the first 10,000 steps.

    Note:
        The official code drops the ½ from the dual problem, adds the constraint
        `ν ≥ Σ λ_i π_i`, and starts λ̄ at zero; there is no option for that. Here the dual is solved
        as it stands, exactly, and λ̄ is on the simplex from the first step on, since `κ_0 = 1`. The
        K steps end early where a training loss leaves `1e5(1 + |f_i(ω)|)`.

    Example:
        >>> import torch
        >>> from gradbal import MultiTaskOptimizer
        >>> layer = torch.nn.Linear(2, 2)
        >>> def closure(x):
        ...     return lambda: list((layer(x) - 1).square().mean(0))
        >>> opt = MultiTaskOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), "forum")
        >>> losses = opt.step(closure(torch.randn(8, 2)), closure(torch.randn(8, 2)))
        >>> round(float(opt.aggregator.average.sum()), 6)
        1.0
    """

    state_names = ("alpha", "moments", "average", "epoch", "steps")

    def __init__(
        self,
        inner_lr: float = 0.1,
        inner_steps: int = 5,
        phi: float = 0.1,
        meta_lr: float = 1e-3,
        window: int | None = None,
    ) -> None:
        in_range("inner_lr", inner_lr, 0, bounds="(]")
        in_range("phi", phi, 0)
        in_range("meta_lr", meta_lr, 0)
        if isinstance(inner_steps, bool) or not isinstance(inner_steps, int) or inner_steps < 1:
            raise ValueError(f"`inner_steps` must be a positive integer, found {inner_steps!r}")
        if window is not None:
            integer("window", window, 1)
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.phi = phi
        self.meta_lr = meta_lr
        self.average: Tensor | None = None
        self.epoch = self.steps = 0
        self.window = window

    @property
    def gives_gradient(self) -> bool:
        """True."""
        return True

    def end_epoch(self) -> None:
        """The next steps move λ̄ less."""
        self.epoch += 1
        self.steps = 0

    def step(self, evaluations: Evaluations) -> Tensor:
        """One step of α; returns the ω-part of g, `[P]`."""
        assert self.alpha is not None
        p = self.alpha.softmax(0)
        values = evaluations.losses()
        omega = evaluations.gradient(p)
        inner_values = self._inner_losses(evaluations, p, omega, values)
        # ∂/∂α of Σ softmax(α)_i (f_i(ω) − f_i(ω_K)).
        meta = softmax_jacobian(self.alpha) @ (values - inner_values).to(self.alpha)
        upper = evaluations.jacobian("validation")
        norms = torch.linalg.vector_norm(upper.double(), dim=1).to(upper)
        upper = upper / torch.where(norms > 0, norms, 1.0)[:, None]
        dual = forum(
            gramian(upper),
            cross_gramian(upper, omega[None])[:, 0],
            float(meta.double().square().sum() + omega.double().square().sum()),
            self.phi,
        )
        kappa = (self.epoch + 1) ** -0.75
        before = dual.weights if self.average is None else self.average.to(dual.weights)
        self.average = before + kappa * (dual.weights - before)
        nu = max(0.0, float(self.average @ dual.pi))
        self.train_alpha(nu * meta)
        self._count_step()
        return self.average.to(upper) @ upper + nu * omega

    def _count_step(self) -> None:
        self.steps += 1
        if self.window is None and self.epoch == 0:
            warn_endless(self.name, self.steps, "`window`")
        if self.steps == self.window:
            self.end_epoch()

    def _inner_losses(
        self, evaluations: Evaluations, p: Tensor, omega: Tensor, values: Tensor
    ) -> Tensor:
        """`f_i(ω_K) [T]` after K steps of SGD on the training batch; fewer where they diverge."""
        shift, found = torch.zeros_like(omega), values
        gradient = omega
        for k in range(self.inner_steps):
            shift = shift - self.inner_lr * gradient
            with evaluations.moved(shift):
                if k + 1 < self.inner_steps:
                    there, gradient = evaluations.losses_and_gradient(p)
                else:
                    there = evaluations.losses()
            if not bool((there.abs() <= 1e5 * (1.0 + values.abs())).all()):
                break
            found = there
        return found

    def reset(self) -> None:
        """α and λ̄ as at first, epoch 0."""
        super().reset()
        self.average, self.epoch, self.steps = None, 0, 0


class _Dual(NamedTuple):
    """weights: `λ [T]` on the simplex. pi: `π [T]`, with which `ν = max(0, Σ λ_i π_i)`."""

    weights: Tensor
    pi: Tensor


def forum(upper: Tensor, inner: Tensor, size: float, phi: float) -> _Dual:
    """The minimiser of `½|Σ λ_i u_i + νh|² − νφ|h|²` over λ on the simplex and ν ≥ 0.

    For given λ the best ν is `max(0, Σ λ_i π_i)`, `π_i = φ − ⟨h, u_i⟩/|h|²`. If that is 0 at MGDA's
    weights of the u_i, they are the answer; else λ minimises what is left of the quadratic on the
    part of the u_i orthogonal to h, with the linear term `φ⟨h, u_i⟩`.

    Args:
        upper: `[T, T]`, the Gramian of the u_i.
        inner: `[T]`, `⟨h, u_i⟩`.
        size: `|h|²`.
        phi: φ ≥ 0.

    Returns:
        λ and π, float64 on the host; π is zero where h is.
    """
    g = symmetric_float64(upper)
    b = inner.detach().to("cpu", torch.float64).numpy()
    if not size > 0.0:
        return _Dual(mgda(torch.from_numpy(g)), torch.zeros(len(b), dtype=torch.float64))
    pi = phi - b / size
    w = mgda(torch.from_numpy(g)).numpy()
    if float(w @ pi) > 0.0 and g.any():
        h = g - np.outer(b, b) / size
        # In units of the rows' own lengths, of which a row parallel to h has nothing left.
        n = np.sqrt(np.maximum(np.diagonal(h), 1e-24 * np.diagonal(g).max()))
        y = checked(simplex_qp(h / n[:, None] / n, phi * b / n, 1.0 / n), "FORUM's dual problem")
        w = y / n
        w = w / w.sum()
    return _Dual(torch.from_numpy(w), torch.from_numpy(pi))
