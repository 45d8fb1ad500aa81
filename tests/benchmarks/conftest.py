"""A benchmark small enough to be run many times, registered under the name `tiny`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanSquaredError

from benchmarks.architectures import Kit, Part, architectures
from benchmarks.benchmark import Benchmark, Measure, Network, Preset, Settings, Split, Splits, Task
from benchmarks.catalog import BENCHMARKS


class TinyModel(Network):
    """Four inputs, three shared features, outputs `[B, 3]` (class) and `[B]` (size)."""

    def __init__(self, tasks):
        super().__init__()
        self.trunk = nn.Linear(4, 3)
        widths = {"class": 3, "size": 1}
        self.heads = nn.ModuleDict({task: nn.Linear(3, widths[task]) for task in tasks})

    def features(self, x):
        return torch.tanh(self.trunk(x))

    def outputs(self, z):
        return {task: head(z).squeeze(-1) for task, head in self.heads.items()}


class TinyHead(nn.Module):
    """A head of the tiny model."""

    def __init__(self, features, width):
        super().__init__()
        self.linear = nn.Linear(features, width)

    def forward(self, z):
        return self.linear(z).squeeze(-1)


def _part(width):
    widths = {"class": 3, "size": 1}
    return Part(
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(4, width), nn.Tanh()),
            nn.Sequential(nn.Linear(width, width), nn.Tanh()),
        ),
        lambda tasks: {task: TinyHead(width, widths[task]) for task in tasks},
        f"{width} wide",
    )


KIT = Kit(
    encode=lambda inputs: 2 * inputs,
    whole=_part(8),
    half=_part(4),
    expert=_part(2),
    experts=4,
    selected=2,
    gates=lambda: [(None, 4), (None, 2)],
)


def _split(count, seed):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return Split(x, {"class": x[:, :3].argmax(1), "size": x.square().sum(1)})


def _load(settings, data_root):
    sizes = (settings.train_size, settings.validation_size, settings.test_size)
    return Splits(*(_split(size, seed) for seed, size in enumerate(sizes)))


TINY = Benchmark(
    name="tiny",
    summary="a classification and a regression of four numbers",
    architecture="linear",
    revision=1,
    tasks=(
        Task(
            "class",
            F.cross_entropy,
            (Measure("accuracy", True, True, lambda: MulticlassAccuracy(3, average="micro")),),
        ),
        Task("size", F.mse_loss, (Measure("mse", False, False, MeanSquaredError),)),
    ),
    methods=("sum", "mgda"),
    presets={
        name: Preset(Settings("generated", 40, 10, 30, 2, 8, 1e-2), seeds=2, timing_rounds=2)
        for name in ("default", "quick", "full")
    },
    load=_load,
    build=TinyModel,
    architectures=architectures(KIT),
)


@pytest.fixture
def tiny(monkeypatch):
    """The tiny benchmark, known to the command line for the time of a test."""
    monkeypatch.setitem(BENCHMARKS, "tiny", TINY)
    return TINY
