"""A representation between trunk and heads, at which the Jacobian is taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradbal.jacobian import Rows, reached_parameters

__all__ = ["Representation"]


class Representation:
    """Which parameters lie before a tensor of the graph, and which are reached past it.

    Args:
        features: z, any shape, computed from trained parameters.
        roots: where the T losses' backward passes start.
        parameters: n leaf tensors.

    Attributes:
        before: parameters that z is computed from, and that no loss reaches past it.
        outside: parameters that some loss reaches past z: the heads, and what they share.
        both: those among `outside` that z is computed from as well.

    Raises:
        ValueError: z is not computed from trained parameters, or no loss depends on it.
    """

    def __init__(
        self,
        features: Tensor,
        roots: Sequence[Tensor | GradientEdge],
        parameters: Sequence[Tensor],
    ) -> None:
        (upstream,) = reached_parameters([features], parameters)
        if not any(upstream) or features.is_leaf:
            raise ValueError(
                "`features` must be computed from parameters that the optimizer trains, found a "
                f"tensor of shape {list(features.shape)} that is not"
            )
        past = reached_parameters(roots, [*parameters, features], stop=get_gradient_edge(features))
        if not any(row[-1] for row in past):
            raise ValueError("the losses must be computed from `features`, found that none is")
        self._features = features
        columns = list(zip(*(row[:-1] for row in past), strict=True))
        is_outside = [any(column) for column in columns]
        # Parameters that two losses reach past z.
        self._common = {
            id(p) for p, column in zip(parameters, columns, strict=True) if sum(column) > 1
        }
        everything = list(zip(parameters, upstream, is_outside, strict=True))
        self.before = [p for p, up, out in everything if up and not out]
        self.outside = [p for p, _, out in everything if out]
        self.both = [p for p, up, out in everything if up and out]

    def deliver(
        self,
        rows: Rows,
        direction: Tensor,
        shared: Sequence[float | None],
        heads: Sequence[float | Tensor | None],
        retain_graph: bool,
    ) -> None:
        """Sends gradients into `.grad`: through the trunk from z, and as they are past it.

        Args:
            rows: gradients with respect to z (shared) and `outside` (the others).
            direction: the gradient at z, flat.
            shared: for each task what its gradients past z are multiplied by where two losses
                reach a parameter or z depends on it; None for a task that sits out.
            heads: the same for parameters of that task alone.
            retain_graph: keep the graph of z.
        """
        common = self._common.union(id(p) for p in self.both)
        targets: list[Tensor] = []
        grads: list[Tensor] = []
        for i, head in enumerate(rows.heads):
            for k, g in head.items():
                p = rows.parameters[k]
                factor = shared[i] if id(p) in common else heads[i]
                if factor is not None:
                    targets.append(p)
                    grads.append(g if factor == 1.0 else g * factor)
        z = self._features
        if self.before:
            torch.autograd.backward(
                z, direction.view(z.shape).to(z.dtype), retain_graph, inputs=self.before
            )
        if targets:
            torch.autograd.backward(targets, grads)
