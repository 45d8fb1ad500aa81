"""The exact Gramian without the Jacobian, layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradbal.jacobian.found import Found, largest_entries
from gradbal.jacobian.graph import (
    Root,
    check_dense,
    check_one_device,
    hooks_held_back,
    shared_indices,
)
from gradbal.jacobian.layers import find_layers, owned
from gradbal.jacobian.parts import Part, make_part
from gradbal.jacobian.products import gramian
from gradbal.jacobian.walk import Walk, walk

__all__ = ["Layerwise"]


class Layerwise:
    """Takes rows of fewer numbers than the gradients have, with the same inner products.

    1. The layers are read from the graph, with what they took in.
    2. The gradients of a loss go back through the layers, but not into their weights; each layer
       leaves the columns that stand for its weight and bias.
    3. A parameter that does not surely act through one such layer alone, or is no larger than what
       would stand for it, has its own gradient taken on the way.

    All products of the Gramian are in float64.
    """

    name = "gramian"

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def take(
        self,
        roots: Sequence[Root],
        parameters: Sequence[Tensor],
        shared_parameters: list[Tensor] | None,
        sit_out: frozenset[int],
    ) -> Found:
        """The Gramian of the shared parameters; the graph is kept.

        Args:
            roots: for each of T losses, where its backward pass starts and with which cotangent.
            parameters: n leaf tensors that require grad.
            shared_parameters: an explicit set of shared ones, or None to detect them.
            sit_out: tasks whose row and column are left zero.

        Raises:
            ValueError: no parameter is reached by two losses, shared parameters on two devices, or
                a sparse gradient.
        """
        parameters = list(parameters)
        graph = walk([root for root, _ in roots], parameters)
        reach = graph.reach(len(roots), len(parameters))
        shared = shared_indices(parameters, reach, shared_parameters)
        chosen = [parameters[k] for k in shared]
        device = check_one_device(chosen)
        dtype = torch.float32
        for p in chosen:
            dtype = torch.promote_types(dtype, p.dtype)
        columns = _columns(graph, parameters, shared, len(roots))
        rows = self._rows(len(roots), columns.width, dtype, device)
        heads: list[list[Tensor]] = [[] for _ in roots]
        with hooks_held_back(parameters):
            for i, (root, cotangent) in enumerate(roots):
                if i in sit_out:
                    rows[i].zero_()
                else:
                    heads[i] = columns.fill(rows[i], root, cotangent)
        return Found(gramian(rows, exact=True), largest_entries(heads, device), chosen)

    def _rows(self, n_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`[T, width]`, of any values."""
        buffer = self._buffer
        if (
            buffer is None
            or buffer.shape != (n_rows, width)
            or buffer.dtype != dtype
            or buffer.device != device
        ):
            self._buffer = buffer = torch.empty(n_rows, width, dtype=dtype, device=device)
        return buffer

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_buffer": None}


@dataclass
class _Columns:
    """What the columns of the rows stand for.

    passed: layers that the passes go through to others. ends: layers behind which there is nothing
    to find. loose: shared parameters whose own gradients are taken, each with its columns.
    heads: parameters that are not shared. width: of a row.
    """

    passed: list[tuple[Node, Part, slice]]
    ends: list[tuple[Node, Part, slice]]
    loose: list[tuple[Tensor, slice]]
    heads: list[Tensor]
    width: int

    def fill(self, row: Tensor, root: Tensor | GradientEdge, cotangent: Tensor) -> list[Tensor]:
        """Fills a row `[width]` by one backward pass; returns the gradients of the heads."""
        inputs: list[Any] = [GradientEdge(node, 0) for node, _, _ in self.ends]
        own = [p for p, _ in self.loose] + self.heads
        missing = {id(part): place for _, part, place in self.passed}
        with self._hooked(row, missing):
            taken = torch.autograd.grad(
                root, [*inputs, *own], cotangent, retain_graph=True, allow_unused=True
            )
        deltas: Sequence[Tensor | None] = taken[: len(inputs)]
        grads: Sequence[Tensor | None] = taken[len(inputs) :]
        check_dense(grads, own)
        for (_, part, place), delta in zip(self.ends, deltas, strict=True):
            if delta is None:
                missing[id(part)] = place
            else:
                row[place] = part.rows(delta[None])[0]
        targets, sources = [], []
        for (p, place), g in zip(self.loose, grads, strict=False):
            if g is None:
                missing[id(p)] = place
            else:
                targets.append(row[place].view(p.shape))
                sources.append(g)
        if targets:
            torch._foreach_copy_(targets, sources)
        for place in missing.values():
            row[place].zero_()
        return [g for g in grads[len(self.loose) :] if g is not None]

    @contextlib.contextmanager
    def _hooked(self, row: Tensor, missing: dict[int, slice]) -> Iterator[None]:
        """While it lasts, layers that a pass goes through leave their columns."""

        def listener(part: Part, place: slice) -> Any:
            def listen(deltas: tuple[Tensor | None, ...]) -> None:
                if deltas[0] is not None:
                    row[place] = part.rows(deltas[0][None])[0]
                    del missing[id(part)]

            return listen

        handles = [node.register_prehook(listener(part, at)) for node, part, at in self.passed]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _columns(graph: Walk, parameters: list[Tensor], shared: list[int], n_tasks: int) -> _Columns:
    """Columns for the shared parameters, a layer's together and few where that is possible."""
    is_shared = set(shared)
    parts: dict[Node, Part] = {}
    loose = dict.fromkeys(shared)
    for layer in find_layers(graph, parameters):
        theirs = [k for k in owned(layer) if k in is_shared]
        part = make_part(layer, parameters, theirs, n_tasks)
        if part is not None:
            parts[layer.node] = part
            for k in theirs:
                del loose[k]
    heads = [k for k in graph.leaves if k not in is_shared]
    wanted = {graph.leaves[k] for k in [*loose, *heads]} | parts.keys()
    leads_on: set[Node] = set()
    for node in reversed(graph.order):
        if any(n in wanted or n in leads_on for n, _ in node.next_functions):
            leads_on.add(node)
    width = 0

    def take(size: int) -> slice:
        nonlocal width
        width += size
        return slice(width - size, width)

    everything = [(node, part, take(part.width)) for node, part in parts.items()]
    return _Columns(
        passed=[entry for entry in everything if entry[0] in leads_on],
        ends=[entry for entry in everything if entry[0] not in leads_on],
        loose=[(parameters[k], take(parameters[k].numel())) for k in loose],
        heads=[parameters[k] for k in heads],
        width=width,
    )
