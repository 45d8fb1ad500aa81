"""T passes on each of several independent batches."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from gradbal._balancer.call import BackwardCall
from gradbal._balancer.rows import deliver_overflow
from gradbal._balancer.seen import as_seen, roots_of
from gradbal._balancer.tensors import unscaled
from gradbal._balancer.weights import examine, head_factors, weights_of
from gradbal._nonfinite import HostValues
from gradbal.aggregators.base import DoubleSamplingAggregator
from gradbal.jacobian import Rows

if TYPE_CHECKING:
    from gradbal._balancer.balancer import Balancer

__all__ = ["independent_step"]


def independent_step(balancer: Balancer, call: BackwardCall) -> bool:
    """The products of two batches' Jacobians, and a sum of all batches' gradients."""
    aggregator, scale = balancer.aggregator, call.scale
    assert isinstance(aggregator, DoubleSamplingAggregator)
    batches = [call.batch, *call.independent]
    gathered: list[Rows] = []
    norms = []
    for batch in batches:
        rows = balancer.new_rows()
        roots = roots_of(balancer, batch, scale, call.parameters)
        with balancer.processes.agreeing() as laid:
            rows.take(roots, call.parameters, sit_out=call.absent, retain_graph=call.retain_graph)
            laid.append(rows)
        if gathered and rows.shared != gathered[0].shared:
            raise ValueError(
                "independent batches must share the same parameters, found "
                f"{len(gathered[0].shared)} and {len(rows.shared)} shared ones"
            )
        gathered.append(rows)
        values = as_seen(balancer, batch.values).abs()
        largest = [rows.head_extremes(), rows.jacobian.abs().amax(1), values]
        norms.append(torch.stack([x.double() for x in largest]).amax(0))
    absent = balancer.absent_after(call, single_pass=False)
    if absent is None:
        return False
    first = gathered[0]
    values = as_seen(balancer, call.batch.values)
    pending = balancer.gather(call.batch, values, absent)
    # An extreme of any batch that is not finite is one of their sum.
    extremes = torch.stack([n / len(norms) for n in norms]).sum(0)
    product, extremes = balancer.processes.cross_product(
        first.jacobian, gathered[1].jacobian, extremes
    )
    products = unscaled(product, scale)
    host = HostValues(products, values, extremes)
    overflow = partial(deliver_overflow, first)
    found = examine(balancer, products, host, overflow, pending, scale)
    if isinstance(found, bool):
        return found
    present = found.present
    w, head_weights = weights_of(balancer, host, present)
    first.mix(gathered, aggregator.shares, aggregator.head_shares)
    direction = first.combined(w, present)
    first.deliver(direction, head_factors(balancer, head_weights, present))
    balancer.finish(w, head_weights, None, found.absent)
    return True
