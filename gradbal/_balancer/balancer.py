"""One backward step: losses in, balanced gradients out, by kind of aggregator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradbal._balancer.call import BackwardCall, Pending
from gradbal._balancer.gramians import gramian_step, instance_step
from gradbal._balancer.independent import independent_step
from gradbal._balancer.partway import features_step, probe_step
from gradbal._balancer.rows import rows_step
from gradbal._balancer.single import apart, single_step, sum_step
from gradbal._balancer.tensors import only, sum_of
from gradbal._engine import has_groups
from gradbal._few import Few, Taken, are_alike
from gradbal._lazy import LazyLosses
from gradbal._losses import Losses, Names
from gradbal._nonfinite import NonFiniteError, not_finite
from gradbal._undo import remembered
from gradbal.aggregators.base import (
    Aggregator,
    ClosureAggregator,
    GramianAggregator,
    JacobianAggregator,
    Scalarizer,
)
from gradbal.distributed import Alone, find_processes
from gradbal.jacobian import (
    Absent,
    Auto,
    Case,
    Engine,
    Instance,
    Layerwise,
    Loop,
    Reach,
    Root,
    Rows,
    finds_gramian,
    reach_of,
    takes_rows,
    upload,
)

__all__ = ["Balancer"]

_OUTCOME = ("weights", "head_weights", "gramian", "losses")


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
        self.rows = self.new_rows()
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
        self.pending: Pending | None = None
        self.last_width: int | None = None
        self.graph_seen = False
        self.own_columns = False
        # The shared parameters by index, where a method has state for each of them.
        self.columns: list[int] | None = None
        self.unobserved: tuple[Tensor, list[int]] | None = None
        plain = loss_transform is None and jacobian_dtype is None and update_every == 1
        self.steps_alike = plain and not match_sum and are_alike(aggregator)
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
            return self._step_for(call)(self, call)
        if not self._has_choice(call):
            self._use(Loop())
            return self._step_for(call)(self, call)
        case = self._case(call)
        settled = self.auto.settled_on(case)
        if settled is not None:
            if not self.engine is self.rows.engine is settled:
                self._use(settled)
                self._free_unused()
            return self._step_for(call)(self, call)
        with self.auto.engine_of_step(case) as engine:
            self._use(engine)
            if self.auto.settled:
                self._free_unused()
            return self._step_for(call)(self, call)

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
        reach = self.reach_now(call.batch, ones, call.parameters)
        self.note_reach(call.parameters, self.processes.known_reach(reach))

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
        if not self.reads(batch.like(), single_pass):
            return batch.missing
        found = {i for b in batches for i in not_finite(b.values.tolist())}
        bad = sorted(found - batch.missing)
        if bad and self.nonfinite == "raise":
            raise NonFiniteError("losses", [batch.names[i] for i in bad])
        absent = batch.missing.union(bad)
        if bad and (self.nonfinite == "skip" or len(absent) == len(batch.names)):
            return None
        return absent

    def reads(self, losses: Tensor, single_pass: bool) -> bool:
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
        return apart(self, batch, torch.ones_like(batch.values), parameters)[0]

    def conclude(self, batch: Losses, weights: Tensor | None) -> None:
        """Books a step whose gradients were delivered from outside; `weights [T]` or None."""
        self.tasks = batch.names
        self.gather(batch, batch.values, frozenset())
        self.finish(weights, torch.ones_like(batch.values), None, frozenset())

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
        values = only(*self.unobserved)
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
        return only(self.losses, [i for i in range(len(self.tasks)) if i not in self._missed])

    def remember(self) -> Callable[[], None]:
        """What puts everything back as it is now, but for what is gathered."""
        return remembered(self, but=("rows", "pending", "few"))

    @property
    def gathers(self) -> bool:
        """Whether there are micro-batches that are not aggregated yet."""
        return self.pending is not None

    def free_buffers(self) -> None:
        """Gives the memory back that is kept from step to step, but for gradients that wait."""
        if not self.rows.pending:
            self.last_width = self.n_shared
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
                self.rows = self.new_rows()
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
        self.pending = None
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
            "columns": None if self.columns is None else list(self.columns),
            "unobserved": self.unobserved and [_copy(self.unobserved[0]), self.unobserved[1]],
            "pending": None if self.pending is None else self.pending.state_dict(),
            "rows": self.rows.pending_state(parameters),
        }

    def load_state_dict(self, state: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """Takes over a `state_dict()`, with `parameters` as it was; an error changes nothing."""
        device = parameters[0].device
        pending = unobserved = None
        if state["pending"] is not None:
            pending = Pending.from_state_dict(state["pending"], device)
        if state["unobserved"] is not None:
            values, present = state["unobserved"]
            unobserved = values.to(device, copy=True), list(present)
        rows = self.new_rows()
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
        self.columns = None if state["columns"] is None else list(state["columns"])
        self.rows, self.pending, self.unobserved, self.few = rows, pending, unobserved, None
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

    def _step_for(self, call: BackwardCall) -> Callable[[Balancer, BackwardCall], bool]:
        aggregator = self.aggregator
        if not self.needs_jacobian(call.accumulate, call.batch.missing):
            if self.processes.engine is not None and not self._one_pass_does():
                return rows_step
            if not call.lazy:
                return single_step
            return sum_step if self._knows_weights(call.batch.missing) else rows_step
        if call.features is not None:
            return features_step
        if call.independent:
            return independent_step
        gathers = call.accumulate or self.rows.pending or call.lazy
        if isinstance(aggregator, GramianAggregator) and not gathers:
            if aggregator.probed_parameters() is not None:
                return probe_step
            if isinstance(self.engine, Instance):
                return instance_step
            if finds_gramian(self.engine):
                return gramian_step
        return rows_step

    def _one_pass_does(self) -> bool:
        """Whether all parameters get the gradient of the same weighted sum."""
        known = self.pending.weights if self.pending is not None else None
        if known is not None:
            same = known[0] is known[1]
        elif isinstance(self.aggregator, Scalarizer):
            same = not self.match_sum
        else:
            same = self.head_weights is None
        return same and self.heads == "weighted"

    def new_rows(self) -> Rows:
        """An empty buffer of the Jacobian."""
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
            late = missing and self.pending is None and self.refreshes(missing)
            return accumulate and (not self.aggregator.linear or bool(late))
        return self.refreshes(missing)

    def check_gathers(self) -> None:
        """Whether gradients can be kept for the next call."""
        if finds_gramian(self.engine):
            raise ValueError(
                "accumulate=True needs an engine whose gradients add up, found "
                f'jacobian="{self.engine.name}"; use "loop", or one larger batch'
            )

    def _knows_weights(self, missing: frozenset[int]) -> bool:
        """Whether a step of one pass has its weights before its losses."""
        if self.pending is not None and self.pending.weights is not None:
            return True
        if isinstance(self.aggregator, Scalarizer) and self.refreshes(missing):
            # Whom it drops changes the others' weights.
            return self.aggregator.linear and self.nonfinite != "drop"
        return True

    @property
    def n_shared(self) -> int | None:
        """P, the number of shared scalars; None before the first Jacobian."""
        if self.rows.width is None:
            return self.last_width
        columns = self.processes.shards(self.rows.shared)
        return self.rows.width if columns is None else columns.width

    def refreshes(self, missing: frozenset[int]) -> bool:
        """Whether this step computes weights, rather than use the last ones again."""
        if self.weights is None or self.n_steps % self.update_every == 0:
            return True
        # A task comes that they are not of; within a step it stays with those that it began with.
        return self.pending is None and bool(self._lacking - missing)

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

    def whole_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state of the aggregator with all columns, for a checkpoint."""
        aggregator = self.aggregator
        if not (self.own_columns and isinstance(aggregator, JacobianAggregator)):
            return state
        columns = self.processes.shards(self.columns or [])
        assert columns is not None
        values = state["state"]
        whole = {k: columns.whole(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        return {**state, "state": whole}

    def known_reach(
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

    def reach_now(
        self, batch: Losses, factors: Tensor, parameters: Sequence[Tensor]
    ) -> list[Reach | None]:
        """What each task reaches, from the graph; or reached, where it is missing."""
        known = self.known_reach(batch, parameters)
        return reach_of(batch.roots(factors, known), parameters)

    def note_reach(self, parameters: list[Tensor], reach: list[Reach | None]) -> None:
        """For steps that a task is missing from."""
        if None in reach:
            reach = self._remembered(parameters, reach)
        # Of instances none is missing.
        if reach and not isinstance(self.engine, Instance):
            self._reach = parameters, reach

    def absent_after(self, call: BackwardCall, single_pass: bool) -> frozenset[int] | None:
        """Tasks that sit the step out, once lazy losses are evaluated; None skips it."""
        if not call.lazy or call.scale is not None:
            return call.absent
        return self.absent([call.batch, *call.independent], single_pass)

    def gather(self, batch: Losses | LazyLosses, values: Tensor, absent: frozenset[int]) -> Pending:
        """Adds a batch's losses to those of the micro-batches before it."""
        pending, missing = self.pending, batch.missing
        if pending is None:
            self.pending = pending = Pending(values, batch.values, absent - missing, missing)
        else:
            lacks = pending.missing, missing
            pending.values = sum_of(pending.values, values, *lacks)
            pending.losses = sum_of(pending.losses, batch.values, *lacks)
            pending.dropped = pending.dropped | (absent - missing)
            pending.missing = pending.missing & missing
        return pending

    def finish(
        self,
        weights: Tensor | None,
        head_weights: Tensor,
        g: Tensor | None,
        absent: frozenset[int],
        renewed: bool = True,
    ) -> None:
        """Books a step whose gradients are delivered."""
        assert self.pending is not None
        assert self.tasks is not None
        losses = self.pending.losses
        device = losses.device
        self.weights = None if weights is None else upload(weights.detach(), device)
        apart = weights is not None and head_weights is not weights
        self.head_weights = upload(head_weights.detach(), device) if apart else None
        self.gramian, self.losses = g, losses
        present = [i for i in range(len(losses)) if i not in absent]
        self.unobserved = self.pending.values, present
        missing = self.pending.missing
        for i in absent:
            counts, name = self.n_absent if i in missing else self.n_dropped, self.tasks[i]
            counts[name] = counts.get(name, 0) + 1
        self.renewed, self._missed = renewed, missing
        if renewed:
            self._lacking = missing
        self.n_steps += 1
        self.give_up_pending()


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
