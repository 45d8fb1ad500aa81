"""The rows of the Jacobian in one buffer, and the way of the result into `.grad`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradbal.jacobian.engines import RowsEngine
from gradbal.jacobian.graph import (
    Reach,
    Root,
    check_dense,
    common_kind,
    hooks_held_back,
    reached_parameters,
    shared_indices,
)
from gradbal.jacobian.loop import Loop

__all__ = ["Rows", "deliver", "largest_entries", "like_parameter"]


@dataclass
class _Layout:
    """Where each shared parameter's gradient lies in the buffer.

    shared: indices of the shared parameters. buffer: `[T, P]`, zero where a task does not reach.
    views: for each task, the parts of its row, in the parameters' shapes, and the index of each
    part's parameter; only what the task reaches. heads: for each task, what it reaches besides.
    """

    parameters: list[Tensor]
    reach: list[Reach]
    shared: list[int]
    buffer: Tensor
    views: list[dict[int, Tensor]] = field(init=False)
    heads: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        sizes = [self.parameters[k].numel() for k in self.shared]
        self.views = [
            {
                k: like_parameter(part, self.parameters[k])
                for k, part in zip(self.shared, torch.split(row, sizes), strict=True)
                if reached[k]
            }
            for row, reached in zip(self.buffer, self.reach, strict=True)
        ]
        self.heads = [
            [k for k, is_reached in enumerate(reached) if is_reached and k not in views]
            for views, reached in zip(self.views, self.reach, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        # A pickled view would no longer be a view of the buffer.
        return {k: v for k, v in self.__dict__.items() if k not in ("views", "heads")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()


@dataclass
class Rows:
    """The gradients of T losses with respect to a list of parameters.

    They are taken over all parameters at once: the parts of the shared ones are copied into one
    preallocated `[T, P]` buffer, which is reused from step to step; the others (a head's) are kept
    as they come. Shared are the parameters that two or more losses reach; that is read from which
    gradients come back as None, remembered, and found again when it changes.

    Attributes:
        shared_parameters: an explicit set of shared parameters, or None to detect them.
        engine: what takes the gradients.
        heads: for each task, index → gradient of the parameters that are not shared.
        pending: the gradients wait for more of them, rather than to be replaced.
    """

    shared_parameters: list[Tensor] | None = None
    engine: RowsEngine = field(default_factory=Loop)
    heads: list[dict[int, Tensor]] = field(default_factory=list)
    pending: bool = False
    _layout: _Layout | None = None

    @property
    def width(self) -> int | None:
        """P, the number of shared scalars; None before the first step."""
        return None if self._layout is None else self._layout.buffer.shape[1]

    @property
    def jacobian(self) -> Tensor:
        """`[T, P]`, one row a task, over the shared parameters."""
        return self._current.buffer

    @property
    def parameters(self) -> list[Tensor]:
        """What the gradients are of."""
        return self._current.parameters

    @property
    def shared(self) -> list[int]:
        """Indices of the shared parameters, in the order of their columns."""
        return self._current.shared

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the shared parameters, in the order of their columns."""
        return [self._current.parameters[k].shape for k in self.shared]

    def columns(self, parameters: Sequence[Tensor]) -> Tensor:
        """`[T, ·]`, the columns of some of the shared parameters.

        Raises:
            ValueError: none of them is shared.
        """
        chosen = {id(p) for p in parameters}
        shared = [self._current.parameters[k] for k in self.shared]
        parts = torch.split(self.jacobian, [p.numel() for p in shared], 1)
        picked = [part for p, part in zip(shared, parts, strict=True) if id(p) in chosen]
        if not picked:
            raise ValueError(f"none of the {len(chosen)} parameters is shared")
        return torch.cat(picked, 1)

    def mix(
        self, batches: Sequence[Rows], shares: Sequence[float], head_shares: Sequence[float]
    ) -> None:
        """Becomes a weighted sum of the gradients of several batches, itself among them.

        Args:
            batches: B of them, with the same layout; the first is this one.
            shares, head_shares: B factors, for the Jacobians and for the other gradients.
        """
        self.jacobian.mul_(shares[0])
        heads = self.heads
        self.heads = [{} for _ in heads]
        for rows, share, head_share in zip(batches, shares, head_shares, strict=True):
            if rows is not self and share:
                self.jacobian.add_(rows.jacobian, alpha=share)
            for i, head in enumerate(heads if rows is self else rows.heads):
                if head_share:
                    _add(self.heads[i], {k: g * head_share for k, g in head.items()})

    @property
    def _current(self) -> _Layout:
        if self._layout is None:
            raise RuntimeError("no gradients have been taken yet")
        return self._layout

    def take(
        self,
        roots: Sequence[Root],
        parameters: Sequence[Tensor],
        *,
        sit_out: frozenset[int] = frozenset(),
        retain_graph: bool = False,
    ) -> None:
        """Takes the T gradients, and adds them to pending ones if there are any.

        Args:
            roots: for each loss, where its backward pass starts and with which cotangent.
            parameters: n leaf tensors that require grad.
            sit_out: tasks whose rows are left zero.
            retain_graph: keep the graph after the last pass.

        Raises:
            ValueError: no parameter is reached by two losses, shared parameters on two devices,
                or a sparse gradient. Pending gradients are then given up.
        """
        parameters = list(parameters)
        layout = self._layout
        if (
            layout is None
            or len(layout.reach) != len(roots)
            or [id(p) for p in layout.parameters] != [id(p) for p in parameters]
        ):
            if self.pending:
                self.pending = False
                raise ValueError(
                    "the trained parameters must stay the same while gradients accumulate; "
                    "the pending ones are given up"
                )
            self._layout = layout = None
        accumulate, self.pending = self.pending, False
        if not accumulate:
            self.heads = [{} for _ in roots]
        if layout is None:
            reach = reached_parameters((root for root, _ in roots), parameters)
            layout = self._new_layout(parameters, reach)
        loose: list[dict[int, Tensor]] | None = None
        if not accumulate:
            for i in sit_out:
                layout.buffer[i].zero_()
        present = [i for i in range(len(roots)) if i not in sit_out]
        taken = self.engine.rows([roots[i] for i in present], parameters, retain_graph)
        with hooks_held_back(parameters):
            for i, grads in zip(present, taken, strict=True):
                check_dense(grads, parameters)
                found = tuple(g is not None for g in grads)
                if loose is None and found != layout.reach[i]:
                    written = len(roots) if accumulate else i
                    loose = self._loosen(layout, written, sit_out)
                if loose is None:
                    self._write(layout, i, grads, accumulate)
                else:
                    _add(loose[i], {k: g for k, g in enumerate(grads) if g is not None})
        self._layout = layout
        if loose is not None:
            self._rebuild(parameters, loose)

    def _write(
        self, layout: _Layout, i: int, grads: Sequence[Tensor | None], accumulate: bool
    ) -> None:
        views = layout.views[i]
        if views:
            parts: list[Any] = [grads[k] for k in views]
            (torch._foreach_add_ if accumulate else torch._foreach_copy_)([*views.values()], parts)
        _add(self.heads[i], {k: grads[k] for k in layout.heads[i]})  # type: ignore[misc]

    def _loosen(
        self, layout: _Layout, written: int, sit_out: frozenset[int]
    ) -> list[dict[int, Tensor]]:
        """The gradients so far, one tensor each: what a changed graph can be laid out from."""
        loose: list[dict[int, Tensor]] = [dict(head) for head in self.heads]
        for i in range(written):
            if i not in sit_out:
                loose[i].update((k, view.clone()) for k, view in layout.views[i].items())
        return loose

    def _rebuild(self, parameters: list[Tensor], loose: list[dict[int, Tensor]]) -> None:
        reach = [tuple(k in row for k in range(len(parameters))) for row in loose]
        layout = self._new_layout(parameters, reach)
        for i, row in enumerate(loose):
            for k, view in layout.views[i].items():
                view.copy_(row[k])
            self.heads[i] = {k: row[k] for k in layout.heads[i]}
        self._layout = layout

    def _new_layout(self, parameters: list[Tensor], reach: list[Reach]) -> _Layout:
        shared = shared_indices(parameters, reach, self.shared_parameters)
        chosen = [parameters[k] for k in shared]
        device, dtype = common_kind(chosen)
        sizes = [p.numel() for p in chosen]
        buffer = torch.zeros(len(reach), sum(sizes), dtype=dtype, device=device)
        return _Layout(parameters, reach, shared, buffer)

    def head_extremes(self) -> Tensor:
        """The largest absolute entry of each task's other gradients, `[T]`: not finite where one of
        them is not."""
        return largest_entries(self.heads, self._current.buffer.device)

    def __getstate__(self) -> dict[str, Any]:
        # The buffer is worth a copy only where gradients are pending in it.
        state = self.__dict__.copy()
        if not self.pending:
            state.update(_layout=None, heads=[])
        return state

    def deliver(self, direction: Tensor, head_weights: Sequence[float | Tensor | None]) -> None:
        """Sends the result into `.grad` through AccumulateGrad.

        Accumulation, hooks on parameters and DDP's reducer then behave as after an ordinary
        backward pass. Parameters that no loss reaches get nothing.

        Args:
            direction: `[P]`, for the shared parameters.
            head_weights: for each task what its other gradients are multiplied by, a number or a
                0-dim tensor on the device; None leaves them out, 1.0 as they are.
        """
        layout = self._current
        chosen = [layout.parameters[k] for k in layout.shared]
        parts = torch.split(direction, [p.numel() for p in chosen])
        grads = [like_parameter(part, p) for part, p in zip(parts, chosen, strict=True)]
        heads, self.heads = self.heads, [{} for _ in self.heads]
        deliver(chosen, grads, layout.parameters, heads, head_weights)


def deliver(
    shared: Sequence[Tensor],
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    heads: Sequence[dict[int, Tensor]],
    head_weights: Sequence[float | Tensor | None],
) -> None:
    """Sends gradients of shared parameters as they are, and of the others with their weights.

    Args:
        shared, gradients: the shared parameters and what they get.
        parameters: what the indices of `heads` refer to.
        heads: for each task, index → gradient.
        head_weights: for each task what those are multiplied by; None leaves them out.
    """
    targets, grads = list(shared), list(gradients)
    for weight, head in zip(head_weights, heads, strict=True):
        if weight is None or not head:
            continue
        parts = list(head.values())
        # Not in place: autograd may return one tensor for two parameters.
        if isinstance(weight, Tensor):
            parts = [part * weight.to(part.dtype) for part in parts]
        elif weight != 1.0:
            parts = list(torch._foreach_mul(parts, weight))
        targets.extend(parameters[k] for k in head)
        grads.extend(parts)
    torch.autograd.backward(targets, grads)


def largest_entries(heads: Sequence[dict[int, Tensor]], device: torch.device) -> Tensor:
    """The largest absolute entry of each task's gradients, `[T]`: not finite where one of them is
    not, zero where there are none."""
    grads = [g for head in heads for g in head.values()]
    if not grads:
        return torch.zeros(len(heads), device=device)
    norms = iter(torch._foreach_norm(grads, float("inf")))
    zero = torch.zeros((), device=device)
    width = max(map(len, heads))
    # Filled up with zeros: one operator for all tasks.
    rows = [[next(norms).to(device, torch.float32) for _ in head] for head in heads]
    entries = [n for row in rows for n in row + [zero] * (width - len(row))]
    return torch.stack(entries).view(len(rows), width).amax(1)


def like_parameter(part: Tensor, parameter: Tensor) -> Tensor:
    """A flat part seen in the parameter's shape, and memory format where that is dense.

    A representation's stays in the order of its indices, in which aggregators look at it.
    """
    if parameter.is_contiguous() or not parameter.is_leaf:
        return part.view(parameter.shape)
    for memory_format, dims in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if parameter.dim() == dims and parameter.is_contiguous(memory_format=memory_format):
            return part.as_strided(parameter.shape, parameter.stride(), part.storage_offset())
    return part.view(parameter.shape)


def _add(into: dict[int, Tensor], grads: dict[int, Tensor]) -> None:
    for k, g in grads.items():
        into[k] = into[k] + g if k in into else g
