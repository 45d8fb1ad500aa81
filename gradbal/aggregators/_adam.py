"""Adam on a method's own vector of weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Moments", "adam_step"]

Moments = dict[str, Tensor | int]


def adam_step(
    x: Tensor,
    gradient: Tensor,
    moments: Moments | None,
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Tensor, Moments]:
    """One step of Adam (Kingma and Ba, ICLR 2015, https://arxiv.org/abs/1412.6980), on any device
    and without reading from it.

    Args:
        x: `[T]`.
        gradient: `[T]`.
        moments: what the step before returned, or None at the first.
        lr, weight_decay, betas, eps: as for `torch.optim.Adam`.

    Returns:
        The new x and moments; the old ones are left as they were.
    """
    g = gradient + weight_decay * x
    if moments is None:
        moments = {"step": 0, "mean": torch.zeros_like(x), "square": torch.zeros_like(x)}
    step = int(moments["step"]) + 1
    mean = torch.as_tensor(moments["mean"]).to(g).lerp(g, 1 - betas[0])
    square = torch.as_tensor(moments["square"]).to(g).lerp(g * g, 1 - betas[1])
    size = square.sqrt() / math.sqrt(1 - betas[1] ** step) + eps
    moved = x - lr / (1 - betas[0] ** step) * mean / size
    return moved, {"step": step, "mean": mean, "square": square}
