"""MultiTaskOptimizer: a torch optimizer whose `backward` balances several losses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradbal._balancer import BackwardCall, Balancer
from gradbal._checks import (
    check_call,
    check_closures,
    check_fit,
    check_instances,
    check_options,
    check_positive,
    check_shared,
    check_tasks,
    make_aggregator,
)
from gradbal._closures import Closure, Evaluations, read_values
from gradbal._losses import Losses, read_instances, read_losses
from gradbal._nonfinite import LateCheck, NonFiniteError, not_finite
from gradbal.aggregators.base import (
    Aggregator,
    BilevelAggregator,
    ClosureAggregator,
    Scalarizer,
)
from gradbal.jacobian import Instance, make_engine

__all__ = ["MultiTaskOptimizer", "NonFiniteError"]

_FORMAT = 1


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
        jacobian: the engine that takes the gradients; so far "loop", "auto" which picks it, and
            "instance", with which the losses are a 1-D tensor of those of single instances, as from
            `reduction="none"`, and each is a task. One pass of their sum finds the Gramian, layer
            by layer, and one of the weighted losses follows. Instances must not mix on the way from
            a parameter to a loss; at the first step, whenever the graph is another one, and at
            steps 2, 4, 8, ... with the same one, further passes find out, and which rows of a
            layer are whose. Where rows go by the data (indices, sorting, extremes, masks, custom
            functions) that is every step. Parameters in linear, convolutional, normalising and
            embedding layers cost no pass; what others (a position table, an RNN in one node) act
            through is gone through backwards once for each instance. T may change from step to
            step for methods that have no state for each task.
        update_every: weights are computed at every k-th step and used again in between, with one
            backward pass.
        loss_transform: None, or "log" to balance the gradients of the losses' logarithms.
        nonfinite: what happens on NaN and inf. "raise" a `NonFiniteError`; "skip" the step, which
            is counted; "drop" the task from this step. A scalarizer sees the losses alone.
        process_group: reserved.
        match_sum: multiply the shared gradient by T, for methods whose d is g where all gradients
            are g; the gradients of heads stay as they are. Some official codes do so, to keep the
            learning rate of a sum of losses.
        **aggregator_kwargs: hyperparameters of the named aggregator.

    Attributes:
        optimizer: the wrapped optimizer.
        aggregator: the aggregator.

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
        match_sum: bool = False,
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
        self.aggregator = make_aggregator(aggregator, aggregator_kwargs)
        check_options(heads, jacobian, update_every, loss_transform, nonfinite, process_group)
        check_fit(self.aggregator, heads, update_every, match_sum, loss_transform, nonfinite)
        if jacobian == "instance":
            check_instances(self.aggregator, update_every)
        groups = self.aggregator.param_groups()
        if groups and isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                f"{self.aggregator.name!r} trains weights of its own, in a param group of their "
                "own, which LBFGS does not support"
            )
        if isinstance(self.aggregator, ClosureAggregator) and isinstance(
            optimizer, torch.optim.LBFGS
        ):
            raise ValueError(
                f"{self.aggregator.name!r} does not work with LBFGS, which evaluates losses itself"
            )
        self._balancer = Balancer(
            self.aggregator,
            heads=heads or self.aggregator.promises.heads,
            shared_params=check_shared(shared_params, optimizer),
            update_every=update_every,
            loss_transform=loss_transform,
            nonfinite=nonfinite,
            match_sum=match_sum,
            engine=make_engine(jacobian),
        )
        for group in groups:
            known = {k: v for k, v in group.items() if k == "params" or k in optimizer.defaults}
            optimizer.add_param_group(known)
        self.optimizer = optimizer
        self._n_skipped = 0
        self._skip_step = False
        self._spoiled = False
        self._late: LateCheck | None = None
        self._in_closure = False

    @property
    def weights(self) -> Tensor | None:
        """`w [T]` of the shared gradient at the last step; None for methods without weights."""
        return self._balancer.weights

    @property
    def gramian(self) -> Tensor | None:
        """`JJᵀ [T, T]` in float64 at the last step; None where no Jacobian was taken."""
        return self._balancer.gramian

    @property
    def losses(self) -> Tensor | None:
        """The losses `[T]` of the last step, detached; summed over its micro-batches."""
        return self._balancer.losses

    # What makes it an optimizer: everything here is the wrapped one's.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's param groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
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
        # Schedulers put a patched `step` on the instance.
        state = self.__dict__.copy()
        state.pop("step", None)
        state["_late"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

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
            losses: T scalar losses, as a list, tuple or dict, or as a 1-D tensor (one made by
                `torch.stack` needs torch 2.5). T, and a dict's keys, stay the same from step to
                step, except with `jacobian="instance"`, which takes a 1-D tensor alone. A 1-D
                tensor made in any other way cannot be taken apart elsewhere: every loss then
                reaches all that it was made from.
            features: z, the representation that the heads start from, for the methods that work
                there (`mgda_ub`, `aligned_mtl_ub`, ...) and any other that works on the Gramian.
                The Jacobian is then taken at z, flattened over batch and features; one pass goes on
                from z through the trunk.
            independent: the losses of further, independent batches, for the methods that sample
                twice (`modo`, `sdmgrad`).
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
        balancer = self._balancer
        instances = isinstance(balancer.engine, Instance)
        check_call(self.aggregator, features, independent, accumulate, self._in_closure, instances)
        read = read_instances if instances else read_losses
        batch = read(losses, None if balancer.varies else balancer.tasks)
        others = tuple(read_losses(l, batch.names) for l in independent)
        device = batch.values.device
        if balancer.loss_transform == "log" and device.type == "cpu":
            # Elsewhere the NaN of such a logarithm is found, without waiting for the device.
            for each in (batch, *others):
                check_positive(each)
        parameters = self._trained()
        single_pass = not balancer.needs_jacobian(accumulate)
        scale = absent = None
        if grad_scaler is not None and grad_scaler.is_enabled():
            # From here on an overflow is the scaler's to deal with.
            scale, absent = grad_scaler.scale(torch.ones((), device=device)), frozenset[int]()
        else:
            absent = self._absent([batch, *others], single_pass)
        self.aggregator.learning_rate = _learning_rate(self.optimizer)
        with _unchanged_by_errors(self.aggregator):
            if absent is not None:
                self.aggregator.prepare(len(batch.names), batch.values)
            self._late, self._skip_step = None, False
            delivered = (
                absent is not None
                and not self._spoiled
                and balancer.backward(
                    BackwardCall(
                        batch, parameters, absent, accumulate, scale, retain_graph, features, others
                    )
                )
            )
        if self._spoiled:
            # One of this step's micro-batches was not finite: the whole step is left out.
            self._spoiled, self._skip_step = accumulate, True
        elif not delivered:
            balancer.give_up_pending()
            self._n_skipped += 1
            self._spoiled, self._skip_step = accumulate, True
        elif (
            scale is None
            and device.type != "cpu"
            and single_pass
            and not accumulate
            and not self._drops_from(single_pass)
        ):
            self._late = LateCheck(balancer.found_late(), batch.names)

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        val_closure: Callable[[], Any] | None = None,
    ) -> Any:
        """The wrapped optimizer's step.

        Args:
            closure: returns the losses. They are evaluated, `backward` is called on them with
                gradients cleared before, and the wrapped optimizer steps; one that asks again
                (LBFGS) gets `Σ w_i ℓ_i` with fresh weights every time. Methods that look again
                call it once more or twice: without grad, from the same random state, and with the
                buffers of all modules (BatchNorm's running statistics) put back.
            val_closure: returns the losses of a validation batch, the same within one step; for the
                bilevel methods (`moml`, `auto_lambda`, `forum`).

        Returns:
            What the closure returned the first time, or what the wrapped optimizer's step returns.

        Raises:
            ValueError: the method needs a closure that is not there, or has no use for one that is.
        """
        aggregator = self.aggregator
        check_closures(aggregator, closure, val_closure)
        if closure is None:
            self._check_late()
            if self._skip_step:
                return None
            self._balancer.observe()
            return self.optimizer.step()
        train = Closure(closure, self._devices())
        if isinstance(aggregator, BilevelAggregator):
            assert val_closure is not None
            return self._bilevel_step(train, Closure(val_closure, self._devices()))
        losses, first = self._evaluate(train)
        if self._skip_step:
            return losses
        # Before the closure is asked again, so that it is always the same objective.
        self._balancer.observe()
        # Steps that use weights again (update_every) have nothing to learn from.
        renewed = (self._balancer.n_steps - 1) % self._balancer.update_every == 0
        looking = aggregator if isinstance(aggregator, ClosureAggregator) and renewed else None
        if looking is not None and looking.looks_around:
            self._look_around(looking, train, losses)
        answers = [first]

        def again() -> Tensor:
            return answers.pop() if answers else self._evaluate(train)[1]

        self.optimizer.step(again)  # type: ignore[arg-type]
        # What it evaluated on its way were no steps.
        self._balancer.unobserved = None
        if looking is not None and looking.looks_after:
            looking.update(read_values(train.again(grad=False), self._balancer.tasks))
        return losses

    def update(self, losses: Sequence[Tensor] | Mapping[str, Tensor] | Tensor) -> None:
        """The losses after the step, for methods that look again; the others do nothing.

        Args:
            losses: T scalars, as in `backward`; a graph is not needed.

        Raises:
            TypeError, ValueError: not the losses of the same tasks.
        """
        if isinstance(self.aggregator, ClosureAggregator) and self.aggregator.looks_after:
            self.aggregator.learning_rate = _learning_rate(self.optimizer)
            self.aggregator.update(read_values(losses, self._balancer.tasks))

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
        balancer = self._balancer
        return {
            "engine": balancer.engine.name,
            "tasks": None if balancer.tasks is None else list(balancer.tasks),
            "steps": balancer.n_steps,
            "skipped": self._n_skipped,
            "dropped": dict(balancer.n_dropped),
            "shared": balancer.rows.width,
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
            "balancer": self._balancer.state_dict(),
            "skipped": self._n_skipped,
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
        check_tasks(self._balancer.tasks, mine["balancer"]["tasks"])
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
        self._balancer.load_state_dict(mine["balancer"])
        self._n_skipped = mine["skipped"]
        self._skip_step = self._spoiled = False
        self._late = None

    # Small parts.

    def _trained(self) -> list[Tensor]:
        """The parameters to train, without the aggregator's own."""
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

    def _devices(self) -> list[torch.device]:
        """Where the trained parameters are."""
        return sorted({p.device for p in self._trained()}, key=str)

    def _look_around(self, aggregator: ClosureAggregator, train: Closure, losses: Any) -> None:
        """Lets the method evaluate the closure around the current point, along the gradient."""
        batch = read_losses(losses, self._balancer.tasks)
        block = self._trained()
        if aggregator.scope == "shared":
            block = self._balancer.shared_parameters(batch, block)
        evaluations = Evaluations(train, None, block, self.optimizer, batch.names)
        aggregator.look(evaluations, batch.values)

    def _bilevel_step(self, train: Closure, validation: Closure) -> Any:
        aggregator, balancer = self.aggregator, self._balancer
        assert isinstance(aggregator, BilevelAggregator)
        self.zero_grad()
        losses = train.first()
        batch = read_losses(losses, balancer.tasks)
        if self._absent([batch], single_pass=True) is None:
            self._n_skipped += 1
            return losses
        evaluations = Evaluations(train, validation, self._trained(), self.optimizer, batch.names)
        aggregator.learning_rate = _learning_rate(self.optimizer)
        try:
            evaluations.begin(batch)
            with _unchanged_by_errors(aggregator):
                aggregator.prepare(len(batch.names), batch.values)
                found = aggregator.step(evaluations)
                if aggregator.gives_gradient:
                    evaluations.deliver(found)
                else:
                    batch.backward(found, self._trained(), False)
        except NonFiniteError:
            if balancer.nonfinite == "raise":
                raise
            self._n_skipped += 1
            return losses
        balancer.conclude(batch, None if aggregator.gives_gradient else found)
        self.optimizer.step()
        return losses

    def _drops_from(self, single_pass: bool) -> bool:
        """Whether a task may have to be left out of a single pass, before it starts."""
        drops = self._balancer.nonfinite == "drop" and not isinstance(self.aggregator, Scalarizer)
        return drops and single_pass

    def _absent(self, batches: Sequence[Losses], single_pass: bool) -> frozenset[int] | None:
        """Tasks that sit this step out since their loss is not finite; None skips the step."""
        policy, batch = self._balancer.nonfinite, batches[0]
        if batch.values.device.type != "cpu" and not self._drops_from(single_pass):
            # Reading would wait for the device. The losses come to the host with the Gramian; after
            # a single pass `step` looks at a copy.
            return frozenset()
        bad = sorted({i for b in batches for i in not_finite(b.values.tolist())})
        if bad and policy == "raise":
            raise NonFiniteError("losses", [batch.names[i] for i in bad])
        if bad and (policy == "skip" or len(bad) == len(batch.names)):
            return None
        return frozenset(bad)

    def _check_late(self) -> None:
        """Looks at losses that were on their way to the host while `backward` ran."""
        late, self._late = self._late, None
        bad = [] if late is None else late.bad()
        if bad and self._balancer.nonfinite == "raise":
            raise NonFiniteError("losses and their weights", bad)
        if bad:
            self._n_skipped += 1
            self._skip_step = True
            if isinstance(self.aggregator, ClosureAggregator):
                self.aggregator.give_up()

    def _evaluate(self, closure: Closure) -> tuple[Any, Tensor]:
        """Losses from the closure, balanced into `.grad`, and `Σ w_i ℓ_i`."""
        self.zero_grad()
        losses = closure.first()
        if losses is None:
            raise TypeError("the closure must return the losses, found None")
        self._in_closure = True
        try:
            self.backward(losses)
        finally:
            self._in_closure = False
        self._check_late()
        if self.losses is None:
            return losses, torch.zeros(())
        w = torch.ones_like(self.losses) if self.weights is None else self.weights.to(self.losses)
        return losses, (w * self.losses).sum()


@contextlib.contextmanager
def _unchanged_by_errors(aggregator: Aggregator) -> Iterator[None]:
    """What a method remembers from one evaluation of the losses to the next is put back."""
    before = aggregator.state_dict() if isinstance(aggregator, ClosureAggregator) else None
    try:
        yield
    except BaseException:
        if before is not None:
            aggregator.load_state_dict(before)
        raise


def _learning_rate(optimizer: Optimizer) -> float | None:
    lr = optimizer.param_groups[0].get("lr")
    # Reading a tensor from an accelerator would wait for it.
    return None if lr is None or (isinstance(lr, Tensor) and lr.device.type != "cpu") else float(lr)
