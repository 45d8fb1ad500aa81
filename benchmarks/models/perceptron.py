"""Layers of ReLU units with a linear head a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from benchmarks.benchmark import Network

__all__ = ["Perceptron"]


class Perceptron(Network):
    """Shared layers behind a function without parameters, and a linear unit for each task.

    Args:
        tasks: each gets a head with one output.
        encode: maps the benchmark's inputs to rows of numbers `[B, widths[0]]`.
        widths: of the inputs, then of the layers.
    """

    def __init__(
        self, tasks: Sequence[str], encode: Callable[[Tensor], Tensor], widths: Sequence[int]
    ) -> None:
        super().__init__()
        self.encode = encode
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(before, after), nn.ReLU())
                for before, after in pairwise(widths)
            )
        )
        self.heads = nn.ModuleDict({task: nn.Linear(widths[-1], 1) for task in tasks})

    def features(self, inputs: Tensor) -> Tensor:
        """Map inputs `[B, ...]` to the shared features `[B, widths[-1]]`."""
        features: Tensor = self.layers(self.encode(inputs))
        return features

    def outputs(self, features: Tensor) -> dict[str, Tensor]:
        """Map features to one number `[B]` by task."""
        return {task: head(features).squeeze(-1) for task, head in self.heads.items()}
