"""What the methods with a learned logarithm for each task have in common."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from gradbal.aggregators._arguments import in_range, same_tasks

__all__ = ["LearnedMixin"]


class LearnedMixin:
    """For methods that learn `s [T]`, which joins the wrapped optimizer in a group of its own."""

    name: ClassVar[str]
    per_task_state: ClassVar[bool] = True
    state_names: ClassVar[tuple[str, ...]] = ("learned",)

    def _learn(
        self, init: float, lr: float | None, weight_decay: float, clamp: float | None
    ) -> None:
        """Keeps the hyperparameters, checked, and makes an empty s.

        Args:
            init: the first s_i, in [-10, 10].
            lr: learning rate of s; None takes the wrapped optimizer's.
            weight_decay: of s.
            clamp: s is kept in [-clamp, clamp], or None.
        """
        in_range("init", init, -10, 10)
        if lr is not None:
            in_range("lr", lr, 0)
        in_range("weight_decay", weight_decay, 0)
        if clamp is not None:
            in_range("clamp", clamp, 0, bounds="(]")
        self.init = init
        self.lr = lr
        self.weight_decay = weight_decay
        self.clamp = clamp
        # Empty until T is known; the same object all along, since the optimizer holds it.
        self.learned = Parameter(torch.empty(0))
        self._n_tasks = 0
        self._place = torch.float32, torch.device("cpu")

    def param_groups(self) -> list[dict[str, Any]]:
        """One group: s, with its own learning rate and weight decay."""
        group: dict[str, Any] = {"params": [self.learned], "weight_decay": self.weight_decay}
        if self.lr is not None:
            group["lr"] = self.lr
        return [group]

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Checks that s has T entries, if it has any yet.

        Raises:
            ValueError: it has not.
        """
        same_tasks(self.name, self.learned.numel(), n_tasks)
        # Half precision would round steps of 0.001 away.
        self._place = torch.promote_types(like.dtype, torch.float32), like.device
        self._n_tasks = n_tasks

    def clamped(self) -> Parameter:
        """s, made or brought back into its bounds. Only a step that is taken gets here."""
        s, (dtype, device) = self.learned, self._place
        if s.numel() == 0:
            first = float(self.init)
            s.data = torch.full((self._n_tasks,), first, dtype=dtype, device=device)
        elif s.device != device:
            s.data = s.data.to(device)
        if self.clamp is not None:
            s.data = s.data.clamp(-self.clamp, self.clamp)
        return s

    def reset(self) -> None:
        """s goes back to `init`."""
        with torch.no_grad():
            self.learned.fill_(self.init)
