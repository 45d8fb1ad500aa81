"""A pretended accelerator "cuda:0" on the CPU, which sees all that moves between it and the host.

On CPU tensors `.cpu()`, `.tolist()` and `.numpy()` call no operator: nothing can count them. Here
the data of a tensor are an ordinary CPU tensor hidden in a subclass, which PyTorch's C++ code takes
for one without data and Python code for one on "cuda:0". Every operator on it, autograd's and the
optimizer's too, comes to a `TorchDispatchMode`, which computes on the hidden tensors and writes
down what a GPU would have made of the call:

- copies in either direction, with their shapes, and whether the host waits for the device. It does,
  for all the work queued before, unless the copy is `non_blocking` and the host's memory pinned;
- reads: operators whose result in Python, or whose shape, depends on the data (`item`, `bool`,
  `equal`, `nonzero`, a boolean mask), and linear algebra that looks at an error code.

Tensors of the two sides do not mix, but for 0-dim ones of the host in pointwise operators and for
indices, which are uploads. `.numpy()` and any use outside of the context are errors: nothing passes
unseen.

What this shows is which transfers gradbal, autograd and the optimizer ask for, and that every
tensor is made on the side where it is used. What it does not show: how long anything takes, what
the kernels and the allocator of a real device do inside, what C++ code does by device type
(backward passes run in the calling thread here), and operators or dtypes that a device lacks.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest import mock

import torch
import torch._dynamo  # Optimizers import it, and it looks at the events that are replaced here.
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

__all__ = ["DEVICE", "Accelerator", "Traffic", "Transfer"]

DEVICE = torch.device("cuda:0")

_HOST = torch.device("cpu")
_UNDERNEATH = torch.device("meta")
"""What C++ code takes the tensors to be on."""

_CPU_GENERATOR = torch.Generator

_COPIES = ("_to_copy", "copy_", "_foreach_copy_")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
_TAKES_SCALARS = ("_foreach_", "fill", "index_put", "_index_put")
_LOOKS_AT_ERRORS = ("linalg_", "_linalg_", "cholesky", "lu_")
_READING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

M = TypeVar("M", nn.Module, Tensor)


class _OnDevice(Tensor):
    """`hidden` are the data."""

    hidden: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, hidden: Tensor) -> _OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            hidden.shape,
            strides=hidden.stride(),
            storage_offset=hidden.storage_offset(),
            dtype=hidden.dtype,
            layout=hidden.layout,
            device=_UNDERNEATH,
        )
        made.hidden = hidden
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE

    @property
    def is_cuda(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<{tuple(self.shape)} {self.dtype} on {DEVICE}>"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of the Accelerator's context")


@dataclass(frozen=True)
class Transfer:
    """A copy between host and device, or a read: of how many numbers, and whether the host waits
    for the device."""

    operator: str
    shape: tuple[int, ...]
    n_bytes: int
    waits: bool

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass
class Traffic:
    """down: copies to the host. up: copies to the device. reads: everything else for which the host
    waits. operators: names of all operators on the device, copies and views among them."""

    down: list[Transfer] = field(default_factory=list)
    up: list[Transfer] = field(default_factory=list)
    reads: list[Transfer] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)

    @property
    def waits(self) -> list[Transfer]:
        """All for which the host waits."""
        return [t for t in [*self.down, *self.reads, *self.up] if t.waits]


class Accelerator(TorchDispatchMode):
    """The device: a context, outside of which its tensors cannot be used.

    Example:
        >>> with Accelerator() as device:
        ...     x = torch.ones(2, device="cuda")
        ...     with device.watched() as seen:
        ...         y = (x * 3.0).sum().item()
        >>> y, [r.operator for r in seen.reads]
        (6.0, ['aten._local_scalar_dense.default'])
    """

    def __init__(self) -> None:
        super().__init__()
        self._traffic = Traffic()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Accelerator:
        self._stack.enter_context(mock.patch("torch.cuda.Event", _Event))
        for module in [
            torch,
            *(m for name, m in sys.modules.items() if name.startswith("gradbal.")),
        ]:
            if vars(module).get("Generator") is _CPU_GENERATOR:
                self._stack.enter_context(mock.patch.object(module, "Generator", _Generator))
        self._stack.enter_context(_Names())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    @contextlib.contextmanager
    def watched(self) -> Iterator[Traffic]:
        """What happens inside, written down."""
        before, self._traffic = self._traffic, Traffic()
        try:
            yield self._traffic
        finally:
            self._traffic = before

    def put(self, what: M) -> M:
        """A copy of a tensor on the device; a module itself, with all that it has put there."""
        if isinstance(what, Tensor):
            return _OnDevice(what.detach().clone()).requires_grad_(what.requires_grad)
        there: dict[int, Tensor] = {}
        for module in what.modules():
            for name, t in [*module._parameters.items(), *module._buffers.items()]:
                if t is None:
                    continue
                if id(t) not in there:
                    moved = self.put(t)
                    is_parameter = isinstance(t, nn.Parameter)
                    there[id(t)] = nn.Parameter(moved, t.requires_grad) if is_parameter else moved
                setattr(module, name, there[id(t)])
        return what

    @staticmethod
    def look(tensor: Tensor) -> Tensor:
        """What a tensor of the device holds, unseen by `watched`."""
        assert isinstance(tensor, _OnDevice)
        return tensor.hidden.clone()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        tensors = list(_tensors([*args, *kwargs.values()]))
        here = [t for t in tensors if isinstance(t, _OnDevice)]
        there = [t for t in tensors if not isinstance(t, _OnDevice)]
        if any(t.device == _UNDERNEATH for t in there):
            raise RuntimeError(f"{func}: a tensor came to the device in a way that is not seen")
        stays = bool(here)
        if kwargs.get("device") is not None:
            stays = kwargs["device"] == _UNDERNEATH
            kwargs["device"] = _HOST
        if not here and not stays:
            return func(*args, **kwargs)
        if name in _COPIES:
            self._note_copies(func, name, args, kwargs, stays)
        else:
            self._check_sides(func, name, args, there)
        result = func(*_mapped(_hidden, args), **_mapped(_hidden, kwargs))
        if self._reads(func, name, args, result):
            self._traffic.reads.append(_transfer(func, here[0], True))
        if name == "copy_" and not isinstance(args[0], _OnDevice):
            return args[0]
        if not stays:
            return result
        self._traffic.operators.append(str(func))
        wrapped = _mapped(lambda r: _OnDevice(r) if isinstance(r, Tensor) else r, result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def _note_copies(self, func: Any, name: str, args: Any, kwargs: Any, stays: bool) -> None:
        if name == "_to_copy":
            # What it makes on the host is not pinned.
            pairs = [(None, args[0])]
        else:
            pairs = [args[:2]] if name == "copy_" else list(zip(*args[:2], strict=True))
        non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
        for target, source in pairs:
            goes_there = stays if target is None else isinstance(target, _OnDevice)
            if goes_there and not isinstance(source, _OnDevice):
                waits = not (non_blocking and hasattr(source, "pinned"))
                self._traffic.up.append(_transfer(func, source, waits))
            elif not goes_there and isinstance(source, _OnDevice):
                waits = not (non_blocking and hasattr(target, "pinned"))
                self._traffic.down.append(_transfer(func, source, waits))

    def _check_sides(self, func: Any, name: str, args: Any, there: list[Tensor]) -> None:
        if name in _INDEXING and isinstance(args[0], _OnDevice):
            for i in args[1]:
                if i is not None and not isinstance(i, _OnDevice):
                    self._traffic.up.append(_transfer(func, i, True))
                    there = [t for t in there if t is not i]
        takes_scalars = torch.Tag.pointwise in func.tags or name.startswith(_TAKES_SCALARS)
        for t in there:
            if t.dim() or not takes_scalars:
                raise RuntimeError(
                    f"{func}: all tensors must be on {DEVICE}, found one of shape {list(t.shape)} "
                    "on the host"
                )

    def _reads(self, func: Any, name: str, args: Any, result: Any) -> bool:
        if name in _INDEXING:
            return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        # `cholesky_ex` and its like give the error code back without a look at it.
        if name.startswith(_LOOKS_AT_ERRORS) and "norm" not in name and not name.endswith("_ex"):
            return True
        return bool(_READING_TAGS.intersection(func.tags)) or isinstance(result, int | float)


class _Names(TorchFunctionMode):
    """Lets calls that name the device through, before PyTorch looks for a driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func is Tensor.pin_memory or kwargs.pop("pin_memory", False):
            result = args[0].clone() if func is Tensor.pin_memory else func(*args, **kwargs)
            result.pinned = True
            return result
        args, kwargs = _mapped(_underneath, args), _mapped(_underneath, kwargs)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == _UNDERNEATH:
            # As everywhere: made on the host, and copied.
            kwargs["device"] = _HOST
            return func(*args, **kwargs).to(_UNDERNEATH)
        target = args[0] if args else None
        if func is Tensor.tolist and isinstance(target, _OnDevice):
            return target.cpu().tolist()
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(target, _OnDevice):
            args = (target, _index(args[1]), *args[2:])
        if func == Tensor.data.__set__ and type(target) is not type(args[1]):
            # As with a real device, the object stays the same.
            torch.utils.swap_tensors(target, nn.Parameter(args[1], target.requires_grad))
            return None
        return func(*args, **kwargs)


