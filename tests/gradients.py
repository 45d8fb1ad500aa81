"""The gradients that a model should get, from plain `torch.autograd.grad`, one task at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import gradbal

Rows = list[dict[str, Tensor]]


def task_gradients(
    model: nn.Module, forward: Callable[[nn.Module], Sequence[Tensor]]
) -> tuple[Rows, Tensor]:
    """For each loss the gradients of the parameters it reaches, on a copy; and the losses."""
    twin = copy.deepcopy(model)
    named = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    with torch.random.fork_rng():
        losses = forward(twin)
    rows = []
    for l in losses:
        grads = torch.autograd.grad(l, list(named.values()), retain_graph=True, allow_unused=True)
        rows.append({n: g for n, g in zip(named, grads, strict=True) if g is not None})
    return rows, torch.stack([l.detach().double() for l in losses])


def shared_names(rows: Rows) -> list[str]:
    """What two or more losses reach; with one loss, all that it reaches."""
    names = list(dict.fromkeys(n for row in rows for n in row))
    return [n for n in names if sum(n in row for row in rows) >= min(2, len(rows))]


def jacobian(rows: Rows, names: Sequence[str]) -> Tensor:
    """`[T, P]` in float64, zero where a loss does not reach."""
    shapes = {n: row[n] for row in rows for n in row}
    parts = [[row.get(n, torch.zeros_like(shapes[n])).reshape(-1) for n in names] for row in rows]
    return torch.stack([torch.cat([p.double() for p in part]) for part in parts])


def expected(
    aggregator: gradbal.Aggregator, rows: Rows, losses: Tensor, heads: str | None
) -> dict[str, Tensor]:
    """Name → gradient, in float64. `aggregator` is used up: pass a copy."""
    names = shared_names(rows)
    j = jacobian(rows, names)
    again = copy.deepcopy(aggregator)
    flat = aggregator.direction(j, losses)
    sizes = {n: g.shape for row in rows for n, g in row.items()}
    parts = flat.split([sizes[n].numel() for n in names])
    result = {n: part.view(sizes[n]) for n, part in zip(names, parts, strict=True)}
    w = torch.ones(len(rows), dtype=torch.float64)
    if (heads or gradbal.info(aggregator.name).promises.heads) == "weighted":
        if isinstance(again, gradbal.Scalarizer):
            w = again.loss_weights(losses)
        elif isinstance(again, gradbal.JacobianAggregator):
            again.direction(j, losses)
            w = again.last_head_weights.double()
        else:
            g = j @ j.T
            w = again.head_weights(again.weights(g, losses), g)
    for i, row in enumerate(rows):
        result.update({n: w[i] * g.double() for n, g in row.items() if n not in names})
    return result


def assert_gradients(model: nn.Module, want: dict[str, Tensor], tolerance: float) -> None:
    """`.grad` is `want`, in the parameter's dtype, and None for every other parameter."""
    scale = max(float(g.abs().max()) for g in want.values())
    for name, p in model.named_parameters():
        if name not in want:
            assert p.grad is None, f"{name} got a gradient"
            continue
        assert p.grad is not None, f"{name} got no gradient"
        assert p.grad.dtype == p.dtype
        error = float((p.grad.double() - want[name]).abs().max())
        assert error <= tolerance * scale, f"{name}: off by {error:g} of {scale:g}"
