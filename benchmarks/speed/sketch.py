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
from gradbal.jacobian import Loop, Root, Sketch, gramian

__all__ = ["METHODS", "MODELS", "Row", "average_errors", "measure", "worst"]

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


class _Known(Loop):
    """Rows that have been taken before."""

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
    batches = _batches(_BATCH)
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
            gradients = _Gradients(model, model.losses(*batches[0]))
            yield from _compared(name, n_steps, gradients, sizes, seeds)


def worst(rows: Sequence[Row]) -> Iterator[Row]:
    """For each k the largest of each figure; of no model."""
    for size in dict.fromkeys(row.size for row in rows):
        same = [row for row in rows if row.size == size]
        angles = {method: max(row.angles[method] for row in same) for method in METHODS}
        rms, largest = max(row.rms for row in same), max(row.largest for row in same)
        yield Row("", 0, 0, size, rms, largest, angles)


def average_errors(n_steps: int, seeds: int, size: int = 1 << 12) -> dict[str, tuple[float, float]]:
    """What is left of the errors of LeNet's cosines in their mean over the steps of a training.

    Args:
        n_steps: of Adam, at least 1.
        seeds: of the sketch, at least 1.
        size: k.

    Returns:
        What was trained on → root mean squares of the mean errors, with signs that are fresh at
        every step, and with those of the first step.
    """
    found = {}
    for size_of_batch, one, lr in ((_BATCH, False, 1e-3), (256, True, 1e-4)):
        batches = _batches(size_of_batch)
        torch.manual_seed(0)
        model = _lenet()
        adam = torch.optim.Adam(model.parameters(), lr=lr)
        totals = torch.zeros(2, seeds, math.comb(_N_TASKS, 2), dtype=torch.float64)
        for step in range(n_steps):
            losses = model.losses(*batches[0 if one else step % len(batches)])
            gradients = _Gradients(model, losses)
            for seed in range(seeds):
                for kind, signs in enumerate((step, 0)):
                    errors = gradients.errors(gradients.sketched(size, seed, signs))
                    totals[kind, seed] += errors / n_steps
            adam.zero_grad()
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            adam.step()
        fresh, fixed = totals.square().mean((1, 2)).sqrt().tolist()
        what = "one batch" if one else "a new batch at every step"
        found[f"{what}, of {size_of_batch}, lr = {lr:g}"] = (fresh, fixed)
    return found


def _batches(size: int) -> list[tuple[Tensor, Tensor]]:
    """Images `[B, 28, 28]` in 0..1 and labels `[B]`."""
    digits = load_5k()
    order = np.random.default_rng(0).permutation(len(digits))
    images = torch.from_numpy(digits.images[order]).float() / 255
    labels = torch.from_numpy(digits.labels[order])
    parts = [torch.split(t, size) for t in (images, labels)]
    return list(zip(*parts, strict=True))


class _Gradients:
    """The gradients of some losses, taken once.

    gramian: the exact one `[T, T]`. n_shared: P.
    """

    def __init__(self, model: _Digits, losses: list[Tensor]) -> None:
        self._parameters = list(model.parameters())
        shared = list(model.trunk.parameters())
        rows = [
            torch.autograd.grad(l, self._parameters, retain_graph=True, allow_unused=True)
            for l in losses
        ]
        self._engine = _Known(rows)
        self._roots: list[Root] = [(l, torch.ones(())) for l in losses]
        self.n_shared = sum(p.numel() for p in shared)
        jacobian = [torch.cat([g.reshape(-1) for g in row[: len(shared)]]) for row in rows]
        self.gramian = gramian(torch.stack(jacobian), exact=True)

    def sketched(self, size: int, seed: int, step: int = 0) -> Tensor:
        """The estimate of the Gramian."""
        engine = Sketch(size, seed, self._engine, step)
        return engine.take(self._roots, self._parameters, None, frozenset()).gramian

    def errors(self, found: Tensor) -> Tensor:
        """Of the cosines of all pairs, `[T(T − 1)/2]`."""
        rows, columns = torch.triu_indices(len(found), len(found), 1)
        return (_cosines(found) - _cosines(self.gramian))[rows, columns]


def _compared(
    name: str, n_steps: int, gradients: _Gradients, sizes: Sequence[int], seeds: int
) -> Iterator[Row]:
    exact = gradients.gramian
    for size in sizes:
        found = [gradients.sketched(size, seed) for seed in range(seeds)]
        errors = torch.stack([gradients.errors(g) for g in found])
        squares = {m: [_angle(m, exact, g) ** 2 for g in found] for m in METHODS}
        yield Row(
            name,
            gradients.n_shared,
            n_steps,
            size,
            float(errors.square().mean().sqrt()),
            float(errors.abs().max()),
            {method: math.sqrt(sum(s) / seeds) for method, s in squares.items()},
        )


def _cosines(g: Tensor) -> Tensor:
    n = g.diagonal().sqrt()
    return g / n / n[:, None]


def _angle(method: str, exact: Tensor, found: Tensor) -> float:
    """In degrees, between `Jᵀw` for the weights of two Gramians; `exact` is JJᵀ."""
    made = gradbal.create(method)
    assert isinstance(made, gradbal.GramianAggregator)
    one, other = made.weights(exact), made.weights(found)
    apart = one / _length(one, exact) - other / _length(other, exact)
    return math.degrees(2 * math.asin(min(1.0, float(_length(apart, exact)) / 2)))


def _length(weights: Tensor, g: Tensor) -> Tensor:
    return (weights @ g @ weights).clamp_min(0).sqrt()
