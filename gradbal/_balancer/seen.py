"""The losses as the aggregator sees them, and where their backward passes start."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradbal._balancer.tensors import scaled
from gradbal._checks import check_positive
from gradbal._lazy import LazyLosses
from gradbal._losses import Losses
from gradbal.jacobian import Absent, Root, RootsInTurn

if TYPE_CHECKING:
    from gradbal._balancer.balancer import Balancer

__all__ = ["as_seen", "cotangent", "factors_of", "roots_of", "transformed"]


def transformed(balancer: Balancer, batch: Losses) -> tuple[Tensor, Tensor]:
    """The losses that the aggregator sees, and the derivative of each by the loss itself."""
    return as_seen(balancer, batch.values), factors_of(balancer, batch)


def as_seen(balancer: Balancer, losses: Tensor) -> Tensor:
    """Losses as the aggregator sees them."""
    if losses.dtype in (torch.float16, torch.bfloat16):
        losses = losses.float()
    return losses.log() if balancer.loss_transform == "log" else losses


def factors_of(balancer: Balancer, batch: Losses) -> Tensor:
    """What each loss is multiplied by, for the gradients that the aggregator sees."""
    factors = _derivative(balancer, batch.values)
    return factors if batch.factors is None else factors * batch.factors.to(factors)


def _derivative(balancer: Balancer, losses: Tensor) -> Tensor:
    """The derivative of what the aggregator sees by the losses themselves."""
    if losses.dtype in (torch.float16, torch.bfloat16):
        losses = losses.float()
    return 1.0 / losses if balancer.loss_transform == "log" else torch.ones_like(losses)


def roots_of(
    balancer: Balancer,
    batch: Losses | LazyLosses,
    scale: Tensor | None,
    parameters: Sequence[Tensor],
) -> Sequence[Root | Absent] | RootsInTurn:
    """Where the T backward passes start."""
    known = balancer.known_reach(batch, parameters)
    if isinstance(batch, Losses):
        if balancer.loss_transform is None and scale is batch.factors is None:
            return batch.roots(None, known)
        return batch.roots(scaled(factors_of(balancer, batch), scale), known)
    return batch.roots(partial(cotangent, balancer, scale=scale), known)


def cotangent(balancer: Balancer, name: str | int, loss: Tensor, scale: Tensor | None) -> Tensor:
    """What a lazy loss is multiplied by."""
    if balancer.loss_transform == "log" and loss.device.type == "cpu":
        check_positive([name], loss[None])
    return scaled(_derivative(balancer, loss), scale)
