"""Whatever is raised on the way, a step is taken wholly or not at all."""

import copy
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam

import gradbal
from gradbal import MultiTaskOptimizer
from gradbal._undo import interrupts_held_back
from tests.states import assert_same, root_at_zero, trained
from tests.zoo import METHODS, keywords, make

Pair = tuple[nn.Module, MultiTaskOptimizer]
Act = Callable[[nn.Module, MultiTaskOptimizer], None]


def _everything(model: nn.Module, opt: MultiTaskOptimizer) -> dict[str, Any]:
    """Parameters, buffers, optimizer state, aggregator state and counters."""
    return copy.deepcopy({"model": model.state_dict(), "opt": opt.state_dict()})


def _same(a: Any, b: Any) -> bool:
    try:
        assert_same(a, b)
    except AssertionError:
        return False
    return True


def _step(model: nn.Module, opt: MultiTaskOptimizer) -> None:
    opt.zero_grad()
    opt.backward(model.losses(model.batch()))
    opt.step()


def _closure_step(model: nn.Module, opt: MultiTaskOptimizer) -> None:
    opt.step(lambda: model.losses(model.batch()))


# Ctrl-C at any line.


@pytest.fixture(autouse=True)
def _ctrl_c_raises() -> Iterator[None]:
    """In a process that was started in the background Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


FOLDERS = (os.path.dirname(gradbal.__file__), os.path.dirname(torch.optim.__file__))


class _Interrupter:
    """Sends SIGINT to this process at the n-th line of gradbal and torch.optim within it."""

    def __init__(self, at: int | None) -> None:
        self.n_lines = 0
        self._at = at

    def __enter__(self) -> "_Interrupter":
        self._before = sys.gettrace()
        sys.settrace(self._enter_frame)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _enter_frame(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(FOLDERS) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.n_lines += 1
            if self.n_lines == self._at:
                signal.raise_signal(signal.SIGINT)
        return self._line


def _backward(model: nn.Module, opt: MultiTaskOptimizer) -> None:
    opt.zero_grad()
    opt.backward(model.losses(model.batch()))


def _take(model: nn.Module, opt: MultiTaskOptimizer) -> None:
    opt.step()


def _interrupted_everywhere(ready: Callable[[], Pair], act: Act, n_points: int) -> list[int]:
    """Does something again and again, interrupted at lines that are spread evenly over it.

    Args:
        ready: makes a model and its optimizer, always the same.
        act: what is done.
        n_points: how often.

    Returns:
        How often it was then as if nothing had been done, and as if it had been done wholly.
    """
    twin = ready()
    before = _everything(*twin)
    with _Interrupter(None) as count:
        act(*twin)
    after = _everything(*twin)
    found = [0, 0]
    for k in range(n_points):
        at = 1 + (count.n_lines - 1) * k // (n_points - 1)
        model, opt = ready()
        with pytest.raises(KeyboardInterrupt), _Interrupter(at):
            act(model, opt)
        state = _everything(model, opt)
        wholly = not _same(state, before)
        found[wholly] += 1
        if not wholly:
            # Nothing is in the way of doing it once more.
            act(model, opt)
            state = _everything(model, opt)
        assert_same(state, after)
    return found


@pytest.mark.parametrize("aggregator", METHODS)
def test_ctrl_c_at_any_line_leaves_all_or_nothing(aggregator: str) -> None:
    pair = trained(aggregator, **keywords(aggregator))

    def half_way() -> Pair:
        # Copies of parameters have no gradients.
        twin = copy.deepcopy(pair)
        _backward(*twin)
        return twin

    assert _interrupted_everywhere(lambda: copy.deepcopy(pair), _backward, 12)[0] > 6
    assert all(_interrupted_everywhere(half_way, _take, 12))


@pytest.mark.parametrize("wrapped", [SGD, Adam, LBFGS])
@pytest.mark.parametrize("aggregator", ["upgrad", "cosmos", "gradvac"])
def test_ctrl_c_in_a_step_with_a_closure(aggregator: str, wrapped: type) -> None:
    def ready() -> Pair:
        model = make("Plain")
        optimizer = wrapped(model.parameters(), lr=0.01)
        opt = MultiTaskOptimizer(optimizer, aggregator, **keywords(aggregator))
        _closure_step(model, opt)
        return model, opt

    assert all(_interrupted_everywhere(ready, _closure_step, 40))


def _interrupt(times: int, then: list[int]) -> None:
    with interrupts_held_back():
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        then.append(1)


@pytest.mark.parametrize(("times", "reached"), [(1, [1]), (2, [])])
def test_one_interrupt_is_held_back_and_a_second_is_not(times: int, reached: list[int]) -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        _interrupt(times, done)
    assert done == reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_and_handlers_are_left_alone() -> None:
    def inside() -> None:
        with interrupts_held_back():
            found.append(signal.getsignal(signal.SIGINT))

    found: list[Any] = []
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        inside()
        assert found[1] is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# Errors from the user's own code, and what is not finite.


class Broken(RuntimeError):
    """What the users' code raises here."""


def _break(*arguments: Any, **keywords: Any) -> Any:
    raise Broken("the user's own")


Fault = Callable[[nn.Module, MultiTaskOptimizer], Any]


def _losses(model: nn.Module) -> list[Tensor]:
    return model.losses(model.batch())


def _nan_loss(model: nn.Module, opt: MultiTaskOptimizer) -> None:
    losses = _losses(model)
    opt.backward([losses[0] * float("nan"), *losses[1:]])


def _inf_loss(model: nn.Module, opt: MultiTaskOptimizer) -> None:
    opt.backward([*_losses(model)[:-1], _losses(model)[-1] + float("inf")])


