"""One backward step: losses in, balanced gradients out, by kind of aggregator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradbal._losses import Losses, Names
from gradbal._nonfinite import HostValues, NonFiniteError
from gradbal.aggregators.base import (
    Aggregator,
    GramianAggregator,
    JacobianAggregator,
    Scalarizer,
)
from gradbal.jacobian import (
    Rows,
    combine,
    gramian,
    reached_parameters,
    shared_indices,
    wants_exact,
)

__all__ = ["BackwardCall", "Balancer"]


@dataclass(frozen=True)
class BackwardCall:
    """What one call of `backward` asks for.

    batch: the losses. parameters: those to train, without the aggregator's own. absent: tasks that
    sit this step out. accumulate: only gather, and aggregate at the next call without it. scale:
    0-dim loss scale, or None; with it an overflow is delivered as inf. retain_graph: keep the
    losses' graph.
    """

    batch: Losses
    parameters: list[Tensor]
    absent: frozenset[int]
    accumulate: bool
    scale: Tensor | None
    retain_graph: bool


@dataclass
class _Pending:
    """What a step has gathered: one batch, or several micro-batches.

    values: `[T]`, the losses as the aggregator sees them. losses: `[T]`, as they are. absent: the
    tasks that sit the step out. weights: weights and head weights, when they come before the
    gradients.
    """

    values: Tensor
    losses: Tensor
    absent: frozenset[int]
    weights: tuple[Tensor, Tensor] | None = None


class Balancer:
    """Connects losses, Jacobian routine and aggregator; knows nothing of optimizers.

    Attributes:
        rows: the Jacobian routine.
        tasks: their names, from the first step on.
        weights, head_weights, gramian, losses: of the last step that aggregated, or None.
        n_steps: steps that aggregated. n_dropped: task → steps that it sat out.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        *,
        heads: str,
        shared_params: list[Tensor] | None,
        update_every: int,
        loss_transform: str | None,
        nonfinite: str,
    ) -> None:
        self.aggregator = aggregator
        self.heads = heads
        self.shared_params = shared_params
        self.update_every = update_every
        self.loss_transform = loss_transform
        self.nonfinite = nonfinite
        self.rows = Rows(shared_params)
        self.tasks: Names | None = None
        self.weights: Tensor | None = None
        self.head_weights: Tensor | None = None
        self.gramian: Tensor | None = None
        self.losses: Tensor | None = None
        self.n_steps = 0
        self.n_dropped: dict[str | int, int] = {}
        self._pending: _Pending | None = None
        self._graph_seen = False

    def backward(self, call: BackwardCall) -> bool:
        """Puts the balanced gradients into `.grad` of the parameters.

        Returns:
            False if a gradient is not finite and the step is to be skipped; nothing was delivered.

        Raises:
            NonFiniteError: a gradient is not finite, under `nonfinite="raise"`.
        """
        before, self.tasks = self.tasks, call.batch.names
        step = self._rows_step if self._needs_jacobian(call.accumulate) else self._single_step
        try:
            return step(call)
        except BaseException:
            self.give_up_pending()
            self.tasks = before
            raise

    def give_up_pending(self) -> None:
        """Forgets what was gathered and not aggregated."""
        self._pending = None
        self.rows.pending = False

    def state_dict(self) -> dict[str, Any]:
        """Tasks, weights that are used again, counters."""
        return {
            "tasks": None if self.tasks is None else list(self.tasks),
            "weights": _copy(self.weights),
            "head_weights": _copy(self.head_weights),
            "steps": self.n_steps,
            "dropped": dict(self.n_dropped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a `state_dict()`."""
        self.tasks = None if state["tasks"] is None else tuple(state["tasks"])
        self.weights = _copy(state["weights"])
        self.head_weights = _copy(state["head_weights"])
        self.gramian = self.losses = None
        self.n_steps = state["steps"]
        self.n_dropped = dict(state["dropped"])
        self.give_up_pending()

    def _needs_jacobian(self, accumulate: bool) -> bool:
        if self.rows.pending:
            return True
        if isinstance(self.aggregator, Scalarizer):
            # The weights of a sum of micro-batches are known only at the end.
            return accumulate and not self.aggregator.linear
        return self._refreshes()

    def _refreshes(self) -> bool:
        """Whether this step computes weights, rather than use the last ones again."""
        return self.weights is None or self.n_steps % self.update_every == 0

    # T passes, then the aggregator on the Jacobian.

    def _rows_step(self, call: BackwardCall) -> bool:
        batch, absent, scale = call.batch, call.absent, call.scale
        values, factors = self._transformed(batch)
        roots = batch.roots(factors if scale is None else factors * scale.to(factors))
        self.rows.take(roots, call.parameters, sit_out=absent, retain_graph=call.retain_graph)
        pending = self._gather(batch, values, absent)
        if call.accumulate:
            self.rows.pending = True
            return True
        g, host = self._to_host(pending.values, scale)
        bad = [i for i in host.bad if i not in pending.absent]
        if bad and scale is not None:
            # GradScaler finds these, skips the step and lowers its scale.
            overflow = torch.full_like(self.rows.jacobian[0], float("inf"))
            self.rows.deliver(overflow, [1.0] * len(batch.names))
            self.give_up_pending()
            return True
        if bad and self.nonfinite == "raise":
            raise NonFiniteError("losses and gradients", [batch.names[i] for i in bad])
        absent = pending.absent | frozenset(bad)
        if bad and (self.nonfinite == "skip" or len(absent) == len(batch.names)):
            return False
        if absent:
            g = g.clone()
            g[list(absent)] = g[:, list(absent)] = 0.0
        present = [i for i in range(len(batch.names)) if i not in absent]
        direction, weights, head_weights = self._aggregate(host, present, scale)
        heads: list[float | None] = [None] * len(batch.names)
        for i in present:
            heads[i] = 1.0 if self.heads == "own" else float(head_weights[i])
        self.rows.deliver(direction, heads)
        self._train_own_weights(pending.values, present, scale)
        self._finish(weights, head_weights, g, absent)
        return True

    def _to_host(self, values: Tensor, scale: Tensor | None) -> tuple[Tensor, HostValues]:
        """G `[T, T]` without the scale, and what the host decides on."""
        jacobian, extremes = self.rows.jacobian, self.rows.head_extremes()
        g = _unscaled(gramian(jacobian), scale)
        host = HostValues(g, values, extremes)
        if wants_exact(host.gramian, jacobian):
            g = _unscaled(gramian(jacobian, exact=True), scale)
            host = HostValues(g, values, extremes)
        return g, host

    def _aggregate(
        self, host: HostValues, present: list[int], scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Direction `[P]` (scaled as J is), weights and head weights `[T]` on the host."""
        aggregator, jacobian = self.aggregator, self.rows.jacobian
        everyone = len(present) == len(jacobian)
        values = host.losses if everyone else host.losses[present]
        w = torch.zeros(len(jacobian), dtype=torch.float64)
        if isinstance(aggregator, JacobianAggregator):
            rows = jacobian if everyone else jacobian[present]
            if scale is None:
                return aggregator.direction(rows, values), None, w
            direction = aggregator.direction(rows / scale.to(rows), values)
            return direction * scale.to(direction), None, w
        head_weights = w.clone()
        if isinstance(aggregator, GramianAggregator):
            g = host.gramian if everyone else host.gramian[present][:, present]
            found = aggregator.weights(g, values, **self._taking_part(present)).double()
            found_heads = aggregator.head_weights(found, g)
            w[present] = found
            if found_heads is found:
                head_weights = w
            else:
                head_weights[present] = found_heads.double()
        else:
            assert isinstance(aggregator, Scalarizer)
            found = aggregator.loss_weights(values, **self._taking_part(present))
            w[present] = found.double()
            head_weights = w
        if everyone:
            return combine(w, jacobian), w, head_weights
        # The row of a task that sits out may hold NaN, which no weight takes away.
        return combine(w[present], jacobian[present]), w, head_weights

    def _taking_part(self, present: list[int]) -> dict[str, Any]:
        """The keyword for a method that has to know which tasks take part, when not all do."""
        assert self.tasks is not None
        if self.aggregator.per_task_state and len(present) < len(self.tasks):
            return {"tasks": present}
        return {}

    # One pass of Σ w_i ℓ_i, for scalarizers and for weights that are used again.

    def _single_step(self, call: BackwardCall) -> bool:
        batch, parameters, absent, scale = call.batch, call.parameters, call.absent, call.scale
        values, factors = self._transformed(batch)
        if not self._graph_seen:
            # Refuses a graph that would silently go untrained; once, as a walk is not free.
            reached_parameters((root for root, _ in batch.roots(factors)), parameters)
            self._graph_seen = True
        present = [i for i in range(len(batch.names)) if i not in absent]
        refreshes = isinstance(self.aggregator, Scalarizer) and self._refreshes()
        known = self._pending.weights if self._pending is not None else None
        weights = known or self._single_weights(values, present, refreshes)
        if scale is not None:
            factors = factors * scale.to(factors)
        w, head_weights = (_only(v.to(factors), present) for v in weights)
        if self.heads == "own":
            head_weights = _only(torch.ones_like(factors), present)
        if self.heads == "weighted" and weights[0] is weights[1]:
            batch.backward(w * factors, parameters, call.retain_graph, absent)
        else:
            trunk, rest = self._apart(batch, factors, parameters)
            if rest:
                batch.backward(head_weights * factors, rest, True, absent)
            batch.backward(w * factors, trunk, call.retain_graph, absent)
        pending = self._gather(batch, values, absent)
        pending.weights = weights
        if call.accumulate:
            return True
        if refreshes:
            present = [i for i in range(len(batch.names)) if i not in pending.absent]
            self._train_own_weights(pending.values, present, scale)
        self._finish(*weights, None, pending.absent)
        return True

    def _single_weights(
        self, values: Tensor, present: list[int], refreshes: bool
    ) -> tuple[Tensor, Tensor]:
        """Weights and head weights `[T]`, the same object where they are the same."""
        if refreshes:
            w = torch.zeros_like(values)
            part = values if len(present) == len(values) else values[present]
            assert isinstance(self.aggregator, Scalarizer)
            w[present] = self.aggregator.loss_weights(part, **self._taking_part(present)).to(w)
            return w, w
        assert self.weights is not None
        return self.weights, self.weights if self.head_weights is None else self.head_weights

    def _apart(
        self, batch: Losses, factors: Tensor, parameters: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Shared parameters and the others, from the graph: there are no rows to tell."""
        roots = [root for root, _ in batch.roots(factors)]
        reach = reached_parameters(roots, parameters)
        shared = set(shared_indices(parameters, reach, self.shared_params))
        trunk = [p for k, p in enumerate(parameters) if k in shared]
        return trunk, [p for k, p in enumerate(parameters) if k not in shared]

    def _train_own_weights(self, values: Tensor, present: list[int], scale: Tensor | None) -> None:
        """Puts the gradient of a scalarizer's learnable weights into their `.grad`."""
        own = self.aggregator.parameters()
        if not own:
            return
        assert isinstance(self.aggregator, Scalarizer)
        part = values.detach()[present]
        with torch.enable_grad():
            total = self.aggregator.scalarize(part, **self._taking_part(present))
            grads = torch.autograd.grad(total, own)
        if scale is not None:
            grads = tuple(g * scale.to(g) for g in grads)
        torch.autograd.backward(own, grads)

    # What both have in common.

    def _transformed(self, batch: Losses) -> tuple[Tensor, Tensor]:
        """The losses that the aggregator sees, and the derivative of each by the loss itself."""
        values = batch.values
        if values.dtype in (torch.float16, torch.bfloat16):
            values = values.float()
        if self.loss_transform == "log":
            return values.log(), 1.0 / values
        return values, torch.ones_like(values)

    def _gather(self, batch: Losses, values: Tensor, absent: frozenset[int]) -> _Pending:
        """Adds a batch's losses to those of the micro-batches before it."""
        if self._pending is None:
            self._pending = _Pending(values, batch.values, absent)
        else:
            self._pending.values = self._pending.values + values
            self._pending.losses = self._pending.losses + batch.values
            self._pending.absent = self._pending.absent | absent
        return self._pending

    def _finish(
        self,
        weights: Tensor | None,
        head_weights: Tensor,
        g: Tensor | None,
        absent: frozenset[int],
    ) -> None:
        assert self._pending is not None
        assert self.tasks is not None
        losses = self._pending.losses
        device = losses.device
        self.weights = None if weights is None else weights.detach().to(device)
        apart = weights is not None and head_weights is not weights
        self.head_weights = head_weights.detach().to(device) if apart else None
        self.gramian, self.losses = g, losses
        for i in absent:
            name = self.tasks[i]
            self.n_dropped[name] = self.n_dropped.get(name, 0) + 1
        self.n_steps += 1
        self.give_up_pending()


def _only(weights: Tensor, present: list[int]) -> Tensor:
    """The weights, with zeros for the tasks that sit out."""
    if len(present) == len(weights):
        return weights
    kept = torch.zeros_like(weights)
    kept[present] = weights[present]
    return kept


def _unscaled(g: Tensor, scale: Tensor | None) -> Tensor:
    return g if scale is None else g / scale.to(g) ** 2


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
