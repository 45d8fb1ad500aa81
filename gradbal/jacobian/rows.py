"""The rows of the Jacobian in one buffer, and the way of the result into `.grad`."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor

from gradbal.jacobian.blocks import Block
from gradbal.jacobian.engines import RowsEngine
from gradbal.jacobian.graph import (
    Absent,
    Reach,
    Root,
    RootsInTurn,
    check_dense,
    common_kind,
    hooks_held_back,
    only_reached,
    reach_of,
    reached_parameters,
    shared_indices,
)
from gradbal.jacobian.loop import Loop, gradients_of
from gradbal.jacobian.products import are_few, combine_by, combine_few, gramian_of_few

__all__ = ["Rows", "deliver", "largest_entries", "like_parameter"]

_FEW = 1 << 10
"""Up to so many scalars a copy of the gradients is cheap."""

Gradients = tuple[Tensor | None, ...]


@dataclass
class _Layout:
    """Where each shared parameter's gradient lies in the buffer.

    shared: indices of the shared parameters. buffer: `[T, P]`, zero where a task does not reach.
    views: for each task, the parts of its row, in the parameters' shapes, and the index of each
    part's parameter; only what the task reaches. heads: for each task, what it reaches besides.
    few: whether the buffer is so small that plain floats are faster than operators.
    reached: for each task, indices of all that it reaches; none where that is not known.
    """

    parameters: list[Tensor]
    reach: list[Reach | None]
    shared: list[int]
    buffer: Tensor
    views: list[dict[int, Tensor]] = field(init=False)
    heads: list[list[int]] = field(init=False)
    reached: list[set[int]] = field(init=False)
    few: bool = field(init=False)
    _kinds: list[tuple[torch.device, torch.dtype]] = field(init=False)
    _slices: dict[tuple[int, int, int], Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._slices = {}
        self._kinds = _kinds(self.parameters)
        self.few = are_few(self.buffer)
        self.reached = [{k for k, yes in enumerate(reach or ()) if yes} for reach in self.reach]
        sizes = [self.parameters[k].numel() for k in self.shared]
        self.views = [
            {
                k: like_parameter(part, self.parameters[k])
                for k, part in zip(self.shared, torch.split(row, sizes), strict=True)
                if k in reached
            }
            for row, reached in zip(self.buffer, self.reached, strict=True)
        ]
        self.heads = [
            sorted(reached.difference(views))
            for views, reached in zip(self.views, self.reached, strict=True)
        ]

    def fits(self, parameters: Sequence[Tensor], n_tasks: int) -> bool:
        """Whether it is for so many tasks and for these parameters, where and of what they were."""
        return (
            len(self.reach) == n_tasks
            and len(self.parameters) == len(parameters)
            and all(map(is_, self.parameters, parameters))
            and self._kinds == _kinds(parameters)
        )

    def slice(self, first: int, n_tasks: int, k: int) -> Tensor:
        """`[n_tasks, *shape]`, a view of the parts of parameter k in the rows from the first on."""
        found = self._slices.get((first, n_tasks, k))
        if found is None:
            view, stride = self.views[first][k], self.buffer.stride(0)
            found = self._slices[first, n_tasks, k] = self.buffer.as_strided(
                (n_tasks, *view.shape), (stride, *view.stride()), view.storage_offset()
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        # A pickled view would no longer be a view of the buffer.
        kept = ("parameters", "reach", "shared", "buffer")
        return {k: v for k, v in self.__dict__.items() if k in kept}

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
        dtype: of the buffer, where it is narrower than the shared parameters'; None for theirs.
        heads: for each task, index → gradient of the parameters that are not shared.
        pending: the gradients wait for more of them, rather than to be replaced.
    """

    shared_parameters: list[Tensor] | None = None
    engine: RowsEngine = field(default_factory=Loop)
    dtype: torch.dtype | None = None
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
    def reach(self) -> list[Reach | None]:
        """For each task, which of the parameters it reaches; None where that is not known."""
        return self._current.reach

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
        roots: Sequence[Root | Absent] | RootsInTurn,
        parameters: Sequence[Tensor],
        *,
        sit_out: frozenset[int] = frozenset(),
        retain_graph: bool = False,
        taken: Sequence[Gradients] | None = None,
    ) -> None:
        """Takes the T gradients, and adds them to pending ones if there are any.

        Args:
            roots: for each loss, where its backward pass starts and with which cotangent. Those
                made in turn have one pass each before the next is asked for.
            parameters: n leaf tensors that require grad.
            sit_out: tasks that add nothing to their rows; those that are absent among them.
            retain_graph: keep the graph after the last pass.
            taken: the gradients of all roots, where the passes are made already.

        Raises:
            ValueError: no parameter is reached by two losses, shared parameters on two devices,
                or a sparse gradient. Pending gradients are then given up.
        """
        parameters = list(parameters)
        layout = self._layout
        if not self.fits(parameters, len(roots)):
            if self.pending:
                self.pending = False
                raise ValueError(
                    "the trained parameters must stay the same while gradients accumulate; "
                    "the pending ones are given up"
                )
            self._layout = layout = None
        accumulate, self.pending = self.pending, False
        if isinstance(roots, Sequence):
            absent = {i: root.reach for i, root in enumerate(roots) if isinstance(root, Absent)}
        else:
            absent = dict.fromkeys(roots.missing)
        known = layout.reach if layout is not None and not accumulate else None
        if known and any(reach and reach != known[i] for i, reach in absent.items()):
            # Another engine has seen these tasks since.
            self._layout = layout = None
        if not accumulate:
            self.heads = [{} for _ in range(len(roots))]
        loose: list[dict[int, Tensor]] | None = None
        untaken: dict[int, Reach | None] = {}
        follows_graph = isinstance(roots, Sequence) and self.engine.follows_graph
        if layout is None and follows_graph:
            assert isinstance(roots, Sequence)
            layout = self._new_layout(parameters, reach_of(roots, parameters))
        elif layout is None:
            # What is shared shows when the last one is taken.
            loose = [{} for _ in range(len(roots))]
            if isinstance(roots, Sequence):
                untaken = {i: absent.get(i) for i in sit_out}
        if layout is not None and not accumulate:
            for i in sit_out:
                layout.buffer[i].zero_()
        # Tasks whose rows hold gradients.
        written = []
        if accumulate:
            written = [i for i in range(len(roots)) if i in absent or i not in sit_out]
        starts: dict[int, Root] = {}
        if isinstance(roots, Sequence):
            starts = {
                i: root
                for i, root in enumerate(roots)
                if i not in sit_out and not isinstance(root, Absent)
            }
            present = [*starts]
            parts: Iterable[Gradients | Block]
            if taken is None:
                parts = self.engine.rows([*starts.values()], parameters, retain_graph)
            else:
                parts = taken
            coming = _with_tasks(present, parts)
            held_back = parameters
        else:
            coming = self._in_turn(roots, parameters, sit_out, retain_graph, untaken)
            # Users' code runs between these passes.
            held_back = []
        with hooks_held_back(held_back):
            for tasks, part in coming:
                if isinstance(part, Block):
                    if (
                        loose is None
                        and layout is not None
                        and self._write_block(layout, tasks, part, accumulate)
                    ):
                        written += tasks
                        continue
                    rows = part.rows(len(parameters))
                else:
                    rows = [part]
                for i, grads in zip(tasks, rows, strict=True):
                    check_dense(grads, parameters)
                    found = tuple(g is not None for g in grads)
                    if follows_graph and (layout is None or found != layout.reach[i]):
                        grads = only_reached(starts[i][0], parameters, grads)
                        found = tuple(g is not None for g in grads)
                    if loose is None and layout is not None and found != layout.reach[i]:
                        loose = self._loosen(layout, written)
                    if loose is None:
                        assert layout is not None
                        self._write(layout, i, grads, accumulate)
                        written.append(i)
                    else:
                        _add(loose[i], {k: g for k, g in enumerate(grads) if g is not None})
                # The next pass may write where this one did, and needs the memory.
                del part, rows, grads
        self._layout = layout
        if loose is not None:
            if layout is not None:
                # What was known of tasks that were not looked at.
                untaken = {i: layout.reach[i] for i in sit_out} | untaken
            self._rebuild(parameters, loose, untaken)

    def _in_turn(
        self,
        roots: RootsInTurn,
        parameters: Sequence[Tensor],
        sit_out: frozenset[int],
        retain_graph: bool,
        untaken: dict[int, Reach | None],
    ) -> Iterator[tuple[list[int], Gradients | Block]]:
        """The gradients of each root, which is forgotten before the next is made.

        What the others would reach is noted in `untaken`, where there is no layout yet.
        """
        for i in range(len(roots)):
            root = roots.make(i)
            if isinstance(root, Absent):
                if self._layout is None:
                    untaken[i] = root.reach
                continue
            if self._layout is None:
                # For those that are taken too: it refuses graphs that would silently go untrained.
                (untaken[i],) = reached_parameters([root[0]], parameters)
            if i not in sit_out:
                untaken.pop(i, None)
                yield [i], gradients_of(root, parameters, retain_graph)
            # Before the next one is made.
            del root

    def _write(
        self, layout: _Layout, i: int, grads: Sequence[Tensor | None], accumulate: bool
    ) -> None:
        views = layout.views[i]
        if views:
            parts: list[Any] = [grads[k] for k in views]
            (torch._foreach_add_ if accumulate else torch._foreach_copy_)([*views.values()], parts)
        _add(self.heads[i], {k: grads[k] for k in layout.heads[i]})  # type: ignore[misc]

    def _write_block(
        self, layout: _Layout, tasks: list[int], block: Block, accumulate: bool
    ) -> bool:
        """Writes the rows of several tasks, one copy a parameter; False, and nothing, if they
        do not reach what the layout says."""
        first, n_tasks = tasks[0], len(tasks)
        for i, single in zip(tasks, block.single, strict=True):
            if block.stacked.keys() | single.keys() != layout.reached[i]:
                return False
        for grads in (block.stacked, *block.single):
            check_dense([*grads.values()], [layout.parameters[k] for k in grads])
        targets, parts = [], []
        heads: list[dict[int, Tensor]] = [{} for _ in tasks]
        for k, stacked in block.stacked.items():
            if k not in layout.views[first]:
                for head, g in zip(heads, stacked.unbind(), strict=True):
                    head[k] = g
            elif tasks[-1] - first == n_tasks - 1:
                targets.append(layout.slice(first, n_tasks, k))
                parts.append(stacked)
            else:
                targets.extend(layout.views[i][k] for i in tasks)
                parts.extend(stacked.unbind())
        for i, head, single in zip(tasks, heads, block.single, strict=True):
            for k, g in single.items():
                if k in layout.views[i]:
                    targets.append(layout.views[i][k])
                    parts.append(g)
                else:
                    head[k] = g
            _add(self.heads[i], head)
        if targets:
            (torch._foreach_add_ if accumulate else torch._foreach_copy_)(targets, parts)
        # Whoever still has the block, the next one is computed without it.
        block.stacked.clear()
        return True

    def _loosen(self, layout: _Layout, written: Sequence[int]) -> list[dict[int, Tensor]]:
        """The gradients so far, one tensor each: what a changed graph can be laid out from."""
        loose: list[dict[int, Tensor]] = [dict(head) for head in self.heads]
        for i in dict.fromkeys(written):
            loose[i].update((k, view.clone()) for k, view in layout.views[i].items())
        return loose

    def _rebuild(
        self,
        parameters: list[Tensor],
        loose: list[dict[int, Tensor]],
        untaken: dict[int, Reach | None],
    ) -> None:
        reach: list[Reach | None] = [
            tuple(k in row for k in range(len(parameters))) for row in loose
        ]
        for i, reached in untaken.items():
            reach[i] = reached
        layout = self._new_layout(parameters, reach)
        for i, row in enumerate(loose):
            # Of one that was not taken there may be what it gave before, or nothing.
            for k, view in layout.views[i].items():
                if k in row:
                    view.copy_(row[k])
            self.heads[i] = {k: row[k] for k in layout.heads[i] if k in row}
            row.clear()
        self._layout = layout

    def _new_layout(self, parameters: list[Tensor], reach: list[Reach | None]) -> _Layout:
        shared = shared_indices(parameters, reach, self.shared_parameters)
        chosen = [parameters[k] for k in shared]
        device, dtype = common_kind(chosen)
        if self.dtype is not None and self.dtype.itemsize < dtype.itemsize:
            dtype = self.dtype
        sizes = [p.numel() for p in chosen]
        buffer = torch.zeros(len(reach), sum(sizes), dtype=dtype, device=device)
        return _Layout(parameters, reach, shared, buffer)

    def signature(self) -> int:
        """A number that is another one, almost surely, where the layout is."""
        layout = self._current
        rows = [layout.shared, *([] if row is None else row for row in layout.reach)]
        return zlib.crc32(repr([list(map(int, row)) for row in rows]).encode())

    def widen(self, reach: list[Reach | None]) -> None:
        """Takes over what each task reaches elsewhere; its gradients are zero there."""
        before = self._current
        loose = self._loosen(before, range(len(before.reach)))
        layout = self._new_layout(before.parameters, reach)
        for i, row in enumerate(loose):
            for k, view in layout.views[i].items():
                if k in row:
                    view.copy_(row[k])
            self.heads[i] = {k: row[k] for k in layout.heads[i] if k in row}
        self._layout = layout

    def fits(self, parameters: Sequence[Tensor], n_tasks: int) -> bool:
        """Whether the buffer is for so many tasks and for these parameters, as they are now."""
        return self._layout is not None and self._layout.fits(parameters, n_tasks)

    @property
    def are_few(self) -> bool:
        """Whether the whole Jacobian is a few numbers on the host."""
        return self._current.few

    def product_of_few(self) -> Tensor | None:
        """The Gramian `[T, T]`, where the whole Jacobian is a few numbers on the host."""
        layout = self._current
        return gramian_of_few(layout.buffer) if layout.few else None

    @property
    def has_heads(self) -> bool:
        """Whether any task has gradients of parameters that are not shared."""
        return any(self.heads)

    def head_extremes(self) -> Tensor:
        """The largest absolute entry of each task's other gradients, `[T]`: not finite where one of
        them is not."""
        return largest_entries(self.heads, self._current.buffer.device)

    def free(self) -> None:
        """Gives up the buffer, and what is in it; the next gradients make another."""
        self._layout, self.heads, self.pending = None, [], False

    def __getstate__(self) -> dict[str, Any]:
        # The buffer is worth a copy only where gradients are pending in it.
        state = self.__dict__.copy()
        if not self.pending:
            state.update(_layout=None, heads=[])
        return state

    def pending_state(self, parameters: Sequence[Tensor]) -> dict[str, Any] | None:
        """The pending gradients as plain data, None if there are none.

        Args:
            parameters: what the gradients are of, and maybe more; in an order that stays.
        """
        if not self.pending:
            return None
        layout, place = self._current, {id(p): i for i, p in enumerate(parameters)}
        return {
            "parameters": [place[id(p)] for p in layout.parameters],
            "reach": [None if row is None else list(row) for row in layout.reach],
            "shared": list(layout.shared),
            "jacobian": layout.buffer,
            "heads": [dict(head) for head in self.heads],
        }

    def load_pending_state(
        self, state: dict[str, Any] | None, parameters: Sequence[Tensor]
    ) -> None:
        """Takes over a `pending_state`, onto the devices of these parameters."""
        if state is None:
            self.pending = False
            return
        mine = [parameters[i] for i in state["parameters"]]
        reach = [None if row is None else tuple(row) for row in state["reach"]]
        shared = list(state["shared"])
        buffer = state["jacobian"].to(mine[shared[0]].device, copy=True)
        layout = _Layout(mine, reach, shared, buffer)
        heads = [{k: g.to(mine[k].device) for k, g in head.items()} for head in state["heads"]]
        self._layout, self.heads, self.pending = layout, heads, True

    def combined(self, weights: Tensor, present: Sequence[int] | None = None) -> list[Tensor]:
        """`Jᵀw` as one new tensor for each shared parameter, of its shape and dtype.

        Args:
            weights: `[T]`, zero for tasks that are not present.
            present: tasks that take part, or None for all; the rows of the others become zero.
        """
        layout = self._current
        if present is not None:
            # No weight takes NaN away.
            for i in set(range(len(layout.reach))).difference(present):
                layout.buffer[i].zero_()
        chosen = [layout.parameters[k] for k in layout.shared]
        sizes, dtypes = [p.numel() for p in chosen], [p.dtype for p in chosen]
        if layout.few and weights.device.type == "cpu":
            parts = combine_few(weights, layout.buffer.tolist(), sizes, dtypes)
        else:
            parts = combine_by(weights, layout.buffer, sizes, dtypes)
        return [like_parameter(part, p) for part, p in zip(parts, chosen, strict=True)]

    def deliver(
        self, direction: Tensor | list[Tensor], head_weights: Sequence[float | Tensor | None]
    ) -> None:
        """Sends the result into `.grad` through AccumulateGrad.

        Accumulation, hooks on parameters and DDP's reducer then behave as after an ordinary
        backward pass. Parameters that no loss reaches get nothing.

        Args:
            direction: for the shared parameters, `[P]`; or what `combined` returned, which is used
                up: its tensors may become `.grad` themselves, rather than be copied.
            head_weights: for each task what its other gradients are multiplied by, a number or a
                0-dim tensor on the device; None leaves them out, 1.0 as they are.
        """
        layout = self._current
        shared = [layout.parameters[k] for k in layout.shared]
        if isinstance(direction, Tensor):
            parts = torch.split(direction, [p.numel() for p in shared])
            direction = [like_parameter(part, p) for part, p in zip(parts, shared, strict=True)]
            held: Sequence[Tensor] = [*direction]
        else:
            held = []
            if None in head_weights:
                # What no task reaches that takes part gets nothing, rather than zeros.
                pairs = zip(layout.reached, head_weights, strict=True)
                touched = set().union(*(reached for reached, w in pairs if w is not None))
                kept = [n for n, k in enumerate(layout.shared) if k in touched]
                shared, direction = [shared[n] for n in kept], [direction[n] for n in kept]
        heads, self.heads = self.heads, [{} for _ in self.heads]
        deliver(shared, direction, layout.parameters, heads, head_weights)
        del held


