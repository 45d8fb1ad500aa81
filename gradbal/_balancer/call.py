"""What a step is asked for, what it gathers and what is found of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradbal._lazy import LazyLosses
from gradbal._losses import Losses
from gradbal._nonfinite import HostValues

__all__ = ["BackwardCall", "Examined", "Pending"]


class BackwardCall(NamedTuple):
    """What one call of `backward` asks for.

    batch: the losses. parameters: those to train, without the aggregator's own. absent: tasks that
    sit this batch out, as far as that is known before lazy losses are evaluated. accumulate: only
    gather, and aggregate at the next call without it. scale: 0-dim loss scale, or None; with it an
    overflow is delivered as inf. retain_graph: keep the losses' graph. features: the representation
    at which the Jacobian is taken, or None.
    independent: losses of further, independent batches. taken: the gradients of each loss, where
    the passes are made already.
    """

    batch: Losses | LazyLosses
    parameters: list[Tensor]
    absent: frozenset[int]
    accumulate: bool
    scale: Tensor | None
    retain_graph: bool
    features: Tensor | None = None
    independent: tuple[Losses | LazyLosses, ...] = ()
    taken: Sequence[tuple[Tensor | None, ...]] | None = None

    @property
    def lazy(self) -> bool:
        """Whether any losses are not evaluated yet."""
        if isinstance(self.batch, LazyLosses):
            return True
        return any(isinstance(b, LazyLosses) for b in self.independent)


class Examined(NamedTuple):
    """gramian: `[T, T]`, zero for tasks that sit out. host: what came to the host. present, absent:
    who takes part and who does not."""

    gramian: Tensor
    host: HostValues
    present: list[int]
    absent: frozenset[int]


@dataclass
class Pending:
    """What a step has gathered: one batch, or several micro-batches.

    values: `[T]`, the losses as the aggregator sees them. losses: `[T]`, as they are. dropped: the
    tasks that something was wrong with in any batch. missing: those that no batch was of. weights:
    weights and head weights, when they come before the gradients. waiting: tasks whose turn it is
    not.
    """

    values: Tensor
    losses: Tensor
    dropped: frozenset[int]
    missing: frozenset[int] = frozenset()
    weights: tuple[Tensor, Tensor] | None = None
    waiting: frozenset[int] = frozenset()

    @property
    def absent(self) -> frozenset[int]:
        """The tasks that sit the step out."""
        return self.dropped | self.missing

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        w, head_weights = self.weights or (None, None)
        return {
            "values": self.values,
            "losses": self.losses,
            "dropped": sorted(self.dropped),
            "missing": sorted(self.missing),
            # One pass does for both where they are the same.
            "weights": None if w is None else [w] if head_weights is w else [w, head_weights],
            "waiting": sorted(self.waiting),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> Pending:
        """What a `state_dict()` was made from, on a device."""
        weights = [w.to(device, copy=True) for w in state["weights"] or ()]
        return cls(
            state["values"].to(device, copy=True),
            state["losses"].to(device, copy=True),
            frozenset(state["dropped"]),
            frozenset(state["missing"]),
            (weights[0], weights[-1]) if weights else None,
            frozenset(state["waiting"]),
        )
