"""Cross-stitch networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradbal.aggregators._arguments import in_range, integer, one_of
from gradbal.nn._base import MultiTaskModel
from gradbal.nn._names import module_key
from gradbal.nn._stages import Factory, run, staged_copies

__all__ = ["CrossStitch"]


class CrossStitch(MultiTaskModel):
    """A network for each task, and units between their stages that mix what the networks found.

    Misra, Shrivastava, Gupta and Hebert, "Cross-stitch Networks for Multi-task Learning", CVPR
    2016, https://arxiv.org/abs/1604.03539. After each stage l but the last, `x̃_t = Σ_j A^l_tj x_j`;
    stage l + 1 of task t takes x̃_t. With x_t what task t's last stage gives, `y_t = h_t(x_t)`. The
    units A and all stages but the last are shared; the last stage and h_t are the task's own.
    With A = I these are separate networks, with one task there are no units.

    Shapes: outputs of a stage have one shape for all tasks, `[B, ...]`. A is `[T, T]`, per channel
    `[T, T, C]` with `[B, C, ...]` between the stages.

    Args:
        tasks: names, in the order of the outputs.
        encoder: function that returns a new staged encoder, an `nn.ModuleList` or `nn.Sequential`
            of at least two stages; called once for each task.
        heads: task → module h_t.
        per_channel: whether each channel has coefficients of its own, as in the paper.
        channels: C after each stage but the last, for `per_channel`; with an `example` they are
            found.
        init_self: initial A_tt; the paper's is 0.9.
        init_other: initial A_tj, j ≠ t; None is (1 - init_self)/(T - 1).
        example: a batch; if given, the model is tried with it.

    Raises:
        TypeError: something is not of its type, or `encoder` is a module and no function.
        ValueError: tasks and heads differ, encoders are not independent, there are less than two
            stages, no stage but the last has parameters, channels are not known, or parts do not
            fit.

    Note:
        The paper trains the units with a 100 to 1000 times larger learning rate: give
        `stitch_parameters()` a group of its own. LibMTL starts with all coefficients at 1, so that
        activations grow T-fold at each unit; here each row adds up to 1.

    Example:
        >>> import torch
        >>> model = CrossStitch(
        ...     tasks=["age", "income"],
        ...     encoder=lambda: nn.Sequential(
        ...         nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 6))
        ...     ),
        ...     heads={"age": nn.Linear(6, 1), "income": nn.Linear(6, 2)},
        ... )
        >>> {task: list(y.shape) for task, y in model(torch.zeros(5, 4)).items()}
        {'age': [5, 1], 'income': [5, 2]}
        >>> units = model.stitch_parameters()
        >>> units[0].data
        tensor([[0.9000, 0.1000],
                [0.1000, 0.9000]])
        >>> others = [p for p in model.parameters() if all(p is not unit for unit in units)]
        >>> opt = torch.optim.SGD([{"params": others}, {"params": units, "lr": 0.1}], lr=1e-3)
    """

    def __init__(
        self,
        tasks: Sequence[str],
        encoder: Factory,
        heads: Mapping[str, nn.Module],
        *,
        per_channel: bool = False,
        channels: Sequence[int] | None = None,
        init_self: float = 0.9,
        init_other: float | None = None,
        example: Any = None,
    ) -> None:
        super().__init__(tasks, heads)
        one_of("per_channel", per_channel, (False, True))
        if channels is not None and not per_channel:
            raise ValueError("`channels` must be None without per_channel, found some")
        in_range("init_self", init_self)
        n = len(self.tasks)
        if init_other is None:
            init_other = (1 - init_self) / max(n - 1, 1)
        in_range("init_other", init_other)
        made = staged_copies(encoder, n)
        if len(made[0]) < 2:
            raise ValueError(
                "`encoder` must have at least two stages, found one: the last stage is each task's "
                "own, and nothing would be shared"
            )
        self.encoders = nn.ModuleDict(
            {
                module_key(task): nn.ModuleList(stages)
                for task, stages in zip(self.tasks, made, strict=True)
            }
        )
        self.units = nn.ParameterList()
        if n > 1:
            start = torch.full((n, n), float(init_other)).fill_diagonal_(init_self)
            n_units = len(made[0]) - 1
            if not per_channel:
                self.units.extend(start.clone() for _ in range(n_units))
            else:
                for c in self._widths(channels, example, n_units):
                    self.units.append(start.unsqueeze(2).repeat(1, 1, c))
        self._complete(example)

    def _widths(self, channels: Any, example: Any, n_units: int) -> list[int]:
        """C after each stage that a unit follows."""
        if channels is not None:
            found = list(channels)
            for c in found:
                integer("channels", c, 1)
            if len(found) != n_units:
                raise ValueError(
                    f"`channels` must have a number for each of {n_units} stages before the last, "
                    f"found {len(found)}"
                )
            return found
        if example is None:
            raise ValueError(
                "`channels` or an `example` must be given with per_channel=True, found neither"
            )
        widths, x = [], example
        with self._trial():
            for l in range(n_units):
                x = self._stage(self.tasks[0], l, x)
                widths.append(x.shape[1])
        return widths

    def _stages(self, task: str) -> nn.ModuleList:
        return cast(nn.ModuleList, self.encoders[module_key(task)])

    def _stage(self, task: str, l: int, x: Any) -> Tensor:
        output: Tensor = run(self._stages(task)[l], x, f"stage {l} of task {task!r}")
        return output

    def _features(self, x: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
        streams: dict[str, Any] = dict.fromkeys(self.tasks, x)
        last = len(self._stages(self.tasks[0])) - 1
        for l in range(last):
            streams = {task: self._stage(task, l, streams[task]) for task in self.tasks}
            if len(self.units):
                asked = tasks if l == last - 1 else self.tasks
                streams = self._stitched(l, streams, asked)
        return {task: self._stage(task, last, streams[task]) for task in tasks}

    def _stitched(
        self, l: int, streams: Mapping[str, Tensor], asked: Sequence[str]
    ) -> dict[str, Tensor]:
        """`Σ_j A_tj x_j` for the tasks that are asked for."""
        unit = self.units[l]
        shapes = {task: list(x.shape) for task, x in streams.items()}
        for task, shape in shapes.items():
            if shape != shapes[self.tasks[0]]:
                raise ValueError(
                    f"stage {l} must have outputs of one shape for all tasks, found "
                    f"{shapes[self.tasks[0]]} for {self.tasks[0]!r} and {shape} for {task!r}"
                )
            if unit.dim() == 3 and (len(shape) < 2 or shape[1] != unit.shape[2]):
                raise ValueError(
                    f"stage {l} must have outputs [B, {unit.shape[2]}, ...] with per_channel=True, "
                    f"found {shape}"
                )
        if len(asked) < len(self.tasks):
            unit = torch.stack([unit[self.tasks.index(task)] for task in asked])
        x = torch.stack(list(streams.values()))
        if unit.dim() == 2:
            mixed = (unit @ x.flatten(1)).view(len(asked), *x.shape[1:])
        else:
            mixed = torch.einsum("tjc,jbc...->tbc...", unit, x)
        return dict(zip(asked, mixed.unbind(), strict=True))

    def stitch_parameters(self) -> list[nn.Parameter]:
        """The units A, one after each stage but the last; none with one task."""
        return list(self.units)

    def _own(self, task: str) -> list[str]:
        last = len(self._stages(task)) - 1
        return [*super()._own(task), f"encoders.{module_key(task)}.{last}"]
