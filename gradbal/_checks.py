"""What a MultiTaskOptimizer is made and called with: requirements, and what was found."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from gradbal._lazy import LazyLosses, are_functions
from gradbal._losses import Losses, Names
from gradbal.aggregators._arguments import one_of
from gradbal.aggregators.base import (
    Aggregator,
    BilevelAggregator,
    ClosureAggregator,
    DoubleSamplingAggregator,
    GramianAggregator,
    JacobianAggregator,
    Scalarizer,
)
from gradbal.jacobian import WITHOUT_ROWS, Engine, takes_rows
from gradbal.registry import create

__all__ = [
    "check_all_there",
    "check_call",
    "check_closures",
    "check_fit",
    "check_in_closure",
    "check_jacobian_dtype",
    "check_lazy",
    "check_options",
    "check_positive",
    "check_shared",
    "check_tasks",
    "check_transform",
    "make_aggregator",
]


def check_shared(shared: Iterable[Tensor] | None, optimizer: Optimizer) -> list[Tensor] | None:
    """The shared parameters as a list, all of them the optimizer's; None as it is."""
    if shared is None:
        return None
    chosen = list(shared)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    strangers = sum(1 for p in chosen if id(p) not in known)
    if not chosen or strangers:
        raise ValueError(
            "`shared_params` must be parameters of the wrapped optimizer, found "
            + (f"{strangers} of {len(chosen)} that are not" if chosen else "none")
        )
    return chosen


def check_tasks(mine: Names | None, theirs: Sequence[str | int] | None) -> None:
    """Whether a checkpoint is of the same tasks, where both know them."""
    if mine is not None and theirs is not None and tuple(theirs) != mine:
        raise ValueError(f"the checkpoint must be of tasks {list(mine)}, found {list(theirs)}")


def check_transform(mine: str | None, theirs: str | None) -> None:
    """Whether a checkpoint's losses, in means and the like, were seen in the same way."""
    if mine != theirs:
        raise ValueError(f"the checkpoint must be of loss_transform={mine!r}, found {theirs!r}")


def check_positive(names: Sequence[str | int], losses: Tensor) -> None:
    """Whether all losses have a logarithm; `losses [T]`."""
    for name, value in zip(names, losses.tolist(), strict=True):
        if value <= 0:
            raise ValueError(
                f'loss_transform="log" needs positive losses, found {value:g} for task {name!r}; '
                "add an offset to that loss"
            )


def make_aggregator(aggregator: str | Aggregator, kwargs: dict[str, Any]) -> Aggregator:
    """The named aggregator, or the instance."""
    if isinstance(aggregator, str):
        made = create(aggregator, **kwargs)
    elif isinstance(aggregator, Aggregator):
        if kwargs:
            raise TypeError(
                "keywords of an aggregator go with its name, found "
                f"{', '.join(kwargs)} beside an instance"
            )
        made = aggregator
    else:
        raise TypeError(
            f"`aggregator` must be a name or an Aggregator, found {type(aggregator).__name__}"
        )
    return made


def check_fit(
    aggregator: Aggregator,
    heads: Any,
    update_every: int,
    match_sum: Any,
    loss_transform: Any,
    nonfinite: Any,
) -> None:
    """Options that not every method can serve."""
    name = aggregator.name
    if isinstance(aggregator, JacobianAggregator):
        if heads == "weighted" and not aggregator.weighted:
            raise ValueError(
                f"heads must be 'own' for {name!r}, which has no weights, found 'weighted'"
            )
        if update_every != 1 and not aggregator.combines:
            raise ValueError(
                f"update_every must be 1 for {name!r}, which has no weights to use again, "
                f"found {update_every}"
            )
    if loss_transform == "log" and aggregator.logarithmic:
        raise ValueError(
            f"loss_transform must be None for {name!r}, which takes the logarithms of the losses "
            "itself, found 'log'"
        )
    if isinstance(aggregator, BilevelAggregator):
        found = {
            "heads": heads or "weighted",
            "update_every": update_every,
            "loss_transform": loss_transform,
        }
        for option, wanted in (
            ("heads", "weighted"),
            ("update_every", 1),
            ("loss_transform", None),
        ):
            if found[option] != wanted:
                raise ValueError(
                    f"{option} must be {wanted!r} for {name!r}, which weights losses of all "
                    f"parameters alike at every step, found {found[option]!r}"
                )
        if nonfinite == "drop":
            raise ValueError(f"nonfinite must be 'raise' or 'skip' for {name!r}, found 'drop'")
    elif (
        isinstance(aggregator, ClosureAggregator)
        and isinstance(aggregator, Scalarizer)
        and loss_transform is not None
    ):
        raise ValueError(
            f"loss_transform must be None for {name!r}, which compares losses from one evaluation "
            f"to the next, found {loss_transform!r}"
        )
    one_of("match_sum", match_sum, (False, True))
    gain = aggregator.promises.gain
    if match_sum and (
        gain is None or len({gain(aggregator, t, n) for t in (2, 3) for n in (1, 2)}) > 1
    ):
        raise ValueError(
            f"match_sum must be False for {name!r}, whose gradient has a scale of its own, "
            "found True"
        )


