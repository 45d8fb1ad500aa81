"""The choice among engines: by rule, by clock, by neither where runs must repeat."""

from collections.abc import Iterator, Sequence

import pytest
import torch

from gradbal.jacobian.auto import MARGIN, N_TIMED, N_WARM_UP, Auto, Case, Stopwatch
from gradbal.jacobian.loop import Loop

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
