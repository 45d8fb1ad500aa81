"""What changes under torch.distributed: all of it behind one seam.

N processes with a part of the batch each take the step that one process would take with the whole
batch. `Alone` is one process, whose answers cost nothing; `Replicas` have all parameters each, and
`Sharded` (in `gradbal._sharded`) a part of each parameter. Whoever calls them does not ask which it
is.

Every loss is the mean over this process's part of the batch. With the shares `c_r` of the N
processes, which sum to one, row i of J is `Σ_r c_r ∇ℓ_i^r`. Each loss is multiplied by `N c_r`
before its backward pass, so that everywhere else rows, gradients and losses are plain means. The
Gramian of the mean rows is not the mean of the Gramians: the rows themselves are averaged, some
columns at a time, each process takes the products of its part of the columns, and `T²` numbers are
added up.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
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
    upload,
    used_by_ddp,
    wants_exact,
)

if TYPE_CHECKING:
    from gradbal.aggregators.base import Aggregator

__all__ = ["Alone", "ColumnShards", "DistributedError", "Replicas", "Spread", "find_processes"]

Spread = Literal["rows", "columns", "nothing"]
"""What a Gramian has to be summed over: every process has its own rows, to be averaged; its own
columns of them, times N; or the same as all others."""

_BLOCK = 1 << 23
"""Bytes of the rows that are averaged at a time."""

_BUCKET = 25 << 20
"""Bytes of the gradients that are averaged at a time, as in DDP."""

# The later name; builds without torch.distributed have neither.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(
    dist, "reduce_scatter_tensor", None
)

Batch = Losses | LazyLosses
Roots = Sequence[Root | Absent]


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

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[list[Laid]]:
        """Within it gradients are taken, and put on the list; afterwards they have the same layout
        everywhere.

        Raises:
            DistributedError: another process failed on its way.
        """
        yield []

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

    @contextlib.contextmanager
    def completing(
        self, parameters: Sequence[Tensor], roots: Roots | None, accumulate: bool
    ) -> Iterator[list[bool]]:
        """Within it gradients are delivered, and whether they are is put on the list; afterwards
        `.grad` is the mean of all processes.

        Args:
            parameters: those to train.
            roots: the losses, where parameters may get nothing as a task sits the step out.
            accumulate: nothing is delivered.
        """
        yield []


class Host:
    """Small messages between the hosts, which no accelerator has to be waited for."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        if "cpu:" not in dist.get_backend_config(group):
            ranks = dist.get_process_group_ranks(group)
            made = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
            assert isinstance(made, dist.ProcessGroup)
            group = made
        self.group = group
        self.size = dist.get_world_size(group)

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Each process's numbers; the same count everywhere."""
        mine = torch.tensor(numbers, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.group)
        return [each.tolist() for each in found]

    def gather_text(self, text: str) -> list[str]:
        """Each process's text."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, text, group=self.group)
        return found

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Entry by entry, over the processes."""
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        result: list[float] = total.tolist()
        return result

    def largest(self, octets: Tensor) -> Tensor:
        """Entry by entry, over the processes; `uint8`."""
        dist.all_reduce(octets, dist.ReduceOp.MAX, group=self.group)
        return octets


