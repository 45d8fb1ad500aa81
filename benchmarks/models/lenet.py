"""The LeNet of the MultiMNIST tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.benchmark import Network

__all__ = ["LeNet", "convolutions", "heads", "read", "stages"]


class LeNet(Network):
    """LeNet for 36x36 images, shared up to 50 features, with one linear head a task.

    The network of *Multi-Task Learning as Multi-Objective Optimization* (Sener & Koltun, NeurIPS
    2018, https://arxiv.org/abs/1810.04650) as *Pareto Multi-Task Learning* (Lin et al., NeurIPS
    2019, https://arxiv.org/abs/1912.12854) sizes it: convolutions of 10 filters 9x9 and 20 filters
    5x5, each with ReLU and 2x2 max-pooling, a layer of 50 ReLU units, and heads of 10 classes.

    Args:
        tasks: the names of the tasks; each gets a head.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, kernel_size=9)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.fc = nn.Linear(20 * 5 * 5, 50)
        self.heads = nn.ModuleDict({task: nn.Linear(50, 10) for task in tasks})
        # A third faster on CPUs at these sizes, and the same numbers up to rounding.
        self.to(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """Map grey images `[B, 1, 36, 36]`, uint8 in 0..255, to the shared features `[B, 50]`."""
        x = images.float() / 255
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return F.relu(self.fc(x.flatten(1)))

    def outputs(self, features: Tensor) -> dict[str, Tensor]:
        """Map features `[B, 50]` to logits `[B, 10]` by task."""
        return {task: head(features) for task, head in self.heads.items()}


def read(images: Tensor) -> Tensor:
    """Grey images `[B, 1, 36, 36]`, uint8 in 0..255, as the stages take them."""
    return images.float() / 255


def stages(first: int, second: int, features: int) -> nn.Sequential:
    """The LeNet's trunk in three stages, with these numbers of filters and features.

    `[B, 1, 36, 36]` → `[B, first, 14, 14]` → `[B, second, 5, 5]` → `[B, features]`.
    """
    return nn.Sequential(
        *convolutions(first, second),
        nn.Sequential(nn.Flatten(), nn.Linear(second * 25, features), nn.ReLU()),
    )


def convolutions(first: int, second: int) -> nn.Sequential:
    """Its convolutional stages; the last block of each is the ReLU, so that it keeps the size."""
    return nn.Sequential(
        nn.Sequential(nn.Sequential(nn.Conv2d(1, first, 9), nn.MaxPool2d(2)), nn.ReLU()),
        nn.Sequential(nn.Sequential(nn.Conv2d(first, second, 5), nn.MaxPool2d(2)), nn.ReLU()),
    )


def heads(tasks: Sequence[str], features: int) -> dict[str, nn.Module]:
    """A linear layer to the ten digits for each task."""
    return {task: nn.Linear(features, 10) for task in tasks}
