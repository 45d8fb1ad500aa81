"""Checks of hyperparameters and T: what is required, and what was found."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gradbal.solvers import Array

__all__ = ["finite_numbers", "in_range", "integer", "one_of", "preference", "same_tasks"]


def preference(name: str, value: Any, n_tasks: int | None, default: float) -> Array:
    """A vector of non-negative weights, one for each task; `default` everywhere when None.

    Without `n_tasks` the length is left open.

    Raises:
        ValueError: wrong length, negative or not finite.
    """
    if value is None:
        return np.full(n_tasks or 0, default)
    try:
        p = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be a sequence of numbers, found {value!r}") from None
    if p.ndim != 1:
        raise ValueError(f"`{name}` must be a sequence of numbers, found {value!r}")
    if n_tasks is not None and len(p) != n_tasks:
        raise ValueError(
            f"`{name}` must have one entry for each of {n_tasks} tasks, found {len(p)}"
        )
    if not (np.isfinite(p).all() and (p >= 0).all()):
        raise ValueError(f"`{name}` must be non-negative and finite, found {p.tolist()}")
    return p


def finite_numbers(name: str, value: Any) -> Array:
    """A vector of finite numbers of any sign, at least one.

    Raises:
        ValueError: it is not.
    """
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.zeros(0)
    if found.ndim != 1 or len(found) == 0 or not np.isfinite(found).all():
        raise ValueError(f"`{name}` must be a sequence of finite numbers, found {value!r}")
    return found


def in_range(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, bounds: str = "[]"
) -> None:
    """Checks a hyperparameter: a real number between `low` and `high`, `bounds` as in intervals.

    Raises:
        TypeError: not a number.
        ValueError: out of range or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number, found {value!r}")
    above = value >= low if bounds[0] == "[" else value > low
    below = value <= high if bounds[1] == "]" and high < math.inf else value < high
    if not (above and below):
        end = bounds[1] if high < math.inf else ")"
        raise ValueError(f"`{name}` must be in {bounds[0]}{low:g}, {high:g}{end}, found {value!r}")


def integer(name: str, value: Any, low: int = 0) -> None:
    """Checks a hyperparameter: an integer from `low` on.

    Raises:
        TypeError: not an integer.
        ValueError: below `low`.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, found {value!r}")
    in_range(name, value, low)


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Checks a hyperparameter that is one of a few values.

    Raises:
        ValueError: another value; the message lists the choices.
    """
    if not any(value is c or (type(value) is type(c) and value == c) for c in choices):
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, choices))}, found {value!r}"
        )


def same_tasks(name: str, known: int, n_tasks: int) -> None:
    """Checks that a method meets as many tasks as it has state for; 0 where it has none yet.

    Raises:
        ValueError: it does not.
    """
    if known not in (0, n_tasks):
        raise ValueError(f"`{name}` has {known} tasks, found {n_tasks}")
