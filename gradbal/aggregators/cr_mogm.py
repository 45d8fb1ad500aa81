"""Smoothed weights for any method that has weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range, one_of, same_tasks
from gradbal.aggregators.base import Aggregator, GramianAggregator, Scalarizer
from gradbal.registry import Promises, create, register
from gradbal.solvers import ZERO_ROW

__all__ = ["CRMOGM", "cr_mogm"]


def _gain(aggregator: CRMOGM, n_tasks: int, norm: float) -> float:
    gain = aggregator.inner.promises.gain
    assert gain is not None
    return gain(aggregator.inner, n_tasks, norm)


@register(
    "cr_mogm",
    title="On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond",
    venue="NeurIPS",
    year=2022,
    url="https://openreview.net/forum?id=ScwfQ7hdwyP",
    consumes="as the method inside",
    promises=Promises(
        heads="weighted", degree=1, gain=_gain, simplex=True, zero_rows_inactive=False
    ),
)
class CRMOGM(GramianAggregator):
    """Another method with its weights averaged over the steps.

    Zhou et al., "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
    Beyond", NeurIPS 2022, https://openreview.net/forum?id=ScwfQ7hdwyP. With the weights ŵ_k of the
    method inside at step k, `w_k = a w_{k−1} + (1−a) ŵ_k`, `w_1 = ŵ_1`, and `d = Jᵀw_k`. Weights
    from one mini-batch are correlated with its noise, which can keep such methods from
    Pareto-stationary points; the average converges. Weights on the simplex stay there. That d
    conflicts with no task is not inherited.

    Args:
        inner: the method inside: a name, or an instance of a method that has weights from the
            Gramian or, without learnable ones, from the losses. A method of the losses alone then
            takes T backward passes too.
        a: in [0, 1]: 0 is the method inside as it is, 1 its first weights for ever; or "lr", for
            `a_k = 1 − lr_k/lr_1` with the wrapped optimizer's learning rates, 0 where that is
            above the first (the schedule of the paper's Corollary 1).
        options: hyperparameters of the method that `inner` names.

    Raises:
        TypeError: `inner` has no such weights; `options` beside an instance.
        ValueError: `a` out of range, or no learning rate for "lr"; another number of tasks than
            before.

    Note:
        Task-specific parameters get what the method inside gives them, with the averaged weights.
        Methods that do not depend on the scale of a loss (`nash_mtl`, `fairgrad`,
        `gradnorm_inverse`) have weights in proportion to `1/|g_i|`, whose average would be that of
        the smallest gradients: for these it is taken of `w_i |g_i|`, and divided by this step's
        `|g_i|`. A task that sits a step out keeps its average, and the first weight that a task
        has is the first of its average.

    Example:
        >>> import torch
        >>> method = CRMOGM("mgda", a=0.5)
        >>> method.direction(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        tensor([1., 1.])
        >>> method.direction(torch.tensor([[2.0, 0.0], [2.0, 2.0]]))
        tensor([2.0000, 0.5000])
    """

    per_task_state: ClassVar[bool] = True
    state_names = ("average", "head_average", "first_lr", "inner")
    _learning_rate: float | None = None

    def __init__(
        self,
        inner: str | Aggregator = "mgda",
        a: float | str = 0.9,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(a, str):
            one_of("a", a, ("lr",))
        else:
            in_range("a", a, 0, 1)
        self.a = a
        self.inner = _made(inner, options)
        mine = self.inner.promises
        self.promises = replace(
            mine,
            gain=None if mine.gain is None else _gain,
            non_conflicting=False,
            row_scale_invariant=False,
            linear_row_scaling=False,
            zero_rows_inactive=False,
        )
        self._n_tasks = 0
        self._forget()

    def _forget(self) -> None:
        # [T] or [K, T], NaN for tasks that have not had a weight yet; empty before the first step.
        self.average = torch.empty(0, dtype=torch.float64)
        self.head_average = torch.empty(0, dtype=torch.float64)
        self.first_lr: float | None = None
        self._head_weights: Tensor | None = None

    def hyperparameters(self) -> dict[str, Any]:
        """The name of the method inside, `a`, and the hyperparameters of the method inside."""
        return {"inner": self.inner.name, "a": self.a, "options": self.inner.hyperparameters()}

    # What is the method's inside.

    @property
    def learning_rate(self) -> float | None:
        """The wrapped optimizer's, of its first param group, at this step."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float | None) -> None:
        self._learning_rate = self.inner.learning_rate = value

    @property
    def needs_features(self) -> bool:
        """Whether the method inside works on gradients at a representation."""
        return self.inner.needs_features

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Notes T, and prepares the method inside.

        Raises:
            ValueError: T differs from before, or does not fit the method inside.
        """
        known = self.average.shape[-1]
        same_tasks(self.name, known, n_tasks)
        self.inner.prepare(n_tasks, like)
        self._n_tasks = n_tasks

    def end_epoch(self) -> None:
        """Passed on."""
        self.inner.end_epoch()

    def update(self, losses: Tensor) -> None:
        """Passed on."""
        self.inner.update(losses)

    def observe(self, losses: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Passed on."""
        self.inner.observe(losses, tasks)

    def reset(self) -> None:
        """No average, and the method inside as at first."""
        self._forget()
        self.inner.reset()

    def probed_parameters(self) -> list[Tensor] | None:
        """Those of the method inside."""
        return None if isinstance(self.inner, Scalarizer) else self.inner.probed_parameters()

    def column_groups(self, shapes: Sequence[torch.Size]) -> list[int] | None:
        """Those of the method inside."""
        return None if isinstance(self.inner, Scalarizer) else self.inner.column_groups(shapes)

    # Weights.

    def weights(
        self,
        gramian: Tensor,
        losses: Tensor | None = None,
        tasks: Sequence[int] | None = None,
    ) -> Tensor:
        """`w [T]`, averaged, from the Gramian `[T, T]` and the losses.

        Args:
            gramian: `[T, T]`, or `[k, k]` when `tasks` names the k tasks that take part.
            losses: `[T]` or `[k]` values, or None.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: T differs from before, or `a="lr"` has no learning rate.
        """
        share = self._begin(gramian, tasks)
        taking_part = self._taking_part(tasks)
        heads = fresh = None
        if isinstance(self.inner, Scalarizer):
            values = torch.ones_like(gramian[0]) if losses is None else losses
            fresh = self.inner.loss_weights(values, **taking_part)
        else:
            fresh = self.inner.weights(gramian, losses, **taking_part)
            heads = self.inner.head_weights(fresh, gramian)
        self._head_weights = None
        if heads is not None and heads is not fresh:
            self.head_average, found = self._mix(self.head_average, heads, gramian, share, tasks)
            self._head_weights = found.to(gramian)
        self.average, w = self._mix(self.average, fresh, gramian, share, tasks)
        return w.to(gramian)

    def group_weights(
        self,
        gramians: Tensor,
        losses: Tensor | None = None,
        tasks: Sequence[int] | None = None,
    ) -> Tensor:
        """`w [K, T]`, averaged, of K column groups, where the method inside has such.

        Args:
            gramians: `[K, T, T]`, or `[K, k, k]` when `tasks` names the k tasks that take part.
            losses: `[T]` or `[k]` values, or None.
            tasks: indices of the tasks that take part; None for all.
        """
        assert isinstance(self.inner, GramianAggregator)
        share = self._begin(gramians, tasks)
        fresh = self.inner.group_weights(gramians, losses, **self._taking_part(tasks))
        self.average, w = self._mix(self.average, fresh, gramians, share, tasks)
        return w.to(gramians)

    def head_weights(self, weights: Tensor, gramian: Tensor) -> Tensor:
        """`weights`; where the method inside has other ones for heads, the average of those."""
        return weights if self._head_weights is None else self._head_weights

    def _begin(self, gramian: Tensor, tasks: Sequence[int] | None) -> float:
        """The share a_k of the past; changes nothing."""
        if tasks is None:
            self.prepare(gramian.shape[-1], gramian)
        if not isinstance(self.a, str):
            return float(self.a)
        if self._learning_rate is None:
            raise ValueError(
                'a="lr" needs the learning rate of the wrapped optimizer, a number, found None; '
                "use MultiTaskOptimizer, or a fixed `a`"
            )
        first = self.first_lr or self._learning_rate
        return max(1.0 - self._learning_rate / first, 0.0) if first else 0.0

    def _taking_part(self, tasks: Sequence[int] | None) -> dict[str, Any]:
        return {"tasks": tasks} if tasks is not None and self.inner.per_task_state else {}

    def _mix(
        self,
        average: Tensor,
        fresh: Tensor,
        gramian: Tensor,
        share: float,
        tasks: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor]:
        """The new average, and this step's weights of the tasks that take part."""
        fresh = fresh.detach().to("cpu", torch.float64)
        if average.numel() == 0:
            average = average.new_full((*fresh.shape[:-1], self._n_tasks), float("nan"))
        average = average.cpu().clone()
        part = slice(None) if tasks is None else torch.tensor(tasks)
        norms = None
        if self.inner.promises.row_scale_invariant:
            norms = gramian.detach().to(fresh).diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        average[..., part], w = cr_mogm(average[..., part], fresh, share, norms=norms)
        if isinstance(self.a, str):
            self.first_lr = self.first_lr or self._learning_rate
        return average, w

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """As of every method, with the whole state of the method inside."""
        found = super().state_dict()
        found["state"]["inner"] = self.inner.state_dict()
        return found

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises ValueError, naming the difference, when `state_dict` is of another method, or has
        another one inside."""
        super().check_state_dict(state_dict)
        self.inner.check_state_dict(state_dict["state"]["inner"])

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over hyperparameters and state, also of the method inside.

        Raises:
            ValueError: the checkpoint is of another method; nothing was changed.
        """
        self.check_state_dict(state_dict)
        self.a = state_dict["hyperparameters"]["a"]
        state = state_dict["state"]
        self.average, self.head_average = state["average"].clone(), state["head_average"].clone()
        self.first_lr = state["first_lr"]
        self.inner.load_state_dict(state["inner"])


def cr_mogm(
    average: Tensor, fresh: Tensor, a: float, *, norms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`w_k = a w_{k−1} + (1−a) ŵ_k`.

    Args:
        average: `w_{k−1} [..., T]`, NaN where there is none yet.
        fresh: `ŵ_k [..., T]`.
        a: in [0, 1].
        norms: `[..., T]`, for weights in proportion to their inverse: then `average` is of
            `w_i |g_i|`, and that of a task whose norm is zero stays.

    Returns:
        The new average, and w_k.
    """
    scaled = fresh if norms is None else fresh * norms
    mixed = torch.where(average.isnan(), scaled, average.lerp(scaled, 1 - a))
    if norms is None:
        return mixed, mixed
    zero = norms <= ZERO_ROW * norms.amax(-1, keepdim=True)
    return torch.where(zero, average, mixed), torch.where(zero, fresh, mixed / norms)


def _made(
    inner: str | Aggregator, options: Mapping[str, Any] | None
) -> GramianAggregator | Scalarizer:
    if isinstance(inner, str):
        made = create(inner, **(options or {}))
    elif not isinstance(inner, Aggregator):
        raise TypeError(f"`inner` must be a name or an Aggregator, found {type(inner).__name__}")
    elif options:
        raise TypeError(
            f"`options` go with the name of a method, found {', '.join(options)} beside an instance"
        )
    else:
        made = inner
    if made.category not in ("gramian", "scalarizer"):
        raise TypeError(
            "`inner` must have weights from the Gramian or from the losses, found "
            f"{made.name or type(made).__name__!r}, a {made.category} method"
        )
    if made.param_groups():
        raise TypeError(
            f"`inner` must not have learnable weights, found {made.name or type(made).__name__!r}"
        )
    if not made.name:
        raise ValueError(
            "`inner` must be registered, so that a checkpoint can name it, found an instance of "
            f"{type(made).__name__}"
        )
    assert isinstance(made, GramianAggregator | Scalarizer)
    return made
