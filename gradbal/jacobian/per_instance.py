"""What one layer adds to the Gramian of per-instance losses.

Rows of a layer's output gradient δ and of its input are those of one instance each. Where every
instance has one row, `⟨a_b δ_bᵀ, a_c δ_cᵀ⟩ = ⟨a_b, a_c⟩⟨δ_b, δ_c⟩`: no weight gradient is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradbal.jacobian.layers import Convolution, Embedding, Layer, Linear, Norm, Shift
from gradbal.jacobian.owners import Owners
from gradbal.jacobian.products import BLOCK, SMALL, gramian

__all__ = [
    "Gathered",
    "Outer",
    "Part",
    "Table",
    "in_float64",
    "is_half",
    "leading",
    "masked",
    "parts",
    "wide",
]

_PIECE = 1 << 21
"""Entries of weight gradients that are formed at a time: they are used while in the cache."""

_LARGE_KERNEL = 40_000
"""Entries from which on a kernel's gradients are formed from unfolded inputs: convolutions in as
many groups as there are images are then slow."""

_COLUMNS = 1 << 18
"""Entries of unfolded inputs that are formed at a time."""

_FEW_CHANNELS = 4
"""Channels up to which unfolded inputs are quicker: such groups leave vector units half empty."""

_SOME = 16
"""Rows from which on forming half of a Gramian pays."""

_MANY = 64
"""Rows from which on all blocks of columns together are slower than one after the other."""

_PAIRS = 1 << 22
"""Entries of a matrix of all pairs of rows that is formed at a time."""


@dataclass(frozen=True)
class Gathered:
    """Gradients `[B, …]` of one parameter, in its shape."""

    rows: Tensor

    def gramian(self) -> Tensor:
        """`[B, B]`, float64."""
        return _gramian(self.rows.reshape(len(self.rows), -1))

    def combine(self, weights: Tensor) -> Tensor:
        """`Σ_b w_b g_b`, in the parameter's shape; `weights [B]`."""
        found = weights.to(self.rows.dtype) @ self.rows.reshape(len(self.rows), -1)
        return found.view(self.rows.shape[1:])


