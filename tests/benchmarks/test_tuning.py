import math
from dataclasses import asdict, replace

import pytest

from benchmarks.benchmark import SINGLE_TASK, UNITARY
from benchmarks.plan import Plan, Schedule
from benchmarks.results import Record, Run, Trial
from benchmarks.tuning import Tuning, chosen_trials, score
from tests.benchmarks.conftest import TINY

SETTINGS = TINY.presets["default"].settings  # lr 0.01
PLAN = Plan(TINY, TINY.presets["default"], ("sum", "mgda"), 3, tuning=Tuning((0.5, 1, 2)))
LOW, MIDDLE, HIGH = (Trial(rate, 0.0, 0.0) for rate in (0.005, 0.01, 0.02))


def _record(method, trial=MIDDLE, seed=0, accuracy=0.5, mse=1.0, error=None, test=0.5):
    return Record(
        benchmark="tiny",
        method=method,
        architecture="linear",
        seed=seed,
        fingerprint=PLAN.fingerprint,
        error=error,
        test={} if error else {"class": {"accuracy": test}, "size": {"mse": test}},
        validation={} if error else {"class": {"accuracy": accuracy}, "size": {"mse": mse}},
        aggregator="",
        step_time=None,
        train_seconds=0.0,
        settings=asdict(trial.within(SETTINGS)),
        versions={},
    )


def test_the_grid_is_around_the_benchmarks_rate():
    assert PLAN.tuning.grid(SETTINGS) == [LOW, MIDDLE, HIGH]
    rates = [trial.lr for trial in Tuning((1 / 3, 1)).grid(replace(SETTINGS, lr=0.002))]
    assert rates == [0.0006667, 0.002]
    other = PLAN.tuning.regularised(HIGH)
    assert other == [
        Trial(0.02, 0.0, 0.2),
        Trial(0.02, 1e-4, 0.0),
        Trial(0.02, 1e-4, 0.2),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_factors": ()}, "`lr_factors` must be one or more numbers, each positive, found none"),
        ({"lr_factors": (1.0, 0.0)}, r"each positive, found 1.0, 0.0"),
        ({"weight_decays": (math.nan,)}, "`weight_decays` must .* at least 0, found nan"),
        ({"dropouts": (1.0,)}, r"`dropouts` must .* in \[0, 1\), found 1.0"),
    ],
)
def test_bad_trials(changes, message):
    with pytest.raises(ValueError, match=message):
        Tuning(**changes)


def test_the_score_by_hand():
    reference = {"class": {"accuracy": 0.5}, "size": {"mse": 2.0}}
    # 10 % better in one, 50 % worse in the other.
    found = score(TINY, {"class": {"accuracy": 0.55}, "size": {"mse": 3.0}}, reference)
    assert found == pytest.approx(20.0)
    without = {"class": {"accuracy": 0.0}, "size": {"mse": 2.0}}
    assert score(TINY, {"class": {"accuracy": 0.1}, "size": {"mse": 1.0}}, without) == -50
    below = {"class": {"accuracy": -0.1}, "size": {"mse": 2.0}}
    assert score(TINY, {"class": {"accuracy": 0.1}, "size": {"mse": 1.0}}, below) == -50
    assert score(TINY, {"class": {"accuracy": math.nan}, "size": {"mse": 1.0}}, reference) == (
        math.inf
    )


def test_the_choice_is_by_validation_of_the_lowest_seed():
    records = [
        _record(SINGLE_TASK, LOW, mse=0.5),
        _record(SINGLE_TASK, MIDDLE, mse=1.0),
        _record(SINGLE_TASK, HIGH, mse=3.0),
        _record("sum", LOW, accuracy=0.6, mse=1.1, test=0.9),  # 20 % better, 10 % worse
        _record("sum", MIDDLE, accuracy=0.5, mse=0.95, test=0.1),
        _record("sum", HIGH, error="ValueError: x"),
        _record("sum", HIGH, seed=1, accuracy=1.0, mse=0.1),
    ]
    chosen = chosen_trials(TINY, records)
    assert chosen == {(SINGLE_TASK, "linear"): LOW, ("sum", "linear"): LOW}
    # Whatever the numbers on the test set are, the choice is the same.
    other = [
        replace(r, test={"class": {"accuracy": n}, "size": {"mse": -n}})
        for n, r in enumerate(records)
    ]
    assert chosen_trials(TINY, other) == chosen


