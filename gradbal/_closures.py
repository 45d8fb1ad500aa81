"""Calling a user's closures again: elsewhere, with the same random numbers, without traces."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer

from gradbal._losses import Losses, Names, read_losses
from gradbal._nonfinite import NonFiniteError, not_finite

__all__ = ["Closure", "Evaluations", "read_values"]

Source = Literal["train", "validation"]


def read_values(losses: object, names: Names | None) -> Tensor:
    """`[T]`, the values of losses that need no graph, in the order of the first step.

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
    values = [torch.as_tensor(part).detach() for part in parts]
    if any(value.dim() for value in values):
        raise ValueError(f"losses must be scalars, found shapes {[list(v.shape) for v in values]}")
    return torch.stack(values)


@contextlib.contextmanager
def _buffers_kept() -> Iterator[None]:
    """Gives every module that is called copies of its buffers (running statistics, counters).

    The buffers themselves stay untouched, since the graph of the first call may need them.
    """
    kept: dict[tuple[int, str], tuple[nn.Module, str, Tensor]] = {}

    def lend(module: nn.Module, arguments: Any) -> None:
        for each in module.modules():
            for name, buffer in each._buffers.items():
                if buffer is not None and (id(each), name) not in kept:
                    kept[id(each), name] = (each, name, buffer)
                    each._buffers[name] = buffer.clone()

    hook = register_module_forward_pre_hook(lend)
    try:
        yield
    finally:
        hook.remove()
        for module, name, buffer in kept.values():
            module._buffers[name] = buffer


class Closure:
    """A function that returns the losses of one batch, called several times within a step.

    The first call is the user's own. Further ones start from the random state that the first one
    started from, so that dropout draws the same masks, and leave the random state and the buffers
    of all modules as they were.

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
        try:
            with _buffers_kept(), torch.set_grad_enabled(grad):
                return self._function()
        finally:
            self._set_random_state(before)

    def _random_state(self) -> list[Tensor]:
        modules = [torch.get_device_module(d) for d in self._devices]
        states = [m.get_rng_state(d) for m, d in zip(modules, self._devices, strict=True)]
        return [torch.get_rng_state(), *states]

    def _set_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)


class Evaluations:
    """What a method may ask of the closures within one step, here and at displaced parameters.

    Gradients and displacements are flat: `[P]`, P the number of scalars of all trained parameters.

    Args:
        train: the closure of the training batch.
        validation: that of the validation batch, or None.
        parameters: n leaf tensors.
        optimizer: the wrapped one; for learning rates, momentum and weight decay.
        names: the tasks, or None before the first step.

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
        self._moved = False
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
        roots, cotangents = zip(*batch.roots(weights.to(batch.values)), strict=True)
        gradient = self._flat(self._gradients(roots, cotangents))
        self._check_finite(gradient.sum(), "gradients", source)
        return batch.values, gradient

    def jacobian(self, source: Source = "train") -> Tensor:
        """`[T, P]`, by T backward passes."""
        batch = self._with_graph(source)
        roots = batch.roots(torch.ones_like(batch.values))
        rows = torch.stack([self._flat(self._gradients(root, c)) for root, c in roots])
        self._check_finite(rows.sum(1), "gradients", source)
        return rows

    def parameters(self) -> Tensor:
        """θ `[P]`, a copy."""
        return self._flat([p.detach() for p in self._parameters])

    def grad(self) -> Tensor:
        """The parameters' `.grad [P]`, zero where there is none; a copy."""
        return self._flat([p.grad for p in self._parameters])

    def virtual_step(self, gradient: Tensor) -> Tensor:
        """`−η(m + g + κθ) [P]`: where one step of SGD with the wrapped optimizer's learning rate η,
        momentum `m` (0 where it has none) and weight decay κ would go."""
        shifts, parts = [], self._parts(gradient)
        settings = {id(p): g for g in self._optimizer.param_groups for p in g["params"]}
        for p, g in zip(self._parameters, parts, strict=True):
            group = settings[id(p)]
            buffer = self._optimizer.state.get(p, {}).get("momentum_buffer")
            step = g + float(group.get("weight_decay", 0.0)) * p.detach()
            if buffer is not None:
                step = step + float(group.get("momentum", 0.0)) * buffer
            shifts.append(-float(group["lr"]) * step)
        return self._flat(shifts)

    @contextlib.contextmanager
    def moved(self, shift: Tensor) -> Iterator[None]:
        """Within it parameters are at θ + shift; afterwards exactly where they were."""
        kept = [p.detach().clone() for p in self._parameters]
        self._moved = True
        try:
            # Through `data`: what the graph has saved counts as unchanged, and is, once it is back.
            for p, value, part in zip(self._parameters, kept, self._parts(shift), strict=True):
                p.data.copy_(value + part.to(value))
            yield
        finally:
            self._moved = False
            for p, value in zip(self._parameters, kept, strict=True):
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
        self._check_finite(batch.values, "losses", source)
        return batch

    def _gradients(self, roots: Any, cotangents: Any) -> Sequence[Tensor | None]:
        grads = torch.autograd.grad(
            roots, self._parameters, cotangents, retain_graph=True, allow_unused=True
        )
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
