"""One pass of `Σ w_i ℓ_i`, for scalarizers and for weights that are known."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradbal._balancer.call import BackwardCall
from gradbal._balancer.seen import as_seen, cotangent, transformed
from gradbal._balancer.tensors import only, rows_of, scaled
from gradbal._balancer.weights import gain_of, taking_part
from gradbal._lazy import LazyLosses
from gradbal._losses import Losses
from gradbal.aggregators.base import Scalarizer
from gradbal.jacobian import (
    Absent,
    FoundInstances,
    Instance,
    WeightedSum,
    deliver,
    gradients_of,
    hooks_held_back,
    reached_parameters,
    shared_indices,
    upload,
)

if TYPE_CHECKING:
    from gradbal._balancer.balancer import Balancer

__all__ = [
    "apart",
    "single_step",
    "single_weights",
    "sum_step",
    "train_own_weights",
    "weighted_pass",
]


def single_step(balancer: Balancer, call: BackwardCall) -> bool:
    """The losses are all there."""
    batch, absent = call.batch, call.absent
    assert isinstance(batch, Losses)
    values, factors = transformed(balancer, batch)
    if not balancer.graph_seen or call.retain_graph:
        # Refuses a graph that would silently go untrained; once, as a walk is not free.
        balancer.note_reach(call.parameters, balancer.reach_now(batch, factors, call.parameters))
        balancer.graph_seen = True
    present = [i for i in range(len(batch.names)) if i not in absent]
    refreshes = isinstance(balancer.aggregator, Scalarizer) and balancer.refreshes(batch.missing)
    known = balancer.pending.weights if balancer.pending is not None else None
    weights = known or single_weights(balancer, values, present, refreshes)
    weighted_pass(balancer, call, factors, weights)
    _conclude_pass(balancer, call, values, absent, weights, refreshes)
    return True


def _conclude_pass(
    balancer: Balancer,
    call: BackwardCall,
    values: Tensor,
    absent: frozenset[int],
    weights: tuple[Tensor, Tensor],
    refreshes: bool,
) -> None:
    """Books what a pass with these weights has delivered."""
    pending = balancer.gather(call.batch, values, absent)
    pending.weights = weights
    if call.accumulate:
        return
    if refreshes:
        present = [i for i in range(len(values)) if i not in pending.absent]
        train_own_weights(balancer, pending.values, present, call.scale)
    balancer.finish(*weights, None, pending.absent, refreshes)


def sum_step(balancer: Balancer, call: BackwardCall) -> bool:
    """The losses are evaluated one after another."""
    batch, scale, aggregator = call.batch, call.scale, balancer.aggregator
    assert isinstance(batch, LazyLosses)
    n_tasks = len(batch.names)
    like = as_seen(balancer, batch.like())
    refreshes = isinstance(aggregator, Scalarizer) and balancer.refreshes(batch.missing)
    known = balancer.pending.weights if balancer.pending is not None else None
    put_back = aggregator.remember()
    present = [i for i in range(n_tasks) if i not in batch.missing]
    weights = known or single_weights(balancer, like, present, refreshes)
    w, head_weights = (upload(v, like.device).to(like.dtype) for v in weights)
    if balancer.heads == "own":
        head_weights = torch.ones_like(like)
    reads = scale is None and balancer.reads(like, single_pass=True)
    before = balancer.known_reach(batch, call.parameters)
    reach = [before[i] if i in batch.lacking else None for i in range(n_tasks)]
    elsewhere = {k for row in reach if row for k, yes in enumerate(row) if yes}
    n_known = len(present) + sum(row is not None for row in reach)
    total = WeightedSum(call.parameters, balancer.shared_params, n_known, elsewhere)
    roots = batch.roots(partial(cotangent, balancer, scale=scale))
    for i in range(n_tasks):
        root = roots.make(i)
        if isinstance(root, Absent):
            continue
        if not balancer.graph_seen:
            reached_parameters([root[0]], call.parameters)
        if not reads or batch.is_finite(i):
            grads = gradients_of(root, call.parameters, call.retain_graph)
            reach[i] = tuple(g is not None for g in grads)
            total.add(grads, w[i], head_weights[i])
            del grads
        # Before the next one is made.
        del root
    balancer.graph_seen = True
    absent = balancer.absent_after(call, single_pass=True)
    if absent is None:
        put_back()
        return False
    balancer.note_reach(call.parameters, reach)
    total.deliver()
    _conclude_pass(balancer, call, as_seen(balancer, batch.values), absent, weights, refreshes)
    return True


def weighted_pass(
    balancer: Balancer,
    call: BackwardCall,
    factors: Tensor,
    weights: tuple[Tensor, Tensor],
    taken: FoundInstances | None = None,
) -> None:
    """`Σ w_i ℓ_i` into `.grad`; heads by their own rule, in a pass of their own if need be."""
    batch, parameters, retain_graph = call.batch, call.parameters, call.retain_graph
    assert isinstance(batch, Losses)
    factors = scaled(factors, call.scale)
    present = [i for i in range(len(batch.names)) if i not in call.absent]
    device, dtype = factors.device, factors.dtype
    w, head_weights = (only(upload(v, device).to(dtype), present) for v in weights)
    if balancer.heads == "own":
        head_weights = only(torch.ones_like(factors), present)
    if isinstance(balancer.engine, Instance):
        _deliver_instances(balancer, balancer.engine, call, factors, w, head_weights, taken)
        return
    if balancer.processes.engine is not None:
        balancer.processes.single_pass(batch, w * factors, retain_graph, call.absent)
        return
    if balancer.heads == "weighted" and weights[0] is weights[1]:
        batch.backward(w * factors, parameters, retain_graph, call.absent)
        return
    trunk, rest = apart(balancer, batch, factors, parameters)
    if rest:
        batch.backward(head_weights * factors, rest, True, call.absent)
    batch.backward(w * factors, trunk, retain_graph, call.absent)


def _deliver_instances(
    balancer: Balancer,
    engine: Instance,
    call: BackwardCall,
    factors: Tensor,
    w: Tensor,
    head_weights: Tensor,
    taken: FoundInstances | None,
) -> None:
    """`Σ w_b ℓ_b` into `.grad`, once it is known to agree with the Gramian."""
    batch = call.batch
    assert isinstance(batch, Losses)
    losses = batch.tensors
    assert isinstance(losses, Tensor)
    if taken is not None and taken.direct:
        found = engine.combined(taken, w, head_weights, call.absent)
        engine.check(taken, w, head_weights, found)
        targets, gradients = [p for p, _ in found], [g for _, g in found]
        # Nobody else holds them, so they need not be copied.
        del found
        deliver(targets, gradients, (), (), ())
        return
    trunk, rest = apart(balancer, batch, factors, call.parameters)
    found = []
    passes = [(head_weights * factors, rest), (w * factors, trunk)]
    if not call.absent and all(map(_is_fresh, call.parameters)):
        # What arrives is d itself: taking it back is cheaper than holding it back.
        for weights, inputs in passes:
            if inputs:
                batch.backward(weights, inputs, call.retain_graph or inputs is rest)
        try:
            if taken is not None:
                pairs = [(p, p.grad) for p in call.parameters if p.grad is not None]
                engine.check(taken, w, head_weights, pairs, compare=True)
        except ValueError:
            for p in call.parameters:
                p.grad = None
            raise
        return
    for weights, inputs in passes:
        if inputs and call.absent:
            # In a pass of all instances NaN from one of them would reach every weight.
            found += engine.combine(losses, weights, inputs, call.absent)
        elif inputs:
            with hooks_held_back(inputs):
                grads = torch.autograd.grad(
                    losses,
                    inputs,
                    weights.to(losses.dtype),
                    retain_graph=call.retain_graph or inputs is rest,
                    allow_unused=True,
                )
            found += [(p, g) for p, g in zip(inputs, grads, strict=True) if g is not None]
    if taken is not None:
        engine.check(taken, w, head_weights, found, compare=not call.absent)
    torch.autograd.backward([p for p, _ in found], [g for _, g in found])


def single_weights(
    balancer: Balancer, values: Tensor, present: list[int], refreshes: bool
) -> tuple[Tensor, Tensor]:
    """Weights and head weights `[T]`, the same object where they are the same."""
    if refreshes:
        assert isinstance(balancer.aggregator, Scalarizer)
        part = rows_of(values, present)
        found = balancer.aggregator.loss_weights(part, **taking_part(balancer, present))
        w = upload(found, values.device).to(values.dtype, copy=True)
        if len(present) < len(values):
            w = torch.zeros_like(values).index_put_((torch.tensor(present),), w)
        return (w * gain_of(balancer, present) if balancer.match_sum else w), w
    assert balancer.weights is not None
    return (
        balancer.weights,
        balancer.weights if balancer.head_weights is None else balancer.head_weights,
    )


def apart(
    balancer: Balancer, batch: Losses, factors: Tensor, parameters: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Shared parameters and the others, from the graph: there are no rows to tell."""
    if isinstance(balancer.engine, Instance):
        # Every instance reaches what one of them does.
        chosen = {id(p) for p in balancer.shared_params or parameters}
        trunk = [p for p in parameters if id(p) in chosen]
        return trunk, [p for p in parameters if id(p) not in chosen]
    reach = balancer.reach_now(batch, factors, parameters)
    balancer.note_reach(parameters, reach)
    shared = set(shared_indices(parameters, reach, balancer.shared_params))
    trunk = [p for k, p in enumerate(parameters) if k in shared]
    return trunk, [p for k, p in enumerate(parameters) if k not in shared]


def train_own_weights(
    balancer: Balancer, values: Tensor, present: list[int], scale: Tensor | None
) -> None:
    """Puts the gradient of the method's learnable weights into their `.grad`."""
    own = balancer.aggregator.parameters()
    if not own:
        return
    part = rows_of(values.detach(), present)
    with torch.enable_grad():
        total = balancer.aggregator.objective(part, **taking_part(balancer, present))
        grads = torch.autograd.grad(total, own)
    if scale is not None:
        grads = tuple(g * scale.to(g) for g in grads)
    torch.autograd.backward(own, grads)


def _is_fresh(parameter: Tensor) -> bool:
    """Whether a gradient that arrives is all of `.grad`, and nobody else hears of it."""
    hooks = parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)
    return parameter.grad is None and not any(hooks)
