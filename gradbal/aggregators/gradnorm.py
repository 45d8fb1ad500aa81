"""Gradient normalisation: weights that learn to let all tasks train at similar rates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from gradbal.aggregators._arguments import in_range, one_of, preference, same_tasks
from gradbal.aggregators._gramians import symmetric_float64
from gradbal.aggregators._means import warn_endless
from gradbal.aggregators.base import GramianAggregator
from gradbal.registry import Promises, register

__all__ = ["GradNorm", "gradnorm"]

_FIRST_DECAY, _SECOND_DECAY = 0.9, 0.999
"""Adam's defaults."""

_LEAST_WEIGHT = 1e-6

_ROUNDING = 1e-12
"""Adam makes a full step of the smallest gradient, so what is only rounding has to be zero."""


@register(
    "gradnorm",
    title="GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks",
    venue="ICML",
    year=2018,
    url="https://arxiv.org/abs/1711.02257",
    consumes="losses, gradient norms of chosen layers",
    cost="T backwards; with `layer`, T of that layer and 1",
    promises=Promises(
        heads="weighted",
        degree=1,
        gain=lambda a, t, n: float(t),
        zero_rows_inactive=False,
    ),
)
class GradNorm(GramianAggregator):
    """Learns weights under which no gradient dominates and slow tasks get larger ones.

    Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
    Networks", ICML 2018, https://arxiv.org/abs/1711.02257. With the norms `m_i = |∇_W ℓ_i|` at a
    layer W, `G_i = w_i m_i`, their mean Ḡ, the training rates `r_i`, which are `ℓ_i/ℓ_i(0)` over
    the mean of these, and the targets `c_i = Ḡ r_i^α`, taken as constants, the weights follow
    `Σ |G_i − c_i|`, whose derivative is `sign(G_i − c_i) m_i`, by one step of Adam; then
    `w_i ≥ 1e-6` and `Σ w_i = T`. `d = Σ w_i g_i`, with the weights from before their step.

    Args:
        alpha: α in [0, 3], how strongly slow tasks are favoured; 1.5 in the paper, and 0.12 where
            its tasks are alike. With 0 all `w_i m_i` become equal.
        lr: learning rate of the weights' Adam, 0.025.
        layer: W, a tensor or an iterable of tensors: the last shared layer in the paper, as in
            `model.trunk[-1].parameters()`. Then T short backward passes end there, and one ordinary
            pass of `Σ w_i ℓ_i` follows. None takes all shared parameters. It is not part of a
            checkpoint.
        initial_loss: what ℓ_i(0) is: the "first" loss; the mean over the first "epoch", with
            uniform weights until `end_epoch()`; or positive numbers, one for each task, such as
            log K for the cross-entropy of K classes.
        param: what Adam steps on: "simplex", w itself (the paper), or "softmax", s in
            `w = T softmax(s)`.

    Raises:
        ValueError: an argument out of range; a negative loss; another number of tasks than before.

    Note:
        Where ℓ_i(0) is zero, or all norms or all losses are, the weights stay. LibMTL takes the
        norms over all shared parameters, has s in the main optimizer, with its learning rate and
        weight decay, keeps uniform weights for the first epoch, and leaves the weights off
        task-specific parameters. SamsungLabs takes α = 2. Here Adam has no ε, so that the scale of
        the losses does not matter.

    Example:
        >>> import torch
        >>> method = GradNorm()
        >>> method.direction(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([4., 1.])
        >>> method.direction(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([3.9000, 1.0250])
    """

    per_task_state: ClassVar[bool] = True
    state_names = ("w", "adam", "initial", "first_epoch_over")
    unsaved = ("layer",)

    def __init__(
        self,
        alpha: float = 1.5,
        lr: float = 0.025,
        layer: Tensor | Iterable[Tensor] | None = None,
        initial_loss: str | Sequence[float] = "first",
        param: str = "simplex",
    ) -> None:
        in_range("alpha", alpha, 0, 3)
        in_range("lr", lr, 0)
        one_of("param", param, ("simplex", "softmax"))
        self.alpha = alpha
        self.lr = lr
        self.layer = None if layer is None else _tensors(layer)
        self.initial_loss = _initial_loss(initial_loss)
        self.param = param
        self._n_tasks = 0
        self.reset()

    def reset(self) -> None:
        """Back to equal weights, with no initial losses."""
        self.w = torch.empty(0, dtype=torch.float64)
        # Adam's two moments and number of steps; the sum and the number of the initial losses.
        self.adam = torch.empty(3, 0, dtype=torch.float64)
        self.initial = torch.empty(2, 0, dtype=torch.float64)
        self.first_epoch_over = False

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Notes T.

        Raises:
            ValueError: it differs from before, or from the number of initial losses.
        """
        same_tasks(self.name, self.w.numel(), n_tasks)
        if not isinstance(self.initial_loss, str):
            preference("initial_loss", self.initial_loss, n_tasks, 1.0)
        self._n_tasks = n_tasks

    def end_epoch(self) -> None:
        """With initial_loss="epoch", the first one that had a step gives the initial losses."""
        self.first_epoch_over = self.first_epoch_over or self.w.numel() > 0

    def probed_parameters(self) -> list[Tensor] | None:
        """The tensors of `layer`."""
        return self.layer

    def weights(
        self,
        gramian: Tensor,
        losses: Tensor | None = None,
        tasks: Sequence[int] | None = None,
    ) -> Tensor:
        """`w [T]`, positive with sum T, of this step; the next ones follow from what it shows.

        Args:
            gramian: `[T, T]` at the layer, or `[k, k]` when `tasks` names the k tasks that take
                part.
            losses: `[T]` or `[k]`, not negative; None is all ones.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: a negative loss, or T differs from before.
        """
        m = _norms(gramian)
        values = torch.ones_like(m) if losses is None else losses.detach().to("cpu", m.dtype)
        if tasks is None:
            self.prepare(len(m), gramian)
        part = torch.arange(len(m)) if tasks is None else torch.tensor(tasks)
        for task, value in zip(part.tolist(), values.tolist(), strict=True):
            if not value >= 0:
                raise ValueError(
                    f"GradNorm needs losses that are not negative, found {value:g} for the task of "
                    f"index {task}; add an offset to that loss"
                )
        if self.w.numel() == 0:
            self._begin()
        w = self.w.cpu()[part]
        in_first_epoch = self.initial_loss == "epoch" and not self.first_epoch_over
        initial = self.initial.cpu().clone()
        new = part if in_first_epoch else part[initial[1, part] == 0]
        initial[:, new] += torch.stack([values, torch.ones_like(values)])[:, torch.isin(part, new)]
        self.initial = initial
        if in_first_epoch:
            warn_endless(self.name, int(initial[1].max()), "initial_loss='first'")
        if not in_first_epoch:
            self._adapt(gramian, values / (initial[0] / initial[1])[part], part)
        return w.to(gramian)

    def _begin(self) -> None:
        n_tasks = self._n_tasks
        self.w = torch.ones(n_tasks, dtype=torch.float64)
        self.adam = torch.zeros(3, n_tasks, dtype=torch.float64)
        self.initial = torch.zeros(2, n_tasks, dtype=torch.float64)
        if not isinstance(self.initial_loss, str):
            self.initial[0] = torch.tensor(self.initial_loss, dtype=torch.float64)
            self.initial[1] = 1.0

    def _adapt(self, gramian: Tensor, ratios: Tensor, part: Tensor) -> None:
        """One step of the weights in `part`, whose sum stays, from `ℓ_i/ℓ_i(0)`."""
        mean = ratios.mean()
        if not (ratios.isfinite().all() and mean > 0 and gramian.diagonal().any()):
            return
        w, adam = self.w.cpu().clone(), self.adam.cpu().clone()
        mine = w[part]
        gradient = gradnorm(gramian, mine, ratios / mean, alpha=self.alpha)
        if self.param == "softmax":
            gradient = mine * (gradient - gradient @ mine / mine.sum())
        first, second, n_steps = adam[:, part]
        n_steps = n_steps + 1
        first = first.lerp(gradient, 1 - _FIRST_DECAY)
        second = second.lerp(gradient.square(), 1 - _SECOND_DECAY)
        adam[:, part] = torch.stack([first, second, n_steps])
        spread = (second / (1 - _SECOND_DECAY**n_steps)).sqrt()
        step = self.lr * first / (1 - _FIRST_DECAY**n_steps) / spread
        step[second == 0] = 0.0
        # With w = T softmax(s), a step of s multiplies w.
        moved = mine - step if self.param == "simplex" else mine * torch.exp(-step)
        moved.clamp_(min=_LEAST_WEIGHT)
        w[part] = moved * ((len(w) - (w.sum() - mine.sum())) / moved.sum())
        self.w, self.adam = w, adam


def gradnorm(gramian: Tensor, w: Tensor, rates: Tensor, *, alpha: float = 1.5) -> Tensor:
    """`∂L/∂w_i = sign(G_i − c_i) m_i` of `L = Σ |G_i − c_i|`, `G_i = w_i m_i`, `c_i = Ḡ r_i^α`.

    Args:
        gramian: `[T, T]`, of which the diagonal `m_i²` counts.
        w: `[T]`, positive.
        rates: `r [T]`, not negative, with mean one.
        alpha: α in [0, 3].

    Returns:
        `[T]`, float64 on the host; zero where G_i is c_i up to rounding.
    """
    m = _norms(gramian)
    sizes = w.to(m) * m
    wanted = sizes.mean() * rates.to(m) ** alpha
    gap = sizes - wanted
    gap[gap.abs() <= _ROUNDING * torch.maximum(sizes, wanted)] = 0.0
    return gap.sign() * m


def _norms(gramian: Tensor) -> Tensor:
    return torch.from_numpy(np.sqrt(np.maximum(np.diagonal(symmetric_float64(gramian)), 0.0)))


def _tensors(layer: Tensor | Iterable[Tensor]) -> list[Tensor]:
    found = [layer] if isinstance(layer, Tensor) else None
    if found is None and isinstance(layer, Iterable):
        found = list(layer)
    if not found or not all(isinstance(t, Tensor) for t in found):
        raise TypeError(
            "`layer` must be a tensor or an iterable of tensors, such as "
            f"model.trunk[-1].parameters(), found {layer!r}"
        )
    frozen = sum(1 for t in found if not t.requires_grad)
    if frozen:
        raise ValueError(f"`layer` must require grad, found {frozen} of {len(found)} that do not")
    return found


def _initial_loss(value: str | Sequence[float]) -> str | list[float]:
    if isinstance(value, str):
        one_of("initial_loss", value, ("first", "epoch"))
        return value
    numbers: list[float] = preference("initial_loss", value, None, 1.0).tolist()
    if not numbers or not all(x > 0 for x in numbers):
        raise ValueError(f"`initial_loss` must be positive, found {numbers}")
    return numbers
