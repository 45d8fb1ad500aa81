"""A layer of shared and task-specific experts, as CGC has one and PLE several."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradbal.aggregators._arguments import integer
from gradbal.nn._experts import Experts, mix
from gradbal.nn._gates import SoftmaxGate, vectors
from gradbal.nn._names import check_known, module_key

__all__ = ["ExtractionLayer", "check_shared", "counts", "dealt"]


def counts(num_specific: int | Mapping[str, int], tasks: Sequence[str]) -> dict[str, int]:
    """How many experts each task has of its own, in the order of the tasks.

    Raises:
        TypeError, ValueError: a number is negative or no integer, a task is missing or unknown.
    """
    if not isinstance(num_specific, Mapping):
        integer("num_specific", num_specific)
        return dict.fromkeys(tasks, num_specific)
    for task, number in num_specific.items():
        check_known(task, tasks, "a key of `num_specific`")
        integer("num_specific", number)
    missing = [task for task in tasks if task not in num_specific]
    if missing:
        raise ValueError(
            "`num_specific` must have a number for each task, found none for "
            f"{', '.join(map(repr, missing))}"
        )
    return {task: num_specific[task] for task in tasks}


def check_shared(num_shared: Any) -> None:
    """Checks that experts are shared.

    Raises:
        TypeError, ValueError: their number is no positive integer.
    """
    integer("num_shared", num_shared)
    if num_shared == 0:
        raise ValueError(
            "`num_shared` must be at least 1, found 0: tasks would share no parameters and be "
            "separate mixtures"
        )


def dealt(
    modules: Sequence[nn.Module], num_shared: int, num_specific: Mapping[str, int]
) -> tuple[list[nn.Module], dict[str, list[nn.Module]]]:
    """The shared experts, and task → its own, from as many modules."""
    rest = iter(modules)
    shared = list(itertools.islice(rest, num_shared))
    return shared, {t: list(itertools.islice(rest, m)) for t, m in num_specific.items()}


class ExtractionLayer(nn.Module):
    """Shared experts S, experts E_t of each task, and gates over them.

    Args:
        shared: S, at least one.
        specific: task → E_t; may be empty.
        gate_encoder: what gates see of their input.
        gate_input_dim: its width, or None.
        mixes_all: whether there is a gate over all experts, for a shared stream.
        batched: as of `Experts`.
        name: what the layer is called in errors.
    """

    def __init__(
        self,
        shared: Sequence[nn.Module],
        specific: Mapping[str, Sequence[nn.Module]],
        gate_encoder: nn.Module,
        gate_input_dim: int | None,
        mixes_all: bool,
        batched: bool | None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.shared_experts = Experts(shared, batched, f"the shared experts{name}")
        self.task_experts = nn.ModuleDict(
            {
                module_key(task): Experts(experts, batched, f"the experts of task {task!r}{name}")
                for task, experts in specific.items()
            }
        )
        self.gate_encoder = gate_encoder
        self.gates = nn.ModuleDict(
            {
                module_key(task): SoftmaxGate(gate_input_dim, len(shared) + len(experts))
                for task, experts in specific.items()
            }
        )
        total = len(shared) + sum(map(len, specific.values()))
        self.shared_gate = SoftmaxGate(gate_input_dim, total) if mixes_all else None

    def forward(
        self, shared: Any, own: Mapping[str, Any], asked: Sequence[str]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What the gates make of the experts' outputs.

        Args:
            shared: what the shared experts take; None if that is each task's own input.
            own: task → what its own experts and its gate take.
            asked: tasks whose mixtures are needed.

        Returns:
            The mixture of all experts, None without a gate for it, and the mixtures asked for.
        """
        common, seen = _Once(self.shared_experts), _Once(partial(vectors, self.gate_encoder))
        specific: dict[str, Tensor] = {}
        for task, x in own.items():
            experts = cast(Experts, self.task_experts[module_key(task)])
            if len(experts):
                specific[task] = experts(x)
        mixed = {
            task: _mixed(
                self.gates[module_key(task)](seen(own[task])),
                [
                    common(own[task] if shared is None else shared),
                    *([specific[task]] if task in specific else []),
                ],
            )
            for task in asked
        }
        if self.shared_gate is None:
            return None, mixed
        parts = [common(shared), *specific.values()]
        return _mixed(self.shared_gate(seen(shared)), parts), mixed


class _Once:
    """A function that is called once with each input, and remembers the outputs."""

    def __init__(self, function: Callable[[Any], Tensor]) -> None:
        self._function = function
        self._found: list[tuple[Any, Tensor]] = []

    def __call__(self, x: Any) -> Tensor:
        for known, output in self._found:
            if known is x:
                return output
        output = self._function(x)
        self._found.append((x, output))
        return output


def _mixed(weights: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """`mix` of the outputs of all parts, which are not copied into one tensor."""
    shapes = [list(part.shape[1:]) for part in parts]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"experts must have outputs of one shape, found {shapes}")
    split = weights.split_with_sizes([len(part) for part in parts], dim=1)
    mixtures = [mix(w, part) for w, part in zip(split, parts, strict=True)]
    return functools.reduce(torch.add, mixtures)
