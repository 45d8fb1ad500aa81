"""The losses of one step, checked, in whatever form the user holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradbal.jacobian import Absent, Reach, Root, hooks_held_back, there, upload

__all__ = [
    "Losses",
    "Names",
    "check_loss",
    "check_names",
    "in_order",
    "read_instances",
    "read_losses",
    "stacked",
]

Names = tuple[str | int, ...]

# torch 2.4 starts backward passes from tensors alone.
_EDGES_ARE_ROOTS = hasattr(Node, "_input_metadata")


@dataclass(frozen=True)
class Losses:
    """T losses.

    names: keys of the dict, or 0 … T − 1. values: `[T]`, detached; NaN for a task that is missing.
    tensors: the T 0-dim losses, None for a task that is missing; or the one 1-D tensor that holds
    them all. lacking: tasks that are absent from this batch, here. missing: those that are absent
    from it in all processes. factors: `[T]`, what this process's losses count for beside those of
    others; None for as much as each of theirs.
    """

    names: Names
    values: Tensor
    tensors: list[Tensor | None] | Tensor
    missing: frozenset[int] = frozenset()
    lacking: frozenset[int] = frozenset()
    factors: Tensor | None = None

    def like(self) -> Tensor:
        """`[T]`, with the losses' dtype and device."""
        return self.values

    def roots(
        self, cotangents: Tensor | None, known: Sequence[Reach | None] | None = None
    ) -> list[Root | Absent]:
        """Where each loss's own backward pass starts, and with which cotangent.

        A 1-D tensor made by `torch.stack` is taken apart again: a pass from one of its pieces does
        not walk the other tasks' heads.

        Args:
            cotangents: `[T]`, what each loss is multiplied by; None for ones.
            known: for each of T tasks what it reached before, for those that are missing.
        """
        if cotangents is None and isinstance(self.tensors, list):
            return [
                Absent(known[i] if known else None) if l is None else (l, torch.ones_like(l))
                for i, l in enumerate(self.tensors)
            ]
        if cotangents is None:
            cotangents = torch.ones_like(self.values)
        if isinstance(self.tensors, list):
            pairs = zip(self.tensors, cotangents.unbind(), strict=True)
            return [
                Absent(known[i] if known else None)
                if l is None
                else (l, c if c.dtype is l.dtype else c.to(l.dtype))
                for i, (l, c) in enumerate(pairs)
            ]
        edges = _stacked_edges(self.tensors)
        if edges is not None:
            result: list[Root | Absent] = []
            for edge, c in zip(edges, cotangents.unbind(), strict=True):
                piece = edge.node._input_metadata[edge.output_nr]
                result.append((edge, c.to(piece.dtype)))
            return result
        rows = torch.diag(cotangents.to(self.tensors.dtype))
        return [(self.tensors, row) for row in rows]

    def backward(
        self,
        weights: Tensor,
        inputs: Sequence[Tensor],
        retain_graph: bool,
        absent: frozenset[int] = frozenset(),
    ) -> None:
        """One backward pass of `Σ w_i ℓ_i` into the `.grad` of `inputs`; `weights [T]`.

        The losses of `absent` tasks are left out of the pass, since zero times NaN is NaN.
        """
        weights = upload(weights, self.values.device)
        if isinstance(self.tensors, Tensor) and not absent:
            grad = weights.to(self.tensors.dtype)
            torch.autograd.backward(self.tensors, grad, retain_graph, inputs=inputs)
            return
        pairs = there([pair for i, pair in enumerate(self.roots(weights)) if i not in absent])
        if not pairs:
            # Other processes have losses.
            return
        roots, cotangents = zip(*pairs, strict=True)
        if isinstance(self.tensors, list):
            torch.autograd.backward(roots, cotangents, retain_graph, inputs=inputs)
            return
        with hooks_held_back(inputs):
            grads = torch.autograd.grad(
                roots, inputs, cotangents, retain_graph=retain_graph, allow_unused=True
            )
        targets = [p for p, g in zip(inputs, grads, strict=True) if g is not None]
        torch.autograd.backward(targets, [g for g in grads if g is not None])


def read_losses(losses: object, names: Names | None) -> Losses:
    """Checks the losses of one step.

    Args:
        losses: a list, tuple or dict of T 0-dim tensors, None in place of one that is missing; or a
            1-D tensor.
        names: the tasks of the steps before, or None at the first.

    Raises:
        TypeError: not such a collection, or a loss is not a floating-point tensor.
        ValueError: no losses, or None alone, a loss that is not a scalar or has no graph, losses on
            several devices, other tasks than before.
    """
    if isinstance(losses, Tensor):
        return _read_vector(losses, names)
    if isinstance(losses, list | tuple):
        tensors = list(losses)
        found: Names = tuple(range(len(tensors)))
    elif isinstance(losses, Mapping):
        losses = in_order(losses, names)
        found = tuple(losses)
        tensors = list(losses.values())
    else:
        raise TypeError(
            "losses must be a list, tuple or dict of scalar tensors, or a 1-D tensor, found "
            f"{type(losses).__name__}"
        )
    if not tensors:
        raise ValueError("losses must have at least one entry, found none")
    missing = frozenset([i for i, loss in enumerate(tensors) if loss is None])
    if len(missing) == len(tensors):
        raise ValueError(
            f"at least one loss must be there, found None for all {len(tensors)} tasks; leave "
            "such a step out"
        )
    for name, loss in zip(found, tensors, strict=True):
        if loss is not None:
            check_loss(name, loss)
    present = [l for l in tensors if l is not None]
    devices = {l.device for l in present} if len(present) > 1 else ()
    if len(devices) > 1:
        raise ValueError(
            f"losses must be on one device, found {', '.join(sorted(map(str, devices)))}"
        )
    check_names(found, names)
    return Losses(found, stacked(tensors), tensors, missing, missing)


