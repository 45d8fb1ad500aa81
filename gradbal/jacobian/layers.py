"""Layers found in an autograd graph: what they took in, and which parameters are theirs alone.

A layer is a node of the graph. Let δ be the gradient of a loss with respect to its output: the
gradients of the layer's own parameters are functions of δ and of what the node has saved, if the
parameters have no other way to the losses. Whatever is not surely so is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from gradbal.jacobian.walk import Walk

__all__ = ["Convolution", "Embedding", "Layer", "Linear", "Norm", "Shift", "find_layers", "owned"]


@dataclass(frozen=True)
class Linear:
    """`y = x W + b`.

    Attributes:
        node: where δ `[N, out]` arrives.
        weight, bias: indices of the parameters; no bias where it is not the layer's alone.
        inputs: x `[N, in]`; leading dimensions are flattened.
        is_transposed: whether the weight is `[out, in]`, as that of `nn.Linear`, or `[in, out]`.
    """

    node: Node
    weight: int
    bias: int | None
    inputs: Tensor
    is_transposed: bool


@dataclass(frozen=True)
class Convolution:
    """A convolution in one, two or three dimensions, transposed or not.

    Attributes:
        node: where δ `[B, C_out, *]` arrives.
        weight, bias: indices of the parameters; no bias where it is not the layer's alone.
        inputs: `[B, C_in, *]`.
        kernel: the weight `[C_out, C_in / groups, *]`, or `[C_in, C_out / groups, *]`.
        stride, padding, dilation, is_transposed, output_padding, groups: as of `nn.Conv2d`.
    """

    node: Node
    weight: int
    bias: int | None
    inputs: Tensor
    kernel: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    is_transposed: bool
    output_padding: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Norm:
    """`y = x̂ · w + b`: layer, group and batch normalization.

    Attributes:
        node: where δ arrives, of the shape of x̂.
        weight, bias: indices of the parameters; no bias where it is not the layer's alone.
        normalized: computes x̂, in memory of its own.
        dims: the dimensions of x̂ that weight and bias run along.
        mixes: whether x̂ of one instance depends on the others, as in training with BatchNorm.
    """

    node: Node
    weight: int
    bias: int | None
    normalized: Callable[[], Tensor]
    dims: tuple[int, ...]
    mixes: bool


@dataclass(frozen=True)
class Embedding:
    """Rows of a table.

    Attributes:
        node: where δ `[*, D]` arrives.
        weight: index of the parameter `[V, D]`.
        indices: `[*]`.
        padding_idx: the row that gets no gradient, or None.
        by_freq: whether δ is divided by how often its row is taken.
    """

    node: Node
    weight: int
    indices: Tensor
    padding_idx: int | None
    by_freq: bool


@dataclass(frozen=True)
class Shift:
    """`y = x + b`: a bias alone, its weight being frozen, absent or shared with other layers.

    Attributes:
        node: where δ arrives, of any shape.
        bias: index of the parameter, which is as long as δ along `dim`.
        dim: the dimension of δ that the bias runs along.
    """

    node: Node
    bias: int
    dim: int


Layer = Linear | Convolution | Norm | Embedding | Shift


def owned(layer: Layer) -> list[int]:
    """Indices of the parameters that act through this layer alone."""
    if isinstance(layer, Embedding):
        return [layer.weight]
    if isinstance(layer, Shift):
        return [layer.bias]
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]


def find_layers(graph: Walk, parameters: Sequence[Tensor]) -> list[Layer]:
    """The layers of a graph; each parameter is in one of them, or in none.

    Args:
        graph: of the losses.
        parameters: n leaf tensors that require grad, those of the walk.

    Returns:
        The layers, those near the losses first.
    """
    finder = _Finder(graph, parameters)
    return [found for node in graph.order for found in finder.layers(node)]


class _Finder:
    def __init__(self, graph: Walk, parameters: Sequence[Tensor]) -> None:
        self._graph = graph
        self._parameters = parameters
        self._index = {node: k for k, node in graph.leaves.items()}

    def layers(self, node: Node) -> list[Layer]:
        read = _READERS.get(node.name())
        if read is None:
            return []
        if any(use.output != 0 for use in self._graph.uses[node]):
            return []
        try:
            return read(self, node)
        except (AttributeError, RuntimeError):
            # Freed, changed in place, or saved under another name: the backward pass itself will
            # tell if it cannot do without.
            return []

    def _parameter(self, node: Node, position: int, shape: Sequence[int]) -> int | None:
        """The parameter whose one way to the losses is this input of the node, if it has that
        shape."""
        source = node.next_functions[position][0] if position < len(node.next_functions) else None
        k = None if source is None else self._index.get(source)
        if source is None or k is None or len(self._graph.uses[source]) != 1:
            return None
        return k if _is_plain(self._parameters[k], shape) else None

    def _matrix(self, node: Node, position: int, sizes: Sequence[int]) -> tuple[int | None, bool]:
        """The same for a matrix of that size, and whether it is the parameter's transpose."""
        source = node.next_functions[position][0]
        if source is None or source.name() != "TBackward0":
            return self._parameter(node, position, sizes), False
        if len(self._graph.uses[source]) != 1:
            return None, True
        return self._parameter(source, 0, sizes[::-1]), True

    def addmm(self, node: Node) -> list[Layer]:
        if node._saved_alpha != 1 or node._saved_beta != 1:  # type: ignore[attr-defined]
            return []
        sizes = node._saved_mat2_sym_sizes  # type: ignore[attr-defined]
        bias = self._parameter(node, 0, sizes[1:])
        return self._linear(node, "mat1", self._matrix(node, 2, sizes), bias)

    def mm(self, node: Node) -> list[Layer]:
        sizes = node._saved_mat2_sym_sizes  # type: ignore[attr-defined]
        return self._linear(node, "self", self._matrix(node, 1, sizes), None)

    def _linear(
        self, node: Node, saved: str, matrix: tuple[int | None, bool], bias: int | None
    ) -> list[Layer]:
        weight, is_transposed = matrix
        inputs = None if weight is None else _saved(node, saved)
        if weight is None or inputs is None:
            return [] if bias is None else [Shift(node, bias, 1)]
        return [Linear(node, weight, bias, inputs, is_transposed)]

    def convolution(self, node: Node) -> list[Layer]:
        kernel, inputs = _saved(node, "weight"), _saved(node, "input")
        if kernel is None or inputs is None:
            return []
        groups = node._saved_groups  # type: ignore[attr-defined]
        is_transposed = node._saved_transposed  # type: ignore[attr-defined]
        n_out = kernel.shape[1] * groups if is_transposed else kernel.shape[0]
        weight = self._parameter(node, 1, kernel.shape)
        bias = self._parameter(node, 2, (n_out,))
        if weight is None:
            return [] if bias is None else [Shift(node, bias, 1)]
        return [
            Convolution(
                node,
                weight,
                bias,
                inputs,
                kernel,
                node._saved_stride,  # type: ignore[attr-defined]
                node._saved_padding,  # type: ignore[attr-defined]
                node._saved_dilation,  # type: ignore[attr-defined]
                is_transposed,
                node._saved_output_padding,  # type: ignore[attr-defined]
                groups,
            )
        ]

    def layer_norm(self, node: Node) -> list[Layer]:
        inputs, mean, scale = (_saved(node, name) for name in ("input", "result1", "result2"))
        shape = tuple(node._saved_normalized_shape)  # type: ignore[attr-defined]
        if inputs is None or mean is None or scale is None:
            return []

        def normalized() -> Tensor:
            return (inputs - mean).mul_(scale)

        n = inputs.dim()
        return self._norm(node, shape, normalized, tuple(range(n - len(shape), n)), False)

    def group_norm(self, node: Node) -> list[Layer]:
        inputs, mean, scale = (_saved(node, name) for name in ("input", "result1", "result2"))
        n_groups = node._saved_group  # type: ignore[attr-defined]
        if inputs is None or mean is None or scale is None:
            return []

        def normalized() -> Tensor:
            x = inputs.reshape(len(inputs), n_groups, -1)
            wide = (x - mean.view(-1, n_groups, 1)).mul_(scale.view(-1, n_groups, 1))
            return wide.view(inputs.shape)

        return self._norm(node, (inputs.shape[1],), normalized, (1,), False)

    def batch_norm(self, node: Node) -> list[Layer]:
        inputs = _saved(node, "input")
        if inputs is None:
            return []
        mixes = bool(node._saved_training)  # type: ignore[attr-defined]
        if mixes:
            mean, scale = _saved(node, "result1"), _saved(node, "result2")
        else:
            mean, variance = _saved(node, "running_mean"), _saved(node, "running_var")
            eps = node._saved_eps  # type: ignore[attr-defined]
            scale = None if variance is None else (variance + eps).rsqrt()
        if mean is None or scale is None or mean.numel() != inputs.shape[1]:
            return []
        shape = (1, -1) + (1,) * (inputs.dim() - 2)

        def normalized() -> Tensor:
            return (inputs - mean.view(shape)).mul_(scale.view(shape))

        return self._norm(node, (inputs.shape[1],), normalized, (1,), mixes)

    def _norm(
        self,
        node: Node,
        shape: Sequence[int],
        normalized: Callable[[], Tensor],
        dims: tuple[int, ...],
        mixes: bool,
    ) -> list[Layer]:
        weight, bias = self._parameter(node, 1, shape), self._parameter(node, 2, shape)
        if weight is not None:
            return [Norm(node, weight, bias, normalized, dims, mixes)]
        return [] if bias is None or len(dims) > 1 else [Shift(node, bias, dims[0])]

    def embedding(self, node: Node) -> list[Layer]:
        indices = _saved(node, "indices")
        n_rows = node._saved_weight_sym_argsize_0  # type: ignore[attr-defined]
        source = node.next_functions[0][0]
        k = None if source is None else self._index.get(source)
        if indices is None or k is None or node._saved_sparse:  # type: ignore[attr-defined]
            return []
        weight = self._parameter(node, 0, (n_rows, self._parameters[k].shape[-1]))
        if weight is None:
            return []
        padding = node._saved_padding_idx  # type: ignore[attr-defined]
        by_freq = bool(node._saved_scale_grad_by_freq)  # type: ignore[attr-defined]
        # None is saved as -1, which is read back as an unsigned number.
        padding_idx = padding if 0 <= padding < n_rows else None
        return [Embedding(node, weight, indices, padding_idx, by_freq)]

    def add(self, node: Node) -> list[Layer]:
        # `nn.Linear` adds its bias so where it cannot see its input as a matrix.
        if node._saved_alpha != 1:  # type: ignore[attr-defined]
            return []
        matrix = node.next_functions[0][0]
        if matrix is None or matrix.name() != "UnsafeViewBackward0":
            return []
        product = matrix.next_functions[0][0]
        if product is None or product.name() != "MmBackward0":
            return []
        sizes = product._saved_mat2_sym_sizes  # type: ignore[attr-defined]
        bias = self._parameter(node, 1, (sizes[1],))
        # One of a single entry may be spread over more columns than the product has.
        return [] if bias is None or sizes[1] == 1 else [Shift(node, bias, -1)]


