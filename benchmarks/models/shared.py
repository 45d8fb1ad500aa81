"""gradbal's architectures in the form that benchmarks train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.benchmark import Network
from gradbal.nn import MultiTaskModel, SparseSharing

__all__ = ["Shared"]


class Shared(Network):
    """A model of `gradbal.nn` behind a function without parameters that makes its input.

    Args:
        model: the architecture.
        encode: maps the benchmark's inputs `[B, ...]` to what the model takes.
    """

    def __init__(self, model: MultiTaskModel, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.encode = encode

    def features(self, inputs: Tensor) -> Any:
        """What enters the heads: one tensor for all, or by task."""
        return self.model.features(self.encode(inputs))

    def outputs(self, features: Any) -> dict[str, Tensor]:
        """By task, what its head makes of the features."""
        outputs: dict[str, Tensor] = self.model.from_features(features)
        return outputs

    def regularization_loss(self, inputs: Tensor, task: str) -> Tensor | None:
        """What the architecture's paper adds to the losses."""
        if type(self.model).regularization_loss is MultiTaskModel.regularization_loss:
            return None  # Most add nothing, and need no inputs made for it.
        extra = self.model.regularization_loss(self.encode(inputs), task)
        return extra if extra.requires_grad else None

    def set_progress(self, step: int, total: int) -> None:
        """Passed on to the architecture."""
        self.model.set_progress(step, total)

    def has_unused(self) -> bool:
        """Whether no task's mask has anything of some weights."""
        if not isinstance(self.model, SparseSharing):
            return False
        masks = list(self.model.masks.values())
        return any(not any(bool(of_task[name].any()) for of_task in masks) for name in masks[0])
