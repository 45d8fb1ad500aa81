"""Names of tasks, and the names that their modules have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from gradbal.registry import near_misses

__all__ = ["check_heads", "check_known", "check_names", "module_key"]

_TAKEN = frozenset(dir(nn.ModuleDict()))


def module_key(task: str) -> str:
    """What a task is called in an `nn.ModuleDict`: its name, where torch allows that.

    A module's name has no dots and is no attribute of the dict, such as `"keys"`. What is not
    allowed is percent-encoded, as in addresses, so that no two tasks have the same key.

    Example:
        >>> module_key("age"), module_key("head.left"), module_key("type")
        ('age', 'head%2Eleft', '%74ype')
    """
    key = task.replace("%", "%25").replace(".", "%2E")
    return f"%{ord(key[0]):X}{key[1:]}" if key in _TAKEN else key


def check_names(tasks: Any) -> tuple[str, ...]:
    """The names of the tasks.

    Raises:
        TypeError: they are not a sequence of strings.
        ValueError: there is none, one is empty, or one occurs twice.
    """
    if isinstance(tasks, str) or not isinstance(tasks, Sequence):
        raise TypeError(f"`tasks` must be a sequence of names, found {tasks!r}")
    wrong = [task for task in tasks if not isinstance(task, str)]
    if wrong:
        raise TypeError(f"`tasks` must be strings, found {wrong[0]!r}")
    if not tasks or "" in tasks:
        raise ValueError(f"`tasks` must be names of at least one task, found {list(tasks)}")
    twice = sorted({task for task in tasks if tasks.count(task) > 1})
    if twice:
        raise ValueError(f"`tasks` must differ from each other, found {twice[0]!r} twice")
    return tuple(tasks)


def check_known(task: Any, tasks: Iterable[str], what: str = "`task`") -> str:
    """The name itself, if it is one of them.

    Raises:
        ValueError: it is not; close names are named.
    """
    known = list(tasks)
    if task not in known:
        raise ValueError(
            f"{what} must be one of {', '.join(map(repr, known))}, found {task!r}"
            + near_misses(task, known)
        )
    return str(task)


def check_heads(heads: Any, tasks: Sequence[str]) -> dict[str, nn.Module]:
    """The heads in the order of the tasks, one for each.

    Raises:
        TypeError: not a mapping of modules.
        ValueError: a task has no head, or a head no task.
    """
    if not isinstance(heads, Mapping | nn.ModuleDict):
        raise TypeError(f"`heads` must be a dict from task to module, found {type(heads).__name__}")
    found = dict(heads.items())
    for name, head in found.items():
        check_known(name, tasks, "a key of `heads`")
        if not isinstance(head, nn.Module):
            raise TypeError(
                f"`heads` must be modules, found {type(head).__name__} for task {name!r}"
            )
    missing = [task for task in tasks if task not in found]
    if missing:
        raise ValueError(
            f"`heads` must have one module for each task, found none for "
            f"{', '.join(map(repr, missing))}"
        )
    return {task: found[task] for task in tasks}
