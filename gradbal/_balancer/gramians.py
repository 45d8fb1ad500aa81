"""The Gramian without the rows, then one pass if it takes one to deliver."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradbal._balancer.call import BackwardCall, Examined
from gradbal._balancer.seen import transformed
from gradbal._balancer.single import train_own_weights, weighted_pass
from gradbal._balancer.tensors import scaled, unscaled
from gradbal._balancer.weights import examine, head_factors, weights_of
from gradbal._losses import Losses
from gradbal._nonfinite import HostValues
from gradbal.jacobian import Found, FoundInstances, Instance, Sketch, finds_gramian

if TYPE_CHECKING:
    from gradbal._balancer.balancer import Balancer

__all__ = ["gramian_step", "instance_step", "weighted_step"]


def gramian_step(balancer: Balancer, call: BackwardCall) -> bool:
    """The losses of tasks."""
    assert finds_gramian(balancer.engine)
    assert isinstance(call.batch, Losses)
    batch, scale = call.batch, call.scale
    values, factors = transformed(balancer, batch)
    known = balancer.known_reach(batch, call.parameters)
    roots = batch.roots(scaled(factors, scale), known)
    how = roots, call.parameters, balancer.shared_params, call.absent | batch.lacking
    if isinstance(balancer.engine, Sketch):
        taken = _sketched(balancer, balancer.engine, *how)
    else:
        taken = balancer.engine.take(*how, call.retain_graph)
    balancer.last_width = sum(p.numel() for p in taken.shared)
    balancer.note_reach(call.parameters, taken.reach)
    pending = balancer.gather(batch, values, call.absent)
    g = unscaled(taken.gramian, scale)
    host, kept = HostValues(g, values, taken.extremes), taken.kept
    if kept is not None and balancer.processes.wants_exact(host.gramian[None], [kept.rows]):
        g = unscaled(kept.exact(), scale)
        host = HostValues(g, values, taken.extremes)
    overflow = partial(_overflow_in, taken.shared)
    found = examine(balancer, g, host, overflow, pending, scale)
    if kept is None or isinstance(found, bool):
        return weighted_step(balancer, call, factors, values, found)
    weights = weights_of(balancer, found.host, found.present)
    kept.deliver(weights[0], head_factors(balancer, weights[1], found.present))
    train_own_weights(balancer, values, found.present, scale)
    balancer.finish(*weights, found.gramian, found.absent)
    return True


def _sketched(balancer: Balancer, engine: Sketch, *how: Any) -> Found:
    """The mean of the processes' sketches is the sketch of their mean rows."""
    # Part of the checkpoint: a resumed run draws the same signs.
    engine.step = balancer.n_steps
    with balancer.processes.agreeing() as laid:
        sketched = engine.sketch(*how)
        laid.append(sketched)
    balancer.processes.average(sketched.sketches)
    found = sketched.found()
    return replace(found, extremes=balancer.processes.spoiled(found.extremes))


def instance_step(balancer: Balancer, call: BackwardCall) -> bool:
    """The losses of instances."""
    assert isinstance(balancer.engine, Instance)
    batch, scale, engine = call.batch, call.scale, balancer.engine
    assert isinstance(batch, Losses)
    assert isinstance(batch.tensors, Tensor)
    values, factors = transformed(balancer, batch)
    cotangents = scaled(factors, scale)
    how = batch.tensors, cotangents, call.parameters, balancer.shared_params, call.absent
    taken = engine.take(*how, retain_graph=call.retain_graph)
    pending = balancer.gather(batch, values, call.absent)
    g = unscaled(taken.gramian, scale)
    host = HostValues(g, values, taken.extremes, taken.doubt)
    exact = taken.leaves_range(host.gramian)
    if host.doubt or exact:
        if taken.direct:
            taken = engine.exactly(taken, call.absent)
        else:
            taken = engine.take(*how, look=host.doubt, exact=exact)
        g = unscaled(taken.gramian, scale)
        host = HostValues(g, values, taken.extremes)

    overflow = partial(_overflow_in, taken.shared)
    examined = examine(balancer, g, host, overflow, pending, scale)
    return weighted_step(balancer, call, factors, values, examined, taken)


def weighted_step(
    balancer: Balancer,
    call: BackwardCall,
    factors: Tensor,
    values: Tensor,
    found: Examined | bool,
    taken: FoundInstances | None = None,
) -> bool:
    """Weights of a Gramian, and the pass that delivers them."""
    if isinstance(found, bool):
        return found
    weights = weights_of(balancer, found.host, found.present)
    weighted_pass(balancer, call._replace(absent=found.absent), factors, weights, taken)
    train_own_weights(balancer, values, found.present, call.scale)
    balancer.finish(*weights, found.gramian, found.absent)
    return True


def _overflow_in(parameters: list[Tensor]) -> None:
    """Delivers inf, which a GradScaler finds."""
    torch.autograd.backward(parameters, [torch.full_like(p, float("inf")) for p in parameters])
