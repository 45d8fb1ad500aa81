"""From `jacobian=` and its options to an engine: requirements, and what was found."""

from __future__ import annotations

from typing import Any

import torch

from gradbal.aggregators._arguments import integer
from gradbal.aggregators.base import Aggregator, GramianAggregator, Scalarizer
from gradbal.jacobian import (
    ENGINES,
    WITHOUT_ROWS,
    Auto,
    Engine,
    Instance,
    Layerwise,
    Loop,
    Rule,
    Sketch,
    VMap,
)
from gradbal.registry import near_misses

__all__ = ["has_groups", "make_engine"]

_USES = {
    "chunk_size": ("vmap", "auto"),
    "sketch_size": ("sketch",),
}
"""Options, and the engines that have a use for them."""


def make_engine(aggregator: Aggregator, jacobian: Any, **options: Any) -> Engine | Auto:
    """The engine of that name, for a method.

    Args:
        aggregator: the method.
        jacobian: one of `ENGINES`.
        **options: chunk_size, sketch_size; None where they are not given.

    Raises:
        ValueError: an unknown name, an option out of range or without use, or a method that the
            engine cannot serve.
    """
    if jacobian not in ENGINES:
        raise ValueError(
            f"`jacobian` must be one of {', '.join(map(repr, ENGINES))}, found {jacobian!r}"
            f"{near_misses(str(jacobian), list(ENGINES))}"
        )
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if jacobian not in _USES[name]:
            engines = " or ".join(f'"{engine}"' for engine in _USES[name])
            raise ValueError(
                f"`{name}` is for jacobian={engines}, found {value!r} for {jacobian!r}; "
                "leave it out"
            )
        integer(name, value, 1)
    if jacobian in WITHOUT_ROWS:
        _check_gramian_suffices(aggregator, jacobian)
    if jacobian == "instance":
        _check_instances(aggregator)
        return Instance()
    if jacobian == "gramian":
        return Layerwise()
    if jacobian == "sketch":
        return Sketch(**{"size": given["sketch_size"]} if given else {})
    if jacobian == "vmap":
        return VMap(given.get("chunk_size"))
    if jacobian == "auto":
        return Auto(Rule(given.get("chunk_size")))
    return Loop()


def _check_gramian_suffices(aggregator: Aggregator, jacobian: str) -> None:
    name = aggregator.name
    if not isinstance(aggregator, GramianAggregator | Scalarizer):
        raise ValueError(
            f'`jacobian` must not be "{jacobian}" for {name!r}, which needs the gradients '
            'themselves and not their Gramian alone; use "loop"'
        )
    if isinstance(aggregator, GramianAggregator) and has_groups(aggregator):
        raise ValueError(
            f'`jacobian` must not be "{jacobian}" for {name!r} with weights by column group, since '
            'it adds up columns of all groups; use "loop", or one group'
        )


def _check_instances(aggregator: Aggregator) -> None:
    name, found = aggregator.name, "found jacobian='instance'"
    if aggregator.needs_features:
        raise ValueError(f"{name!r} works on gradients at a representation, {found}; use 'loop'")
    if isinstance(aggregator, GramianAggregator) and aggregator.probed_parameters() is not None:
        raise ValueError(f"{name!r} looks at some columns of the Jacobian, {found}; use 'loop'")


def has_groups(aggregator: GramianAggregator) -> bool:
    """Whether it has weights by column group."""
    try:
        return aggregator.column_groups([torch.Size([1])]) is not None
    except ValueError:
        # Widths, which are for other shapes than this one.
        return True
