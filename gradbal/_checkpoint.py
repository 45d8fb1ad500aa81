"""Checkpoints: what a MultiTaskOptimizer adds to the wrapped optimizer's `state_dict()`.

All of it is one entry "gradbal" of the first param group: what stands there survives every way that
torch has with an optimizer's state, that of `torch.distributed.checkpoint` too. For this it has to
be a string, since lists and dicts are taken apart there, and put together again only where their
lengths, and the sizes of tensors in them, were known before.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = [
    "Packed",
    "check_groups",
    "completed",
    "decode",
    "encode",
    "pack",
    "put_back_on_error",
    "unpack",
]

_ENTRY = "gradbal"

Packed = dict[str, Any]
"""A `state_dict()` of an optimizer."""


def pack(packed: Packed, own: Sequence[int], entry: dict[str, Any]) -> Packed:
    """The wrapped optimizer's state, with the entry, as if it had no param groups of the method's.

    Args:
        packed: the wrapped optimizer's `state_dict()`.
        own: indices of the param groups that hold the method's own weights; they go into the entry.
        entry: tensors, numbers, strings, lists and dicts.
    """
    groups = [dict(group) for group in packed["param_groups"]]
    state = dict(packed["state"])
    mine = [groups[k] for k in own]
    shared = [group for k, group in enumerate(groups) if k not in own]
    held = [{i: state.pop(p) for i, p in enumerate(g["params"]) if p in state} for g in mine]
    options = [{k: v for k, v in g.items() if k != "params" and _is_plain(v)} for g in mine]
    whole = {**entry, "own_groups": options, "own_state": held, "n_state": len(state)}
    shared[0] = {**shared[0], _ENTRY: encode(whole)}
    return {**packed, "state": state, "param_groups": shared}


def unpack(state_dict: Mapping[str, Any]) -> tuple[Packed, dict[str, Any] | None]:
    """The state of the bare optimizer, and the entry; None where there is none."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    found = None
    for group in groups:
        found = group.pop(_ENTRY, found)
    entry = None if found is None else decode(found)
    return {**state_dict, "param_groups": groups}, entry


def completed(
    bare: Packed, entry: dict[str, Any] | None, own: Sequence[int], optimizer: Optimizer
) -> Packed:
    """What the wrapped optimizer loads: the bare one's state with the method's own param groups.

    Args:
        bare, entry: from `unpack`.
        own: indices of the param groups that hold the method's own weights.
        optimizer: the wrapped one, for groups of which `entry` has nothing.

    Raises:
        ValueError: other param groups, or no state of parameters although there was some.
    """
    rest, state = iter(bare["param_groups"]), dict(bare["state"])
    theirs = [len(group["params"]) for group in bare["param_groups"]]
    mine = [len(g["params"]) for k, g in enumerate(optimizer.param_groups) if k not in own]
    if theirs != mine:
        raise ValueError(
            f"the checkpoint must have param groups of {mine} parameters, found {theirs}"
        )
    if entry is not None and entry["n_state"] and not state:
        raise ValueError(
            f"the checkpoint must have the optimizer's state of {entry['n_state']} parameters, "
            "found none; torch.distributed.checkpoint reads no more than there is in the state "
            "that it loads into, so make that with its get_state_dict"
        )
    groups = []
    for k, there in enumerate(optimizer.param_groups):
        if k not in own:
            groups.append(next(rest))
            continue
        # The others' names are numbers or, from torch.distributed, words.
        names = [f"{_ENTRY}.{k}.{i}" for i in range(len(there["params"]))]
        held = {i: optimizer.state.get(p) for i, p in enumerate(there["params"])}
        options: dict[str, Any] = {}
        if entry is not None:
            options, held = (entry[part][own.index(k)] for part in ("own_groups", "own_state"))
        groups.append({**there, **options, "params": names})
        state.update((names[i], value) for i, value in held.items() if value)
    return {**bare, "state": state, "param_groups": groups}


def check_groups(shapes: Sequence[Sequence[Sequence[int]]], groups: Sequence[Any]) -> None:
    """Whether the parameters of all groups have the checkpoint's shapes.

    Raises:
        ValueError: one has not.
    """
    for k, (theirs, mine) in enumerate(zip(shapes, groups, strict=True)):
        for i, (shape, p) in enumerate(zip(theirs, mine, strict=True)):
            if list(shape) != list(p.shape):
                raise ValueError(
                    f"the checkpoint must have shape {list(p.shape)} for parameter {i} of param "
                    f"group {k}, found {list(shape)}"
                )


@contextlib.contextmanager
def put_back_on_error(optimizer: Optimizer) -> Iterator[None]:
    """An optimizer whose `load_state_dict` fails half-way has its state and groups as before.

    torch.optim makes new ones when it loads, and touches no tensor of the old ones.
    """
    state, groups = optimizer.state, optimizer.param_groups
    held = {p: dict(v) if isinstance(v, dict) else v for p, v in state.items()}
    options = [dict(group) for group in groups]
    try:
        yield
    except BaseException:
        optimizer.state, optimizer.param_groups = state, groups
        state.clear()
        state.update(held)
        for group, kept in zip(groups, options, strict=True):
            group.clear()
            group.update(kept)
        raise


def encode(value: Any) -> str:
    """Text from which `decode` makes the same again; the same for equal values.

    Args:
        value: tensors, numbers, strings, None, lists, tuples and dicts of them.

    Raises:
        TypeError: anything else.

    Example:
        >>> encode({"w": torch.tensor([1.0])})
        '["dict", ["w", ["tensor", "float32", [1], "AACAPw=="]]]'
        >>> decode(encode({"w": torch.tensor([1.0])}))
        {'w': tensor([1.])}
    """
    return json.dumps(_to_lists(value))


def decode(text: str) -> Any:
    """What `encode` was given; tensors on the host."""
    return _from_lists(json.loads(text))


def _to_lists(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, int | float | str):
        return value
    if isinstance(value, Tensor):
        host = value.detach().cpu().contiguous()
        data = base64.b64encode(host.reshape(-1).view(torch.uint8).numpy().data).decode("ascii")
        return ["tensor", str(host.dtype).removeprefix("torch."), list(host.shape), data]
    if isinstance(value, Mapping):
        return ["dict", *([_to_lists(k), _to_lists(v)] for k, v in value.items())]
    if isinstance(value, list | tuple):
        return ["list" if isinstance(value, list) else "tuple", *map(_to_lists, value)]
    raise TypeError(
        "a checkpoint must be of tensors, numbers, strings, lists and dicts, found "
        f"{type(value).__name__}"
    )


def _from_lists(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    kind, *parts = value
    if kind == "tensor":
        name, shape, data = parts
        dtype = getattr(torch, name)
        raw = bytearray(base64.b64decode(data))
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return flat.reshape(shape).clone()
    if kind == "dict":
        return {_from_lists(k): _from_lists(v) for k, v in parts}
    found = map(_from_lists, parts)
    return list(found) if kind == "list" else tuple(found)


def _is_plain(value: Any) -> bool:
    try:
        encode(value)
    except TypeError:
        return False
    return True
