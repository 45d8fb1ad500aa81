"""The losses of one step of single instances, and passes through their graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradbal.jacobian.layers import Layer, find_layers, owned
from gradbal.jacobian.walk import Walk, walk

__all__ = ["InstanceStep", "step_of"]


@dataclass(frozen=True)
class InstanceStep:
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

    def visit(
        self,
        visitors: Mapping[Node, Callable[[Tensor], None]],
        factors: Tensor,
        retain_graph: bool = True,
    ) -> None:
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
                self.losses, edges, factors, retain_graph=retain_graph, allow_unused=True
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


def step_of(
    losses: Tensor,
    factors: Tensor,
    parameters: Sequence[Tensor],
) -> InstanceStep:
    """What the graph of B losses `[B]`, each multiplied by its factor `[B]`, tells of a step."""
    graph = walk([losses], parameters)
    layers = find_layers(graph, parameters)
    inside = {k for layer in layers for k in owned(layer)}
    strays = [k for k in sorted(graph.leaves) if k not in inside]
    place = {node: i for i, node in enumerate(graph.order)}
    return InstanceStep(losses, factors.to(losses.dtype), parameters, graph, layers, strays, place)
