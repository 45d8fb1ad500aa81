"""Differentiable selection of k experts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradbal.aggregators._arguments import in_range, integer, one_of
from gradbal.nn._gates import check_gate_encoder, linear
from gradbal.nn._mixture import SharedExperts
from gradbal.nn._names import module_key
from gradbal.nn._stages import Factory, run

__all__ = ["DSelectK", "smooth_step"]

_SELECTED = 1e-6
"""What the paper's code adds inside the logarithm of the entropy."""

_A = 0.05
"""a starts between -_A and _A. z starts within γ/100 of 0, where S is far from constant."""


def smooth_step(t: Tensor, gamma: float = 1.0) -> Tensor:
    """The cubic S with a continuous derivative that is 0 up to -γ/2 and 1 from γ/2 on.

    `S(t) = -2 t³/γ³ + 3 t/(2γ) + 1/2` in between.

    Example:
        >>> smooth_step(torch.tensor([-1.0, 0.0, 0.25, 2.0]))
        tensor([0.0000, 0.5000, 0.8438, 1.0000])
    """
    s = (t / gamma).clamp(-0.5, 0.5)
    return (1.5 - 2 * s * s) * s + 0.5


class DSelectK(SharedExperts):
    """Experts that all tasks share, of which each task's gate learns to select at most k.

    Hazimeh, Zhao, Chowdhery, Sathiamoorthy, Chen, Mazumder, Hong and Chi, "DSelect-k:
    Differentiable Selection in the Mixture of Experts with Applications to Multi-Task Learning",
    NeurIPS 2021, https://arxiv.org/abs/2106.03760. A selector writes the number of an expert in
    b = ⌈log₂ n⌉ bits: `r_i(z) = Π_{bits j of i} S(z_j) or 1 - S(z_j)`, with S as in `smooth_step`,
    which becomes one-hot where all |z_j| ≥ γ/2. With k selectors a gate is
    `q = Σ_m softmax(a)_m r(z^m)`; `z_t = Σ_i q_ti f_i(x)`, `y_t = h_t(z_t)`. a and z are the task's
    parameters, or linear in what the gate sees of x. The experts are shared. With n = k = 1 it is
    `HardParameterSharing`.

    Shapes: `f_i(x)` is `[B, ...]`; q is `[n]`, per example `[B, n]`.

    Args:
        tasks: names, in the order of the outputs.
        encoder: function that returns a new expert; called n times.
        heads: task → module h_t.
        num_experts: n, at least 1.
        k: how many experts a task selects at most, in 1 … n.
        gamma: γ > 0, the width of the smooth step; the paper's default is 1.
        per_example: whether q depends on x.
        gate_encoder, gate_input_dim: what gates see of x, and its width, as of `MMoE`; only where
            q depends on x.
        entropy: λ ≥ 0 in `regularization_loss`, or a function that makes it of `progress`, the part
            of training that is done (a 0-dimensional tensor, see `set_progress`).
        perturb, batched: as of `MMoE`.
        example: a batch; if given, the model is tried with it.

    Raises:
        TypeError: something is not of its type, or `encoder` is a module and no function.
        ValueError: tasks and heads differ, n < k, the experts are not independent or have no
            parameters, a number is out of range, or parts do not fit.

    Note:
        Add `regularization_loss(x, task=t)` to the loss of each task t, so that its gate stays the
        task's own. It does not depend on x without `per_example`, and is zero where n is a power
        of two and λ = 0. The paper's code adds up these terms over a batch; here they are averaged,
        as losses are.

    Example:
        >>> model = DSelectK(
        ...     tasks=["age", "income"],
        ...     encoder=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU()),
        ...     heads={"age": nn.Linear(8, 1), "income": nn.Linear(8, 2)},
        ...     num_experts=4,
        ...     k=2,
        ... )
        >>> {task: list(y.shape) for task, y in model(torch.zeros(5, 4)).items()}
        {'age': [5, 1], 'income': [5, 2]}
        >>> model.gate(torch.zeros(5, 4), "age").shape
        torch.Size([4])
    """

    def __init__(
        self,
        tasks: Sequence[str],
        encoder: Factory,
        heads: Mapping[str, nn.Module],
        *,
        num_experts: int,
        k: int,
        gamma: float = 1.0,
        per_example: bool = False,
        gate_encoder: nn.Module | None = None,
        gate_input_dim: int | None = None,
        entropy: float | Callable[[Tensor], Tensor | float] = 0.0,
        perturb: float = 0.0,
        batched: bool | None = None,
        example: Any = None,
    ) -> None:
        integer("num_experts", num_experts, 1)
        integer("k", k, 1)
        if k > num_experts:
            raise ValueError(f"`k` must be at most `num_experts`, {num_experts}, found {k}")
        in_range("gamma", gamma, 0, bounds="()")
        one_of("per_example", per_example, (False, True))
        if not per_example and not (gate_encoder is None and gate_input_dim is None):
            raise ValueError(
                "`gate_encoder` and `gate_input_dim` are for per_example=True, found one with a "
                "gate that does not depend on x"
            )
        if not callable(entropy):
            in_range("entropy", entropy, 0)
        self._entropy = entropy
        super().__init__(
            tasks,
            encoder,
            heads,
            num_experts=num_experts,
            gate=lambda: (
                _PerExample(num_experts, k, gamma, gate_input_dim)
                if per_example
                else _Static(num_experts, k, gamma)
            ),
            gate_encoder=check_gate_encoder(gate_encoder) if per_example else None,
            perturb=perturb,
            batched=batched,
        )
        self._complete(example)

    def regularization_loss(self, x: Any = None, task: str | None = None) -> Tensor:
        """`λ Σ_m -Σ_i r_i log(r_i + 1e-6)`, plus `Σ_m 1/Σ_i r_i` where n is no power of two.

        The first term draws selectors to single experts, the second keeps them from numbers that
        no expert has. Averaged over the batch, summed over tasks.

        Args:
            x: the batch, for gates that depend on it.
            task: only this task's part.

        Raises:
            ValueError: an unknown task, or no batch where gates depend on it.
        """
        total = super().regularization_loss(x, task)
        n = len(self.experts)
        beyond = n & (n - 1) != 0
        if not beyond and not callable(self._entropy) and self._entropy == 0:
            return total
        if x is None and self.gate_encoder is not None:
            raise ValueError(
                "`x` must be the batch where gates depend on it (per_example=True), found None"
            )
        seen = self._seen(x)
        weight = self._entropy(self.progress) if callable(self._entropy) else self._entropy
        for name in self.tasks if task is None else [task]:
            r = cast(_Static | _PerExample, self.gates[module_key(name)]).selectors(*seen)
            found = weight * -(r * (r + _SELECTED).log()).sum(-1)
            if beyond:
                found = found + r.sum(-1).reciprocal()
            total = total + found.sum(-1).mean()
        return total


