"""Multi-gate mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from gradbal.nn._gates import SoftmaxGate, check_gate_encoder
from gradbal.nn._mixture import SharedExperts
from gradbal.nn._stages import Factory

__all__ = ["MMoE"]


class MMoE(SharedExperts):
    """Experts that all tasks share, mixed by a softmax gate for each task.

    Ma, Zhao, Yi, Chen, Hong and Chi, "Modeling Task Relationships in Multi-task Learning with
    Multi-gate Mixture-of-Experts", KDD 2018, https://doi.org/10.1145/3219819.3220007.
    `p_t(x) = softmax(W_t γ(x) + b_t)`, `z_t = Σ_k p_tk(x) f_k(x)`, `y_t = h_t(z_t)`, with experts
    f_1 … f_n and γ(x) what gates see of x. The experts (and γ) are shared; W_t, b_t and h_t are
    the task's own. With one expert it is `HardParameterSharing`.

    Shapes: `f_k(x)` is `[B, ...]`, `γ(x)` `[B, d]`, `p_t(x)` `[B, n]`.

    Args:
        tasks: names, in the order of the outputs.
        encoder: function that returns a new expert; called n times.
        heads: task → module h_t.
        num_experts: n, at least 1.
        gate_encoder: module γ, whose parameters tasks share. None: x itself where it is `[B, d]`,
            as in the paper, and the average of each channel where it is `[B, d, H, W]`.
        gate_input_dim: d; None takes it from the first batch (or from `example`).
        perturb: noise on the experts' initial parameters, in units of each parameter's root mean
            square. For pretrained encoders, which would all be equal.
        batched: whether the experts run as one, by `torch.func.vmap`: True wherever that is
            possible, False never. None: never, which took less time for nearly all experts measured
            on a CPU (`python -m benchmarks speed experts`).
        example: a batch; if given, the model is tried with it.

    Raises:
        TypeError: something is not of its type, or `encoder` is a module and no function.
        ValueError: tasks and heads differ, the experts are not independent or have no parameters,
            a number is out of range, or parts do not fit.

    Note:
        LibMTL's gates see flattened images of a fixed size: 3 · H · W weights for each expert. Here
        they see the average of each channel, or what `gate_encoder` makes.

    Example:
        >>> import torch
        >>> model = MMoE(
        ...     tasks=["age", "income"],
        ...     encoder=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU()),
        ...     heads={"age": nn.Linear(8, 1), "income": nn.Linear(8, 2)},
        ...     num_experts=3,
        ...     gate_input_dim=4,
        ... )
        >>> {task: list(y.shape) for task, y in model(torch.zeros(5, 4)).items()}
        {'age': [5, 1], 'income': [5, 2]}
        >>> model.gate(torch.zeros(5, 4), "age").shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        tasks: Sequence[str],
        encoder: Factory,
        heads: Mapping[str, nn.Module],
        *,
        num_experts: int,
        gate_encoder: nn.Module | None = None,
        gate_input_dim: int | None = None,
        perturb: float = 0.0,
        batched: bool | None = None,
        example: Any = None,
    ) -> None:
        super().__init__(
            tasks,
            encoder,
            heads,
            num_experts=num_experts,
            gate=lambda: SoftmaxGate(gate_input_dim, num_experts),
            gate_encoder=check_gate_encoder(gate_encoder),
            perturb=perturb,
            batched=batched,
        )
        self._complete(example)