def check_options(
    heads: Any, update_every: Any, loss_transform: Any, nonfinite: Any, group: Any
) -> None:
    """Whether every option is one of its values."""
    one_of("heads", heads, (None, "own", "weighted"))
    if isinstance(update_every, bool) or not isinstance(update_every, int) or update_every < 1:
        raise ValueError(f"`update_every` must be a positive integer, found {update_every!r}")
    one_of("loss_transform", loss_transform, (None, "log"))
    one_of("nonfinite", nonfinite, ("raise", "skip", "drop"))
    if group is None or group == "local":
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            '`process_group` must be a torch.distributed.ProcessGroup, "local" or None, found '
            f"{type(group).__name__}"
        )


def check_batch_size(batch_size: Any, n_tasks: int) -> None:
    """Whether it is a number that is not negative, or one for each task."""
    if batch_size is None:
        return
    sizes = [batch_size] if isinstance(batch_size, int | float) else list(batch_size)
    fits = isinstance(batch_size, int | float) or len(sizes) == n_tasks
    if fits and all(0 <= float(size) < float("inf") for size in sizes):
        return
    raise ValueError(
        f"`batch_size` must be a number, 0 or more, or {n_tasks} of them, one for each task, "
        f"found {batch_size!r}"
    )


def check_jacobian_dtype(dtype: Any, jacobian: str, optimizer: Optimizer) -> None:
    """Whether rows of these parameters can be kept in that dtype."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"`jacobian_dtype` must be a torch.dtype or None, found {dtype!r}")
    if jacobian in WITHOUT_ROWS:
        raise ValueError(
            f'`jacobian_dtype` must be None for jacobian="{jacobian}", which keeps no rows, '
            f"found {dtype}"
        )
    if dtype == torch.float16:
        raise ValueError(
            "`jacobian_dtype` must be torch.bfloat16, found torch.float16, in which gradients "
            "below 6e-8 vanish and those above 65504 are inf"
        )
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"`jacobian_dtype` must be torch.bfloat16, torch.float32 or None, found {dtype}"
        )
    widest = functools.reduce(
        torch.promote_types, (p.dtype for group in optimizer.param_groups for p in group["params"])
    )
    if dtype != widest and dtype.itemsize >= widest.itemsize:
        raise ValueError(
            f"`jacobian_dtype` must be narrower than the parameters' {widest}, found {dtype}"
        )


def check_all_there(aggregator: Aggregator, batches: Sequence[Losses | LazyLosses]) -> None:
    """Whether no loss is None, for a method that cannot do without."""
    found = sorted({i for batch in batches for i in batch.lacking})
    if found:
        raise ValueError(
            f"{aggregator.name!r} compares batches loss by loss: every loss must be there, found "
            f"None for task {', '.join(repr(batches[0].names[i]) for i in found)}; leave such a "
            "step out"
        )


def check_call(
    aggregator: Aggregator,
    features: Any,
    independent: Sequence[Any],
    accumulate: bool,
    in_closure: bool,
    instances: bool,
) -> None:
    """Whether the method gets what it consumes, and nothing that it does not."""
    name = aggregator.name
    if instances and (accumulate or features is not None):
        raise ValueError(
            "with jacobian='instance' a batch's instances are weighted at once and over all "
            f"parameters, found {'accumulate=True' if accumulate else '`features`'}"
        )
    if isinstance(aggregator, BilevelAggregator):
        raise ValueError(
            f"{name!r} looks at validation losses: call step(closure, val_closure), found a "
            "call of `backward`"
        )
    if isinstance(aggregator, ClosureAggregator) and aggregator.looks_around and not in_closure:
        raise ValueError(
            f"{name!r} evaluates the losses at other points: call step(closure), found a call "
            "of `backward`"
        )
    if features is None and aggregator.needs_features:
        raise ValueError(
            f"{name!r} works on gradients at a representation: call "
            "backward(losses, features=z), found no `features`"
        )
    if features is not None:
        if not (aggregator.needs_features or isinstance(aggregator, GramianAggregator)):
            raise ValueError(f"{name!r} takes no `features`, found some")
        if not isinstance(features, Tensor):
            raise TypeError(f"`features` must be a tensor, found {type(features).__name__}")
        if not features.requires_grad:
            raise ValueError("`features` must have a graph (requires_grad), found none")
        if accumulate:
            raise ValueError(
                "`features` cannot be gathered with accumulate=True: their graph would have to "
                "stay until the weights are known"
            )
    wanted = 1
    if isinstance(aggregator, DoubleSamplingAggregator):
        wanted = aggregator.n_batches
    if len(independent) != wanted - 1:
        raise ValueError(
            f"{name!r} takes {wanted} independent batches a step, so `independent` must have "
            f"{wanted - 1} collections of losses, found {len(independent)}"
        )
    if independent and accumulate:
        raise ValueError("independent batches cannot be gathered with accumulate=True")


def check_lazy(aggregator: Aggregator, engine: Engine, features: Any) -> None:
    """Whether losses can be evaluated one after another."""
    if features is not None:
        raise ValueError(
            "`features` need the losses themselves, which all start from them, found functions"
        )
    if isinstance(aggregator, GramianAggregator) and not takes_rows(engine):
        raise ValueError(
            f"the engine {engine.name!r} goes through all losses' graphs twice, while losses given "
            'as functions are there one at a time; use jacobian="loop"'
        )


def check_in_closure(aggregator: Aggregator, losses: Any) -> None:
    """Whether the method can do with functions from the closure."""
    looks = isinstance(aggregator, ClosureAggregator) and aggregator.looks_around
    if (looks or isinstance(aggregator, BilevelAggregator)) and are_functions(losses):
        raise ValueError(
            f"{aggregator.name!r} needs all losses at once: the closure must return the losses, "
            "found functions"
        )
    if looks or isinstance(aggregator, BilevelAggregator):
        found = [*losses.values()] if isinstance(losses, Mapping) else losses
        if isinstance(found, list | tuple) and any(loss is None for loss in found):
            raise ValueError(
                f"{aggregator.name!r} needs all losses at every step, found None for "
                f"{sum(loss is None for loss in found)} of {len(found)}; leave such a step out"
            )


def check_closures(aggregator: Aggregator, closure: Any, val_closure: Any) -> None:
    """Whether the method gets the closures that it needs, and no others."""
    name = aggregator.name
    if isinstance(aggregator, BilevelAggregator):
        missing = [
            word
            for word, given in (("closure", closure), ("val_closure", val_closure))
            if given is None
        ]
        if missing:
            raise ValueError(
                f"{name!r} looks at validation losses: call step(closure, val_closure), found "
                f"no {' and no '.join(missing)}"
            )
    elif val_closure is not None:
        raise ValueError(f"{name!r} has no use for a `val_closure`, found one")
    if isinstance(aggregator, DoubleSamplingAggregator) and aggregator.n_batches > 1 and closure:
        raise ValueError(
            f"{name!r} takes independent batches: call backward(losses, independent=...) and "
            "step(), found a closure"
        )
    if isinstance(aggregator, ClosureAggregator) and aggregator.looks_around and not closure:
        raise ValueError(
            f"{name!r} evaluates the losses at other points: call step(closure), found no closure"
        )
