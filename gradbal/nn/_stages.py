"""Encoders: independent copies from a factory, and their stages, run one after another."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["Factory", "copies", "run", "staged_copies", "stages_of"]

Factory = Callable[[], nn.Module]


def copies(encoder: Factory, n: int) -> list[nn.Module]:
    """n independent modules, from n calls of the factory.

    Raises:
        TypeError: the factory is a module itself or cannot be called, or what it returns is no
            module.
        ValueError: two calls returned the same module, or modules with common parameters.
    """
    if isinstance(encoder, nn.Module):
        raise TypeError(
            "`encoder` must be a function that returns a new module at each call, found a module, "
            f"{type(encoder).__name__}; pass e.g. lambda: {type(encoder).__name__}(...)"
        )
    if not callable(encoder):
        raise TypeError(
            "`encoder` must be a function that returns a new module at each call, found "
            f"{encoder!r}"
        )
    made: list[nn.Module] = []
    owner: dict[int, int] = {}
    for i in range(n):
        module = encoder()
        if not isinstance(module, nn.Module):
            raise TypeError(f"`encoder` must return a module, found {type(module).__name__}")
        for part in (*module.modules(), *module.parameters(), *module.buffers()):
            if owner.setdefault(id(part), i) != i:
                kind = "module" if isinstance(part, nn.Module) else "tensor"
                raise ValueError(
                    "`encoder` must return a new module at each call, found the same "
                    f"{kind}, {type(part).__name__}, in calls {owner[id(part)] + 1} and {i + 1}; "
                    "make it inside the function"
                )
        made.append(module)
    return made


def stages_of(encoder: nn.Module) -> list[nn.Module]:
    """The stages of an encoder, which run one after another.

    Args:
        encoder: an `nn.ModuleList` or `nn.Sequential` of the stages.

    Raises:
        TypeError: another module.
        ValueError: no stage.
    """
    if not isinstance(encoder, nn.ModuleList | nn.Sequential):
        raise TypeError(
            "a staged `encoder` must be an nn.ModuleList or nn.Sequential of its stages, found "
            f"{type(encoder).__name__}"
        )
    stages = list(encoder)
    if not stages:
        raise ValueError("a staged `encoder` must have at least one stage, found none")
    return stages


def staged_copies(encoder: Factory, n: int) -> list[list[nn.Module]]:
    """The stages of n independent encoders, as many in each.

    Raises:
        TypeError, ValueError: as `copies` and `stages_of`.
        ValueError: another number of stages at another call.
    """
    staged = [stages_of(module) for module in copies(encoder, n)]
    lengths = sorted({len(stages) for stages in staged})
    if len(lengths) > 1:
        raise ValueError(
            f"`encoder` must return as many stages at each call, found {lengths[0]} and "
            f"{lengths[-1]}"
        )
    return staged


_ABOUT_INPUT = re.compile("shape|size|dimension|channel|dtype|expected|must match", re.IGNORECASE)
"""In the messages of torch's errors about tensors that do not fit."""


def run(module: Callable[[Any], Any], x: Any, name: str) -> Any:
    """`module(x)`; an error about what it gets names the module.

    Raises:
        ValueError: the module does not take such a tensor.
    """
    if torch.compiler.is_compiling():
        return module(x)
    try:
        return module(x)
    except (RuntimeError, ValueError, IndexError) as error:
        # A device that fails, or whose memory ran out, is not about the input.
        if isinstance(error, RuntimeError) and not _ABOUT_INPUT.search(str(error)):
            raise
        raise ValueError(f"{name} must fit its input, found {_described(x)}: {error}") from error


def _described(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return f"a tensor of shape {list(x.shape)} and {x.dtype}"
    if isinstance(x, Sequence) and not isinstance(x, str):
        return f"{type(x).__name__} of {len(x)}"
    return type(x).__name__
