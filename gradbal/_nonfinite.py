"""NaN and inf: the error that names the tasks, and how the host learns of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

__all__ = ["HostValues", "LateCheck", "NonFiniteError", "not_finite"]


class NonFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite.

    Attributes:
        tasks: names of the tasks that it came from.
    """

    def __init__(self, what: str, tasks: Sequence[str | int]) -> None:
        self.tasks = list(tasks)
        names = ", ".join(map(repr, tasks))
        super().__init__(
            f"{what} must be finite, found NaN or inf for task {names}; parameters and state are "
            'unchanged. nonfinite="skip" leaves such steps out, nonfinite="drop" such tasks'
        )


def not_finite(values: Sequence[float]) -> list[int]:
    """Indices of the values that are NaN or infinite."""
    return [i for i, v in enumerate(values) if not abs(v) < float("inf")]


class HostValues:
    """What comes to the host once a step, in one transfer.

    Args:
        gramian: `[T, T]`, or `[K, T, T]` for K groups of columns; float64.
        losses: `[T]`, as the aggregator sees them.
        extremes: `[T]`, the largest entries of each task's other gradients; None where it has none.
        doubt: 0-dim, whether the Gramian has to be formed with more care; None for no.

    Attributes:
        gramian, losses, doubt: on the host.
        bad: indices of the tasks with anything that is not finite.
    """

    def __init__(
        self,
        gramian: Tensor,
        losses: Tensor,
        extremes: Tensor | None,
        doubt: Tensor | None = None,
    ) -> None:
        if gramian.device.type == "cpu" and losses.device.type == "cpu":
            # Nothing has to be packed, and what is looked at are a few floats.
            self.doubt = doubt is not None and bool(doubt)
            self.gramian, self.losses = gramian, losses.to(gramian.dtype)
            grams = gramian.tolist()
            each = [grams] if gramian.dim() == 2 else grams
            looked_at = [[row[i] for i, row in enumerate(g)] for g in each]
            looked_at.append(losses.tolist())
            if extremes is not None:
                looked_at.append(extremes.tolist())
            self.bad = []
            if not all(all(map(isfinite, values)) for values in looked_at):
                tasks = zip(*looked_at, strict=True)
                self.bad = [i for i, values in enumerate(tasks) if not all(map(isfinite, values))]
            return
        rows = [gramian.reshape(-1, len(losses)), losses[None]]
        rows.append(torch.zeros_like(losses)[None] if extremes is None else extremes[None])
        if doubt is not None:
            rows.insert(0, doubt.expand(1, len(losses)))
        packed = torch.cat([row.to(gramian) for row in rows]).cpu()
        self.doubt = doubt is not None and bool(packed[0, 0])
        if doubt is not None:
            packed = packed[1:]
        self.gramian, self.losses = packed[:-2].view(gramian.shape), packed[-2]
        squares = self.gramian.diagonal(dim1=-2, dim2=-1).reshape(-1, len(losses))
        checks = torch.cat([squares, packed[-2:]]).isfinite().all(0).tolist()
        self.bad = [i for i, finite in enumerate(checks) if not finite]


class LateCheck:
    """Losses on their way from an accelerator, which nobody has to wait for in `backward`.

    Args:
        values: `[T]`.
        names: of the T tasks.
    """

    def __init__(self, values: Tensor, names: Sequence[str | int]) -> None:
        self._names = names
        self._event: torch.cuda.Event | None = None
        self._host = values
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    @property
    def values(self) -> Tensor:
        """`[T]`, on the host once they were on an accelerator; waits for the copy alone."""
        if self._event is not None:
            self._event.synchronize()
        return self._host

    def bad(self) -> list[str | int]:
        """Names of the tasks whose loss is NaN or inf."""
        return [self._names[i] for i in not_finite(self.values.tolist())]

    def __getstate__(self) -> dict[str, Any]:
        # An event belongs to its process.
        return {"_names": self._names, "_event": None, "_host": self.values.clone()}
