"""From the Jacobian to what the host knows of it, who takes part, and their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradbal._balancer.call import Examined, Pending
from gradbal._balancer.tensors import rows_of, spread_out, unscaled
from gradbal._nonfinite import HostValues, NonFiniteError
from gradbal.aggregators.base import (
    DoubleSamplingAggregator,
    GramianAggregator,
    JacobianAggregator,
)
from gradbal.distributed import Spread
from gradbal.jacobian import Rows

if TYPE_CHECKING:
    from gradbal._balancer.balancer import Balancer

__all__ = ["examine", "gain_of", "head_factors", "taking_part", "to_host", "weights_of"]


def to_host(
    balancer: Balancer, rows: Rows, values: Tensor, scale: Tensor | None, spread: Spread = "rows"
) -> tuple[Tensor, HostValues]:
    """G `[T, T]` (`[K, T, T]` for K column groups) without the scale; what the host has."""
    jacobian, widths = rows.jacobian, None
    if isinstance(balancer.aggregator, JacobianAggregator) and rows is balancer.rows:
        spread = "nothing"
    if isinstance(balancer.aggregator, GramianAggregator) and rows is balancer.rows:
        widths = balancer.aggregator.column_groups(rows.shapes)
        probed = balancer.aggregator.probed_parameters()
        if probed is not None:
            jacobian = rows.columns(probed)
    if widths is None and jacobian is rows.jacobian and balancer.processes.alone:
        product = rows.product_of_few()
        if product is not None:
            g = unscaled(product, scale)
            return g, HostValues(g, values, rows.head_extremes() if rows.has_heads else None)
    parts = [jacobian] if widths is None else list(torch.split(jacobian, widths, 1))

    def take(exact: bool) -> tuple[Tensor, HostValues]:
        products, extremes = balancer.processes.products(
            parts, rows.head_extremes(), exact=exact, spread=spread
        )
        found = [unscaled(product, scale) for product in products]
        g = found[0] if widths is None else torch.stack(found)
        return g, HostValues(g, values, extremes)

    g, host = take(False)
    on_host = host.gramian.view(-1, len(jacobian), len(jacobian))
    return take(True) if balancer.processes.wants_exact(on_host, parts) else (g, host)


def examine(
    balancer: Balancer,
    g: Tensor,
    host: HostValues,
    overflow: Callable[[], None],
    pending: Pending,
    scale: Tensor | None,
) -> Examined | bool:
    """Who takes part; or what `backward` returns, where an overflow was delivered or the step
    is left out."""
    assert balancer.tasks is not None
    bad = [i for i in host.bad if i not in pending.absent]
    if bad and scale is not None:
        # GradScaler finds these, skips the step and lowers its scale.
        overflow()
        balancer.give_up_pending()
        return True
    if bad and balancer.nonfinite == "raise":
        raise NonFiniteError("losses and gradients", [balancer.tasks[i] for i in bad])
    absent = pending.absent | frozenset(bad)
    if bad and (balancer.nonfinite == "skip" or len(absent) == len(balancer.tasks)):
        return False
    if absent:
        g = g.clone()
        out = list(absent)
        g[..., out, :] = g[..., :, out] = 0.0
    present = [i for i in range(len(balancer.tasks)) if i not in absent]
    return Examined(g if g.dim() == 2 else g.sum(0), host, present, absent)


def weights_of(balancer: Balancer, host: HostValues, present: list[int]) -> tuple[Tensor, Tensor]:
    """Weights and head weights `[T]`, float64 on the host, the same object where the same."""
    aggregator, n_tasks = balancer.aggregator, len(host.losses)
    values = rows_of(host.losses, present)
    g = host.gramian if len(present) == n_tasks else host.gramian[present][:, present]
    keyword = taking_part(balancer, present)
    if isinstance(aggregator, GramianAggregator):
        found = aggregator.weights(g, values, **keyword).double()
        found_heads = aggregator.head_weights(found, g).double()
    else:
        assert isinstance(aggregator, DoubleSamplingAggregator)
        found = found_heads = aggregator.step(g, **keyword).double()
    gain = gain_of(balancer, present)
    if found_heads is found and gain == 1.0:
        w = found if len(present) == n_tasks else spread_out(found, values, present, n_tasks)
        return w, w
    w = spread_out(found * gain, values, present, n_tasks)
    return w, spread_out(found_heads, values, present, n_tasks)


def gain_of(balancer: Balancer, present: list[int]) -> float:
    """What the shared gradient is multiplied by under `match_sum`."""
    return float(len(present)) if balancer.match_sum else 1.0


def head_factors(
    balancer: Balancer, head_weights: Tensor, present: list[int]
) -> list[float | Tensor | None]:
    """What each task's own gradients are multiplied by; None for tasks that sit out."""
    assert balancer.tasks is not None
    if balancer.heads == "own":
        found: Sequence[float | Tensor] = [1.0] * len(balancer.tasks)
    else:
        on_host = head_weights.device.type == "cpu"
        found = head_weights.tolist() if on_host else head_weights.unbind()
    factors: list[float | Tensor | None] = [None] * len(balancer.tasks)
    for i in present:
        factors[i] = found[i]
    return factors


def taking_part(balancer: Balancer, present: list[int]) -> dict[str, Any]:
    """The keyword for a method that has to know which tasks take part, when not all do."""
    assert balancer.tasks is not None
    if balancer.aggregator.per_task_state and len(present) < len(balancer.tasks):
        return {"tasks": present}
    return {}
