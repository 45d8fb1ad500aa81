"""What tells two autograd graphs apart, and which of their nodes send rows about by the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from gradbal.jacobian.strays import carries
from gradbal.jacobian.walk import Walk

__all__ = ["fingerprint", "sends_rows_about"]

_ARGUMENTS = {
    "AsStridedBackward0": ("size", "stride", "storage_offset"),
    "CatBackward0": ("dim",),
    "CudnnBatchNormBackward0": ("training",),
    "FlipBackward0": ("dims",),
    "LinalgVectorNormBackward0": ("dim", "keepdim"),
    "LogSoftmaxBackward0": ("dim",),
    "LogsumexpBackward0": ("dim", "keepdim"),
    "MeanBackward1": ("dim", "keepdim"),
    "NativeBatchNormBackward0": ("training",),
    "NativeLayerNormBackward0": ("normalized_shape",),
    "NllLoss2DBackward0": ("reduction",),
    "NllLossBackward0": ("reduction",),
    "PermuteBackward0": ("dims",),
    "RollBackward0": ("shifts", "dims"),
    "SelectBackward0": ("dim", "index"),
    "SliceBackward0": ("dim", "start", "end", "step"),
    "SoftmaxBackward0": ("dim",),
    "SplitBackward0": ("dim", "split_size"),
    "SplitWithSizesBackward0": ("dim", "split_sizes"),
    "StackBackward0": ("dim",),
    "SumBackward1": ("dim", "keepdim"),
    "TransposeBackward0": ("dim0", "dim1"),
    "UnbindBackward0": ("dim",),
    "ViewBackward0": ("self_sym_sizes",),
}
"""Arguments that decide which row goes where, and that shapes do not show."""

_BY_DATA = (
    "Gather",
    "Index",
    "MaskedScatter",
    "MaskedSelect",
    "Msort",
    "PackPaddedSequence",
    "Put",
    "Scatter",
    "Sort",
    "Take",
    "Topk",
)
"""Beginnings of the names of nodes that send rows where tensors tell them to."""

_EXTREMES = frozenset(
    f"{name}Backward{k}"
    for name in ("Amax", "Amin", "Cummax", "Cummin", "Kthvalue", "Max", "Median", "Min", "Mode")
    for k in (0, 1)
)
"""Those that send them to where a value was found."""


def fingerprint(
    graph: Walk, place: dict[Node, int], losses: Tensor, parameters: Sequence[Tensor]
) -> int:
    """A number that is the same for graphs of the same nodes, edges, arguments and shapes.

    Args:
        graph: of the losses.
        place: node → its place in the walk.
        losses: what the graph is of.
        parameters: its leaves.
    """
    parts: list[object] = [losses.shape, losses.dtype, losses.device]
    for node in graph.order:
        name = node.name()
        parts.append(name)
        parts.append([(-1 if s is None else place[s], output) for s, output in node.next_functions])
        for argument in _ARGUMENTS.get(name, ()):
            parts.append(getattr(node, f"_saved_{argument}", None))
        parts.append([tuple(output.shape) for output in getattr(node, "_input_metadata", ())])
    parts.append([(k, place[leaf], id(parameters[k])) for k, leaf in graph.leaves.items()])
    return hash(repr(parts))


def sends_rows_about(graph: Walk) -> bool:
    """Whether rows may go elsewhere though the graph looks the same: indices, sorting, masks, rows
    multiplied by a constant matrix, and functions of which nothing is known."""
    return any(
        node.name().startswith(_BY_DATA)
        or node.name() in _EXTREMES
        or _is_custom(node)
        or _selects(node)
        for node in graph.order
    )


def _selects(node: Node) -> bool:
    """Whether a node has a constant times rows, or takes rows out of what is no parameter."""
    name, sources = node.name(), [source for source, _ in node.next_functions]
    if name in ("MmBackward0", "AddmmBackward0"):
        left, right = sources[-2:]
        return left is None and right is not None and not _is_of_parameters(right)
    return name == "EmbeddingBackward0" and not _is_of_parameters(sources[0])


def _is_of_parameters(node: Node | None) -> bool:
    """Whether there are parameters alone, and what carries them, below a node."""
    if node is None or hasattr(node, "variable"):
        return True
    return carries(node) and all(_is_of_parameters(source) for source, _ in node.next_functions)


def _is_custom(node: object) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)
