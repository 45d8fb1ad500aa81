"""T passes, then the aggregator on the Jacobian or its Gramian."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradbal._balancer.call import BackwardCall, Pending
from gradbal._balancer.seen import as_seen, roots_of
from gradbal._balancer.single import single_weights, train_own_weights
from gradbal._balancer.tensors import rows_of, spread_out
from gradbal._balancer.weights import (
    examine,
    gain_of,
    head_factors,
    taking_part,
    to_host,
    weights_of,
)
from gradbal._few import Few
from gradbal._nonfinite import HostValues
from gradbal.aggregators.base import GramianAggregator, JacobianAggregator, Scalarizer
from gradbal.jacobian import Loop, Rows, combine

if TYPE_CHECKING:
    from gradbal._balancer.balancer import Balancer

__all__ = ["deliver_overflow", "rows_step"]


def rows_step(balancer: Balancer, call: BackwardCall) -> bool:
    """What every method can be served with.

    Returns:
        What `Balancer.backward` does, as all steps do.
    """
    batch, scale, rows = call.batch, call.scale, balancer.rows
    n_tasks = len(batch.names)
    # Shards take rows where two passes with known weights would do elsewhere.
    in_place_of_passes = not balancer.needs_jacobian(call.accumulate, batch.missing)
    reuses = in_place_of_passes and not balancer.refreshes(batch.missing)
    waiting = _tasks_waiting(balancer, n_tasks, call.absent)
    sit_out = call.absent | waiting | batch.lacking
    if not rows.engine.follows_graph and rows.width is None:
        # What those reach whose turn it is not has to be seen once.
        sit_out = call.absent | batch.lacking
    roots = roots_of(balancer, batch, scale, call.parameters)
    with balancer.processes.agreeing() as laid:
        rows.take(
            roots,
            call.parameters,
            sit_out=sit_out,
            retain_graph=call.retain_graph,
            taken=call.taken,
        )
        laid.append(rows)
    balancer.note_reach(rows.parameters, rows.reach)
    absent = balancer.absent_after(call, single_pass=False)
    if absent is None:
        return False
    pending = balancer.gather(batch, as_seen(balancer, batch.values), absent)
    pending.waiting = waiting
    if call.accumulate:
        rows.pending = True
        return True
    if isinstance(balancer.aggregator, Scalarizer) or reuses:
        _combine_gathered(balancer, pending, scale, not reuses)
        return True
    _check_columns(balancer)
    if isinstance(balancer.aggregator, JacobianAggregator):
        balancer.processes.whole_rows(rows.jacobian)
    overflow = partial(deliver_overflow, rows)
    found = examine(
        balancer, *to_host(balancer, rows, pending.values, scale), overflow, pending, scale
    )
    if isinstance(found, bool):
        return found
    present = [i for i in found.present if i not in waiting]
    if not present:
        # A task that is never finite may not keep the others from theirs.
        assert isinstance(balancer.aggregator, JacobianAggregator)
        balancer.aggregator.lose_turn(sorted(frozenset(range(n_tasks)) - waiting))
        return False
    direction, w, head_weights = _aggregate(balancer, found.host, present, scale)
    rows.deliver(direction, head_factors(balancer, head_weights, present))
    train_own_weights(balancer, pending.values, present, scale)
    balancer.finish(w, head_weights, found.gramian, found.absent)
    if balancer.steps_alike and len(present) == n_tasks and _is_ordinary(balancer, call):
        balancer.few = Few.after(batch.names, rows)
    return True


def _is_ordinary(balancer: Balancer, call: BackwardCall) -> bool:
    """Whether the next step may be one for `Few`, as far as this one tells."""
    if call.lazy or call.scale is not None or not balancer.processes.alone:
        return False
    settled = balancer.auto is None or balancer.auto.settled
    return settled and isinstance(balancer.rows.engine, Loop)


def _combine_gathered(
    balancer: Balancer, pending: Pending, scale: Tensor | None, refreshes: bool
) -> None:
    """What weights that do not depend on rows make of them, as in a single pass."""
    present = [i for i in range(len(pending.values)) if i not in pending.absent]
    weights = pending.weights or single_weights(balancer, pending.values, present, refreshes)
    direction = balancer.rows.combined(weights[0], present)
    balancer.rows.deliver(direction, head_factors(balancer, weights[1], present))
    if refreshes:
        train_own_weights(balancer, pending.values, present, scale)
    balancer.finish(*weights, None, pending.absent, refreshes)


def _tasks_waiting(balancer: Balancer, n_tasks: int, absent: frozenset[int]) -> frozenset[int]:
    """Tasks whose turn it is not; the first micro-batch of a step decides for all of them."""
    if balancer.pending is not None:
        return balancer.pending.waiting
    if not isinstance(balancer.aggregator, JacobianAggregator):
        return frozenset()
    keyword = {"absent": absent} if absent else {}
    in_turn = balancer.aggregator.tasks_in_turn(n_tasks, **keyword)
    return frozenset() if in_turn is None else frozenset(range(n_tasks)).difference(in_turn)


def deliver_overflow(rows: Rows) -> None:
    """Delivers inf, which a GradScaler finds."""
    rows.deliver(torch.full_like(rows.jacobian[0], float("inf")), [1.0] * len(rows.jacobian))


def _check_columns(balancer: Balancer) -> None:
    """State `[T, P]`, or of column groups, belongs to the shared parameters that it was
    gathered for."""
    aggregator = balancer.aggregator
    if isinstance(aggregator, GramianAggregator):
        if aggregator.column_groups(balancer.rows.shapes) is None:
            return
        _check_grouped(balancer)
    elif not (isinstance(aggregator, JacobianAggregator) and aggregator.per_parameter_state):
        return
    if balancer.columns is not None and balancer.columns != balancer.rows.shared:
        raise ValueError(
            f"the shared parameters must stay the same for {aggregator.name!r}, which has "
            f"state for each; found {len(balancer.rows.shared)} of other indices than before"
        )
    balancer.columns = list(balancer.rows.shared)


def _check_grouped(balancer: Balancer) -> None:
    """Weights by column group are not one number for each task."""
    name = balancer.aggregator.name
    if balancer.update_every != 1:
        raise ValueError(
            f"update_every must be 1 for {name!r} with weights by column group, "
            f"found {balancer.update_every}"
        )
    if balancer.heads != "own":
        raise ValueError(
            f"heads must be 'own' for {name!r} with weights by column group, "
            f"found {balancer.heads!r}"
        )


def _aggregate(
    balancer: Balancer, host: HostValues, present: list[int], scale: Tensor | None
) -> tuple[Tensor | list[Tensor], Tensor | None, Tensor]:
    """Direction `[P]` or by parameter (scaled as J is), weights and head weights `[T]` on the
    host."""
    aggregator, jacobian = balancer.aggregator, balancer.rows.jacobian
    if not isinstance(aggregator, JacobianAggregator) and host.gramian.dim() == 2:
        w, head_weights = weights_of(balancer, host, present)
        return balancer.rows.combined(w, present), w, head_weights
    rows, values = rows_of(jacobian, present), rows_of(host.losses, present)
    if isinstance(aggregator, JacobianAggregator):
        plain = rows if scale is None else rows / scale.to(rows)
        aggregator.columns = balancer.processes.shards(balancer.rows.shared)
        try:
            _take_own_columns(balancer, aggregator)
            direction = aggregator.direction(plain, values, **taking_part(balancer, present))
        finally:
            aggregator.columns = None
        if gain_of(balancer, present) != 1.0:
            direction = direction * gain_of(balancer, present)
        if scale is not None:
            direction = direction * scale.to(direction)
        w = spread_out(aggregator.last_weights, jacobian, present)
        heads = spread_out(aggregator.last_head_weights, jacobian, present)
        weights = w * gain_of(balancer, present) if aggregator.weighted else None
        return direction, weights, heads
    assert isinstance(aggregator, GramianAggregator)
    g = host.gramian[:, present][:, :, present]
    grouped = aggregator.group_weights(g, values, **taking_part(balancer, present))
    parts = torch.split(rows, aggregator.column_groups(balancer.rows.shapes) or [], 1)
    wide = torch.promote_types(jacobian.dtype, torch.float32)
    pieces = [combine(w, part, wide) for w, part in zip(grouped, parts, strict=True)]
    return torch.cat(pieces), None, torch.ones(len(jacobian), dtype=torch.float64)


def _take_own_columns(balancer: Balancer, aggregator: JacobianAggregator) -> None:
    """State `[..., P]` from a checkpoint, of all columns, becomes that of this process's."""
    columns = aggregator.columns
    if columns is None or not aggregator.per_parameter_state or balancer.own_columns:
        return
    for name in aggregator.state_names:
        value = getattr(aggregator, name)
        if isinstance(value, Tensor):
            setattr(aggregator, name, columns.own(value))
    balancer.own_columns = True
