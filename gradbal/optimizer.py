"""MultiTaskOptimizer: a torch optimizer whose `backward` balances the gradients of several losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradbal._losses import Losses, Names, read_losses
from gradbal.aggregators.base import (
    Aggregator,
    ClosureAggregator,
    GramianAggregator,
    JacobianAggregator,
    Scalarizer,
    one_of,
)
from gradbal.jacobian import (
    Rows,
    accuracy,
    combine,
    gramian,
    reached_parameters,
    shared_indices,
)
from gradbal.registry import create, near_misses

__all__ = ["MultiTaskOptimizer", "NonFiniteError"]

_ENGINES = ("auto", "loop", "vmap", "gramian", "instance", "sketch")
_FORMAT = 1


class NonFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite.

    Attributes:
        tasks: names of the tasks that it came from.
    """

    def __init__(self, what: str, tasks: Sequence[str | int]) -> None:
        self.tasks = list(tasks)
        names = ", ".join(map(repr, tasks))
        super().__init__(
            f"{what} must be finite, found NaN or inf for task {names}; parameters and state are "
            'unchanged. nonfinite="skip" leaves such steps out, nonfinite="drop" such tasks'
        )


class MultiTaskOptimizer(Optimizer):
    """Wraps any torch optimizer; `backward(losses)` takes the place of `sum(losses).backward()`.

    1. `backward` takes the gradient of each loss, once, over all parameters of the optimizer.
    2. Parameters that two or more losses reach are shared: their gradients are the rows of the
       Jacobian J `[T, P]`. The others belong to the one task that reaches them.
    3. The aggregator turns J, its Gramian or the losses into weights or a direction d `[P]`.
    4. d goes into `.grad` of the shared parameters; the others get their task's own or weighted
       gradient. It goes there as from an ordinary backward pass, so that hooks run and
       gradients add up.
    5. `step` is the wrapped optimizer's own, as are `param_groups`, `state`, `defaults` and the
       hooks: schedulers and `GradScaler` work on this object as on any other optimizer.

    Args:
        optimizer: any torch optimizer over all the parameters to train.
        aggregator: a name of `gradbal.list_aggregators()`, or an instance.
        shared_params: the shared parameters, where the graph should not decide.
        heads: what task-specific parameters get: "own", their gradient as it is; "weighted", it
            times their task's weight; None, the method's own choice.
        jacobian: the engine that takes the gradients; so far "loop", and "auto" which picks it.
        update_every: weights are computed at every k-th step and used again in between, with one
            backward pass.
        loss_transform: None, or "log" to balance the gradients of the losses' logarithms.
        nonfinite: what happens on NaN and inf. "raise" a `NonFiniteError`; "skip" the step, which
            is counted; "drop" the task from this step. A scalarizer sees the losses alone.
        process_group: reserved.
        **aggregator_kwargs: hyperparameters of the named aggregator.

    Attributes:
        optimizer: the wrapped optimizer.
        aggregator: the aggregator.
        weights: after `backward`, `w [T]` of the shared gradient; None for methods without weights.
        gramian: after `backward`, `JJᵀ [T, T]` in float64, or None.
        losses: after `backward`, `[T]`, detached.

    Raises:
        TypeError: not an optimizer, or an unknown keyword of the aggregator.
        ValueError: an option out of range, an unknown aggregator, or no parameters.

    Example:
        >>> import torch
        >>> from gradbal import MultiTaskOptimizer
        >>> model = torch.nn.Linear(3, 2)
        >>> opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), "upgrad")
        >>> out = model(torch.randn(8, 3))
        >>> opt.zero_grad()
        >>> opt.backward([out[:, 0].square().mean(), out[:, 1].abs().mean()])
        >>> opt.step()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        aggregator: str | Aggregator = "upgrad",
        *,
        shared_params: Iterable[Tensor] | None = None,
        heads: Literal["own", "weighted"] | None = None,
        jacobian: str = "auto",
        update_every: int = 1,
        loss_transform: Literal["log"] | None = None,
        nonfinite: Literal["raise", "skip", "drop"] = "raise",
        process_group: Any = None,
        **aggregator_kwargs: Any,
    ) -> None:
        # The base class is not initialised: it would make a second set of groups and state.
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, MultiTaskOptimizer):
            raise TypeError(
                "`optimizer` must be a plain torch.optim.Optimizer, found "
                f"{type(optimizer).__name__}"
            )
        if not any(group["params"] for group in optimizer.param_groups):
            raise ValueError("`optimizer` must have at least one parameter, found none")
        self.aggregator = _make_aggregator(aggregator, aggregator_kwargs)
        _check_options(heads, jacobian, update_every, loss_transform, nonfinite, process_group)
        if isinstance(self.aggregator, JacobianAggregator):
            if heads == "weighted":
                raise ValueError(
                    f"heads must be 'own' for {self.aggregator.name!r}, which has no weights, "
                    "found 'weighted'"
                )
            if update_every != 1:
                raise ValueError(
                    f"update_every must be 1 for {self.aggregator.name!r}, which has no weights "
                    f"to use again, found {update_every}"
                )
        self.optimizer = optimizer
        self.heads: str = heads or self.aggregator.promises.heads
        self.jacobian = "loop"
        self.update_every = update_every
        self.loss_transform = loss_transform
        self.nonfinite = nonfinite
        self.shared_params = self._check_shared(shared_params)
        groups = self.aggregator.param_groups()
        if groups and isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                f"{self.aggregator.name!r} trains weights of its own, in a param group of their "
                "own, which LBFGS does not support"
            )
        for group in groups:
            known = {k: v for k, v in group.items() if k == "params" or k in optimizer.defaults}
            optimizer.add_param_group(known)
        self.weights: Tensor | None = None
        self.gramian: Tensor | None = None
        self.losses: Tensor | None = None
        self._head_weights: Tensor | None = None
        self._tasks: Names | None = None
        self._n_updates = 0
        self._n_skipped = 0
        self._n_dropped: dict[str | int, int] = {}
        self._skip_step = False
        self._clear_pending()
        self._rows = Rows(self.shared_params)
        self._unchecked: _HostCopy | None = None

    # What makes it an optimizer: everything here is the wrapped one's.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's param groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        # The dictionaries of hooks, which the base class's register_* methods write to.
        if name.startswith("_optimizer_") and "optimizer" in self.__dict__:
            return getattr(self.optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the wrapped optimizer's parameters."""
        self.optimizer.zero_grad(set_to_none)

    def __repr__(self) -> str:
        return f"MultiTaskOptimizer({self.optimizer!r}, {self.aggregator!r})"

    def __getstate__(self) -> dict[str, Any]:
        # Schedulers put a patched `step` on the instance; the buffer is not worth copying
        # unless gradients are pending in it.
        state = self.__dict__.copy()
        state.pop("step", None)
        state.pop("_unchecked", None)
        if not self._rows.pending:
            state["_rows"] = Rows(self.shared_params)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._unchecked = None

    # Training.

    def backward(
        self,
        losses: Sequence[Tensor] | Mapping[str, Tensor] | Tensor,
        *,
        features: Tensor | None = None,
        independent: Sequence[Any] = (),
        accumulate: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        retain_graph: bool = False,
    ) -> None:
        """Puts the balanced gradient of the losses into `.grad`, adding to what is there.

        Args:
            losses: T scalar losses, as a list, tuple or dict, or as a 1-D tensor. T, and a dict's
                keys, stay the same from step to step.
            features: reserved.
            independent: reserved.
            accumulate: add this batch's gradients to pending ones and aggregate nothing; the next
                call without it aggregates all of them. Losses and gradients add up, so divide the
                losses by the number of micro-batches for a mean.
            grad_scaler: the `GradScaler` whose `step` follows. The losses are the plain ones;
                gradients land scaled, and an overflow is left to the scaler.
            retain_graph: keep the losses' graph.

        Raises:
            TypeError, ValueError: losses that are not what is said above; nothing has changed then.
            NonFiniteError: a loss or a gradient is NaN or inf, under `nonfinite="raise"`; nothing
                has changed, except that pending gradients are given up if it was a gradient.
        """
        if features is not None:
            raise NotImplementedError("`features` (gradients at a representation) is not there yet")
        if len(independent):
            raise NotImplementedError("`independent` (double sampling) is not there yet")
        batch = read_losses(losses, self._tasks)
        self.aggregator.prepare(len(batch.names), batch.values)
        scale = None
        if grad_scaler is not None and grad_scaler.is_enabled():
            scale = grad_scaler.scale(torch.ones((), device=batch.values.device))
        if self.loss_transform == "log":
            _check_positive(batch)
        absent = self._absent(batch) if scale is None else frozenset()
        self._skip_step = False
        if absent is None:
            self._skip(batch)
            return
        before, self._tasks = self._tasks, batch.names
        try:
            if self._needs_jacobian(accumulate):
                self._backward_rows(batch, absent, accumulate, scale, retain_graph)
            else:
                self._backward_once(batch, absent, accumulate, scale, retain_graph)
        except BaseException:
            self._clear_pending()
            self._rows.pending = False
            self._tasks = before
            raise

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        val_closure: Callable[[], Any] | None = None,
    ) -> Any:
        """The wrapped optimizer's step.

        Args:
            closure: returns the losses. They are evaluated, `backward` is called on them with
                gradients cleared before, and the wrapped optimizer steps; one that asks again
                (LBFGS) gets `Σ w_i ℓ_i` with fresh weights every time.
            val_closure: reserved.

        Returns:
            What the closure returned the first time, or what the wrapped optimizer's step returns.
        """
        if val_closure is not None:
            raise NotImplementedError("`val_closure` (bilevel methods) is not there yet")
        if closure is None:
            self._check_late()
            if self._skip_step:
                return None
            return self.optimizer.step()
        losses, first = self._evaluate(closure)
        if self._skip_step:
            return losses
        answers = [first]

        def again() -> Tensor:
            return answers.pop() if answers else self._evaluate(closure)[1]

        self.optimizer.step(again)  # type: ignore[arg-type]
        return losses

    def update(self, losses: Sequence[Tensor] | Mapping[str, Tensor] | Tensor) -> None:
        """The losses after the step, for methods that look again; the others do nothing.

        Args:
            losses: T scalars, as in `backward`; a graph is not needed.
        """
        tensors = losses.values() if isinstance(losses, Mapping) else losses
        values = torch.stack([torch.as_tensor(l).detach() for l in tensors])
        self.aggregator.update(values)

    def end_epoch(self) -> None:
        """Tells the aggregator that an epoch has ended; methods that do not count do nothing."""
        self.aggregator.end_epoch()

    def diagnostics(self) -> dict[str, Any]:
        """What happened so far and at the last step.

        Returns:
            engine; tasks; steps (calls of `backward` that aggregated); skipped (steps left out);
            dropped (task → steps it sat out); shared (number of shared scalars, None before the
            first Jacobian); weights, losses, gradient_norms `[T]` and cosines `[T, T]` as nested
            lists, None where a method has none; conflicts, the pairs of tasks with a negative
            cosine.
        """
        norms = cosines = conflicts = None
        if self.gramian is not None:
            g = self.gramian.double().cpu()
            n = g.diagonal().clamp_min(0).sqrt()
            c = torch.where(n > 0, g / n / n[:, None], 0.0)
            c = torch.where(n[:, None] > 0, c, 0.0)
            norms, cosines = n.tolist(), c.tolist()
            conflicts = int((c < 0).triu(1).sum())
        has_rows = self._rows._layout is not None
        return {
            "engine": self.jacobian,
            "tasks": None if self._tasks is None else list(self._tasks),
            "steps": self._n_updates,
            "skipped": self._n_skipped,
            "dropped": dict(self._n_dropped),
            "shared": self._rows.jacobian.shape[1] if has_rows else None,
            "weights": None if self.weights is None else self.weights.tolist(),
            "losses": None if self.losses is None else self.losses.tolist(),
            "gradient_norms": norms,
            "cosines": cosines,
            "conflicts": conflicts,
        }

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's `state_dict()`, with the entry "gradbal" for the rest.

        It holds tensors, numbers, strings, lists and dicts, so that
        `torch.load(weights_only=True)` reads it. Gradients pending from `accumulate=True` are not
        part of it, as `.grad` is not part of an optimizer's.
        """
        state = self.optimizer.state_dict()
        state["gradbal"] = {
            "format": _FORMAT,
            "aggregator": self.aggregator.state_dict(),
            "tasks": None if self._tasks is None else list(self._tasks),
            "weights": _copy(self.weights),
            "head_weights": _copy(self._head_weights),
            "updates": self._n_updates,
            "skipped": self._n_skipped,
            "dropped": dict(self._n_dropped),
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a checkpoint of `state_dict()`, or of a bare optimizer like the wrapped one.

        Raises:
            ValueError: a checkpoint of another method, of other tasks, or of other param groups;
                nothing has changed then.
        """
        inner = {k: v for k, v in state_dict.items() if k != "gradbal"}
        mine = state_dict.get("gradbal")
        if mine is None:
            # The bare optimizer's checkpoint lacks the group of the method's own weights.
            own = len(self.aggregator.param_groups())
            current = self.optimizer.state_dict()["param_groups"]
            if own and len(inner["param_groups"]) == len(current) - own:
                inner["param_groups"] = [*inner["param_groups"], *current[-own:]]
            self.optimizer.load_state_dict(inner)
            return
        if mine["format"] != _FORMAT:
            raise ValueError(f"the checkpoint's format must be {_FORMAT}, found {mine['format']}")
        self.aggregator.check_state_dict(mine["aggregator"])
        tasks = None if mine["tasks"] is None else tuple(mine["tasks"])
        if self._tasks is not None and tasks is not None and tasks != self._tasks:
            raise ValueError(
                f"the checkpoint must be of tasks {list(self._tasks)}, found {list(tasks)}"
            )
        before = self.aggregator.state_dict()
        self.aggregator.load_state_dict(mine["aggregator"])
        device = self.optimizer.param_groups[0]["params"][0].device
        for p in self.aggregator.parameters():
            p.data = p.data.to(device)
        try:
            self.optimizer.load_state_dict(inner)
        except BaseException:
            self.aggregator.load_state_dict(before)
            raise
        self._tasks = tasks
        self.weights = _copy(mine["weights"])
        self._head_weights = _copy(mine["head_weights"])
        self.gramian = self.losses = None
        self._n_updates = mine["updates"]
        self._n_skipped = mine["skipped"]
        self._n_dropped = dict(mine["dropped"])
        self._clear_pending()
        self._rows = Rows(self.shared_params)

    # One step, by kind of aggregator.

    def _needs_jacobian(self, accumulate: bool) -> bool:
        if self._rows.pending:
            return True
        if isinstance(self.aggregator, Scalarizer):
            # A sum of micro-batches has the weights of the summed losses, known only at the end.
            return accumulate and not self.aggregator.linear
        return self._refreshes()

    def _refreshes(self) -> bool:
        """Whether this step computes weights, rather than use the last ones again."""
        return self.weights is None or self._n_updates % self.update_every == 0

    def _backward_rows(
        self,
        batch: Losses,
        absent: frozenset[int],
        accumulate: bool,
        scale: Tensor | None,
        retain_graph: bool,
    ) -> None:
        """T passes, then the aggregator on the Jacobian."""
        values, factors = self._transformed(batch)
        cotangents = factors if scale is None else factors * scale.to(factors)
        self._rows.take(
            batch.roots(cotangents),
            self._trained(),
            sit_out=absent,
            retain_graph=retain_graph,
        )
        self._add_pending(batch, values, absent)
        if accumulate:
            self._rows.pending = True
            return
        values, absent = self._pending_values, self._pending_absent
        g, host = self._gramian_on_host(values, scale)
        bad = [i for i in range(len(batch.names)) if i not in absent and not host.finite(i)]
        if bad and scale is not None:
            self._deliver_overflow(batch.names)
            return
        if bad and self.nonfinite == "raise":
            raise NonFiniteError("gradients", [batch.names[i] for i in bad])
        if bad and self.nonfinite == "skip":
            self._skip(batch)
            return
        absent = absent | frozenset(bad)
        self._count_dropped(batch.names, absent)
        present = [i for i in range(len(batch.names)) if i not in absent]
        direction, weights, head_weights = self._aggregate(host, present, scale)
        heads: list[float | Tensor | None] = [None] * len(batch.names)
        for i in present:
            heads[i] = 1.0 if self.heads == "own" else float(head_weights[i])
        self._rows.deliver(direction, heads)
        if isinstance(self.aggregator, Scalarizer):
            self._train_own_weights(values, present, scale)
        self._remember(weights, head_weights, g, self._pending_losses)

    def _gramian_on_host(self, values: Tensor, scale: Tensor | None) -> tuple[Tensor, _OnHost]:
        """G and all else that the host decides on, in one transfer of `[T + 2, T]` numbers."""
        jacobian = self._rows.jacobian
        extremes = self._rows.head_extremes()
        for exact in (False, True):
            g = gramian(jacobian, exact=exact)
            if scale is not None:
                g = g / scale.to(g) ** 2
            packed = torch.cat([g, values.to(g)[None], extremes.to(g)[None]]).cpu()
            host = _OnHost(packed[:-2], packed[-2], packed[-1])
            # Squares of entries beyond 1e±15 may leave float32's range, and squares of NaN stay.
            if exact or host.in_float32_range(self._rows.zero_rows()):
                break
        return g, host

    def _aggregate(
        self, host: _OnHost, present: list[int], scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Direction `[P]` (scaled as J is), weights and head weights `[T]` on the host."""
        aggregator, jacobian = self.aggregator, self._rows.jacobian
        n_tasks = len(jacobian)
        everyone = len(present) == n_tasks
        if isinstance(aggregator, JacobianAggregator):
            rows = jacobian if everyone else jacobian[present]
            if scale is not None:
                rows = rows / scale.to(rows)
            direction = aggregator.direction(rows, host.values[present])
            if scale is not None:
                direction = direction * scale.to(direction)
            return direction, None, torch.ones(n_tasks, dtype=torch.float64)
        w = torch.zeros(n_tasks, dtype=torch.float64)
        head_weights = w.clone()
        values = host.values if everyone else host.values[present]
        if isinstance(aggregator, Scalarizer):
            w[present] = self._scalarizer_weights(values, present).double()
            head_weights = w
        else:
            assert isinstance(aggregator, GramianAggregator)
            g = host.gramian if everyone else host.gramian[present][:, present]
            aggregator.accuracy = accuracy(jacobian)
            w[present] = aggregator.weights(g, values).double()
            head_weights[present] = aggregator.head_weights(w[present], g).double()
        return combine(w, jacobian), w, head_weights

    def _deliver_overflow(self, names: Names) -> None:
        """Gradients that GradScaler finds infinite, so that it skips the step and backs off."""
        jacobian = self._rows.jacobian
        overflow = torch.full_like(jacobian[0], float("inf"))
        self._rows.deliver(overflow, [1.0] * len(names))
        self._clear_pending()

    def _backward_once(
        self,
        batch: Losses,
        absent: frozenset[int],
        accumulate: bool,
        scale: Tensor | None,
        retain_graph: bool,
    ) -> None:
        """One pass of `Σ w_i ℓ_i`, for scalarizers and for weights that are used again."""
        values, factors = self._transformed(batch)
        present = [i for i in range(len(batch.names)) if i not in absent]
        first = self._pending_weights is None
        reuse = not isinstance(self.aggregator, Scalarizer) or not self._refreshes()
        if first:
            self._pending_weights = self._once_weights(values, present, reuse)
        assert self._pending_weights is not None
        w, head_weights = self._pending_weights
        if absent:
            kept = torch.zeros_like(w)
            kept[present] = w[present]
            w = kept
        scaled = factors if scale is None else factors * scale.to(factors)
        parameters = self._trained()
        if self.heads == "weighted" and head_weights is w:
            batch.backward(w.to(scaled) * scaled, parameters, retain_graph)
        else:
            self._backward_apart(batch, w, head_weights, scaled, present, parameters, retain_graph)
        self._add_pending(batch, values, absent)
        if accumulate:
            return
        self._count_dropped(batch.names, self._pending_absent)
        if not reuse:
            self._train_own_weights(self._pending_values, present, scale)
        if batch.values.device.type != "cpu" and scale is None:
            self._unchecked = _HostCopy(self._pending_losses, batch.names)
        weights, heads = self._pending_weights
        self._remember(weights, heads, None, self._pending_losses)

    def _once_weights(
        self, values: Tensor, present: list[int], reuse: bool
    ) -> tuple[Tensor, Tensor]:
        if reuse:
            assert self.weights is not None
            heads = self.weights if self._head_weights is None else self._head_weights
            same = heads is self.weights or torch.equal(heads, self.weights.to(heads))
            return self.weights, self.weights if same else heads
        w = torch.zeros_like(values)
        part = values if len(present) == len(values) else values[present]
        w[present] = self._scalarizer_weights(part, present).to(w)
        return w, w

    def _backward_apart(
        self,
        batch: Losses,
        w: Tensor,
        head_weights: Tensor,
        factors: Tensor,
        present: list[int],
        parameters: list[Tensor],
        retain_graph: bool,
    ) -> None:
        """Shared and task-specific parameters with different weights: a second, short pass."""
        nodes = [
            root.grad_fn if isinstance(root, Tensor) else root.node
            for root, _ in batch.roots(factors)
        ]
        reach = reached_parameters(nodes, parameters)
        shared = set(shared_indices(parameters, reach, self.shared_params))
        apart = torch.zeros_like(factors)
        apart[present] = 1.0 if self.heads == "own" else head_weights.to(apart)[present]
        trunk = [p for k, p in enumerate(parameters) if k in shared]
        rest = [p for k, p in enumerate(parameters) if k not in shared]
        if rest:
            batch.backward(apart * factors, rest, True)
        batch.backward(w.to(factors) * factors, trunk, retain_graph)

    def _scalarizer_weights(self, values: Tensor, present: list[int]) -> Tensor:
        """`∂S/∂ℓ [k]` of the scalarizer at the values of the k tasks that take part."""
        leaf = values.detach().clone().requires_grad_()
        with torch.enable_grad():
            (w,) = torch.autograd.grad(self._scalarize(leaf, present), leaf)
        return w

    def _scalarize(self, leaf: Tensor, present: list[int]) -> Tensor:
        aggregator = self.aggregator
        assert isinstance(aggregator, Scalarizer)
        assert self._tasks is not None
        if aggregator.per_task_state and len(present) < len(self._tasks):
            return aggregator.scalarize(leaf, tasks=present)  # type: ignore[call-arg]
        return aggregator.scalarize(leaf)

    def _train_own_weights(
        self, values: Tensor, present: list[int], scale: Tensor | None
    ) -> None:
        """Puts the gradient of a scalarizer's learnable weights into their `.grad`."""
        own = self.aggregator.parameters()
        if not own:
            return
        with torch.enable_grad():
            total = self._scalarize(values.detach()[present], present)
            grads = torch.autograd.grad(total, own)
        if scale is not None:
            grads = tuple(g * scale.to(g) for g in grads)
        torch.autograd.backward(own, grads)

    # Small parts.

    def _trained(self) -> list[Tensor]:
        own = {id(p) for p in self.aggregator.parameters()}
        trained = [
            p
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.requires_grad and id(p) not in own
        ]
        if not trained:
            raise ValueError("at least one parameter must require grad, found none")
        for p in trained:
            if p.is_complex():
                raise ValueError(
                    f"parameters must be real, found {p.dtype}; train torch.view_as_real of it"
                )
        return trained

    def _transformed(self, batch: Losses) -> tuple[Tensor, Tensor]:
        """The losses that the aggregator sees, and the derivative of each by the loss itself."""
        values = batch.values
        if values.dtype in (torch.float16, torch.bfloat16):
            values = values.float()
        if self.loss_transform == "log":
            return values.log(), 1.0 / values
        return values, torch.ones_like(values)

    def _absent(self, batch: Losses) -> frozenset[int] | None:
        """Tasks that sit this step out for their loss is not finite; None to skip the step."""
        if batch.values.device.type != "cpu" and isinstance(self.aggregator, Scalarizer):
            # Reading would wait for the device; `step` looks at a copy.
            return frozenset()
        if batch.values.device.type != "cpu" and self.nonfinite != "drop":
            # The losses come to the host together with the Gramian.
            return frozenset()
        bad = [i for i, v in enumerate(batch.values.tolist()) if not _is_finite(v)]
        if not bad:
            return frozenset()
        if self.nonfinite == "raise":
            raise NonFiniteError("losses", [batch.names[i] for i in bad])
        return None if self.nonfinite == "skip" or len(bad) == len(batch.names) else frozenset(bad)

    def _check_late(self) -> None:
        """Looks at the losses of a scalarizer on an accelerator, copied while `backward` ran."""
        late, self._unchecked = self._unchecked, None
        bad = late.not_finite() if late is not None else []
        if bad and self.nonfinite == "raise":
            raise NonFiniteError("losses", bad)
        if bad:
            self._n_skipped += 1
            self._skip_step = True

    def _skip(self, batch: Losses) -> None:
        self._tasks = batch.names
        self._n_skipped += 1
        self._skip_step = True
        self._clear_pending()
        self._rows.pending = False

    def _count_dropped(self, names: Names, absent: frozenset[int]) -> None:
        for i in absent:
            self._n_dropped[names[i]] = self._n_dropped.get(names[i], 0) + 1

    def _add_pending(self, batch: Losses, values: Tensor, absent: frozenset[int]) -> None:
        """Adds a micro-batch's losses to those of the micro-batches before it."""
        plain = batch.values
        if self._pending_any:
            values, plain = self._pending_values + values, self._pending_losses + plain
            absent = self._pending_absent | absent
        self._pending_any = True
        self._pending_values, self._pending_losses = values, plain
        self._pending_absent = absent

    def _clear_pending(self) -> None:
        self._pending_any = False
        self._pending_values = self._pending_losses = torch.empty(0)
        self._pending_absent: frozenset[int] = frozenset()
        self._pending_weights: tuple[Tensor, Tensor] | None = None

    def _remember(
        self,
        weights: Tensor | None,
        head_weights: Tensor | None,
        g: Tensor | None,
        losses: Tensor,
    ) -> None:
        self.weights = None if weights is None else weights.detach().to(losses.device)
        self._head_weights = None if head_weights is None else head_weights.to(losses.device)
        self.gramian = g
        self.losses = losses
        self._n_updates += 1
        self._clear_pending()

    def _evaluate(self, closure: Callable[[], Any]) -> tuple[Any, Tensor]:
        """Losses from the closure, balanced into `.grad`, and `Σ w_i ℓ_i`."""
        self.zero_grad()
        with torch.enable_grad():
            losses = closure()
        if losses is None:
            raise TypeError("the closure must return the losses, found None")
        self.backward(losses)
        self._check_late()
        if self.losses is None:
            return losses, torch.zeros(())
        w = torch.ones_like(self.losses) if self.weights is None else self.weights.to(self.losses)
        return losses, (w * self.losses).sum()

    def _check_shared(self, shared: Iterable[Tensor] | None) -> list[Tensor] | None:
        if shared is None:
            return None
        chosen = list(shared)
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        strangers = sum(1 for p in chosen if id(p) not in known)
        if not chosen or strangers:
            raise ValueError(
                "`shared_params` must be parameters of the wrapped optimizer, found "
                + (f"{strangers} of {len(chosen)} that are not" if chosen else "none")
            )
        return chosen


class _OnHost:
    """What comes from the device once a step: G `[T, T]`, losses `[T]`, the heads' extremes `[T]`."""

    def __init__(self, g: Tensor, values: Tensor, extremes: Tensor) -> None:
        self.gramian, self.values = g, values
        self._checks = torch.stack([g.diagonal(), values, extremes]).isfinite().all(0).tolist()
        self._squares = g.diagonal().tolist()

    def finite(self, i: int) -> bool:
        """Whether loss, gradient and head gradient of task i are."""
        return bool(self._checks[i])

    def in_float32_range(self, zero_rows: Sequence[int]) -> bool:
        """Whether no square norm of a row lies where float32 products lose it."""
        return all(
            1e-25 < s < 1e35 for i, s in enumerate(self._squares) if i not in set(zero_rows)
        )


class _HostCopy:
    """Loss values on their way from an accelerator, without waiting for it."""

    def __init__(self, values: Tensor, names: Names) -> None:
        self.names = names
        self.event = None
        if values.device.type == "cuda":
            self.host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.host.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = values

    def not_finite(self) -> list[str | int]:
        """Names of the tasks whose loss is NaN or inf."""
        if self.event is not None:
            self.event.synchronize()
        values = self.host.tolist()
        return [name for name, v in zip(self.names, values, strict=True) if not _is_finite(v)]


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _check_positive(batch: Losses) -> None:
    for name, value in zip(batch.names, batch.values.tolist(), strict=True):
        if value <= 0:
            raise ValueError(
                f'loss_transform="log" needs positive losses, found {value:g} for task {name!r}; '
                "add an offset to that loss"
            )


def _make_aggregator(aggregator: str | Aggregator, kwargs: dict[str, Any]) -> Aggregator:
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
    if isinstance(made, ClosureAggregator):
        raise NotImplementedError("methods that evaluate a closure again are not there yet")
    return made


def _check_options(
    heads: Any, jacobian: Any, update_every: Any, loss_transform: Any, nonfinite: Any, group: Any
) -> None:
    one_of("heads", heads, (None, "own", "weighted"))
    if jacobian not in _ENGINES:
        raise ValueError(
            f"`jacobian` must be one of {', '.join(map(repr, _ENGINES))}, found {jacobian!r}"
            f"{near_misses(jacobian, list(_ENGINES))}"
        )
    if jacobian not in ("auto", "loop"):
        raise NotImplementedError(f'`jacobian="{jacobian}"` is not there yet; use "loop"')
    if isinstance(update_every, bool) or not isinstance(update_every, int) or update_every < 1:
        raise ValueError(f"`update_every` must be a positive integer, found {update_every!r}")
    one_of("loss_transform", loss_transform, (None, "log"))
    one_of("nonfinite", nonfinite, ("raise", "skip", "drop"))
    if group is not None:
        raise NotImplementedError("`process_group` (several processes) is not there yet")
