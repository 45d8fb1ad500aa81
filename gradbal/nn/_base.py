"""What all architectures have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradbal.aggregators._arguments import integer
from gradbal.nn._names import check_heads, check_known, check_names, module_key
from gradbal.nn._stages import run

__all__ = ["MultiTaskModel"]


class MultiTaskModel(nn.Module):
    """Base class of the architectures: tasks, heads, and which parameters are whose.

    A subclass makes its modules in its constructor, ends that with `self._complete(example)`, and
    has two methods: `_features(x, tasks)`, the tensors that enter these tasks' heads, and
    `_own(task)`, where the parameters lie that this task alone depends on.

    Args:
        tasks: names, in the order of the outputs.
        heads: task → module. In `self.heads` they lie under `module_key(task)`.

    Attributes:
        tasks: the names.
        heads: the heads, in that order.
        schedule: int64 `[2]`, the last step and the total of `set_progress`; a buffer.

    Raises:
        TypeError: tasks are not strings, or heads not modules.
        ValueError: no task or one twice, a task without a head, or a head without a task.
    """

    heads: nn.ModuleDict
    schedule: Tensor

    def __init__(self, tasks: Sequence[str], heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.tasks = check_names(tasks)
        found = check_heads(heads, self.tasks)
        self.heads = nn.ModuleDict({module_key(task): head for task, head in found.items()})
        self.register_buffer("schedule", torch.zeros(2, dtype=torch.int64))

    def _features(self, x: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
        """What enters the heads of these tasks, no more computed than they need."""
        raise NotImplementedError

    def _own(self, task: str) -> list[str]:
        """Where the parameters lie that only this task depends on: names as in `named_modules`."""
        return [f"heads.{module_key(task)}"]

    def _complete(self, example: Any = None) -> None:
        """Checks what has been made: shared parameters exist, and shapes fit the example.

        Raises:
            ValueError: they do not.
        """
        if not self.shared_parameters():
            raise ValueError(
                f"{type(self).__name__} must have parameters that tasks share, found none: every "
                "one belongs to a single task"
            )
        if example is not None:
            with self._trial():
                self(example)

    @contextmanager
    def _trial(self) -> Iterator[None]:
        """What runs inside leaves no trace: eval mode, no gradients, the random state put back."""
        modes = {module: module.training for module in self.modules()}
        # What is drawn for parameters of lazy modules must not be drawn again for others.
        fork = not any(is_lazy(p) for p in self.parameters())
        devices = {p.device for p in self.parameters() if p.device.type == "cuda"}
        self.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices, enabled=fork):
                yield
        finally:
            for module, training in modes.items():
                module.training = training

    @overload
    def forward(self, x: Any, task: None = None) -> dict[str, Any]: ...

    @overload
    def forward(self, x: Any, task: str) -> Any: ...

    def forward(self, x: Any, task: str | None = None) -> Any:
        """The outputs of all tasks, in their order, or of one.

        Args:
            x: the batch, as the encoder takes it.
            task: compute this task's output only, as when each task has batches of its own.

        Raises:
            ValueError: an unknown task, or a module that does not take what it gets.
        """
        return self.from_features(self.features(x, task), task)

    @overload
    def features(self, x: Any, task: None = None) -> Tensor | dict[str, Tensor]: ...

    @overload
    def features(self, x: Any, task: str) -> Tensor: ...

    def features(self, x: Any, task: str | None = None) -> Tensor | dict[str, Tensor]:
        """What enters the heads: one tensor for each task, or for all; with `task`, that task's.

        Raises:
            ValueError: an unknown task.
        """
        if task is None:
            return self._features(x, self.tasks)
        return self._features(x, (self._known(task),))[task]

    def from_features(self, features: Any, task: str | None = None) -> Any:
        """The heads' outputs from what `features(x)` or `features(x, task)` gave.

        Raises:
            ValueError: an unknown task.
        """
        if task is not None:
            return self._head(self._known(task), features)
        if isinstance(features, Mapping):
            return {t: self._head(t, features[t]) for t in self.tasks}
        return {t: self._head(t, features) for t in self.tasks}

    def _known(self, task: str) -> str:
        """The task itself, if it is one."""
        return check_known(task, self.tasks)

    def _head(self, task: str, features: Any) -> Any:
        return run(self.heads[module_key(task)], features, f"the head of task {task!r}")

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters that more than one task's output depends on.

        With the lists of `task_parameters` for all tasks they are all parameters, each once.
        """
        return [p for p, owners in self._owners() if len(owners) != 1 or None in owners]

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """Parameters that only this task's output depends on.

        Raises:
            ValueError: an unknown task.
        """
        self._known(task)
        return [p for p, owners in self._owners() if owners == {task}]

    def _owners(self) -> list[tuple[nn.Parameter, set[str | None]]]:
        """Each parameter with the tasks in whose parts it occurs; None: in a common part."""
        places = {f"{place}.": task for task in self.tasks for place in self._own(task)}
        found: dict[nn.Parameter, set[str | None]] = {p: set() for p in self.parameters()}
        # A module that several tasks were given, or tied weights, occur at several places.
        for name, p in self.named_parameters(remove_duplicate=False):
            owners = {task for place, task in places.items() if f"{name}.".startswith(place)}
            found[p] |= owners or {None}
        return list(found.items())

    def regularization_loss(self, x: Any = None, task: str | None = None) -> Tensor:
        """What the paper adds to the losses, 0-dimensional; zero where it adds nothing.

        Args:
            x: the batch, for terms that depend on it.
            task: only this task's part, to be added to its loss; the parts add up to the whole.

        Raises:
            ValueError: an unknown task.
        """
        if task is not None:
            self._known(task)
        p = next(self.parameters())
        return torch.zeros((), dtype=p.dtype, device=p.device)

    def set_progress(self, step: int, total: int) -> None:
        """Tells how far training is, for what changes on the way.

        Args:
            step: steps or epochs made, from 0 to `total`.
            total: how many there are, at least 1.

        Raises:
            TypeError: not integers.
            ValueError: out of range.
        """
        integer("total", total, 1)
        integer("step", step)
        if step > total:
            raise ValueError(f"`step` must be at most the total of {total}, found {step}")
        self.schedule.copy_(torch.tensor([step, total]))

    @property
    def progress(self) -> Tensor:
        """The part of training that is done, 0-dimensional in [0, 1]; 0 before `set_progress`."""
        return self.schedule[0] / self.schedule[1].clamp(min=1)