class _Gate(nn.Module):
    """k selectors of n experts, from their logits z `[..., k, b]`.

    Args:
        n, k: how many experts and selectors.
        gamma: width of the smooth step.

    Attributes:
        bits: whether bit j of number i is 1, `[n, b]`, the highest first; a buffer.
    """

    bits: Tensor

    def __init__(self, n: int, k: int, gamma: float) -> None:
        super().__init__()
        self.k, self.b, self.gamma = k, math.ceil(math.log2(n)), gamma
        places = torch.arange(self.b - 1, -1, -1)
        bits = (torch.arange(n)[:, None] >> places) & 1 == 1
        self.register_buffer("bits", bits, persistent=False)

    def _selected(self, z: Tensor) -> Tensor:
        """r, `[..., k, n]`."""
        s = smooth_step(z, self.gamma).unsqueeze(-2)
        # Not prod(), the gradient of which makes a GPU wait for the host.
        return functools.reduce(torch.mul, torch.where(self.bits, s, 1 - s).unbind(-1))


def _drawn(shape: tuple[int, ...], bound: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class _Static(_Gate):
    """A gate of free parameters: () → q `[n]`."""

    def __init__(self, n: int, k: int, gamma: float) -> None:
        super().__init__(n, k, gamma)
        # One expert needs no bits: a parameter without entries would never get a gradient.
        self.z = _drawn((k, self.b), gamma / 100) if self.b else None
        self.a = _drawn((k,), _A)

    def selectors(self) -> Tensor:
        """r, `[k, n]`."""
        return self.a.new_ones(self.k, 1) if self.z is None else self._selected(self.z)

    def forward(self) -> Tensor:
        return (torch.softmax(self.a, dim=0).unsqueeze(1) * self.selectors()).sum(0)


class _PerExample(_Gate):
    """A gate that is linear in what it sees: v `[B, d]` → q `[B, n]`."""

    def __init__(self, n: int, k: int, gamma: float, d: int | None) -> None:
        super().__init__(n, k, gamma)
        self.z = linear(d, k * self.b, gamma / 100) if self.b else None
        self.a = linear(d, k, _A)

    def selectors(self, v: Tensor) -> Tensor:
        """r, `[B, k, n]`."""
        if self.z is None:
            return v.new_ones(len(v), self.k, 1)
        z = run(self.z, v, "a gate (`gate_input_dim`)")
        return self._selected(z.unflatten(1, (self.k, self.b)))

    def forward(self, v: Tensor) -> Tensor:
        a = torch.softmax(run(self.a, v, "a gate (`gate_input_dim`)"), dim=1)
        return (a.unsqueeze(2) * self.selectors(v)).sum(1)
