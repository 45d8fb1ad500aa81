"""Census-Income: two binary questions about each of 299,285 people.

The data of *Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts*
(Ma et al., KDD 2018, https://doi.org/10.1145/3219819.3220007) and *Progressive Layered Extraction*
(Tang et al., RecSys 2020, https://doi.org/10.1145/3383313.3412236), in two groups of tasks:
`census` asks for an income above 50,000 dollars and for having never been married,
`census_education` for a college degree and for having never been married. What is asked for is no
feature, and neither is the instance weight, which UCI says is none. Seven numeric columns are
standardised by the mean and standard deviation of the training rows, the nominal ones are one-hot,
without embeddings.

Note:
    UCI's own training rows are trained on, and its test rows are cut in two at random, as in the
    papers, for validation and test; their halves and their networks' sizes are not known, so that
    numbers may be near theirs and are not theirs. A college degree is an associate's or higher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.architectures import Kit, Part, architectures
from benchmarks.benchmark import Benchmark, Measure, Preset, Settings, Split, Splits, Task
from benchmarks.data.census import NOMINAL, NUMERIC, Census, People, load_census
from benchmarks.measures import Auroc
from benchmarks.methods import COMMON

__all__ = ["CENSUS", "CENSUS_EDUCATION", "splits_of"]

SPLIT_SEED = 2018_0819
TRAIN_ROWS, TEST_ROWS = 199_523, 99_762
_DEGREES = ("Associates", "Bachelors", "Masters", "Prof school", "Doctorate")


def splits_of(census: Census, settings: Settings) -> Splits:
    """Random rows of UCI's training file, and of the two halves of its test file.

    Raises:
        ValueError: more rows are asked for than there are.
    """
    generator = np.random.default_rng(SPLIT_SEED)
    train = generator.permutation(len(census.train))
    test = generator.permutation(len(census.test))
    validation, test = test[: len(test) // 2], test[len(test) // 2 :]
    numeric = census.train.numeric[_first(train, settings.train_size)].astype(np.float64)
    spread = numeric.std(0)
    # A column that is the same in all training rows stays as it is.
    scale = (numeric.mean(0), np.where(spread > 0, spread, 1))
    return Splits(
        _split(census, census.train, _first(train, settings.train_size), settings.data, scale),
        _split(
            census, census.test, _first(validation, settings.validation_size), settings.data, scale
        ),
        _split(census, census.test, _first(test, settings.test_size), settings.data, scale),
    )


def _first(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    if count > len(rows):
        raise ValueError(f"sizes must be at most the {len(rows)} rows there are, found {count}")
    return rows[:count]


def _split(
    census: Census,
    people: People,
    rows: NDArray[np.int64],
    data: str,
    scale: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> Split:
    """Inputs `[N, 7 + columns]`: standardised numbers, then the codes of the nominal columns."""
    names = list(NOMINAL)
    columns = [names.index(name) for name in _features(data)]
    numeric = (people.numeric[rows] - scale[0]) / scale[1]
    inputs = np.concatenate([numeric, people.codes[rows][:, columns]], axis=1)
    degree = _among(census, people, "education", _DEGREES)
    answers = {
        "income": people.rich,
        "education": degree,
        "never_married": _among(census, people, "marital_status", ("Never married",)),
    }
    return Split(
        torch.from_numpy(inputs.astype(np.float32)),
        {
            task: torch.from_numpy(answers[task][rows].astype(np.int64))
            for task in (data, "never_married")
        },
    )


def _among(
    census: Census, people: People, column: str, starts: tuple[str, ...]
) -> NDArray[np.bool_]:
    """Whose category starts with one of these words `[N]`."""
    hits = np.array([category.startswith(starts) for category in census.categories[column]])
    return hits[people.category(column)]


def _features(data: str) -> list[str]:
    """The nominal columns that are features where these are the tasks."""
    asked = {"marital_status", "education"} if data == "education" else {"marital_status"}
    return [name for name in NOMINAL if name not in asked]


class OneHot:
    """Maps inputs as in `Split`, `[B, 7 + columns]`, to the numbers and one-hot codes `[B, width]`.

    Args:
        sizes: number of categories of each nominal column.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        starts = np.cumsum([len(NUMERIC), *sizes])
        self.starts = torch.from_numpy(starts[:-1])
        self.width = int(starts[-1])

    def __call__(self, inputs: Tensor) -> Tensor:
        """See the class."""
        numeric, codes = inputs[:, : len(NUMERIC)], inputs[:, len(NUMERIC) :].long()
        found = F.pad(numeric, (0, self.width - len(NUMERIC)))
        return found.scatter_(1, codes + self.starts, 1.0)


