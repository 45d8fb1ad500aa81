"""Gradients that are weighted and added up as they come."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

__all__ = ["WeightedSum"]


class WeightedSum:
    """`Σ w_i g_i` of gradients of T losses that come one after another, in the memory of one.

    What a parameter's gradient is multiplied by depends on whether it is shared, which a later loss
    may tell: until a second one reaches it, it is kept as it is.

    Args:
        parameters: n leaf tensors.
        shared_parameters: an explicit set of shared ones, or None: those that two losses reach.
        n_tasks: T; with one loss, all that it reaches is shared.
        elsewhere: indices of what further losses reach, which do not come.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        shared_parameters: Sequence[Tensor] | None,
        n_tasks: int,
        elsewhere: Collection[int] = (),
    ) -> None:
        self._parameters = parameters
        self._elsewhere = elsewhere
        self._shared = None
        if shared_parameters is not None:
            self._shared = {id(p) for p in shared_parameters}
        elif n_tasks == 1:
            self._shared = {id(p) for p in parameters}
        self._sums: dict[int, Tensor] = {}
        self._once: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, grads: Sequence[Tensor | None], weight: Tensor, head_weight: Tensor) -> None:
        """Adds one loss's gradients.

        Args:
            grads: n of them, None where it does not reach.
            weight, head_weight: 0-dim, for shared parameters and for the loss's own.
        """
        for k, g in enumerate(grads):
            if g is None:
                continue
            if self._shared is not None:
                is_shared = id(self._parameters[k]) in self._shared
                self._add(k, g, weight if is_shared else head_weight)
            elif k in self._sums or k in self._elsewhere:
                self._add(k, g, weight)
            elif k in self._once:
                first, its_weight, _ = self._once.pop(k)
                self._add(k, first, its_weight)
                self._add(k, g, weight)
            else:
                self._once[k] = g, weight, head_weight

    def _add(self, k: int, g: Tensor, weight: Tensor) -> None:
        # The product is new memory: autograd may return one tensor for two parameters.
        product = g * weight.to(g.device, g.dtype)
        self._sums[k] = self._sums[k].add_(product) if k in self._sums else product

    def deliver(self) -> None:
        """Sends the sum into `.grad` through AccumulateGrad, as an ordinary backward pass would."""
        for k, (g, _, head_weight) in self._once.items():
            self._add(k, g, head_weight)
        self._once = {}
        targets = [self._parameters[k] for k in self._sums]
        torch.autograd.backward(targets, list(self._sums.values()))
