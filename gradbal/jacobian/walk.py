"""One walk over the graph of all losses: who reaches what, and who makes use of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from gradbal.jacobian.graph import Reach, refuse_reentrant

__all__ = ["Use", "Walk", "walk"]


class Use(NamedTuple):
    """An edge of the graph: `consumer` takes output `output` of a node as its input `position`.

    The consumer is None where a loss's backward pass starts there.
    """

    consumer: Node | None
    position: int
    output: int


@dataclass(frozen=True)
class Walk:
    """What the graph of T losses tells.

    order: the nodes that some loss reaches, each before the nodes that its inputs come from.
    tasks: node → bit mask of the losses that reach it. uses: node → the edges into it. leaves:
    parameter's index → the node that accumulates its gradient, for those that are reached.
    """

    order: list[Node]
    tasks: dict[Node, int]
    uses: dict[Node, list[Use]]
    leaves: dict[int, Node]

    def reach(self, n_tasks: int, n_parameters: int) -> list[Reach]:
        """For each loss, which parameters it reaches."""
        masks = [0] * n_parameters
        for k, node in self.leaves.items():
            masks[k] = self.tasks[node]
        return [tuple(bool(mask >> i & 1) for mask in masks) for i in range(n_tasks)]


def walk(roots: Sequence[Tensor | GradientEdge], parameters: Sequence[Tensor]) -> Walk:
    """Walks each node once, however many losses reach it.

    Args:
        roots: T tensors that require grad, or edges of the graph.
        parameters: n leaf tensors that require grad.

    Raises:
        ValueError: a part of the graph is reentrant activation checkpointing.
    """
    starts = [get_gradient_edge(r) if isinstance(r, Tensor) else r for r in roots]
    index = {id(p): k for k, p in enumerate(parameters)}
    leaves: dict[int, Node] = {}
    uses: dict[Node, list[Use]] = {}
    order: list[Node] = []
    for edge in starts:
        stack: list[tuple[Node, bool]] = [(edge.node, False)]
        while stack:
            node, is_done = stack.pop()
            if is_done:
                order.append(node)
                continue
            if node in uses:
                continue
            refuse_reentrant(node)
            uses[node] = []
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) in index:
                leaves[index[id(leaf)]] = node
            stack.append((node, True))
            stack.extend((n, False) for n, _ in node.next_functions if n is not None)
    order.reverse()
    tasks = dict.fromkeys(order, 0)
    for i, edge in enumerate(starts):
        tasks[edge.node] |= 1 << i
        uses[edge.node].append(Use(None, -1, edge.output_nr))
    for node in order:
        for position, (source, output) in enumerate(node.next_functions):
            if source is not None:
                tasks[source] |= tasks[node]
                uses[source].append(Use(node, position, output))
    return Walk(order, tasks, uses, leaves)
