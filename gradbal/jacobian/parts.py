"""Layers whose gradients are worth more as factors: their part of a Gramian, and of a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gradbal.jacobian.layers import Convolution, Embedding, Layer, Linear, Norm, Shift
from gradbal.jacobian.products import no_autocast

__all__ = ["WORTHWHILE", "Part", "make_part"]

WORTHWHILE = 4e6
"""Operations that a part has to save in a step, to make up for its own calls."""

_SETUP = 4.0
"""What an operation of the factorization costs in those of the products, being in float64."""


class Part(Protocol):
    """Stands for a layer's weight, and for its bias where that is asked for.

    Attributes:
        shape: of δ, the gradient of a loss with respect to the layer's output.
    """

    shape: torch.Size

    def spanned(self, deltas: Tensor) -> Tensor:
        """Rows `[T, ·]` with the inner products of the gradients, from `[T, *shape]` and in its
        dtype."""
        ...

    def gradients(self, delta: Tensor) -> list[Tensor]:
        """The gradients of weight and bias, from `[*shape]`."""
        ...


def make_part(
    layer: Layer, parameters: Sequence[Tensor], wanted: Sequence[int], n_tasks: int
) -> Part | None:
    """What stands for a layer, if that costs less than the gradients of its parameters.

    Args:
        layer: as found in a graph.
        parameters: what the layer's indices refer to.
        wanted: those of the layer's parameters that it has to stand for.
        n_tasks: T.
    """
    if isinstance(layer, Norm | Shift) or layer.weight not in wanted:
        return None
    weight = parameters[layer.weight]
    if isinstance(layer, Linear):
        n_rows, n_in = layer.inputs.shape
        if _pays(n_rows, n_in, weight.numel() // max(n_in, 1), n_tasks):
            return _Product(layer, weight, layer.bias in wanted)
    elif isinstance(layer, Convolution):
        positions = _positions(layer)
        n_rows, n_in = len(layer.inputs) * positions.numel(), layer.kernel[0].numel()
        if _unfolds(layer) and _pays(n_rows, n_in, len(layer.kernel), n_tasks):
            return _Patches(layer, positions, layer.bias in wanted)
    elif layer.indices.numel() < len(weight):
        return _LookedUp(layer, weight)
    return None


def _pays(n_rows: int, n_in: int, n_out: int, n_tasks: int) -> bool:
    """Whether products with a factor `[N, N]` cost less than those with the inputs `[N, in]`."""
    of_products = 2.0 * n_out * n_tasks * (n_rows + n_tasks) * (n_in - n_rows)
    of_factor = _SETUP * (2.0 * n_rows * n_rows * n_in + n_rows**3 / 3)
    return of_products - of_factor > WORTHWHILE


def _spanned(inputs: Tensor, has_bias: bool, deltas: Tensor) -> Tensor:
    """`δᵀL [T, N · out]`, which has the Gramian of `[δᵀA, δᵀ1]`.

    `L Lᵀ = A Aᵀ + 1`, without the 1 if there is no bias. Products with `A Aᵀ` itself would square
    the rounding errors of gradients that are small sums of large terms.

    Args:
        inputs: A `[N, in]`.
        deltas: δ `[T, N, out]`; everything is in float64 if it is.
    """
    # TF32 and bfloat16 products are global settings of the user's.
    is_single = torch.get_float32_matmul_precision() == "highest"
    with no_autocast(deltas.device):
        factor = _cholesky(inputs.double(), has_bias)
        deltas = deltas if is_single else deltas.double()
        return torch.matmul(factor.mT.to(deltas.dtype), deltas).flatten(1)


def _cholesky(a: Tensor, has_bias: bool) -> Tensor:
    square = a @ a.mT
    if has_bias:
        square += 1.0
    # A matrix without full rank, as this often is, has a factor once its diagonal is raised by what
    # rounding may have taken from it; one of zeros is its own.
    diagonal = square.diagonal()
    size = diagonal.sum()
    diagonal += size * (torch.finfo(a.dtype).eps * sum(a.shape)) + (size == 0).to(a.dtype)
    factor: Tensor = torch.linalg.cholesky_ex(square).L
    return factor * (size != 0)


class _Product:
    """`y = A W + b` with inputs A `[N, in]`."""

    def __init__(self, layer: Linear, weight: Tensor, has_bias: bool) -> None:
        self._inputs = layer.inputs
        self._is_transposed = layer.is_transposed
        self._has_bias = has_bias
        n_rows, n_in = layer.inputs.shape
        self.shape = torch.Size([n_rows, weight.numel() // n_in])

    def spanned(self, deltas: Tensor) -> Tensor:
        """`δᵀL`."""
        return _spanned(self._inputs, self._has_bias, deltas)

    def gradients(self, delta: Tensor) -> list[Tensor]:
        """`δᵀA`, or its transpose, and `δᵀ1`."""
        a = self._inputs.to(delta.dtype)
        with no_autocast(delta.device):
            weight = delta.mT @ a if self._is_transposed else a.mT @ delta
        return [weight, delta.sum(0)] if self._has_bias else [weight]


class _Patches:
    """A convolution, as the product of its patches `[B · positions, C_in · kernel]`."""

    def __init__(self, layer: Convolution, positions: torch.Size, has_bias: bool) -> None:
        self._layer = layer
        self._has_bias = has_bias
        self.shape = torch.Size([len(layer.inputs), len(layer.kernel), *positions])

    def spanned(self, deltas: Tensor) -> Tensor:
        """`δᵀL`."""
        layer = self._layer
        inputs, kernel = layer.inputs, layer.kernel.shape[2:]
        settings = [kernel, layer.dilation, layer.padding, layer.stride]
        if len(kernel) == 1:
            inputs = inputs.unsqueeze(2)
            settings = [(least, *s) for least, s in zip((1, 1, 0, 1), settings, strict=True)]
        patches = F.unfold(inputs, *settings).mT.flatten(0, 1)
        return _spanned(patches, self._has_bias, deltas.flatten(3).mT.flatten(1, 2))

    def gradients(self, delta: Tensor) -> list[Tensor]:
        """Those of the convolution."""
        layer = self._layer
        _, weight, bias = torch.ops.aten.convolution_backward(
            delta,
            layer.inputs.to(delta.dtype),
            layer.kernel.to(delta.dtype),
            [len(layer.kernel)],
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.is_transposed,
            layer.output_padding,
            layer.groups,
            [False, True, self._has_bias],
        )
        return [weight, bias] if self._has_bias else [weight]


def _unfolds(layer: Convolution) -> bool:
    return layer.groups == 1 and not layer.is_transposed and layer.kernel.dim() in (3, 4)


def _positions(layer: Convolution) -> torch.Size:
    """How many patches there are along each dimension."""
    sizes = layer.inputs.shape[2:], layer.kernel.shape[2:]
    return torch.Size(
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, padding, dilation, stride in zip(
            *sizes, layer.padding, layer.dilation, layer.stride, strict=True
        )
    )


class _LookedUp:
    """The rows of a table that N indices take: `[T, N, D]` in place of `[T, V, D]`."""

    def __init__(self, layer: Embedding, weight: Tensor) -> None:
        self._layer = layer
        self._n_rows = len(weight)
        self._indices = layer.indices.flatten()
        self.shape = torch.Size([*layer.indices.shape, weight.shape[1]])

    def spanned(self, deltas: Tensor) -> Tensor:
        """What arrives at equal indices, added up."""
        ordered = self._indices.sort().values
        # Equal indices have the same place. How many there are is not asked: the host would wait.
        place = torch.searchsorted(ordered, self._indices)
        flat = deltas.flatten(1, -2)
        if self._layer.by_freq:
            after = torch.searchsorted(ordered, self._indices, right=True)
            flat = flat / (after - place)[:, None]
        if self._layer.padding_idx is not None:
            flat = flat.masked_fill((self._indices == self._layer.padding_idx)[:, None], 0.0)
        return torch.zeros_like(flat).index_add_(1, place, flat).flatten(1)

    def gradients(self, delta: Tensor) -> list[Tensor]:
        """That of the embedding."""
        layer = self._layer
        padding = -1 if layer.padding_idx is None else layer.padding_idx
        return [
            torch.ops.aten.embedding_dense_backward(
                delta, layer.indices, self._n_rows, padding, layer.by_freq
            )
        ]
