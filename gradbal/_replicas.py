"""Processes with all parameters each: rows are averaged, and so are gradients."""

from __future__ import annotations

import contextlib
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from gradbal._together import Together
from gradbal.distributed import Roots, Spread
from gradbal.jacobian import cross_gramian, gramian, used_by_ddp

__all__ = ["Replicas"]

_BLOCK = 1 << 23
"""Bytes of the rows that are averaged at a time."""

_BUCKET = 25 << 20
"""Bytes of the gradients that are averaged at a time, as in DDP."""

# The later name; builds without torch.distributed have neither.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(
    dist, "reduce_scatter_tensor", None
)


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
        self._reduced = {id(p) for module in wrapped for p in module.parameters()}

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
        with contextlib.ExitStack() as stack:
            if roots is not None:
                for module in (module for ref in self._wrapped if (module := ref()) is not None):
                    expected = [p for p in module.parameters() if p.requires_grad]
                    if module.find_unused_parameters:
                        used = used_by_ddp(roots, expected)
                        expected = [p for p, yes in zip(expected, used, strict=True) if yes]
                    stack.enter_context(self._all_arriving(expected, parameters, outcome))
            yield outcome
        if all(outcome):
            self._average_grads([p for p in parameters if id(p) not in self._reduced])

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
        places = {id(p): k for k, p in enumerate(parameters)}
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
        left = [p for p in expected if id(p) not in arrived and id(p) in places]
        if left:
            # Before anything else is sent: DDP sends as soon as a bucket is full.
            torch.autograd.backward(left, [torch.zeros_like(p) for p in left])
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
