"""Learning to branch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradbal.aggregators._arguments import in_range
from gradbal.nn._base import MultiTaskModel
from gradbal.nn._counted_noise import gumbel
from gradbal.nn._names import module_key
from gradbal.nn._stages import Factory, run, staged_copies

__all__ = ["LearningToBranch"]


class LearningToBranch(MultiTaskModel):
    """T encoders whose stages choose their parents, so that a tree of the tasks is learned.

    "Learning to Branch for Multi-Task Learning", ICML 2020, https://arxiv.org/abs/2006.01895. Node
    j of stage l + 1 takes the output y_i of one node i of stage l, drawn by

        p_j = softmax((α_j + g) / τ),    x_j = Σ_i 1[i = arg max p_j] y_i,

    with Gumbel noise g; the gradient is that of p_j in place of the 0 and 1 (straight-through).
    Head h_t gets the output of node t of the last stage. In the first part of training each node
    takes the average of all, and α waits; then τ falls. In eval mode node j takes arg max α_j,
    without noise. Shared are α and all stages but the last; the last stage's node t and the head
    are task t's own.

    Shapes: nodes of a stage give tensors of one shape; ``logits`` is α, ``[L − 1, T, T]``.

    Args:
        tasks: names, in the order of the outputs.
        encoder: function that returns a staged encoder, an `nn.ModuleList` or `nn.Sequential` of at
            least two stages; called once for each task.
        heads: task → module h_t.
        warmup: part of training with average parents, in [0, 1); 0.01 as in LibMTL.
        tau: τ from the part of training that is done, in [0, 1]; None for 10 · 0.01^progress.
        generator: seeds the noise; None for torch's own. Only read here: `forward` has noise of its
            own, a function of the buffer ``noise``, so that a model that is loaded or copied goes
            on as the first would have.
        example: a batch; if given, the model is tried with it (in eval mode, without gradients),
            so that parts that do not fit are found at once.

    Raises:
        TypeError: `encoder` is a module and no function, or something is not of its type.
        ValueError: tasks and heads differ, fewer than two stages, something is out of its range, or
            parts do not fit.

    Note:
        Call `set_progress` at each epoch or step; until then it is the beginning, with average
        parents. For a learning rate of its own, ``model.logits`` is a group.

        The paper draws with log α of probabilities α; here α are the logarithms. With
        `forward(x, task=...)` each call is a draw of its own.

    Example:
        >>> model = LearningToBranch(
        ...     tasks=["age", "income"],
        ...     encoder=lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)),
        ...     heads={"age": nn.Linear(8, 1), "income": nn.Linear(8, 2)},
        ... )
        >>> model.set_progress(1, 10)
        >>> {task: list(y.shape) for task, y in model(torch.zeros(3, 4)).items()}
        {'age': [3, 1], 'income': [3, 2]}
        >>> model.branching()
        [[0, 0], [0, 0]]
    """

    temperature: Tensor
    noise: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        encoder: Factory,
        heads: Mapping[str, nn.Module],
        *,
        warmup: float = 0.01,
        tau: Callable[[float], float] | None = None,
        generator: torch.Generator | None = None,
        example: Any = None,
    ) -> None:
        super().__init__(tasks, heads)
        in_range("warmup", warmup, 0, 1, bounds="[)")
        self.warmup = warmup
        self.tau = _falling if tau is None else tau
        n = len(self.tasks)
        staged = staged_copies(encoder, n)
        self.depth = len(staged[0])
        if self.depth < 2:
            raise ValueError(
                "`encoder` must have at least two stages, so that there is a parent to choose, "
                f"found {self.depth}"
            )
        self.encoders = nn.ModuleDict(
            {
                module_key(task): nn.ModuleList(stages)
                for task, stages in zip(self.tasks, staged, strict=True)
            }
        )
        self.logits = nn.Parameter(torch.zeros(self.depth - 1, n, n))
        device = "cpu" if generator is None else generator.device
        seed = torch.randint(2**62, (), generator=generator, device=device)
        self.register_buffer("noise", torch.stack([seed.cpu(), torch.tensor(0)]))
        self.register_buffer("temperature", torch.tensor(self._tau(0.0)))
        self._complete(example)

    def _own(self, task: str) -> list[str]:
        return [*super()._own(task), f"encoders.{module_key(task)}.{self.depth - 1}"]

    def set_progress(self, step: int, total: int) -> None:
        """Tells how far training is, which τ and the averaging follow.

        Args:
            step: steps or epochs made, from 0 to `total`.
            total: how many there are, at least 1.

        Raises:
            TypeError: not integers.
            ValueError: out of range, or `tau` gives no positive number.
        """
        super().set_progress(step, total)
        self.temperature.fill_(self._tau(step / total))

    def _tau(self, progress: float) -> float:
        tau = float(self.tau(progress))
        in_range(f"tau({progress:g})", tau, 0, bounds="()")
        return tau

    def branching(self) -> list[list[int]]:
        """The tree as it is in eval mode.

        Returns:
            L − 1 lists; the one at l has, for each node of stage l + 1, its parent in stage l.
        """
        parents: list[list[int]] = self.logits.detach().argmax(-1).tolist()
        return parents

    def parents(self) -> Tensor:
        """The coefficients of the nodes' parents ``[L − 1, T, T]``; rows sum to one.

        In training mode they are drawn anew.
        """
        logits = self.logits
        if not self.training:
            return _one_hot(logits)
        noisy = logits + gumbel(self.noise, logits.shape, logits.dtype)
        self.noise[1].add_(1)
        p = torch.softmax(noisy / self.temperature.to(logits.dtype), -1)
        # In this order the values are 0 and 1 to the last bit.
        p = _one_hot(noisy) + (p - p.detach())
        # As tensors: a schedule in Python would wait for the device, or compile anew.
        return torch.where(self.progress < self.warmup, 1 / len(self.tasks), p)

    def _features(self, x: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
        inputs = [x] * len(self.tasks)
        for l, p in enumerate(self.parents()):
            outputs = [self._node(task, l, z) for task, z in zip(self.tasks, inputs, strict=True)]
            shapes = sorted({tuple(y.shape) for y in outputs})
            if len(shapes) > 1:
                raise ValueError(
                    f"nodes of stage {l} must give tensors of one shape, found {shapes[0]} and "
                    f"{shapes[1]}"
                )
            y = torch.stack(outputs)
            inputs = list(torch.tensordot(p.to(y.dtype), y, 1))
        return {
            task: self._node(task, self.depth - 1, inputs[self.tasks.index(task)]) for task in tasks
        }

    def _node(self, task: str, l: int, x: Any) -> Tensor:
        stages = self.encoders[module_key(task)]
        assert isinstance(stages, nn.ModuleList)
        y: Tensor = run(stages[l], x, f"stage {l} of the encoder of task {task!r}")
        return y


def _falling(progress: float) -> float:
    return 10 * math.pow(0.01, progress)


def _one_hot(logits: Tensor) -> Tensor:
    logits = logits.detach()
    return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
