"""MultiTaskOptimizer: a torch optimizer whose `backward` balances several losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradbal._balancer import BackwardCall, Balancer
from gradbal._checkpoint import check_groups, completed, pack, put_back_on_error, unpack
from gradbal._checks import (
    check_all_there,
    check_batch_size,
    check_call,
    check_closures,
    check_fit,
    check_in_closure,
    check_jacobian_dtype,
    check_lazy,
    check_options,
    check_positive,
    check_shared,
    check_tasks,
    check_transform,
    make_aggregator,
)
from gradbal._closures import Closure, Evaluations, read_values
from gradbal._engine import make_engine
from gradbal._few import Few, Taken
from gradbal._lazy import LazyLosses, read_functions
from gradbal._losses import Losses, read_instances, read_losses
from gradbal._nonfinite import LateCheck, NonFiniteError
from gradbal._undo import (
    Reference,
    UndoneOnErrors,
    interrupts_held_back,
    may_ask_again,
    parameters_remembered,
    remembered,
)
from gradbal.aggregators.base import Aggregator, BilevelAggregator, ClosureAggregator
from gradbal.distributed import is_sharded, sharded_like
from gradbal.jacobian import Instance

__all__ = ["MultiTaskOptimizer", "NonFiniteError"]

_Method = TypeVar("_Method", bound=Callable[..., Any])

_FORMAT = 2

# In a compiled training step these run as they are, between its compiled parts. torch.optim's own
# marker, since `torch.compiler.disable` imports the compiler at once, which takes seconds.
_not_compiled: Callable[[_Method], _Method] = getattr(
    torch, "_disable_dynamo", lambda method: method
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
        jacobian: the engine that takes the gradients. "loop": one backward pass a loss. "vmap": the
            part that losses share is walked once for all of them, where autograd can batch it
            (needs torch 2.5). "gramian": gradients are kept as factors where that is cheaper (wide
            layers at small batches), and J is never formed; "sketch": k numbers of each gradient
            are kept instead of P, and the Gramian is estimated; both for methods that the Gramian
            suffices. "instance": the losses are a 1-D tensor of those of single instances, as from
            `reduction="none"`, each a task; see `gradbal.jacobian.Instance` for what is required.
            "auto": "loop", and in the first steps of larger models "gramian" and "vmap" in turn
            with it where the method and the model allow; whichever is fastest stays. Engines agree
            up to rounding: under `torch.use_deterministic_algorithms(True)` there is no trial.
        chunk_size: for "vmap" and "auto", how many losses go together at most, which bounds
            memory; None for all of them.
        update_every: weights are computed at every k-th step and used again in between, with one
            backward pass.
        loss_transform: None, or "log" to balance the gradients of the losses' logarithms.
        nonfinite: what happens on NaN and inf. "raise" a `NonFiniteError`; "skip" the step, which
            is counted; "drop" the task from this step. A scalarizer sees the losses alone.
        process_group: the `torch.distributed` group whose processes take each step together, with
            a part of the batch each; see `gradbal.distributed`. None finds it from the DDP or FSDP
            module that the parameters belong to; "local" is this process alone.
        sketch_size: k of jacobian="sketch", 65,536 if left out. Cosines are off by 1/√k (one
            standard error), and exact where P ≤ k.
        match_sum: multiply the shared gradient by T, for methods whose d is g where all gradients
            are g; the gradients of heads stay as they are. Some official codes do so, to keep the
            learning rate of a sum of losses.
        jacobian_dtype: what J is kept in; None for the parameters' dtype. `torch.bfloat16` halves
            the memory of float32 rows. Every entry is rounded, by at most 2^-9 of it, and so is d;
            products and sums are no less exact than those of float32 rows, and `.grad` has the
            parameters' dtype. Aggregators that look at J itself see it, and give d, in this dtype,
            and `accumulate=True` rounds at every batch. Rows that are closer than the rounding
            (cosines above 1 - 1e-5) are not told apart. Never wider than the parameters; not
            `torch.float16`, in which small gradients vanish and large ones overflow.
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
        chunk_size: int | None = None,
        update_every: int = 1,
        loss_transform: Literal["log"] | None = None,
        nonfinite: Literal["raise", "skip", "drop"] = "raise",
        process_group: Any = None,
        match_sum: bool = False,
        sketch_size: int | None = None,
        jacobian_dtype: torch.dtype | None = None,
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
        check_options(heads, update_every, loss_transform, nonfinite, process_group)
        self._process_group = Reference(process_group)
        check_jacobian_dtype(jacobian_dtype, jacobian, optimizer)
        check_fit(self.aggregator, heads, update_every, match_sum, loss_transform, nonfinite)
        if jacobian == "instance" and update_every != 1:
            raise ValueError(
                "update_every must be 1 with jacobian='instance', since the next batch has other "
                f"instances, which the weights are not of; found {update_every}"
            )
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
            engine=make_engine(
                self.aggregator, jacobian, chunk_size=chunk_size, sketch_size=sketch_size
            ),
            jacobian_dtype=jacobian_dtype,
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
        self._taken = False
        # Whether `.grad` holds what `backward` has put there and `step` has not used yet.
        self._delivered = False
        # What makes the aggregator what it was before gradients that a GradScaler has still to
        # pass on, or None; it returns whether it has.
        self._before: Callable[[], bool] | None = None

    @property
    def weights(self) -> Tensor | None:
        """`w [T]` of the shared gradient at the last step; None for methods without weights."""
        return self._balancer.weights

    @property
    def gramian(self) -> Tensor | None:
        """`JJᵀ [T, T]` in float64 at the last step, estimated with jacobian="sketch"; None where no
        Jacobian was taken."""
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

    def zero_grad(self, set_to_none: bool = True, *, free_buffers: bool = False) -> None:
        """Clears the gradients of the wrapped optimizer's parameters.

        Args:
            set_to_none: as in torch.
            free_buffers: give back the memory of the Jacobian as well, which is otherwise kept from
                step to step; the next `backward` takes it anew. Gradients that wait after
                `accumulate=True` stay.
        """
        self._undo_left_out()
        if free_buffers:
            self._balancer.free_buffers()
        self.optimizer.zero_grad(set_to_none)
        self._delivered = False

    def __repr__(self) -> str:
        return f"MultiTaskOptimizer({self.optimizer!r}, {self.aggregator!r})"

    def __getstate__(self) -> dict[str, Any]:
        # Schedulers put a patched `step` on the instance.
        state = self.__dict__.copy()
        state.pop("step", None)
        state["_before"] = self._state_before()
        # Copies of parameters come without `.grad`.
        state["_grads"] = [p.grad for p in self._everything()] if self._delivered else []
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        grads, before = state.pop("_grads"), state.pop("_before")
        self.__dict__.update(state)
        self._set_before(before)
        if grads:
            self._set_grads(grads)

    # Training.

    @_not_compiled
    def backward(
        self,
        losses: Sequence[Tensor | None]
        | Mapping[str, Tensor | None]
        | Tensor
        | Sequence[Callable[[], Tensor] | None]
        | Mapping[str, Callable[[], Tensor] | None],
        *,
        features: Tensor | None = None,
        independent: Sequence[Any] = (),
        accumulate: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        retain_graph: bool = False,
        batch_size: float | Sequence[float] | None = None,
    ) -> None:
        """Puts the balanced gradient of the losses into `.grad`, adding to what is there.

        Args:
            losses: T scalar losses, as a list, tuple or dict, or as a 1-D tensor (one made by
                `torch.stack` needs torch 2.5). T, and a dict's keys, stay the same from step to
                step, except with `jacobian="instance"`, which takes a 1-D tensor alone. A 1-D
                tensor made in any other way cannot be taken apart elsewhere: every loss then
                reaches all that it was made from. Or T functions without arguments in their place,
                as a list, tuple or dict: each is called once, in the order of the first step, right
                before its own backward pass, and its graph is freed before the next is called. Then
                one task's activations are there at a time, and turns and weights that do not depend
                on the losses are settled before any is known. None in place of a loss or function,
                at least one of which must be there: the task is absent from this batch. It sits
                the step out and its state waits; over micro-batches it takes part with those that
                it is in. Its entry in `losses` is NaN, and `diagnostics()` counts it. What it
                reaches is as it was when it last was there. With `update_every`, weights are
                computed anew when a task comes that they are not of.
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
            retain_graph: keep the losses' graph; with functions, for what they have in common.
            batch_size: with several processes, what this one's losses are means over: the number of
                its samples, or T numbers, one for each task. The losses of the whole batch are the
                means weighted with it; None for equal parts. 0 for a part that counts nothing.

        Raises:
            TypeError, ValueError: losses that are not what is said above, or `accumulate` with
                jacobian="gramian" or "sketch"; nothing has changed then.
            NonFiniteError: a loss or a gradient is NaN or inf, under `nonfinite="raise"`; nothing
                has changed, except that pending gradients are given up if it was a gradient or a
                function's loss. So it is where a function itself raises.
            DistributedError: another process could not take the step, or was to take another one;
                nothing has changed then.
            RuntimeError: a compiled part of the model does not allow several backward passes.
        """
        balancer, few, taken = self._balancer, self._balancer.few, None
        if few is not None and not (
            features is not None
            or independent
            or accumulate
            or grad_scaler is not None
            or retain_graph
            or batch_size is not None
            or self._spoiled
            or self._before is not None
        ):
            taken = few.take(losses, self.optimizer.param_groups)
            if taken is not None and self._finish_few(few, taken):
                return
        parameters = self._trained()
        processes = balancer.find_processes(parameters, self._process_group.thing)
        asked = features is not None, len(independent), accumulate, grad_scaler is not None
        try:
            batches = self._read(losses, features, independent, accumulate, batch_size)
        except Exception as error:
            processes.failed(error)
            raise
        if not processes.alone:
            batches = processes.meet(batches, batch_size, self._plan(*asked))
        batch, others = batches[0], batches[1:]
        lazy = any(isinstance(each, LazyLosses) for each in batches)
        like = batch.like()
        if balancer.loss_transform == "log" and like.device.type == "cpu":
            # Elsewhere the NaN of such a logarithm is found, without waiting for the device.
            for each in batches:
                if not isinstance(each, LazyLosses):
                    check_positive(each.names, each.values)
        single_pass = not balancer.needs_jacobian(accumulate, batch.missing)
        if accumulate and not single_pass:
            balancer.check_gathers()
        scale = absent = None
        if grad_scaler is not None and grad_scaler.is_enabled():
            # From here on an overflow is the scaler's to deal with.
            scale, absent = grad_scaler.scale(torch.ones((), device=like.device)), batch.missing
        elif lazy:
            # They are not known yet.
            absent = batch.missing
        else:
            absent = balancer.absent(batches, single_pass)
        with self._undone_on_errors():
            if self._before is not None and all(p.grad is None for p in parameters):
                # Cleared by another's `zero_grad`.
                self._undo_left_out()
            if scale is not None and self._before is None:
                self._before = self._remembered_until_moved(parameters)
            self._delivered = True
            self.aggregator.learning_rate = _learning_rate(self.optimizer)
            if absent is not None:
                self.aggregator.prepare(len(batch.names), like)
            self._late, self._skip_step = None, False
            delivered = (
                absent is not None
                and not self._spoiled
                and balancer.backward(
                    BackwardCall(
                        batch,
                        [*processes.stand_ins(parameters)],
                        absent,
                        accumulate,
                        scale,
                        retain_graph,
                        features,
                        tuple(others),
                        None if taken is None else taken.gradients,
                    )
                )
            )
            self._book(batch, delivered, accumulate, single_pass and scale is None)

    def _finish_few(self, few: Few, taken: Taken) -> bool:
        """The rest of a step of few numbers; False, and nothing has happened, if it is not to be
        an ordinary one."""
        gramian = few.gramian(taken)
        if gramian is None:
            return False
        aggregator, balancer = self.aggregator, self._balancer
        put_back, n_steps = aggregator.remember(), balancer.n_steps
        mine = self._delivered, self._taken, self._late, self._skip_step
        try:
            aggregator.learning_rate = _learning_rate(self.optimizer)
            aggregator.prepare(len(few.names), taken.losses)
            self._delivered, self._taken, self._late, self._skip_step = True, False, None, False
            balancer.finish_few(few, taken, gramian)
        except BaseException:
            # An interrupt may come once the step is booked: then it stays.
            if balancer.n_steps == n_steps:
                with interrupts_held_back():
                    put_back()
                    self._delivered, self._taken, self._late, self._skip_step = mine
            raise
        return True

    def _read(
        self,
        losses: Any,
        features: Tensor | None,
        independent: Sequence[Any],
        accumulate: bool,
        batch_size: float | Sequence[float] | None,
    ) -> list[Losses | LazyLosses]:
        """The losses of all batches, checked, before anybody else hears of them."""
        balancer = self._balancer
        names, instances = balancer.tasks, isinstance(balancer.engine, Instance)
        check_call(self.aggregator, features, independent, accumulate, self._in_closure, instances)
        batches: list[Losses | LazyLosses] = []
        if instances:
            batches.append(read_instances(losses, None if balancer.varies else names))
        else:
            batches.append(read_functions(losses, names) or read_losses(losses, names))
        names = batches[0].names
        batches += [read_functions(each, names) or read_losses(each, names) for each in independent]
        if any(isinstance(each, LazyLosses) for each in batches):
            check_lazy(self.aggregator, balancer.engine, features)
        # Calls the first of the functions.
        batches[0].like()
        if independent:
            check_all_there(self.aggregator, batches)
        check_batch_size(batch_size, len(names))
        balancer.check_processes(batches, features)
        return batches

    def _plan(self, *asked: object) -> str:
        """What has to be the same in all processes."""
        return f"{self.aggregator.name} at step {self._balancer.n_steps} {asked}"

    def _book(
        self, batch: Losses | LazyLosses, delivered: bool, accumulate: bool, alone: bool
    ) -> None:
        """What a call of `backward` means for the step; `alone`: nobody has seen the losses yet."""
        if self._spoiled:
            # One of this step's micro-batches was not finite: the whole step is left out.
            self._spoiled, self._skip_step = accumulate, True
        elif not delivered:
            self._balancer.give_up_pending()
            self._n_skipped += 1
            self._spoiled, self._skip_step = accumulate, True
        elif (
            alone
            and batch.like().device.type != "cpu"
            and not accumulate
            and not self._balancer.drops_from(single_pass=True)
        ):
            self._late = LateCheck(self._balancer.found_late(), batch.names)

    @_not_compiled
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
            ValueError: the method needs a closure that is not there, or has no use for one that is;
                or it needs all losses at once, and the closure returns functions.
        """
        if closure is None and self._is_initialization():
            return self._initialize()
        check_closures(self.aggregator, closure, val_closure)
        if closure is None:
            self._check_late()
            if self._skip_step:
                return None
            with UndoneOnErrors(self._remember_step(), self._is_open):
                self._before = None
                self._balancer.observe()
                return self._wrapped_step()
        train = Closure(closure, self._devices())
        with self._undone_on_errors():
            if val_closure is not None:
                return self._bilevel_step(train, Closure(val_closure, self._devices()))
            return self._closure_step(train)

    def _closure_step(self, train: Closure) -> Any:
        aggregator = self.aggregator
        losses, first = self._evaluate(train)
        if self._skip_step:
            return losses
        # Before the closure is asked again, so that it is always the same objective.
        self._balancer.observe()
        # Steps that use weights again (update_every) have nothing to learn from.
        renewed = self._balancer.renewed
        looking = aggregator if isinstance(aggregator, ClosureAggregator) and renewed else None
        if looking is not None and looking.looks_around:
            self._look_around(looking, train, losses)
        answers = [first]

        def again() -> Tensor:
            return answers.pop() if answers else self._evaluate(train)[1]

        self._wrapped_step(again)
        # What it evaluated on its way were no steps.
        self._balancer.unobserved = None
        if looking is not None and looking.looks_after:
            try:
                values = read_values(train.again(grad=False), self._balancer.tasks)
                looking.update(self._balancer.processes.average_values(values))
            except BaseException:
                # The step itself is taken.
                looking.give_up()
                raise
        return losses

    def _wrapped_step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        """The wrapped optimizer's own step; once a parameter has changed, it counts as taken."""
        if closure is not None and may_ask_again(self.optimizer):
            put_back = parameters_remembered(self.optimizer)
            try:
                found = self.optimizer.step(closure)  # type: ignore[arg-type]
                self._taken, self._delivered = True, False
            except BaseException:
                with interrupts_held_back():
                    put_back()
                    self._taken = False
                raise
            return found
        parameters = self._everything()
        versions = [p._version for p in parameters]
        with interrupts_held_back():
            try:
                step: Callable[..., Any] = self.optimizer.step
                found = step() if closure is None else step(closure)
                self._delivered = False
            finally:
                self._taken = versions != [p._version for p in parameters]
                if self._taken:
                    self._delivered = False
        return found

    @_not_compiled
    def update(
        self, losses: Sequence[Tensor | None] | Mapping[str, Tensor | None] | Tensor
    ) -> None:
        """The losses after the step, for methods that look again; the others do nothing.

        Args:
            losses: T scalars, as in `backward`, None for an absent task; a graph is not needed.

        Raises:
            TypeError, ValueError: not the losses of the same tasks.
        """
        if isinstance(self.aggregator, ClosureAggregator) and self.aggregator.looks_after:
            values = read_values(losses, self._balancer.tasks)
            values = self._balancer.processes.average_values(values)
            if self._undo_left_out():
                return
            with self._undone_on_errors():
                self.aggregator.learning_rate = _learning_rate(self.optimizer)
                self.aggregator.update(values)

    def end_epoch(self) -> None:
        """Tells the aggregator that an epoch has ended; methods that do not count do nothing."""
        if self._before is not None and self._overflowed():
            self._undo_left_out()
        # What comes now is not undone.
        self._before = None
        self.aggregator.end_epoch()

    def diagnostics(self) -> dict[str, Any]:
        """What happened so far and at the last step.

        Returns:
            engine (what took the last gradients); fallback (why that was the loop although "vmap"
            was asked for, or None); tasks; steps (calls of `backward` that aggregated); skipped
            (steps left out); dropped (task → steps it sat out, not being finite); absent (task →
            steps it sat out, its loss being None); shared (number of shared scalars, None before
            the first Jacobian); weights, losses, gradient_norms `[T]` and cosines
            `[T, T]` as nested lists, None where a method has none; conflicts, the pairs of tasks
            with a negative cosine.
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
            "fallback": getattr(balancer.engine, "fallback", None),
            "tasks": None if balancer.tasks is None else list(balancer.tasks),
            "steps": balancer.n_steps,
            "skipped": self._n_skipped,
            "dropped": dict(balancer.n_dropped),
            "absent": dict(balancer.n_absent),
            "shared": balancer.n_shared,
            "weights": None if self.weights is None else self.weights.tolist(),
            "losses": None if self.losses is None else self.losses.tolist(),
            "gradient_norms": norms,
            "cosines": cosines,
            "conflicts": conflicts,
        }

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's `state_dict()`, with one more entry in its first param group.

        That entry, "gradbal", is a string that holds the rest: the aggregator's state, its
        learnable weights and what the wrapped optimizer keeps for them, counters. So the state is
        read by `torch.load(weights_only=True)`, goes through `torch.distributed.checkpoint` and its
        `get_state_dict`, and loads into the bare optimizer, which ignores the entry.

        At any point between two calls it is all that the run needs beside the model's
        `state_dict()`. Between `backward` and `step` it holds `.grad` as well, and after
        `accumulate=True` the pending gradients; at other times it is small.
        """
        groups, own = self._groups()
        everything = self._everything()
        if self._balancer.own_columns:
            # A copy has not met the others yet.
            self._balancer.find_processes(self._trained(), self._process_group.thing)
        late = None if self._late is None else self._late.values
        before = self._state_before()
        entry = {
            "format": _FORMAT,
            "aggregator": self._balancer.whole_state(self.aggregator.state_dict()),
            "before": before and self._balancer.whole_state(before),
            "balancer": self._balancer.state_dict([p for group in groups for p in group]),
            "shapes": [[list(p.shape) for p in group] for group in groups],
            "skipped": self._n_skipped,
            "skip_step": self._skip_step,
            "spoiled": self._spoiled,
            "late": late,
            "grads": [_dense(p.grad) for p in everything] if self._delivered else None,
        }
        return pack(self.optimizer.state_dict(), own, entry)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a checkpoint of `state_dict()`, or of a bare optimizer like the wrapped one.

        Hyperparameters of the method come from the checkpoint, as a learning rate does; the
        arguments of `MultiTaskOptimizer` stay. The state of the aggregator is on the host until
        the next step. A bare optimizer's checkpoint leaves the method as it is.

        Raises:
            ValueError: a checkpoint of another method, of other tasks, of other param groups or
                shapes; nothing has changed then, as after any other error.
        """
        groups, own = self._groups()
        parameters = [p for group in groups for p in group]
        bare, entry = unpack(state_dict)
        if entry is not None:
            self._check_entry(entry)
        whole = completed(bare, entry, own, self.optimizer)
        if entry is None:
            with put_back_on_error(self.optimizer):
                self.optimizer.load_state_dict(whole)
            return
        check_groups(entry["shapes"], groups)
        late = None
        if entry["late"] is not None:
            late = LateCheck(entry["late"], tuple(entry["balancer"]["tasks"]))
        before = self.aggregator.state_dict()
        weights = [p.data for p in self.aggregator.parameters()]
        try:
            with put_back_on_error(self.optimizer):
                self.aggregator.load_state_dict(entry["aggregator"])
                for p in self.aggregator.parameters():
                    p.data = p.data.to(parameters[0].device)
                self.optimizer.load_state_dict(whole)
                self._balancer.load_state_dict(entry["balancer"], parameters)
        except BaseException:
            self.aggregator.load_state_dict(before)
            for p, data in zip(self.aggregator.parameters(), weights, strict=True):
                p.data = data
            raise
        self._n_skipped = entry["skipped"]
        self._skip_step, self._spoiled = entry["skip_step"], entry["spoiled"]
        self._late = late
        self._set_before(entry.get("before"))
        self._delivered = entry["grads"] is not None
        if self._delivered:
            self._set_grads(entry["grads"])

    # Small parts.

    def _undone_on_errors(self) -> UndoneOnErrors:
        """After an error aggregator and counters are as before, unless the step was taken."""
        put_back = [
            self.aggregator.remember(),
            self._balancer.remember(),
            remembered(self, but=("_taken",)),
        ]
        self._taken = False
        return UndoneOnErrors(put_back, self._is_open)

    def _is_open(self) -> bool:
        return not self._taken

    def _remember_step(self) -> list[Callable[[], None]]:
        """The same for a plain step, which changes little."""
        balancer = self._balancer
        before, unobserved = self._before, balancer.unobserved
        delivered, self._taken = self._delivered, False

        def put_back() -> None:
            self._before, self._delivered = before, delivered
            balancer.unobserved = unobserved

        return [self.aggregator.remember(), put_back]

    def _undo_left_out(self) -> bool:
        """Makes the aggregator what it was, if gradients are gone that no `step` has used: their
        step was left out by a GradScaler, which tells nobody."""
        # What is gathered outlasts a `zero_grad`.
        if self._before is None or self._balancer.gathers:
            return False
        with interrupts_held_back():
            undone = self._before()
            self._before = None
        return undone

    def _remembered_until_moved(self, parameters: Sequence[Tensor]) -> Callable[[], bool]:
        """What puts the aggregator back, unless a parameter has moved: so it has where the wrapped
        optimizer was stepped itself."""
        put_back, versions = self.aggregator.remember(), [p._version for p in parameters]

        def undo() -> bool:
            here = versions == [p._version for p in parameters]
            if here:
                put_back()
            return here

        return undo

    def _state_before(self) -> dict[str, Any] | None:
        """The aggregator's `state_dict()` as it was before such gradients."""
        if self._before is None:
            return None
        now = self.aggregator.remember()
        with interrupts_held_back():
            self._before()
            state = copy.deepcopy(self.aggregator.state_dict())
            now()
        return state

    def _set_before(self, state: dict[str, Any] | None) -> None:
        self._before = None
        if state is not None:
            now = self.aggregator.remember()
            self.aggregator.load_state_dict(state)
            # The model's parameters may be loaded later.
            self._before = self._remembered_until_moved([])
            now()

    def _overflowed(self) -> bool:
        """Whether a gradient is not finite; waits for the device."""
        grads = [p.grad for p in self._everything() if p.grad is not None]
        return not all(bool(g.isfinite().all()) for g in grads)

    def _check_entry(self, entry: dict[str, Any]) -> None:
        """Whether a checkpoint is of the same method, tasks and losses."""
        if entry["format"] != _FORMAT:
            raise ValueError(f"the checkpoint's format must be {_FORMAT}, found {entry['format']}")
        self.aggregator.check_state_dict(entry["aggregator"])
        check_tasks(self._balancer.tasks, entry["balancer"]["tasks"])
        check_transform(self._balancer.loss_transform, entry["balancer"]["loss_transform"])

    def _groups(self) -> tuple[list[list[Tensor]], list[int]]:
        """The parameters of every param group but the aggregator's own; indices of its own."""
        mine = {id(p) for p in self.aggregator.parameters()}
        groups = [group["params"] for group in self.optimizer.param_groups]
        own = [k for k, group in enumerate(groups) if any(id(p) in mine for p in group)]
        return [group for k, group in enumerate(groups) if k not in own], own

    def _everything(self) -> list[Tensor]:
        """The parameters of all param groups."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _set_grads(self, grads: Sequence[Tensor | None]) -> None:
        for p, g in zip(self._everything(), grads, strict=True):
            p.grad = None if g is None else sharded_like(g.to(p.device), p)

    def _is_initialization(self) -> bool:
        """Whether this step is one by which `torch.distributed.checkpoint` makes the wrapped
        optimizer's state: without `backward`, of zero gradients, with a learning rate of zero."""
        if self._delivered or self.optimizer.state:
            return False
        rates = [group.get("lr") for group in self.optimizer.param_groups]
        on_host = all(not isinstance(r, Tensor) or r.device.type == "cpu" for r in rates)
        if not on_host or any(r is None or float(r) != 0.0 for r in rates):
            return False
        return all(p.grad is not None for p in self._everything() if p.requires_grad)

    def _initialize(self) -> Any:
        for p in self.aggregator.parameters():
            if p.numel() == 0:
                # It gets its size, and then its state, at the first real step.
                p.grad = None
        return self.optimizer.step()

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
        processes = self._balancer.processes
        values = processes.average_values(batch.values)
        block = self._trained()
        if aggregator.scope == "shared":
            block = self._balancer.shared_parameters(batch, block)
        evaluations = Evaluations(train, None, block, self.optimizer, batch.names, processes)
        aggregator.look(evaluations, values)

    def _bilevel_step(self, train: Closure, validation: Closure) -> Any:
        aggregator, balancer = self.aggregator, self._balancer
        assert isinstance(aggregator, BilevelAggregator)
        self.zero_grad()
        losses = train.first()
        check_in_closure(aggregator, losses)
        trained = self._trained()
        processes = balancer.find_processes(trained, self._process_group.thing)
        processes.check(["closures"])
        batch = read_losses(losses, balancer.tasks)
        (batch,) = processes.meet([batch], None, self._plan("closures"))  # type: ignore[assignment]
        if balancer.absent([batch], single_pass=True) is None:
            self._n_skipped += 1
            return losses
        evaluations = Evaluations(
            train, validation, trained, self.optimizer, batch.names, processes
        )
        aggregator.learning_rate = _learning_rate(self.optimizer)
        try:
            evaluations.begin(batch)
            with self._undone_on_errors():
                aggregator.prepare(len(batch.names), batch.values)
                found = aggregator.step(evaluations)
                with processes.completing(trained, None, accumulate=False):
                    if aggregator.gives_gradient:
                        evaluations.deliver(found)
                    else:
                        batch.backward(found, trained, False)
        except NonFiniteError:
            if balancer.nonfinite == "raise":
                raise
            self._n_skipped += 1
            return losses
        balancer.conclude(batch, None if aggregator.gives_gradient else found)
        self._wrapped_step()
        return losses

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
        check_in_closure(self.aggregator, losses)
        self._in_closure = True
        try:
            self.backward(losses)
        finally:
            self._in_closure = False
        self._check_late()
        if self.losses is None:
            return losses, torch.zeros(())
        w = torch.ones_like(self.losses) if self.weights is None else self.weights.to(self.losses)
        return losses, (w * self._balancer.losses_of_present()).sum()


def _dense(grad: Tensor | None) -> Tensor | None:
    if grad is not None and is_sharded(grad):
        whole: Tensor = grad.full_tensor()  # type: ignore[attr-defined]
        return whole
    return grad if grad is None or grad.layout == torch.strided else grad.to_dense()


def _learning_rate(optimizer: Optimizer) -> float | None:
    lr = optimizer.param_groups[0].get("lr")
    # Reading a tensor from an accelerator would wait for it.
    return None if lr is None or (isinstance(lr, Tensor) and lr.device.type != "cpu") else float(lr)
