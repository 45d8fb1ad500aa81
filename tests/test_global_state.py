"""Whatever belongs to the process is as before after every call, also after one that failed."""

import contextlib
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradbal import MultiTaskOptimizer
from gradbal.jacobian import WITHOUT_ROWS
from tests.drive import Call, Driver, driver
from tests.states import assert_same
from tests.test_engines import ENGINES

KINDS = [
    "uw",
    "rlw",
    "dwa",
    "upgrad",
    "pcgrad",
    "gradvac(groups=matrix)",
    "graddrop",
    "moco",
    "mgda_ub",
    "famo",
    "marigold",
    "modo",
    "moml",
    "forum",
]


def process() -> dict[str, Any]:
    """Settings and random states of torch, NumPy and Python."""
    flags = torch.backends
    legacy = np.random.get_state()  # noqa: NPY002
    return {
        "random": [torch.get_rng_state(), random.getstate(), str(legacy)],
        "grad": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        "autocast": [
            *[f(d) for d in ("cpu", "cuda") for f in (torch.is_autocast_enabled, _autocast_dtype)],
            torch.is_autocast_cache_enabled(),
        ],
        "deterministic": [
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ],
        "default": [str(torch.get_default_dtype()), str(torch.get_default_device())],
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "anomaly": [torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()],
        "autograd": torch.autograd.is_multithreading_enabled(),
        "cudnn": [
            getattr(flags.cudnn, n) for n in ("enabled", "benchmark", "deterministic", "allow_tf32")
        ],
        "others": [flags.mkldnn.enabled, flags.cuda.matmul.allow_tf32],
        "precision": torch.get_float32_matmul_precision(),
        "warnings": [repr(f) for f in warnings.filters],
        "numpy": np.geterr(),
        "modules": [nn.Module.__call__, nn.Module.__init__, nn.Module.forward],
        "hooks": len(torch.nn.modules.module._global_forward_hooks),
        "modes": [len(torch.overrides._get_current_function_mode_stack())],
        "python": [sys.getswitchinterval(), sys.getrecursionlimit(), threading.active_count()],
    }


def _autocast_dtype(device: str) -> str:
    return str(torch.get_autocast_dtype(device))


@contextlib.contextmanager
def odd() -> Iterator[None]:
    """No setting is what it is by default, as far as a training loop can have it so."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, True
    try:
        with (
            torch.autograd.set_detect_anomaly(True, check_nan=False),
            torch.autograd.set_multithreading_enabled(False),
            np.errstate(all="raise", under="ignore"),
            warnings.catch_warnings(),
        ):
            # Anomaly detection says that it is on.
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before


@contextlib.contextmanager
def usual() -> Iterator[None]:
    yield


@contextlib.contextmanager
def in_autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def watched(method: Driver, model: nn.Module, opt: MultiTaskOptimizer, call: Call) -> None:
    before = process()
    method.make(model, opt, call)
    assert_same(process(), before)


CASES = [(name, {}) for name in KINDS]
CASES += [("upgrad", {"jacobian": engine, **options}) for engine, options in ENGINES.items()]


@pytest.mark.parametrize("settings", [usual, odd, in_autocast])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_after_every_call(
    name: str, options: dict[str, Any], settings: Callable[[], contextlib.AbstractContextManager]
) -> None:
    method = driver(name, gather=options.get("jacobian") not in WITHOUT_ROWS, options=options)
    with settings():
        model, opt = method.fresh()
        for call in method.calls(range(3)):
            watched(method, model, opt, call)
            before = process()
            opt.load_state_dict(opt.state_dict())
            opt.diagnostics()
            assert_same(process(), before)


class Fault(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


def fail(*args: Any, **kwargs: Any) -> Any:
    raise Fault


def in_the_method(model: nn.Module, opt: MultiTaskOptimizer, patch: pytest.MonkeyPatch) -> None:
    for what in ("weights", "group_weights", "direction", "loss_weights", "step", "look"):
        if hasattr(opt.aggregator, what):
            patch.setattr(opt.aggregator, what, fail)


def in_a_gradient(model: nn.Module, opt: MultiTaskOptimizer, patch: pytest.MonkeyPatch) -> None:
    model.trunk[1].register_full_backward_hook(fail)


def on_delivery(model: nn.Module, opt: MultiTaskOptimizer, patch: pytest.MonkeyPatch) -> None:
    model.trunk[0].weight.register_hook(fail)


def after_delivery(model: nn.Module, opt: MultiTaskOptimizer, patch: pytest.MonkeyPatch) -> None:
    model.trunk[0].weight.register_post_accumulate_grad_hook(fail)


def before_the_step(model: nn.Module, opt: MultiTaskOptimizer, patch: pytest.MonkeyPatch) -> None:
    opt.register_step_pre_hook(fail)


def in_the_forward(model: nn.Module, opt: MultiTaskOptimizer, patch: pytest.MonkeyPatch) -> None:
    model.trunk[1].register_forward_hook(fail)


def looking_again(model: nn.Module, opt: MultiTaskOptimizer, patch: pytest.MonkeyPatch) -> None:
    plain, n_calls = model.losses, 0

    def losses(batch: Tensor) -> list[Tensor]:
        nonlocal n_calls
        n_calls += 1
        return plain(batch) if n_calls == 1 else fail()

    patch.setattr(model, "losses", losses)


FAULTS = [
    in_the_method,
    in_a_gradient,
    on_delivery,
    after_delivery,
    before_the_step,
    in_the_forward,
    looking_again,
]


@pytest.mark.parametrize("settings", [usual, odd])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_after_a_call_that_failed(
    name: str,
    options: dict[str, Any],
    fault: Callable[..., None],
    settings: Callable[[], contextlib.AbstractContextManager],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = driver(name, options=options)
    with settings():
        model, opt = method.fresh()
        method.run(model, opt, range(1))
        fault(model, opt, monkeypatch)
        n_failed = 0
        for call in method.calls(range(1, 2)):
            before = process()
            try:
                method.make(model, opt, call)
            except Fault:
                n_failed += 1
            assert_same(process(), before)
    looks_once = name not in ("famo", "marigold", "modo", "moml", "forum")
    assert n_failed == 0 if fault is looking_again and looks_once else n_failed >= 1


def test_a_checkpoint_that_fails_to_load() -> None:
    _, opt = driver("upgrad").fresh()
    state = driver("mgda").fresh()[1].state_dict()
    before = process()
    with pytest.raises(ValueError, match="mgda"):
        opt.load_state_dict(state)
    opt.register_load_state_dict_pre_hook(fail)
    with pytest.raises(Fault):
        opt.load_state_dict(opt.state_dict())
    assert_same(process(), before)


@pytest.mark.parametrize("name", KINDS)
def test_the_callers_grad_mode_stays(name: str) -> None:
    method = driver(name, gather=True)
    model, opt = method.fresh()
    for call in method.calls(range(2)):
        if call.what in ("step", "update", "end_epoch", "zero_grad"):
            with torch.no_grad():
                watched(method, model, opt, call)
                assert not torch.is_grad_enabled()
        else:
            watched(method, model, opt, call)
