"""Every architecture as a small model, for the tests that all go through.

An entry of `MODELS` is a function without arguments; it returns a model of tasks "a", "b" and
"c.d" with outputs of 1, 2 and 3 numbers, from batches of `batch()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradbal.nn import HardParameterSharing, MultiTaskModel

TASKS = ("a", "b", "c.d")
IN, WIDTH = 4, 5


def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, WIDTH), nn.Tanh())


def staged() -> nn.Module:
    """Three stages, of equal width so that they can be compared with each other."""
    return nn.ModuleList(nn.Sequential(nn.Linear(n, WIDTH), nn.Tanh()) for n in (IN, WIDTH, WIDTH))


def heads(width: int = WIDTH, tasks: tuple[str, ...] = TASKS) -> dict[str, nn.Module]:
    return {task: nn.Linear(width, i + 1) for i, task in enumerate(tasks)}


def batch(n: int = 6, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, IN, generator=draw, dtype=torch.float64)


def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """At least 1, for methods that take logarithms, and conflicting."""
    outputs = model(x)
    return {
        task: (y - (-2.0) ** i).square().mean() + 1 for i, (task, y) in enumerate(outputs.items())
    }


MODELS: dict[str, Callable[[], MultiTaskModel]] = {
    "HardParameterSharing": lambda: HardParameterSharing(TASKS, encoder, heads()),
}


def make(name: str, **options: Any) -> MultiTaskModel:
    """The model in float64, always with the same parameters."""
    torch.manual_seed(3)
    return MODELS[name]().to(**{"dtype": torch.float64} | options)
