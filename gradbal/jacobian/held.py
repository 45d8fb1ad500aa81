"""What is kept of a step's only backward pass: enough to combine the instances' gradients.

Where instances do not mix, `Σ_b w_b ∇ℓ_b` of a layer is the gradient of its parameters at the rows
of δ, each times its instance's weight: what a backward pass of the weighted losses would arrive at
once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradbal.jacobian.layers import Convolution, Layer
from gradbal.jacobian.owners import Owners
from gradbal.jacobian.per_instance import Gathered, Part, masked, parts, wide

__all__ = ["Held"]


@dataclass(frozen=True)
class _Delta:
    """A layer with its δ, from which its weight's gradients are found again."""

    layer: Layer
    gradient: Tensor
    owners: Owners

    def combined(self, k: int, weights: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """`Σ_b w_b g_b` of parameter k."""
        layer, d = self.layer, wide(self.gradient)
        if not isinstance(layer, Convolution):
            return self.parts(parameters)[k].combine(weights)
        scaled = d * weights.to(d.dtype)[self.owners.whose].view(-1, *(1,) * (d.dim() - 1))
        x = wide(layer.inputs)
        found: Tensor = torch.ops.aten.convolution_backward(
            scaled,
            x,
            layer.kernel.to(x.dtype),
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.is_transposed,
            layer.output_padding,
            layer.groups,
            [False, True, False],
        )[1]
        return found

    def parts(self, parameters: Sequence[Tensor]) -> dict[int, Part]:
        """The instances' own gradients."""
        return parts(self.layer, self.gradient, self.owners, parameters)


@dataclass
class Held:
    """The instances' gradients of all parameters, in the form that takes less.

    parameters: that indices refer to.
    """

    parameters: Sequence[Tensor]
    _small: dict[int, Gathered] = field(default_factory=dict)
    _large: dict[int, _Delta] = field(default_factory=dict)

    def add(
        self, layer: Layer, gradient: Tensor, owners: Owners, found: Mapping[int, Part]
    ) -> None:
        """Keeps what one layer has: δ, or what was found from it."""
        for k, part in found.items():
            if isinstance(part, Gathered) and part.rows.numel() <= 2 * gradient.numel():
                self._small[k] = part
            else:
                self._large[k] = _Delta(layer, gradient, owners)

    def parts(self) -> Iterator[dict[int, Part]]:
        """The instances' own gradients, one parameter after the other."""
        for k, part in self._small.items():
            yield {k: part}
        for k, delta in self._large.items():
            yield {k: delta.parts(self.parameters)[k]}

    def combined(
        self, weights: Mapping[int, Tensor], taken: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Parameters and their gradients of `Σ_b w_b ℓ_b`.

        Args:
            weights: `[B]` for each parameter by its index; others are left out.
            taken: `[B]`, which instances count, where not all do: others' may be NaN.
        """
        result: list[tuple[int, Tensor]] = []
        for k, part in self._small.items():
            if k in weights:
                some = part if taken is None else masked(part, taken)
                result.append((k, some.combine(weights[k])))
        for k, delta in self._large.items():
            if k not in weights:
                continue
            if taken is None:
                result.append((k, delta.combined(k, weights[k], self.parameters)))
            else:
                found = delta.parts(self.parameters)[k]
                result.append((k, masked(found, taken).combine(weights[k])))
        return [(self.parameters[k], g.to(self.parameters[k].dtype)) for k, g in result]