@dataclass(frozen=True)
class Outer:
    """Gradients `Σ_s δ_bs a_bsᵀ` of a weight `[out, in]`, or of its transpose, and those `Σ_s δ_bs`
    of a bias.

    Attributes:
        inputs: a `[B, S, in]`.
        gradients: δ `[B, S, out]`.
        transposed: whether the weight is `[in, out]`.
        shape: the parameter's, which may have the inputs' dimension in several.
    """

    inputs: Tensor
    gradients: Tensor
    transposed: bool
    shape: torch.Size

    def gramian(self, with_bias: bool = False) -> Tensor:
        """`[B, B]`, float64."""
        a, d = self.inputs, self.gradients
        n, length, width, height = len(a), a.shape[1], a.shape[2], d.shape[2]
        if length == 1:
            pairs = _gramian(d[:, 0])
            found = _gramian(a[:, 0]) * pairs
            return found + pairs if with_bias else found
        rows = n * length
        if rows * rows * (width + height) < (rows + n * n) * width * height and rows**2 <= _PAIRS:
            pairs = gramian(a.flatten(0, 1)) * gramian(d.flatten(0, 1))
            total = pairs.view(n, length, n, length).sum((1, 3))
        else:
            first, *others = map(_gramian, self._pieces())
            total = sum(others, first)
        return total + _gramian(d.sum(1)) if with_bias else total

    def _pieces(self) -> Iterator[Tensor]:
        a, d = self.inputs, self.gradients
        step = max(1, _PIECE // (len(a) * a.shape[2]))
        for piece in torch.split(d, step, 2):
            yield torch.bmm(piece.mT, a).flatten(1)

    def combine(self, weights: Tensor) -> Tensor:
        """`Σ_b w_b g_b` of the weight, in its shape; `weights [B]`."""
        d = self.gradients * weights.to(self.gradients.dtype)[:, None, None]
        found = d.flatten(0, 1).mT @ self.inputs.flatten(0, 1)
        return (found.mT if self.transposed else found).reshape(self.shape)


@dataclass(frozen=True)
class Table:
    """Gradients of a table `[V, D]` of which instance b takes the rows `i_bs`.

    Attributes:
        indices: `[B, S]`.
        gradients: δ `[B, S, D]`.
        size: V.
    """

    indices: Tensor
    gradients: Tensor
    size: int

    def gramian(self) -> Tensor:
        """`[B, B]`, float64."""
        n, length, width = self.gradients.shape
        if self.size < length**2 and n * self.size * width <= _PAIRS:
            flat = self.gradients.new_zeros(n * self.size, width)
            offsets = torch.arange(n, device=flat.device)[:, None] * self.size
            flat.index_add_(0, (self.indices + offsets).flatten(), self.gradients.flatten(0, 1))
            return gramian(flat.view(n, -1))
        rows, indices = self.gradients.flatten(0, 1), self.indices.flatten()
        step = max(1, _PAIRS // (len(rows) * length))
        found = []
        for some, names in zip(
            torch.split(self.gradients, step), torch.split(self.indices, step), strict=True
        ):
            products = (some.flatten(0, 1) @ rows.mT).double()
            same = names.flatten()[:, None] == indices
            pairs = torch.where(same, products, 0.0)
            found.append(pairs.view(len(some), length, n, length).sum((1, 3)))
        return torch.cat(found)

    def combine(self, weights: Tensor) -> Tensor:
        """`Σ_b w_b g_b`, `[V, D]`; `weights [B]`."""
        d = self.gradients * weights.to(self.gradients.dtype)[:, None, None]
        found = d.new_zeros(self.size, d.shape[2])
        return found.index_add_(0, self.indices.flatten(), d.flatten(0, 1))


Part = Gathered | Outer | Table


def in_float64(part: Part) -> Part:
    """The part with all that is multiplied in float64."""
    if isinstance(part, Gathered):
        return Gathered(part.rows.double())
    if isinstance(part, Outer):
        return replace(part, inputs=part.inputs.double(), gradients=part.gradients.double())
    return replace(part, gradients=part.gradients.double())


def masked(part: Part, taken: Tensor) -> Part:
    """The part with zeros for the instances that are not taken; `taken [B]`."""

    def kept(tensor: Tensor) -> Tensor:
        mask = taken.to(tensor.device).view(-1, *(1,) * (tensor.dim() - 1))
        return torch.where(mask, tensor, 0.0)

    if isinstance(part, Gathered):
        return Gathered(kept(part.rows))
    if isinstance(part, Outer):
        return replace(part, inputs=kept(part.inputs), gradients=kept(part.gradients))
    return replace(part, gradients=kept(part.gradients))


def _gramian(rows: Tensor) -> Tensor:
    """`JJᵀ [B, B]`, float64. Of many rows only half of it is formed; of very many one block of
    columns after the other."""
    n, width = rows.shape
    if (
        n < _SOME
        or rows.numel() <= SMALL
        or rows.dtype != torch.float32
        or rows.device.type != "cpu"
        or torch.get_float32_matmul_precision() != "highest"
    ):
        return gramian(rows)
    half = n // 2
    found = torch.zeros(n, n, dtype=torch.float64)
    if n >= _MANY:
        for block in torch.split(rows, 2 * BLOCK, 1):
            found[:half] += block[:half] @ block.mT
            found[half:, half:] += block[half:] @ block[half:].mT
    else:
        whole = width // BLOCK * BLOCK
        for some in torch.split(rows[:, :whole], max(1, _PIECE // (n * BLOCK)) * BLOCK, 1):
            blocks = some.view(n, -1, BLOCK).transpose(0, 1)
            upper, lower = blocks[:, :half], blocks[:, half:]
            found[:half] += torch.bmm(upper, blocks.mT).sum(0, dtype=torch.float64)
            found[half:, half:] += torch.bmm(lower, lower.mT).sum(0, dtype=torch.float64)
        rest = rows[:, whole:]
        found[:half] += rest[:half] @ rest.mT
        found[half:, half:] += rest[half:] @ rest[half:].mT
    found[half:, :half] = found[:half, half:].mT
    return found


def leading(layer: Layer, gradient: Tensor) -> int:
    """How many leading dimensions of δ are rows rather than features."""
    if isinstance(layer, Embedding):
        return gradient.dim() - 1
    if isinstance(layer, Norm) and layer.dims != (1,):
        return gradient.dim() - len(layer.dims)
    if isinstance(layer, Shift) and layer.dim == -1:
        return gradient.dim() - 1
    return 1


def parts(
    layer: Layer, gradient: Tensor, owners: Owners, parameters: Sequence[Tensor]
) -> dict[int, Part]:
    """Index of a parameter → its gradients for each instance.

    Args:
        layer: with its saved input.
        gradient: δ.
        owners: of its rows.
        parameters: that the layer's indices refer to.
    """
    d = wide(gradient)
    if isinstance(layer, Linear):
        return _linear(layer, d, owners, parameters)
    if isinstance(layer, Convolution):
        return _convolution(layer, d, owners)
    if isinstance(layer, Norm):
        normalized = wide(layer.normalized())
        product = normalized.mul_(d) if normalized.dtype == d.dtype else normalized * d
        found: dict[int, Part] = {layer.weight: _sums(product, owners, layer.dims)}
        if layer.bias is not None:
            found[layer.bias] = _sums(d, owners, layer.dims)
        return found
    if isinstance(layer, Embedding):
        return {layer.weight: _table(layer, d, owners, parameters[layer.weight])}
    return {layer.bias: _sums(d, owners, (layer.dim % d.dim(),))}


def wide(tensor: Tensor) -> Tensor:
    """Half precision as float32."""
    return tensor.float() if is_half(tensor) else tensor


def is_half(tensor: Tensor) -> bool:
    """Whether a tensor is in half precision."""
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _sums(tensor: Tensor, owners: Owners, dims: tuple[int, ...]) -> Gathered:
    """The sums over all of an instance's rows, and all dimensions but `dims`."""
    if dims == (1,) and tensor.dim() > 2:
        tensor = tensor.flatten(2).sum(2)
    kept = [tensor.shape[k] for k in dims]
    last = tuple(range(tensor.dim() - len(dims), tensor.dim()))
    rows = tensor if dims == last else tensor.movedim(dims, last)
    # The rows' own dimension is before those, so it is still where it was.
    apart = owners.apart(rows)
    return Gathered(_added(apart.reshape(owners.n, -1, math.prod(kept))).reshape(owners.n, *kept))


def _added(rows: Tensor) -> Tensor:
    """The sum of each instance's rows `[B, S, …]`."""
    return rows[:, 0] if rows.shape[1] == 1 else rows.sum(1)


def _linear(
    layer: Linear, d: Tensor, owners: Owners, parameters: Sequence[Tensor]
) -> dict[int, Part]:
    inputs = wide(layer.inputs).reshape(len(d), -1)
    position = 2 if layer.node.name() == "AddmmBackward0" else 1
    source = layer.node.next_functions[position][0]
    turned = source is not None and source.name() == "TBackward0"
    shape = parameters[layer.weight].shape
    found: dict[int, Part] = {
        layer.weight: Outer(owners.apart(inputs), owners.apart(d), not turned, shape)
    }
    if layer.bias is not None:
        found[layer.bias] = _sums(d, owners, (1,))
    return found


def _convolution(layer: Convolution, d: Tensor, owners: Owners) -> dict[int, Part]:
    found: dict[int, Part] = {}
    if layer.bias is not None:
        found[layer.bias] = _sums(d, owners, (1,))
    x, kernel = wide(layer.inputs), layer.kernel
    unfolds = kernel.shape[2:].numel() == 1 or kernel.numel() > _LARGE_KERNEL
    unfolds = unfolds or kernel.shape[1] <= _FEW_CHANNELS
    unfolds = unfolds and layer.groups == 1 and not layer.is_transposed
    if unfolds and len(x) * kernel.numel() > _PIECE:
        columns, n = _unfolded(layer, x), owners.n
        a = owners.apart(columns).movedim(-1, -2).reshape(n, -1, columns.shape[1])
        apart = owners.apart(d.flatten(2)).movedim(-1, -2).reshape(n, -1, d.shape[1])
        found[layer.weight] = Outer(a, apart, False, kernel.shape)
    else:
        of_images = (_kernels_unfolded if unfolds else _kernels)(layer, x, d)
        found[layer.weight] = Gathered(_added(owners.apart(of_images)))
    return found


def _unfolded(layer: Convolution, x: Tensor) -> Tensor:
    """The inputs of each output position, `[N, C·|kernel|, L]`."""
    size = layer.kernel.shape[2:]
    if any(layer.padding):
        x = torch.nn.functional.pad(x, [p for p in reversed(layer.padding) for _ in range(2)])
    n_dims = len(size)
    for k in range(n_dims):
        span = (size[k] - 1) * layer.dilation[k] + 1
        x = x.unfold(2 + k, span, layer.stride[k])[..., :: layer.dilation[k]]
    positions = x.shape[2 : 2 + n_dims].numel()
    order = [0, 1, *range(2 + n_dims, 2 + 2 * n_dims), *range(2, 2 + n_dims)]
    return x.permute(order).reshape(len(x), -1, positions)


def _kernels(layer: Convolution, x: Tensor, d: Tensor) -> Tensor:
    """The gradient of the kernel from each image alone, `[N, *kernel]`: one convolution whose
    groups are the images."""
    n, kernel = len(x), layer.kernel
    # Its shape is all that counts for its gradient.
    grouped = x.new_empty(n * kernel.shape[0], *kernel.shape[1:])
    found: Tensor = torch.ops.aten.convolution_backward(
        d.reshape(1, -1, *d.shape[2:]),
        x.reshape(1, -1, *x.shape[2:]),
        grouped,
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.is_transposed,
        layer.output_padding,
        n * layer.groups,
        [False, True, False],
    )[1]
    return found.view(n, *kernel.shape)


def _kernels_unfolded(layer: Convolution, x: Tensor, d: Tensor) -> Tensor:
    """The same from unfolded inputs, of a few images at a time."""
    kernel = layer.kernel
    each = kernel[0].numel() * d.shape[2:].numel()
    found = []
    for images, gradients in zip(
        *(torch.split(t, max(1, _COLUMNS // each)) for t in (x, d)), strict=True
    ):
        columns, flat = _unfolded(layer, images), gradients.flatten(2)
        # The wider of the two first is quicker.
        if columns.shape[1] > flat.shape[1]:
            found.append(torch.bmm(columns, flat.mT).mT)
        else:
            found.append(torch.bmm(flat, columns.mT))
    return torch.cat(found).reshape(-1, *kernel.shape)


def _table(layer: Embedding, d: Tensor, owners: Owners, parameter: Tensor) -> Table:
    indices = layer.indices
    if layer.by_freq:
        counts = d.new_zeros(len(parameter))
        counts.index_add_(0, indices.flatten(), d.new_ones(indices.numel()))
        d = d / counts[indices][..., None]
    if layer.padding_idx is not None:
        d = torch.where((indices == layer.padding_idx)[..., None], 0.0, d)
    n, width = owners.n, d.shape[-1]
    taken = owners.apart(indices).reshape(n, -1)
    # What an index is filled up with has no gradient.
    taken = taken.clamp(max=len(parameter) - 1)
    return Table(taken, owners.apart(d).reshape(n, -1, width), len(parameter))
