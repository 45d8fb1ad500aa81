"""Gradient descent from several starting points at once.

Losses, Jacobians, Gramians and Adam are arrays over all trajectories, and nothing is walked by
autograd: thousands of steps of two numbers each are otherwise spent in the overhead of single
calls. Each trajectory has its own aggregator, and goes where `MultiTaskOptimizer(Adam([x]),
method)` would take it. What is left is the methods' own time, and that is least where one method
runs at a time: code that takes turns with other code at every step has left the cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import gradbal
from benchmarks.errors import one_line
from benchmarks.toy.evaluations import ToyEvaluations
from benchmarks.toy.problem import Array, Toy
from benchmarks.toy.settings import Contestant, Setting
from gradbal.aggregators.base import BilevelAggregator, DoubleSamplingAggregator

__all__ = ["NEAR", "Path", "Runner", "descend", "from_all_starts"]

NEAR = 0.5
"""The gap, in percent, below which a point counts as on the front."""

_POINTS = 400
"""How many points of a trajectory are kept, at most."""

_CHUNK = 250
"""After so many steps gaps are computed, for all of them together."""


@dataclass
class Path:
    """Where a trajectory went.

    Attributes:
        contestant, start: which it is.
        error, failed_at: why it ended early and at which step, counted from 0, or None.
        end, losses, gap: the last point, its losses, and its gap to the front in percent.
        settled: the first step after which all points are near the front; None if the last is not.
        points: `[k, 3]`, at most 400 of them: step, x1, x2.
        seconds: what the method itself took, over all steps.
    """

    contestant: Contestant
    start: int
    error: str | None
    failed_at: int | None
    end: tuple[float, float]
    losses: tuple[float, float]
    gap: float
    settled: int | None
    points: list[tuple[int, float, float]]
    seconds: float


class Runner:
    """One trajectory's aggregator, driven as `MultiTaskOptimizer` drives it.

    Args:
        aggregator: a fresh one.
        toy: the problem.
        learning_rate: Adam's.
    """

    def __init__(self, aggregator: gradbal.Aggregator, toy: Toy, learning_rate: float) -> None:
        self.aggregator = aggregator
        self._toy = toy
        self._learning_rate = learning_rate
        self._own = aggregator.parameters()
        self.own_gradient: Array | None = None

    def find(
        self, point: Array, losses: Tensor, jacobian: Tensor, gramian: Tensor
    ) -> tuple[Tensor, bool]:
        """The weights `w [2]` of this step and False, or the direction `d [2]` and True.

        Args:
            point: `[2]`.
            losses, jacobian, gramian: `[2]`, `[2, 2]` and `[2, 2]` there, the method's to keep.
        """
        aggregator = self.aggregator
        aggregator.learning_rate = self._learning_rate
        aggregator.prepare(2, losses)
        direct = False
        if isinstance(aggregator, BilevelAggregator):
            here = ToyEvaluations(self._toy, point, losses, jacobian, self._learning_rate)
            return aggregator.step(here), aggregator.gives_gradient  # type: ignore[arg-type]
        if isinstance(aggregator, DoubleSamplingAggregator):
            found = aggregator.step(gramian) * sum(aggregator.shares)
        elif isinstance(aggregator, gradbal.GramianAggregator):
            found = aggregator.weights(gramian, losses)
        elif isinstance(aggregator, gradbal.JacobianAggregator):
            found, direct = self._direction(aggregator, losses, jacobian), True
        else:
            assert isinstance(aggregator, gradbal.Scalarizer)
            found = aggregator.loss_weights(losses)
        if self._own:
            with torch.enable_grad():
                grads = torch.autograd.grad(aggregator.objective(losses), self._own)
            self.own_gradient = torch.cat(grads).numpy()
        aggregator.observe(losses)
        if isinstance(aggregator, gradbal.ClosureAggregator) and aggregator.looks_around:
            d = found @ jacobian
            here = ToyEvaluations(self._toy, point, losses, jacobian, self._learning_rate, d)
            aggregator.look(here, losses)  # type: ignore[arg-type]
        return found, direct

    @staticmethod
    def _direction(
        aggregator: gradbal.JacobianAggregator, losses: Tensor, jacobian: Tensor
    ) -> Tensor:
        in_turn = aggregator.tasks_in_turn(2)
        if in_turn is None or len(in_turn) == 2:
            return aggregator.direction(jacobian, losses)
        rows, values = jacobian[in_turn], losses[in_turn]
        return aggregator.direction(rows, values, tasks=in_turn)  # type: ignore[call-arg]

    @property
    def own_weights(self) -> Array:
        """What the method learns in the optimizer, `[2]` once there is something."""
        return torch.cat([p.detach() for p in self._own]).numpy()

    def set_own_weights(self, values: Array) -> None:
        """They are now these `[2]`."""
        (own,) = self._own
        own.data = torch.from_numpy(values.copy()).to(own.dtype)

    def after(self, losses: Tensor) -> None:
        """The losses `[2]` after the step, for methods that look again."""
        aggregator = self.aggregator
        if isinstance(aggregator, gradbal.ClosureAggregator) and aggregator.looks_after:
            aggregator.update(losses)


class _Adam:
    """torch.optim.Adam with its default betas and ε, on one array.

    Args:
        values: `[N, k]`, changed in place.
        rates: learning rates, `[N, k]`.
    """

    def __init__(self, values: Array, rates: Array) -> None:
        self._values, self._rates = values, rates
        self._mean, self._square = np.zeros_like(values), np.zeros_like(values)
        self._steps = 0

    def step(self, gradient: Array) -> None:
        """One step along `gradient [N, k]`."""
        self._steps += 1
        self._mean += 0.1 * (gradient - self._mean)
        self._square *= 0.999
        self._square += 0.001 * gradient * gradient
        first, second = 1.0 - 0.9**self._steps, 1.0 - 0.999**self._steps
        root = np.sqrt(self._square) / math.sqrt(second) + 1e-8
        self._values -= self._rates / first * self._mean / root


def descend(
    setting: Setting,
    runs: Sequence[tuple[Contestant, int]],
    steps: int,
    after_steps: Callable[[int], None] = lambda n: None,
) -> list[Path]:
    """All the trajectories, side by side.

    Args:
        setting: problem, starting points and learning rates.
        runs: contestants, each with the number of a starting point.
        steps: of Adam.
        after_steps: called now and then with the number of steps since the last call.

    Returns:
        One path for each of `runs`, in their order.
    """
    return _Descent(setting, runs, steps).run(after_steps)


def from_all_starts(
    setting: Setting, steps: int, contestant: Contestant, after_steps: Callable[[int], None]
) -> list[Path]:
    """One contestant's trajectories; see `descend`."""
    runs = [(contestant, start) for start in range(len(setting.starts))]
    return descend(setting, runs, steps, after_steps)