def _stages(inputs: int, widths: Sequence[int]) -> nn.Sequential:
    """Layers of ReLU units, each a stage."""
    sizes = [inputs, *widths]
    return nn.Sequential(
        *(
            nn.Sequential(nn.Linear(before, after), nn.ReLU())
            for before, after in zip(sizes, widths, strict=False)
        )
    )


def _heads(tasks: Sequence[str], width: int) -> dict[str, nn.Module]:
    """Towers of a hidden layer and a logit, `[B, width]` → `[B]`."""
    return {
        task: nn.Sequential(
            nn.Linear(width, _TOWER), nn.ReLU(), nn.Linear(_TOWER, 1), nn.Flatten(0)
        )
        for task in tasks
    }


_TOWER = 16


def _part(inputs: int, *widths: int) -> Part:
    return Part(
        partial(_stages, inputs, widths),
        lambda tasks: _heads(tasks, widths[-1]),
        f"layers of {' and '.join(map(str, widths))}",
    )


def _kit(data: str) -> Kit:
    encode = OneHot([NOMINAL[name][1] for name in _features(data)])
    return Kit(
        encode,
        whole=_part(encode.width, 128, 64),
        half=_part(encode.width, 64, 32),
        expert=_part(encode.width, 16, 16),
        experts=8,
        selected=2,
        gates=lambda: [(None, encode.width), (None, 16)],
    )


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, target.to(output.dtype))


_AUC = Measure("auc", higher_is_better=True, percent=False, meter=Auroc, digits=4)


def _load(settings: Settings, data_root: Path | None) -> Splits:
    return splits_of(load_census(data_root), settings)


def _note(settings: Settings) -> str:
    if settings.train_size == TRAIN_ROWS:
        return ""
    return f"{settings.train_size:,} of {TRAIN_ROWS:,} training rows"


def _presets(data: str) -> Mapping[str, Preset]:
    half = TEST_ROWS // 2
    # On validation rows 3e-3 is better than 1e-3 for experts and their gates, and much the same for
    # shared layers.
    return {
        "default": Preset(
            Settings(data, TRAIN_ROWS, half, half, epochs=5, batch_size=512, lr=3e-3),
            seeds=3,
            timing_rounds=21,
        ),
        "quick": Preset(
            Settings(data, 20_000, 5_000, 20_000, epochs=2, batch_size=512, lr=3e-3),
            seeds=1,
            timing_rounds=5,
        ),
        "full": Preset(
            Settings(data, TRAIN_ROWS, half, half, epochs=20, batch_size=512, lr=1e-3),
            seeds=10,
            timing_rounds=51,
        ),
    }


def _benchmark(name: str, data: str, summary: str) -> Benchmark:
    found = architectures(_kit(data))
    return Benchmark(
        name=name,
        summary=summary,
        architecture="hps",
        revision=1,
        tasks=tuple(Task(task, _loss, (_AUC,)) for task in (data, "never_married")),
        methods=COMMON,
        presets=_presets(data),
        load=_load,
        build=found["hps"].build,
        architectures=found,
        note=_note,
    )


CENSUS = _benchmark(
    "census", "income", "Census-Income: a high income, never married (perceptron, AUC)"
)
CENSUS_EDUCATION = _benchmark(
    "census_education", "education", "Census-Income: a college degree, never married"
)