class _Event:
    """In place of `torch.cuda.Event`; on this device everything is done at once."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._time = 0.0

    def record(self) -> None:
        self._time = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1000.0 * (end._time - self._time)


class _AnyGenerator(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _CPU_GENERATOR)


class _Generator(metaclass=_AnyGenerator):
    """In place of `torch.Generator`: one for the device is the host's, as the numbers are."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return _CPU_GENERATOR()


def _mapped(f: Callable[[Any], Any], value: Any) -> Any:
    """`f` of everything in lists, tuples and dicts; torch's own `tree_map` takes twice as long."""
    if type(value) in (list, tuple):
        return type(value)(_mapped(f, v) for v in value)
    if type(value) is dict:
        return {k: _mapped(f, v) for k, v in value.items()}
    return f(value)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (list, tuple):
            yield from _tensors(value)


def _underneath(value: Any) -> Any:
    named = isinstance(value, torch.device) and value.type == DEVICE.type
    if named or (isinstance(value, str) and value.split(":")[0] == DEVICE.type):
        return _UNDERNEATH
    return value


def _index(index: Any) -> Any:
    """Lists as tensors of the host, which is what they are before they are copied."""
    if isinstance(index, list):
        return torch.tensor(index)
    return tuple(map(_index, index)) if isinstance(index, tuple) else index


def _hidden(value: Any) -> Any:
    return value.hidden if isinstance(value, _OnDevice) else value


def _transfer(func: Any, tensor: Tensor, waits: bool) -> Transfer:
    n_bytes = tensor.numel() * tensor.element_size()
    return Transfer(str(func), tuple(tensor.shape), n_bytes, waits)
