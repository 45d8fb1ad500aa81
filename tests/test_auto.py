"""The choice among engines: by rule, by clock, by neither where runs must repeat."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.accelerator import Accelerator
from gradbal import MultiTaskOptimizer
from gradbal.jacobian import Layerwise, Rows, VMap
from gradbal.jacobian.auto import MARGIN, N_TIMED, N_WARM_UP, Auto, Case, Stopwatch
from gradbal.jacobian.loop import Loop
from tests.zoo import make, optimizer, targets

CASE = Case(torch.device("cpu"), n_tasks=3, n_scalars=1000, rows=False)
TRIAL = 2 * (N_WARM_UP + N_TIMED)


class _Named(Loop):
    def __init__(self, name: str) -> None:
        self.name = name


class _Clock:
    """Timers that read what the engine in use is said to take."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.running: str | None = None
        self.ready = True

    def __call__(self, device: torch.device) -> "_Timer":
        return _Timer(self)


class _Timer:
    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self._found = 0.0

    def stop(self) -> None:
        self._found = self._clock.seconds[self._clock.running or ""]

    def seconds(self) -> float | None:
        return self._found if self._clock.ready else None


def _auto(clock: _Clock, names: Sequence[str] = ("rule", "other")) -> Auto:
    engines = [_Named(name) for name in names]
    return Auto(lambda case: engines, clock)


def _steps(auto: Auto, clock: _Clock, n: int, case: Case = CASE) -> list[str]:
    found = []
    for _ in range(n):
        with auto.engine_of_step(case) as engine:
            clock.running = engine.name
            found.append(engine.name)
    return found


