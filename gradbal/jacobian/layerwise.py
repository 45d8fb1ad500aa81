"""The exact Gramian layer by layer, of gradients that are kept as factors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradbal.jacobian.engines import Found, Kept
from gradbal.jacobian.frontier import Entered, find_frontier
from gradbal.jacobian.graph import (
    Root,
    check_dense,
    common_kind,
    hooks_held_back,
    shared_indices,
)
from gradbal.jacobian.layers import find_layers, owned
from gradbal.jacobian.parts import Part, make_part
from gradbal.jacobian.products import combine, gramian
from gradbal.jacobian.rows import deliver, largest_entries, like_parameter
from gradbal.jacobian.together import enters_as_one
from gradbal.jacobian.walk import Walk, walk

__all__ = ["Layerwise"]


class Layerwise:
    """Keeps what arrives at the outputs of layers in place of the gradients of their weights.

    1. The layers are read from the graph, with what they took in: A.
    2. The gradients of a loss go back through the layers, but not into their weights. What arrives
       at a layer's output, δ_t, is kept: the gradient of the weight would be `δ_tᵀA`.
    3. Where a layer does not gain by that, and where a parameter does not surely act through one
       layer alone, the parameter's own gradients are kept.
    4. All losses' gradients go back together where the graph is fit for that.
    5. Each layer adds its part to the Gramian.
    6. With the weights of the tasks each layer gets its gradient from `Σ w_t δ_t` and A.
    """

    name = "gramian"

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        # Whether passes for several losses work, as far as that is known.
        self._batches: bool | None = None

    def take(
        self,
        roots: Sequence[Root],
        parameters: Sequence[Tensor],
        shared_parameters: list[Tensor] | None,
        sit_out: frozenset[int],
        retain_graph: bool = False,
    ) -> Found:
        """The Gramian of the shared parameters, and a way to deliver any combination.

        Args:
            roots: for each of T losses, where its backward pass starts and with which cotangent.
            parameters: n leaf tensors that require grad.
            shared_parameters: an explicit set of shared ones, or None to detect them.
            sit_out: tasks whose row and column are left zero.
            retain_graph: keep the graph after the last pass.

        Raises:
            ValueError: no parameter is reached by two losses, shared parameters on two devices, or
                a sparse gradient.
        """
        parameters = list(parameters)
        graph = walk([root for root, _ in roots], parameters)
        reach = graph.reach(len(roots), len(parameters))
        shared = shared_indices(parameters, reach, shared_parameters)
        device, dtype = common_kind([parameters[k] for k in shared])
        columns = _Columns(graph, parameters, shared, len(roots))
        # Half precision is the parameters' own, not that of sums.
        dtype = torch.promote_types(dtype, torch.float32)
        rows = self._rows(len(roots), columns.width, dtype, device)
        heads: list[dict[int, Tensor]] = [{} for _ in roots]
        present = [i for i in range(len(roots)) if i not in sit_out]
        with hooks_held_back(parameters):
            frontier = None
            # Gradients of all losses at once are held beside the rows.
            if self._batches is not False and 4 * columns.n_loose <= columns.width:
                frontier = find_frontier(roots, parameters)
            if (
                frontier is not None
                and sorted(frontier.shared) == sorted(shared)
                and enters_as_one(frontier, present)
            ):
                entered = [frontier.walk(i, retain_graph=retain_graph) for i in present]
                self._go_together([rows[i] for i in present], columns, entered, retain_graph)
                for i, each in zip(present, entered, strict=True):
                    heads[i] = each.heads
            else:
                for i in present:
                    keep = retain_graph or i != present[-1]
                    heads[i] = columns.fill(rows[i], *roots[i], keep)
        for i in sit_out:
            rows[i].zero_()

        def send(weights: Tensor, head_weights: Sequence[float | Tensor | None]) -> None:
            taking_part = [i for i, w in enumerate(head_weights) if w is not None]
            w, j = weights, rows
            if len(taking_part) < len(rows):
                # A row that is left out may hold NaN, which no weight takes away.
                w, j = w[taking_part], j[taking_part]
            gradients = columns.gradients(combine(w, j))
            targets = [parameters[k] for k in gradients]
            # Held by nobody else, so that they become `.grad` themselves.
            values = [gradients.pop(k) for k in [*gradients]]
            deliver(targets, values, parameters, heads, head_weights)

        chosen = [parameters[k] for k in shared]
        return Found(
            columns.gramian(rows),
            largest_entries(heads, device),
            chosen,
            Kept(rows, partial(columns.gramian, rows, exact=True), send),
        )

    def _go_together(
        self,
        rows: Sequence[Tensor],
        columns: _Columns,
        entered: Sequence[Entered],
        retain_graph: bool,
    ) -> None:
        """Fills the rows from what enters the shared part, all at once if that works."""
        edges = list(dict.fromkeys(edge for each in entered for edge in each.cotangents))
        zeros = {e: torch.zeros_like(c) for each in entered for e, c in each.cotangents.items()}
        cotangents = [[each.cotangents.get(e, zeros[e]) for e in edges] for each in entered]
        if self._batches is not False:
            try:
                # The first time the graph is kept: hooks of users may not work in such a pass.
                keep = retain_graph or self._batches is None
                columns.fill_together(rows, edges, cotangents, keep)
            except Exception:
                if self._batches:
                    raise
                self._batches = False
            else:
                self._batches = True
                return
        for n, (row, each) in enumerate(zip(rows, cotangents, strict=True), 1):
            columns.fill(row, edges, each, retain_graph or n < len(rows))

    def _rows(self, n_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`[T, width]`, of any values; the same memory from step to step."""
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


