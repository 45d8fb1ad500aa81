"""What an engine knows when it has no rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Found", "largest_entries"]


@dataclass(frozen=True)
class Found:
    """What an engine knows when it has no rows.

    gramian: `[T, T]`, float64, on the device; zero for tasks that sit out. extremes: `[T]`, for
    each task an entry that is not finite where a gradient of its own parameters is not. shared: the
    shared parameters.
    """

    gramian: Tensor
    extremes: Tensor
    shared: list[Tensor]


def largest_entries(gradients: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """The largest absolute entry of each task's gradients, `[T]`: not finite where one of them is
    not, and zero where there are none."""
    everything = [g for each in gradients for g in each]
    if not everything:
        return torch.zeros(len(gradients), device=device)
    norms = iter(torch._foreach_norm(everything, float("inf")))
    zero = torch.zeros((), device=device)
    width = max(map(len, gradients))
    # Filled up with zeros: one operator for all tasks.
    rows = [[next(norms).to(device, torch.float32) for _ in each] for each in gradients]
    entries = [n for row in rows for n in row + [zero] * (width - len(row))]
    return torch.stack(entries).view(len(rows), width).amax(1)
