"""CPU time, memory, operators and host reads of `backward` with each engine, beside the floor, the
plain sum and TorchJD."""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks.errors import MissingExtra
from benchmarks.speed.contestants import (
    AUTOGRAM,
    BARE,
    PLAIN,
    TORCHJD,
    Contestant,
    available_engines,
    contestant,
    opponents,
)
from benchmarks.speed.counting import Allocations, Operators, host_reads
from benchmarks.speed.models import MODELS, Heads

__all__ = ["Cell", "Plan", "Row", "measure"]

GIB = 2**30
_FEWEST_ROUNDS = 3
_WARM_UP_ROUNDS = 2

Rounds = list[dict[str, float]]
"""For each round, contestant → seconds."""


@dataclass(frozen=True)
class Plan:
    """What is measured, and how.

    models: keys of `MODELS`. task_counts: values of T. engines: values of `jacobian=`; all that are
    there if empty. rounds: measured rounds, at least 1. threads: numbers of torch's threads.
    method: of both libraries. device: where it runs. seconds: of CPU time, after which a cell
    begins no more rounds, though it makes three. memory: GiB of tensors that a cell may use at
    once.
    """

    models: Sequence[str] = ("mlp", "conv", "transformer")
    task_counts: Sequence[int] = (3, 11)
    engines: Sequence[str] = ()
    rounds: int = 21
    threads: Sequence[int] = (1,)
    method: str = "upgrad"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: float = 20.0
    memory: float = 6.0


@dataclass(frozen=True)
class Row:
    """One contestant in one cell; None where something does not apply or did not work.

    engine: the one that ran. over_bare, over_plain, over_torchjd, over_best: medians over the
    rounds of its time over that of the T bare passes, of the plain sum, and of TorchJD in its
    default and its best setting. memory: bytes at the peak above those of the bare passes, over the
    bytes of T·P floats. operators: dispatched, without views. reads: how often the host waits for
    the device. reason: why something is missing.
    """

    name: str
    engine: str | None = None
    over_bare: float | None = None
    over_plain: float | None = None
    over_torchjd: float | None = None
    over_best: float | None = None
    memory: float | None = None
    operators: int | None = None
    reads: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Cell:
    """One model, T and number of threads.

    n_shared: P. rounds: as many as were measured. best: TorchJD's fastest setting.
    """

    model: str
    n_tasks: int
    threads: int
    n_shared: int
    rounds: int
    best: str | None
    rows: list[Row]

    def row(self, name: str) -> Row | None:
        """That contestant's, if it is there."""
        return next((row for row in self.rows if row.name == name), None)


@dataclass(frozen=True)
class _Count:
    """What does not depend on the clock. peak, held: bytes; see `Allocations`."""

    peak: int = 0
    held: int = 0
    operators: int | None = None
    reads: int | None = None
    reason: str = ""


def measure(plan: Plan) -> Iterator[Cell]:
    """Measures every model at every T with every number of threads.

    Yields:
        A cell as soon as it is there.

    Raises:
        MissingExtra: TorchJD is not installed, or what a model needs.
    """
    for name in plan.models:
        MODELS[name](2)
    before = torch.get_num_threads()
    # Garbage is looked for among what comes from here on: all modules are too much for every count.
    gc.collect()
    gc.freeze()
    try:
        for name in plan.models:
            torch.set_num_threads(plan.threads[0])
            needs = _needs_at_two(name, plan)
            for n_tasks in plan.task_counts:
                yield from _measure(name, n_tasks, plan, needs)
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)


def _engines(plan: Plan) -> list[str]:
    return list(plan.engines) or available_engines(plan.method)


def _make_model(name: str, n_tasks: int, plan: Plan) -> tuple[Heads, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name](n_tasks)
    batch = model.example()
    return model.to(plan.device), batch.to(plan.device)


def _needs_at_two(name: str, plan: Plan) -> dict[str, int]:
    """Bytes at the peak for T = 2, from which the need at any T is told before it is met."""
    model, batch = _make_model(name, 2, plan)
    names = [*_engines(plan), *opponents(plan.method, max(plan.task_counts))]
    return {each: _count(each, model, batch, plan, bytes_alone=True).peak for each in names}


def _measure(name: str, n_tasks: int, plan: Plan, needs: Mapping[str, int]) -> Iterator[Cell]:
    torch.set_num_threads(plan.threads[0])
    model, batch = _make_model(name, n_tasks, plan)
    n_shared = sum(p.numel() for p in model.trunk.parameters())
    counts: dict[str, _Count] = {}
    others = opponents(plan.method, n_tasks)
    for each in [*others[:2], *_engines(plan), *others[2:]]:
        need = needs.get(each, 0) * n_tasks / 2 / GIB
        if need > plan.memory and each not in (BARE, PLAIN):
            reason = f"would need about {need:.1f} GiB, --memory is {plan.memory:g}"
            counts[each] = _Count(reason=reason)
        else:
            counts[each] = _count(each, model, batch, plan)
    for threads in plan.threads:
        torch.set_num_threads(threads)
        yield _cell(name, n_tasks, threads, n_shared, model, batch, plan, counts)


