"""What processes tell each other before and during a step, whoever has which parameters."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from gradbal._lazy import LazyLosses
from gradbal.distributed import Alone, Batch, DistributedError, Laid
from gradbal.jacobian import Reach, upload

if TYPE_CHECKING:
    from gradbal.aggregators.base import Aggregator

__all__ = ["Together"]


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

    alone: ClassVar[bool] = False

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
        mine = [0.0 if i in lacking else share for i, share in enumerate(shares)]
        c = upload(torch.tensor(mine, dtype=torch.float64), values.device)
        # The mean over no sample is NaN, and counts nothing.
        parts = torch.where(c > 0, values.double() * c, 0.0)
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