@pytest.mark.parametrize(
    ("seconds", "kept"),
    [(2.0, "rule"), (1.0, "rule"), (MARGIN + 0.01, "rule"), (MARGIN - 0.01, "other")],
)
def test_engines_take_turns_and_the_faster_stays(seconds: float, kept: str) -> None:
    clock = _Clock(rule=1.0, other=seconds)
    auto = _auto(clock)
    assert auto.name == "auto"
    assert _steps(auto, clock, TRIAL) == ["rule", "other"] * (TRIAL // 2)
    assert _steps(auto, clock, 5) == [kept] * 5
    assert auto.settled
    assert auto.name == kept


def test_the_first_step_of_each_is_not_timed() -> None:
    clock = _Clock(rule=1.0, other=100.0)
    auto = _auto(clock)
    _steps(auto, clock, 2)
    clock.seconds["other"] = 0.1
    _steps(auto, clock, TRIAL - 2)
    assert _steps(auto, clock, 1) == ["other"]


def test_one_engine_needs_no_trial() -> None:
    clock = _Clock()
    auto = _auto(clock, ["rule"])
    assert _steps(auto, clock, 2) == ["rule", "rule"]
    assert auto.settled


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_the_rule_alone_decides_where_runs_must_repeat() -> None:
    clock = _Clock(rule=1.0, other=0.1)
    assert _steps(_auto(clock), clock, 2 * TRIAL) == ["rule"] * 2 * TRIAL


def test_nobody_waits_for_times_that_are_not_there_yet() -> None:
    clock = _Clock(rule=1.0, other=0.1)
    clock.ready = False
    auto = _auto(clock)
    _steps(auto, clock, TRIAL + 4)
    assert not auto.settled
    clock.ready = True
    assert set(_steps(auto, clock, 4)) == {"other"}


def test_a_step_that_fails_does_not_count() -> None:
    clock = _Clock(rule=1.0, other=0.1)
    auto = _auto(clock)
    clock.running = "none"
    with pytest.raises(KeyError, match="none"), auto.engine_of_step(CASE):
        clock.seconds["none"]
    assert _steps(auto, clock, 2) == ["rule", "other"]


def test_another_case_is_another_trial() -> None:
    clock = _Clock(rule=1.0, other=0.1)
    auto = _auto(clock)
    _steps(auto, clock, TRIAL + 1)
    other = Case(torch.device("cpu"), n_tasks=3, n_scalars=2000, rows=False)
    assert _steps(auto, clock, TRIAL, other) == ["rule", "other"] * (TRIAL // 2)


@pytest.mark.parametrize("n_steps", [0, 3, TRIAL + 1])
def test_a_resumed_run_goes_on_with_the_same_engines(n_steps: int) -> None:
    clock = _Clock(rule=1.0, other=0.1)
    auto, fresh = _auto(clock), _auto(clock)
    _steps(auto, clock, n_steps)
    fresh.load_state_dict(auto.state_dict())
    assert _steps(fresh, clock, 2 * TRIAL) == _steps(auto, clock, 2 * TRIAL)


def test_a_stopwatch_measures_time() -> None:
    watch = Stopwatch(torch.device("cpu"))
    sum(range(100_000))
    watch.stop()
    assert 0 < watch.seconds() < 10


class _Wide(nn.Module):
    """More parameters than the rule leaves to the loop without a trial."""

    def __init__(self, n_tasks: int = 3) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(128, 1) for _ in range(n_tasks))

    def losses(self, step: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(step)
        z = self.trunk(torch.randn(8, 64, generator=generator))
        return targets([head(z) for head in self.heads])


def _train(opt: MultiTaskOptimizer, model: _Wide, steps: range) -> list[str]:
    engines = []
    for step in steps:
        opt.zero_grad()
        opt.backward(model.losses(step))
        opt.step()
        engines.append(opt.diagnostics()["engine"])
    return engines


def _made(aggregator: str = "upgrad", **options: Any) -> tuple[MultiTaskOptimizer, _Wide]:
    torch.manual_seed(0)
    model = _Wide()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return MultiTaskOptimizer(sgd, aggregator, **options), model


def test_larger_models_try_every_engine_and_train_as_with_the_loop() -> None:
    opt, model = _made()
    engines = _train(opt, model, range(16))
    assert engines[:6] == ["loop", "gramian", "vmap"] * 2
    assert len(set(engines[12:])) == 1
    plain, twin = _made(jacobian="loop")
    _train(plain, twin, range(16))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("aggregator", "options", "tried"),
    [
        ("graddrop", {}, {"loop", "vmap"}),
        ("gradvac", {"groups": "layer"}, {"loop", "vmap"}),
        ("upgrad", {"jacobian_dtype": torch.bfloat16}, {"loop", "vmap"}),
        ("mean", {}, {"loop"}),
    ],
)
def test_what_is_tried_is_what_the_method_can_do_with(
    aggregator: str, options: dict[str, Any], tried: set[str]
) -> None:
    opt, model = _made(aggregator, **options)
    assert set(_train(opt, model, range(6))) == tried


@pytest.mark.usefixtures("deterministic")
def test_no_trial_where_runs_must_repeat() -> None:
    opt, model = _made()
    assert set(_train(opt, model, range(6))) == {"loop"}


def test_small_models_are_the_loops() -> None:
    model = make("Plain")
    opt = optimizer(model, "upgrad")
    for _ in range(3):
        opt.backward(model.losses(model.batch()))
        assert opt.diagnostics()["engine"] == "loop"


def test_micro_batches_and_functions_go_through_the_loop() -> None:
    opt, model = _made()
    _train(opt, model, range(1))
    opt.backward(model.losses(), accumulate=True)
    opt.backward(model.losses())
    assert opt.diagnostics()["engine"] == "loop"
    opt.backward([lambda: model.losses()[0], lambda: model.losses()[1], lambda: model.losses()[2]])
    assert opt.diagnostics()["engine"] == "loop"
    assert _train(opt, model, range(1)) == ["gramian"]


def test_the_choice_is_part_of_a_checkpoint() -> None:
    opt, model = _made()
    _train(opt, model, range(14))
    other, twin = _made()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(opt.state_dict())
    assert _train(other, twin, range(3)) == _train(opt, model, range(3))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_hook_that_no_batched_pass_takes_goes_through_the_loop() -> None:
    engine = VMap(keeps_graph=True)
    model = _Wide()
    rows = Rows(engine=engine)
    for step in range(3):
        z = model.trunk(torch.randn(4, 64))
        if step == 2:
            z.register_hook(lambda g: g * g.norm().item())
        losses = targets([head(z) for head in model.heads])
        rows.take([(l, torch.ones(())) for l in losses], list(model.parameters()))
        assert engine.name == ("loop" if step == 2 else "vmap")


@pytest.mark.parametrize("settled", ["loop", "gramian"])
def test_what_was_not_chosen_keeps_no_memory(settled: str) -> None:
    opt, model = _made()
    _train(opt, model, range(3))
    balancer = opt._balancer
    layerwise = next(e for e in balancer.auto.engines if isinstance(e, Layerwise))
    assert balancer.rows.width is not None
    assert layerwise._buffer is not None
    balancer.auto.load_state_dict({"steps": 12, "settled": settled})
    assert _train(opt, model, range(1)) == [settled]
    assert (balancer.rows.width is None) == (settled == "gramian")
    assert (layerwise._buffer is None) == (settled == "loop")
    assert opt.diagnostics()["shared"] == 64 * 256 + 256 + 256 * 128 + 128


def test_a_trial_on_an_accelerator_waits_for_the_gramian_alone() -> None:
    with Accelerator() as device:
        torch.manual_seed(0)
        model = device.put(_Wide())
        batch = device.put(torch.randn(8, 64))
        opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), "upgrad")
        for _ in range(14):
            z = model.trunk(batch)
            losses = targets([head(z) for head in model.heads])
            opt.zero_grad()
            with device.watched() as seen:
                opt.backward(losses)
            assert len(seen.waits) == 1
        assert opt._balancer.auto.settled
