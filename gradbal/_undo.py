"""Steps that are taken wholly or not at all, whatever is raised on their way."""

from __future__ import annotations

import copy
import importlib
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

__all__ = [
    "Reference",
    "UndoneOnErrors",
    "interrupts_held_back",
    "may_ask_again",
    "parameters_remembered",
    "remembered",
]


try:
    # What `signal` is made of. To turn a handler into an enum takes that module forty times as long
    # as to set it, up to Python 3.11, and it is set twice a step.
    _signals: Any = importlib.import_module("_signal")
except ImportError:
    _signals = signal

_SIGINT = int(signal.SIGINT)

# What most attributes are: nothing that changes in its place.
_PLAIN = frozenset([bool, int, float, str, type(None), tuple, frozenset, Tensor])


class Reference:
    """A thing that belongs to its process: copies of the holder have the same one.

    Args:
        thing: anything; None is nothing.
    """

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __deepcopy__(self, memo: dict[int, Any]) -> Reference:
        return self


def remembered(thing: Any, *, but: Sequence[str] = ()) -> Callable[[], None]:
    """What puts the attributes of an object back as they are now, all but some.

    They are remembered by reference, lists and dicts by their entries: it costs next to nothing.
    """
    before = vars(thing).copy()
    for name in but:
        before.pop(name, None)
    others = [v for v in before.values() if type(v) not in _PLAIN]
    entries = [(v, v.copy()) for v in others if isinstance(v, (list, dict))]

    def put_back() -> None:
        current = vars(thing)
        for name in [name for name in current if name not in before and name not in but]:
            del current[name]
        current.update(before)
        for collection, kept in entries:
            collection.clear()
            (collection.extend if isinstance(collection, list) else collection.update)(kept)

    return put_back


class UndoneOnErrors:
    """After an error within, or an interrupt, everything is put back.

    Args:
        put_back: what `remembered` and the like have returned.
        wanted: whether it is to be put back, asked after the error.
    """

    def __init__(self, put_back: Sequence[Callable[[], None]], wanted: Callable[[], bool]) -> None:
        self._put_back, self._wanted = put_back, wanted

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._wanted():
            with interrupts_held_back():
                for each in self._put_back:
                    each()


class interrupts_held_back:
    """Ctrl-C waits until what is within is done; a second one does not wait.

    A `KeyboardInterrupt` in the middle of an optimizer's loop over parameters would leave some of
    them moved and others not.
    """

    def __enter__(self) -> None:
        self._waiting: list[tuple[int, FrameType | None]] = []
        self._handler: Any = None
        handler = _signals.getsignal(_SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(handler):
            self._handler = handler
            _signals.signal(_SIGINT, self._wait)

    def _wait(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._handler(number, frame)
        self._waiting.append((number, frame))

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            _signals.signal(_SIGINT, self._handler)
            if self._waiting:
                self._handler(*self._waiting[0])


def may_ask_again(optimizer: Optimizer) -> bool:
    """Whether its step may evaluate a closure at moved parameters: LBFGS, and those that are not
    torch's own (SAM)."""
    return isinstance(optimizer, LBFGS) or not type(optimizer).__module__.startswith("torch.optim")


def parameters_remembered(optimizer: Optimizer) -> Callable[[], None]:
    """What puts parameters and optimizer state back as they are now; takes a copy of them."""
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    homes = [p.detach().clone() for p in parameters]
    # The keys are the parameters themselves.
    state = copy.deepcopy(dict(optimizer.state), {id(p): p for p in parameters})

    def put_back() -> None:
        for p, home in zip(parameters, homes, strict=True):
            p.data.copy_(home)
        optimizer.state.clear()
        optimizer.state.update(state)

    return put_back
