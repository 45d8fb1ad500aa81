"""What the bilevel methods have in common: weights of their own, trained by Adam."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradbal.aggregators._adam import Moments, adam_step
from gradbal.aggregators._arguments import same_tasks

__all__ = ["MetaMixin", "softmax_jacobian"]


class MetaMixin:
    """For methods with meta-parameters `α [T]`, trained by Adam with `meta_lr`."""

    name: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]] = ("alpha", "moments")
    meta_lr: float
    alpha: Tensor | None = None
    moments: Moments | None = None

    def _first_alpha(self, n_tasks: int) -> float:
        """What every α_i starts from."""
        return 0.0

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Makes α, or checks that it has T entries.

        Raises:
            ValueError: T differs from before.
        """
        if self.alpha is None:
            dtype = torch.promote_types(like.dtype, torch.float32)
            first = self._first_alpha(n_tasks)
            self.alpha = torch.full((n_tasks,), first, dtype=dtype, device=like.device)
        else:
            same_tasks(self.name, len(self.alpha), n_tasks)

    def train_alpha(self, gradient: Tensor) -> None:
        """One step of Adam on α; `gradient [T]`."""
        assert self.alpha is not None
        self.alpha, self.moments = adam_step(
            self.alpha.to(gradient.device),
            gradient.to(self.alpha.dtype),
            self.moments,
            lr=self.meta_lr,
        )

    def reset(self) -> None:
        """α as at first."""
        self.alpha = self.moments = None


def softmax_jacobian(alpha: Tensor) -> Tensor:
    """`S = diag(p) − ppᵀ [T, T]`, p the softmax of `α [T]`."""
    p = alpha.softmax(0)
    return torch.diag(p) - torch.outer(p, p)
