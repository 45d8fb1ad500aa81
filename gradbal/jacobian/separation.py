"""Which entries of every gradient are whose, from the operations of the graph alone.

What experiments find out holds for the data that they were made with: a product with a mask that
comes with the data may bring instances together at the next step. Here every operation is taken
for all that it could do to any data of these shapes. Where instances stay apart even so, they stay
apart at every step whose graph is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd.graph import Node

from gradbal.jacobian.walk import Walk

__all__ = ["separated"]

Ids = NDArray[np.int64]
"""The owner of each entry of a tensor, one dimension for each of its; of size 1 where the owner is
the same all along it."""

Shape = tuple[int, ...]


class _Mixed(Exception):
    """A gradient may be of several instances, or it is not known."""


def separated(graph: Walk, n: int) -> dict[Node, Ids]:
    """The owners of the gradients at the first outputs of those nodes where that is certain.

    Hooks on inner tensors are not seen here.

    Args:
        graph: of a tensor `[B]` of losses.
        n: B.
    """
    if not hasattr(torch.autograd.graph.Node, "_input_metadata"):
        # Nodes of torch 2.4 do not tell shapes.
        return {}
    # None where several meet: what is known of other ways to the same place is void then.
    known: dict[tuple[Node, int], Ids | None] = {}
    for node in graph.order:
        outputs = _outputs(node)
        for use in graph.uses[node]:
            if use.consumer is None:
                start = (node, use.output)
                known[start] = np.arange(n) if start not in known else None
        rule = _RULES.get(node.name())
        entered = {use.output for use in graph.uses[node]}
        told = [known[node, k] if k in entered else _NOTHING for k in range(len(outputs))]
        given = [ids for ids in told if ids is not None]
        for position, (source, output) in enumerate(node.next_functions):
            if source is None:
                continue
            found = None
            if rule is not None and len(given) == len(told):
                try:
                    found = rule(_Call(node, given, outputs, position, _shape(source, output)))
                except (_Mixed, AttributeError, IndexError, ValueError):
                    found = None
            edge = source, output
            if edge in known:
                before = known[edge]
                same = before is not None and found is not None and _same(before, found)
                found = before if same else None
            known[edge] = found
    return {node: ids for (node, k), ids in known.items() if k == 0 and ids is not None}


_NOTHING = np.full((), -1)
"""Of an output without a gradient."""


class _Call:
    """One node, and the input of which the owners are wanted.

    node: what is called backwards. given: owners by output, all known. outputs: shapes of these.
    position, shape: of the input.
    """

    def __init__(
        self,
        node: Node,
        given: Sequence[Ids],
        outputs: Sequence[Shape],
        position: int,
        shape: Shape,
    ) -> None:
        self.node, self.given, self.outputs = node, given, outputs
        self.position, self.shape = position, shape

    @property
    def ids(self) -> Ids:
        """Of the one output that is used."""
        if any(ids is not _NOTHING for ids in self.given[1:]) or self.given[0] is _NOTHING:
            raise _Mixed
        return self.given[0]

    def argument(self, name: str) -> Any:
        """What the node has saved under that name."""
        return getattr(self.node, f"_saved_{name}")

    def dims(self, name: str, n_dims: int) -> list[int]:
        """Dimensions, of `n_dims`, from a number or several; they are read as unsigned."""
        value = self.argument(name)
        values = [value] if isinstance(value, int) else list(value or ())
        return [(d - (1 << 64) if d >= 1 << 63 else d) % n_dims for d in values]


def _outputs(node: Node) -> list[Shape]:
    return [tuple(output.shape) for output in node._input_metadata]


def _shape(node: Node, output: int) -> Shape:
    return _outputs(node)[output]


def _same(one: Ids, other: Ids) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def _free(ids: Ids, dims: Sequence[int]) -> Ids:
    """The same, where one owner has all of each of these dimensions."""
    if any(ids.shape[d] != 1 for d in dims):
        raise _Mixed
    return ids


def _short(ids: Ids) -> Ids:
    """Dimensions of one owner made 1 long."""
    for dim in range(ids.ndim):
        first = ids.take([0], dim)
        if ids.shape[dim] > 1 and (ids == first).all():
            ids = first
    return ids


def _reshaped(ids: Ids, old: Shape, new: Shape) -> Ids:
    """Owners of the same entries in another shape."""
    if 0 in old:
        raise _Mixed
    lengths: list[int] = []
    result: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        # The least number of dimensions of both that have as many entries.
        first_i, first_j, left, right = i, j, 1, 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        is_free = all(size == 1 for size in ids.shape[first_i:i])
        lengths += [1] * (i - first_i) if is_free else old[first_i:i]
        result += [1] * (j - first_j) if is_free else new[first_j:j]
    return _short(np.broadcast_to(ids, lengths).reshape(result))


def _entrywise(call: _Call) -> Ids:
    """Each entry of the input goes into the entries of the output that it is spread over."""
    ids, shape = call.ids, call.shape
    extra = ids.ndim - len(shape)
    if extra < 0:
        raise _Mixed
    wide = call.outputs[0]
    spread = [*range(extra)]
    spread += [d + extra for d, size in enumerate(shape) if size != wide[d + extra]]
    kept = _free(ids, spread)
    return kept.reshape(kept.shape[extra:])


def _view(call: _Call) -> Ids:
    return _reshaped(call.ids, call.outputs[0], call.shape)


def _transpose(call: _Call) -> Ids:
    ids = call.ids
    first, second = call.dims("dim0", ids.ndim)[0], call.dims("dim1", ids.ndim)[0]
    found: Ids = ids.swapaxes(first, second)
    return found


def _turned(call: _Call) -> Ids:
    found: Ids = call.ids.T
    return found


def _permute(call: _Call) -> Ids:
    ids = call.ids
    found: Ids = ids.transpose(np.argsort(call.dims("dims", ids.ndim)))
    return found


def _reduction(call: _Call) -> Ids:
    """A sum or the like over dimensions."""
    ids = call.ids
    if not call.argument("keepdim"):
        n_dims = len(call.shape)
        dims = call.dims("dim", n_dims) or list(range(n_dims))
        ids = np.expand_dims(ids, sorted(dims))
    return ids


def _total(call: _Call) -> Ids:
    return call.ids.reshape((1,) * len(call.shape))


def _select(call: _Call) -> Ids:
    # What has no gradient may be anyone's: as much as the owner's of what is taken.
    return np.expand_dims(call.ids, call.dims("dim", len(call.shape)))


def _slice(call: _Call) -> Ids:
    ids = call.ids
    return _free(ids, [d for d, size in enumerate(call.shape) if size != call.outputs[0][d]])


def _pieces(call: _Call) -> Ids:
    """Of the parts that a tensor is split into."""
    dims = call.dims("dim", len(call.shape))
    each = [ids for ids in call.given if ids is not _NOTHING]
    if call.node.name() == "UnbindBackward0":
        each = [np.expand_dims(ids, dims) for ids in each]
    first = each[0]
    if not all(_same(first, ids) for ids in each):
        raise _Mixed
    return _free(first, dims)


def _cat(call: _Call) -> Ids:
    ids = call.ids
    (dim,) = call.dims("dim", ids.ndim)
    if ids.shape[dim] == 1:
        return ids
    start = 0
    for source, output in call.node.next_functions[: call.position]:
        if source is None:
            raise _Mixed
        start += _shape(source, output)[dim]
    return _short(ids.take(range(start, start + call.shape[dim]), dim))


def _stack(call: _Call) -> Ids:
    ids = call.ids
    (dim,) = call.dims("dim", ids.ndim)
    return np.asarray(ids.take(call.position if ids.shape[dim] > 1 else 0, dim))


def _product(data: int) -> Callable[[_Call], Ids]:
    """Of a matrix `[N, in]` at that position with one of parameters: row by row."""

    def rule(call: _Call) -> Ids:
        if call.position != data:
            raise _Mixed
        return _free(call.ids, [1])

    return rule


def _products(first: int) -> Callable[[_Call], Ids]:
    """Of two stacks of matrices, from that position on."""

    def rule(call: _Call) -> Ids:
        if call.position < first:
            return _entrywise(call)
        return _free(call.ids, [2 if call.position == first else 1])

    return rule


def _attention(call: _Call) -> Ids:
    """Of queries, keys and values `[N, H, L, E]`."""
    if call.position > 2 or len(call.shape) != 4:
        raise _Mixed
    return _free(call.ids, [2, 3])


def _image(call: _Call) -> Ids:
    """A convolution's input `[N, C, *]`, or what a normalization by groups takes."""
    if call.position != 0 or call.ids.ndim != len(call.shape):
        raise _Mixed
    return _free(call.ids, range(1, len(call.shape)))