def deliver(
    shared: Sequence[Tensor],
    gradients: list[Tensor],
    parameters: Sequence[Tensor],
    heads: Sequence[dict[int, Tensor]],
    head_weights: Sequence[float | Tensor | None],
) -> None:
    """Sends gradients of shared parameters as they are, and of the others with their weights.

    Args:
        shared, gradients: the shared parameters and what they get. The list is used up: tensors
            that nobody else holds become `.grad` themselves, rather than be copied.
        parameters: what the indices of `heads` refer to.
        heads: for each task, index → gradient.
        head_weights: for each task what those are multiplied by; None leaves them out.
    """
    targets, held = list(shared), []
    for weight, head in zip(head_weights, heads, strict=True):
        if weight is None or not head:
            continue
        own = list(head.values())
        # Not in place: autograd may return one tensor for two parameters.
        if isinstance(weight, Tensor):
            own = [part * weight.to(part.dtype) for part in own]
        elif weight != 1.0:
            own = list(torch._foreach_mul(own, weight))
        else:
            held += own
        targets.extend(parameters[k] for k in head)
        gradients.extend(own)
        del own
    if sum([p.numel() for p in targets]) <= _FEW:
        # They are copied for less than a function of our own costs.
        torch.autograd.backward(targets, gradients)
        return
    with torch.enable_grad():
        nothing = _Gradients.apply(gradients, *targets)
    torch.autograd.backward(nothing, nothing.detach())
    del held