class Together(Alone):
    """What processes have in common that share the work, whoever has which parameters."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.host = Host(group)
        # Of each task, at the last step.
        self._shares: list[float] = []

    def draw_alike(self, aggregator: Aggregator) -> None:
        """Random numbers are those of the first process."""
        source = dist.get_process_group_ranks(self.host.group)[0]
        for generator in aggregator.generators():
            state = generator.get_state()
            dist.broadcast(state, source, group=self.host.group)
            generator.set_state(state)

    def failed(self, error: Exception) -> None:
        if not isinstance(error, DistributedError):
            # Where the others are gone, this error is the one to see.
            with contextlib.suppress(RuntimeError):
                self._exchange(error)

    def _exchange(self, error: Exception | None, *numbers: float) -> list[list[float]]:
        """Each process's numbers, four at most, unless one of them failed.

        Raises:
            DistributedError: on all processes but those that failed, which raise their own error.
        """
        # Of one length, since the others cannot know at what point a process fails.
        message = [float(error is not None), *numbers, 0.0, 0.0, 0.0, 0.0][:5]
        found = self.host.gather(message)
        ranks = [rank for rank, row in enumerate(found) if row[0]]
        if not ranks:
            return [row[1:] for row in found]
        texts = self.host.gather_text("" if error is None else f"{type(error).__name__}: {error}")
        if error is None:
            first = ranks[0]
            others = "" if len(ranks) == 1 else f" (and {len(ranks) - 1} more)"
            raise DistributedError(
                f"all processes must take the step, found that rank {first}{others} could not: "
                f"{texts[first]}",
                ranks,
            )
        return []

    def _same(self, found: Sequence[Sequence[float]], text: str) -> None:
        if len({tuple(row) for row in found}) > 1:
            texts = self.host.gather_text(text)
            ranks = [rank for rank, other in enumerate(texts) if other != texts[0]]
            raise DistributedError(
                f"all processes must take the same step, found {texts[0]} on rank 0 and "
                f"{texts[ranks[0]]} on rank {ranks[0]}",
                ranks,
            )

    def meet(
        self, batches: Sequence[Batch], batch_size: float | Sequence[float] | None, plan: str
    ) -> list[Batch]:
        names, size = batches[0].names, batch_size
        plan = f"{plan} of the losses {list(names)}"
        single = 1.0 if size is None else float(size) if isinstance(size, int | float) else None
        lacking = any(batch.lacking for batch in batches)
        signature = float(zlib.crc32(plan.encode()))
        found = self._exchange(None, signature, single is None, single or 0.0, lacking)
        self._same([row[:1] for row in found], plan)
        sizes = [row[2] for row in found]
        self.lacking = any(row[3] for row in found)
        if not self.lacking and not any(row[1] for row in found):
            total = sum(sizes)
            if not total > 0:
                raise ValueError(f"`batch_size` must be above 0 on some process, found {sizes}")
            share = sizes[self.rank] / total
            shares = [[share] * len(names) for _ in batches]
            missing = [frozenset[int]() for _ in batches]
        else:
            mine = [
                [
                    0.0 if i in batch.lacking else single if single is not None else float(size[i])  # type: ignore[index]
                    for i in range(len(names))
                ]
                for batch in batches
            ]
            totals = self.host.sum([x for row in mine for x in row])
            shares, missing = [], []
            for n, row in enumerate(mine):
                whole = totals[n * len(names) : (n + 1) * len(names)]
                shares.append([x / t if t else 0.0 for x, t in zip(row, whole, strict=True)])
                missing.append(frozenset(i for i, t in enumerate(whole) if not t))
        self._shares = shares[0]
        return [
            self._shared(batch, share, gone)
            for batch, share, gone in zip(batches, shares, missing, strict=True)
        ]

    def _shared(self, batch: Batch, shares: list[float], missing: frozenset[int]) -> Batch:
        if isinstance(batch, LazyLosses):
            batch.missing = missing
            batch.factors = [self.size * share for share in shares]
            batch.averaged = lambda values: self._mean_losses(
                values, shares, batch.lacking, missing
            )
            return batch
        values = self._mean_losses(batch.values, shares, batch.lacking, missing)
        factors = None
        if any(share * self.size != 1.0 for share in shares):
            factors = upload(torch.tensor(shares, dtype=values.dtype) * self.size, values.device)
        return replace(batch, values=values, missing=missing, factors=factors)

    def _mean_losses(
        self, values: Tensor, shares: list[float], lacking: frozenset[int], missing: frozenset[int]
    ) -> Tensor:
        """`[T]`: the whole batch's losses, NaN for tasks that are missing everywhere."""
        c = upload(torch.tensor(shares, dtype=torch.float64), values.device)
        parts = values.double() * c
        if lacking:
            parts[sorted(lacking)] = 0.0
        dist.all_reduce(parts, group=self.group)
        if missing:
            parts[sorted(missing)] = float("nan")
        return parts.to(values.dtype)

    def average_values(self, values: Tensor) -> Tensor:
        # What a task lacks here is NaN, which is no number to add.
        weights = upload(torch.tensor(self._shares, dtype=torch.float64), values.device)
        pair = torch.stack([torch.where(weights > 0, values.double() * weights, 0.0), weights])
        dist.all_reduce(pair, group=self.group)
        return (pair[0] / pair[1]).to(values.dtype)

    def average(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self.group)
        return tensor.div_(self.size)

    def known_reach(self, reach: list[Reach | None]) -> list[Reach | None]:
        n = max((len(row) for row in reach if row is not None), default=0)
        n = int(max(row[0] for row in self.host.gather([float(n)])))
        rows = [[row is not None, *(row or [False] * n)] for row in reach]
        found = self.host.largest(torch.tensor(rows, dtype=torch.uint8)).tolist()
        return [tuple(map(bool, row[1:])) if row[0] else None for row in found]

    def _summed(self, grams: Sequence[Tensor], extremes: Tensor) -> tuple[list[Tensor], Tensor]:
        """Parts of Gramians and extremes, in one message."""
        n = len(extremes)
        # What is not finite stays so; of the rest only that matters.
        spoiled = torch.where(extremes.isfinite(), extremes.sign().abs(), extremes).double()
        packed = torch.cat([*(g.reshape(-1) for g in grams), spoiled])
        dist.all_reduce(packed, group=self.group)
        *found, total = torch.split(packed, [n * n] * len(grams) + [n])
        return [g.view(n, n) for g in found], total

    def wants_exact(self, grams: Tensor, parts: Sequence[Tensor]) -> bool:
        mine = super().wants_exact(grams, parts)
        return any(row[0] for row in self.host.gather([float(mine)]))

    def spoiled(self, extremes: Tensor) -> Tensor:
        return self._summed([], extremes)[1]

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[list[Laid]]:
        laid: list[Laid] = []
        try:
            yield laid
        except Exception as error:
            self.failed(error)
            raise
        found = self._exchange(None, laid[0].signature())
        if len({row[0] for row in found}) > 1:
            laid[0].widen(self.known_reach(laid[0].reach))


