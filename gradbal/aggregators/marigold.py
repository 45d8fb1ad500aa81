"""Zeroth-order bilevel gradient balancing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range, one_of
from gradbal.aggregators._gramians import as_weights
from gradbal.aggregators._simplex import SimplexStateMixin
from gradbal.aggregators.base import ClosureAggregator, Scalarizer
from gradbal.registry import Promises, register
from gradbal.solvers import project_simplex

if TYPE_CHECKING:
    from gradbal._closures import Evaluations

__all__ = ["Marigold", "marigold"]


@register(
    "marigold",
    title="Feed m Birds with One Scone: Accelerating Multi-task Gradient Balancing via Bi-level "
    "Optimization",
    venue="arXiv",
    year=2026,
    url="https://arxiv.org/abs/2603.07389",
    consumes="losses, here and at two other points",
    cost="1 backward, 2 forwards",
    promises=Promises(
        heads="weighted", degree=1, gain=lambda a, t, n: 1.0, simplex=True, zero_rows_inactive=False
    ),
)
class Marigold(SimplexStateMixin, ClosureAggregator, Scalarizer):
    """MGDA's weights by a zeroth-order method: one backward pass, however many tasks.

    After Chen et al., "Feed m Birds with One Scone: Accelerating Multi-task Gradient Balancing via
    Bi-level Optimization", arXiv 2026, https://arxiv.org/abs/2603.07389. **Derived, not quoted:**
    the algorithm below follows the idea of the abstract (balancing as a bilevel problem, solved by
    a zeroth-order method, without all tasks' gradients); its formulas and constants are gradbal's.

    The upper problem of MGDA, `min ½|Jᵀλ|²` over the probability simplex, has the gradient `J d`
    with `d = Jᵀλ`, the one gradient that a step takes anyway. Its T entries are directional
    derivatives of the transformed losses φ(ℓ_i) along d, which two forward passes give all at once:
    `q_i = (φ(ℓ_i(θ + δd)) − φ(ℓ_i(θ − δd)))/(2δ)`, `δ = ε(1 + |θ|)/|d|`. Then
    `s ← max(κs, max|q|)`, `λ ← Π(λ − γ(q/s + ρλ))`, Π the projection on the simplex.

    With frozen parameters and small γ, λ goes to MGDA's weights of the transformed losses. Where a
    displaced loss is not finite δ is halved once, and then λ stays as it is; it also stays where
    the gradient, or with "free" the learning rate, is zero. Upper problems other than MGDA's are
    left out.

    Call `step(closure)`: the two passes are on the same batch, from the same random state, without
    grad, and buffers (BatchNorm's statistics) are put back.

    Args:
        gamma: γ > 0, the step of λ.
        scale_decay: κ in (0, 1]; below 0.9999 λ oscillates near stationary points.
        rho: ρ ≥ 0, pulls λ towards equal weights.
        eps: ε > 0, the relative size of the displacement.
        transform: φ: "log", with which the scale of a loss does not matter, or "identity".
        step_rule: "simplex" as above, or "exp": `λ ∝ λ exp(−γ q/s)`.
        estimator: "central" as above; "forward": one more pass,
            `q = (φ(ℓ(θ)) − φ(ℓ(θ − δd)))/δ`; "free": none, from the optimizer's own step of
            learning rate η, `q = (φ(ℓ) − φ(ℓ'))/η`, with the closure once after the step or
            `update(losses_after)`.
        scope: displace the "shared" parameters, which matches MGDA, or "all".

    Raises:
        ValueError: an argument out of range; a loss that is not positive, with "log".

    Example:
        >>> import torch
        >>> Marigold().loss_weights(torch.tensor([1.0, 4.0]))
        tensor([0.5000, 0.1250])
    """

    state_names = ("simplex_weights", "scale", "before")

    def __init__(
        self,
        gamma: float = 0.05,
        scale_decay: float = 1.0,
        rho: float = 0.0,
        eps: float = 1e-3,
        transform: str = "log",
        step_rule: str = "simplex",
        estimator: str = "central",
        scope: str = "shared",
    ) -> None:
        in_range("gamma", gamma, 0, bounds="(]")
        in_range("scale_decay", scale_decay, 0, 1, bounds="(]")
        in_range("rho", rho, 0)
        in_range("eps", eps, 0, bounds="(]")
        one_of("transform", transform, ("log", "identity"))
        one_of("step_rule", step_rule, ("simplex", "exp"))
        one_of("estimator", estimator, ("central", "forward", "free"))
        one_of("scope", scope, ("shared", "all"))
        self.gamma = gamma
        self.scale_decay = scale_decay
        self.rho = rho
        self.eps = eps
        self.transform = transform
        self.step_rule = step_rule
        self.estimator = estimator
        self.scope = scope
        self.simplex_weights = None
        self.scale = 0.0
        self.before: Tensor | None = None

    @property
    def looks_around(self) -> bool:
        """For all estimators but "free"."""
        return self.estimator != "free"

    @property
    def looks_after(self) -> bool:
        """For the estimator "free"."""
        return self.estimator == "free"

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that T is as before, and that the losses after the last step have come.

        Raises:
            ValueError: one of them is not so.
        """
        super().prepare(n_tasks, like)
        if self.before is not None:
            raise ValueError(
                "'marigold' with estimator='free' needs the losses after each step: call "
                "step(closure), or update(losses) after step(); found neither since the last "
                "`backward`"
            )

    def loss_weights(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`λ_i φ'(ℓ_i) [T]`.

        Args:
            losses: `[T]`, or `[k]` when `tasks` names the k tasks that take part.
            tasks: indices of the tasks that take part; None for all.
        """
        losses = losses.detach()
        self._check_positive(losses, tasks)
        weights = self.taking_part(len(losses), tasks).to(losses.device, losses.dtype)
        if self.looks_after and tasks is None:
            self.before = losses.clone()
        return weights / losses if self.transform == "log" else weights

    def scalarize(self, losses: Tensor) -> Tensor:
        """`Σ λ_i φ(ℓ_i)`, 0-dim."""
        weights = self.taking_part(len(losses), None).to(losses)
        return (weights * (losses.log() if self.transform == "log" else losses)).sum()

    def look(self, evaluations: Evaluations, losses: Tensor) -> None:
        """Estimates `J d` from losses along `d = .grad`, and moves λ."""
        theta, norm = evaluations.lengths()
        if not 0.0 < norm < float("inf"):
            return
        delta = self.eps * (1.0 + theta) / norm
        for distance in (delta, 0.5 * delta):
            with evaluations.moved_along_gradient(-distance):
                behind = self._transformed(evaluations.losses())
            if self.estimator == "central":
                with evaluations.moved_along_gradient(distance):
                    ahead = self._transformed(evaluations.losses())
                q = (ahead - behind) / (2 * distance)
            else:
                q = (self._transformed(losses) - behind) / distance
            if bool(q.isfinite().all()):
                self.step(q)
                return

    def update(self, losses: Tensor) -> None:
        """With "free": moves λ by how far the losses `[T]` have fallen."""
        before, self.before = self.before, None
        if before is None or self.learning_rate == 0.0:
            return
        if self.learning_rate is None:
            raise ValueError(
                "'marigold' with estimator='free' needs the learning rate of the wrapped "
                "optimizer's first group as a number on the host, found none"
            )
        fall = self._transformed(before.to(losses.device)) - self._transformed(losses)
        q = fall / self.learning_rate
        if bool(q.isfinite().all()):
            self.step(q)

    def give_up(self) -> None:
        """The optimizer's step was left out."""
        self.before = None

    def step(self, q: Tensor) -> Tensor:
        """One step of λ; returns it, `[T]`.

        Args:
            q: `[T]`, an estimate of `J d`.
        """
        weights = self.taking_part(len(q), None)
        self.scale = max(self.scale_decay * self.scale, float(q.abs().max()))
        if self.scale > 0.0:
            weights = marigold(
                weights, q / self.scale, self.gamma, self.rho, step_rule=self.step_rule
            )
            self.keep(weights, None)
        return weights

    def _transformed(self, losses: Tensor) -> Tensor:
        wide = losses.detach().double()
        return wide.log() if self.transform == "log" else wide

    def _check_positive(self, losses: Tensor, tasks: Sequence[int] | None) -> None:
        if self.transform != "log" or losses.device.type != "cpu":
            return
        for k, value in enumerate(losses.tolist()):
            if value <= 0:
                task = k if tasks is None else tasks[k]
                raise ValueError(
                    f"'marigold' with transform='log' needs positive losses, found {value:g} for "
                    f"task {task}; add an offset to that loss or take transform='identity'"
                )

    def reset(self) -> None:
        """Equal weights."""
        super().reset()
        self.scale, self.before = 0.0, None


def marigold(
    weights: Tensor,
    q: Tensor,
    gamma: float = 0.05,
    rho: float = 0.0,
    *,
    step_rule: str = "simplex",
) -> Tensor:
    """`Π(λ − γ(q + ρλ))`, or `λ exp(−γq)` divided by its sum.

    Args:
        weights: `λ [T]` on the simplex.
        q: `[T]`, the estimate of `J d` in units of its scale s.
        gamma, rho, step_rule: see `Marigold`.

    Returns:
        `λ [T]`, dtype and device of `weights`.
    """
    v, g = (x.detach().to("cpu", torch.float64).numpy() for x in (weights, q))
    if step_rule == "exp":
        moved = v * np.exp(-gamma * (g - g.min()))
        return as_weights(moved / moved.sum(), weights)
    return as_weights(project_simplex(v - gamma * (g + rho * v)), weights)
