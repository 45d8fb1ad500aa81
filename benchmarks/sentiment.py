"""Sentiment: how positive is a text, in four kinds of text, each a task with a head of its own.

The ratings of *VADER* (Hutto & Gilbert, ICWSM 2014, https://doi.org/10.1609/icwsm.v8i1.14550) for
tweets, and for sentences of Amazon reviews, movie reviews and New York Times editorials. Every text
belongs to one task: the other tasks' labels are missing, as in Office-31 and Office-Home, whose
structure this has, several domains with labels of one kind, and whose images and numbers it has
not. The domains differ in difficulty: opinions are plain in tweets and rare in editorials.

Inputs are words and pairs of words, hashed to 8,192 places, counted, and divided by the root of the
text's length. Targets are mean ratings, standardised by mean and standard deviation of the task's
training texts. Measures are the mean absolute error in points of the scale from -4 to 4, and
Pearson's correlation.

Note:
    Texts are cut at random in each domain; sentences of one Amazon review or editorial, and texts
    with the same words, are in the same part. For sentences of movie reviews the files do not say
    which review they are from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.benchmark import Benchmark, Measure, Network, Preset, Settings, Split, Splits, Task
from benchmarks.data.sentiment import BINS, DOMAINS, Texts, load_texts
from benchmarks.data.splitting import cut, share
from benchmarks.measures import Correlation, UnitError
from benchmarks.methods import COMMON
from benchmarks.models.bag import Bag
from benchmarks.models.perceptron import Perceptron

__all__ = ["SENTIMENT", "splits_of"]

SPLIT_SEED = 2014_06


class Scale(NamedTuple):
    """Mean and standard deviation of the ratings of the default settings' training texts."""

    center: float
    spread: float


SCALES = {
    "tweets": Scale(0.53967, 1.5012),
    "amazon": Scale(0.42941, 1.6341),
    "movies": Scale(-0.0042489, 1.9254),
    "editorials": Scale(-0.13375, 0.88572),
}


def splits_of(texts: Texts, settings: Settings) -> Splits:
    """Random texts, of each domain as large a part as it has of all.

    Raises:
        ValueError: more texts are asked for than there are.
    """
    domains = [np.flatnonzero(texts.domain == number) for number in range(len(DOMAINS))]
    sizes = share(settings, [len(rows) for rows in domains])
    parts: list[list[np.ndarray[tuple[int], np.dtype[np.int64]]]] = [[], [], []]
    for rows, size in zip(domains, sizes, strict=True):
        for part, index in zip(parts, cut(texts.source[rows], size, SPLIT_SEED), strict=True):
            part.append(rows[index])
    return Splits(*(_split(texts, np.concatenate(part)) for part in parts))


def _split(texts: Texts, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Split:
    targets = {}
    for number, (task, scale) in enumerate(SCALES.items()):
        rating = (texts.rating[rows] - scale.center) / scale.spread
        mine = np.where(texts.domain[rows] == number, rating, np.nan)
        targets[task] = torch.from_numpy(mine.astype(np.float32))
    return Split(torch.from_numpy(texts.bins[rows]), targets)


def _load(settings: Settings, data_root: Path | None) -> Splits:
    return splits_of(load_texts(data_root), settings)


def _build(tasks: Sequence[str]) -> Network:
    return Perceptron(tasks, Bag(BINS, 64), (64, 64))


def _task(name: str, scale: Scale) -> Task:
    error = Measure(
        "mae",
        higher_is_better=False,
        percent=False,
        meter=partial(UnitError, scale.center, scale.spread),
        digits=4,
    )
    correlation = Measure("correlation", True, False, Correlation, digits=4)
    return Task(name, F.mse_loss, (error, correlation))


# On validation texts the errors are least after two to three epochs at 1e-3, and no less at 3e-3.
_SETTINGS = Settings("vader", 18_900, 2_300, 2_300, epochs=3, batch_size=256, lr=1e-3)

SENTIMENT = Benchmark(
    name="sentiment",
    summary="Sentiment of four kinds of text, one task each (perceptron, error and correlation)",
    architecture="perceptron",
    revision=1,
    tasks=tuple(_task(*item) for item in SCALES.items()),
    methods=COMMON,
    presets={
        "default": Preset(_SETTINGS, seeds=3, timing_rounds=21),
        "quick": Preset(
            replace(_SETTINGS, train_size=4_992, batch_size=64), seeds=1, timing_rounds=5
        ),
        "full": Preset(replace(_SETTINGS, epochs=4), seeds=10, timing_rounds=51),
    },
    load=_load,
    build=_build,
)
