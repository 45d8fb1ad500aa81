"""What changes under torch.distributed: all of it behind one seam.

N processes with a part of the batch each take the step that one process would take with the whole
batch. `Alone` is one process, whose answers cost nothing; `Replicas` (in `gradbal._replicas`) have
all parameters each, and `Sharded` (in `gradbal._sharded`) have a part of each. Whoever calls them
does not ask which it is.

Every loss is the mean over this process's part of the batch. With the shares `c_r` of the N
processes, which sum to one, row i of J is `Σ_r c_r ∇ℓ_i^r`. Each loss is multiplied by `N c_r`
before its backward pass, so that everywhere else rows, gradients and losses are plain means. The
Gramian of the mean rows is not the mean of the Gramians: the rows themselves are averaged, some
columns at a time, each process takes the products of its part of the columns, and `T²` numbers are
added up.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch.distributed as dist
from torch import Tensor

from gradbal._lazy import LazyLosses
from gradbal._losses import Losses
from gradbal.jacobian import (
    Absent,
    Reach,
    Root,
    RowsEngine,
    cross_gramian,
    gramian,
    wants_exact,
)

if TYPE_CHECKING:
    from gradbal.aggregators.base import Aggregator

__all__ = [
    "Alone",
    "Batch",
    "ColumnShards",
    "DistributedError",
    "Laid",
    "Roots",
    "Spread",
    "find_processes",
    "is_sharded",
    "sharded_like",
]

Spread = Literal["rows", "columns", "nothing"]
"""What a Gramian has to be summed over: every process has its own rows, to be averaged; its own
columns of them, times N; or the same as all others."""

Batch = Losses | LazyLosses
"""The losses of one batch."""

Roots = Sequence[Root | Absent]
"""Where the backward passes of T losses start."""


class DistributedError(RuntimeError):
    """Another process could not take the step, or they do not take the same one.

    Attributes:
        ranks: of the processes that it came from, within their group.
    """

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        self.ranks = list(ranks)
        super().__init__(message)


class ColumnShards(Protocol):
    """The columns of J, of which each process has some."""

    @property
    def width(self) -> int:
        """P, how many columns there are."""
        ...

    def sum(self, sums: Tensor) -> Tensor:
        """Sums over this process's columns, added up."""
        ...

    def own(self, whole: Tensor) -> Tensor:
        """This process's columns `[..., p]` of all of them `[..., P]`."""
        ...

    def whole(self, own: Tensor) -> Tensor:
        """All columns `[..., P]`, from every process's own."""
        ...


class Laid(Protocol):
    """Gradients laid out by what the losses reach."""

    @property
    def reach(self) -> list[Reach | None]: ...

    def signature(self) -> int: ...

    def widen(self, reach: list[Reach | None]) -> None: ...


