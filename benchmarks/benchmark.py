"""What a benchmark is: tasks, data, a network and the settings it is run with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

__all__ = [
    "HPS",
    "SINGLE_TASK",
    "UNITARY",
    "Architecture",
    "Benchmark",
    "Measure",
    "Network",
    "Preset",
    "Settings",
    "Split",
    "Splits",
    "Task",
]

SINGLE_TASK = "single_task"
"""The method name of the baseline: one network a task, each trained on its own."""

UNITARY = "unitary"
"""The method name of `sum(losses).backward()` without gradbal, tuned with care."""

HPS = "hps"
"""The architecture that the others are compared with: hard parameter sharing."""


class Network(nn.Module):
    """A trunk with a head for each task."""

    def features(self, inputs: Tensor) -> Any:
        """The representation that the heads start from: a tensor, or one for each task."""
        raise NotImplementedError

    def outputs(self, features: Any) -> dict[str, Tensor]:
        """By task, what its head makes of the features."""
        raise NotImplementedError

    def regularization_loss(self, inputs: Tensor, task: str) -> Tensor | None:
        """What is to be added to a task's loss of a batch, 0-dim; None for nothing."""
        return None

    def set_progress(self, step: int, total: int) -> None:
        """Tells before each training step how many have been made, for networks that change."""

    def has_unused(self) -> bool:
        """Whether there are parameters that no output depends on."""
        return False

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """By task, its output."""
        return self.outputs(self.features(inputs))


@dataclass(frozen=True)
class Measure:
    """A number that tells how well a task is done, computed by a fresh torchmetrics object.

    With `percent`, the value is a fraction in the results file and shown in percent; `digits` after
    the point are shown.
    """

    name: str
    higher_is_better: bool
    percent: bool
    meter: Callable[[], Metric]
    digits: int = 2


@dataclass(frozen=True)
class Task:
    """One task: `loss(output, target)` gives a 0-dim tensor, `measures` judge the result."""

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    measures: tuple[Measure, ...]


@dataclass(frozen=True)
class Split:
    """Inputs `[N, ...]` and, by task, targets `[N, ...]`.

    A target of floating-point numbers with a NaN is missing: it counts in no loss and no measure.
    Where each example belongs to one task alone, it has NaN for the others.
    """

    inputs: Tensor
    targets: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.inputs)

    def labelled(self, task: str) -> Tensor | None:
        """Which examples have a target `[N]`, bool; None if all do."""
        target = self.targets[task]
        if not target.is_floating_point():
            return None
        known = ~target.isnan().flatten(1).any(1) if target.dim() > 1 else ~target.isnan()
        return None if bool(known.all()) else known


@dataclass(frozen=True)
class Splits:
    """Training, validation and test data; methods are compared on `test` and tuned on none."""

    train: Split
    validation: Split
    test: Split


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers besides method and seed; results are matched by it.

    Attributes:
        data: the source of the data, a name the benchmark knows.
        train_size, validation_size, test_size: number of examples.
        epochs: passes over the training data.
        batch_size: examples a step; the last batch of an epoch may be smaller.
        lr, weight_decay: Adam's.
        dropout: share of the shared features that is left out in training, in [0, 1).
    """

    data: str
    train_size: int
    validation_size: int
    test_size: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.0
    dropout: float = 0.0


@dataclass(frozen=True)
class Preset:
    """Settings with the number of seeds, and of rounds in which the time of a step is measured."""

    settings: Settings
    seeds: int
    timing_rounds: int


@dataclass(frozen=True)
class Architecture:
    """One way to share a network between tasks.

    Attributes:
        summary: sizes, in a line for `list`.
        build: as `Benchmark.build`.
        prepare: what has to be done with a fresh network before it is trained, if anything; takes
            the network, the tasks, the data (but for the test split), the settings and the seed.
    """

    summary: str
    build: Callable[[Sequence[str]], Network]
    prepare: Callable[[Network, Sequence[Task], Splits, Settings, int], None] | None = None


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, as the runner and the reports need it.

    Attributes:
        name: what `run` takes.
        summary: one line for `list`.
        architecture: name of the network that `build` makes.
        revision: raised whenever data, network or training change, so that older results are not
            mixed with new ones.
        tasks: in the order in which their losses are passed to the methods.
        methods: what is compared unless the user says otherwise.
        presets: "default", "quick" and "full".
        load: makes the data; takes the settings and the folder for downloads.
        build: makes the network with a head for each of the named tasks; its output is a mapping
            from task to output, the same as `outputs(features(inputs))`.
        architectures: by name, what `--architectures` takes; "hps" is among them if there are any.
        architecture_presets: those of `presets` that are others when architectures are compared.
        note: what the table's heading has to say of these settings, if anything.
    """

    name: str
    summary: str
    architecture: str
    revision: int
    tasks: tuple[Task, ...]
    methods: tuple[str, ...]
    presets: Mapping[str, Preset]
    load: Callable[[Settings, Path | None], Splits]
    build: Callable[[Sequence[str]], Network]
    architectures: Mapping[str, Architecture] = field(default_factory=dict)
    architecture_presets: Mapping[str, Preset] = field(default_factory=dict)
    note: Callable[[Settings], str] = lambda settings: ""

    def of(self, architecture: str) -> Architecture:
        """The architecture of that name, which may be the benchmark's own network.

        Raises:
            KeyError: there is none.
        """
        if architecture == self.architecture:
            return Architecture(self.summary, self.build)
        return self.architectures[architecture]
