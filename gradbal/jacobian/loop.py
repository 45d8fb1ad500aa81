"""One backward pass a loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from gradbal.jacobian.compiled import gradients
from gradbal.jacobian.graph import Root, hooks_held_back, only_reached

__all__ = ["Loop", "gradients_of"]


class Loop:
    """Takes the gradients of T losses one loss at a time: works for every model."""

    name = "loop"
    follows_graph = True

    def rows(
        self, roots: Sequence[Root], parameters: Sequence[Tensor], retain_graph: bool
    ) -> Iterator[tuple[Tensor | None, ...]]:
        """For each root its gradients with respect to the parameters, None where it has none."""
        for i, (root, cotangent) in enumerate(roots, 1):
            yield gradients(root, parameters, cotangent, retain_graph or i < len(roots))


def gradients_of(
    root: Root, parameters: Sequence[Tensor], retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of one loss, in a pass of its own; hooks of the parameters do not run."""
    with hooks_held_back(parameters):
        (grads,) = Loop().rows([root], parameters, retain_graph)
    return only_reached(root[0], parameters, grads)
