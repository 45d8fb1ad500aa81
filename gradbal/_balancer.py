"""One backward step: losses in, balanced gradients out, by kind of aggregator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradbal._checks import check_positive
from gradbal._engine import has_groups
from gradbal._few import Few, Taken, are_alike
from gradbal._lazy import LazyLosses
from gradbal._losses import Losses, Names
from gradbal._nonfinite import HostValues, NonFiniteError, not_finite
from gradbal._representation import Representation
from gradbal._undo import remembered
from gradbal.aggregators.base import (
    Aggregator,
    ClosureAggregator,
    DoubleSamplingAggregator,
    GramianAggregator,
    JacobianAggregator,
    Scalarizer,
)
from gradbal.distributed import Alone, Spread, find_processes
from gradbal.jacobian import (
    Absent,
    Auto,
    Case,
    Engine,
    Found,
    FoundInstances,
    Instance,
    Layerwise,
    Loop,
    Reach,
    Root,
    RootsInTurn,
    Rows,
    Sketch,
    WeightedSum,
    combine,
    deliver,
    finds_gramian,
    gradients_of,
    hooks_held_back,
    reach_of,
    reached_parameters,
    shared_indices,
    takes_rows,
    there,
    upload,
)

__all__ = ["BackwardCall", "Balancer"]

_OUTCOME = ("weights", "head_weights", "gramian", "losses")


class BackwardCall(NamedTuple):
    """What one call of `backward` asks for.

    batch: the losses. parameters: those to train, without the aggregator's own. absent: tasks that
    sit this batch out, as far as that is known before lazy losses are evaluated. accumulate: only
    gather, and aggregate at the next call without it. scale: 0-dim loss scale, or None; with it an
    overflow is delivered as inf. retain_graph: keep the losses' graph. features: the representation
    at which the Jacobian is taken, or None.
    independent: losses of further, independent batches. taken: the gradients of each loss, where
    the passes are made already.
    """

    batch: Losses | LazyLosses
    parameters: list[Tensor]
    absent: frozenset[int]
    accumulate: bool
    scale: Tensor | None
    retain_graph: bool
    features: Tensor | None = None
    independent: tuple[Losses | LazyLosses, ...] = ()
    taken: Sequence[tuple[Tensor | None, ...]] | None = None

    @property
    def lazy(self) -> bool:
        """Whether any losses are not evaluated yet."""
        if isinstance(self.batch, LazyLosses):
            return True
        return any(isinstance(b, LazyLosses) for b in self.independent)


class _Examined(NamedTuple):
    """gramian: `[T, T]`, zero for tasks that sit out. host: what came to the host. present, absent:
    who takes part and who does not."""

    gramian: Tensor
    host: HostValues
    present: list[int]
    absent: frozenset[int]


@dataclass
class _Pending:
    """What a step has gathered: one batch, or several micro-batches.

    values: `[T]`, the losses as the aggregator sees them. losses: `[T]`, as they are. dropped: the
    tasks that something was wrong with in any batch. missing: those that no batch was of. weights:
    weights and head weights, when they come before the gradients. waiting: tasks whose turn it is
    not.
    """

    values: Tensor
    losses: Tensor
    dropped: frozenset[int]
    missing: frozenset[int] = frozenset()
    weights: tuple[Tensor, Tensor] | None = None
    waiting: frozenset[int] = frozenset()

    @property
    def absent(self) -> frozenset[int]:
        """The tasks that sit the step out."""
        return self.dropped | self.missing

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        w, head_weights = self.weights or (None, None)
        return {
            "values": self.values,
            "losses": self.losses,
            "dropped": sorted(self.dropped),
            "missing": sorted(self.missing),
            # One pass does for both where they are the same.
            "weights": None if w is None else [w] if head_weights is w else [w, head_weights],
            "waiting": sorted(self.waiting),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> _Pending:
        """What a `state_dict()` was made from, on a device."""
        weights = [w.to(device, copy=True) for w in state["weights"] or ()]
        return cls(
            state["values"].to(device, copy=True),
            state["losses"].to(device, copy=True),
            frozenset(state["dropped"]),
            frozenset(state["missing"]),
            (weights[0], weights[-1]) if weights else None,
            frozenset(state["waiting"]),
        )


class Balancer:
    """Connects losses, Jacobian routine and aggregator; knows nothing of optimizers.

    Attributes:
        engine: what takes the gradients, or finds their Gramian. auto: what picks it, or None.
        processes: who takes the steps together. own_columns: whether the aggregator's state is of
            this process's columns alone.
        jacobian_dtype: what it is kept in, where that is narrower than the parameters' dtype.
        rows: the buffer of the Jacobian.
        tasks: their names, from the first step on. varies: whether others may come at any step.
        weights, head_weights, gramian, losses: of the last step that aggregated, or None.
        n_steps: steps that aggregated. n_dropped, n_absent: task → steps that it sat out, since
            something was not finite or since its loss was not there. renewed: whether the last step
            computed weights, rather than use old ones again.
        unobserved: the last losses `[T]` as the aggregator sees them, and the tasks that took part,
            until the step is taken.
        few: makes the passes of a step like the last one, where that was of few numbers; or None.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        *,
        heads: str,
        shared_params: list[Tensor] | None,
        update_every: int,
        loss_transform: str | None,
        nonfinite: str,
        match_sum: bool,
        engine: Engine | Auto,
        jacobian_dtype: torch.dtype | None = None,
    ) -> None:
        self.aggregator = aggregator
        self.heads = heads
        self.shared_params = shared_params
        self.update_every = update_every
        self.loss_transform = loss_transform
        self.nonfinite = nonfinite
        self.match_sum = match_sum
        self.auto = engine if isinstance(engine, Auto) else None
        self.engine = Loop() if isinstance(engine, Auto) else engine
        self.jacobian_dtype = jacobian_dtype
        self.processes = Alone()
        self._processes_of: list[int] | None = None
        self.rows = self._new_rows()
        self.tasks: Names | None = None
        # Instances are others at every step, and may be more or fewer where nothing remembers them.
        self.varies = isinstance(engine, Instance) and not (
            aggregator.per_task_state and aggregator.state_names
        )
        self.weights: Tensor | None = None
        self.head_weights: Tensor | None = None
        self.gramian: Tensor | None = None
        self.losses: Tensor | None = None
        self.n_steps = 0
        self.n_dropped: dict[str | int, int] = {}
        self.n_absent: dict[str | int, int] = {}
        self.renewed = False
        self._missed: frozenset[int] = frozenset()
        # Tasks that the last weights are not of.
        self._lacking: frozenset[int] = frozenset()
        # The trained parameters, and which of them each task reached when it was last there.
        self._reach: tuple[list[Tensor], list[Reach | None]] | None = None
        self._pending: _Pending | None = None
        self._n_shared: int | None = None
        self._graph_seen = False
        self.own_columns = False
        # The shared parameters by index, where a method has state for each of them.
        self._columns: list[int] | None = None
        self.unobserved: tuple[Tensor, list[int]] | None = None
        plain = loss_transform is None and jacobian_dtype is None and update_every == 1
        self._steps_alike = plain and not match_sum and are_alike(aggregator)
        self.few: Few | None = None

    def backward(self, call: BackwardCall) -> bool:
        """Puts the balanced gradients into `.grad` of the parameters.

        Returns:
            False if a gradient or a lazy loss is not finite and the step is to be skipped; nothing
            was delivered.

        Raises:
            NonFiniteError: a gradient or a lazy loss is not finite, under `nonfinite="raise"`.
        """
        self.tasks, self.few = call.batch.names, None
        try:
            self._learn_reach(call)
            with self.processes.completing(
                call.parameters, self._roots_of_some(call), call.accumulate
            ) as outcome:
                outcome.append(self._step(call))
            return outcome[0]
        except BaseException:
            self.give_up_pending()
            raise

    def _step(self, call: BackwardCall) -> bool:
        if self.auto is None:
            return self._step_for(call)(call)
        if not self._has_choice(call):
            self._use(Loop())
            return self._step_for(call)(call)
        case = self._case(call)
        settled = self.auto.settled_on(case)
        if settled is not None:
            if not self.engine is self.rows.engine is settled:
                self._use(settled)
                self._free_unused()
            return self._step_for(call)(call)
        with self.auto.engine_of_step(case) as engine:
            self._use(engine)
            if self.auto.settled:
                self._free_unused()
            return self._step_for(call)(call)

    def _roots_of_some(self, call: BackwardCall) -> Sequence[Root | Absent] | None:
        """The roots, for several processes, where a task may turn out to sit the step out."""
        if self.processes.size == 1:
            return None
        aggregator = self.aggregator
        in_turn = isinstance(aggregator, JacobianAggregator) and aggregator.takes_turns
        all_there = not (call.absent or self.processes.lacking or self.nonfinite == "drop")
        if all_there and not in_turn:
            return None
        batch = call.batch
        return batch.roots(torch.ones_like(batch.values)) if isinstance(batch, Losses) else []

    def _learn_reach(self, call: BackwardCall) -> None:
        """Where a process lacks a task, it has to know what that reaches in the others."""
        if not self.processes.lacking or not isinstance(call.batch, Losses):
            return
        ones = torch.ones_like(call.batch.values)
        reach = self._reach_now(call.batch, ones, call.parameters)
        self._note_reach(call.parameters, self.processes.known_reach(reach))

    def _has_choice(self, call: BackwardCall) -> bool:
        """Whether the step is one that several engines can serve: an ordinary one with rows."""
        if call.lazy or call.accumulate or call.features is not None or call.independent:
            return False
        if self.processes.size > 1 or self.processes.engine is not None:
            # Clocks of several processes do not agree.
            return False
        if not self.needs_jacobian(False, call.batch.missing) or self.rows.pending:
            return False
        aggregator = self.aggregator
        return not isinstance(aggregator, GramianAggregator) or (
            aggregator.probed_parameters() is None
        )

    def _case(self, call: BackwardCall) -> Case:
        assert isinstance(call.batch, Losses)
        aggregator = self.aggregator
        return Case(
            device=call.batch.values.device,
            n_tasks=len(call.batch.names),
            n_scalars=sum(p.numel() for p in call.parameters),
            rows=not isinstance(aggregator, GramianAggregator) or has_groups(aggregator),
            narrow=self.jacobian_dtype is not None,
        )

    def _use(self, engine: Engine) -> None:
        self.engine = engine
        if takes_rows(engine):
            self.rows.engine = self.processes.engine or engine

    def _free_unused(self) -> None:
        """Gives back what engines that were not chosen have kept."""
        assert self.auto is not None
        if finds_gramian(self.engine):
            self.rows.free()
        for engine in self.auto.engines:
            if engine is not self.engine and isinstance(engine, Layerwise):
                engine.free()

    def absent(
        self, batches: Sequence[Losses | LazyLosses], single_pass: bool
    ) -> frozenset[int] | None:
        """Tasks that sit this batch out since their loss is missing or not finite; None skips the
        step."""
        batch = batches[0]
        if not self._reads(batch.like(), single_pass):
            return batch.missing
        found = {i for b in batches for i in not_finite(b.values.tolist())}
        bad = sorted(found - batch.missing)
        if bad and self.nonfinite == "raise":
            raise NonFiniteError("losses", [batch.names[i] for i in bad])
        absent = batch.missing.union(bad)
        if bad and (self.nonfinite == "skip" or len(absent) == len(batch.names)):
            return None
        return absent

    def _reads(self, losses: Tensor, single_pass: bool) -> bool:
        """Whether losses are looked at before anything else.

        On an accelerator that would wait for the device. There they come to the host with the
        Gramian; after a single pass `step` looks at a copy.
        """
        return losses.device.type == "cpu" or self.drops_from(single_pass)

    def drops_from(self, single_pass: bool) -> bool:
        """Whether a task may have to be left out of a single pass, before it starts."""
        drops = self.nonfinite == "drop" and not isinstance(self.aggregator, Scalarizer)
        return drops and single_pass

    def shared_parameters(self, batch: Losses, parameters: list[Tensor]) -> list[Tensor]:
        """Those of the parameters that two or more losses reach."""
        return self._apart(batch, torch.ones_like(batch.values), parameters)[0]

    def conclude(self, batch: Losses, weights: Tensor | None) -> None:
        """Books a step whose gradients were delivered from outside; `weights [T]` or None."""
        self.tasks = batch.names
        self._gather(batch, batch.values, frozenset())
        self._finish(weights, torch.ones_like(batch.values), None, frozenset())

    def observe(self) -> None:
        """Hands the last losses on to the aggregator, now that the step is taken; only once."""
        if self.unobserved is None:
            return
        values, present = self.unobserved
        everyone = len(present) == len(values)
        self.aggregator.observe(values, None if everyone else present)
        self.unobserved = None

    def found_late(self) -> Tensor:
        """`[T]`: the last losses as the aggregator sees them; where those are finite and a weight
        is not, the weight. Zero for tasks that sat out."""
        assert self.unobserved is not None
        values = _only(*self.unobserved)
        if self.weights is None:
            return values
        spoiled = values.isfinite().all() & ~self.weights.isfinite()
        return torch.where(spoiled, self.weights.to(values), values)

    def losses_of_present(self) -> Tensor:
        """`[T]`, the last losses, zero for tasks whose loss was not there."""
        assert self.losses is not None
        assert self.tasks is not None
        if not self._missed:
            return self.losses
        return _only(self.losses, [i for i in range(len(self.tasks)) if i not in self._missed])

    def remember(self) -> Callable[[], None]:
        """What puts everything back as it is now, but for what is gathered."""
        return remembered(self, but=("rows", "_pending", "few"))

    @property
    def gathers(self) -> bool:
        """Whether there are micro-batches that are not aggregated yet."""
        return self._pending is not None

    def free_buffers(self) -> None:
        """Gives the memory back that is kept from step to step, but for gradients that wait."""
        if not self.rows.pending:
            self._n_shared = self.n_shared
            self.rows.free()
            self.few = None
        for engine in [self.engine] if self.auto is None else self.auto.engines:
            if isinstance(engine, Layerwise):
                engine.free()

    def __getstate__(self) -> dict[str, Any]:
        # Process groups belong to their process.
        state = {**self.__dict__, "processes": Alone(), "_processes_of": None, "few": None}
        if self.processes.engine is not None:
            self._check_nothing_pends()
            engine = self.engine if takes_rows(self.engine) else Loop()
            state["rows"] = Rows(self.shared_params, engine, dtype=self.jacobian_dtype)
        return state

    def _check_nothing_pends(self) -> None:
        """Raises ValueError where shards of gradients wait, which belong to their process."""
        if self.rows.pending and self.processes.engine is not None:
            raise ValueError(
                "gradients must not wait for more of them when the state of sharded parameters is "
                "copied, found some; call `backward` without accumulate=True and `step` first"
            )

    def find_processes(self, parameters: Sequence[Tensor], process_group: Any) -> Alone:
        """Who takes the steps together; looked for once, for the same parameters."""
        found = [id(p) for p in parameters]
        if found != self._processes_of:
            self.processes = find_processes(parameters, process_group, self.aggregator)
            self._processes_of = found
            if not self.rows.pending:
                self.rows = self._new_rows()
        return self.processes

    def check_processes(
        self, batches: Sequence[Losses | LazyLosses], features: Tensor | None
    ) -> None:
        """Raises ValueError where several processes cannot take such a step together."""
        if not self.processes.cannot:
            return
        lazy = any(isinstance(batch, LazyLosses) for batch in batches)
        probes = isinstance(self.aggregator, GramianAggregator) and (
            self.aggregator.probed_parameters() is not None
        )
        kinds = {
            self.engine.name: True,
            "masks": features is not None and isinstance(self.aggregator, JacobianAggregator),
            "features": features is not None,
            "independent": len(batches) > 1,
            "functions": lazy,
            "logarithms of functions": lazy and self.loss_transform == "log",
            "dropped functions": lazy and self.nonfinite == "drop",
            "probes": probes,
            "closures": isinstance(self.aggregator, ClosureAggregator)
            and self.aggregator.looks_around,
        }
        self.processes.check([kind for kind, asked in kinds.items() if asked])

    def give_up_pending(self) -> None:
        """Forgets what was gathered and not aggregated."""
        self._pending = None
        self.rows.pending = False

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Tasks, the last step's outcome, counters, and what is pending.

        Args:
            parameters: all those of the optimizer, by whose order pending gradients are named.
        """
        self._check_nothing_pends()
        return {
            "tasks": None if self.tasks is None or self.varies else list(self.tasks),
            "loss_transform": self.loss_transform,
            **{name: _copy(getattr(self, name)) for name in _OUTCOME},
            "engine": None if self.auto is None else self.auto.state_dict(),
            "steps": self.n_steps,
            "dropped": dict(self.n_dropped),
            "absent": dict(self.n_absent),
            "lacking": sorted(self._lacking),
            "reach": self._reach_state(parameters),
            "columns": None if self._columns is None else list(self._columns),
            "unobserved": self.unobserved and [_copy(self.unobserved[0]), self.unobserved[1]],
            "pending": None if self._pending is None else self._pending.state_dict(),
            "rows": self.rows.pending_state(parameters),
        }

    def load_state_dict(self, state: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """Takes over a `state_dict()`, with `parameters` as it was; an error changes nothing."""
        device = parameters[0].device
        pending = unobserved = None
        if state["pending"] is not None:
            pending = _Pending.from_state_dict(state["pending"], device)
        if state["unobserved"] is not None:
            values, present = state["unobserved"]
            unobserved = values.to(device, copy=True), list(present)
        rows = self._new_rows()
        rows.load_pending_state(state["rows"], parameters)
        self.tasks = None if state["tasks"] is None else tuple(state["tasks"])
        for name in _OUTCOME:
            value = state[name]
            setattr(self, name, None if value is None else value.to(device, copy=True))
        if self.auto is not None and state["engine"] is not None:
            self.auto.load_state_dict(state["engine"])
        self.n_steps = state["steps"]
        self.n_dropped, self.n_absent = dict(state["dropped"]), dict(state["absent"])
        self._lacking = frozenset(state["lacking"])
        self._reach = None
        if state["reach"] is not None:
            places, reach = state["reach"]
            known = [None if row is None else tuple(c == "1" for c in row) for row in reach]
            self._reach = [parameters[k] for k in places], known
        self._columns = None if state["columns"] is None else list(state["columns"])
        self.rows, self._pending, self.unobserved, self.few = rows, pending, unobserved, None
        self.own_columns = False

    def _reach_state(self, parameters: Sequence[Tensor]) -> list[Any] | None:
        """What is known of the tasks' reach, by the places of the parameters; a character each."""
        if self._reach is None:
            return None
        place = {id(p): k for k, p in enumerate(parameters)}
        if not all(id(p) in place for p in self._reach[0]):
            return None
        rows = [r if r is None else "".join("01"[yes] for yes in r) for r in self._reach[1]]
        return [[place[id(p)] for p in self._reach[0]], rows]

    def _step_for(self, call: BackwardCall) -> Callable[[BackwardCall], bool]:
        aggregator = self.aggregator
        if not self.needs_jacobian(call.accumulate, call.batch.missing):
            if self.processes.engine is not None and not self._one_pass_does():
                return self._rows_step
            if not call.lazy:
                return self._single_step
            return self._sum_step if self._knows_weights(call.batch.missing) else self._rows_step
        if call.features is not None:
            return self._features_step
        if call.independent:
            return self._independent_step
        gathers = call.accumulate or self.rows.pending or call.lazy
        if isinstance(aggregator, GramianAggregator) and not gathers:
            if aggregator.probed_parameters() is not None:
                return self._probe_step
            if isinstance(self.engine, Instance):
                return self._instance_step
            if finds_gramian(self.engine):
                return self._gramian_step
        return self._rows_step

    def _one_pass_does(self) -> bool:
        """Whether all parameters get the gradient of the same weighted sum."""
        known = self._pending.weights if self._pending is not None else None
        if known is not None:
            same = known[0] is known[1]
        elif isinstance(self.aggregator, Scalarizer):
            same = not self.match_sum
        else:
            same = self.head_weights is None
        return same and self.heads == "weighted"

    def _new_rows(self) -> Rows:
        shared = self.shared_params and [*self.processes.stand_ins(self.shared_params)]
        engine = self.processes.engine or self.engine
        if takes_rows(engine):
            return Rows(shared, engine, dtype=self.jacobian_dtype)
        return Rows(shared, dtype=self.jacobian_dtype)

    def needs_jacobian(self, accumulate: bool, missing: frozenset[int]) -> bool:
        """Whether the next step takes a Jacobian, and not one pass with weights that are known."""
        if self.rows.pending:
            return True
        if isinstance(self.aggregator, Scalarizer):
            # The weights of a sum of micro-batches are known only at the end, and so is who takes
            # part where the first one lacks a task.
            late = missing and self._pending is None and self._refreshes(missing)
            return accumulate and (not self.aggregator.linear or bool(late))
        return self._refreshes(missing)

    def check_gathers(self) -> None:
        """Whether gradients can be kept for the next call."""
        if finds_gramian(self.engine):
            raise ValueError(
                "accumulate=True needs an engine whose gradients add up, found "
                f'jacobian="{self.engine.name}"; use "loop", or one larger batch'
            )

    def _knows_weights(self, missing: frozenset[int]) -> bool:
        """Whether a step of one pass has its weights before its losses."""
        if self._pending is not None and self._pending.weights is not None:
            return True
        if isinstance(self.aggregator, Scalarizer) and self._refreshes(missing):
            # Whom it drops changes the others' weights.
            return self.aggregator.linear and self.nonfinite != "drop"
        return True

    @property
    def n_shared(self) -> int | None:
        """P, the number of shared scalars; None before the first Jacobian."""
        if self.rows.width is None:
            return self._n_shared
        columns = self.processes.shards(self.rows.shared)
        return self.rows.width if columns is None else columns.width

    def _refreshes(self, missing: frozenset[int]) -> bool:
        """Whether this step computes weights, rather than use the last ones again."""
        if self.weights is None or self.n_steps % self.update_every == 0:
            return True
        # A task comes that they are not of; within a step it stays with those that it began with.
        return self._pending is None and bool(self._lacking - missing)

    # T passes, then the aggregator on the Jacobian.

    def _rows_step(self, call: BackwardCall) -> bool:
        batch, scale, rows = call.batch, call.scale, self.rows
        n_tasks = len(batch.names)
        # Shards take rows where two passes with known weights would do elsewhere.
        in_place_of_passes = not self.needs_jacobian(call.accumulate, batch.missing)
        reuses = in_place_of_passes and not self._refreshes(batch.missing)
        waiting = self._waiting(n_tasks, call.absent)
        sit_out = call.absent | waiting | batch.lacking
        if not rows.engine.follows_graph and rows.width is None:
            # What those reach whose turn it is not has to be seen once.
            sit_out = call.absent | batch.lacking
        roots = self._roots(batch, scale, call.parameters)
        with self.processes.agreeing() as laid:
            rows.take(
                roots,
                call.parameters,
                sit_out=sit_out,
                retain_graph=call.retain_graph,
                taken=call.taken,
            )
            laid.append(rows)
        self._note_reach(rows.parameters, rows.reach)
        absent = self._absent_after(call, single_pass=False)
        if absent is None:
            return False
        pending = self._gather(batch, self._seen(batch.values), absent)
        pending.waiting = waiting
        if call.accumulate:
            rows.pending = True
            return True
        if isinstance(self.aggregator, Scalarizer) or reuses:
            self._combine_gathered(pending, scale, not reuses)
            return True
        self._check_columns()
        if isinstance(self.aggregator, JacobianAggregator):
            self.processes.whole_rows(rows.jacobian)
        overflow = partial(self._deliver_overflow, rows)
        found = self._examine(*self._to_host(rows, pending.values, scale), overflow, pending, scale)
        if isinstance(found, bool):
            return found
        present = [i for i in found.present if i not in waiting]
        if not present:
            # A task that is never finite may not keep the others from theirs.
            assert isinstance(self.aggregator, JacobianAggregator)
            self.aggregator.lose_turn(sorted(frozenset(range(n_tasks)) - waiting))
            return False
        direction, w, head_weights = self._aggregate(found.host, present, scale)
        rows.deliver(direction, self._head_factors(head_weights, present))
        self._train_own_weights(pending.values, present, scale)
        self._finish(w, head_weights, found.gramian, found.absent)
        if self._steps_alike and len(present) == n_tasks and self._is_ordinary(call):
            self.few = Few.after(batch.names, rows)
        return True

    def _is_ordinary(self, call: BackwardCall) -> bool:
        """Whether the next step may be one for `Few`, as far as this one tells."""
        if call.lazy or call.scale is not None or not self.processes.alone:
            return False
        settled = self.auto is None or self.auto.settled
        return settled and isinstance(self.rows.engine, Loop)

    def finish_few(self, few: Few, taken: Taken, gramian: Tensor) -> None:
        """What follows the passes of a step of few numbers: weights, `.grad`, and what is known of
        the step. An error changes nothing here."""
        assert isinstance(self.aggregator, GramianAggregator)
        assert taken.rows is not None
        w = self.aggregator.weights(gramian, taken.losses.double()).double()
        heads = self.aggregator.head_weights(w, gramian).double()
        few.deliver(w, taken.rows)
        # At once, or an interrupt might come in between.
        vars(self).update(
            weights=w.detach(),
            head_weights=None if heads is w else heads.detach(),
            gramian=gramian,
            losses=taken.losses,
            unobserved=(taken.losses, [*range(len(few.names))]),
            renewed=True,
            n_steps=self.n_steps + 1,
            _missed=frozenset(),
            _lacking=frozenset(),
        )

    def _combine_gathered(self, pending: _Pending, scale: Tensor | None, refreshes: bool) -> None:
        """What weights that do not depend on rows make of them, as in a single pass."""
        present = [i for i in range(len(pending.values)) if i not in pending.absent]
        weights = pending.weights or self._single_weights(pending.values, present, refreshes)
        direction = self.rows.combined(weights[0], present)
        self.rows.deliver(direction, self._head_factors(weights[1], present))
        if refreshes:
            self._train_own_weights(pending.values, present, scale)
        self._finish(*weights, None, pending.absent, refreshes)

    def _waiting(self, n_tasks: int, absent: frozenset[int]) -> frozenset[int]:
        """Tasks whose turn it is not; the first micro-batch of a step decides for all of them."""
        if self._pending is not None:
            return self._pending.waiting
        if not isinstance(self.aggregator, JacobianAggregator):
            return frozenset()
        taking_part = {"absent": absent} if absent else {}
        in_turn = self.aggregator.tasks_in_turn(n_tasks, **taking_part)
        return frozenset() if in_turn is None else frozenset(range(n_tasks)).difference(in_turn)

    def _to_host(
        self, rows: Rows, values: Tensor, scale: Tensor | None, spread: Spread = "rows"
    ) -> tuple[Tensor, HostValues]:
        """G `[T, T]` (`[K, T, T]` for K column groups) without the scale; what the host has."""
        jacobian, widths = rows.jacobian, None
        if isinstance(self.aggregator, JacobianAggregator) and rows is self.rows:
            spread = "nothing"
        if isinstance(self.aggregator, GramianAggregator) and rows is self.rows:
            widths = self.aggregator.column_groups(rows.shapes)
            probed = self.aggregator.probed_parameters()
            if probed is not None:
                jacobian = rows.columns(probed)
        if widths is None and jacobian is rows.jacobian and self.processes.alone:
            product = rows.product_of_few()
            if product is not None:
                g = _unscaled(product, scale)
                return g, HostValues(g, values, rows.head_extremes() if rows.has_heads else None)
        parts = [jacobian] if widths is None else list(torch.split(jacobian, widths, 1))

        def take(exact: bool) -> tuple[Tensor, HostValues]:
            products, extremes = self.processes.products(
                parts, rows.head_extremes(), exact=exact, spread=spread
            )
            found = [_unscaled(product, scale) for product in products]
            g = found[0] if widths is None else torch.stack(found)
            return g, HostValues(g, values, extremes)

        g, host = take(False)
        on_host = host.gramian.view(-1, len(jacobian), len(jacobian))
        return take(True) if self.processes.wants_exact(on_host, parts) else (g, host)

    def _examine(
        self,
        g: Tensor,
        host: HostValues,
        overflow: Callable[[], None],
        pending: _Pending,
        scale: Tensor | None,
    ) -> _Examined | bool:
        """Who takes part; or what `backward` returns, where an overflow was delivered or the step
        is left out."""
        assert self.tasks is not None
        bad = [i for i in host.bad if i not in pending.absent]
        if bad and scale is not None:
            # GradScaler finds these, skips the step and lowers its scale.
            overflow()
            self.give_up_pending()
            return True
        if bad and self.nonfinite == "raise":
            raise NonFiniteError("losses and gradients", [self.tasks[i] for i in bad])
        absent = pending.absent | frozenset(bad)
        if bad and (self.nonfinite == "skip" or len(absent) == len(self.tasks)):
            return False
        if absent:
            g = g.clone()
            out = list(absent)
            g[..., out, :] = g[..., :, out] = 0.0
        present = [i for i in range(len(self.tasks)) if i not in absent]
        return _Examined(g if g.dim() == 2 else g.sum(0), host, present, absent)

    @staticmethod
    def _deliver_overflow(rows: Rows) -> None:
        rows.deliver(torch.full_like(rows.jacobian[0], float("inf")), [1.0] * len(rows.jacobian))

    def _check_columns(self) -> None:
        """State `[T, P]`, or of column groups, belongs to the shared parameters that it was
        gathered for."""
        aggregator = self.aggregator
        if isinstance(aggregator, GramianAggregator):
            if aggregator.column_groups(self.rows.shapes) is None:
                return
            self._check_grouped()
        elif not (isinstance(aggregator, JacobianAggregator) and aggregator.per_parameter_state):
            return
        if self._columns is not None and self._columns != self.rows.shared:
            raise ValueError(
                f"the shared parameters must stay the same for {aggregator.name!r}, which has "
                f"state for each; found {len(self.rows.shared)} of other indices than before"
            )
        self._columns = list(self.rows.shared)

    def _check_grouped(self) -> None:
        """Weights by column group are not one number for each task."""
        name = self.aggregator.name
        if self.update_every != 1:
            raise ValueError(
                f"update_every must be 1 for {name!r} with weights by column group, "
                f"found {self.update_every}"
            )
        if self.heads != "own":
            raise ValueError(
                f"heads must be 'own' for {name!r} with weights by column group, "
                f"found {self.heads!r}"
            )

    def _aggregate(
        self, host: HostValues, present: list[int], scale: Tensor | None
    ) -> tuple[Tensor | list[Tensor], Tensor | None, Tensor]:
        """Direction `[P]` or by parameter (scaled as J is), weights and head weights `[T]` on the
        host."""
        aggregator, jacobian = self.aggregator, self.rows.jacobian
        if not isinstance(aggregator, JacobianAggregator) and host.gramian.dim() == 2:
            w, head_weights = self._weights(host, present)
            return self.rows.combined(w, present), w, head_weights
        rows, values = _rows_of(jacobian, present), _rows_of(host.losses, present)
        if isinstance(aggregator, JacobianAggregator):
            plain = rows if scale is None else rows / scale.to(rows)
            aggregator.columns = self.processes.shards(self.rows.shared)
            try:
                self._take_own_columns(aggregator)
                direction = aggregator.direction(plain, values, **self._taking_part(present))
            finally:
                aggregator.columns = None
            if self._gain(present) != 1.0:
                direction = direction * self._gain(present)
            if scale is not None:
                direction = direction * scale.to(direction)
            w = _spread(aggregator.last_weights, jacobian, present)
            heads = _spread(aggregator.last_head_weights, jacobian, present)
            weights = w * self._gain(present) if aggregator.weighted else None
            return direction, weights, heads
        assert isinstance(aggregator, GramianAggregator)
        g = host.gramian[:, present][:, :, present]
        grouped = aggregator.group_weights(g, values, **self._taking_part(present))
        parts = torch.split(rows, aggregator.column_groups(self.rows.shapes) or [], 1)
        wide = torch.promote_types(jacobian.dtype, torch.float32)
        pieces = [combine(w, part, wide) for w, part in zip(grouped, parts, strict=True)]
        return torch.cat(pieces), None, torch.ones(len(jacobian), dtype=torch.float64)

    def _take_own_columns(self, aggregator: JacobianAggregator) -> None:
        """State `[..., P]` from a checkpoint, of all columns, becomes that of this process's."""
        columns = aggregator.columns
        if columns is None or not aggregator.per_parameter_state or self.own_columns:
            return
        for name in aggregator.state_names:
            value = getattr(aggregator, name)
            if isinstance(value, Tensor):
                setattr(aggregator, name, columns.own(value))
        self.own_columns = True

    def whole_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state of the aggregator with all columns, for a checkpoint."""
        aggregator = self.aggregator
        if not (self.own_columns and isinstance(aggregator, JacobianAggregator)):
            return state
        columns = self.processes.shards(self._columns or [])
        assert columns is not None
        values = state["state"]
        whole = {k: columns.whole(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        return {**state, "state": whole}

    def _weights(self, host: HostValues, present: list[int]) -> tuple[Tensor, Tensor]:
        """Weights and head weights `[T]`, float64 on the host, the same object where the same."""
        aggregator, n_tasks = self.aggregator, len(host.losses)
        values = _rows_of(host.losses, present)
        g = host.gramian if len(present) == n_tasks else host.gramian[present][:, present]
        taking_part = self._taking_part(present)
        if isinstance(aggregator, GramianAggregator):
            found = aggregator.weights(g, values, **taking_part).double()
            found_heads = aggregator.head_weights(found, g).double()
        else:
            assert isinstance(aggregator, DoubleSamplingAggregator)
            found = found_heads = aggregator.step(g, **taking_part).double()
        gain = self._gain(present)
        if found_heads is found and gain == 1.0:
            w = found if len(present) == n_tasks else _spread(found, values, present, n_tasks)
            return w, w
        w = _spread(found * gain, values, present, n_tasks)
        return w, _spread(found_heads, values, present, n_tasks)

    def _gain(self, present: list[int]) -> float:
        return float(len(present)) if self.match_sum else 1.0

    def _head_factors(
        self, head_weights: Tensor, present: list[int]
    ) -> list[float | Tensor | None]:
        """What each task's own gradients are multiplied by; None for tasks that sit out."""
        assert self.tasks is not None
        if self.heads == "own":
            found: Sequence[float | Tensor] = [1.0] * len(self.tasks)
        else:
            on_host = head_weights.device.type == "cpu"
            found = head_weights.tolist() if on_host else head_weights.unbind()
        factors: list[float | Tensor | None] = [None] * len(self.tasks)
        for i in present:
            factors[i] = found[i]
        return factors

    def _taking_part(self, present: list[int]) -> dict[str, Any]:
        """The keyword for a method that has to know which tasks take part, when not all do."""
        assert self.tasks is not None
        if self.aggregator.per_task_state and len(present) < len(self.tasks):
            return {"tasks": present}
        return {}

    # T passes down to a representation or some of the parameters, then one through the rest.

    def _features_step(self, call: BackwardCall) -> bool:
        assert call.features is not None
        assert isinstance(call.batch, Losses)
        batch, scale, aggregator = call.batch, call.scale, self.aggregator
        values, factors = self._transformed(batch)
        roots = batch.roots(_scaled(factors, scale))
        view = Representation(call.features, [start for start, _ in there(roots)], call.parameters)
        rows = Rows([call.features], dtype=self.jacobian_dtype)
        rows.take(
            roots,
            [call.features, *view.outside],
            sit_out=call.absent | batch.lacking,
            # Where parameters are reached past the features, their graph is walked again.
            retain_graph=call.retain_graph or bool(view.both),
        )
        pending = self._gather(batch, values, call.absent)
        overflow = partial(self._deliver_overflow, rows)
        # Every process has the representation of its own part of the batch.
        to_host = self._to_host(rows, values, scale, "columns")
        found = self._examine(*to_host, overflow, pending, scale)
        if isinstance(found, bool):
            return found
        present = found.present
        w: Tensor | None
        if isinstance(aggregator, JacobianAggregator):
            jacobian = _rows_of(rows.jacobian, present)
            direction = aggregator.direction(  # type: ignore[call-arg]
                jacobian, features=call.features, **self._taking_part(present)
            )
            w, head_weights = None, torch.ones(len(batch.names), dtype=torch.float64)
        else:
            w, head_weights = self._weights(found.host, present)
            (direction,) = rows.combined(w, present)
        factors_of = self._head_factors(head_weights, present)
        shared = [None if f is None else 1.0 for f in factors_of]
        if w is not None:
            shared = [None if f is None else float(w[i]) for i, f in enumerate(factors_of)]
        view.deliver(rows, direction, shared, factors_of, call.retain_graph)
        self._train_own_weights(values, present, scale)
        self._finish(w, head_weights, found.gramian, found.absent)
        return True

    def _probe_step(self, call: BackwardCall) -> bool:
        assert isinstance(self.aggregator, GramianAggregator)
        assert isinstance(call.batch, Losses)
        batch, scale = call.batch, call.scale
        values, factors = self._transformed(batch)
        roots = batch.roots(_scaled(factors, scale))
        probed = self.aggregator.probed_parameters() or []
        rows = Rows(probed, dtype=self.jacobian_dtype)
        with self.processes.agreeing() as laid:
            rows.take(roots, probed, sit_out=call.absent | batch.lacking, retain_graph=True)
            laid.append(rows)
        pending = self._gather(batch, values, call.absent)
        overflow = partial(self._deliver_overflow, rows)
        found = self._examine(*self._to_host(rows, values, scale), overflow, pending, scale)
        return self._weighted_step(call, factors, values, found)

    # The Gramian without the rows, then one pass if it takes one to deliver.

    def _gramian_step(self, call: BackwardCall) -> bool:
        assert finds_gramian(self.engine)
        assert isinstance(call.batch, Losses)
        batch, scale = call.batch, call.scale
        values, factors = self._transformed(batch)
        known = self._known_reach(batch, call.parameters)
        roots = batch.roots(_scaled(factors, scale), known)
        how = roots, call.parameters, self.shared_params, call.absent | batch.lacking
        if isinstance(self.engine, Sketch):
            taken = self._sketched(self.engine, *how)
        else:
            taken = self.engine.take(*how, call.retain_graph)
        self._n_shared = sum(p.numel() for p in taken.shared)
        self._note_reach(call.parameters, taken.reach)
        pending = self._gather(batch, values, call.absent)
        g = _unscaled(taken.gramian, scale)
        host, kept = HostValues(g, values, taken.extremes), taken.kept
        if kept is not None and self.processes.wants_exact(host.gramian[None], [kept.rows]):
            g = _unscaled(kept.exact(), scale)
            host = HostValues(g, values, taken.extremes)
        overflow = partial(_overflow_in, taken.shared)
        found = self._examine(g, host, overflow, pending, scale)
        if kept is None or isinstance(found, bool):
            return self._weighted_step(call, factors, values, found)
        weights = self._weights(found.host, found.present)
        kept.deliver(weights[0], self._head_factors(weights[1], found.present))
        self._train_own_weights(values, found.present, scale)
        self._finish(*weights, found.gramian, found.absent)
        return True

    def _sketched(self, engine: Sketch, *how: Any) -> Found:
        """The mean of the processes' sketches is the sketch of their mean rows."""
        # Part of the checkpoint: a resumed run draws the same signs.
        engine.step = self.n_steps
        with self.processes.agreeing() as laid:
            sketched = engine.sketch(*how)
            laid.append(sketched)
        self.processes.average(sketched.sketches)
        found = sketched.found()
        return replace(found, extremes=self.processes.spoiled(found.extremes))

    def _instance_step(self, call: BackwardCall) -> bool:
        assert isinstance(self.engine, Instance)
        batch, scale, engine = call.batch, call.scale, self.engine
        assert isinstance(batch, Losses)
        assert isinstance(batch.tensors, Tensor)
        values, factors = self._transformed(batch)
        scaled = _scaled(factors, scale)
        how = batch.tensors, scaled, call.parameters, self.shared_params, call.absent
        taken = engine.take(*how, retain_graph=call.retain_graph)
        pending = self._gather(batch, values, call.absent)
        g = _unscaled(taken.gramian, scale)
        host = HostValues(g, values, taken.extremes, taken.doubt)
        exact = taken.leaves_range(host.gramian)
        if host.doubt or exact:
            if taken.direct:
                taken = engine.exactly(taken, call.absent)
            else:
                taken = engine.take(*how, look=host.doubt, exact=exact)
            g = _unscaled(taken.gramian, scale)
            host = HostValues(g, values, taken.extremes)

        overflow = partial(_overflow_in, taken.shared)
        examined = self._examine(g, host, overflow, pending, scale)
        return self._weighted_step(call, factors, values, examined, taken)

    def _weighted_step(
        self,
        call: BackwardCall,
        factors: Tensor,
        values: Tensor,
        found: _Examined | bool,
        taken: FoundInstances | None = None,
    ) -> bool:
        """Weights of a Gramian, and the pass that delivers them."""
        if isinstance(found, bool):
            return found
        weights = self._weights(found.host, found.present)
        self._weighted_pass(call._replace(absent=found.absent), factors, weights, taken)
        self._train_own_weights(values, found.present, call.scale)
        self._finish(*weights, found.gramian, found.absent)
        return True

    # T passes on each of several independent batches.

    def _independent_step(self, call: BackwardCall) -> bool:
        aggregator, scale = self.aggregator, call.scale
        assert isinstance(aggregator, DoubleSamplingAggregator)
        batches = [call.batch, *call.independent]
        gathered: list[Rows] = []
        norms = []
        for batch in batches:
            rows = self._new_rows()
            roots = self._roots(batch, scale, call.parameters)
            with self.processes.agreeing() as laid:
                rows.take(
                    roots, call.parameters, sit_out=call.absent, retain_graph=call.retain_graph
                )
                laid.append(rows)
            if gathered and rows.shared != gathered[0].shared:
                raise ValueError(
                    "independent batches must share the same parameters, found "
                    f"{len(gathered[0].shared)} and {len(rows.shared)} shared ones"
                )
            gathered.append(rows)
            values = self._seen(batch.values).abs()
            largest = [rows.head_extremes(), rows.jacobian.abs().amax(1), values]
            norms.append(torch.stack([x.double() for x in largest]).amax(0))
        absent = self._absent_after(call, single_pass=False)
        if absent is None:
            return False
        first = gathered[0]
        values = self._seen(call.batch.values)
        pending = self._gather(call.batch, values, absent)
        # An extreme of any batch that is not finite is one of their sum.
        extremes = torch.stack([n / len(norms) for n in norms]).sum(0)
        product, extremes = self.processes.cross_product(
            first.jacobian, gathered[1].jacobian, extremes
        )
        products = _unscaled(product, scale)
        host = HostValues(products, values, extremes)
        overflow = partial(self._deliver_overflow, first)
        found = self._examine(products, host, overflow, pending, scale)
        if isinstance(found, bool):
            return found
        present = found.present
        w, head_weights = self._weights(host, present)
        first.mix(gathered, aggregator.shares, aggregator.head_shares)
        direction = first.combined(w, present)
        first.deliver(direction, self._head_factors(head_weights, present))
        self._finish(w, head_weights, None, found.absent)
        return True

    # One pass of Σ w_i ℓ_i, for scalarizers and for weights that are used again.

    def _single_step(self, call: BackwardCall) -> bool:
        batch, absent = call.batch, call.absent
        assert isinstance(batch, Losses)
        values, factors = self._transformed(batch)
        if not self._graph_seen or call.retain_graph:
            # Refuses a graph that would silently go untrained; once, as a walk is not free.
            self._note_reach(call.parameters, self._reach_now(batch, factors, call.parameters))
            self._graph_seen = True
        present = [i for i in range(len(batch.names)) if i not in absent]
        refreshes = isinstance(self.aggregator, Scalarizer) and self._refreshes(batch.missing)
        known = self._pending.weights if self._pending is not None else None
        weights = known or self._single_weights(values, present, refreshes)
        self._weighted_pass(call, factors, weights)
        self._conclude_pass(call, values, absent, weights, refreshes)
        return True

    def _conclude_pass(
        self,
        call: BackwardCall,
        values: Tensor,
        absent: frozenset[int],
        weights: tuple[Tensor, Tensor],
        refreshes: bool,
    ) -> None:
        """Books what a pass with these weights has delivered."""
        pending = self._gather(call.batch, values, absent)
        pending.weights = weights
        if call.accumulate:
            return
        if refreshes:
            present = [i for i in range(len(values)) if i not in pending.absent]
            self._train_own_weights(pending.values, present, call.scale)
        self._finish(*weights, None, pending.absent, refreshes)

    # The same where losses are evaluated one after another.

    def _sum_step(self, call: BackwardCall) -> bool:
        batch, scale, aggregator = call.batch, call.scale, self.aggregator
        assert isinstance(batch, LazyLosses)
        n_tasks = len(batch.names)
        like = self._seen(batch.like())
        refreshes = isinstance(aggregator, Scalarizer) and self._refreshes(batch.missing)
        known = self._pending.weights if self._pending is not None else None
        put_back = aggregator.remember()
        present = [i for i in range(n_tasks) if i not in batch.missing]
        weights = known or self._single_weights(like, present, refreshes)
        w, head_weights = (upload(v, like.device).to(like.dtype) for v in weights)
        if self.heads == "own":
            head_weights = torch.ones_like(like)
        reads = scale is None and self._reads(like, single_pass=True)
        before = self._known_reach(batch, call.parameters)
        reach = [before[i] if i in batch.lacking else None for i in range(n_tasks)]
        elsewhere = {k for row in reach if row for k, yes in enumerate(row) if yes}
        n_known = len(present) + sum(row is not None for row in reach)
        total = WeightedSum(call.parameters, self.shared_params, n_known, elsewhere)
        roots = batch.roots(partial(self._cotangent, scale=scale))
        for i in range(n_tasks):
            root = roots.make(i)
            if isinstance(root, Absent):
                continue
            if not self._graph_seen:
                reached_parameters([root[0]], call.parameters)
            if not reads or batch.is_finite(i):
                grads = gradients_of(root, call.parameters, call.retain_graph)
                reach[i] = tuple(g is not None for g in grads)
                total.add(grads, w[i], head_weights[i])
                del grads
            # Before the next one is made.
            del root
        self._graph_seen = True
        absent = self._absent_after(call, single_pass=True)
        if absent is None:
            put_back()
            return False
        self._note_reach(call.parameters, reach)
        total.deliver()
        self._conclude_pass(call, self._seen(batch.values), absent, weights, refreshes)
        return True

    def _weighted_pass(
        self,
        call: BackwardCall,
        factors: Tensor,
        weights: tuple[Tensor, Tensor],
        taken: FoundInstances | None = None,
    ) -> None:
        """`Σ w_i ℓ_i` into `.grad`; heads by their own rule, in a pass of their own if need be."""
        batch, parameters, retain_graph = call.batch, call.parameters, call.retain_graph
        assert isinstance(batch, Losses)
        factors = _scaled(factors, call.scale)
        present = [i for i in range(len(batch.names)) if i not in call.absent]
        device, dtype = factors.device, factors.dtype
        w, head_weights = (_only(upload(v, device).to(dtype), present) for v in weights)
        if self.heads == "own":
            head_weights = _only(torch.ones_like(factors), present)
        if isinstance(self.engine, Instance):
            self._deliver_instances(self.engine, call, factors, w, head_weights, taken)
            return
        if self.processes.engine is not None:
            self.processes.single_pass(batch, w * factors, retain_graph, call.absent)
            return
        if self.heads == "weighted" and weights[0] is weights[1]:
            batch.backward(w * factors, parameters, retain_graph, call.absent)
            return
        trunk, rest = self._apart(batch, factors, parameters)
        if rest:
            batch.backward(head_weights * factors, rest, True, call.absent)
        batch.backward(w * factors, trunk, retain_graph, call.absent)

    def _deliver_instances(
        self,
        engine: Instance,
        call: BackwardCall,
        factors: Tensor,
        w: Tensor,
        head_weights: Tensor,
        taken: FoundInstances | None,
    ) -> None:
        """`Σ w_b ℓ_b` into `.grad`, once it is known to agree with the Gramian."""
        batch = call.batch
        assert isinstance(batch, Losses)
        losses = batch.tensors
        assert isinstance(losses, Tensor)
        if taken is not None and taken.direct:
            found = engine.combined(taken, w, head_weights, call.absent)
            engine.check(taken, w, head_weights, found)
            targets, gradients = [p for p, _ in found], [g for _, g in found]
            # Nobody else holds them, so they need not be copied.
            del found
            deliver(targets, gradients, (), (), ())
            return
        trunk, rest = self._apart(batch, factors, call.parameters)
        found = []
        passes = [(head_weights * factors, rest), (w * factors, trunk)]
        if not call.absent and all(map(_is_fresh, call.parameters)):
            # What arrives is d itself: taking it back is cheaper than holding it back.
            for weights, inputs in passes:
                if inputs:
                    batch.backward(weights, inputs, call.retain_graph or inputs is rest)
            try:
                if taken is not None:
                    pairs = [(p, p.grad) for p in call.parameters if p.grad is not None]
                    engine.check(taken, w, head_weights, pairs, compare=True)
            except ValueError:
                for p in call.parameters:
                    p.grad = None
                raise
            return
        for weights, inputs in passes:
            if inputs and call.absent:
                # In a pass of all instances NaN from one of them would reach every weight.
                found += engine.combine(losses, weights, inputs, call.absent)
            elif inputs:
                with hooks_held_back(inputs):
                    grads = torch.autograd.grad(
                        losses,
                        inputs,
                        weights.to(losses.dtype),
                        retain_graph=call.retain_graph or inputs is rest,
                        allow_unused=True,
                    )
                found += [(p, g) for p, g in zip(inputs, grads, strict=True) if g is not None]
        if taken is not None:
            engine.check(taken, w, head_weights, found, compare=not call.absent)
        torch.autograd.backward([p for p, _ in found], [g for _, g in found])

    def _single_weights(
        self, values: Tensor, present: list[int], refreshes: bool
    ) -> tuple[Tensor, Tensor]:
        """Weights and head weights `[T]`, the same object where they are the same."""
        if refreshes:
            assert isinstance(self.aggregator, Scalarizer)
            part = _rows_of(values, present)
            found = self.aggregator.loss_weights(part, **self._taking_part(present))
            w = upload(found, values.device).to(values.dtype, copy=True)
            if len(present) < len(values):
                w = torch.zeros_like(values).index_put_((torch.tensor(present),), w)
            return (w * self._gain(present) if self.match_sum else w), w
        assert self.weights is not None
        return self.weights, self.weights if self.head_weights is None else self.head_weights

    def _apart(
        self, batch: Losses, factors: Tensor, parameters: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Shared parameters and the others, from the graph: there are no rows to tell."""
        if isinstance(self.engine, Instance):
            # Every instance reaches what one of them does.
            chosen = {id(p) for p in self.shared_params or parameters}
            trunk = [p for p in parameters if id(p) in chosen]
            return trunk, [p for p in parameters if id(p) not in chosen]
        reach = self._reach_now(batch, factors, parameters)
        self._note_reach(parameters, reach)
        shared = set(shared_indices(parameters, reach, self.shared_params))
        trunk = [p for k, p in enumerate(parameters) if k in shared]
        return trunk, [p for k, p in enumerate(parameters) if k not in shared]

    def _train_own_weights(self, values: Tensor, present: list[int], scale: Tensor | None) -> None:
        """Puts the gradient of the method's learnable weights into their `.grad`."""
        own = self.aggregator.parameters()
        if not own:
            return
        part = _rows_of(values.detach(), present)
        with torch.enable_grad():
            total = self.aggregator.objective(part, **self._taking_part(present))
            grads = torch.autograd.grad(total, own)
        if scale is not None:
            grads = tuple(g * scale.to(g) for g in grads)
        torch.autograd.backward(own, grads)

    # What both have in common.

    def _transformed(self, batch: Losses) -> tuple[Tensor, Tensor]:
        """The losses that the aggregator sees, and the derivative of each by the loss itself."""
        return self._seen(batch.values), self._factors(batch)

    def _seen(self, losses: Tensor) -> Tensor:
        """Losses as the aggregator sees them."""
        if losses.dtype in (torch.float16, torch.bfloat16):
            losses = losses.float()
        return losses.log() if self.loss_transform == "log" else losses

    def _factors(self, batch: Losses) -> Tensor:
        """What each loss is multiplied by, for the gradients that the aggregator sees."""
        factors = self._derivative(batch.values)
        return factors if batch.factors is None else factors * batch.factors.to(factors)

    def _derivative(self, losses: Tensor) -> Tensor:
        """The derivative of what the aggregator sees by the losses themselves."""
        if losses.dtype in (torch.float16, torch.bfloat16):
            losses = losses.float()
        return 1.0 / losses if self.loss_transform == "log" else torch.ones_like(losses)

    def _roots(
        self, batch: Losses | LazyLosses, scale: Tensor | None, parameters: Sequence[Tensor]
    ) -> Sequence[Root | Absent] | RootsInTurn:
        """Where the T backward passes start."""
        known = self._known_reach(batch, parameters)
        if isinstance(batch, Losses):
            if self.loss_transform is None and scale is batch.factors is None:
                return batch.roots(None, known)
            return batch.roots(_scaled(self._factors(batch), scale), known)
        return batch.roots(partial(self._cotangent, scale=scale), known)

    def _known_reach(
        self, batch: Losses | LazyLosses, parameters: Sequence[Tensor]
    ) -> list[Reach | None]:
        """What each task reached when it was last there; only if one is missing."""
        nothing: list[Reach | None] = [None] * len(batch.names)
        return self._remembered(parameters, nothing) if batch.lacking else nothing

    def _remembered(
        self, parameters: Sequence[Tensor], reach: list[Reach | None]
    ) -> list[Reach | None]:
        """The same with what is remembered in the place of what is not known."""
        if self._reach is None or len(self._reach[1]) != len(reach):
            return reach
        if [id(p) for p in self._reach[0]] != [id(p) for p in parameters]:
            return reach
        return [old if new is None else new for new, old in zip(reach, self._reach[1], strict=True)]

    def _reach_now(
        self, batch: Losses, factors: Tensor, parameters: Sequence[Tensor]
    ) -> list[Reach | None]:
        known = self._known_reach(batch, parameters)
        return reach_of(batch.roots(factors, known), parameters)

    def _note_reach(self, parameters: list[Tensor], reach: list[Reach | None]) -> None:
        """For steps that a task is missing from."""
        if None in reach:
            reach = self._remembered(parameters, reach)
        # Of instances none is missing.
        if reach and not isinstance(self.engine, Instance):
            self._reach = parameters, reach

    def _cotangent(self, name: str | int, loss: Tensor, scale: Tensor | None) -> Tensor:
        """What a lazy loss is multiplied by."""
        if self.loss_transform == "log" and loss.device.type == "cpu":
            check_positive([name], loss[None])
        return _scaled(self._derivative(loss), scale)

    def _absent_after(self, call: BackwardCall, single_pass: bool) -> frozenset[int] | None:
        """Tasks that sit the step out, once lazy losses are evaluated; None skips it."""
        if not call.lazy or call.scale is not None:
            return call.absent
        return self.absent([call.batch, *call.independent], single_pass)

    def _gather(
        self, batch: Losses | LazyLosses, values: Tensor, absent: frozenset[int]
    ) -> _Pending:
        """Adds a batch's losses to those of the micro-batches before it."""
        pending, missing = self._pending, batch.missing
        if pending is None:
            self._pending = pending = _Pending(values, batch.values, absent - missing, missing)
        else:
            lacks = pending.missing, missing
            pending.values = _sum(pending.values, values, *lacks)
            pending.losses = _sum(pending.losses, batch.values, *lacks)
            pending.dropped = pending.dropped | (absent - missing)
            pending.missing = pending.missing & missing
        return pending

    def _finish(
        self,
        weights: Tensor | None,
        head_weights: Tensor,
        g: Tensor | None,
        absent: frozenset[int],
        renewed: bool = True,
    ) -> None:
        assert self._pending is not None
        assert self.tasks is not None
        losses = self._pending.losses
        device = losses.device
        self.weights = None if weights is None else upload(weights.detach(), device)
        apart = weights is not None and head_weights is not weights
        self.head_weights = upload(head_weights.detach(), device) if apart else None
        self.gramian, self.losses = g, losses
        present = [i for i in range(len(losses)) if i not in absent]
        self.unobserved = self._pending.values, present
        missing = self._pending.missing
        for i in absent:
            counts, name = self.n_absent if i in missing else self.n_dropped, self.tasks[i]
            counts[name] = counts.get(name, 0) + 1
        self.renewed, self._missed = renewed, missing
        if renewed:
            self._lacking = missing
        self.n_steps += 1
        self.give_up_pending()


def _is_fresh(parameter: Tensor) -> bool:
    """Whether a gradient that arrives is all of `.grad`, and nobody else hears of it."""
    hooks = parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)
    return parameter.grad is None and not any(hooks)