def _count(name: str, model: Heads, batch: Tensor, plan: Plan, bytes_alone: bool = False) -> _Count:
    """Runs one contestant alone, on copies of the model."""

    def make(own: Heads) -> Contestant:
        return contestant(name, own, plan.method)

    own = copy.deepcopy(model)
    try:
        with _quiet(), Allocations(plan.device) as memory:
            made = make(own)
            made.warm_up(batch)
            made.clear_gradients()
            memory.settle()
            prepared = made.prepare(batch)
            with memory.watched():
                made.call(*prepared)
        if bytes_alone:
            return _Count(memory.peak, memory.held)
        prepared = made.prepare(batch)
        with _quiet(), Operators() as operators:
            made.call(*prepared)
    except MissingExtra:
        raise
    except Exception as error:  # whatever a library does not support
        if name in (BARE, PLAIN):
            raise
        return _Count(reason=_said(error))
    found = _Count(memory.peak, memory.held, operators.count)
    try:
        with _quiet():
            return replace(found, reads=host_reads(make, model, batch))
    except Exception as error:  # the pretended device has its own limits
        return replace(found, reason=f"host reads not counted: {_said(error)}")


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lets vmap fall back without a word: how slow that is, is what is measured."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop.*batching rule")
        yield


def _cell(
    name: str,
    n_tasks: int,
    threads: int,
    n_shared: int,
    model: Heads,
    batch: Tensor,
    plan: Plan,
    counts: dict[str, _Count],
) -> Cell:
    works = {each: count for each, count in counts.items() if count.peak}
    engines: dict[str, str | None] = {}
    seconds: dict[str, Rounds] = {}
    with _quiet():
        for group in _groups(works, _engines(plan), plan.memory * GIB):
            taking_part = [
                contestant(each, copy.deepcopy(model) if each == AUTOGRAM else model, plan.method)
                for each in group
            ]
            found = _time(taking_part, batch, plan)
            seconds.update(dict.fromkeys(group, found))
            engines.update((each.name, each.engine) for each in taking_part)
    bare, best = seconds[BARE], None
    settings = [each for each in works if each.startswith(TORCHJD)]
    if settings:
        best = min(settings, key=lambda each: _ratio(bare, each, BARE))
    floor = counts[BARE].peak
    rows = []
    for each, count in counts.items():
        row = Row(each, operators=count.operators, reads=count.reads, reason=count.reason)
        if each in works:
            rounds = seconds[each]
            row = replace(
                row,
                engine=engines[each],
                over_bare=_ratio(rounds, each, BARE),
                over_plain=_ratio(rounds, each, PLAIN),
                over_torchjd=_ratio(rounds, each, TORCHJD) if TORCHJD in works else None,
                over_best=_ratio(rounds, each, best) if best else None,
                memory=(count.peak - floor) / (4 * n_tasks * n_shared),
            )
        rows.append(row)
    return Cell(name, n_tasks, threads, n_shared, len(bare), best, rows)


def _ratio(rounds: Rounds, name: str, other: str) -> float:
    return statistics.median(seconds[name] / seconds[other] for seconds in rounds)


def _groups(counts: dict[str, _Count], engines: Sequence[str], limit: float) -> Iterator[list[str]]:
    """Who takes turns with whom: engines keep their buffers between turns, so that only as many are
    together as fit into memory, and everybody else is in every group."""
    others = [each for each in counts if each not in engines]
    waiting = [each for each in counts if each in engines]
    while True:
        group, held = list(others), 0
        while waiting:
            names = [*group, waiting[0]]
            most = max(counts[each].peak - counts[each].held for each in names)
            if len(group) > len(others) and held + counts[waiting[0]].held + most > limit:
                break
            held += counts[waiting[0]].held
            group.append(waiting.pop(0))
        yield group
        if not waiting:
            return


def _time(taking_part: Sequence[Contestant], batch: Tensor, plan: Plan) -> Rounds:
    """Lets everybody take a turn in every round, in rotating order."""
    clock = _clock(plan.device)
    for each in taking_part:
        each.warm_up(batch)
    rounds: Rounds = []
    fewest = min(plan.rounds, _FEWEST_ROUNDS)
    # Not the time that passes: others on the machine would leave fewer rounds.
    began = time.process_time()
    for number in range(-_WARM_UP_ROUNDS, plan.rounds):
        if number >= fewest and time.process_time() - began > plan.seconds:
            break
        turn = number % len(taking_part)
        seconds = {}
        for each in [*taking_part[turn:], *taking_part[:turn]]:
            prepared = each.prepare(batch)
            start = clock()
            each.call(*prepared)
            seconds[each.name] = clock() - start
        if number >= 0:
            rounds.append(seconds)
    return rounds


def _clock(device: torch.device) -> Callable[[], float]:
    """CPU time, which others' work on the machine does not enter; a GPU's when it is done."""
    if device.type != "cuda":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised
