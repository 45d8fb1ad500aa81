"""The Gramian of per-instance losses, from one backward pass of their sum.

Where instances do not mix, one pass finds the gradient of every instance's loss at the output of
every layer. Which rows are whose is found by experiment: at the first step, wherever the graph has
changed or sends rows about by the data, and now and then.

A second pass, of the weighted losses, arrives at the result and tells whether rows are still whose
they were. It is left out where the operations of the graph alone show that they must be, whatever
the data, and where a few steps of such a graph have had both: then the result is put together from
what the layers hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import Node

from gradbal.jacobian.fingerprint import fingerprint, sends_rows_about
from gradbal.jacobian.gramian_sum import GramianSum
from gradbal.jacobian.graph import check_dense, shared_indices
from gradbal.jacobian.held import Held
from gradbal.jacobian.instance_step import InstanceStep, step_of
from gradbal.jacobian.layers import Layer
from gradbal.jacobian.looks import AGREED, Known, look_at, ways_to
from gradbal.jacobian.per_instance import Part, is_half, masked, parts
from gradbal.jacobian.products import gramian, no_autocast
from gradbal.jacobian.strays import stray_part

__all__ = ["FoundInstances", "Instance"]

_SAFE_SQUARES = (1e-25, 1e35)

_REMEMBERED = 64
"""Structures of graphs that are remembered."""

_BLOCK = 1 << 12
"""Entries whose squares float32 may add up."""


@dataclass(frozen=True)
class FoundInstances:
    """What the pass has found.

    gramian: `[B, B]`, float64; zero for instances that sit out. shared: the shared parameters.
    extremes: `[B]`, an entry that is not finite where an instance's gradient of the other
    parameters is not. doubt: 0-dim, whether a row has a gradient that never had one when looked at;
    None where there is no such row. tolerance: how far rounding may take `|d|²` from `wᵀGw`.
    exact: whether products were in float64. held: what the result can be put together from, or
    None. direct: whether it is to be; the graph is then kept only if that was asked for. known: of
    the graph.
    """

    gramian: Tensor
    shared: list[Tensor]
    extremes: Tensor
    doubt: Tensor | None
    tolerance: float
    exact: bool
    held: Held | None = None
    direct: bool = False
    known: Known | None = None

    def leaves_range(self, host: Tensor) -> bool:
        """Whether squares were too small or too large for float32; `host` is the Gramian there."""
        squares = host.diagonal()
        safe = (squares > _SAFE_SQUARES[0]) & (squares < _SAFE_SQUARES[1])
        zero = squares == 0
        return not (self.exact or bool((safe | zero).all() and safe.any()))


class Instance:
    """Finds the Gramian of B losses of single instances in one backward pass.

    Each loss must come from its own instance alone. Hooks on inner tensors are called with the
    gradients of all instances at once, and have to treat each row by itself: in steps of one pass
    that is looked at now and then.
    """

    name = "instance"

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}
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
        retain_graph: bool = True,
    ) -> FoundInstances:
        """The Gramian of the gradients of `factors · losses`.

        The graph is kept where another pass has to follow, which the result tells.

        Args:
            losses: `[B]`, one for each instance.
            factors: `[B]`, what each is multiplied by.
            parameters: n leaf tensors that require grad.
            shared_parameters: those whose gradients count, or None for all that are reached.
            sit_out: instances whose row and column are left zero.
            look: find out anew which rows are whose.
            exact: multiply in float64, where squares would leave the range of float32.
            retain_graph: keep the graph even where no other pass has to follow.

        Raises:
            ValueError: no parameter is reached, a sparse gradient, or instances that mix.
        """
        device = losses.device
        step = step_of(losses, _without(factors, sit_out), parameters)
        reach = step.graph.reach(1, len(parameters))
        chosen = shared_indices(parameters, reach, shared_parameters)
        with torch.no_grad(), no_autocast(losses.device):
            total = GramianSum(len(losses), device, frozenset(chosen), exact)
            doubts: list[Tensor] | None = []
            known, held, direct = None, None, False
            if len(losses) == 1:
                _take_one(step, total)
            else:
                known, is_new = self._known_of(step, look)
                if known.certain and not step.strays:
                    held = Held(parameters)
                    direct = not (is_new or exact or self._moved is not None) and known.agrees()
                doubts = _collect(step, known, total.add, held, retain_graph or not direct)
                if doubts is None:
                    total = GramianSum(len(losses), device, frozenset(chosen), exact)
                    look_at(step, known)
                    held = Held(parameters) if known.certain else None
                    doubts = _collect(step, known, total.add, held)
        shared = [parameters[k] for k in chosen]
        taken = _mask(len(losses), sit_out, device) if sit_out else None
        g, extremes = total.close(taken)
        if self._moved is not None:
            doubts = [*(doubts or []), self._moved]
            self._moved = None
        doubt = torch.stack([d.to(device) for d in doubts]).any() if doubts else None
        tolerance = _tolerance(losses, shared, total.narrow)
        exact = exact or losses.dtype == torch.float64
        return FoundInstances(g, shared, extremes, doubt, tolerance, exact, held, direct, known)

    def exactly(self, found: FoundInstances, sit_out: frozenset[int]) -> FoundInstances:
        """The same with products in float64, of a step that needs no other pass."""
        assert found.held is not None
        parameters, device = found.held.parameters, found.gramian.device
        shared = {id(p) for p in found.shared}
        chosen = frozenset(k for k, p in enumerate(parameters) if id(p) in shared)
        total = GramianSum(len(found.gramian), device, chosen, exact=True)
        with torch.no_grad(), no_autocast(device):
            for each in found.held.parts():
                total.add(each)
        taken = _mask(len(found.gramian), sit_out, device) if sit_out else None
        g, extremes = total.close(taken)
        return replace(found, gramian=g, extremes=extremes, exact=True)

    def combined(
        self,
        found: FoundInstances,
        weights: Tensor,
        other_weights: Tensor,
        sit_out: frozenset[int],
    ) -> list[tuple[Tensor, Tensor]]:
        """Parameters and their gradients of `Σ_b w_b ℓ_b`, from what is held.

        Args:
            found: of this step.
            weights, other_weights: `[B]`, for the shared parameters and for the others.
            sit_out: instances that do not count.
        """
        held = found.held
        assert held is not None
        shared = {id(p) for p in found.shared}
        taken = None
        if sit_out:
            taken = _mask(len(weights), sit_out, weights.device)
            weights, other_weights = (torch.where(taken, w, 0.0) for w in (weights, other_weights))
        each = {
            k: weights if id(p) in shared else other_weights for k, p in enumerate(held.parameters)
        }
        with torch.no_grad(), no_autocast(weights.device):
            return held.combined(each, taken)

    def check(
        self,
        found: FoundInstances,
        weights: Tensor,
        other_weights: Tensor,
        gradients: Sequence[tuple[Tensor, Tensor]],
        *,
        compare: bool = False,
    ) -> None:
        """Whether `|d|² = wᵀGw`, as it has to be if every row is still whose it was.

        That is not waited for on an accelerator: rows are then looked at at the next step.

        Args:
            found: of this step.
            weights, other_weights: w `[B]`, for the shared parameters and for the others.
            gradients: d, by parameter.
            compare: whether they are of a second pass, with which what is held has to agree before
                it does alone.

        Raises:
            ValueError: it is not.
        """
        g, w, known = found.gramian, weights.to(found.gramian), found.known
        is_host = _on_host(g)
        agrees = known is not None and known.n_agreed >= AGREED
        compare = compare and found.held is not None
        if not is_host and (found.direct or (compare and agrees)):
            # Nothing that has to be read is left over for the next step, so it can be direct.
            return
        shared = {id(p) for p in found.shared}
        chosen = [d for p, d in gradients if id(p) in shared]
        if not chosen:
            return
        square = _square(chosen, g, found.exact)
        largest = (w.abs() * g.diagonal().sqrt()).sum().square()
        moved = (square - w @ g @ w).abs() > found.tolerance * largest
        if known is not None and compare and not (is_host and bool(moved)):
            differs = self._differs(found, weights, other_weights, gradients, largest)
            known.n_agreed += 1
            if not is_host:
                moved = moved | differs
            elif bool(differs):
                known.refused, known.certain = True, False
        if not is_host:
            self._moved = moved
        elif bool(moved):
            raise ValueError(
                'with jacobian="instance" instances must not mix, and the rows of every layer must '
                "stay with their instances while the graph is the same, found a step at which they "
                'do not; use jacobian="loop"'
            )

    def _differs(
        self,
        found: FoundInstances,
        weights: Tensor,
        other_weights: Tensor,
        gradients: Sequence[tuple[Tensor, Tensor]],
        largest: Tensor,
    ) -> Tensor:
        """0-dim, whether what is held makes something else than these gradients."""
        g = found.gramian
        wanted = {id(p): d for p, d in gradients}
        held = self.combined(found, weights, other_weights, frozenset())
        if {id(p) for p, _ in held} != wanted.keys():
            return torch.ones_like(largest, dtype=torch.bool)
        with torch.no_grad():
            apart = [d - wanted[id(p)] for p, d in held]
        others = (other_weights.to(g).abs() * found.extremes.sqrt()).sum().square()
        bound = found.tolerance**2 * (largest + others)
        return ~(_square(apart, g, found.exact) <= bound)

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
        step = step_of(losses, _without(torch.ones_like(weights), sit_out), parameters)
        taken = _mask(len(losses), sit_out, losses.device)
        weights = torch.where(taken, weights, 0.0)
        result: list[tuple[Tensor, Tensor]] = []

        def add(found: dict[int, Part], narrow: bool) -> None:
            for k, part in found.items():
                p = parameters[k]
                gradient = masked(part, taken).combine(weights.to(p.device))
                result.append((p, gradient.to(p.dtype)))

        with torch.no_grad(), no_autocast(losses.device):
            _collect(step, self._known_of(step, False)[0], add)
        return result

    def _known_of(self, step: InstanceStep, look: bool) -> tuple[Known, bool]:
        """What is known of graphs like this one, and whether it was found out anew, as where that
        is due."""
        key = fingerprint(step.graph, step.place, step.losses, step.parameters)
        known = self._known.pop(key, None) or Known(sends_rows_about(step.graph))
        known.n_steps += not look
        # Of such a graph it is only the last check that can ask for it.
        known.refused |= look and known.certain
        # Instances may meet where they did not before, as in a hinge that was at rest.
        due = known.n_steps & (known.n_steps - 1) == 0
        is_new = look or due or known.moves
        if is_new:
            look_at(step, known)
        self._known[key] = known
        while len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        return known, is_new


def _collect(
    step: InstanceStep,
    known: Known,
    add: Callable[[dict[int, Part], bool], None],
    held: Held | None = None,
    retain_graph: bool = True,
) -> list[Tensor] | None:
    """Hands over what each layer has of its parameters, as soon as it is there, and has it held.

    Returns:
        For each node with rows that never had a gradient whether one has now. None if rows are not
        where they were; what was handed over is then void.
    """
    owners = {step.graph.order[place]: rows for place, rows in known.owners.items()}
    layers: dict[Node, list[Layer]] = {}
    for layer in step.layers:
        layers.setdefault(layer.node, []).append(layer)
    ways = {k: ways_to(step, k, known) for k in step.strays}
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
            found = parts(layer, gradient, rows, step.parameters)
            add(found, is_half(gradient))
            if held is not None:
                held.add(layer, gradient, rows, found)

    nodes = [*layers, *(node for node in starts if node not in layers)]
    visitors = {node: partial(visit, node) for node in nodes}
    step.visit(visitors, step.factors, retain_graph)
    if stale:
        return None
    for k, each in ways.items():
        part = stray_part(each, kept, owners.__getitem__, step.parameters[k])
        if part is not None:
            add({k: part}, any(is_half(g) for g in kept.values()))
    return doubts


def _on_host(tensor: Tensor) -> bool:
    """Whether a look at a tensor waits for nothing."""
    return tensor.device.type == "cpu"


def _square(tensors: Sequence[Tensor], like: Tensor, exact: bool) -> Tensor:
    """The sum of the squares of all entries: blocks in their own precision, then float64."""
    wide = [t.double() if exact or is_half(t) else t for t in tensors]
    blocks: list[Tensor] = []
    for flat in (t.reshape(-1) for t in wide):
        whole = flat.numel() // _BLOCK * _BLOCK
        if whole:
            norms = torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), dim=1)
            blocks.append(norms.to(like).square().sum())
        blocks.append(flat[whole:])
    rest = [each for each in blocks if each.dim() == 1]
    sums = [each for each in blocks if each.dim() == 0]
    sums += [norm.to(like).square() for norm in torch._foreach_norm(rest)]
    return torch.stack(sums).sum()


def _tolerance(losses: Tensor, shared: Sequence[Tensor], narrow: bool) -> float:
    if narrow or losses.device.type != "cpu" or any(is_half(p) for p in shared):
        # Accelerators may multiply in TF32.
        return 3e-2
    return 1e-8 if all(p.dtype == torch.float64 for p in [losses, *shared]) else 1e-4


def _take_one(step: InstanceStep, total: GramianSum) -> None:
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
