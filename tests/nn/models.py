"""Every architecture as a small model, for the tests that all go through.

An entry of `MODELS` is a function without arguments; it returns a model of tasks "a", "b" and "c.d"
with outputs of 1, 2 and 3 numbers, from batches of `batch()`. Each architecture has one entry under
its name alone, and others for its options under names with a comma.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradbal.nn import (
    CGC,
    PLE,
    CrossStitch,
    DSelectK,
    HardParameterSharing,
    MMoE,
    MultiTaskModel,
)

TASKS = ("a", "b", "c.d")
IN, WIDTH = 4, 5


def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, WIDTH), nn.Tanh())


def staged() -> nn.Module:
    """Three stages, of equal width so that they can be compared with each other."""
    return nn.ModuleList(nn.Sequential(nn.Linear(n, WIDTH), nn.Tanh()) for n in (IN, WIDTH, WIDTH))


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, bias=False), nn.BatchNorm2d(3)),
        *(nn.Tanh(), nn.Flatten(), nn.Linear(3, WIDTH)),
    )


def staged_maps() -> nn.Module:
    """Two stages with feature maps of three channels between them."""
    return nn.Sequential(
        nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 1), nn.Tanh()),
        nn.Sequential(nn.Flatten(), nn.Linear(12, WIDTH)),
    )


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
    "CrossStitch": lambda: CrossStitch(TASKS, staged, heads()),
    "CrossStitch, per channel": lambda: CrossStitch(
        TASKS, staged, heads(), per_channel=True, channels=[WIDTH, WIDTH]
    ),
    "MMoE": lambda: MMoE(TASKS, encoder, heads(), num_experts=3, gate_input_dim=IN),
    "MMoE, batched": lambda: MMoE(
        TASKS, encoder, heads(), num_experts=3, gate_input_dim=IN, batched=True
    ),
    "MMoE, gate encoder": lambda: MMoE(
        TASKS, encoder, heads(), num_experts=2, gate_encoder=nn.Linear(IN, 3), gate_input_dim=3
    ),
    "MMoE, convolutions": lambda: MMoE(
        TASKS, convolutional, heads(), num_experts=2, gate_input_dim=IN
    ),
    "CGC": lambda: CGC(
        TASKS,
        encoder,
        heads(),
        num_shared=2,
        num_specific={"a": 1, "b": 0, "c.d": 2},
        gate_input_dim=IN,
    ),
    "PLE": lambda: PLE(
        TASKS,
        staged,
        heads(),
        num_shared=2,
        num_specific={"a": 1, "b": 0, "c.d": 2},
        gate_input_dims=[IN, WIDTH, WIDTH],
    ),
    "PLE, feature maps": lambda: PLE(
        TASKS, staged_maps, heads(), num_shared=1, num_specific=1, gate_input_dims=[IN, 3]
    ),
    "PLE, no shared stream": lambda: PLE(
        TASKS,
        staged,
        heads(),
        num_shared=1,
        num_specific=1,
        shared_stream=False,
        gate_input_dims=[IN, WIDTH, WIDTH],
    ),
    "DSelectK": lambda: DSelectK(TASKS, encoder, heads(), num_experts=4, k=2, entropy=0.1),
    "DSelectK, per example": lambda: DSelectK(
        TASKS,
        encoder,
        heads(),
        num_experts=3,
        k=2,
        per_example=True,
        gate_input_dim=IN,
        entropy=lambda progress: 1 + progress,
    ),
}


FEATURES = ("HardParameterSharing",)
"""Models of which one tensor enters all heads."""


def make(name: str, *, seed: int = 3, dtype: torch.dtype = torch.float64) -> MultiTaskModel:
    """The model, always with the same parameters."""
    torch.manual_seed(seed)
    return MODELS[name]().to(dtype)
