"""Calling a user's closures again: elsewhere, with the same random numbers, without traces."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradbal._lazy import evaluated
from gradbal._losses import Losses, Names, read_losses
from gradbal._nonfinite import NonFiniteError, not_finite
from gradbal._undo import interrupts_held_back
from gradbal.distributed import Alone
from gradbal.jacobian import check_dense, gradients, hooks_held_back, there

__all__ = ["Closure", "Evaluations", "length", "read_values"]

Source = Literal["train", "validation"]


def read_values(losses: object, names: Names | None) -> Tensor:
    """`[T]`, the values of losses that need no graph, in the order of the first step; NaN for None.

    Raises:
        TypeError: not a list, tuple, dict or 1-D tensor of numbers.
        ValueError: another number of losses, or other names, than before.
    """
    if isinstance(losses, Mapping):
        found: Names = tuple(losses)
        if names is not None and set(found) == set(names):
            found = names
        parts = [losses[name] for name in found]
    elif isinstance(losses, list | tuple) or (isinstance(losses, Tensor) and losses.dim() == 1):
        parts = list(losses)
        found = tuple(range(len(parts)))
    else:
        raise TypeError(
            "losses must be a list, tuple or dict of scalars, or a 1-D tensor, found "
            f"{type(losses).__name__}"
        )
    if not parts or (names is not None and found != names):
        expected = "at least one loss" if names is None else f"the losses of {list(names)}"
        raise ValueError(f"{expected} are required, found {list(found)}")
    wide = torch.float64
    values = [
        p.detach()
        if isinstance(p, Tensor)
        else torch.tensor(float("nan") if p is None else p, dtype=wide)
        for p in parts
    ]
    if any(value.dim() for value in values):
        raise ValueError(f"losses must be scalars, found shapes {[list(v.shape) for v in values]}")
    return torch.stack(values)


def length(parts: Sequence[Tensor]) -> float:
    """The Euclidean norm of all parts together, to a few digits, whatever their scale."""

    def norm(parts: Sequence[Tensor]) -> float:
        norms = torch.stack([torch.linalg.vector_norm(part.detach()) for part in parts])
        return float(torch.linalg.vector_norm(norms))

    found = norm(parts)
    # Beyond these, squares have left the range of the parts' own precision.
    return found if 1e-15 < found < 1e15 else norm([part.double() for part in parts])


class _Lender:
    """Gives modules copies of their buffers (running statistics, counters), and takes them back.

    The buffers themselves stay untouched, since the graph of the first call may need them.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, tuple[nn.Module, dict[str, Tensor | None]]] = {}
        self._copies: dict[int, Tensor] = {}

    def lend(self, module: nn.Module) -> None:
        """To a module that is about to be called, and all modules within; to each only once."""
        if id(module) in self._buffers:
            return
        for each in module.modules():
            if id(each) not in self._buffers:
                self._buffers[id(each)] = each, dict(each._buffers)
                for name, buffer in each._buffers.items():
                    if buffer is not None:
                        # A buffer that two modules share has one copy.
                        if id(buffer) not in self._copies:
                            self._copies[id(buffer)] = buffer.clone()
                        each._buffers[name] = self._copies[id(buffer)]

    def take_back(self) -> None:
        """Every module has the buffers that it had, those and no others."""
        for module, buffers in self._buffers.values():
            # A scripted module has a mapping of its own kind, which does not iterate.
            for name in set(module._buffers.keys()).difference(buffers):
                del module._buffers[name]
            for name, buffer in buffers.items():
                module._buffers[name] = buffer


class _Lenders(threading.local):
    """Those at work in this thread; others' modules have their own buffers."""

    def __init__(self) -> None:
        self.active: list[_Lender] = []


_lenders = _Lenders()
_lock = threading.Lock()
_n_active = 0
_plain_call = nn.Module.__call__


def _lend_and_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # In compiled code all modules belong to one that was called from outside.
    if not torch.compiler.is_compiling():
        for lender in _lenders.active:
            lender.lend(module)
    return _plain_call(module, *args, **kwargs)


@contextlib.contextmanager
def _buffers_kept() -> Iterator[None]:
    """Within it all modules that are called work on copies of their buffers.

    By replacing `Module.__call__`, as torch.fx does while it traces: a global hook would make
    `torch.compile` compile anew at every step.
    """
    global _plain_call, _n_active
    lender = _Lender()
    with _lock:
        if _n_active == 0:
            _plain_call = nn.Module.__call__
            nn.Module.__call__ = _lend_and_call  # type: ignore[method-assign]
        _n_active += 1
    _lenders.active.append(lender)
    try:
        yield
    finally:
        with interrupts_held_back():
            _lenders.active.remove(lender)
            with _lock:
                _n_active -= 1
                if _n_active == 0:
                    nn.Module.__call__ = _plain_call  # type: ignore[method-assign]
            lender.take_back()