class _Descent:
    def __init__(
        self, setting: Setting, runs: Sequence[tuple[Contestant, int]], steps: int
    ) -> None:
        n = len(runs)
        self._setting, self._toy, self._runs, self._n_steps = setting, setting.toy, runs, steps
        # The point, and the weights that some methods learn with it.
        self._values = np.zeros((n, 4))
        self._values[:, :2] = [setting.starts[start] for _, start in runs]
        rates = np.full((n, 4), setting.learning_rate)
        self._runners: list[Runner | None] = []
        self._errors: list[tuple[str, int] | None] = [None] * n
        for k, (contestant, start) in enumerate(runs):
            aggregator = contestant.create(start)
            self._runners.append(Runner(aggregator, self._toy, setting.learning_rate))
            for group in aggregator.param_groups():
                rates[k, 2:] = group.get("lr", setting.learning_rate)
        self._adam = _Adam(self._values, rates)
        self._clips = np.array([math.inf if c.clip is None else c.clip for c, _ in runs])
        self._ends = self._values[:, :2].copy()
        self._last_away = np.full(n, -1)
        self._seconds = np.zeros(n)
        # Points are written down at these steps.
        marks = np.linspace(0, steps, min(_POINTS, steps + 1)).round().astype(int)
        self._marks = set(marks.tolist())
        self._points: list[tuple[int, Array]] = []
        # The losses of the last steps, and the number of the first of these.
        self._history: list[Array] = []
        self._since = 0

    def run(self, after_steps: Callable[[int], None]) -> list[Path]:
        self._look(0)
        for step in range(self._n_steps):
            self._adam.step(self._gradients(step))
            self._look(step + 1)
            self._show_after(step)
            if len(self._history) > _CHUNK:
                after_steps(len(self._history))
                self._take_stock()
        after_steps(len(self._history) - 1)
        self._take_stock()
        return [self._path(k) for k in range(len(self._runs))]

    def _look(self, step: int) -> None:
        """Evaluates where the trajectories are after so many steps."""
        points = self._values[:, :2]
        self._losses, self._jacobian = self._toy.evaluate(points)
        self._gramian = self._jacobian @ self._jacobian.transpose(0, 2, 1)
        self._history.append(self._losses)
        if step in self._marks:
            self._points.append((step, points.copy()))

    def _take_stock(self) -> None:
        """Notes when each trajectory was last away from the front."""
        losses = np.stack(self._history) / [self._setting.scale, 1.0]
        gap = self._toy.front.gap(losses.reshape(-1, 2)).reshape(losses.shape[:2])
        # Not below: NaN is away.
        for step, away in enumerate(~(gap < NEAR), start=self._since):
            self._last_away[away] = step
        self._since += len(self._history)
        self._history.clear()

    def _gradients(self, step: int) -> Array:
        """What goes into `.grad`, `[N, 4]`."""
        weights, gradients = np.zeros_like(self._losses), np.zeros_like(self._values)
        direct: list[tuple[int, Array]] = []
        # Copies, since a method may keep them.
        losses = torch.from_numpy(self._losses.copy()).unbind()
        jacobians = torch.from_numpy(self._jacobian.copy()).unbind()
        gramians = torch.from_numpy(self._gramian).unbind()
        for k, runner in enumerate(self._runners):
            if runner is None:
                continue
            begin = time.perf_counter()
            try:
                point = self._values[k, :2]
                found, is_direction = runner.find(point, losses[k], jacobians[k], gramians[k])
            except Exception as error:
                self._fail(k, step, one_line(error))
                continue
            if is_direction:
                direct.append((k, found.numpy()))
            else:
                weights[k] = found.numpy()
            if runner.own_gradient is not None:
                gradients[k, 2:] = runner.own_gradient
                self._values[k, 2:] = runner.own_weights
            self._seconds[k] += time.perf_counter() - begin
        d = np.einsum("nt,ntp->np", weights, self._jacobian)
        for k, found_direction in direct:
            d[k] = found_direction
        norms = np.hypot(d[:, 0], d[:, 1])
        for k in np.flatnonzero(~np.isfinite(norms)).tolist():
            if self._runners[k] is not None:
                self._fail(k, step, "the direction is not finite")
            d[k] = norms[k] = 0.0
        # As `clip_grad_norm_` does.
        d *= np.minimum(1.0, self._clips / (norms + 1e-6))[:, None]
        gradients[:, :2] = d
        return gradients

    def _show_after(self, step: int) -> None:
        """What the methods are told once the step is taken."""
        for k, runner in enumerate(self._runners):
            if runner is None:
                continue
            if runner.own_gradient is not None:
                runner.set_own_weights(self._values[k, 2:])
            try:
                runner.after(torch.from_numpy(self._losses[k].copy()))
            except Exception as error:
                self._fail(k, step, one_line(error))

    def _fail(self, k: int, step: int, error: str) -> None:
        self._errors[k] = (error, step)
        self._ends[k] = self._values[k, :2]
        self._runners[k] = None

    def _path(self, k: int) -> Path:
        contestant, start = self._runs[k]
        failure = self._errors[k]
        last = self._n_steps if failure is None else failure[1]
        end = self._values[k, :2] if failure is None else self._ends[k]
        losses = self._toy.evaluate(end[None])[0]
        gap = float(self._toy.front.gap(losses / [self._setting.scale, 1.0])[0])
        settled = int(self._last_away[k]) + 1 if failure is None and gap < NEAR else None
        points = [(step, float(p[k, 0]), float(p[k, 1])) for step, p in self._points if step < last]
        return Path(
            contestant=contestant,
            start=start,
            error=None if failure is None else failure[0],
            failed_at=None if failure is None else failure[1],
            end=(float(end[0]), float(end[1])),
            losses=(float(losses[0, 0]), float(losses[0, 1])),
            gap=gap,
            settled=settled,
            points=[*points, (last, float(end[0]), float(end[1]))],
            seconds=float(self._seconds[k]),
        )
