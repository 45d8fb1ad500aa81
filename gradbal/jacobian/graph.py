"""What the autograd graph tells: which parameters a loss reaches, and which are shared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from gradbal.jacobian.compiled import (
    edges_onward,
    has_compiled_parts,
    is_compiled,
    keep_buffers,
)

__all__ = [
    "Absent",
    "Reach",
    "Root",
    "RootsInTurn",
    "check_dense",
    "common_kind",
    "hooks_held_back",
    "only_reached",
    "reach_of",
    "reached_parameters",
    "refuse_reentrant",
    "shared_indices",
    "there",
    "used_by_ddp",
]

Reach = tuple[bool, ...]
"""For each parameter, whether a loss reaches it."""

Root = tuple[Tensor | GradientEdge, Tensor]
"""Where a loss's backward pass starts, and with which cotangent."""


_DDP = "_DDPSinkBackward"
"""The node that all outputs of a DDP module with unused parameters go through."""


@dataclass(frozen=True)
class Absent:
    """Stands for the root of a loss that is not there.

    reach: what the loss reached when it was last there; None where that is not known.
    """

    reach: Reach | None = None


class RootsInTurn(Protocol):
    """Roots that are made one after another, each when the pass before is done.

    missing: tasks whose loss is not there.
    """

    missing: frozenset[int]

    def __len__(self) -> int: ...

    def make(self, i: int) -> Root | Absent:
        """The root of task i; called once for each, in order."""
        ...


def reached_parameters(
    roots: Iterable[Tensor | GradientEdge],
    parameters: Sequence[Tensor],
    stop: GradientEdge | None = None,
) -> list[Reach]:
    """Which parameters a backward pass from each root would reach, read from the graph.

    Compiled parts that it meets can be walked more than once from then on.

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
        seen: set[object] = set()
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
            if is_compiled(node):
                keep_buffers(node)
                # The same part may be met again, through another of its outputs.
                seen.remove(node)
                if edge not in seen:
                    seen.add(edge)
                    stack.extend(edges_onward(node, edge[1]))
                continue
            if node.name() == _DDP:
                # All that a DDP module returns goes through one node, and nothing mixes there.
                seen.remove(node)
                if edge not in seen:
                    seen.add(edge)
                    stack.append(node.next_functions[edge[1]])
                continue
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) in leaves:
                found[leaves[id(leaf)]] = True
            stack.extend(node.next_functions)
        result.append(tuple(found))
    return result


def used_by_ddp(roots: Sequence[Root | Absent], parameters: Sequence[Tensor]) -> Reach:
    """Which parameters some output of the DDP modules reaches that the losses were made from.

    That is what a module with `find_unused_parameters=True` waits for, whether or not there is a
    loss of that output.
    """
    outputs: list[GradientEdge] = []
    seen: set[Node] = set()
    stack = [
        get_gradient_edge(start).node if isinstance(start, Tensor) else start.node
        for start, _ in there(roots)
    ]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        onward = [(child, nr) for child, nr in node.next_functions if child is not None]
        if node.name() == _DDP:
            outputs += [GradientEdge(child, nr) for child, nr in onward]
        stack += [child for child, _ in onward]
    found = reached_parameters(outputs, parameters)
    return tuple(map(any, zip(*found, strict=True))) if found else (False,) * len(parameters)


def there(roots: Sequence[Root | Absent]) -> list[Root]:
    """The roots of the losses that are there."""
    return [root for root in roots if not isinstance(root, Absent)]


def reach_of(roots: Sequence[Root | Absent], parameters: Sequence[Tensor]) -> list[Reach | None]:
    """Which parameters each of T losses reaches, as far as that is known: read from the graph where
    a loss is there."""
    found = iter(reached_parameters((start for start, _ in there(roots)), parameters))
    return [root.reach if isinstance(root, Absent) else next(found) for root in roots]


def only_reached(
    root: Tensor | GradientEdge,
    parameters: Sequence[Tensor],
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of a loss without those zeros that compiled parts give to what it does not
    reach."""
    if not has_compiled_parts(root):
        return grads
    (reach,) = reached_parameters([root], parameters)
    return tuple(g if reached else None for g, reached in zip(grads, reach, strict=True))


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
    parameters: Sequence[Tensor],
    reach: Sequence[Reach | None],
    explicit: Sequence[Tensor] | None,
) -> list[int]:
    """Indices of the parameters that two or more losses reach (of all, when there is one loss).

    Losses of which it is not known what they reach do not count.

    Raises:
        ValueError: there are none.
    """
    known = [row for row in reach if row is not None]
    counts = [sum(column) for column in zip(*known, strict=True)]
    if explicit is None:
        needed = min(2, len(known))
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


def common_kind(parameters: Sequence[Tensor]) -> tuple[torch.device, torch.dtype]:
    """The device of the shared parameters, and the dtype that holds the gradients of all of them.

    Raises:
        ValueError: they are on several devices.
    """
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise ValueError(
            f"the shared parameters must be on one device, found "
            f"{', '.join(sorted(map(str, devices)))}"
        )
    dtype = parameters[0].dtype
    for p in parameters[1:]:
        dtype = torch.promote_types(dtype, p.dtype)
    return parameters[0].device, dtype


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


class hooks_held_back:
    """Holds back the users' gradient hooks on the parameters themselves.

    They run when the result is delivered, once, as after an ordinary backward pass; the T passes
    would run them T more times, on rows.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._held = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]

    def __enter__(self) -> None:
        for p, _ in self._held:
            p._backward_hooks = None

    def __exit__(self, *_: object) -> None:
        for p, hooks in self._held:
            p._backward_hooks = hooks
