"""Experts that all tasks share, and a gate for each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gradbal.aggregators._arguments import integer
from gradbal.nn._base import MultiTaskModel
from gradbal.nn._experts import Experts, mix, perturbed
from gradbal.nn._gates import vectors
from gradbal.nn._names import module_key
from gradbal.nn._stages import Factory, copies

__all__ = ["SharedExperts"]


class SharedExperts(MultiTaskModel):
    """Base of MMoE and DSelect-k: `z_t = Σ_k p_tk f_k(x)`, whatever makes p.

    Args:
        tasks, encoder, heads: as of the subclasses.
        num_experts: n.
        gate: function that makes one task's gate.
        gate_encoder: what gates see of x; None where they see nothing.
        perturb, batched: as of the subclasses.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        encoder: Factory,
        heads: Mapping[str, nn.Module],
        *,
        num_experts: int,
        gate: Callable[[], nn.Module],
        gate_encoder: nn.Module | None,
        perturb: float,
        batched: bool | None,
    ) -> None:
        integer("num_experts", num_experts, 1)
        super().__init__(tasks, heads)
        experts = perturbed(copies(encoder, num_experts), perturb)
        self.experts = Experts(experts, batched, "the experts")
        self.gate_encoder = gate_encoder
        self.gates = nn.ModuleDict({module_key(task): gate() for task in self.tasks})

    def _features(self, x: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
        outputs = self.experts(x)
        seen = self._seen(x)
        return {task: mix(self.gates[module_key(task)](*seen), outputs) for task in tasks}

    def _seen(self, x: Any) -> tuple[Tensor, ...]:
        """What gates are called with."""
        return () if self.gate_encoder is None else (vectors(self.gate_encoder, x),)

    def _own(self, task: str) -> list[str]:
        return [*super()._own(task), f"gates.{module_key(task)}"]

    def gate(self, x: Any, task: str) -> Tensor:
        """The weights of the experts for a task, `[B, n]`, or `[n]` where x plays no part.

        Raises:
            ValueError: an unknown task.
        """
        found: Tensor = self.gates[module_key(self._known(task))](*self._seen(x))
        return found
