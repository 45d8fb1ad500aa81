"""The Gramian of per-instance losses, from one backward pass of their sum.

Where instances do not mix, one pass finds the gradient of every instance's loss at the output of
every layer. Which rows are whose is found by experiment: at the first step, wherever the graph has
changed or sends rows about by the data, and now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradbal.jacobian.fingerprint import fingerprint, sends_rows_about
from gradbal.jacobian.graph import check_dense, shared_indices
from gradbal.jacobian.layers import Layer, find_layers, owned
from gradbal.jacobian.owners import Codes, Owners, Reading, merged
from gradbal.jacobian.per_instance import Outer, Part, in_float64, is_half, leading, masked, parts
from gradbal.jacobian.products import gramian, no_autocast
from gradbal.jacobian.strays import Path, candidates, carries, paths, stray_part
from gradbal.jacobian.walk import Walk, walk

__all__ = ["FoundInstances", "Instance"]

_SAFE_SQUARES = (1e-25, 1e35)

_REMEMBERED = 64
"""Structures of graphs that are remembered."""


@dataclass(frozen=True)
class FoundInstances:
    """What the pass has found.

    gramian: `[B, B]`, float64; zero for instances that sit out. shared: the shared parameters.
    extremes: `[B]`, an entry that is not finite where an instance's gradient of the other
    parameters is not. doubt: 0-dim, whether a row has a gradient that never had one when looked at;
    None where there is no such row. tolerance: how far rounding may take `|d|²` from `wᵀGw`.
    exact: whether products were in float64.
    """

    gramian: Tensor
    shared: list[Tensor]
    extremes: Tensor
    doubt: Tensor | None
    tolerance: float
    exact: bool

    def leaves_range(self, host: Tensor) -> bool:
        """Whether squares were too small or too large for float32; `host` is the Gramian there."""
        squares = host.diagonal()
        safe = (squares > _SAFE_SQUARES[0]) & (squares < _SAFE_SQUARES[1])
        zero = squares == 0
        return not (self.exact or bool((safe | zero).all() and safe.any()))


@dataclass
class _Known:
    """What was found out about graphs of one structure.

    owners: of the rows, by the node's place in the walk. silent: the places of nodes that no
    gradient came to. n_steps: how often it was met.
    """

    owners: dict[int, Owners] = field(default_factory=dict)
    silent: frozenset[int] = frozenset()
    n_steps: int = 0


@dataclass(frozen=True)
class _Step:
    """The losses of one step and their graph.

    losses: `[B]`. factors: `[B]`, their cotangents. parameters: all that are trained. layers: those
    with such parameters. strays: indices of the parameters in no layer. place: node → its place in
    the walk.
    """

    losses: Tensor
    factors: Tensor
    parameters: Sequence[Tensor]
    graph: Walk
    layers: list[Layer]
    strays: list[int]
    place: dict[Node, int]

    def visit(self, visitors: Mapping[Node, Callable[[Tensor], None]], factors: Tensor) -> None:
        """One backward pass that hands the gradient at each node's output to its visitor.

        It goes no further than it must, and a gradient is gone when its visitor returns, but for
        those where it ends.
        """
        ahead: dict[Node, bool] = {}
        ends = []
        for node in reversed(self.graph.order):
            below = any(ahead[source] for source, _ in node.next_functions if source is not None)
            if node in visitors and not below:
                ends.append(node)
            ahead[node] = below or node in visitors
        final = set(ends)

        def visited(node: Node, gradients: tuple[Any, ...]) -> None:
            if gradients[0] is not None:
                visitors[node](gradients[0])

        handles = [
            node.register_prehook(partial(visited, node)) for node in visitors if node not in final
        ]
        edges: list[Any] = [GradientEdge(node, 0) for node in ends]
        if not edges:
            return
        try:
            found = torch.autograd.grad(
                self.losses, edges, factors, retain_graph=True, allow_unused=True
            )
        finally:
            for handle in handles:
                handle.remove()
        for node, gradient in zip(ends, found, strict=True):
            if gradient is not None:
                visitors[node](gradient)

    def leaf(self, k: int) -> Node:
        """The node of a parameter."""
        return self.graph.leaves[k]


class Instance:
    """Finds the Gramian of B losses of single instances in one backward pass."""

    name = "instance"

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._moved: Tensor | None = None

    def take(
        self,
        losses: Tensor,
        factors: Tensor,
        parameters: Sequence[Tensor],
        shared_parameters: list[Tensor] | None,
        sit_out: frozenset[int],
        *,
        look: bool = False,
        exact: bool = False,
    ) -> FoundInstances:
        """The Gramian of the gradients of `factors · losses`; the graph is kept.

        Args:
            losses: `[B]`, one for each instance.
            factors: `[B]`, what each is multiplied by.
            parameters: n leaf tensors that require grad.
            shared_parameters: those whose gradients count, or None for all that are reached.
            sit_out: instances whose row and column are left zero.
            look: find out anew which rows are whose.
            exact: multiply in float64, where squares would leave the range of float32.

        Raises:
            ValueError: no parameter is reached, a sparse gradient, or instances that mix.
        """
        device = losses.device
        step = _step(losses, _without(factors, sit_out), parameters)
        reach = step.graph.reach(1, len(parameters))
        chosen = shared_indices(parameters, reach, shared_parameters)
        with torch.no_grad(), no_autocast(losses.device):
            total = _Sum(len(losses), device, frozenset(chosen), exact)
            doubts: list[Tensor] | None = []
            if len(losses) == 1:
                _take_one(step, total)
            else:
                known = self._known_of(step, look)
                doubts = _collect(step, known, total.add)
                if doubts is None:
                    total = _Sum(len(losses), device, frozenset(chosen), exact)
                    _look(step, known)
                    doubts = _collect(step, known, total.add)
        g, extremes = total.shared, total.others.diagonal()
        if sit_out:
            taken = _mask(len(losses), sit_out, device)
            g = torch.where(taken & taken[:, None], g, 0.0)
            extremes = torch.where(taken, extremes, 0.0)
        if self._moved is not None:
            doubts = [*(doubts or []), self._moved]
            self._moved = None
        doubt = torch.stack([d.to(device) for d in doubts]).any() if doubts else None
        shared = [parameters[k] for k in chosen]
        tolerance = _tolerance(losses, shared, total.narrow)
        exact = exact or losses.dtype == torch.float64
        return FoundInstances(g, shared, extremes, doubt, tolerance, exact)

    def check(self, found: FoundInstances, weights: Tensor, gradients: Sequence[Tensor]) -> None:
        """Whether `|d|² = wᵀGw`, as it has to be if every row is still whose it was.

        That is not waited for on an accelerator: rows are then looked at at the next step.

        Args:
            found: of this step.
            weights: w `[B]`.
            gradients: d, of the shared parameters.

        Raises:
            ValueError: it is not.
        """
        g, w = found.gramian, weights.to(found.gramian)
        wide = [d.double() if found.exact or is_half(d) else d for d in gradients]
        if not wide:
            return
        square = torch.stack([n.to(g) for n in torch._foreach_norm(wide)]).square().sum()
        largest = (w.abs() * g.diagonal().sqrt()).sum().square()
        moved = (square - w @ g @ w).abs() > found.tolerance * largest
        if g.device.type != "cpu":
            self._moved = moved
        elif bool(moved):
            raise ValueError(
                'with jacobian="instance" instances must not mix, and the rows of every layer must '
                "stay with their instances while the graph is the same, found a step at which they "
                'do not; use jacobian="loop"'
            )

    def combine(
        self,
        losses: Tensor,
        weights: Tensor,
        parameters: Sequence[Tensor],
        sit_out: frozenset[int],
    ) -> list[tuple[Tensor, Tensor]]:
        """Parameters and their gradients of `Σ w_b ℓ_b`, without what the instances that sit out
        have computed, which may be NaN; the graph is kept.

        Args:
            losses: `[B]`.
            weights: `[B]`.
            parameters: n leaf tensors that require grad.
            sit_out: instances that do not count.
        """
        step = _step(losses, _without(torch.ones_like(weights), sit_out), parameters)
        taken = _mask(len(losses), sit_out, losses.device)
        weights = torch.where(taken, weights, 0.0)
        result: list[tuple[Tensor, Tensor]] = []

        def add(found: dict[int, Part], narrow: bool) -> None:
            for k, part in found.items():
                p = parameters[k]
                gradient = masked(part, taken).combine(weights.to(p.device))
                result.append((p, gradient.to(p.dtype)))

        with torch.no_grad(), no_autocast(losses.device):
            _collect(step, self._known_of(step, False), add)
        return result

    def _known_of(self, step: _Step, look: bool) -> _Known:
        """What is known of graphs like this one, found out anew where that is due."""
        key = fingerprint(step.graph, step.place, step.losses, step.parameters)
        known = self._known.pop(key, None) or _Known()
        known.n_steps += not look
        # Instances may meet where they did not before, as in a hinge that was at rest.
        due = known.n_steps & (known.n_steps - 1) == 0
        if look or due or sends_rows_about(step.graph):
            _look(step, known)
        self._known[key] = known
        while len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        return known


class _Sum:
    """The Gramian as it adds up, of the shared parameters and of the others."""

    def __init__(self, n: int, device: torch.device, chosen: frozenset[int], exact: bool) -> None:
        self.shared = torch.zeros(n, n, dtype=torch.float64, device=device)
        self.others = torch.zeros_like(self.shared)
        self.narrow = False
        self._chosen, self.exact = chosen, exact

    def add(self, found: dict[int, Part], narrow: bool = False) -> None:
        """Adds the parts of one layer: a weight's, and a bias's that follows it.

        Args:
            found: by the parameter's index.
            narrow: whether they come from half precision.
        """
        self.narrow |= narrow
        if self.exact:
            found = {k: in_float64(part) for k, part in found.items()}
        apart = {k in self._chosen for k in found}
        first, *rest = found.values()
        if isinstance(first, Outer) and rest and len(apart) == 1:
            self.add_gramian(next(iter(found)), first.gramian(with_bias=True))
            return
        for k, part in found.items():
            self.add_gramian(k, part.gramian())

    def add_gramian(self, k: int, gram: Tensor) -> None:
        """Adds that of parameter k."""
        into = self.shared if k in self._chosen else self.others
        into += gram.to(into.device)


def _step(
    losses: Tensor,
    factors: Tensor,
    parameters: Sequence[Tensor],
) -> _Step:
    graph = walk([losses], parameters)
    layers = find_layers(graph, parameters)
    inside = {k for layer in layers for k in owned(layer)}
    strays = [k for k in sorted(graph.leaves) if k not in inside]
    place = {node: i for i, node in enumerate(graph.order)}
    return _Step(losses, factors.to(losses.dtype), parameters, graph, layers, strays, place)


def _collect(
    step: _Step, known: _Known, add: Callable[[dict[int, Part], bool], None]
) -> list[Tensor] | None:
    """Hands over what each layer has of its shared parameters, as soon as it is there.

    Returns:
        For each node with rows that never had a gradient whether one has now. None if rows are not
        where they were; what was handed over is then void.
    """
    owners = {step.graph.order[place]: rows for place, rows in known.owners.items()}
    layers: dict[Node, list[Layer]] = {}
    for layer in step.layers:
        layers.setdefault(layer.node, []).append(layer)
    ways = {k: _ways(step, k, known) for k in step.strays}
    starts = {path[0].node for each in ways.values() for path in each}
    kept: dict[Node, Tensor] = {}
    doubts: list[Tensor] = []
    stale: list[Node] = []

    def visit(node: Node, gradient: Tensor) -> None:
        rows = owners.get(node)
        if rows is None or gradient.shape[: len(rows.shape)] != rows.shape:
            stale.append(node)
            return
        doubt = rows.doubt(gradient)
        if doubt is not None:
            doubts.append(doubt)
        if node in starts:
            kept[node] = gradient
        for layer in layers.get(node, ()):
            add(parts(layer, gradient, rows, step.parameters), is_half(gradient))

    nodes = [*layers, *(node for node in starts if node not in layers)]
    step.visit({node: partial(visit, node) for node in nodes}, step.factors)
    if stale:
        return None
    for k, each in ways.items():
        part = stray_part(each, kept, owners.__getitem__, step.parameters[k])
        if part is not None:
            add({k: part}, any(is_half(g) for g in kept.values()))
    return doubts


def _look(step: _Step, known: _Known) -> None:
    """Finds out which rows are whose.

    Raises:
        ValueError: instances mix.
    """
    n = len(step.losses)
    layers = {layer.node: layer for layer in step.layers}
    above = {node for k in step.strays for node in candidates(step.graph, step.leaf(k))}
    base: dict[Node, Tensor] = {}

    def first(node: Node, gradient: Tensor) -> None:
        base[node] = gradient

    nodes = [*layers, *(node for node in above if node not in layers)]
    step.visit({node: partial(first, node) for node in nodes}, step.factors)
    narrow = any(gradient.dtype == torch.float16 for gradient in base.values())
    codes = Codes.draw(n, step.factors, 4 if narrow else 16)
    readings = {
        node: [Reading(g, rows, codes) for rows in _leading(layers.get(node), g)]
        for node, g in base.items()
    }

    def again(node: Node, number: int, gradient: Tensor) -> None:
        for reading in readings[node]:
            reading.add(number, gradient)

    for number, factors in enumerate(codes.factors):
        visitors = {node: partial(again, node, number) for node in readings}
        step.visit(visitors, step.factors * factors)
    found: dict[int, Owners] = {}
    # The one nearest to the losses tells most about where instances mix.
    for node in sorted(readings, key=step.place.__getitem__):
        place = step.place[node]
        before = known.owners.get(place)
        each = (reading.owners() for reading in readings[node])
        told = (merged(ids, before, n, base[node].device) for ids in each if ids is not None)
        # A row with NaN tells nothing; its single entries may.
        owners = max((found for found in told if found is not None), key=_seen, default=None)
        if node in layers:
            if owners is None:
                raise ValueError(_mixing(step, node, owned(layers[node])[0]))
            found[place] = owners
        elif owners is not None and (owners.n_seen > 1 or not carries(node)):
            # What only one instance has a gradient of may belong to others at the next step.
            found[place] = owners
    known.owners = found
    known.silent = frozenset(step.place[node] for node in nodes if node not in base)


def _seen(owners: Owners) -> bool:
    return owners.n_seen > 1


def _leading(layer: Layer | None, gradient: Tensor) -> list[int]:
    """How many dimensions of rows to try: of nodes that are not known it may be all."""
    if layer is not None:
        return [leading(layer, gradient)]
    n = gradient.dim()
    return [n - 1, n] if n > 1 else [1]


def _ways(step: _Step, k: int, known: _Known) -> list[Path]:
    def told(node: Node) -> bool:
        return step.place[node] in known.owners or step.place[node] in known.silent

    found = paths(step.graph, step.leaf(k), told)
    if found is None:
        raise ValueError(
            'with jacobian="instance" parameters must meet the instances in a model, found one '
            f"of shape {list(step.parameters[k].shape)} that is among the losses itself"
        )
    if not isinstance(found, list):
        raise ValueError(_mixing(step, found, k))
    return found


def _mixing(step: _Step, node: Node, k: int) -> str:
    shape = list(step.parameters[k].shape)
    if any(use.output != 0 for use in step.graph.uses[node]):
        return (
            f'with jacobian="instance" one output of {node.name()} may be used, where a parameter '
            f'of shape {shape} is, found several; use jacobian="loop"'
        )
    message = (
        'instances must not mix with jacobian="instance", found a gradient of several at '
        f"{node.name()}, where a parameter of shape {shape} is used"
    )
    if any(
        "BatchNorm" in each.name() and getattr(each, "_saved_training", False)
        for each in step.graph.order
    ):
        return f"{message}; BatchNorm in training mode mixes them: use GroupNorm, or eval()"
    return f"{message}; each loss must come from its own instance alone"


def _tolerance(losses: Tensor, shared: Sequence[Tensor], narrow: bool) -> float:
    if narrow or losses.device.type != "cpu" or any(is_half(p) for p in shared):
        # Accelerators may multiply in TF32.
        return 3e-2
    return 1e-8 if all(p.dtype == torch.float64 for p in [losses, *shared]) else 1e-4


def _take_one(step: _Step, total: _Sum) -> None:
    """A single instance has nothing to mix with."""
    reached = sorted(step.graph.leaves)
    chosen = [step.parameters[k] for k in reached]
    grads = torch.autograd.grad(
        step.losses, chosen, step.factors, retain_graph=True, allow_unused=True
    )
    check_dense(grads, chosen)
    for k, g in zip(reached, grads, strict=True):
        if g is not None:
            total.add_gramian(k, gramian(g.reshape(1, -1), exact=total.exact))


def _without(factors: Tensor, sit_out: frozenset[int]) -> Tensor:
    if not sit_out:
        return factors
    return torch.where(_mask(len(factors), sit_out, factors.device), factors, 0.0)


def _mask(n: int, sit_out: frozenset[int], device: torch.device) -> Tensor:
    """`[B]`, whether an instance takes part."""
    return torch.tensor([b not in sit_out for b in range(n)], device=device)
