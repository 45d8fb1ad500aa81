"""The Jacobian routine: task gradients as rows of one buffer, their Gramian, their combination.

It never knows which method is in use, and makes no device-to-host synchronisation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

__all__ = [
    "Rows",
    "check_dense",
    "combine",
    "cross_gramian",
    "gramian",
    "hooks_held_back",
    "reached_parameters",
    "shared_indices",
    "upload",
    "wants_exact",
]

BLOCK = 256
"""Columns in one block of the Gramian's sum: float32 within, float64 across. Rows of equal entries,
whose rounding errors do not cancel, leave cosines off by 1e-6 at 256 columns and 2e-5 at 4096."""

SMALL = 1 << 16
"""Up to this many entries a Jacobian is simply computed with in float64."""

_SAFE_SQUARES = (1e-25, 1e35)
_NEARLY_DEPENDENT = 1e-3

FEW = 6
"""Up to this many rows an elimination is done in plain floats."""

CHUNK = 1 << 18
"""Columns converted at a time where a Jacobian's own precision does not do."""

Array = NDArray[np.float64]
Reach = tuple[bool, ...]


def gramian(jacobian: Tensor, *, exact: bool = False) -> Tensor:
    """`G = JJᵀ`, formed by column blocks and summed in float64.

    A plain float32 product is off by 1e-3 and more in the cosines at ten million columns; by blocks
    it is right to 1e-6 (1e-9 for random rows), and faster. Half-precision rows are cast to float32
    chunk by chunk.

    Args:
        jacobian: `[T, P]`, any floating dtype and device.
        exact: do every product in float64, whatever the dtype; see `wants_exact`.

    Returns:
        `[T, T]`, float64, on the same device.

    Example:
        >>> gramian(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        tensor([[5., 6.],
                [6., 9.]], dtype=torch.float64)
    """
    jacobian = jacobian.detach()
    with _no_autocast(jacobian):
        if _in_float64(jacobian):
            wide = jacobian.double()
            return wide @ wide.mT
        if exact or torch.get_float32_matmul_precision() != "highest":
            # TF32 and bfloat16 products are global settings of the user's; they stay as they are.
            chunks = (c.double() for c in torch.split(jacobian, CHUNK, dim=1))
            return _sum(c @ c.mT for c in chunks)
        if jacobian.dtype == torch.float32:
            return _blocked(jacobian)
        return _sum(_blocked(c.float()) for c in torch.split(jacobian, CHUNK, dim=1))


def cross_gramian(first: Tensor, second: Tensor) -> Tensor:
    """`A = J₁J₂ᵀ`, every product in float64.

    Args:
        first, second: `[T, P]`, any floating dtype, on the same device.

    Returns:
        `[T, T]`, float64, on that device.

    Example:
        >>> cross_gramian(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]]))
        tensor([[5.]], dtype=torch.float64)
    """
    with _no_autocast(first):
        pairs = zip(*(torch.split(j.detach(), CHUNK, 1) for j in (first, second)), strict=True)
        return _sum(a.double() @ b.double().mT for a, b in pairs)


def wants_exact(gramian: Tensor, jacobian: Tensor) -> bool:
    """Whether a problem with this Gramian may hang on digits that float32 products do not have.

    That is where a row's square leaves float32's range, and where the rows are nearly dependent:
    elsewhere the cosine matrix is so well conditioned that 1e-6 in its entries does not matter.

    Args:
        gramian: `gramian(jacobian) [T, T]`, on the host.
        jacobian: `[T, P]`; looked at only where a square is out of range.
    """
    if _in_float64(jacobian):
        return False
    g = gramian.numpy()
    low, high = _SAFE_SQUARES
    safe = [low < square < high for square in g.diagonal().tolist()]
    if not all(safe):
        odd = [i for i, is_safe in enumerate(safe) if not is_safe]
        # One look: picking the rows with an index tensor would be an upload.
        if bool(torch.stack([jacobian[i].any() for i in odd]).any()):
            return True
        g = np.delete(np.delete(g, odd, 0), odd, 1)
    # Whether an eigenvalue of the cosines is below the bound. Cholesky's method finds the same
    # whatever the norms of the rows are.
    g = g.copy()
    g.flat[:: len(g) + 1] *= 1.0 - _NEARLY_DEPENDENT
    return not (_is_definite if len(g) <= FEW else _has_factor)(g)


def _is_definite(matrix: Array) -> bool:
    """Elimination in plain floats, which for a few rows costs less than one call of LAPACK."""
    rows: list[list[float]] = matrix.tolist()
    for k, row in enumerate(rows):
        if not row[k] > 0.0:
            return False
        for other in rows[k + 1 :]:
            factor = other[k] / row[k]
            other[:] = [x - factor * y for x, y in zip(other, row, strict=True)]
    return True


def _has_factor(matrix: Array) -> bool:
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True


