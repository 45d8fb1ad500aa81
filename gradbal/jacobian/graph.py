"""What the autograd graph tells: which parameters a loss reaches, and which are shared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

__all__ = [
    "Reach",
    "Root",
    "check_dense",
    "hooks_held_back",
    "reached_parameters",
    "refuse_reentrant",
    "shared_indices",
]

Reach = tuple[bool, ...]
"""For each parameter, whether a loss reaches it."""

Root = tuple[Tensor | GradientEdge, Tensor]
"""Where a loss's backward pass starts, and with which cotangent."""


def reached_parameters(
    roots: Iterable[Tensor | GradientEdge],
    parameters: Sequence[Tensor],
    stop: GradientEdge | None = None,
) -> list[Reach]:
    """Which parameters a backward pass from each root would reach, read from the graph.

    Args:
        roots: T tensors that require grad, or edges of the graph.
        parameters: n tensors that require grad, mostly leaves.
        stop: an edge beyond which the walk does not go.

    Returns:
        T tuples of n booleans.

    Raises:
        ValueError: a part of the graph is reentrant activation checkpointing, which takes
            gradients only in a backward pass to all leaves.
    """
    leaves = {id(p): i for i, p in enumerate(parameters) if p.is_leaf}
    inner = {_ends(get_gradient_edge(p)): i for i, p in enumerate(parameters) if not p.is_leaf}
    end = None if stop is None else _ends(stop)
    result = []
    for root in roots:
        found = [False] * len(parameters)
        seen: set[Node] = set()
        stack: list[tuple[Node | None, int]] = [
            _ends(get_gradient_edge(root) if isinstance(root, Tensor) else root)
        ]
        while stack:
            edge = stack.pop()
            if edge in inner:
                found[inner[edge]] = True
            node = edge[0]
            if node is None or node in seen or edge == end:
                continue
            seen.add(node)
            refuse_reentrant(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) in leaves:
                found[leaves[id(leaf)]] = True
            stack.extend(node.next_functions)
        result.append(tuple(found))
    return result


def refuse_reentrant(node: Node) -> None:
    """Refuses activation checkpointing whose backward pass would go to all leaves.

    Raises:
        ValueError: the node is of that kind.
    """
    if node.name() == "CheckpointFunctionBackward":
        raise ValueError(
            "activation checkpointing must be non-reentrant, found reentrant; "
            "call checkpoint(..., use_reentrant=False)"
        )


def _ends(edge: GradientEdge) -> tuple[Node | None, int]:
    return edge.node, edge.output_nr


def shared_indices(
    parameters: Sequence[Tensor], reach: Sequence[Reach], explicit: Sequence[Tensor] | None
) -> list[int]:
    """Indices of the parameters that two or more losses reach (of all, when there is one loss).

    Raises:
        ValueError: there are none.
    """
    counts = [sum(column) for column in zip(*reach, strict=True)]
    if explicit is None:
        needed = min(2, len(reach))
        shared = [k for k, count in enumerate(counts) if count >= needed]
    else:
        chosen = {id(p) for p in explicit}
        shared = [k for k, p in enumerate(parameters) if id(p) in chosen and counts[k]]
    if not shared:
        reached = sum(1 for count in counts if count)
        raise ValueError(
            "at least one trained parameter must be reached by two or more losses, found "
            f"{reached} of {len(parameters)} reached, each by one loss alone"
            if explicit is None
            else f"no loss reaches any of the {len(explicit)} `shared_params` or `layer` tensors"
        )
    return shared


def check_dense(grads: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> None:
    """Refuses sparse gradients.

    Raises:
        ValueError: a gradient is sparse.
    """
    for g, p in zip(grads, parameters, strict=True):
        if g is not None and g.layout != torch.strided:
            raise ValueError(
                f"gradients must be dense, found a {g.layout} one for a parameter of shape "
                f"{list(p.shape)}; use nn.Embedding(sparse=False)"
            )


@contextlib.contextmanager
def hooks_held_back(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Holds back the users' gradient hooks on the parameters themselves.

    They run when the result is delivered, once, as after an ordinary backward pass; the T passes
    would run them T more times, on rows.
    """
    held = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    for p, _ in held:
        p._backward_hooks = None
    try:
        yield
    finally:
        for p, hooks in held:
            p._backward_hooks = hooks
