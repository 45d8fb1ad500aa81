"""The Gramian of per-instance losses, from one backward pass of their sum.

Instances do not mix, so one pass finds the gradient of every instance's loss at the output of every
layer at once. Which of its rows are whose is found by experiment at the first step, when the graph
has changed, and now and then; nothing is taken for granted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradbal.jacobian.graph import check_dense, hooks_held_back, shared_indices
from gradbal.jacobian.layers import Layer, Norm, find_layers, owned
from gradbal.jacobian.owners import Codes, Ids, Owners, arrange, identify, merged
from gradbal.jacobian.per_instance import Gathered, Outer, Part, leading, parts
from gradbal.jacobian.products import gramian, no_autocast
from gradbal.jacobian.walk import Use, Walk, walk

__all__ = ["Instance", "Instances"]

_REMEMBERED = 64
"""Structures of graphs whose rows are remembered."""


class _Path(NamedTuple):
    """From a node with gradients of single instances down to a parameter: through which of its
    inputs, and of the inputs of the nodes after it."""

    node: Node
    steps: tuple[tuple[Node, int], ...]
    parameter: int


@dataclass
class _Known:
    """What was found out about graphs of one structure.

    owners: of the rows of every node where gradients are looked at, by its place in the walk.
    rows: the places of nodes below which gradients of parameters in no layer are taken.
    n_steps: how often the structure was met.
    """

    owners: dict[int, Owners] = field(default_factory=dict)
    n_steps: int = 0


class Stale(Exception):
    """The rows are not where they were."""