_READERS: dict[str, Callable[[_Finder, Node], list[Layer]]] = {
    "AddmmBackward0": _Finder.addmm,
    "MmBackward0": _Finder.mm,
    "AddBackward0": _Finder.add,
    "ConvolutionBackward0": _Finder.convolution,
    "NativeLayerNormBackward0": _Finder.layer_norm,
    "NativeGroupNormBackward0": _Finder.group_norm,
    "NativeBatchNormBackward0": _Finder.batch_norm,
    "CudnnBatchNormBackward0": _Finder.batch_norm,
    "MiopenBatchNormBackward0": _Finder.batch_norm,
    "EmbeddingBackward0": _Finder.embedding,
}


def _saved(node: Node, name: str) -> Tensor | None:
    """A tensor that the node has saved; None where hooks stand between the two.

    Activation checkpointing works by such hooks: reading would run the layers again.
    """
    raw = getattr(node, f"_raw_saved_{name}")
    if hasattr(raw, "unpack_hook"):
        if raw.unpack_hook is not None:
            return None
        tensor: Tensor | None = getattr(node, f"_saved_{name}")
    else:
        # Older versions do not tell; but what a hook has packed is unpacked anew at every look.
        tensor, again = getattr(node, f"_saved_{name}"), getattr(node, f"_saved_{name}")
        if tensor is not None and tensor.data_ptr() != again.data_ptr():
            return None
    if tensor is None or not _is_plain(tensor, tensor.shape):
        return None
    return tensor.detach()


def _is_plain(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Whether a tensor is what it seems: no subclass with a mind of its own, dense, real."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.shape == torch.Size(shape)
        and tensor.layout == torch.strided
        and not tensor.is_complex()
    )
