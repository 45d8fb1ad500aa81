"""Any `nn.Sequential`, cut into stages."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from gradbal.aggregators._arguments import integer

__all__ = ["sequential"]


def sequential(
    model: Callable[[], nn.Sequential], at: Sequence[int]
) -> Callable[[], nn.Sequential]:
    """A factory of a sequential network in stages.

    Args:
        model: function that makes the network anew.
        at: indices of the modules that a stage starts with, after the first, increasing.

    Raises:
        TypeError: `model` is a network itself, or does not make an `nn.Sequential`; indices that
            are no integers.
        ValueError: indices that do not increase, or lie outside the network.

    Example:
        >>> def network() -> nn.Sequential:
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> make = sequential(network, at=[2])
        >>> [len(stage) for stage in make()]
        [2, 1]
    """
    if isinstance(model, nn.Module):
        raise TypeError(
            "`model` must be a function that makes the network anew, found a network, "
            f"{type(model).__name__}"
        )
    for index in at:
        integer("at", index, 1)
    if any(b <= a for a, b in pairwise(at)):
        raise ValueError(f"`at` must increase, found {list(at)}")

    def make() -> nn.Sequential:
        network = model()
        if not isinstance(network, nn.Sequential):
            raise TypeError(f"`model` must make an nn.Sequential, found {type(network).__name__}")
        if at and at[-1] >= len(network):
            raise ValueError(
                f"`at` must be indices below {len(network)}, the number of modules, found {at[-1]}"
            )
        blocks = list(network)
        ends = [*at, len(blocks)]
        return nn.Sequential(
            *(nn.Sequential(*blocks[a:b]) for a, b in zip([0, *at], ends, strict=True))
        )

    return make
