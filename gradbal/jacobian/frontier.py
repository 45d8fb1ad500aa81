"""The cut between heads and what losses share, read from the autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from gradbal.jacobian.graph import Root

__all__ = ["Entered", "Frontier", "find_frontier"]

_Slot = tuple[Node, int]

# Other nodes may have an attribute of any name: what a custom function keeps.
_LEAF: type = torch._C._functions.AccumulateGrad


@dataclass(frozen=True)
class Entered:
    """What one loss's own part of the graph gives.

    cotangents: for each edge of the frontier where it enters the shared part, the gradient that
    its own part alone sends there. heads: index → gradient of the parameters that only it reaches.
    """

    cotangents: dict[GradientEdge, Tensor]
    heads: dict[int, Tensor]


class Frontier:
    """Where the own parts of T losses enter the part of the graph that they share.

    A node is shared if two or more losses reach it; all that follows it is then shared too. The
    frontier of a loss are the edges from its own part into the shared one, or the edge that it
    starts from where that is shared already. The gradients of a loss with respect to shared
    parameters are the same from its cotangents at its frontier as from the loss itself.

    Attributes:
        edges: for each of T losses its frontier, without repetitions, in the order of the graph.
        own: for each of T losses the indices of parameters that it alone reaches.
        shared: the indices of parameters that two or more losses reach.
        nodes: the shared nodes, with the next edges of each.
    """

    def __init__(
        self,
        roots: Sequence[Root],
        parameters: Sequence[Tensor],
        nodes: dict[Node, tuple[Any, ...]],
        parts: list[dict[Node, tuple[Any, ...]]],
    ) -> None:
        self.nodes = nodes
        self._roots = roots
        self._parameters = parameters
        self._starts = [_start(root) for root, _ in roots]
        # For each loss, the nodes of its own part that have edges into the shared part.
        self._doors: list[list[Node]] = []
        self.edges: list[list[GradientEdge]] = []
        for part, start in zip(parts, self._starts, strict=True):
            doors = {
                node: slots
                for node, nexts in part.items()
                if (slots := [slot for slot in nexts if slot[0] in nodes])
            }
            found = [start] if start[0] in nodes else []
            found = list(dict.fromkeys(found + [s for slots in doors.values() for s in slots]))
            self._doors.append(list(doors))
            self.edges.append([GradientEdge(*slot) for slot in found])
        self.own, self.shared = self._owners(parts)
        self._nested: dict[frozenset[Node], bool] = {}

    def _owners(
        self, parts: list[dict[Node, tuple[Any, ...]]]
    ) -> tuple[list[list[int]], list[int]]:
        where: dict[Node, list[int]] = {}
        leaves: dict[int, list[int]] = {}
        for k, p in enumerate(self._parameters):
            if p.is_leaf:
                leaves.setdefault(id(p), []).append(k)
            else:
                where.setdefault(get_gradient_edge(p).node, []).append(k)

        def among(nodes: dict[Node, tuple[Any, ...]]) -> list[int]:
            found: list[int] = []
            for node in nodes:
                if type(node) is _LEAF:
                    found.extend(leaves.get(id(node.variable), ()))  # type: ignore[attr-defined]
                elif node in where:
                    found.extend(where[node])
            return sorted(found)

        return [among(part) for part in parts], among(self.nodes)

    def cotangents(
        self, *, retain_graph: bool = True
    ) -> tuple[dict[GradientEdge, Tensor], list[dict[int, Tensor]]]:
        """Walks the own part of every loss once.

        Returns:
            For each edge of the frontier the cotangents `[T, *shape]`, zero where a loss does not
            enter there; and for each loss, index → gradient of the parameters it alone reaches.
        """
        entered = [self.walk(i, retain_graph=retain_graph) for i in range(len(self.edges))]
        found: dict[GradientEdge, Tensor] = {}
        for each in entered:
            for edge, c in each.cotangents.items():
                if edge not in found:
                    zero = torch.zeros_like(c)
                    rows = [other.cotangents.get(edge, zero) for other in entered]
                    found[edge] = torch.stack(rows)
        return found, [each.heads for each in entered]

    def walk(self, i: int, *, retain_graph: bool = True) -> Entered:
        """Walks the own part of loss i; the shared part is not run through.

        Args:
            retain_graph: keep the buffers of this part.
        """
        root, cotangent = self._roots[i]
        start, edges, own = self._starts[i], self.edges[i], self.own[i]
        if start[0] in self.nodes:
            return Entered({edges[0]: cotangent}, {})
        inputs: list[Any] = [*edges, *(self._parameters[k] for k in own)]
        if not inputs:
            return Entered({}, {})
        slots = {(e.node, e.output_nr) for e in edges}
        catch = _Catch(slots, stop=self._is_nested(i))
        handles = [door.register_hook(catch.at(door)) for door in self._doors[i]]
        try:
            grads = torch.autograd.grad(
                root,
                inputs,
                cotangent,
                # Where an edge lies behind another, the shared part is walked, with nothing.
                retain_graph=retain_graph or catch.stop,
                allow_unused=True,
            )
        finally:
            for handle in handles:
                handle.remove()
        heads = zip(own, grads[len(edges) :], strict=True)
        return Entered(
            {e: c for e in edges if (c := catch.found.get((e.node, e.output_nr))) is not None},
            {k: g for k, g in heads if g is not None},
        )

    def _is_nested(self, i: int) -> bool:
        """Whether some edge of the frontier of loss i lies behind another one."""
        ends = frozenset(e.node for e in self.edges[i])
        if len(ends) < 2:
            return False
        if ends not in self._nested:
            self._nested[ends] = not ends.isdisjoint(self.behind(ends))
        return self._nested[ends]

    def behind(self, starts: frozenset[Node]) -> set[Node]:
        """The nodes that some of the shared nodes lead to."""
        seen: set[Node] = set()
        stack = list(starts)
        while stack:
            for node, _ in self.nodes[stack.pop()]:
                if node is not None and node not in seen:
                    seen.add(node)
                    stack.append(node)
        return seen


class _Catch:
    """Takes what nodes of a loss's own part send over the frontier, edge by edge.

    What autograd captures at an edge would be the sum of all paths to it, those through the shared
    part among them, and with the hooks of users on the tensor there, which run again when the pass
    goes on from it.
    """

    def __init__(self, slots: set[_Slot], stop: bool) -> None:
        self.stop = stop
        self.found: dict[_Slot, Tensor] = {}
        self._slots = slots

    def at(self, door: Node) -> Callable[[Any, Any], Any]:
        nexts = door.next_functions

        def hook(sent: tuple[Tensor | None, ...], _: Any) -> Any:
            for slot, c in zip(nexts, sent, strict=True):
                if c is not None and slot in self._slots:
                    self.found[slot] = self.found[slot] + c if slot in self.found else c
            if not self.stop:
                return None
            return tuple(
                None if slot in self._slots else c for slot, c in zip(nexts, sent, strict=True)
            )

        return hook


def find_frontier(roots: Sequence[Root], parameters: Sequence[Tensor]) -> Frontier:
    """Finds what losses share, in one walk over the graph that visits every node once or twice.

    Args:
        roots: for each of T losses, where its backward pass starts and with which cotangent.
        parameters: n tensors that require grad, mostly leaves.

    Example:
        >>> w, v = (torch.tensor(x, requires_grad=True) for x in (2.0, 3.0))
        >>> z = w * w
        >>> losses = [z * v, z * z]
        >>> one = torch.tensor(1.0)
        >>> found = find_frontier([(loss, one) for loss in losses], [w, v])
        >>> found.shared, found.own
        ([0], [[1], []])
        >>> cotangents, heads = found.cotangents()
        >>> [c.tolist() for c in cotangents.values()], heads
        ([[3.0, 8.0]], [{1: tensor(4.)}, {}])
    """
    owner: dict[Node, int] = {}
    nexts: dict[Node, tuple[Any, ...]] = {}
    shared: dict[Node, tuple[Any, ...]] = {}
    for i, (root, _) in enumerate(roots):
        stack = [_start(root)[0]]
        while stack:
            node = stack.pop()
            first = owner.setdefault(node, i)
            if node not in nexts:
                nexts[node] = node.next_functions
            elif first == i or node in shared:
                continue
            else:
                # All that follows was reached before, by this loss or another.
                shared[node] = nexts[node]
            stack.extend(n for n, _ in nexts[node] if n is not None)
    parts: list[dict[Node, tuple[Any, ...]]] = [{} for _ in roots]
    for node, i in owner.items():
        if node not in shared:
            parts[i][node] = nexts[node]
    return Frontier(roots, parameters, shared, parts)


def _start(root: Tensor | GradientEdge) -> _Slot:
    edge = get_gradient_edge(root) if isinstance(root, Tensor) else root
    return edge.node, edge.output_nr
