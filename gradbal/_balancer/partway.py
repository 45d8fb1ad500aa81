"""T passes down to a representation or some of the parameters, then one through the rest."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradbal._balancer.call import BackwardCall
from gradbal._balancer.gramians import weighted_step
from gradbal._balancer.rows import deliver_overflow
from gradbal._balancer.seen import transformed
from gradbal._balancer.single import train_own_weights
from gradbal._balancer.tensors import rows_of, scaled
from gradbal._balancer.weights import examine, head_factors, taking_part, to_host, weights_of
from gradbal._losses import Losses
from gradbal._representation import Representation
from gradbal.aggregators.base import GramianAggregator, JacobianAggregator
from gradbal.jacobian import Rows, there

if TYPE_CHECKING:
    from gradbal._balancer.balancer import Balancer

__all__ = ["features_step", "probe_step"]


def features_step(balancer: Balancer, call: BackwardCall) -> bool:
    """The Jacobian at a representation."""
    assert call.features is not None
    assert isinstance(call.batch, Losses)
    batch, scale, aggregator = call.batch, call.scale, balancer.aggregator
    values, factors = transformed(balancer, batch)
    roots = batch.roots(scaled(factors, scale))
    view = Representation(call.features, [start for start, _ in there(roots)], call.parameters)
    rows = Rows([call.features], dtype=balancer.jacobian_dtype)
    rows.take(
        roots,
        [call.features, *view.outside],
        sit_out=call.absent | batch.lacking,
        # Where parameters are reached past the features, their graph is walked again.
        retain_graph=call.retain_graph or bool(view.both),
    )
    pending = balancer.gather(batch, values, call.absent)
    overflow = partial(deliver_overflow, rows)
    # Every process has the representation of its own part of the batch.
    on_host = to_host(balancer, rows, values, scale, "columns")
    found = examine(balancer, *on_host, overflow, pending, scale)
    if isinstance(found, bool):
        return found
    present = found.present
    w: Tensor | None
    if isinstance(aggregator, JacobianAggregator):
        jacobian = rows_of(rows.jacobian, present)
        direction = aggregator.direction(  # type: ignore[call-arg]
            jacobian, features=call.features, **taking_part(balancer, present)
        )
        w, head_weights = None, torch.ones(len(batch.names), dtype=torch.float64)
    else:
        w, head_weights = weights_of(balancer, found.host, present)
        (direction,) = rows.combined(w, present)
    own = head_factors(balancer, head_weights, present)
    shared = [None if f is None else 1.0 for f in own]
    if w is not None:
        shared = [None if f is None else float(w[i]) for i, f in enumerate(own)]
    view.deliver(rows, direction, shared, own, call.retain_graph)
    train_own_weights(balancer, values, present, scale)
    balancer.finish(w, head_weights, found.gramian, found.absent)
    return True


def probe_step(balancer: Balancer, call: BackwardCall) -> bool:
    """The Gramian of the parameters that the method names."""
    assert isinstance(balancer.aggregator, GramianAggregator)
    assert isinstance(call.batch, Losses)
    batch, scale = call.batch, call.scale
    values, factors = transformed(balancer, batch)
    roots = batch.roots(scaled(factors, scale))
    probed = balancer.aggregator.probed_parameters() or []
    rows = Rows(probed, dtype=balancer.jacobian_dtype)
    with balancer.processes.agreeing() as laid:
        rows.take(roots, probed, sit_out=call.absent | batch.lacking, retain_graph=True)
        laid.append(rows)
    pending = balancer.gather(batch, values, call.absent)
    overflow = partial(deliver_overflow, rows)
    found = examine(balancer, *to_host(balancer, rows, values, scale), overflow, pending, scale)
    return weighted_step(balancer, call, factors, values, found)
