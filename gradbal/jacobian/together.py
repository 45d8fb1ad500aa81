"""Whether the gradients of several losses may well go through a graph in one pass."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch.autograd.graph import Node

from gradbal.jacobian.frontier import Frontier

__all__ = ["enters_as_one"]

_STARTS_FROM_EDGES = hasattr(Node, "_input_metadata")
"""torch 2.4 starts backward passes from tensors alone."""

_BATCHES_WELL = re.compile(
    r"torch::autograd::AccumulateGrad"
    r"|(Add|Sub|Mul|Div|Neg|Abs|Pow|Sqrt|Rsqrt|Exp|Log|Sin|Cos|Clamp|ClampMin|Sum|Mean"
    r"|Addmm|Mm|T|Transpose|Permute|View|UnsafeView|ReshapeAlias|Expand|Clone|Select|Slice|Squeeze"
    r"|Unsqueeze|Relu|LeakyRelu|Threshold|Tanh|Sigmoid|Silu|Gelu|Elu|Softplus|Hardtanh"
    r"|Hardswish|NativeDropout|NativeLayerNorm)Backward\d*"
)
"""Kinds of nodes that are a few batched operators backwards, and no slower for it."""


def enters_as_one(frontier: Frontier, present: Sequence[int]) -> bool:
    """Whether the losses enter what they share at the same edges, and it is fit for one pass.

    A convolution, for one, takes longer for T gradients at once than for one after the other; and
    of other people's functions nobody knows.

    Args:
        frontier: of all losses.
        present: those that are asked for.
    """
    if len(present) < 2 or not _STARTS_FROM_EDGES or torch.is_anomaly_enabled():
        return False
    edges = [frozenset(frontier.edges[i]) for i in present]
    if not edges[0] or len(set(edges)) > 1:
        return False
    return all(_BATCHES_WELL.fullmatch(name) for name in {n.name() for n in frontier.nodes})