def _overflow_in(parameters: list[Tensor]) -> None:
    """Delivers inf, which a GradScaler finds."""
    torch.autograd.backward(parameters, [torch.full_like(p, float("inf")) for p in parameters])


def _rows_of(rows: Tensor, present: list[int]) -> Tensor:
    """What belongs to the tasks that take part. The row of one that sits out may hold NaN, which no
    weight takes away; where all take part nothing is copied, nor an index sent to the device."""
    return rows if len(present) == len(rows) else rows[present]


def _sum(a: Tensor, b: Tensor, a_lacks: frozenset[int], b_lacks: frozenset[int]) -> Tensor:
    """`a + b [T]`, of which either may lack entries that the other has."""
    if not (a_lacks or b_lacks):
        return a + b
    pairs = enumerate(zip(a.unbind(), b.unbind(), strict=True))
    parts = [y if i in a_lacks else x if i in b_lacks else x + y for i, (x, y) in pairs]
    return torch.stack(parts)


def _only(weights: Tensor, present: list[int]) -> Tensor:
    """The weights, with zeros for the tasks that sit out."""
    if len(present) == len(weights):
        return weights
    kept = torch.zeros_like(weights)
    kept[present] = weights[present]
    return kept


def _spread(values: Tensor | None, like: Tensor, present: list[int], size: int = 0) -> Tensor:
    """`[T]`, float64 on the host, zero for the tasks that sit out."""
    result = torch.zeros(size or len(like), dtype=torch.float64)
    if values is not None:
        result[present] = values.detach().double().cpu()
    return result


def _scaled(factors: Tensor, scale: Tensor | None) -> Tensor:
    return factors if scale is None else factors * scale.to(factors)


def _unscaled(g: Tensor, scale: Tensor | None) -> Tensor:
    return g if scale is None else g / scale.to(g) ** 2


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
