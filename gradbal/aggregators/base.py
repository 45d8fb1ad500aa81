"""The four kinds of aggregator, by what they consume.

An aggregator turns losses, a Gramian or a Jacobian into weights or a direction. It never touches
parameters, autograd graphs or the optimizer.
"""

from __future__ import annotations

import inspect
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from gradbal._undo import remembered
from gradbal.jacobian import combine, gramian, wants_exact
from gradbal.registry import Promises

if TYPE_CHECKING:
    from gradbal._closures import Evaluations
    from gradbal.distributed import ColumnShards

__all__ = [
    "Aggregator",
    "BilevelAggregator",
    "ClosureAggregator",
    "DoubleSamplingAggregator",
    "GramianAggregator",
    "JacobianAggregator",
    "Scalarizer",
]


class _Kind(ABCMeta):
    """Abstract methods have to be there; `isinstance`, asked forty times a step, is the plain one,
    which takes half the time."""

    __instancecheck__ = type.__instancecheck__


# What most attributes are, and nothing that has to be remembered apart.
_PLAIN = frozenset([bool, int, float, str, type(None), list, tuple, dict, Tensor])


class Aggregator(metaclass=_Kind):
    """What all four kinds share: a name, hyperparameters, state.

    A subclass keeps each constructor argument under the argument's name, and lists in
    `state_names` the attributes that change from step to step.
    """

    category: ClassVar[str]
    name: ClassVar[str] = ""
    promises: Promises = Promises()
    state_names: ClassVar[tuple[str, ...]] = ()
    per_task_state: ClassVar[bool] = False
    """Whether state or hyperparameters belong to single tasks; then the abstract method also takes
    `tasks`, the indices of the tasks that take part when some sit a step out."""
    logarithmic: ClassVar[bool] = False
    """Whether the method takes the losses' logarithms itself, so that it must not get those."""
    unsaved: ClassVar[tuple[str, ...]] = ("generator",)
    """Constructor arguments that are objects rather than data, and not part of a checkpoint."""
    learning_rate: float | None = None
    """The wrapped optimizer's, of its first param group, at this step."""

    def hyperparameters(self) -> dict[str, Any]:
        """Constructor arguments and their values, without those that are not data."""
        names = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in names if name not in self.unsaved}

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in self.hyperparameters().items())
        return f"{type(self).__name__}({shown})"

    def prepare(self, n_tasks: int, like: Tensor) -> None:
        """Called before the first step, when T is known; `like` has the losses' dtype and device.

        Raises:
            ValueError: T does not fit the state or a hyperparameter with one entry for each task.
        """

    def param_groups(self) -> list[dict[str, Any]]:
        """Learnable weights, as param groups for the wrapped optimizer. They may be empty tensors
        until the number of tasks is known."""
        return []

    def parameters(self) -> list[Parameter]:
        """The learnable weights in `param_groups()`, flat."""
        return [p for group in self.param_groups() for p in group["params"]]

    @property
    def needs_features(self) -> bool:
        """Whether it works on gradients at a representation, `backward(losses, features=z)`."""
        return False

    def objective(self, losses: Tensor, **taking_part: Any) -> Tensor:
        """What `parameters()` are trained on, from the detached losses `[T]`; 0-dim."""
        raise NotImplementedError(f"{self.name!r} has no learnable weights")

    def end_epoch(self) -> None:
        """Called by the user at the end of an epoch; for methods that count epochs."""

    def observe(self, losses: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Called once for every step that is taken, right before it; for methods that remember.

        Nothing is called for a step that is left out, or that a `GradScaler` skips. It must not
        read from an accelerator, and an error must come before anything is changed.

        Args:
            losses: `[T]`, detached, as the method sees them, of the `backward` before the step.
            tasks: indices of the tasks that took part; None for all. The losses of the others may
                be anything.
        """

    def update(self, losses: Tensor) -> None:
        """Called with the losses after the step, `[T]`; for methods that look again."""

    def reset(self) -> None:
        """Back to the state before the first step."""

    def remember(self) -> Callable[[], None]:
        """What puts the state back as it is now, for a step that fails half-way.

        By reference, so that it costs next to nothing: a method replaces the tensors of its state
        and does not write into them.
        """
        put_back: list[Callable[[], Any]] = [remembered(self)]
        for value in vars(self).values():
            if type(value) in _PLAIN:
                continue
            if isinstance(value, torch.Generator):
                put_back.append(partial(value.set_state, value.get_state()))
            elif isinstance(value, Parameter):
                put_back.append(partial(setattr, value, "data", value.data))
            elif isinstance(value, Aggregator):
                put_back.append(value.remember())
        if len(put_back) == 1:
            return put_back[0]

        def all_of_it() -> None:
            for each in put_back:
                each()

        return all_of_it

    def generators(self) -> list[torch.Generator]:
        """What it draws from."""
        found = []
        for value in vars(self).values():
            if isinstance(value, torch.Generator):
                found.append(value)
            elif isinstance(value, Aggregator):
                found += value.generators()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Name, hyperparameters and whole state: tensors, numbers, strings, lists and dicts."""
        state = {name: _plain(getattr(self, name)) for name in self.state_names}
        return {"name": self.name, "hyperparameters": self.hyperparameters(), "state": state}

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises ValueError, naming the difference, when `state_dict` is not of this method."""
        if state_dict.get("name") != self.name:
            other = state_dict.get("name")
            raise ValueError(f"a checkpoint of {self.name!r} is required, found one of {other!r}")
        for part, mine in (
            ("hyperparameters", set(self.hyperparameters())),
            ("state", set(self.state_names)),
        ):
            theirs = set(state_dict.get(part, ()))
            if mine != theirs:
                raise ValueError(
                    f"{part} of {self.name!r} must be {sorted(mine)}, found {sorted(theirs)}"
                )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over hyperparameters and state, as `torch.optim` does.

        Raises:
            ValueError: the checkpoint is of another method; nothing was changed.
        """
        self.check_state_dict(state_dict)
        for name, value in state_dict["hyperparameters"].items():
            setattr(self, name, _plain(value))
        for name, value in state_dict["state"].items():
            current = getattr(self, name)
            if isinstance(current, torch.Generator):
                current.set_state(value.cpu())
            elif isinstance(current, Parameter):
                current.data = value.detach().clone()
            else:
                setattr(self, name, _plain(value))


def _plain(value: Any) -> Any:
    """A copy that nobody else changes; of a generator, its state."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


class Scalarizer(Aggregator):
    """Consumes the losses alone; one backward a step."""

    category = "scalarizer"
    promises = Promises(heads="weighted")

    @property
    def linear(self) -> bool:
        """Whether the next step's weights do not depend on its losses, so that micro-batches simply
        add up."""
        return False

    @abstractmethod
    def scalarize(self, losses: Tensor) -> Tensor:
        """One objective from the losses.

        Args:
            losses: `[T]`, with or without a graph.

        Returns:
            0-dim, differentiable in the losses and in `parameters()`.
        """

    def objective(self, losses: Tensor, **taking_part: Any) -> Tensor:
        """What `parameters()` are trained on: the objective itself; 0-dim."""
        return self.scalarize(losses, **taking_part)

    def loss_weights(self, losses: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """`w [T]`, the derivative of the objective by each loss.

        Args:
            losses: `[T]`, or `[k]` when `tasks` names the k tasks that take part.
            tasks: passed on to `scalarize`, which takes it where `per_task_state` is set.
        """
        leaf = losses.detach().clone().requires_grad_()
        taking_part: dict[str, Any] = {} if tasks is None else {"tasks": tasks}
        with torch.enable_grad():
            (w,) = torch.autograd.grad(self.scalarize(leaf, **taking_part), leaf)
        return w

    def direction(self, jacobian: Tensor, losses: Tensor | None = None) -> Tensor:
        """`d = Jᵀw [P]` and a step of the state, for comparison with the other kinds; `losses`
        default to ones."""
        if losses is None:
            losses = torch.ones(len(jacobian), dtype=torch.float64, device=jacobian.device)
        w = self.loss_weights(losses)
        self.observe(losses.detach())
        return combine(w, jacobian)


class GramianAggregator(Aggregator):
    """Consumes `G = JJᵀ` (and the losses' values); T backwards a step."""

    category = "gramian"

    @abstractmethod
    def weights(self, gramian: Tensor, losses: Tensor | None = None) -> Tensor:
        """The weights of `d = Jᵀw`.

        Args:
            gramian: `[T, T]`, any floating dtype and device.
            losses: `[T]` values, or None.

        Returns:
            `w [T]`, dtype and device of the Gramian.
        """

    def head_weights(self, weights: Tensor, gramian: Tensor) -> Tensor:
        """What task-specific gradients are multiplied by under `heads="weighted"`; `[T]`."""
        return weights

    def probed_parameters(self) -> list[Tensor] | None:
        """The shared parameters whose Gramian it wants, where that is not all of them.

        Its weights then multiply the losses in one ordinary backward pass.
        """
        return None

    def column_groups(self, shapes: Sequence[torch.Size]) -> list[int] | None:
        """The widths of the column groups of J that get weights of their own; None for one group.

        Args:
            shapes: of the shared parameters, in the order of their columns.
        """
        return None

    def group_weights(self, gramians: Tensor, losses: Tensor | None = None) -> Tensor:
        """`w [K, T]` of K column groups, from their Gramians `[K, T, T]`."""
        raise NotImplementedError(f"{self.name!r} has the same weights for all columns")

    def direction(self, jacobian: Tensor, losses: Tensor | None = None) -> Tensor:
        """`d = w(JJᵀ)ᵀ J`.

        Args:
            jacobian: `[T, P]`, any floating dtype and device.
            losses: `[T]` values, or None.

        Returns:
            `d [P]`, dtype and device of the Jacobian.
        """
        g = gramian(jacobian).cpu()
        if wants_exact(g, jacobian):
            g = gramian(jacobian, exact=True).cpu()
        w = self.weights(g, losses)
        if losses is not None:
            self.observe(losses.detach())
        return combine(w, jacobian)


class JacobianAggregator(Aggregator):
    """Consumes all of J; T backwards a step."""

    category = "jacobian"
    weighted: ClassVar[bool] = False
    """Whether every direction comes with weights, in `last_weights` and `last_head_weights`."""
    combines: ClassVar[bool] = False
    """Whether `d = Jᵀw` with these weights, so that they can be used again for another J."""
    per_parameter_state: ClassVar[bool] = False
    """Whether there is state `[T, P]`, for which the shared parameters have to stay the same."""
    takes_turns: ClassVar[bool] = False
    """Whether `tasks_in_turn` names some tasks and not all."""
    last_weights: Tensor | None = None
    """`w [T]` of the last direction."""
    last_head_weights: Tensor | None = None
    """`[T]`, what task-specific gradients are multiplied by under `heads="weighted"`."""

    columns: ColumnShards | None = None
    """Set where J has some of the columns, and other processes have the others."""

    def summed(self, sums: Tensor) -> Tensor:
        """Sums over the columns of J, whoever has them."""
        return sums if self.columns is None else self.columns.sum(sums)

    def product(
        self, rows: Tensor, delicate: Callable[[Tensor], bool] = lambda gramian: False
    ) -> Tensor:
        """The Gramian of all columns `[T, T]`, float64, on the host.

        Args:
            rows: `[T, P]`, as far as they are here.
            delicate: whether this Gramian hangs on digits that float32 products do not have, for
                other reasons than `wants_exact` knows.
        """
        if self.columns is not None:
            # Whoever has few columns would decide otherwise.
            return self.columns.sum(gramian(rows, exact=True)).cpu()
        g = gramian(rows).cpu()
        if wants_exact(g, rows) or delicate(g):
            g = gramian(rows, exact=True).cpu()
        return g

    @abstractmethod
    def direction(self, jacobian: Tensor, losses: Tensor | None = None) -> Tensor:
        """The direction that goes into `.grad`.

        Args:
            jacobian: `[T, P]`, any floating dtype and device; not to be written to.
            losses: `[T]` values, or None.

        Returns:
            `d [P]`, dtype and device of the Jacobian.
        """

    def tasks_in_turn(self, n_tasks: int, absent: frozenset[int] = frozenset()) -> list[int] | None:
        """The tasks whose gradients the next step needs; None for all of them.

        Args:
            n_tasks: T.
            absent: tasks that sit the step out; the keyword is there only when there are some.
        """
        return None

    def lose_turn(self, tasks: Sequence[int]) -> None:
        """Called when none of `tasks`, whose turn it was, could take part after all."""


class ClosureAggregator(Aggregator):
    """Consumes the closure: losses evaluated again, validation losses, independent batches."""

    category = "closure"
    scope: str = "all"
    """The parameters that `look` displaces: "all", or the "shared" ones."""

    @property
    def looks_after(self) -> bool:
        """Whether it needs the losses after the optimizer's step, from the closure or `update`."""
        return False

    @property
    def looks_around(self) -> bool:
        """Whether it evaluates the closure at displaced parameters, in `look` before the step."""
        return False

    @abstractmethod
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One step of the weights."""

    def look(self, evaluations: Evaluations, losses: Tensor) -> None:
        """Called after the backward pass and before the optimizer's step, if `looks_around`.

        Args:
            evaluations: losses at displaced parameters; `.grad` as a vector.
            losses: `[T]`, at the current point.
        """

    def give_up(self) -> None:
        """The step after the backward pass was left out."""


class BilevelAggregator(ClosureAggregator):
    """Consumes a training and a validation closure: `step(closure, val_closure)`."""

    @abstractmethod
    def step(self, evaluations: Evaluations) -> Tensor:
        """The weights of this step's training losses, or a gradient of its own.

        Args:
            evaluations: losses and gradients of both closures, here and elsewhere.

        Returns:
            `w [T]`, with which the training losses are weighted in one backward pass over all
            parameters; or a gradient `[P]` of all parameters, where `gives_gradient` is set.
        """

    @property
    def gives_gradient(self) -> bool:
        """Whether `step` returns a gradient rather than weights."""
        return False


class DoubleSamplingAggregator(ClosureAggregator):
    """Consumes Jacobians of independent mini-batches: `A = J₁J₂ᵀ`, which is unbiased where `JJᵀ` is
    not, and neither symmetric nor positive semi-definite."""

    per_task_state = True

    @property
    @abstractmethod
    def n_batches(self) -> int:
        """How many independent mini-batches a step takes: 1, 2 or 3."""

    @property
    @abstractmethod
    def shares(self) -> tuple[float, ...]:
        """For each batch its part `c_b` in the shared gradient `d = Σ_b c_b J_bᵀw`."""

    @property
    def head_shares(self) -> tuple[float, ...]:
        """For each batch its part in the gradients of task-specific parameters."""
        return (1.0 / self.n_batches,) * self.n_batches

    @abstractmethod
    def step(self, products: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """The weights, from inner products of two independent batches.

        Args:
            products: `A = J₁J₂ᵀ [T, T]`; `JJᵀ` where there is one batch.
            tasks: indices of the tasks that take part; None for all.

        Returns:
            `w [T]`, dtype and device of the products.
        """

    def direction(self, jacobian: Tensor, losses: Tensor | None = None) -> Tensor:
        """`d [P]` where all batches have the same Jacobian `[T, P]`."""
        return combine(self.step(gramian(jacobian).cpu()), jacobian)
