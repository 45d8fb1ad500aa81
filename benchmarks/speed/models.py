"""Models whose backward passes are timed: a shared trunk and one linear head a task."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.errors import MissingExtra

__all__ = ["MODELS", "Heads"]


class Heads(nn.Module):
    """A trunk with T heads.

    Args:
        trunk: maps a batch to features `[B, F]`.
        n_features: F.
        n_tasks: T.
        example: makes a batch.
    """

    def __init__(
        self, trunk: nn.Module, n_features: int, n_tasks: int, example: Callable[[], Tensor]
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(n_features, 10) for _ in range(n_tasks))
        self.example = example

    def features_and_losses(self, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features `[B, F]` and T scalar losses."""
        features = self.trunk(batch)
        labels = torch.arange(len(features), device=features.device) % 10
        losses = [
            nn.functional.cross_entropy(head(features), labels.roll(i))
            for i, head in enumerate(self.heads)
        ]
        return features, losses


def _mlp(n_tasks: int) -> Heads:
    """A wide perceptron, 784-2048-2048-512, batch 128."""
    trunk = nn.Sequential(
        nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 512)
    )
    return Heads(nn.Sequential(trunk, nn.ReLU()), 512, n_tasks, lambda: torch.randn(128, 784))


def _conv(n_tasks: int) -> Heads:
    """Six 3x3 convolutions with BatchNorm, up to 128 channels, on 3x32x32, batch 32."""
    layers: list[nn.Module] = []
    channels = 3
    for width, stride in ((32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Heads(trunk, 128, n_tasks, lambda: torch.randn(32, 3, 32, 32))


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(192, 4, 768, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.encoder(tokens)
        return out.mean(1)


def _transformer(n_tasks: int) -> Heads:
    """Three encoder layers of width 192, 32 tokens, batch 16."""
    return Heads(_Encoder(), 192, n_tasks, lambda: torch.randn(16, 32, 192))


def _resnet18(n_tasks: int) -> Heads:
    """torchvision's ResNet-18 without its last layer, on 3x32x32, batch 16."""
    try:
        from torchvision.models import resnet18
    except ImportError as error:
        raise MissingExtra("torchvision", "the model resnet18", "vision") from error
    trunk = resnet18()
    trunk.fc = nn.Identity()
    return Heads(trunk, 512, n_tasks, lambda: torch.randn(16, 3, 32, 32))


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, 256, num_layers=2, batch_first=True)

    def forward(self, sequences: Tensor) -> Tensor:
        out: Tensor = self.lstm(sequences)[0]
        return out.mean(1)


def _lstm(n_tasks: int) -> Heads:
    """Two LSTM layers of width 256, 24 steps, batch 16."""
    return Heads(_Recurrent(), 256, n_tasks, lambda: torch.randn(16, 24, 64))


MODELS: dict[str, Callable[[int], Heads]] = {
    "mlp": _mlp,
    "conv": _conv,
    "resnet18": _resnet18,
    "transformer": _transformer,
    "lstm": _lstm,
}
"""Name → constructor from the number of tasks."""
