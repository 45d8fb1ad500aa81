"""Experts: modules of one architecture that all see the same input, each run once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradbal.aggregators._arguments import in_range, one_of
from gradbal.nn._stages import run

__all__ = ["Experts", "mix", "perturbed"]


def mix(weights: Tensor, outputs: Tensor) -> Tensor:
    """`Σ_k p_k f_k`, sample by sample.

    Args:
        weights: p `[B, n]`, or `[n]` for weights that are the same for all samples.
        outputs: f `[n, B, ...]`.

    Returns:
        `[B, ...]`.
    """
    if weights.dim() == 1:
        return (weights @ outputs.flatten(1)).view(outputs.shape[1:])
    if outputs.dim() == 3:
        # For vectors several times faster than the product of matrices, for feature maps slower.
        return (weights.t().unsqueeze(2) * outputs).sum(0)
    return torch.einsum("bk,kb...->b...", weights, outputs)


class Experts(nn.ModuleList):
    """n experts; `experts(x)` has all their outputs, `[n, B, ...]`.

    Experts of one structure can run as one, with their parameters stacked and the forward pass
    batched by `torch.func.vmap`; the parameters are those of ordinary modules all the same, so that
    names in `state_dict`, initialisation and gradients do not depend on it.

    Args:
        modules: the experts.
        batched: whether they run as one. With True they do wherever that is possible: they are
            alike, have no hooks, and no buffers in train mode (such as BatchNorm's statistics,
            which a batched pass could not update), and `torch.compile` is not at work. False: one
            after another. None: as False, the stacking of parameters at every pass taking more
            time on a CPU than it saves.
        name: what they are called in errors.
    """

    def __init__(self, modules: Iterable[nn.Module], batched: bool | None, name: str) -> None:
        one_of("batched", batched, (None, False, True))
        super().__init__(modules)
        self._batched = bool(batched)
        self._name = name
        # Whether they were alike at the first pass, and could be batched; None before.
        self._alike: bool | None = None

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return nn.ModuleList(list(self)[index])
        return super().__getitem__(index)

    def forward(self, x: Any) -> Tensor:
        if self._batched and self._alike is not False and self._can_be_batched():
            try:
                return self._at_once(x)
            except Exception:
                # What vmap cannot do, an ordinary pass may; its errors are also easier to read.
                outputs = self._one_by_one(x)
                self._alike = False
                return outputs
        return self._one_by_one(x)

    def _one_by_one(self, x: Any) -> Tensor:
        outputs = [run(e, x, f"expert {i} of {self._name}") for i, e in enumerate(self)]
        shapes = [tuple(y.shape) for y in outputs]
        if len(set(shapes)) > 1:
            other = next(i for i, shape in enumerate(shapes) if shape != shapes[0])
            raise ValueError(
                f"the outputs of {self._name} must have one shape, found {list(shapes[0])} of "
                f"expert 0 and {list(shapes[other])} of expert {other}"
            )
        return torch.stack(outputs)

    def _at_once(self, x: Any) -> Tensor:
        first = next(iter(self))
        tensors = [dict(itertools.chain(e.named_parameters(), e.named_buffers())) for e in self]
        stacked = {name: torch.stack([found[name] for found in tensors]) for name in tensors[0]}
        outputs: Tensor = torch.func.vmap(
            lambda these: torch.func.functional_call(first, these, (x,)), randomness="different"
        )(stacked)
        return outputs

    def _can_be_batched(self) -> bool:
        if len(self) < 2 or torch.compiler.is_compiling():
            return False
        modes = [_modes(expert) for expert in self]
        if modes[0] is None or any(mode != modes[0] for mode in modes):
            return False
        if self._alike is None:
            first, *others = self
            self._alike = all(_alike(first, other) for other in others)
        return self._alike


def _modes(expert: nn.Module) -> list[tuple[type, bool]] | None:
    """Each module's type, and if it is in train mode; None if a pass does more than compute."""
    modes = []
    for module in expert.modules():
        # A lazy module, not initialized yet, has hooks.
        if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)):
            return None
        if module.training and module._buffers:
            return None
        modes.append((type(module), module.training))
    return modes


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether they differ in nothing but the values of their tensors."""
    ours, theirs = list(one.named_modules()), list(other.named_modules())
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        return False
    if not all(_same_settings(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True)):
        return False
    return [_kind(pair) for pair in _tensors(one)] == [_kind(pair) for pair in _tensors(other)]


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return itertools.chain(module.named_parameters(), module.named_buffers())


def _kind(named: tuple[str, Tensor]) -> tuple[Any, ...]:
    name, tensor = named
    return name, tensor.shape, tensor.dtype, tensor.device


def _same_settings(a: nn.Module, b: nn.Module) -> bool:
    if type(a) is not type(b):
        return False
    mine, yours = (
        {k: v for k, v in vars(module).items() if not (k.startswith("_") and k in _INTERNAL)}
        for module in (a, b)
    )
    return mine.keys() == yours.keys() and all(_same(v, yours[k]) for k, v in mine.items())


_INTERNAL = frozenset(vars(nn.Module()))
"""What every module has; its tensors are compared by themselves."""


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and isinstance(a, int | float | str | torch.dtype) and a == b


def perturbed(modules: Sequence[nn.Module], perturb: float) -> list[nn.Module]:
    """The modules, noise added to their parameters.

    Args:
        modules: changed in place.
        perturb: standard deviation of the noise, in units of the root mean square of each
            parameter; 0 for none.

    Raises:
        TypeError, ValueError: `perturb` is negative or no number.
    """
    in_range("perturb", perturb, 0)
    if perturb > 0:
        with torch.no_grad():
            for p in itertools.chain.from_iterable(module.parameters() for module in modules):
                p.add_(torch.randn_like(p) * (perturb * p.square().mean().sqrt()))
    return list(modules)