def test_without_a_reference_the_first_trial_is_taken():
    records = [_record("sum", HIGH), _record("sum", LOW, mse=0.1)]
    assert chosen_trials(TINY, records) == {("sum", "linear"): HIGH}


def _run_all(plan, outcome, records=()):
    """Runs in the order in which a schedule gives them, each settled before the next."""
    schedule = Schedule([plan], records)
    order, made = [], []
    while (found := schedule.next()) is not None:
        number, run = found
        assert number == 0
        assert schedule.done(0, (run.method, run.architecture)) + 1 <= plan.runs_of(
            (run.method, run.architecture)
        )
        order.append(run)
        record = outcome(run)
        made.append(record)
        schedule.settle(0, record)
    assert schedule.left == []
    return order, made


def _good(run):
    # The higher the rate the better, but for mgda; decay helps, dropout harms.
    better = run.trial.lr if run.method != "mgda" else -run.trial.lr
    better += 10 * run.trial.weight_decay - run.trial.dropout
    return _record(run.method, run.trial, run.seed, mse=1 - better)


def test_a_tuned_plan_from_first_to_last():
    order, made = _run_all(PLAN, _good)
    assert len(order) == len(set(order)) == PLAN.size == 3 * (3 + 2) + (3 + 3 + 2)
    best = {SINGLE_TASK: HIGH, "sum": HIGH, "mgda": LOW, UNITARY: Trial(0.02, 1e-4, 0.0)}
    for method, trial in best.items():
        later = [run for run in order if run.method == method and run.seed > 0]
        assert later == [Run(method, seed, "linear", trial) for seed in (1, 2)]
    table = PLAN.select(made)
    assert {(run.method, run.seed) for run in table} == {(m, s) for m in best for s in range(3)}
    assert all(run.trial == best[run.method] for run in table)


def test_what_is_there_is_not_run_again():
    whole, made = _run_all(PLAN, _good)
    for kept in (0, 1, 7, 11, 16, len(made)):
        order, _ = _run_all(PLAN, _good, made[:kept])
        assert set(order) == set(whole[kept:])


def test_a_failed_trial_is_not_chosen_and_tried_again_by_the_next_command():
    def outcome(run):
        fails = run.method == "sum" and run.trial == HIGH
        return _record("sum", HIGH, run.seed, error="OverflowError: x") if fails else _good(run)

    order, made = _run_all(PLAN, outcome)
    assert [run.trial for run in order if run.method == "sum"] == [
        LOW,
        MIDDLE,
        HIGH,
        MIDDLE,
        MIDDLE,
    ]
    again, _ = _run_all(PLAN, outcome, made)
    assert again == [Run("sum", 0, "linear", HIGH)]
    # If it is better than the others then, the other seeds follow it.
    again, _ = _run_all(PLAN, _good, made)
    assert again == [Run("sum", seed, "linear", HIGH) for seed in range(3)]


def test_a_method_that_always_fails_is_in_the_table():
    def outcome(run):
        return replace(_good(run), error="ValueError: x") if run.method == "sum" else _good(run)

    order, made = _run_all(PLAN, outcome)
    assert len(order) == PLAN.size
    failed = [run for run in PLAN.select(made) if run.method == "sum"]
    assert [run.trial for run in failed] == [LOW, MIDDLE, HIGH, MIDDLE, MIDDLE]


def test_nothing_is_given_twice_and_waiting_ends():
    schedule = Schedule([PLAN, replace(PLAN, seeds=1, tuning=None)], [])
    given = []
    while (found := schedule.next()) is not None:
        given.append(found)
    # The trials of the four methods, and all of the second plan, which waits for nothing.
    assert [number for number, _ in given] == [0] * 12 + [1] * 3
    assert len(set(given)) == 15
    for number, run in given:
        schedule.settle(number, _good(run))
    number, run = schedule.next()
    assert (number, run.method, run.trial.dropout) == (0, UNITARY, 0.2)


def test_without_tuning_other_trials_are_left_aside():
    plain = replace(PLAN, tuning=None)
    records = [_record("sum", HIGH), _record("sum", MIDDLE), _record("sum", LOW, seed=1)]
    assert list(plain.select(records)) == [Run("sum", 0, "linear", MIDDLE)]
