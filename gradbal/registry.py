"""The registry of aggregators: data that creates them, documents them and drives their tests."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from gradbal.aggregators.base import Aggregator

__all__ = ["Info", "Promises", "create", "info", "list_aggregators", "register"]

Heads = Literal["own", "weighted"]


@dataclass(frozen=True)
class Promises:
    """What a method guarantees with its defaults; the test battery checks exactly this.

    Attributes:
        heads: what task-specific parameters get by default, their own gradient or the weighted one.
        degree: k with `A(sJ) = s^k A(J)` for every s > 0; None promises nothing.
        gain: `gain(aggregator, T, norm)` is κ with `A(J) = κ g` when all T rows equal g, `norm`
            being |g|.
        non_conflicting: `⟨A(J), g_i⟩ ≥ 0` for every task.
        simplex: the weights are non-negative and sum to one.
        row_scale_invariant: `A(DJ)` does not depend on the positive diagonal D.
        linear_row_scaling: `A(diag(c) J)` is linear in c > 0.
        continuous: d depends continuously on J; not where a pseudo-inverse's cut-off decides.
        deterministic: two calls with the same input agree; else the generator has to be reset.
        permutation_invariant: d does not depend on the order of the tasks; not where one of them is
            singled out, or ties go to the first.
        zero_rows_inactive: a task whose gradient is zero gets no weight.
        min_tasks: the least T.
        settles: a rounding error of J does not grow; not where an iteration with a long step is
            stopped after a fixed number of rounds.
    """

    heads: Heads = "own"
    degree: float | None = None
    gain: Callable[[Any, int, float], float] | None = None
    non_conflicting: bool = False
    simplex: bool = False
    row_scale_invariant: bool = False
    linear_row_scaling: bool = False
    continuous: bool = True
    deterministic: bool = True
    permutation_invariant: bool = True
    zero_rows_inactive: bool = True
    min_tasks: int = 1
    settles: bool = True


@dataclass(frozen=True)
class Info:
    """One method's entry: `gradbal.info("cagrad")`.

    Attributes:
        name: what `create` and `MultiTaskOptimizer` take.
        kind: "scalarizer", "gramian", "jacobian" or "closure".
        title, venue, year, url: the source.
        consumes: what it looks at: the losses, the Gramian, the Jacobian, ...
        cost: backward passes a step, in words.
        summary: one sentence.
        note: where known implementations or the paper differ: the docstring's `Note:`, or "".
        hyperparameters: keyword → default.
        promises: what the method guarantees.
        cls: the class itself.
    """

    name: str
    kind: str
    title: str
    venue: str
    year: int | None
    url: str
    consumes: str
    cost: str
    summary: str
    cls: type[Aggregator] = field(repr=False)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    promises: Promises = field(default_factory=Promises, repr=False)
    note: str = field(default="", repr=False)


_REGISTRY: dict[str, Info] = {}

_CONSUMES = {
    "scalarizer": "losses",
    "gramian": "Gramian",
    "jacobian": "Jacobian",
    "closure": "closure",
}
_COST = {
    "scalarizer": "1 backward",
    "gramian": "T backwards",
    "jacobian": "T backwards",
    "closure": "as the method says",
}

A = TypeVar("A", bound="Aggregator")


def near_misses(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """`"; did you mean `cagrad`?"`, or nothing when no known name is close."""
    close = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(f'`{c}`' for c in close)}?" if close else ""


def register(
    name: str,
    *,
    title: str = "",
    venue: str = "",
    year: int | None = None,
    url: str = "",
    consumes: str | None = None,
    cost: str | None = None,
    promises: Promises | None = None,
) -> Callable[[type[A]], type[A]]:
    """Class decorator: makes an aggregator available by name, everywhere a name is taken.

    Args:
        name: lower case letters, digits and underscores; not taken yet.
        title, venue, year, url: the source, for `info` and the tables.
        consumes, cost: default to what the class's kind implies.
        promises: what the test battery may hold the method to.

    Raises:
        TypeError: the class is not one of the four kinds of aggregator.
        ValueError: the name is taken or malformed.

    Example:
        >>> import gradbal
        >>> @gradbal.register("first_task_only")
        ... class FirstTaskOnly(gradbal.GramianAggregator):
        ...     "All the weight on the first task."
        ...     def weights(self, gramian, losses=None):
        ...         w = gramian.new_zeros(len(gramian))
        ...         w[0] = 1.0
        ...         return w
        >>> gradbal.create("first_task_only")
        FirstTaskOnly()
        >>> gradbal.registry.unregister("first_task_only")
    """

    def decorate(cls: type[A]) -> type[A]:
        kind = getattr(cls, "category", None)
        if not (inspect.isclass(cls) and kind in _CONSUMES):
            raise TypeError(
                "`register` takes a subclass of Scalarizer, GramianAggregator, JacobianAggregator "
                f"or ClosureAggregator, found {cls!r}"
            )
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"a name must be lower_case_letters_and_digits, found {name!r}")
        if name in _REGISTRY:
            raise ValueError(f"the name {name!r} is taken by {_REGISTRY[name].cls.__qualname__}")
        cls.name = name
        if promises is not None:
            cls.promises = promises
        _REGISTRY[name] = Info(
            name=name,
            kind=kind,
            title=title,
            venue=venue,
            year=year,
            url=url,
            consumes=_CONSUMES[kind] if consumes is None else consumes,
            cost=_COST[kind] if cost is None else cost,
            summary=_first_sentence(cls.__doc__),
            cls=cls,
            hyperparameters=_hyperparameters(cls),
            promises=cls.promises,
            note=_note(cls.__doc__),
        )
        return cls

    return decorate


def unregister(name: str) -> None:
    """Takes a name out of the registry again (notebooks that run a cell twice, tests)."""
    del _REGISTRY[info(name).name]


def list_aggregators(filter: str = "*") -> list[str]:
    """Names of the registered aggregators that match a shell pattern, sorted.

    Example:
        >>> import gradbal
        >>> gradbal.list_aggregators("[cu]*grad")
        ['cagrad', 'upgrad']
    """
    return sorted(fnmatch.filter(_REGISTRY, filter))


def info(name: str) -> Info:
    """The registry's entry of a method.

    Raises:
        ValueError: no such name; the message lists the near misses.

    Example:
        >>> import gradbal
        >>> gradbal.info("cagrad").hyperparameters
        {'c': 0.5, 'rescale': 1}
    """
    if name not in _REGISTRY:
        raise ValueError(
            f"unknown aggregator {name!r}{near_misses(name, _REGISTRY)} "
            f"Known: {', '.join(sorted(_REGISTRY))}"
        )
    return _REGISTRY[name]


def create(name: str, **hyperparameters: Any) -> Aggregator:
    """A new aggregator by name.

    Args:
        name: one of `list_aggregators()`.
        **hyperparameters: see `info(name).hyperparameters`.

    Raises:
        ValueError: unknown name, or a hyperparameter out of its range.
        TypeError: unknown keyword; the message lists the near misses.

    Example:
        >>> import gradbal
        >>> gradbal.create("cagrad", c=0.4)
        CAGrad(c=0.4, rescale=1)
    """
    entry = info(name)
    unknown = [k for k in hyperparameters if k not in entry.hyperparameters]
    if unknown:
        takes = ", ".join(f"{k}={v!r}" for k, v in entry.hyperparameters.items()) or "none"
        raise TypeError(
            f"{name!r} has no keyword `{unknown[0]}`"
            f"{near_misses(unknown[0], entry.hyperparameters)} It takes: {takes}"
        )
    return entry.cls(**hyperparameters)


def _hyperparameters(cls: type) -> dict[str, Any]:
    signature = inspect.signature(cls)
    return {name: p.default for name, p in signature.parameters.items()}


def _first_sentence(doc: str | None) -> str:
    text = " ".join((doc or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.])\s", text)[0].rstrip(".") if text else ""


def _note(doc: str | None) -> str:
    found = re.search(r"^Note:\n((?:[ ]+.*\n?|\n)+)", inspect.cleandoc(doc or ""), re.MULTILINE)
    return " ".join(found[1].split()) if found else ""
