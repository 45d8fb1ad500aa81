"""Gates: the weights with which a task mixes experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradbal.aggregators._arguments import integer
from gradbal.nn._stages import run

__all__ = ["GateInput", "SoftmaxGate", "check_gate_encoder", "linear", "vectors"]


class GateInput(nn.Module):
    """What a gate sees: vectors as they are, of feature maps the average of each channel.

    Shapes: `[B, d]` → `[B, d]`, `[B, d, H, W]` → `[B, d]`.
    """

    def forward(self, x: Any) -> Tensor:
        found = x.dim() if isinstance(x, Tensor) else None
        if found not in (2, 4):
            raise ValueError(
                "`gate_encoder` must be given for inputs that are neither [B, d] nor "
                f"[B, d, H, W], found {list(x.shape) if isinstance(x, Tensor) else type(x)}; "
                "it is a module that makes vectors [B, d] of them"
            )
        vectors: Tensor = x if found == 2 else x.mean(dim=(2, 3))
        return vectors


def check_gate_encoder(gate_encoder: Any, name: str = "gate_encoder") -> nn.Module:
    """The module, or the default for None.

    Raises:
        TypeError: no module.
    """
    if gate_encoder is None:
        return GateInput()
    if not isinstance(gate_encoder, nn.Module):
        kind = "a mapping" if isinstance(gate_encoder, Mapping) else type(gate_encoder).__name__
        raise TypeError(f"`{name}` must be a module or None, found {kind}")
    return gate_encoder


def vectors(gate_encoder: nn.Module, x: Any) -> Tensor:
    """What gates see of a batch, `[B, d]`."""
    # The default says itself what is wrong.
    default = isinstance(gate_encoder, GateInput)
    v: Tensor = gate_encoder(x) if default else run(gate_encoder, x, "the gate encoder")
    return v


def linear(d: int | None, n: int, bound: float | None = None) -> nn.Linear:
    """A linear layer to n numbers from d, or from as many as it meets first.

    Its weights and biases start uniform in ±bound, or as torch has them.

    Raises:
        TypeError, ValueError: d is no positive integer.
    """
    if d is None:
        return _LazyLinear(n, bound)
    integer("gate_input_dim", d, 1)
    made = nn.Linear(d, n)
    _draw(made, bound)
    return made


class _LazyLinear(nn.LazyLinear):
    """An `nn.LazyLinear`, and then an `nn.Linear`, with initial values of its own."""

    cls_to_become = nn.Linear

    def __init__(self, n: int, bound: float | None) -> None:
        super().__init__(n)
        self._bound = bound

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if not self.has_uninitialized_params() and self.in_features:
            _draw(self, self._bound)


def _draw(layer: nn.Linear, bound: float | None) -> None:
    if bound is not None:
        for p in layer.parameters():
            nn.init.uniform_(p, -bound, bound)


class SoftmaxGate(nn.Module):
    """`p = softmax(W v + b)`.

    Shapes: `[B, d]` → `[B, n]`.

    Args:
        d: width of the vectors v; None takes it from the first ones.
        n: number of experts.
    """

    def __init__(self, d: int | None, n: int) -> None:
        super().__init__()
        self.linear = linear(d, n)

    def forward(self, v: Tensor) -> Tensor:
        return torch.softmax(run(self.linear, v, "a gate (`gate_input_dim`)"), dim=1)