class Closure:
    """A function that returns the losses of one batch, called several times within a step.

    The first call is the user's own. Further ones start from the random state that the first one
    started from, so that dropout draws the same masks, and leave torch's random state and the
    buffers of all modules that are called as they were.

    Args:
        function: returns T losses.
        devices: where random numbers are drawn, besides the host.
    """

    def __init__(self, function: Callable[[], Any], devices: Sequence[torch.device]) -> None:
        self._function = function
        self._devices = [d for d in devices if d.type != "cpu"]
        self._random: list[Tensor] | None = None

    def first(self) -> Any:
        """The losses, with a graph."""
        self._random = self._random_state()
        with torch.enable_grad():
            return self._function()

    def again(self, grad: bool) -> Any:
        """The losses once more, with a graph if `grad`."""
        before = self._random_state()
        if self._random is None:
            self._random = before
        else:
            self._set_random_state(self._random)
        # Autocast keeps half-precision copies of parameters, which may have moved since.
        torch.clear_autocast_cache()
        try:
            with _buffers_kept(), torch.set_grad_enabled(grad):
                return evaluated(self._function())
        finally:
            torch.clear_autocast_cache()
            self._set_random_state(before)

    def _random_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        for device in self._devices:
            where = () if device.type == "mps" else (device,)
            states.append(torch.get_device_module(device).get_rng_state(*where))
        return states

    def _set_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            where = () if device.type == "mps" else (device,)
            torch.get_device_module(device).set_rng_state(state, *where)