def combine(weights: Tensor, jacobian: Tensor) -> Tensor:
    """`d = Jᵀw`.

    Args:
        weights: `[T]`, any floating dtype and device.
        jacobian: `[T, P]`.

    Returns:
        `[P]`, dtype and device of the Jacobian. Half-precision rows are combined in float32.

    Example:
        >>> combine(torch.tensor([0.5, 0.5]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 0.5000])
    """
    jacobian, weights = jacobian.detach(), upload(weights.detach(), jacobian.device)
    with _no_autocast(jacobian):
        if _in_float64(jacobian):
            return (weights.double() @ jacobian.double()).to(jacobian.dtype)
        if jacobian.dtype == torch.float32:
            return weights.float() @ jacobian
        w = weights.float()
        parts = [(w @ c.float()).to(jacobian.dtype) for c in torch.split(jacobian, CHUNK, dim=1)]
        return torch.cat(parts)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A few numbers on the device where they are needed.

    A plain copy from the host to a GPU waits until all the work before it is done; one from pinned
    memory, which PyTorch keeps until it has arrived, does not.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def _in_float64(jacobian: Tensor) -> bool:
    return jacobian.dtype == torch.float64 or jacobian.numel() <= SMALL


def _blocked(jacobian: Tensor) -> Tensor:
    n_blocks = jacobian.shape[1] // BLOCK
    whole = jacobian[:, : n_blocks * BLOCK].view(len(jacobian), n_blocks, BLOCK).transpose(0, 1)
    total = torch.bmm(whole, whole.mT).double().sum(0)
    rest = jacobian[:, n_blocks * BLOCK :]
    return total + (rest @ rest.mT).double() if rest.shape[1] else total


def _sum(parts: Iterable[Tensor]) -> Tensor:
    iterator = iter(parts)
    total = next(iterator)
    for part in iterator:
        total = total + part
    return total


def _no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast would take the products to half precision."""
    device = tensor.device.type
    if is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


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
            if node.name() == "CheckpointFunctionBackward":
                raise ValueError(
                    "activation checkpointing must be non-reentrant, found reentrant; "
                    "call checkpoint(..., use_reentrant=False)"
                )
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) in leaves:
                found[leaves[id(leaf)]] = True
            stack.extend(node.next_functions)
        result.append(tuple(found))
    return result


def _ends(edge: GradientEdge) -> tuple[Node | None, int]:
    return edge.node, edge.output_nr


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
                k: _like(part, self.parameters[k])
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
    """The gradients of T losses with respect to a list of parameters, taken one loss at a time.

    Each pass goes over all parameters at once: the parts of the shared ones are copied into one
    preallocated `[T, P]` buffer, which is reused from step to step; the others (a head's) are kept
    as they come. Shared are the parameters that two or more losses reach; that is read from which
    gradients come back as None, remembered, and found again when it changes.

    Attributes:
        shared_parameters: an explicit set of shared parameters, or None to detect them.
        heads: for each task, index → gradient of the parameters that are not shared.
        pending: the gradients wait for more of them, rather than to be replaced.
    """

    shared_parameters: list[Tensor] | None = None
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
        roots: Sequence[tuple[Tensor | GradientEdge, Tensor]],
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
        with hooks_held_back(parameters):
            for i, (root, cotangent) in enumerate(roots):
                if i in sit_out:
                    if not accumulate:
                        layout.buffer[i].zero_()
                    continue
                last = all(j in sit_out for j in range(i + 1, len(roots)))
                grads = torch.autograd.grad(
                    root,
                    parameters,
                    cotangent,
                    retain_graph=retain_graph or not last,
                    allow_unused=True,
                )
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
        devices = {p.device for p in chosen}
        if len(devices) > 1:
            raise ValueError(
                "the shared parameters must be on one device, found "
                f"{', '.join(sorted(map(str, devices)))}"
            )
        dtype = chosen[0].dtype
        for p in chosen[1:]:
            dtype = torch.promote_types(dtype, p.dtype)
        sizes = [p.numel() for p in chosen]
        buffer = torch.zeros(len(reach), sum(sizes), dtype=dtype, device=chosen[0].device)
        return _Layout(parameters, reach, shared, buffer)

    def head_extremes(self) -> Tensor:
        """The largest absolute entry of each task's other gradients, `[T]`: not finite where one of
        them is not."""
        device = self._current.buffer.device
        grads = [g for head in self.heads for g in head.values()]
        if not grads:
            return torch.zeros(len(self.heads), device=device)
        norms = iter(torch._foreach_norm(grads, float("inf")))
        zero = torch.zeros((), device=device)
        width = max(map(len, self.heads))
        # Filled up with zeros: one operator for all tasks.
        rows = [[next(norms).to(device, torch.float32) for _ in head] for head in self.heads]
        entries = [n for row in rows for n in row + [zero] * (width - len(row))]
        return torch.stack(entries).view(len(rows), width).amax(1)

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
        sizes = [p.numel() for p in chosen]
        grads = [
            _like(part, p) for part, p in zip(torch.split(direction, sizes), chosen, strict=True)
        ]
        targets = list(chosen)
        for weight, head in zip(head_weights, self.heads, strict=True):
            if weight is None or not head:
                continue
            parts = list(head.values())
            # Not in place: autograd may return one tensor for two parameters.
            if isinstance(weight, Tensor):
                parts = [part * weight.to(part.dtype) for part in parts]
            elif weight != 1.0:
                parts = list(torch._foreach_mul(parts, weight))
            targets.extend(layout.parameters[k] for k in head)
            grads.extend(parts)
        self.heads = [{} for _ in self.heads]
        torch.autograd.backward(targets, grads)


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


def _like(part: Tensor, parameter: Tensor) -> Tensor:
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
