"""What is live from step to step: tensors, their bytes, and what the allocator is left with."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gradbal import MultiTaskOptimizer
from gradbal.jacobian import ENGINES

__all__ = ["WINDOW", "Curve", "Training", "live", "lost_bytes", "measure", "net_bytes"]

WINDOW = 12
"""Steps at the end over which allocations are weighed against what is given back: a multiple of the
period of any that are alike."""


def live() -> tuple[int, int]:
    """How many tensors Python knows of, and the bytes of their memory, each counted once."""
    # What has finalizers goes in the next round.
    for _ in range(4):
        if not gc.collect():
            break
    count, sizes = 0, {}
    for found in gc.get_objects():
        # Not `isinstance`, which asks objects for their `__class__`; nor the compiler's tensors
        # without memory, of which some outlive it.
        if type(found) in (Tensor, nn.Parameter) and found.layout == torch.strided:
            count += 1
            for tensor in (found, found.grad if found.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
    return count, sum(sizes.values())


def lost_bytes(step: Callable[[], object]) -> int:
    """What twelve steps allocate on the host and do not give back, whoever holds it: graphs hold
    tensors that Python does not know of."""

    def steps() -> None:
        for _ in range(WINDOW):
            step()

    # That memory from before is given back is not counted, so that the first steps only begin.
    net_bytes(steps)
    return net_bytes(steps)


def net_bytes(run: Callable[[], object]) -> int:
    """What `run` allocates on the host beyond what it gives back of it."""
    # Kineto reports on stderr that there is no driver, and every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
        gc.collect()
    found: Any = profiler.profiler
    events = found.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


class Training:
    """A small model under `upgrad` and SGD with momentum; for jacobian="auto" one that is large
    enough for it to try engines.

    Args:
        engine: one of `gradbal.jacobian.ENGINES`; "instance" takes the losses of the instances.
        **options: of `MultiTaskOptimizer`.
    """

    def __init__(self, engine: str, **options: Any) -> None:
        torch.manual_seed(0)
        width = 384 if engine == "auto" else 32
        trunk = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 64), nn.Tanh())
        self.model = nn.ModuleList([trunk, *(nn.Linear(64, 1) for _ in range(3))])
        self.batch = torch.randn(8, 64)
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        aggregator = options.pop("aggregator", "upgrad")
        self.opt = MultiTaskOptimizer(sgd, aggregator, jacobian=engine, **options)
        self._takes_instances = engine == "instance"

    def losses(self) -> Any:
        """Of three tasks, or of eight instances."""
        trunk, *heads = self.model
        z = trunk(self.batch)
        if self._takes_instances:
            return torch.cat([head(z) for head in heads], 1).square().mean(1)
        return [(head(z) - i).square().mean() for i, head in enumerate(heads)]

    def step(self) -> None:
        """One step, from gradients cleared to parameters moved."""
        self.opt.zero_grad()
        self.opt.backward(self.losses())
        self.opt.step()


@dataclass(frozen=True)
class Curve:
    """One engine's. live: (tensors, bytes) at each of the counted steps, beyond what was there
    before the model. lost: bytes that the allocator is short of after twelve more."""

    engine: str
    live: list[tuple[int, int]]
    lost: int


def measure(counts: Sequence[int], engines: Sequence[str] = ENGINES) -> Iterator[Curve]:
    """The curve of each engine.

    Args:
        counts: numbers of steps, rising.
        engines: of `gradbal.jacobian.ENGINES`.
    """
    for engine in engines:
        before = live()
        training = Training(engine)
        done, found = 0, []
        for count in counts:
            for _ in range(count - done):
                training.step()
            done = count
            now = live()
            found.append((now[0] - before[0], now[1] - before[1]))
        lost = lost_bytes(training.step)
        # The next engine starts without it.
        del training
        yield Curve(engine, found, lost)