class Replicas(Together):
    """Processes with all parameters each: DistributedDataParallel, or plain copies of a model.

    Args:
        group: of the processes.
        wrapped: the DDP modules, which average what lands in `.grad` of their parameters.
    """

    cannot: ClassVar[dict[str, str]] = {
        "gramian": (
            '`jacobian` must keep rows or sketches, which can be averaged, found "gramian", whose '
            'Gramian is of one process\'s gradients; use "loop" or "sketch"'
        ),
        "instance": (
            '`jacobian` must keep rows or sketches, which can be averaged, found "instance"'
        ),
        "masks": (
            "masks of a representation need the whole batch in one process, found `features` and "
            "a method that looks at J itself; take it on parameters"
        ),
        "logarithms of functions": (
            'loss_transform="log" needs all losses before the first gradient, found functions; '
            "pass the losses themselves"
        ),
        "dropped functions": (
            'nonfinite="drop" needs all losses before the first gradient, found functions; pass '
            'the losses themselves, or use nonfinite="skip"'
        ),
    }

    def __init__(self, group: dist.ProcessGroup, wrapped: Sequence[Any] = ()) -> None:
        super().__init__(group)
        self._wrapped = [weakref.ref(module) for module in wrapped]

    def check_same(self, parameters: Sequence[Tensor]) -> None:
        """Raises ValueError unless all processes start from the same parameters."""
        norms = torch._foreach_norm([p.detach() for p in parameters])
        norm = float(torch.stack([n.double().cpu() for n in norms]).sum())
        found = self.host.gather([float(len(parameters)), norm])
        if any(row != found[0] for row in found):
            raise ValueError(
                "all processes must start from the same parameters, found tensors and norms "
                f"{[(int(n), x) for n, x in found]}; load the same checkpoint, set the same seed, "
                "or wrap the model in DistributedDataParallel"
            )

    def products(
        self, parts: Sequence[Tensor], extremes: Tensor, exact: bool, spread: Spread = "rows"
    ) -> tuple[list[Tensor], Tensor]:
        if spread == "nothing":
            return [gramian(part, exact=exact) for part in parts], self.spoiled(extremes)
        if spread == "columns":
            grams = [gramian(part, exact=exact) for part in parts]
        else:
            grams = [
                self._product(part, lambda total: gramian(total, exact=exact)) for part in parts
            ]
        found, extremes = self._summed(grams, extremes)
        return [g / self.size**2 for g in found], extremes

    def cross_product(self, first: Tensor, second: Tensor, extremes: Tensor) -> tuple[Tensor, ...]:
        both = torch.cat([first, second])
        n = len(first)
        part = self._product(both, lambda mean: cross_gramian(mean[:n], mean[n:]))
        (found,), extremes = self._summed([part], extremes)
        return found / self.size**2, extremes

    def _product(self, jacobian: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """A product of this process's part of the columns of the processes' summed rows.

        Some columns at a time: each process gets the sum of a N-th of them, and forgets it.
        """
        n_rows, width = jacobian.shape
        total: Tensor | None = None
        piece = max(1, _BLOCK // (n_rows * jacobian.element_size() * self.size))
        for start in range(0, width, piece * self.size):
            block = jacobian[:, start : start + piece * self.size]
            share = -(-block.shape[1] // self.size)
            send = jacobian.new_zeros(self.size, n_rows, share)
            for each, columns in zip(send, torch.split(block, share, 1), strict=False):
                each[:, : columns.shape[1]] = columns
            mine = jacobian.new_empty(n_rows, share)
            _reduce_scatter(mine.view(-1), send.view(-1), group=self.group)
            part = product(mine)
            total = part if total is None else total + part
        assert total is not None
        return total

    def whole_rows(self, jacobian: Tensor) -> None:
        for row in jacobian:
            self.average(row)

    @contextlib.contextmanager
    def completing(
        self, parameters: Sequence[Tensor], roots: Roots | None, accumulate: bool
    ) -> Iterator[list[bool]]:
        outcome: list[bool] = []
        if accumulate:
            yield outcome
            return
        modules = [module for ref in self._wrapped if (module := ref()) is not None]
        reduced = {id(p) for module in modules for p in module.parameters()}
        with contextlib.ExitStack() as stack:
            if roots is not None:
                for module in modules:
                    expected = [p for p in module.parameters() if p.requires_grad]
                    if module.find_unused_parameters:
                        used = used_by_ddp(roots, expected)
                        expected = [p for p, yes in zip(expected, used, strict=True) if yes]
                    stack.enter_context(self._all_arriving(expected, parameters, outcome))
            yield outcome
        if all(outcome):
            self._average_grads([p for p in parameters if id(p) not in reduced])

    def _average_grads(self, parameters: Sequence[Tensor]) -> None:
        """The mean of every process's `.grad`, which all have of what any of them has."""
        if not parameters:
            return
        flags = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        found = self._exchange(None, zlib.crc32(bytes(flags.tolist())))
        if len({row[0] for row in found}) > 1:
            for p, there in zip(parameters, self.host.largest(flags).tolist(), strict=True):
                if there and p.grad is None:
                    p.grad = torch.zeros_like(p)
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            self.average(flat)
            pieces = torch.split(flat, [g.numel() for g in bucket])
            shaped = [piece.view(g.shape) for piece, g in zip(pieces, bucket, strict=True)]
            torch._foreach_copy_(bucket, shaped)

    @contextlib.contextmanager
    def _all_arriving(
        self, expected: Sequence[Tensor], parameters: Sequence[Tensor], outcome: list[bool]
    ) -> Iterator[None]:
        """DDP waits for all these parameters: those that get nothing, as a task sits out, get zero,
        and are as they were before where no process has anything for them."""
        mine = {id(p) for p in parameters}
        before = [p.grad for p in expected]
        arrived: set[int] = set()
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: arrived.add(id(p)))  # type: ignore[no-untyped-call]
            for p in expected
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if not all(outcome):
            # The step is left out.
            return
        left = [p for p in expected if id(p) not in arrived and id(p) in mine]
        if left:
            # Before anything else is sent: DDP sends as soon as a bucket is full.
            torch.autograd.backward(left, [torch.zeros_like(p) for p in left])
        places = {id(p): k for k, p in enumerate(parameters)}
        anywhere = torch.zeros(len(parameters), dtype=torch.uint8)
        anywhere[[places[i] for i in arrived if i in places]] = 1
        anywhere = self.host.largest(anywhere)
        for p, grad in zip(expected, before, strict=True):
            if id(p) in places and not anywhere[places[id(p)]]:
                p.grad = grad


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device, as many as fill a bucket."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for alike in kinds.values():
        bucket: list[Tensor] = []
        filled = 0
        for tensor in alike:
            bucket.append(tensor)
            filled += tensor.numel() * tensor.element_size()
            if filled >= _BUCKET:
                yield bucket
                bucket, filled = [], 0
        if bucket:
            yield bucket


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

        processes: Together = Sharded(parameters, process_group)
        processes.draw_alike(aggregator)
        return processes
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
    processes = Replicas(group, wrapped)
    processes.check_same(parameters)
    processes.draw_alike(aggregator)
    return processes


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
