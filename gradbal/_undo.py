"""Steps that are taken wholly or not at all, whatever is raised on their way."""

from __future__ import annotations

import contextlib
import copy
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

__all__ = [
    "Reference",
    "interrupts_held_back",
    "may_ask_again",
    "parameters_remembered",
    "remembered",
]


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
    before = {k: v for k, v in vars(thing).items() if k not in but}
    entries = [(v, copy.copy(v)) for v in before.values() if isinstance(v, list | dict)]

    def put_back() -> None:
        current = vars(thing)
        for name in [name for name in current if name not in before and name not in but]:
            del current[name]
        current.update(before)
        for collection, kept in entries:
            collection.clear()
            (collection.extend if isinstance(collection, list) else collection.update)(kept)

    return put_back


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits until what is within is done; a second one does not wait.

    A `KeyboardInterrupt` in the middle of an optimizer's loop over parameters would leave some of
    them moved and others not.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []

    def wait(number: int, frame: FrameType | None) -> None:
        if waiting:
            handler(number, frame)
        waiting.append((number, frame))

    try:
        signal.signal(signal.SIGINT, wait)
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[0])


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
