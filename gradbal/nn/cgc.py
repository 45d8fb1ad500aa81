"""Customized gate control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gradbal.nn._base import MultiTaskModel
from gradbal.nn._experts import perturbed
from gradbal.nn._extraction import ExtractionLayer, check_shared, counts, dealt
from gradbal.nn._gates import check_gate_encoder
from gradbal.nn._names import module_key
from gradbal.nn._stages import Factory, copies

__all__ = ["CGC"]


class CGC(MultiTaskModel):
    """Shared experts and experts of each task, mixed by a softmax gate for each task.

    Tang, Liu, Zhao and Gong, "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning
    (MTL) Model for Personalized Recommendations", RecSys 2020,
    https://doi.org/10.1145/3383313.3412236. `p_t(x) = softmax(W_t γ(x) + b_t)`,
    `z_t = Σ_k p_tk(x) [S(x); E_t(x)]_k`, `y_t = h_t(z_t)`, with shared experts S, the task's own
    experts E_t, and γ(x) what gates see of x. S (and γ) are shared; E_t, W_t, b_t and h_t are the
    task's own. Without task experts it is `MMoE`; it is `PLE` of one layer.

    Shapes: an expert's output is `[B, ...]`, `γ(x)` `[B, d]`, `p_t(x)` `[B, m_s + m_t]`.

    Args:
        tasks: names, in the order of the outputs.
        encoder: function that returns a new expert; called once for each.
        heads: task → module h_t.
        num_shared: m_s, the size of S, at least 1.
        num_specific: m_t, the size of E_t: one number for all tasks, or task → number; from 0 on.
        gate_encoder: module γ, whose parameters tasks share. None: x itself where it is `[B, d]`,
            as in the paper, and the average of each channel where it is `[B, d, H, W]`.
        gate_input_dim: d; None takes it from the first batch (or from `example`).
        perturb, batched: as of `MMoE`.
        example: a batch; if given, the model is tried with it.

    Raises:
        TypeError: something is not of its type, or `encoder` is a module and no function.
        ValueError: tasks and heads differ, no expert is shared, experts are not independent or
            have no parameters, a number is out of range, or parts do not fit.

    Example:
        >>> import torch
        >>> model = CGC(
        ...     tasks=["age", "income"],
        ...     encoder=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU()),
        ...     heads={"age": nn.Linear(8, 1), "income": nn.Linear(8, 2)},
        ...     num_shared=2,
        ...     num_specific={"age": 1, "income": 3},
        ...     gate_input_dim=4,
        ... )
        >>> {task: list(y.shape) for task, y in model(torch.zeros(5, 4)).items()}
        {'age': [5, 1], 'income': [5, 2]}
    """

    def __init__(
        self,
        tasks: Sequence[str],
        encoder: Factory,
        heads: Mapping[str, nn.Module],
        *,
        num_shared: int,
        num_specific: int | Mapping[str, int],
        gate_encoder: nn.Module | None = None,
        gate_input_dim: int | None = None,
        perturb: float = 0.0,
        batched: bool | None = None,
        example: Any = None,
    ) -> None:
        super().__init__(tasks, heads)
        check_shared(num_shared)
        specific = counts(num_specific, self.tasks)
        made = copies(encoder, num_shared + sum(specific.values()))
        shared, own = dealt(perturbed(made, perturb), num_shared, specific)
        self.layer = ExtractionLayer(
            shared, own, check_gate_encoder(gate_encoder), gate_input_dim, False, batched
        )
        self._complete(example)

    def _features(self, x: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
        return self.layer(x, dict.fromkeys(tasks, x), tasks)[1]  # type: ignore[no-any-return]

    def _own(self, task: str) -> list[str]:
        key = module_key(task)
        return [*super()._own(task), f"layer.task_experts.{key}", f"layer.gates.{key}"]