def _layer_norm(call: _Call) -> Ids:
    if call.position != 0:
        raise _Mixed
    n_dims = len(call.shape)
    return _free(call.ids, range(n_dims - len(call.argument("normalized_shape")), n_dims))


def _batch_norm(call: _Call) -> Ids:
    if call.position != 0 or call.argument("training"):
        raise _Mixed
    return call.ids


def _softmax(call: _Call) -> Ids:
    return _free(call.ids, call.dims("dim", len(call.shape)))


def _class_loss(call: _Call) -> Ids:
    """A loss for each instance, or for each place of each."""
    if call.argument("reduction") != 0 or call.position != 0 or len(call.shape) < 2:
        raise _Mixed
    return np.expand_dims(call.ids, 1)


def _pool(n_dims: int) -> Callable[[_Call], Ids]:
    """What takes from all over the last dimensions."""

    def rule(call: _Call) -> Ids:
        ids = call.ids
        return _free(ids, range(ids.ndim - n_dims, ids.ndim))

    return rule


_ENTRYWISE = """
    Abs Add Alias BinaryCrossEntropy BinaryCrossEntropyWithLogits Celu Clamp ClampMax ClampMin Clone
    Cos Div Elu Erf Exp Expand Expm1 Gelu Hardsigmoid Hardswish Hardtanh Huber
    HuberLoss LeakyRelu Log Log1p LogSigmoid MaskedFill Mish MseLoss Mul NativeDropout Neg Pow
    PreluKernel Reciprocal Relu Rsqrt Rsub Sigmoid Silu Sin SmoothL1Loss Softplus Sqrt Sub Tanh
    Threshold ToCopy Where
"""

