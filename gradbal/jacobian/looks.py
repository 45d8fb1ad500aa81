"""What is found out about graphs of one structure: whose each row of every layer is.

A look is an experiment with the losses at hand; what the operations of the graph alone tell is held
against it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import Node

from gradbal.jacobian.instance_step import InstanceStep
from gradbal.jacobian.layers import Layer, owned
from gradbal.jacobian.owners import UNKNOWN, Codes, Owners, Reading, arrange, merged
from gradbal.jacobian.per_instance import leading
from gradbal.jacobian.separation import separated
from gradbal.jacobian.strays import Path, candidates, carries, paths

__all__ = ["AGREED", "Known", "look_at", "ways_to"]

AGREED = 2
"""Steps at which what is held has agreed with a second pass, before it does alone."""

_AUDIT = 16
"""After so many steps of one pass one has two again."""


@dataclass
class Known:
    """What was found out about graphs of one structure.

    moves: whether they send rows about. owners: of the rows, by the node's place in the walk.
    silent: the places of nodes that no gradient came to. n_steps: how often it was met. certain:
    whether the owners follow from the operations alone. n_agreed: steps at which what is held was
    compared with a second pass, since the last look. n_direct: steps without one. refused: whether
    the two have ever differed.
    """

    moves: bool
    owners: dict[int, Owners] = field(default_factory=dict)
    silent: frozenset[int] = frozenset()
    n_steps: int = 0
    certain: bool = False
    n_agreed: int = 0
    n_direct: int = 0
    refused: bool = False

    def agrees(self) -> bool:
        """Whether a step may do without a second pass; it is then counted."""
        if self.n_agreed < AGREED:
            return False
        self.n_direct += 1
        if self.n_direct % _AUDIT == 0:
            self.n_agreed = AGREED - 1
            return False
        return True


def look_at(step: InstanceStep, known: Known) -> None:
    """Finds out which rows are whose.

    Raises:
        ValueError: instances mix.
    """
    n = len(step.losses)
    layers = {layer.node: layer for layer in step.layers}
    above = {node for k in step.strays for node in candidates(step.graph, step.leaf(k))}
    base: dict[Node, Tensor] = {}

    def first(node: Node, gradient: Tensor) -> None:
        base[node] = gradient

    nodes = [*layers, *(node for node in above if node not in layers)]
    step.visit({node: partial(first, node) for node in nodes}, step.factors)
    narrow = any(gradient.dtype == torch.float16 for gradient in base.values())
    codes = Codes.draw(n, step.factors, 4 if narrow else 16)
    readings = {
        node: [Reading(g, rows, codes) for rows in _leading(layers.get(node), g)]
        for node, g in base.items()
    }

    def again(node: Node, number: int, gradient: Tensor) -> None:
        for reading in readings[node]:
            reading.add(number, gradient)

    for number, factors in enumerate(codes.factors):
        visitors = {node: partial(again, node, number) for node in readings}
        step.visit(visitors, step.factors * factors)
    found: dict[int, Owners] = {}
    # The one nearest to the losses tells most about where instances mix.
    for node in sorted(readings, key=step.place.__getitem__):
        place = step.place[node]
        before = known.owners.get(place)
        each = (reading.owners() for reading in readings[node])
        told = (merged(ids, before, n, base[node].device) for ids in each if ids is not None)
        # A row with NaN tells nothing; its single entries may.
        owners = max((found for found in told if found is not None), key=_seen, default=None)
        if node in layers:
            if owners is None:
                raise ValueError(_mixing(step, node, owned(layers[node])[0]))
            found[place] = owners
        elif owners is not None and (owners.n_seen > 1 or not carries(node)):
            # What only one instance has a gradient of may belong to others at the next step.
            found[place] = owners
    known.owners = found
    known.silent = frozenset(step.place[node] for node in nodes if node not in base)
    known.n_agreed = min(known.n_agreed, AGREED - 1)
    known.certain = not (known.refused or known.moves) and _is_certain(step, known)


def _is_certain(step: InstanceStep, known: Known) -> bool:
    """Whether the operations alone tell the owners of all layers' rows, as they were found; those
    of rows without a gradient are then known too."""
    if step.strays:
        return False
    certain = separated(step.graph, len(step.losses))
    for layer in step.layers:
        place = step.place[layer.node]
        ids, found = certain.get(layer.node), known.owners.get(place)
        if ids is None or found is None:
            return False
        n_rows = len(found.shape)
        if any(size != 1 for size in ids.shape[n_rows:]):
            return False
        rows = np.broadcast_to(ids.reshape(ids.shape[:n_rows]), found.shape)
        if ((found.ids != UNKNOWN) & (found.ids != rows)).any():
            return False
        if found.unsure is not None or found.blocks is None:
            whole = arrange(rows, found.n, found.whose.device)
            if whole is None or whole.blocks is None:
                return False
            known.owners[place] = whole
    return True


def _seen(owners: Owners) -> bool:
    return owners.n_seen > 1


def _leading(layer: Layer | None, gradient: Tensor) -> list[int]:
    """How many dimensions of rows to try: of nodes that are not known it may be all."""
    if layer is not None:
        return [leading(layer, gradient)]
    n = gradient.dim()
    return [n - 1, n] if n > 1 else [1]


def ways_to(step: InstanceStep, k: int, known: Known) -> list[Path]:
    """The ways from parameter k to the first nodes whose rows are known to be whose.

    Raises:
        ValueError: it meets the instances nowhere.
    """

    def told(node: Node) -> bool:
        return step.place[node] in known.owners or step.place[node] in known.silent

    found = paths(step.graph, step.leaf(k), told)
    if found is None:
        raise ValueError(
            'with jacobian="instance" parameters must meet the instances in a model, found one '
            f"of shape {list(step.parameters[k].shape)} that is among the losses itself"
        )
    if not isinstance(found, list):
        raise ValueError(_mixing(step, found, k))
    return found


def _mixing(step: InstanceStep, node: Node, k: int) -> str:
    shape = list(step.parameters[k].shape)
    if any(use.output != 0 for use in step.graph.uses[node]):
        return (
            f'with jacobian="instance" one output of {node.name()} may be used, where a parameter '
            f'of shape {shape} is, found several; use jacobian="loop"'
        )
    message = (
        'instances must not mix with jacobian="instance", found a gradient of several at '
        f"{node.name()}, where a parameter of shape {shape} is used"
    )
    if any(
        "BatchNorm" in each.name() and getattr(each, "_saved_training", False)
        for each in step.graph.order
    ):
        return f"{message}; BatchNorm in training mode mixes them: use GroupNorm, or eval()"
    return f"{message}; each loss must come from its own instance alone"