class Evaluations:
    """What a method may ask of the closures within one step, here and at displaced parameters.

    Gradients and displacements are flat: `[P]`, P the number of scalars of all trained parameters.

    Args:
        train: the closure of the training batch.
        validation: that of the validation batch, or None.
        parameters: n leaf tensors.
        optimizer: the wrapped one; for learning rates, momentum and weight decay.
        names: the tasks, or None before the first step.
        processes: who has the other parts of the batches.

    Attributes:
        here: the training losses at the current point, with their graph; None before `begin`.
    """

    def __init__(
        self,
        train: Closure,
        validation: Closure | None,
        parameters: Sequence[Tensor],
        optimizer: Optimizer,
        names: Names | None,
        processes: Alone,
    ) -> None:
        devices = {p.device for p in parameters}
        if len(devices) > 1:
            raise ValueError(
                "the trained parameters must be on one device, found "
                f"{', '.join(sorted(map(str, devices)))}"
            )
        self._closures = {"train": train, "validation": validation}
        self._parameters = list(parameters)
        self._optimizer = optimizer
        self._names = names
        self._processes = processes
        self._moved = False
        self._home: list[Tensor] | None = None
        self.here: Losses | None = None
        self.reached: set[int] = set()

    def begin(self, losses: Losses) -> None:
        """Takes the training losses at the current point."""
        self.here, self._names = losses, losses.names
        self._check_finite(losses.values, "losses", "train")

    def losses(self, source: Source = "train") -> Tensor:
        """`[T]`, without grad."""
        if source == "train" and self.here is not None and not self._moved:
            return self.here.values
        values = read_values(self._closure(source).again(grad=False), self._names)
        values = self._processes.average_values(values)
        self._check_finite(values, "losses", source)
        return values

    def gradient(self, weights: Tensor, source: Source = "train") -> Tensor:
        """`∇ Σ w_i ℓ_i [P]`, by one backward pass."""
        return self.losses_and_gradient(weights, source)[1]

    def losses_and_gradient(
        self, weights: Tensor, source: Source = "train"
    ) -> tuple[Tensor, Tensor]:
        """`ℓ [T]` and `∇ Σ w_i ℓ_i [P]`, by one forward and one backward pass."""
        batch = self._with_graph(source)
        roots, cotangents = zip(*there(batch.roots(weights.to(batch.values))), strict=True)
        gradient = self._processes.average(self._flat(self._gradients(roots, cotangents)))
        self._check_finite(gradient.abs().amax(), "gradients", source)
        return batch.values, gradient

    def jacobian(self, source: Source = "train") -> Tensor:
        """`[T, P]`, by T backward passes."""
        batch = self._with_graph(source)
        roots = there(batch.roots(torch.ones_like(batch.values)))
        rows = torch.stack([self._flat(self._gradients(root, c)) for root, c in roots])
        rows = self._processes.average(rows)
        self._check_finite(rows.abs().amax(1), "gradients", source)
        return rows

    def lengths(self) -> tuple[float, float]:
        """`|θ|` and the length of the parameters' `.grad`.

        Raises:
            ValueError: a gradient is sparse.
        """
        grads = [p.grad for p in self._parameters if p.grad is not None]
        check_dense(grads, grads)
        return length(self._parameters), length(grads) if grads else 0.0

    def virtual_step(self, gradient: Tensor) -> Tensor:
        """`−η(m + g + κθ) [P]`: where one step of SGD with the wrapped optimizer's learning rate η,
        momentum `m` (0 where it has none) and weight decay κ would go."""
        steps, parts = [], self._parts(gradient)
        for p, g, group in zip(self._parameters, parts, self._groups(), strict=True):
            buffer = self._optimizer.state.get(p, {}).get("momentum_buffer")
            step = g + float(group.get("weight_decay", 0.0)) * p.detach()
            if buffer is not None:
                step = step + float(group.get("momentum", 0.0)) * buffer
            steps.append(step)
        return -self.learning_rates() * self._flat(steps)

    def learning_rates(self) -> Tensor:
        """`η [P]` of the wrapped optimizer, which may differ from param group to param group.

        Raises:
            ValueError: a group has none.
        """
        pairs = list(zip(self._parameters, self._groups(), strict=True))
        if not all("lr" in group for _, group in pairs):
            raise ValueError(
                "virtual steps need a learning rate `lr` in every param group of the wrapped "
                "optimizer, found a group without"
            )
        return self._flat([torch.full_like(p, float(group["lr"])) for p, group in pairs])

    def _groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's param group of each parameter."""
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        return [groups[id(p)] for p in self._parameters]

    def moved(self, shift: Tensor) -> contextlib.AbstractContextManager[None]:
        """Within it parameters are at θ + shift `[P]`; afterwards exactly where they were."""
        return self._displaced(self._parts(shift), 1.0)

    def moved_along_gradient(self, factor: float) -> contextlib.AbstractContextManager[None]:
        """The same for `factor` times the parameters' `.grad`, without a copy of that."""
        return self._displaced([p.grad for p in self._parameters], factor)

    @contextlib.contextmanager
    def _displaced(self, parts: Sequence[Tensor | None], factor: float) -> Iterator[None]:
        if self._home is None:
            self._home = [p.detach().clone() for p in self._parameters]
        self._moved = True
        try:
            # Through `data`: what the graph has saved counts as unchanged, and is, once it is back.
            for p, value, part in zip(self._parameters, self._home, parts, strict=True):
                if part is not None:
                    torch.add(value, part.to(value), alpha=factor, out=p.data)
            yield
        finally:
            with interrupts_held_back():
                self._moved = False
                for p, value in zip(self._parameters, self._home, strict=True):
                    p.data.copy_(value)

    def deliver(self, gradient: Tensor) -> None:
        """Sends a flat gradient into `.grad` of the parameters that some loss has reached."""
        pairs = zip(self._parameters, self._parts(gradient), strict=True)
        chosen = [(p, g.to(p.dtype)) for p, g in pairs if id(p) in self.reached]
        torch.autograd.backward([p for p, _ in chosen], [g for _, g in chosen])

    def _check_finite(self, values: Tensor, what: str, source: Source) -> None:
        """Raises NonFiniteError; what a displaced training point gives is the method's affair."""
        if source == "train" and self._moved:
            return
        bad = not_finite(values.tolist() if values.dim() else [float(values)])
        if bad:
            names = self._names or ()
            found = [names[i] for i in bad] if len(values.shape) and names else list(names)
            raise NonFiniteError(f"{source} {what}", found)

    def _closure(self, source: Source) -> Closure:
        closure = self._closures[source]
        assert closure is not None
        return closure

    def _with_graph(self, source: Source) -> Losses:
        if source == "train" and self.here is not None and not self._moved:
            return self.here
        batch = read_losses(self._closure(source).again(grad=True), self._names)
        batch = replace(batch, values=self._processes.average_values(batch.values))
        self._check_finite(batch.values, "losses", source)
        return batch

    def _gradients(self, roots: Any, cotangents: Any) -> Sequence[Tensor | None]:
        with hooks_held_back(self._parameters):
            grads = gradients(roots, self._parameters, cotangents, retain_graph=True)
        check_dense(grads, self._parameters)
        pairs = zip(self._parameters, grads, strict=True)
        self.reached.update(id(p) for p, g in pairs if g is not None)
        return grads

    def _flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        pairs = zip(self._parameters, parts, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])

    def _parts(self, flat: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self._parameters]
        pairs = zip(torch.split(flat, sizes), self._parameters, strict=True)
        return [part.view(p.shape) for part, p in pairs]
