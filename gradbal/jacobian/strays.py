"""Gradients, instance by instance, of parameters that act through no layer that is known.

Such a parameter is followed upwards to the first nodes where gradients are of single instances
still. Below these its gradient of each instance is taken by calling the few nodes on the way down,
once for each instance. That costs B times these nodes, and no pass through the rest of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from gradbal.jacobian.graph import check_dense
from gradbal.jacobian.owners import Owners
from gradbal.jacobian.per_instance import Gathered, Outer, Part, wide
from gradbal.jacobian.walk import Walk

__all__ = ["Path", "candidates", "carries", "paths", "stray_part"]

_CARRIERS = frozenset(
    {
        "AliasBackward0",
        "CatBackward0",
        "CloneBackward0",
        "DivBackward0",
        "ExpandBackward0",
        "MulBackward0",
        "PermuteBackward0",
        "RepeatBackward0",
        "ReshapeAliasBackward0",
        "SelectBackward0",
        "SliceBackward0",
        "SplitBackward0",
        "SplitWithSizesBackward0",
        "SqueezeBackward0",
        "SqueezeBackward1",
        "StackBackward0",
        "TBackward0",
        "ToCopyBackward0",
        "TransposeBackward0",
        "UnbindBackward0",
        "UnsafeViewBackward0",
        "UnsqueezeBackward0",
        "ViewBackward0",
        "WeightNormInterfaceBackward0",
    }
)
"""What may stand between a parameter and the node where it meets the batch."""

_TURNS = {"TBackward0": True, "ToCopyBackward0": False}
"""Carriers of matrices that change no inner product, and whether they transpose."""


class Step(NamedTuple):
    """From a node's output to one of its inputs."""

    node: Node
    output: int
    position: int


Path = tuple[Step, ...]
"""From a node with gradients of single instances down to a parameter."""


def carries(node: Node) -> bool:
    """Whether the node may hand a parameter on before it meets the batch."""
    return node.name() in _CARRIERS


def candidates(graph: Walk, leaf: Node) -> Iterator[Node]:
    """The nodes on the way up from a parameter where its gradients may still be of single
    instances, or be so for the first time."""
    seen = {leaf}
    stack = [leaf]
    while stack:
        for use in graph.uses[stack.pop()]:
            node = use.consumer
            if node is None or node in seen:
                continue
            seen.add(node)
            if all(use.output == 0 for use in graph.uses[node]):
                yield node
            if carries(node):
                stack.append(node)


def paths(graph: Walk, leaf: Node, told: Callable[[Node], bool]) -> list[Path] | Node | None:
    """The ways down to a parameter from the nodes whose rows are told apart.

    Returns:
        The node where that ends in failure, or None where the parameter is a loss itself.
    """
    found: list[Path] = []
    stack: list[tuple[Node, Path]] = [(leaf, ())]
    while stack:
        node, below = stack.pop()
        for use in graph.uses[node]:
            if use.consumer is None:
                return None
            # The output that a consumer is entered by is known with its own consumer.
            if below:
                below = (below[0]._replace(output=use.output), *below[1:])
            path = (Step(use.consumer, 0, use.position), *below)
            if told(use.consumer):
                found.append(path)
            elif carries(use.consumer):
                stack.append((use.consumer, path))
            else:
                return use.consumer
    return found


def stray_part(
    ways: Sequence[Path],
    gradients: dict[Node, Tensor],
    owners: Callable[[Node], Owners],
    parameter: Tensor,
) -> Part | None:
    """The gradients of one parameter for each instance; None where it has none.

    Args:
        ways: down to it.
        gradients: at the output of the nodes that the ways start from.
        owners: of their rows.
        parameter: itself.

    Raises:
        ValueError: a sparse gradient.
    """
    ways = [way for way in ways if way[0].node in gradients]
    if not ways:
        return None
    return _outer(ways, gradients, owners, parameter) or Gathered(
        torch.stack(list(_rows(ways, gradients, owners, parameter)))
    )