@dataclass(frozen=True)
class _Layered:
    """Columns that hold δ of a layer.

    owned: indices of the parameters that they stand for. leads_on: whether a backward pass has to
    go through the layer, to what is wanted behind it.
    """

    part: Part
    owned: list[int]
    node: Node
    leads_on: bool


class _Columns:
    """What the columns of the rows stand for: layers first, then parameters themselves.

    Attributes:
        width: how many there are.
        n_loose: how many of them are for parameters themselves.
    """

    def __init__(
        self, graph: Walk, parameters: list[Tensor], shared: list[int], n_tasks: int
    ) -> None:
        self._parameters = parameters
        parts: dict[Node, tuple[Part, list[int]]] = {}
        loose = dict.fromkeys(shared)
        for layer in find_layers(graph, parameters):
            theirs = [k for k in owned(layer) if k in loose]
            part = make_part(layer, parameters, theirs, n_tasks)
            if part is not None:
                parts[layer.node] = part, theirs
                for k in theirs:
                    del loose[k]
        self._loose = list(loose)
        self._heads = [k for k in graph.leaves if k not in set(shared)]
        wanted = parts.keys() | {graph.leaves[k] for k in (*self._loose, *self._heads)}
        on = graph.leading_to(wanted)
        self._layers = [_Layered(*found, node, node in on) for node, found in parts.items()]
        self._sizes = [each.part.shape.numel() for each in self._layers]
        self._sizes += [parameters[k].numel() for k in self._loose]
        self.width = sum(self._sizes)
        self.n_loose = sum(self._sizes[len(self._layers) :])

    def fill(
        self,
        row: Tensor,
        start: Tensor | GradientEdge | Sequence[GradientEdge],
        cotangent: Tensor | Sequence[Tensor],
        retain_graph: bool,
    ) -> dict[int, Tensor]:
        """Fills a row `[width]` by a backward pass; returns the gradients of other parameters."""
        views = self._views(row)
        heard = set()

        def hear(k: int, delta: Tensor) -> None:
            views[k].copy_(delta)
            heard.add(k)

        found, heads = self._pass(start, cotangent, retain_graph, self._heads, hear)
        self._write(views, found, heard)
        return heads

    def fill_together(
        self,
        rows: Sequence[Tensor],
        start: Sequence[GradientEdge],
        cotangents: Sequence[Sequence[Tensor]],
        retain_graph: bool,
    ) -> None:
        """Fills t rows `[width]` by one pass, each from cotangents of its own."""
        names: list[int] = []

        def one(*cotangent: Tensor) -> tuple[Tensor, ...]:
            heard: dict[int, Tensor] = {}

            def hear(k: int, delta: Tensor) -> None:
                # A hook further on may change it in place.
                heard[k] = delta.clone()

            found, _ = self._pass(start, cotangent, retain_graph, [], hear)
            found.update(heard)
            names.extend(found)
            return tuple(found.values())

        stacked = torch.vmap(one)(*(torch.stack(each) for each in zip(*cotangents, strict=True)))
        parts = [each.unbind() for each in stacked]
        for i, row in enumerate(rows):
            found = {k: part[i] for k, part in zip(names, parts, strict=True)}
            self._write(self._views(row), found, set())

    def _pass(
        self,
        start: Any,
        cotangent: Any,
        retain_graph: bool,
        heads: Sequence[int],
        hear: Callable[[int, Tensor], None],
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Number of the columns' entry → gradient, where layers that the pass goes through have not
        been heard; and index → gradient of other parameters."""
        others = [self._parameters[k] for k in (*self._loose, *heads)]
        n = len(self._layers)
        ends = [k for k, each in enumerate(self._layers) if not each.leads_on]
        inputs: list[Any] = [*(GradientEdge(self._layers[k].node, 0) for k in ends), *others]
        with self._listening(hear):
            taken: Sequence[Tensor | None] = torch.autograd.grad(
                start, inputs, cotangent, retain_graph=retain_graph, allow_unused=True
            )
        check_dense(taken[len(ends) :], others)
        entries = [*ends, *range(n, n + len(self._loose))]
        found = {k: g for k, g in zip(entries, taken, strict=False) if g is not None}
        own = zip(heads, taken[len(entries) :], strict=True)
        return found, {k: g for k, g in own if g is not None}

    @staticmethod
    def _write(views: Sequence[Tensor], found: dict[int, Tensor], heard: set[int]) -> None:
        """Into the columns what was found, and zero where nothing was."""
        if found:
            torch._foreach_copy_([views[k] for k in found], [*found.values()])
        for k, view in enumerate(views):
            if k not in found and k not in heard:
                view.zero_()

    @contextlib.contextmanager
    def _listening(self, hear: Callable[[int, Tensor], None]) -> Iterator[None]:
        """While it lasts, what arrives at layers that a pass goes through is heard.

        What autograd itself captures there is without the hooks of users on the layer's output.
        """

        def listener(k: int) -> Callable[[tuple[Tensor | None, ...]], None]:
            def listen(deltas: tuple[Tensor | None, ...]) -> None:
                if deltas[0] is not None:
                    hear(k, deltas[0])

            return listen

        handles = [
            each.node.register_prehook(listener(k))
            for k, each in enumerate(self._layers)
            if each.leads_on
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gramian(self, rows: Tensor, *, exact: bool = False) -> Tensor:
        """`[T, T]`, from rows `[T, width]`; with products in float64 if it has to be exact."""
        n = len(self._layers)
        columns = torch.split(rows, [*self._sizes[:n], sum(self._sizes[n:])], 1)
        grams = [gramian(columns[-1], exact=exact)]
        for each, part in zip(self._layers, columns, strict=False):
            deltas = part.view(len(rows), *each.part.shape)
            grams.append(gramian(each.part.spanned(deltas.double() if exact else deltas)))
        return torch.stack(grams).sum(0)

    def gradients(self, row: Tensor) -> dict[int, Tensor]:
        """Index → gradient of the shared parameters, from a combination `[width]` of rows."""
        found: dict[int, Tensor] = {}
        views, n = self._views(row), len(self._layers)
        for each, delta in zip(self._layers, views, strict=False):
            found.update(zip(each.owned, each.part.gradients(delta), strict=True))
        found.update((k, view.clone()) for k, view in zip(self._loose, views[n:], strict=True))
        return found

    def _views(self, row: Tensor) -> list[Tensor]:
        """The columns of each layer and parameter, in the shape of δ or of the parameter."""
        parts = torch.split(row, self._sizes)
        n = len(self._layers)
        return [
            *(part.view(e.part.shape) for e, part in zip(self._layers, parts, strict=False)),
            *(
                like_parameter(part, self._parameters[k])
                for k, part in zip(self._loose, parts[n:], strict=True)
            ),
        ]
