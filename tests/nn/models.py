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
    MTAN,
    PLE,
    CrossStitch,
    DSelectK,
    HardParameterSharing,
    LearningToBranch,
    MMoE,
    MultiTaskModel,
    SparseSharing,
)
from gradbal.nn.backbones import SegNet

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


def image_stages() -> nn.Module:
    """The numbers as an image of 2 × 2, and stages that end in one of 1 × 1."""
    return nn.ModuleList(
        [
            nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 1)),
            nn.Sequential(nn.Tanh(), nn.Conv2d(3, 3, 2), nn.Conv2d(3, 2, 1)),
            nn.Sequential(nn.Tanh(), nn.Conv2d(2, 2, 1)),
        ]
    )


class AsImage(nn.Module):
    """A network that takes the numbers as an image of 4 × 4."""

    def __init__(self, network: SegNet) -> None:
        super().__init__()
        self.network = network
        self.channels = network.channels

    def taps(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        return self.network.taps(nn.functional.interpolate(x.view(-1, 1, 2, 2), size=4))


def image_heads(channels: int) -> dict[str, nn.Module]:
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return {task: nn.Sequential(*pool, head) for task, head in heads(channels).items()}


def pruned() -> SparseSharing:
    """A tensor that all tasks use, entries that none does, and a tensor that only one does."""
    model = SparseSharing(TASKS, Branches, heads())
    for task, masks in model.masks.items():
        drawn = {name: torch.rand(mask.shape) < 0.6 for name, mask in masks.items()}
        if task != "b":
            drawn["right.weight"].fill_(False)
        model.set_masks(task, drawn)
    return model


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(IN, WIDTH), nn.Linear(IN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.left(x)) + torch.tanh(self.right(x))


def batch(n: int = 6, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, IN, generator=draw, dtype=torch.float64)


def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """At least 1, for methods that take logarithms, and conflicting."""
    outputs = model(x)
    return {
        task: (y - (-2.0) ** i).square().mean() + 1 for i, (task, y) in enumerate(outputs.items())
    }


BREAKS = ("SparseSharing", "SparseSharing, pruned") if torch.__version__ < "2.5" else ()
"""Models that are compiled in parts: torch 2.4 has no `functional_call` in one graph."""

DRAWS = ("LearningToBranch",)
"""Models whose outputs in training mode are random."""

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
    "MTAN": lambda: MTAN(TASKS, image_stages, image_heads(2), channels=[3, (3, 2), 2]),
    "MTAN, encoder and decoder": lambda: MTAN(
        TASKS, lambda: AsImage(SegNet((2, 3), in_channels=1)), image_heads(2)
    ),
    # In the first draw of this generator every node is a parent.
    "LearningToBranch": lambda: LearningToBranch(
        TASKS, staged, heads(), warmup=0.0, generator=torch.Generator().manual_seed(11)
    ),
    "SparseSharing": lambda: SparseSharing(TASKS, encoder, heads()),
    "SparseSharing, pruned": pruned,
}


FEATURES = ("HardParameterSharing",)
"""Models of which one tensor enters all heads."""


def make(name: str, *, seed: int = 3, dtype: torch.dtype = torch.float64) -> MultiTaskModel:
    """The model, always with the same parameters."""
    torch.manual_seed(seed)
    return MODELS[name]().to(dtype)