def stacked(losses: Sequence[Tensor | None]) -> Tensor:
    """`[T]`, detached, NaN for None; at least one is not."""
    present = [l.detach() for l in losses if l is not None]
    if len(present) == len(losses):
        return torch.stack(present)
    first = present[0]
    nan = torch.full_like(first, float("nan"))
    return torch.stack([nan if l is None else l.detach() for l in losses])


def read_instances(losses: object, names: Names | None) -> Losses:
    """Checks the losses of the instances of one batch.

    Args:
        losses: a 1-D tensor, one entry for each instance.
        names: of the batch before, where there must be as many; or None.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: not 1-D, empty, without a graph, or another number than before.
    """
    if not isinstance(losses, Tensor):
        raise TypeError(
            'with jacobian="instance" losses must be a 1-D tensor of the losses of all instances, '
            f'found {type(losses).__name__}; pass the loss of reduction="none" as it is'
        )
    if losses.dim() != 1:
        raise ValueError(
            'with jacobian="instance" losses must be 1-D, one entry for each instance, found shape '
            f"{list(losses.shape)}; take the mean over all dimensions but that of the instances"
        )
    return _read_vector(losses, names, taken_apart=False)


def _read_vector(losses: Tensor, names: Names | None, taken_apart: bool = True) -> Losses:
    if losses.dim() != 1:
        raise ValueError(
            f"losses as a tensor must be 1-D, one entry a task, found shape {list(losses.shape)}"
        )
    if len(losses) == 0:
        raise ValueError("losses must have at least one entry, found none")
    _check_dtype("losses", losses)
    if not losses.requires_grad:
        raise ValueError("losses must have a graph (requires_grad), found a tensor without one")
    for i, edge in enumerate(_stacked_edges(losses, keep_missing=True) or ()):
        if edge is None:
            raise ValueError(f"the loss of task {i!r} must have a graph, found one without")
        if taken_apart and not _EDGES_ARE_ROOTS:
            # Passes through the stack would reach every task's head, with zeros.
            raise ValueError(
                "losses made by torch.stack need torch 2.5 or later, found "
                f"{torch.__version__}; pass the list of losses itself"
            )
    found: Names = tuple(range(len(losses)))
    check_names(found, names)
    return Losses(found, losses.detach(), losses)


def in_order(losses: Mapping[str | int, Any], names: Names | None) -> Mapping[str | int, Any]:
    """The losses in the order of the first step, which is what rows and weights are in.

    Raises:
        TypeError: a key is neither a string nor an integer.
    """
    for key in losses:
        if not isinstance(key, str | int):
            raise TypeError(f"the keys of losses must be strings or integers, found {key!r}")
    if names is None or set(losses) != set(names):
        return losses
    return {name: losses[name] for name in names}


def check_names(found: Names, names: Names | None) -> None:
    """Raises ValueError where the tasks are not those of the steps before."""
    if names is None or found == names:
        return
    if len(found) != len(names):
        raise ValueError(
            f"the number of losses must stay {len(names)} ({_list(names)}), "
            f"found {len(found)} ({_list(found)})"
        )
    raise ValueError(f"the tasks must stay {_list(names)}, found {_list(found)}")


def _list(names: Names) -> str:
    return ", ".join(map(repr, names))


def _check_dtype(what: str, loss: Tensor, *names: str | int) -> None:
    if not loss.dtype.is_floating_point:
        what = what.format(*map(repr, names))
        raise TypeError(f"{what} must be floating-point, found {loss.dtype}")


def check_loss(name: str | int, loss: object) -> None:
    """Raises TypeError or ValueError where a loss is no floating-point scalar with a graph."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss of task {name!r} must be a tensor, found {type(loss).__name__}")
    if loss.dim() != 0:
        raise ValueError(
            f"the loss of task {name!r} must be a scalar (0-dim), found shape "
            f"{list(loss.shape)}; take its mean or sum"
        )
    _check_dtype("the loss of task {}", loss, name)
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of task {name!r} must have a graph (requires_grad), found one without"
        )


def _stacked_edges(losses: Tensor, keep_missing: bool = False) -> list[GradientEdge] | None:
    """The pieces of a 1-D tensor made by `torch.stack`, as edges; None if it was made otherwise."""
    node = losses.grad_fn
    if node is None or node.name() != "StackBackward0":
        return None
    edges = [
        None if piece is None else GradientEdge(piece, output)
        for piece, output in node.next_functions
    ]
    if None in edges and not keep_missing:
        return None
    return edges  # type: ignore[return-value]