class _Gradients(torch.autograd.Function):
    """Nothing, with the given gradients.

    What `torch.autograd.backward(targets, gradients)` is given it holds until its end, so that
    AccumulateGrad has to copy all of it. From the backward of a function it takes over the tensors
    that nobody else holds.
    """

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *targets: Tensor) -> Tensor:
        ctx.gradients = gradients
        return targets[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = (None, *ctx.gradients)
        ctx.gradients.clear()
        return gradients


def largest_entries(heads: Sequence[dict[int, Tensor]], device: torch.device) -> Tensor:
    """The largest absolute entry of each task's gradients, `[T]`: not finite where one of them is
    not, zero where there are none."""
    heads = [{k: g for k, g in head.items() if g.numel()} for head in heads]
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


def _kinds(parameters: Sequence[Tensor]) -> list[tuple[torch.device, torch.dtype]]:
    return [(p.device, p.dtype) for p in parameters]


def _with_tasks(
    present: Sequence[int], parts: Iterable[Gradients | Block]
) -> Iterator[tuple[list[int], Gradients | Block]]:
    """What an engine takes, with the tasks that it is of; nothing of it is held here."""
    iterator, n_taken = iter(parts), 0
    # To its end, where an engine notes that all went well.
    while (part := next(iterator, None)) is not None:
        places = part.tasks if isinstance(part, Block) else [n_taken]
        tasks = [present[n] for n in places]
        n_taken += len(tasks)
        taken = [part]
        del part
        yield tasks, taken.pop()


def _add(into: dict[int, Tensor], grads: dict[int, Tensor]) -> None:
    for k, g in grads.items():
        into[k] = into[k] + g if k in into else g
