"""Two overlapping images in one, a classification task for each: what MultiMNIST and its kin share.

The recipe of *Multi-Task Learning as Multi-Objective Optimization* (Sener & Koltun, NeurIPS 2018,
https://arxiv.org/abs/1810.04650) and *Pareto Multi-Task Learning* (Lin et al., NeurIPS 2019,
https://arxiv.org/abs/1912.12854): two images of 28x28 pixels on a canvas of 36x36, one in the top
left corner, one in the bottom right, the brighter value winning where they overlap; and the LeNet
of the second paper.

Note:
    The papers pair images anew with their own random numbers, so the images here follow the same
    recipe but are not the same images. Source images are divided into training, validation and test
    ones before any are paired: no test image is seen in training, not even beside another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from benchmarks.data.images import Images, split_by_class
from benchmarks.methods import COMMON
from benchmarks.models import lenet
from benchmarks.models.lenet import LeNet
from gradbal.nn import MTAN

__all__ = ["Parts", "compose", "divide", "divide_official", "overlay"]

CANVAS = 36
OFFSET = 8  # of the bottom right image, in both directions
SPLIT_SEED = 20180
COMPOSE_SEED = 1810_04650

Parts = tuple[Images, Images, Images]
"""Training, validation and test images."""


def compose(first: Images, second: Images, count: int, seed: int, tasks: Sequence[str]) -> Split:
    """Pair `count` times one of the `first` with one of the `second` images on a canvas.

    Every image appears equally often (up to one) at the top left, or at the bottom right; who meets
    whom is random.

    Returns:
        Images `[count, 1, 36, 36]`, uint8 in 0..255, and the classes `[count]` by task.
    """
    generator = np.random.default_rng(seed)
    left = _rounds(len(first), count, generator)
    right = _rounds(len(second), count, generator)
    images = np.zeros((count, 1, CANVAS, CANVAS), dtype=np.uint8)
    images[:, 0, :28, :28] = first.images[left]
    corner = images[:, 0, OFFSET:, OFFSET:]
    np.maximum(corner, second.images[right], out=corner)
    targets = zip(tasks, (first.labels[left], second.labels[right]), strict=True)
    return Split(torch.from_numpy(images), {task: torch.from_numpy(y) for task, y in targets})


def divide(images: Images) -> Parts:
    """Of few images 80 %, 4 % and 16 %, with the same share of each class."""
    train, validation, test = split_by_class(images.labels, (0.8, 0.04, 0.16), SPLIT_SEED)
    return images.take(train), images.take(validation), images.take(test)


def divide_official(train: Images, test: Images) -> Parts:
    """Five sixths and one sixth of the training images, and the test images as they are."""
    mine, validation = split_by_class(train.labels, (5 / 6, 1 / 6), SPLIT_SEED)
    return train.take(mine), train.take(validation), test


def _rounds(images: int, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """`count` indices below `images`: shuffled round after shuffled round."""
    rounds = [generator.permutation(images) for _ in range(-(-count // images))]
    return np.concatenate(rounds)[:count].astype(np.int64)


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


def overlay(
    name: str,
    summary: str,
    tasks: Sequence[str],
    sources: Callable[[str, Path | None], tuple[Parts, Parts]],
    presets: Mapping[str, Preset],
) -> Benchmark:
    """A benchmark of the images that are laid over each other.

    Args:
        name, summary, presets: see `Benchmark`.
        tasks: what is asked of the image at the top left, and of the one at the bottom right.
        sources: takes the settings' `data` and the folder for downloads.
    """

    def load(settings: Settings, data_root: Path | None) -> Splits:
        first, second = sources(settings.data, data_root)
        sizes = (settings.train_size, settings.validation_size, settings.test_size)
        return Splits(
            *(
                compose(one, other, size, COMPOSE_SEED + part, tasks)
                for part, (one, other, size) in enumerate(zip(first, second, sizes, strict=True))
            )
        )

    # In four epochs at 2e-3 experts and their gates are far from done. On validation digits 5e-3 is
    # better for them by points, and for hard sharing by tenths.
    faster = {
        key: replace(presets[key], settings=replace(presets[key].settings, lr=5e-3))
        for key in ("default", "quick")
    }
    return Benchmark(
        name=name,
        summary=summary,
        architecture="lenet",
        revision=1,
        tasks=tuple(Task(task, F.cross_entropy, (_ACCURACY,)) for task in tasks),
        methods=COMMON,
        presets=presets,
        load=load,
        build=LeNet,
        architectures={**architectures(_KIT), "mtan": _MTAN},
        architecture_presets=faster,
    )