class Alone:
    """One process: nothing to agree on, and nothing is sent.

    Attributes:
        size: N, the number of processes. rank: of this one.
        lacking: whether any of them lacks a task at this step.
    """

    size = 1
    rank = 0
    lacking = False

    alone: ClassVar[bool] = True
    """Whether all rows and columns are here."""

    cannot: ClassVar[dict[str, str]] = {}
    """Kinds of steps that these processes cannot take together, and why."""

    def check(self, kinds: Sequence[str]) -> None:
        """Raises ValueError where one of these kinds of steps cannot be taken."""
        for kind in kinds:
            if kind in self.cannot:
                raise ValueError(f"with {self.size} processes {self.cannot[kind]}")

    @property
    def engine(self) -> RowsEngine | None:
        """What has to take the rows; None leaves the choice."""
        return None

    def stand_ins(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Plain tensors in the place of the parameters."""
        return parameters

    def single_pass(
        self, batch: Losses, weights: Tensor, retain_graph: bool, absent: frozenset[int]
    ) -> bool:
        """Whether it was for the processes to make the pass of `Σ w_i ℓ_i`, and is made."""
        return False

    def shards(self, shared: Sequence[int]) -> ColumnShards | None:
        """The columns of J, where each process has some; None where each has them all.

        Args:
            shared: indices of the shared parameters.
        """
        return None

    def failed(self, error: Exception) -> None:
        """Tells the others that this process cannot take the step that they are about to take."""

    def meet(
        self, batches: Sequence[Batch], batch_size: float | Sequence[float] | None, plan: str
    ) -> list[Batch]:
        """The batches with what the processes have in common: mean losses, shares, who is missing.

        Args:
            batches: this process's.
            batch_size: the weight of its part, one number or one for each task.
            plan: what has to be the same everywhere.

        Raises:
            DistributedError: another process failed, or is about to take another step.
        """
        return list(batches)

    def agreeing(self) -> AbstractContextManager[list[Laid]]:
        """Within it gradients are taken, and put on the list; afterwards they have the same layout
        everywhere.

        Raises:
            DistributedError: another process failed on its way.
        """
        return nullcontext([])

    def known_reach(self, reach: list[Reach | None]) -> list[Reach | None]:
        """For each task what it reaches in any of the processes."""
        return reach

    def average_values(self, values: Tensor) -> Tensor:
        """`[T]`, the mean of every process's losses."""
        return values

    def average(self, tensor: Tensor) -> Tensor:
        """The mean of every process's tensor, maybe in its place."""
        return tensor

    def products(
        self, parts: Sequence[Tensor], extremes: Tensor, exact: bool, spread: Spread = "rows"
    ) -> tuple[list[Tensor], Tensor]:
        """The Gramian `[T, T]` of each group of columns, and the extremes `[T]` of all processes.

        Args:
            parts: `[T, ·]` each.
            extremes: `[T]`, not finite where something of a task is not.
            exact: with products in float64.
            spread: what other processes have.
        """
        return [gramian(part, exact=exact) for part in parts], extremes

    def cross_product(self, first: Tensor, second: Tensor, extremes: Tensor) -> tuple[Tensor, ...]:
        """`J₁J₂ᵀ [T, T]`, and the extremes `[T]` of all processes."""
        return cross_gramian(first, second), extremes

    def wants_exact(self, grams: Tensor, parts: Sequence[Tensor]) -> bool:
        """Whether any of the Gramians `[K, T, T]` on the host hangs on digits that it lacks."""
        return any(wants_exact(g, part) for g, part in zip(grams, parts, strict=True))

    def spoiled(self, extremes: Tensor) -> Tensor:
        """`[T]`, not finite where that of any process is not."""
        return extremes

    def whole_rows(self, jacobian: Tensor) -> None:
        """Makes every process's rows their mean, for methods that look at them."""

    def completing(
        self, parameters: Sequence[Tensor], roots: Roots | None, accumulate: bool
    ) -> AbstractContextManager[list[bool]]:
        """Within it gradients are delivered, and whether they are is put on the list; afterwards
        `.grad` is the mean of all processes.

        Args:
            parameters: those to train.
            roots: the losses, where parameters may get nothing as a task sits the step out.
            accumulate: nothing is delivered.
        """
        return nullcontext([])


def find_processes(
    parameters: Sequence[Tensor], process_group: Any, aggregator: Aggregator
) -> Alone:
    """Who takes the steps together.

    Args:
        parameters: those to train.
        process_group: a group; "local" for this process alone; None for that of the parameters'
            DDP or FSDP module.
        aggregator: whose random numbers become the same everywhere.

    Raises:
        ValueError: replicas whose parameters are not the same; or a wrapper that is not supported.
    """
    if not (dist.is_available() and dist.is_initialized()) or process_group == "local":
        return Alone()
    if any(is_sharded(p) for p in parameters):
        from gradbal._sharded import Sharded

        shards = Sharded(parameters, process_group)
        shards.draw_alike(aggregator)
        return shards
    world = dist.get_world_size(process_group)
    if world == 1:
        return Alone()
    wrapped = _ddp_modules(parameters)
    if process_group is None and not wrapped:
        warnings.warn(
            f"torch.distributed runs {world} processes, but the parameters belong to no DDP or "
            "FSDP module: gradients are balanced in each process alone. Pass "
            "`process_group=torch.distributed.group.WORLD` to train replicas together, or "
            '`process_group="local"` for this',
            stacklevel=4,
        )
        return Alone()
    group = process_group if process_group is not None else wrapped[0].process_group
    if dist.get_world_size(group) == 1:
        return Alone()
    if any(ddp.static_graph for ddp in wrapped):
        raise ValueError(
            "DistributedDataParallel must have static_graph=False, found True, under which the "
            "first backward pass has to be the only one; use find_unused_parameters=True"
        )
    from gradbal._replicas import Replicas

    replicas = Replicas(group, wrapped)
    replicas.check_same(parameters)
    replicas.draw_alike(aggregator)
    return replicas


def is_sharded(parameter: Tensor) -> bool:
    """Whether each process has a part of it."""
    return hasattr(parameter, "device_mesh")


def sharded_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A tensor as each process has it of such a parameter."""
    if not is_sharded(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(whole, mesh, placements)


def _ddp_modules(parameters: Sequence[Tensor]) -> list[Any]:
    """The DDP modules of these parameters, which do not know of them.

    Raises:
        ValueError: they are of a module of FSDP1.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    mine = {id(p) for p in parameters}
    kinds = DistributedDataParallel, FullyShardedDataParallel
    found = [module for module in gc.get_objects() if issubclass(type(module), kinds)]
    found = [module for module in found if any(id(p) in mine for p in module.parameters())]
    if any(isinstance(module, FullyShardedDataParallel) for module in found):
        raise ValueError(
            "sharded parameters must be those of fully_shard (FSDP2), found a "
            "FullyShardedDataParallel module (FSDP1)"
        )
    return found
