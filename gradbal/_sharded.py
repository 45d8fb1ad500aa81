"""Parameters of which each process has a part, as torch's `fully_shard` (FSDP2) leaves them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from gradbal._losses import Losses
from gradbal._together import Together
from gradbal.distributed import Batch, ColumnShards, Roots, Spread, is_sharded
from gradbal.jacobian import Root, RowsEngine, gramian, there, upload

__all__ = ["Sharded"]


class Sharded(Together):
    """Processes that have a part of each parameter.

    FSDP gathers parameters while it walks the graph, and leaves each process its shard of the mean
    gradient: T ordinary backward passes give each process its columns of J `[T, P/N]`, and `T²`
    numbers are all that has to be sent besides. Everything else works on stand-ins, one plain
    tensor for each parameter, of its shard's shape.

    Args:
        parameters: those to train.
        process_group: what the user named, to compare; or None.

    Raises:
        ValueError: parameters that are not sharded, or not as FSDP does it; another group.
    """

    cannot: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("gramian", "sketch", "instance"),
            '`jacobian` must be "loop" or "auto" for parameters sharded by fully_shard, whose '
            "gradients come from ordinary backward passes, found another engine",
        ),
        "vmap": (
            '`jacobian` must be "loop" or "auto" for parameters sharded by fully_shard, which are '
            'gathered anew for every pass, found "vmap"'
        ),
        "features": (
            "`features` are not there for parameters sharded by fully_shard; leave them out"
        ),
        "functions": (
            "losses must be there for parameters sharded by fully_shard, found functions; pass "
            "the losses themselves"
        ),
        "independent": (
            "`independent` batches are not there for parameters sharded by fully_shard; use DDP"
        ),
        "probes": (
            "a method that looks at some columns of J is not there for parameters sharded by "
            "fully_shard; use DDP"
        ),
        "closures": (
            "a method that looks at the losses elsewhere is not there for parameters sharded by "
            "fully_shard; use DDP"
        ),
    }

    def __init__(self, parameters: Sequence[Tensor], process_group: Any) -> None:
        whole = [list(p.shape) for p in parameters if not is_sharded(p)]
        if whole:
            raise ValueError(
                "all trained parameters must be sharded where some are, found plain ones of "
                f"shapes {whole[:3]}; call fully_shard on the whole model"
            )
        first = parameters[0]
        assert isinstance(first, DTensor)
        mesh, n_dims = first.device_mesh, first.device_mesh.ndim
        for p in parameters:
            assert isinstance(p, DTensor)
            sharded = [placement for placement in p.placements if not placement.is_replicate()]
            if p.device_mesh != mesh or n_dims > 2 or [type(each) for each in sharded] != [Shard]:
                raise ValueError(
                    "parameters must be sharded by fully_shard over one mesh, found placements "
                    f"{p.placements} on {p.device_mesh}"
                )
        group = mesh.get_group() if n_dims == 1 else _whole_group(mesh)
        if process_group is not None and process_group is not group:
            mine, theirs = map(dist.get_process_group_ranks, (group, process_group))
            if mine != theirs:
                raise ValueError(
                    f"`process_group` must be that of the sharded parameters, ranks {mine}, found "
                    f"ranks {theirs}; leave it out"
                )
        super().__init__(group)
        self.copies = mesh.size(0) if n_dims == 2 else 1
        self._shard_group = mesh.get_group(n_dims - 1)
        self._parameters = list(parameters)
        self._stand_ins = [_shard_of(p).requires_grad_() for p in parameters]
        self.name = "loop"

    @property
    def engine(self) -> RowsEngine:
        return self

    # The engine of the rows.

    follows_graph = False
    """The graph ends in FSDP's own copies of the parameters."""

    def rows(
        self, roots: Sequence[Root], parameters: Sequence[Tensor], retain_graph: bool
    ) -> Iterator[tuple[Tensor | None, ...]]:
        """For each root its shards of the mean gradients, None where it has none."""
        chosen = {id(p) for p in parameters}
        pairs = list(zip(self._parameters, self._stand_ins, strict=True))
        with self._grads_aside():
            for n, (start, cotangent) in enumerate(roots, 1):
                torch.autograd.backward(start, cotangent, retain_graph or n < len(roots))
                found = [
                    None if p.grad is None else _shard_of(p.grad)
                    for p, stand_in in pairs
                    if id(stand_in) in chosen
                ]
                if not any(g is not None for g in found):
                    raise ValueError(
                        "a backward pass must leave gradients in the sharded parameters, found "
                        "none; call set_requires_gradient_sync(True), and gather micro-batches "
                        "with backward(..., accumulate=True)"
                    )
                for p, _ in pairs:
                    p.grad = None
                yield tuple(found)
                del found

    @contextlib.contextmanager
    def _grads_aside(self) -> Iterator[None]:
        """Within it `.grad` is empty, and hooks wait for the result."""
        before = [(p, p.grad, p._post_accumulate_grad_hooks) for p in self._parameters]
        for p, _, hooks in before:
            p.grad = None
            if hooks:
                p._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        try:
            yield
        finally:
            for p, grad, hooks in before:
                p.grad = grad
                if hooks:
                    p._post_accumulate_grad_hooks = hooks

    # What the others do with a Gramian and gradients.

    def stand_ins(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        of = {id(p): s for p, s in zip(self._parameters, self._stand_ins, strict=True)}
        return [of[id(p)] for p in parameters]

    def meet(
        self, batches: Sequence[Batch], batch_size: float | Sequence[float] | None, plan: str
    ) -> list[Batch]:
        found = super().meet(batches, batch_size, plan)
        if self.lacking:
            alone = any(batch.lacking != batch.missing for batch in found)
            ranks = [rank for rank, (yes,) in enumerate(self.host.gather([float(alone)])) if yes]
            if ranks:
                raise ValueError(
                    "every process must have a loss of every task for parameters sharded by "
                    f"fully_shard, which take part in each backward pass, found none on ranks "
                    f"{ranks}; pass zero times an output there, and batch_size=0 for that task"
                )
        return found

    def products(
        self, parts: Sequence[Tensor], extremes: Tensor, exact: bool, spread: Spread = "rows"
    ) -> tuple[list[Tensor], Tensor]:
        grams = [gramian(part, exact=exact) for part in parts]
        found, extremes = self._summed(grams, extremes)
        return [g / self.copies for g in found], extremes

    def single_pass(
        self, batch: Losses, weights: Tensor, retain_graph: bool, absent: frozenset[int]
    ) -> bool:
        roots = there([r for i, r in enumerate(batch.roots(weights)) if i not in absent])
        if isinstance(batch.tensors, Tensor) and not absent:
            weights = upload(weights, batch.values.device).to(batch.tensors.dtype)
            torch.autograd.backward(batch.tensors, weights, retain_graph)
        elif roots:
            starts, cotangents = zip(*roots, strict=True)
            torch.autograd.backward(starts, cotangents, retain_graph)
        return True

    @contextlib.contextmanager
    def completing(
        self, parameters: Sequence[Tensor], roots: Roots | None, accumulate: bool
    ) -> Iterator[list[bool]]:
        for stand_in in self._stand_ins:
            stand_in.grad = None
        yield []
        arrived = [
            (p, stand_in.grad)
            for p, stand_in in zip(self._parameters, self._stand_ins, strict=True)
            if stand_in.grad is not None
        ]
        for stand_in in self._stand_ins:
            stand_in.grad = None
        if arrived:
            targets, grads = zip(*arrived, strict=True)
            shaped = [_like(g, p) for p, g in arrived]
            del arrived, grads
            torch.autograd.backward(targets, shaped)

    def shards(self, shared: Sequence[int]) -> ColumnShards:
        return _Columns([self._parameters[k] for k in shared], self._shard_group)


class _Columns:
    """The columns of J of which each process has those of its shards.

    Args:
        parameters: the shared ones, in the order of their columns.
        group: of the processes that have different shards.
    """

    def __init__(self, parameters: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        self._parameters = parameters
        self._group = group

    @property
    def width(self) -> int:
        return sum(p.numel() for p in self._parameters)

    def sum(self, sums: Tensor) -> Tensor:
        total = sums.double()
        dist.all_reduce(total, group=self._group)
        return total.to(sums.dtype)

    def own(self, whole: Tensor) -> Tensor:
        sizes = [p.numel() for p in self._parameters]
        pairs = zip(self._parameters, torch.split(whole, sizes, -1), strict=True)
        return torch.cat([part[..., slice(*_place(p))] for p, part in pairs], -1)

    def whole(self, own: Tensor) -> Tensor:
        sizes = [_shard_of(p).numel() for p in self._parameters]
        # A process may have none of them.
        rows = own.reshape(own.shape[:-1].numel(), own.shape[-1])
        found = []
        for p, part in zip(self._parameters, torch.split(rows, sizes, 1), strict=True):
            shaped = [_like(row.reshape(_shard_of(p).shape), p) for row in part]
            found.append(torch.stack([each.full_tensor().flatten() for each in shaped]))
        return torch.cat(found, 1).view(*own.shape[:-1], self.width)


def _place(p: Tensor) -> tuple[int, int]:
    """Where this process's part of a parameter begins and ends, in the order of its indices."""
    assert isinstance(p, DTensor)
    if p.placements[-1] != Shard(0):
        raise ValueError(f"parameters must be sharded along dimension 0, found {p.placements}")
    mesh = p.device_mesh
    n_parts, part = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    n_rows = p.shape[0]
    width, each = p.numel() // max(n_rows, 1), -(-n_rows // n_parts)
    start = min(part * each, n_rows)
    return start * width, min(start + each, n_rows) * width


def _shard_of(tensor: Tensor) -> Tensor:
    """This process's part, a plain tensor on the same memory."""
    assert isinstance(tensor, DTensor)
    shard: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return shard


def _like(shard: Tensor, parameter: Tensor) -> DTensor:
    """The tensor of which each process has such a shard."""
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _whole_group(mesh: Any) -> dist.ProcessGroup:
    """The group of all processes of a mesh of two dimensions."""
    ranks = sorted(mesh.mesh.flatten().tolist())
    if ranks == dist.get_process_group_ranks(None):
        group = dist.group.WORLD
        assert group is not None
        return group
    return dist.new_group(ranks, use_local_synchronization=True)  # type: ignore[return-value]
