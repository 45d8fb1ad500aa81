"""The exact Gramian layer by layer, of gradients that are kept as factors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradbal.jacobian.columns import Columns
from gradbal.jacobian.engines import Found, Kept
from gradbal.jacobian.frontier import Entered, find_frontier
from gradbal.jacobian.graph import (
    Absent,
    Reach,
    Root,
    common_kind,
    hooks_held_back,
    shared_indices,
)
from gradbal.jacobian.products import combine
from gradbal.jacobian.rows import deliver, largest_entries
from gradbal.jacobian.together import enters_as_one
from gradbal.jacobian.walk import walk

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
        roots: Sequence[Root | Absent],
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
            sit_out: tasks whose row and column are left zero; those that are absent among them.
            retain_graph: keep the graph after the last pass.

        Raises:
            ValueError: no parameter is reached by two losses, shared parameters on two devices, or
                a sparse gradient.
        """
        parameters = list(parameters)
        starts = {i: root for i, root in enumerate(roots) if not isinstance(root, Absent)}
        graph = walk([start for start, _ in starts.values()], parameters)
        found = dict(zip(starts, graph.reach(len(starts), len(parameters)), strict=True))
        reach: list[Reach | None] = [
            root.reach if isinstance(root, Absent) else found[i] for i, root in enumerate(roots)
        ]
        shared = shared_indices(parameters, reach, shared_parameters)
        # What absent tasks alone reach gets nothing.
        shared = [k for k in shared if k in graph.leaves]
        device, dtype = common_kind([parameters[k] for k in shared])
        columns = Columns(graph, parameters, shared, len(roots))
        # Half precision is the parameters' own, not that of sums.
        dtype = torch.promote_types(dtype, torch.float32)
        rows = self._rows(len(roots), columns.width, dtype, device)
        heads: list[dict[int, Tensor]] = [{} for _ in roots]
        present = [i for i in starts if i not in sit_out]
        # Among the losses that are there.
        places = [n for n, i in enumerate(starts) if i not in sit_out]
        with hooks_held_back(parameters):
            frontier = None
            # Gradients of all losses at once are held beside the rows.
            if self._batches is not False and 4 * columns.n_loose <= columns.width:
                frontier = find_frontier([*starts.values()], parameters)
            if (
                frontier is not None
                and sorted(frontier.shared) == sorted(shared)
                and enters_as_one(frontier, places)
            ):
                entered = [frontier.walk(n, retain_graph=retain_graph) for n in places]
                self._go_together([rows[i] for i in present], columns, entered, retain_graph)
                for i, each in zip(present, entered, strict=True):
                    heads[i] = each.heads
            else:
                for i in present:
                    keep = retain_graph or i != present[-1]
                    heads[i] = columns.fill(rows[i], *starts[i], keep)
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
            reach,
            Kept(rows, partial(columns.gramian, rows, exact=True), send),
        )

    def _go_together(
        self,
        rows: Sequence[Tensor],
        columns: Columns,
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

    def free(self) -> None:
        """Gives up the memory of the rows."""
        self._buffer = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_buffer": None}