_VIEWS = "ReshapeAlias Squeeze UnsafeView Unsqueeze View"


def _named(names: str, rule: Callable[[_Call], Ids]) -> dict[str, Callable[[_Call], Ids]]:
    return {f"{name}Backward{k}": rule for name in names.split() for k in range(3)}


_RULES: dict[str, Callable[[_Call], Ids]] = {
    **_named(_ENTRYWISE, _entrywise),
    **_named(_VIEWS, _view),
    "TransposeBackward0": _transpose,
    "TBackward0": _turned,
    "PermuteBackward0": _permute,
    "SumBackward0": _total,
    "MeanBackward0": _total,
    "SumBackward1": _reduction,
    "MeanBackward1": _reduction,
    "LogsumexpBackward0": _reduction,
    "LinalgVectorNormBackward0": _reduction,
    "SelectBackward0": _select,
    "SliceBackward0": _slice,
    "SplitBackward0": _pieces,
    "SplitWithSizesBackward0": _pieces,
    "UnbindBackward0": _pieces,
    "CatBackward0": _cat,
    "StackBackward0": _stack,
    "AddmmBackward0": _product(1),
    "MmBackward0": _product(0),
    "BmmBackward0": _products(0),
    "BaddbmmBackward0": _products(1),
    "ScaledDotProductFlashAttentionForCpuBackward0": _attention,
    "ScaledDotProductFlashAttentionBackward0": _attention,
    "ScaledDotProductEfficientAttentionBackward0": _attention,
    "ScaledDotProductCudnnAttentionBackward0": _attention,
    "ConvolutionBackward0": _image,
    "NativeGroupNormBackward0": _image,
    "NativeLayerNormBackward0": _layer_norm,
    "NativeBatchNormBackward0": _batch_norm,
    "CudnnBatchNormBackward0": _batch_norm,
    "SoftmaxBackward0": _softmax,
    "LogSoftmaxBackward0": _softmax,
    "NllLossBackward0": _class_loss,
    "NllLoss2DBackward0": _class_loss,
    **_named("AvgPool2D AdaptiveAvgPool2D MaxPool2DWithIndices", _pool(2)),
    **_named("UpsampleNearest2D UpsampleBilinear2D", _pool(2)),
    **_named("AvgPool3D AdaptiveAvgPool3D MaxPool3DWithIndices", _pool(3)),
}
