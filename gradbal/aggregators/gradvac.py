"""Gradient Vaccine: corrections towards the cosines that the gradients usually have."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, sqrt
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from gradbal.aggregators._arguments import in_range, one_of, same_tasks
from gradbal.aggregators._gramians import as_weights, symmetric_float64
from gradbal.aggregators._mixins import RandomMixin
from gradbal.aggregators.base import GramianAggregator
from gradbal.aggregators.pcgrad import random_orders
from gradbal.jacobian import combine, gramian, wants_exact
from gradbal.registry import Promises, register
from gradbal.solvers import ZERO_ROW, Array

__all__ = ["GradVac", "gradvac"]

_GROUPS = ("model", "layer", "matrix")

_LEAST_SINE = 1e-4
"""Identical tasks reach the target cosine 1, whose sine is divided by."""

_FEW = 16
"""Up to this many gradients in all groups, plain floats are faster than arrays."""

_ROUNDING = 1e-14
"""Cosines this much apart are the same; a corrected gradient whose square is at most this part of
what it was is zero."""


@register(
    "gradvac",
    title="Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively "
    "Multilingual Models",
    venue="ICLR",
    year=2021,
    url="https://arxiv.org/abs/2010.05874",
    consumes="Gramian, by column group if wanted",
    promises=Promises(heads="own", degree=1, gain=lambda a, t, n: float(t), deterministic=False),
)
class GradVac(RandomMixin, GramianAggregator):
    """Turns each gradient towards the others, up to the cosine that they had on average so far.

    Wang et al., "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
    Multilingual Models", ICLR 2021, https://arxiv.org/abs/2010.05874. For each task i: g'_i = g_i;
    for every other task j in a fresh random order, with `φ = cos(g'_i, g_j)` and the target φ̂_ij,
    zero at first: if `φ < φ̂_ij`,
    `g'_i ← g'_i + |g'_i|(φ̂√(1−φ²) − φ√(1−φ̂²))/(|g_j|√(1−φ̂²)) g_j`, after which the cosine is
    φ̂_ij; then `φ̂_ij ← (1−β)φ̂_ij + βφ`, whether there was a correction or not. `d = Σ g'_i`. With
    φ̂ = 0, as at the first step, it is `pcgrad`.

    Args:
        beta: β in (0, 1]; 0.01 in the paper.
        groups: what has targets and corrections of its own: the whole "model"; each "matrix", that
            is each shared parameter; each "layer", a parameter of two or more dimensions and those
            of fewer (biases, norms) that follow it; or a list of numbers of columns of the
            Jacobian, which add up to all of them.
        generator: a CPU generator for the orders; None makes one seeded from
            `torch.initial_seed()`.

    Raises:
        ValueError: an argument out of range; the number of tasks or groups changes; `groups` that
            need parameters' shapes where there is only a Jacobian.

    Note:
        TorchJD and LibMTL have β = 0.5. Other codes differ in what they measure: some move the
        targets only where a correction was made, some count as layers only modules without
        children. The paper's pseudo-code draws an order for each group; here, as in LibMTL, all
        groups share the order of a task. Where g'_i or g_j is zero there is no correction, and the
        target stays.

    Example:
        >>> import torch
        >>> method = GradVac(beta=0.5)
        >>> method.direction(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        tensor([2., 1.])
        >>> method.target[0, 0, 1]  # half of cos 45°
        tensor(0.3536, dtype=torch.float64)
    """

    per_task_state: ClassVar[bool] = True
    state_names = ("target", "generator")

    def __init__(
        self,
        beta: float = 0.01,
        groups: str | Sequence[int] = "model",
        generator: Generator | None = None,
    ) -> None:
        in_range("beta", beta, 0, 1, bounds="(]")
        if isinstance(groups, str):
            one_of("groups", groups, _GROUPS)
        elif not _are_widths(groups):
            raise ValueError(
                f"`groups` must be one of {', '.join(map(repr, _GROUPS))}, or positive numbers of "
                f"columns, found {groups!r}"
            )
        self.beta = beta
        self.groups = groups if isinstance(groups, str) else list(groups)
        self._own(generator)
        # [K, T, T], empty until the first step.
        self.target = torch.zeros(0, 0, 0, dtype=torch.float64)
        self._n_tasks = 0

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Notes T.

        Raises:
            ValueError: it differs from before.
        """
        if len(self.target):
            same_tasks(self.name, self.target.shape[1], n_tasks)
        self._n_tasks = n_tasks

    def reset(self) -> None:
        """All targets are zero again, and the generator is where it was at first."""
        super().reset()
        self.target = torch.zeros(0, 0, 0, dtype=torch.float64)

    def column_groups(self, shapes: Sequence[torch.Size]) -> list[int] | None:
        """The widths of the groups; None for "model".

        Raises:
            ValueError: given numbers of columns do not add up to all of them.
        """
        if self.groups == "model":
            return None
        sizes = [shape.numel() for shape in shapes]
        if isinstance(self.groups, list):
            return self._widths(sum(sizes))
        if self.groups == "matrix":
            return sizes
        widths: list[int] = []
        for shape, size in zip(shapes, sizes, strict=True):
            if len(shape) >= 2 or not widths:
                widths.append(size)
            else:
                widths[-1] += size
        return widths

    def weights(
        self,
        gramian: Tensor,
        losses: Tensor | None = None,
        tasks: Sequence[int] | None = None,
    ) -> Tensor:
        """`w [T]` from the Gramian `[T, T]`, for a single group; every weight is at least 1.

        Args:
            gramian: `[T, T]`, or `[k, k]` when `tasks` names the k tasks that take part.
            losses: not used.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: there are groups, or T differs from before.
        """
        if self.groups != "model":
            raise ValueError(
                f"`groups` must be 'model' where there is one Gramian, found {self.groups!r}"
            )
        return self._step([gramian], tasks)[0]

    def group_weights(
        self,
        gramians: Tensor,
        losses: Tensor | None = None,
        tasks: Sequence[int] | None = None,
    ) -> Tensor:
        """`w [K, T]` of K column groups.

        Args:
            gramians: `[K, T, T]`, or `[K, k, k]` when `tasks` names the k tasks that take part.
            losses: not used.
            tasks: indices of the tasks that take part; None for all.

        Raises:
            ValueError: T or K differs from before.
        """
        return self._step(gramians.unbind(), tasks)

    def _step(self, gramians: Sequence[Tensor], tasks: Sequence[int] | None) -> Tensor:
        size = len(gramians[0])
        if tasks is None:
            self.prepare(size, gramians[0])
        target = self.target
        if len(target) == 0:
            target = target.new_zeros(len(gramians), self._n_tasks, self._n_tasks)
        elif len(target) != len(gramians):
            raise ValueError(f"`gradvac` has {len(target)} groups, found {len(gramians)}")
        orders = random_orders(size, self.generator)
        if tasks is None:
            w, self.target = gradvac(gramians, target, orders, beta=self.beta)
            return w
        present = torch.tensor(tasks)
        block = (slice(None), present[:, None], present)
        w, moved = gradvac(gramians, target[block], orders, beta=self.beta)
        self.target = target.clone()
        self.target[block] = moved
        return w

    def direction(self, jacobian: Tensor, losses: Tensor | None = None) -> Tensor:
        """`d [P]`: in each group of columns the combination with the group's weights.

        Raises:
            ValueError: the groups depend on shapes, or do not add up to P.
        """
        if self.groups == "model":
            return super().direction(jacobian, losses)
        if isinstance(self.groups, str):
            raise ValueError(
                f"groups={self.groups!r} needs the shapes of the parameters, found a Jacobian "
                "alone; use MultiTaskOptimizer, or a list of numbers of columns"
            )
        parts = torch.split(jacobian, self._widths(jacobian.shape[1]), 1)
        grams = [gramian(part).cpu() for part in parts]
        if any(wants_exact(g, part) for g, part in zip(grams, parts, strict=True)):
            grams = [gramian(part, exact=True).cpu() for part in parts]
        grouped = self.group_weights(torch.stack(grams), losses)
        return torch.cat([combine(w, part) for w, part in zip(grouped, parts, strict=True)])

    def _widths(self, n_columns: int) -> list[int]:
        widths = [int(n) for n in self.groups]
        if sum(widths) != n_columns:
            raise ValueError(
                f"`groups` must add up to {n_columns} columns, found {sum(widths)} in {widths}"
            )
        return widths


def _are_widths(groups: object) -> bool:
    return (
        isinstance(groups, Sequence)
        and len(groups) > 0
        and all(type(n) is int and n > 0 for n in groups)
    )


def gradvac(
    gramians: Sequence[Tensor] | Tensor, target: Tensor, orders: Tensor, *, beta: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Weights of the sum of the corrected gradients, and the targets after it.

    Args:
        gramians: `[T, T]`, one for each of K groups of columns.
        target: `φ̂ [K, T, T]`, in [-1, 1].
        orders: `[T, T − 1]`; row i lists the other tasks in the order in which i is corrected.
        beta: β in (0, 1].

    Returns:
        `w [K, T]`, dtype and device of the Gramians: zero for zero rows, 1 everywhere in a group
        where all are zero; and the new `φ̂ [K, T, T]`, float64 on the host.
    """
    if len(gramians) * len(gramians[0]) > _FEW:
        matrices = np.stack([symmetric_float64(g) for g in gramians])
        hat = target.to("cpu", torch.float64).numpy()
        w, moved = _by_steps(matrices, hat, orders.cpu().numpy(), beta)
    else:
        met = orders.tolist()
        groups = zip(gramians, target.tolist(), strict=True)
        found = [_by_pairs(_floats(g), hat, met, beta) for g, hat in groups]
        w, moved = np.array([f[0] for f in found]), np.array([f[1] for f in found])
    return as_weights(w, gramians[0]), torch.from_numpy(moved)


def _floats(gramian: Tensor) -> list[list[float]]:
    """The rows; what is wrong with them is found, and said, by `symmetric_float64`."""
    if gramian.dim() == 2:
        rows: list[list[float]] = gramian.tolist()
        if rows and len(rows) == len(rows[0]) and isfinite(sum(map(sum, rows))):
            return rows
    return symmetric_float64(gramian).tolist()  # type: ignore[no-any-return]


def _by_pairs(
    g: list[list[float]], target: list[list[float]], orders: list[list[int]], beta: float
) -> tuple[list[float], list[list[float]]]:
    """`w [T]` and the moved `φ̂ [T, T]` of one group, one pair of tasks at a time."""
    n = [sqrt(max(row[i], 0.0)) for i, row in enumerate(g)]
    least = ZERO_ROW * max(n)
    if least == 0.0:
        return [1.0] * len(n), target
    w = [1.0 if x > least else 0.0 for x in n]
    active = w.copy()
    for i, order in enumerate(orders):
        if not active[i]:
            continue
        # g'_i = g_i + Σ_k shift_k g_k
        row, square, hat = g[i], g[i][i], target[i]
        shifts: list[tuple[int, float]] = []
        zero = _ROUNDING * square
        for j in order:
            if not active[j] or square <= zero:
                continue
            product = row[j]
            for k, shift in shifts:
                product += shift * g[k][j]
            length, wanted = n[j], hat[j]
            along = product / length
            cosine = min(max(along / sqrt(square), -1.0), 1.0)
            hat[j] = (1.0 - beta) * wanted + beta * cosine  # rounded, still in [-1, 1]
            if cosine < wanted - _ROUNDING:
                across = max(square - along * along, 0.0)
                sine = sqrt(1.0 - wanted * wanted)
                turn = (wanted * sqrt(across) - along * sine) / max(sine, _LEAST_SINE)
                w[j] += turn / length
                shifts.append((j, turn / length))
                square = across + (along + turn) ** 2
                zero = max(zero, _ROUNDING * square)
    return w, target


def _by_steps(
    g: Array, target: Array, orders: NDArray[np.int64], beta: float
) -> tuple[Array, Array]:
    """`w [K, T]` and the moved `φ̂ [K, T, T]`: as `_by_pairs`, all groups and tasks together."""
    squares = np.maximum(np.diagonal(g, axis1=1, axis2=2), 0.0)
    n = np.sqrt(squares)
    active = n > ZERO_ROW * n.max(1, keepdims=True)
    n = np.where(active, n, 1.0)
    squares, products, a = np.where(active, squares, 0.0), g.copy(), np.zeros_like(g)
    zero = _ROUNDING * squares
    tasks = np.arange(g.shape[1])
    a[:, tasks, tasks] = active
    # Every pair is met once, so the targets of all steps can be read before any moves.
    hat = target[:, tasks[:, None], orders]
    sine = np.sqrt(1.0 - hat * hat)
    divisor = np.maximum(sine, _LEAST_SINE)
    moved = hat.copy()
    for step, j in enumerate(orders.T):
        wanted, length = hat[:, :, step], n[:, j]
        along = products[:, tasks, j] / length
        counts = active[:, j] & (squares > zero)
        cosine = along / np.sqrt(np.where(counts, squares, 1.0))
        cosine = np.minimum(np.maximum(cosine, -1.0), 1.0)
        moved[:, :, step] = np.where(counts, (1.0 - beta) * wanted + beta * cosine, wanted)
        low = counts & (cosine < wanted - _ROUNDING)
        if not low.any():
            continue
        across = np.maximum(squares - along * along, 0.0)
        turn = (wanted * np.sqrt(across) - along * sine[:, :, step]) / divisor[:, :, step]
        shift = np.where(low, turn, 0.0) / length
        a[:, tasks, j] += shift
        products += shift[:, :, None] * g[:, j]
        squares = np.where(low, across + (along + turn) ** 2, squares)
        zero = np.maximum(zero, _ROUNDING * squares)
    w = a.sum(1)
    w[~active.any(1)] = 1.0
    result = target.copy()
    result[:, tasks[:, None], orders] = moved
    return w, result