def _outer(
    ways: Sequence[Path],
    gradients: dict[Node, Tensor],
    owners: Callable[[Node], Owners],
    parameter: Tensor,
) -> Outer | None:
    """The same for a matrix that is multiplied by, in half precision or more than once."""
    inputs, cotangents = [], []
    orders = {tuple(step.node.name() for step in way[1:]) for way in ways}
    (order, *others) = orders
    if others or parameter.dim() != 2 or not all(name in _TURNS for name in order):
        return None
    for way in ways:
        node, _, position = way[0]
        if node.name() == "AddmmBackward0" and position == 2:
            if node._saved_alpha != 1:  # type: ignore[attr-defined]
                return None
            taken = node._saved_mat1  # type: ignore[attr-defined]
        elif node.name() == "MmBackward0" and position == 1:
            taken = node._saved_self  # type: ignore[attr-defined]
        else:
            return None
        if taken is None:
            return None
        known = owners(node)
        inputs.append(known.apart(wide(taken.detach())))
        cotangents.append(known.apart(wide(gradients[node])))
    turned = sum(_TURNS[name] for name in order) % 2 == 1
    return Outer(torch.cat(inputs, 1), torch.cat(cotangents, 1), not turned, parameter.shape)


def _rows(
    ways: Sequence[Path],
    gradients: dict[Node, Tensor],
    owners: Callable[[Node], Owners],
    parameter: Tensor,
) -> Iterator[Tensor]:
    """The gradient of one instance after the other."""
    start = ways[0][0].node
    shapes = {way: _shapes(way, parameter.shape) for way in ways}
    whose = {}
    for way in ways:
        node = way[0].node
        known, gradient = owners(node), gradients[node]
        shape = [1] * gradient.dim()
        shape[known.dim] = -1
        whose[node] = known.whose.view(shape)
    for b in range(owners(start).n):
        total: Tensor | None = None
        for way in ways:
            node = way[0].node
            found: Tensor | None = torch.where(whose[node] == b, gradients[node], 0.0)
            for step, wanted in zip(way, shapes[way], strict=True):
                if found is not None:
                    found = _called(step, found)
                if found is not None:
                    check_dense([found], [parameter])
                    # What was broadcast is summed by those who call a node.
                    found = found.sum_to_size(wanted)
            if found is not None:
                total = found if total is None else total + found
        yield torch.zeros_like(parameter) if total is None else total


def _shapes(way: Path, shape: torch.Size) -> list[torch.Size]:
    """Of what each step on the way arrives at; the last is the parameter's."""
    found = [shape]
    for step in reversed(way[1:]):
        name, outputs = step.node.name(), getattr(step.node, "_input_metadata", None)
        if outputs is not None:
            shape = outputs[step.output].shape
        elif name in _TURNS:
            shape = torch.Size(reversed(shape)) if _TURNS[name] else shape
        else:
            raise ValueError(
                f'with jacobian="instance" a parameter that goes through {name} needs torch 2.5 or '
                f'later, found {torch.__version__}; use jacobian="loop"'
            )
        found.append(shape)
    return found[::-1]


def _called(step: Step, gradient: Tensor) -> Tensor | None:
    """What a node makes of the gradient of one of its outputs, for one of its inputs."""
    n_outputs = len(getattr(step.node, "_input_metadata", ())) or step.output + 1
    arguments: list[Tensor | None] = [None] * n_outputs
    arguments[step.output] = gradient
    try:
        found = step.node(*arguments)  # type: ignore[operator]
    except TypeError as error:
        # A custom function, or one with several outputs, whose number torch 2.4 does not tell.
        raise ValueError(
            f'with jacobian="instance" no parameter may go into {step.node.name()} itself, which '
            'cannot be called alone; use jacobian="loop"'
        ) from error
    result: Tensor | None = found[step.position] if isinstance(found, tuple) else found
    return result
