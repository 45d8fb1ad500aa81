"""Hard parameter sharing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gradbal.nn._base import MultiTaskModel
from gradbal.nn._stages import Factory, copies, run

__all__ = ["HardParameterSharing"]


class HardParameterSharing(MultiTaskModel):
    """One encoder for all tasks, and a head for each.

    Caruana, "Multitask Learning", Machine Learning 28, 1997,
    https://doi.org/10.1023/A:1007379606734. `z = E(x)`, `y_t = h_t(z)`. E is shared, h_t the
    task's own. `features(x)` is z, so that methods that work on a representation apply:
    `z = model.features(x)`, `outputs = model.from_features(z)`,
    `opt.backward(losses, features=z)`.

    Shapes: what E and the heads make of x.

    Args:
        tasks: names, in the order of the outputs.
        encoder: function that returns the encoder E; called once.
        heads: task → module h_t.
        example: a batch; if given, the model is tried with it (in eval mode, without gradients),
            so that parts that do not fit are found at once.

    Raises:
        TypeError: `encoder` is a module and no function, or something is not of its type.
        ValueError: tasks and heads differ, the encoder has no parameters, or parts do not fit.

    Note:
        With `forward(x, task=...)` and a batch for each task, BatchNorm in the encoder sees each
        task's batch by itself, and its running statistics follow all of them in turn.

    Example:
        >>> import torch
        >>> model = HardParameterSharing(
        ...     tasks=["age", "income"],
        ...     encoder=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU()),
        ...     heads={"age": nn.Linear(8, 1), "income": nn.Linear(8, 2)},
        ... )
        >>> {task: list(y.shape) for task, y in model(torch.zeros(3, 4)).items()}
        {'age': [3, 1], 'income': [3, 2]}
    """

    def __init__(
        self,
        tasks: Sequence[str],
        encoder: Factory,
        heads: Mapping[str, nn.Module],
        *,
        example: Any = None,
    ) -> None:
        super().__init__(tasks, heads)
        (self.encoder,) = copies(encoder, 1)
        self._complete(example)

    def features(self, x: Any, task: str | None = None) -> Tensor:
        """z, which enters every head.

        Raises:
            ValueError: an unknown task.
        """
        if task is not None:
            self._known(task)
        z: Tensor = run(self.encoder, x, "the encoder")
        return z
