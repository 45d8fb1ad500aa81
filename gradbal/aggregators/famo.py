"""Fast adaptive multitask optimization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradbal.aggregators._adam import Moments, adam_step
from gradbal.aggregators._arguments import in_range, one_of, same_tasks
from gradbal.aggregators._scalar import check_length, of_tasks
from gradbal.aggregators.base import ClosureAggregator, Scalarizer
from gradbal.registry import Promises, register

__all__ = ["FAMO", "famo"]


@register(
    "famo",
    title="FAMO: Fast Adaptive Multitask Optimization",
    venue="NeurIPS",
    year=2023,
    url="https://arxiv.org/abs/2306.03792",
    consumes="losses, and again after the step",
    cost="1 backward, 1 forward",
    promises=Promises(
        heads="weighted", degree=1, gain=lambda a, t, n: 1.0, simplex=True, zero_rows_inactive=False
    ),
)
class FAMO(ClosureAggregator, Scalarizer):
    """Weights that make all losses fall at the same relative rate, from losses alone.

    Liu et al., "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023,
    https://arxiv.org/abs/2306.03792. With logits ξ, `z = softmax(ξ)` and `D_i = ℓ_i − b_i`, the
    objective is `c Σ z_i log D_i` with `c = 1/Σ(z_i/D_i)` held fixed: losses are weighted by
    `c z_i/D_i`, on the probability simplex. After the optimizer's step, with the losses of the same
    batch again, `ξ` takes an Adam step along `(diag(z) − zzᵀ)(log D − log D')`.

    Either `step(closure)`: the closure is evaluated once more, without grad. Or `backward(losses)`,
    `step()`, `update(losses_after)`. Or `lazy=True`: the next batch's losses count as the losses
    after the step.

    Args:
        lr: of the logits.
        gamma: weight decay of the logits; the official runs have 0.001 to 0.01.
        min_losses: b, one number or one for each task, below every loss.
        lazy: see above.

    Raises:
        ValueError: an argument out of range; a loss that is not above its bound; two calls of
            `backward` without the losses in between.

    Note:
        The official code adds 1e-8 to D, which here has to be positive. LibMTL's second forward
        moves BatchNorm's statistics and draws other dropout masks; here the closure is evaluated
        from the same random state and buffers are put back. The official class clips the shared
        gradient to norm 1; use `clip_grad_norm_` for that.

    Example:
        >>> import torch
        >>> FAMO().loss_weights(torch.tensor([1.0, 3.0]))
        tensor([0.7500, 0.2500])
    """

    per_task_state = True
    state_names = ("logits", "moments", "before")

    def __init__(
        self,
        lr: float = 0.025,
        gamma: float = 1e-3,
        min_losses: float | Sequence[float] = 0.0,
        lazy: bool = False,
    ) -> None:
        in_range("lr", lr, 0)
        in_range("gamma", gamma, 0)
        one_of("lazy", lazy, (False, True))
        for bound in [min_losses] if isinstance(min_losses, int | float) else min_losses:
            in_range("min_losses", bound)
        self.lr = lr
        self.gamma = gamma
        self.min_losses: float | list[float] = (
            min_losses if isinstance(min_losses, int | float) else list(min_losses)
        )
        self.lazy = lazy
        self.logits: Tensor | None = None
        self.moments: Moments | None = None
        self.before: Tensor | None = None
        self._n_tasks = 0

    @property
    def looks_after(self) -> bool:
        """Unless lazy."""
        return not self.lazy

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks T, and that the losses after the last step have come.

        Raises:
            ValueError: T differs from before or from the number of bounds; the losses after the
                last step have not come.
        """
        self._check(n_tasks)
        self._n_tasks = n_tasks
        if self.before is not None and not self.lazy:
            raise ValueError(
                "'famo' needs the losses after each step: call step(closure), or "
                "update(losses) after step(), or take lazy=True; found neither since the last "
                "`backward`"
            )

    def _check(self, n_tasks: int) -> None:
        if isinstance(self.min_losses, list):
            check_length("min_losses", self.min_losses, n_tasks)
        if self.logits is not None:
            same_tasks(self.name, len(self.logits), n_tasks)

    def _current(self, like: Tensor) -> Tensor:
        """ξ `[T]`, made if need be, on the device of `like`."""
        if self.logits is None:
            dtype = torch.promote_types(like.dtype, torch.float32)
            n_tasks = self._n_tasks or len(like)
            self.logits = torch.zeros(n_tasks, dtype=dtype, device=like.device)
        return self.logits.to(like.device)

    def _above(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """D `[T]` or `[k]`."""
        if tasks is None:
            self._check(len(losses))
        bounds: float | Tensor
        if isinstance(self.min_losses, list):
            bounds = of_tasks("min_losses", self.min_losses, losses, tasks)
        else:
            bounds = float(self.min_losses)
        above = losses - bounds
        if losses.device.type == "cpu":
            # Elsewhere the NaN of the logarithm is found, without waiting for the device.
            for k, value in enumerate(above.tolist()):
                if value <= 0:
                    task = k if tasks is None else tasks[k]
                    raise ValueError(
                        f"'famo' needs losses above `min_losses`, found {float(losses[k]):g} for "
                        f"task {task}; add an offset to that loss or lower its bound"
                    )
        return above

    def loss_weights(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`ŵ [T]` on the simplex; remembers D for the losses after the step.

        Args:
            losses: `[T]`, or `[k]` when `tasks` names the k tasks that take part.
            tasks: indices of the tasks that take part; None for all.
        """
        above = self._above(losses.detach(), tasks)
        if self.lazy and self.before is not None:
            self._learn(above, tasks)
        logits = self._current(above)
        whole = torch.full_like(logits, float("nan"))
        index = slice(None) if tasks is None else list(tasks)
        whole[index] = above.to(whole)
        self.before = whole
        return famo(above, logits[index])

    def scalarize(self, losses: Tensor) -> Tensor:
        """`c Σ z_i log D_i`, c without a gradient; 0-dim."""
        z = self._current(losses).to(losses).softmax(0)
        above = self._above(losses)
        return (z * above.log()).sum() / (z / above.detach()).sum()

    def update(self, losses: Tensor) -> None:
        """One step of the logits, from the losses `[T]` after the optimizer's step."""
        if self.before is not None:
            self._learn(self._above(losses.detach()), None)

    def step(self, before: Tensor, after: Tensor) -> Tensor:
        """Weights from the losses `[T]` before a step, and a step of the logits from those after.

        Returns:
            `ŵ [T]`.
        """
        w = self.loss_weights(before)
        self.update(after)
        return w

    def give_up(self) -> None:
        """The optimizer's step was left out."""
        self.before = None

    def _learn(self, after: Tensor, tasks: Sequence[int] | None) -> None:
        assert self.logits is not None
        assert self.before is not None
        index = slice(None) if tasks is None else list(tasks)
        logits = self.logits.to(after.device)
        fall = torch.full_like(logits, float("nan"))
        fall[index] = (self.before.to(fall)[index].log() - after.log()).to(fall)
        # Tasks that sat out, before or after, do not count.
        seen = fall.isfinite()
        z = logits.masked_fill(~seen, float("-inf")).softmax(0).nan_to_num()
        fall = fall.where(seen, 0.0)
        gradient = z * (fall - (z * fall).sum())
        moved, self.moments = adam_step(
            logits, gradient, self.moments, lr=self.lr, weight_decay=self.gamma
        )
        self.logits = moved.where(seen, logits)
        self.before = None

    def reset(self) -> None:
        """Equal logits, and no losses to compare with."""
        self.logits = self.moments = self.before = None


def famo(above: Tensor, logits: Tensor) -> Tensor:
    """`ŵ_i ∝ z_i/D_i`, `z = softmax(ξ)`.

    Args:
        above: `D [T]`, the losses above their bounds, positive.
        logits: `ξ [T]`.

    Returns:
        `ŵ [T]` on the simplex, in the losses' dtype and on their device.
    """
    # By logarithms: neither tiny nor huge losses leave the floating-point range.
    return (logits - above.to(logits).log()).softmax(0).to(above.dtype)
