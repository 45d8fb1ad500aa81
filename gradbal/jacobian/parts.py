"""What stands for a layer's gradients in a Gramian: fewer numbers with the same inner products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gradbal.jacobian.layers import Convolution, Embedding, Layer, Linear, Norm, Shift
from gradbal.jacobian.products import no_autocast

__all__ = ["Part", "make_part"]

WORTHWHILE = 4e6
"""Operations that a part has to save in a step, to make up for its own calls."""

_SETUP = 4.0
"""What an operation of the factorization costs in those of the products, being in float64."""


class Part(Protocol):
    """Rows for a layer's weight, and for its bias where that is asked for.

    Attributes:
        width: of the rows.
    """

    width: int

    def rows(self, delta: Tensor) -> Tensor:
        """`[t, width]`, from the gradients `[t, ...]` of t losses at the layer's output."""
        ...


def make_part(
    layer: Layer, parameters: Sequence[Tensor], wanted: Sequence[int], n_tasks: int
) -> Part | None:
    """A part that costs less than the gradients of the layer's parameters, if there is one.

    Args:
        layer: as found in a graph.
        parameters: what the layer's indices refer to.
        wanted: which of the layer's parameters it has to stand for.
        n_tasks: T.
    """
    if isinstance(layer, Norm | Shift) or layer.weight not in wanted:
        return None
    if isinstance(layer, Linear):
        n_rows, n_in = layer.inputs.shape
        n_out = parameters[layer.weight].numel() // max(n_in, 1)
        if _pays(n_rows, n_in, n_out, n_tasks):
            return _Product(layer.inputs, n_out, layer.bias in wanted)
    elif isinstance(layer, Convolution):
        n_out, n_in = len(layer.kernel), layer.kernel[0].numel()
        if _unfolds(layer) and _pays(_n_positions(layer), n_in, n_out, n_tasks):
            return _Patches(layer, layer.bias in wanted)
    elif isinstance(layer, Embedding):
        weight = parameters[layer.weight]
        if layer.indices.numel() < len(weight):
            return _LookedUp(layer, weight.shape[1])
    return None


def _pays(n_rows: int, n_in: int, n_out: int, n_tasks: int) -> bool:
    """Whether products with a factor `[N, N]` cost less than those with the inputs `[N, in]`."""
    of_products = 2.0 * n_out * n_tasks * (n_rows + n_tasks) * (n_in - n_rows)
    of_factor = _SETUP * (2.0 * n_rows * n_rows * n_in + n_rows**3 / 3)
    return of_products - of_factor > WORTHWHILE


class _Product:
    """`y = A W + b` with inputs A `[N, in]`: `δᵀL` has the Gramian of `[δᵀA, δᵀ1]`.

    L is the Cholesky factor `[N, N]` of `A Aᵀ + 1`, without the 1 if there is no bias. Products
    with `A Aᵀ` itself would square the rounding errors of rows that are small sums of large terms.
    """

    def __init__(self, inputs: Tensor, n_out: int, has_bias: bool) -> None:
        self.width = len(inputs) * n_out
        self._device = inputs.device
        # TF32 and bfloat16 products are global settings of the user's.
        is_single = torch.get_float32_matmul_precision() == "highest"
        wide = torch.float32 if is_single and inputs.dtype != torch.float64 else torch.float64
        with no_autocast(self._device):
            self._factor = _cholesky(inputs.double(), has_bias).mT.to(wide)

    def rows(self, delta: Tensor) -> Tensor:
        with no_autocast(self._device):
            return torch.matmul(self._factor, self._matrices(delta).to(self._factor)).flatten(1)

    def _matrices(self, delta: Tensor) -> Tensor:
        """δ as `[t, N, out]`."""
        return delta


def _cholesky(a: Tensor, has_bias: bool) -> Tensor:
    n_rows, n_in = a.shape
    square = a @ a.mT
    if has_bias:
        square += 1.0
    # A matrix without full rank, as this often is, has a factor once its diagonal is raised by what
    # rounding may have taken from it; one of zeros is its own.
    diagonal = square.diagonal()
    size = diagonal.sum()
    diagonal += size * (torch.finfo(a.dtype).eps * (n_rows + n_in)) + (size == 0).to(a.dtype)
    factor: Tensor = torch.linalg.cholesky_ex(square).L
    return factor * (size != 0)


class _Patches(_Product):
    """A convolution as the product of its patches `[B · positions, C_in · kernel]` and a matrix."""

    def __init__(self, layer: Convolution, has_bias: bool) -> None:
        inputs, kernel = layer.inputs, layer.kernel.shape[2:]
        settings = [kernel, layer.dilation, layer.padding, layer.stride]
        if len(kernel) == 1:
            inputs = inputs.unsqueeze(2)
            settings = [(least, *s) for least, s in zip((1, 1, 0, 1), settings, strict=True)]
        patches = F.unfold(inputs, *settings).mT.flatten(0, 1)
        super().__init__(patches, len(layer.kernel), has_bias)

    def _matrices(self, delta: Tensor) -> Tensor:
        return delta.flatten(3).mT.flatten(1, 2)


def _unfolds(layer: Convolution) -> bool:
    return layer.groups == 1 and not layer.is_transposed and layer.kernel.dim() in (3, 4)


def _n_positions(layer: Convolution) -> int:
    """How many patches there are."""
    n = len(layer.inputs)
    sizes = layer.inputs.shape[2:], layer.kernel.shape[2:]
    for size, kernel, padding, dilation, stride in zip(
        *sizes, layer.padding, layer.dilation, layer.stride, strict=True
    ):
        n *= (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return n


class _LookedUp:
    """The rows of a table that N indices take: `[t, N · D]` in place of `[t, V · D]`."""

    def __init__(self, layer: Embedding, n_features: int) -> None:
        indices = layer.indices.flatten()
        self.width = len(indices) * n_features
        ordered = indices.sort().values
        # Equal indices have the same place. How many there are is not asked: the host would wait.
        self._place = torch.searchsorted(ordered, indices)
        self._count: Tensor | None = None
        if layer.by_freq:
            after = torch.searchsorted(ordered, indices, right=True)
            self._count = (after - self._place)[:, None]
        self._is_padding: Tensor | None = None
        if layer.padding_idx is not None:
            self._is_padding = (indices == layer.padding_idx)[:, None]

    def rows(self, delta: Tensor) -> Tensor:
        flat = delta.reshape(len(delta), len(self._place), -1)
        if flat.dtype != torch.float64:
            flat = flat.float()
        if self._count is not None:
            flat = flat / self._count
        if self._is_padding is not None:
            flat = flat.masked_fill(self._is_padding, 0.0)
        return torch.zeros_like(flat).index_add_(1, self._place, flat).flatten(1)
