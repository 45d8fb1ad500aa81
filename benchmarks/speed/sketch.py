"""How far `jacobian="sketch"` is off: cosines and directions against the exact ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradbal
from benchmarks.data.mnist import load_5k
from benchmarks.errors import MissingExtra
from gradbal.jacobian import GramianEngine, Root, Sketch, gramian

__all__ = ["METHODS", "MODELS", "Row", "measure", "worst"]

METHODS = ("upgrad", "mgda", "nash_mtl")
"""Whose directions are compared."""

_N_TASKS = 4
_BATCH = 32


@dataclass(frozen=True)
class Row:
    """One k on the gradients of one model at one time.

    n_shared: P. n_steps: Adam's steps before. rms, largest: of the errors of all cosines over all
    seeds. angles: by method, in degrees, the root mean square over the seeds of the angle between
    the direction of the sketch's weights and that of the exact ones.
    """

    model: str
    n_shared: int
    n_steps: int
    size: int
    rms: float
    largest: float
    angles: dict[str, float]


class _Digits(nn.Module):
    """Four tasks on the same digits: the digit, its parity, whether it is above 4, and its ink."""

    def __init__(self, trunk: nn.Module, n_features: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(n_features, n) for n in (10, 2, 2, 1))

    def losses(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """For images `[B, 28, 28]` in 0..1, and labels `[B]`."""
        z = self.trunk(images)
        digit, parity, above, ink = (head(z) for head in self.heads)
        return [
            F.cross_entropy(digit, labels),
            F.cross_entropy(parity, labels % 2),
            F.cross_entropy(above, (labels > 4).long()),
            F.mse_loss(ink[:, 0], 10 * images.mean((1, 2))),
        ]


def _lenet() -> _Digits:
    """LeNet-5 as Caffe has it."""
    trunk = nn.Sequential(
        nn.Unflatten(1, (1, 28)),
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
    )
    return _Digits(trunk, 500)


class _Colours(nn.Module):
    """Images `[B, 28, 28]` to `[B, 3, 64, 64]`."""

    def forward(self, images: Tensor) -> Tensor:
        large = F.interpolate(images[:, None], size=(64, 64), mode="bilinear")
        return large.expand(-1, 3, -1, -1)


def _resnet18() -> _Digits:
    """torchvision's ResNet-18, digits at 64x64."""
    try:
        from torchvision.models import resnet18
    except ImportError as error:
        raise MissingExtra("torchvision", "python -m benchmarks speed sketch") from error
    body = resnet18()
    body.fc = nn.Identity()
    return _Digits(nn.Sequential(_Colours(), body), 512)


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(28, 256)
        self.places = nn.Parameter(0.02 * torch.randn(28, 256))
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.encoder(self.embed(images) + self.places)
        return out.mean(1)


def _transformer() -> _Digits:
    """Four encoder layers of width 256, the rows of an image as tokens."""
    return _Digits(_Encoder(), 256)


MODELS: dict[str, Callable[[], _Digits]] = {
    "lenet": _lenet,
    "resnet18": _resnet18,
    "transformer": _transformer,
}
"""Name → constructor."""


class _Known:
    """Rows that have been taken before."""

    name = "known"

    def __init__(self, rows: Sequence[tuple[Tensor | None, ...]]) -> None:
        self._rows = rows

    def rows(
        self, roots: Sequence[Root], parameters: Sequence[Tensor], retain_graph: bool
    ) -> Iterator[tuple[Tensor | None, ...]]:
        yield from self._rows


def measure(
    models: Sequence[str], sizes: Sequence[int], steps: Sequence[int], seeds: int
) -> Iterator[Row]:
    """Compares sketched with exact Gramians of the same gradients, on MNIST's digits.

    Args:
        models: keys of `MODELS`.
        sizes: values of k.
        steps: after how many of Adam's steps on the sum of the losses to look, in rising order.
        seeds: of the sketch, at least 1.

    Yields:
        One row for each model, number of steps and k, as soon as it is there.

    Raises:
        BenchmarkError: the digits, or torchvision, are not installed.
    """
    digits = load_5k()
    order = np.random.default_rng(0).permutation(len(digits))
    images = torch.from_numpy(digits.images[order]).float() / 255
    labels = torch.from_numpy(digits.labels[order])
    parts = (torch.split(t, _BATCH) for t in (images, labels))
    batches = list(zip(*parts, strict=True))
    for name in models:
        torch.manual_seed(0)
        model = MODELS[name]()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        done = 0
        for n_steps in steps:
            while done < n_steps:
                adam.zero_grad()
                losses = model.losses(*batches[1 + done % (len(batches) - 1)])
                torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
                adam.step()
                done += 1
            yield from _compared(name, n_steps, model, model.losses(*batches[0]), sizes, seeds)


def worst(rows: Sequence[Row]) -> Iterator[Row]:
    """For each k the largest of each figure; of no model."""
    for size in dict.fromkeys(row.size for row in rows):
        same = [row for row in rows if row.size == size]
        angles = {method: max(row.angles[method] for row in same) for method in METHODS}
        rms, largest = max(row.rms for row in same), max(row.largest for row in same)
        yield Row("", 0, 0, size, rms, largest, angles)


def _compared(
    name: str, n_steps: int, model: _Digits, losses: list[Tensor], sizes: Sequence[int], seeds: int
) -> Iterator[Row]:
    parameters = list(model.parameters())
    shared = list(model.trunk.parameters())
    rows = [
        torch.autograd.grad(l, parameters, retain_graph=True, allow_unused=True) for l in losses
    ]
    n_shared = sum(p.numel() for p in shared)
    exact = gramian(
        torch.stack(
            [torch.cat([g.reshape(-1) for g in r[: len(shared)] if g is not None]) for r in rows]
        ),
        exact=True,
    )
    roots: list[Root] = [(l, torch.ones(())) for l in losses]
    for size in sizes:
        errors: list[float] = []
        angles = dict.fromkeys(METHODS, 0.0)
        for seed in range(seeds):
            engine: GramianEngine = Sketch(size, seed, _Known(rows))
            found = engine.take(roots, parameters, None, frozenset()).gramian
            errors += _pairs(_cosines(found) - _cosines(exact))
            for method in METHODS:
                angles[method] += _angle(method, exact, found) ** 2 / seeds
        squares = sum(e * e for e in errors)
        yield Row(
            name,
            n_shared,
            n_steps,
            size,
            math.sqrt(squares / len(errors)),
            max(map(abs, errors)),
            {method: math.sqrt(square) for method, square in angles.items()},
        )


def _cosines(g: Tensor) -> Tensor:
    n = g.diagonal().sqrt()
    return g / n / n[:, None]


def _pairs(matrix: Tensor) -> list[float]:
    rows, columns = torch.triu_indices(len(matrix), len(matrix), 1)
    found: list[float] = matrix[rows, columns].tolist()
    return found


def _angle(method: str, exact: Tensor, found: Tensor) -> float:
    """In degrees, between `Jᵀw` for the weights of two Gramians; `exact` is JJᵀ."""
    made = gradbal.create(method)
    assert isinstance(made, gradbal.GramianAggregator)
    one, other = made.weights(exact), made.weights(found)
    apart = one / _length(one, exact) - other / _length(other, exact)
    return math.degrees(2 * math.asin(min(1.0, float(_length(apart, exact)) / 2)))


def _length(weights: Tensor, g: Tensor) -> Tensor:
    return (weights @ g @ weights).clamp_min(0).sqrt()