def _nan_gradient(model: nn.Module, opt: MultiTaskOptimizer) -> None:
    losses = _losses(model)
    opt.backward([losses[0] + root_at_zero(model.trunk[0].weight), *losses[1:]])


def _nan_head_gradient(model: nn.Module, opt: MultiTaskOptimizer) -> None:
    losses = _losses(model)
    opt.backward([losses[0] + root_at_zero(model.heads[0].weight), *losses[1:]])


def _hook(register: Callable[[nn.Module], Any]) -> Fault:
    def fault(model: nn.Module, opt: MultiTaskOptimizer) -> None:
        handle = register(model)
        try:
            opt.backward(_losses(model))
        finally:
            handle.remove()

    return fault


def _broken_closure(model: nn.Module, opt: MultiTaskOptimizer) -> None:
    opt.step(_break)


def _wrong_losses(model: nn.Module, opt: MultiTaskOptimizer) -> None:
    opt.backward(_losses(model)[:2])


FAULTS: dict[str, tuple[Fault, type[Exception]]] = {
    "NaN loss": (_nan_loss, gradbal.NonFiniteError),
    "inf loss": (_inf_loss, gradbal.NonFiniteError),
    "NaN gradient": (_nan_gradient, gradbal.NonFiniteError),
    "NaN gradient of a head": (_nan_head_gradient, gradbal.NonFiniteError),
    "hook on a shared parameter": (
        _hook(lambda m: m.trunk[0].weight.register_hook(_break)),
        Broken,
    ),
    "hook on a head": (_hook(lambda m: m.heads[1].bias.register_hook(_break)), Broken),
    "hook after accumulation": (
        _hook(lambda m: m.trunk[0].bias.register_post_accumulate_grad_hook(_break)),
        Broken,
    ),
    "hook on a module": (_hook(lambda m: m.trunk[1].register_full_backward_hook(_break)), Broken),
    "closure": (_broken_closure, Broken),
    "too few losses": (_wrong_losses, ValueError),
}


def _is_seen(aggregator: str, fault: str) -> bool:
    """Methods with a single backward pass see the losses alone, as documented."""
    return gradbal.info(aggregator).kind != "scalarizer" or not fault.startswith("NaN gradient")


@pytest.mark.parametrize(
    ("aggregator", "fault"), [(a, f) for a in METHODS for f in FAULTS if _is_seen(a, f)]
)
def test_an_error_changes_nothing(aggregator: str, fault: str) -> None:
    model, opt = trained(aggregator, **keywords(aggregator))
    twin = copy.deepcopy((model, opt))
    before = _everything(model, opt)
    act, error = FAULTS[fault]
    opt.zero_grad()
    with pytest.raises(error):
        act(model, opt)
    assert_same(_everything(model, opt), before)
    for pair in ((model, opt), twin):
        _step(*pair)
    assert_same(_everything(model, opt), _everything(*twin))


@pytest.mark.parametrize("aggregator", METHODS)
def test_an_error_before_the_step_leaves_it_to_be_taken(aggregator: str) -> None:
    model, opt = trained(aggregator, **keywords(aggregator))
    twin = copy.deepcopy((model, opt))
    _step(*twin)
    _backward(model, opt)
    before = _everything(model, opt)
    handle = opt.register_step_pre_hook(_break)
    with pytest.raises(Broken):
        opt.step()
    assert_same(_everything(model, opt), before)
    handle.remove()
    opt.step()
    assert_same(_everything(model, opt), _everything(*twin))


@pytest.mark.parametrize("aggregator", METHODS)
def test_an_error_after_the_step_does_not_undo_it(aggregator: str) -> None:
    model, opt = trained(aggregator, **keywords(aggregator))
    twin = copy.deepcopy((model, opt))
    _step(*twin)
    opt.register_step_post_hook(_break)
    with pytest.raises(Broken):
        _step(model, opt)
    assert_same(_everything(model, opt), _everything(*twin))


class _Twice(SGD):
    """Asks its closure again from a displaced point, as sharpness-aware minimization does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        return super().step() or loss


@pytest.mark.parametrize("wrapped", [LBFGS, _Twice])
@pytest.mark.parametrize("aggregator", ["upgrad", "gradvac", "cosmos"])
def test_an_error_at_a_later_evaluation_puts_the_parameters_back(aggregator, wrapped) -> None:
    model = make("Plain")
    opt = MultiTaskOptimizer(wrapped(model.parameters(), lr=0.01), aggregator)
    _closure_step(model, opt)
    before = _everything(model, opt)
    calls: list[int] = []

    def closure() -> list[Tensor]:
        calls.append(1)
        return _break() if len(calls) == 2 else _losses(model)

    with pytest.raises(Broken):
        opt.step(closure)
    assert len(calls) == 2
    assert_same(_everything(model, opt), before)


# What the undoing rests on.


def _tensors(aggregator: gradbal.Aggregator) -> dict[str, Tensor]:
    found = {}
    for name, value in vars(aggregator).items():
        if isinstance(value, gradbal.Aggregator):
            found.update({f"{name}.{k}": v for k, v in _tensors(value).items()})
        elif isinstance(value, Tensor):
            found[name] = value.data if isinstance(value, nn.Parameter) else value
    return found


@pytest.mark.parametrize("aggregator", METHODS)
def test_methods_replace_their_state_and_do_not_write_into_it(aggregator: str) -> None:
    model, opt = trained(aggregator, **keywords(aggregator))
    for _ in range(3):
        state = {k: v for k, v in _tensors(opt.aggregator).items() if k != "_spare"}
        copies = copy.deepcopy(state)
        opt.zero_grad()
        opt.backward(_losses(model))
        for name, tensor in state.items():
            assert torch.equal(tensor, copies[name]), f"{name} was written into"
        opt.step()
