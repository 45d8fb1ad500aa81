from dataclasses import replace

import numpy as np
import pytest

from benchmarks.metrics import delta_m, delta_p
from benchmarks.reporting.selection import select
from benchmarks.reporting.summary import compare, summarise
from tests.benchmarks.reporting.records import failed, make_benchmark, metrics, record

TWO = make_benchmark("two", ("a", "b"))


def _summary(records, benchmark=TWO):
    (selection,), _ = select(records, {benchmark.name: benchmark})
    return summarise(selection)


def _curve(*validation, seconds=10.0):
    return [
        {
            "epoch": epoch,
            "seconds": seconds * epoch,
            "losses": [1.0, None],
            "validation": metrics(TWO, values),
            "weights": None,
            "conflicts": 0.5 * epoch,
            "cosine": None,
        }
        for epoch, values in enumerate(validation, start=1)
    ]


SINGLE = [record(TWO, "single_task", seed, (0.8, 0.4)) for seed in (0, 1, 2)]


def test_numbers_by_hand():
    summary = _summary([*SINGLE, *(record(TWO, "mean", seed, (0.6, 0.5)) for seed in (0, 1, 2))])
    single, mean = summary.lines
    # Task a loses 25 %, task b gains 25 %.
    assert mean.changes == {"a": pytest.approx(-25), "b": pytest.approx(25)}
    assert mean.row.delta_m.mean == pytest.approx(0)
    assert mean.interval == (pytest.approx(0), pytest.approx(0))
    assert (single.rank, mean.rank) == (1.5, 1.5)
    assert (single.changes, single.label) == ({"a": 0, "b": 0}, "single_task")
    assert mean.train_seconds == 2


def test_mean_rank_averages_ties():
    records = [
        *SINGLE,
        record(TWO, "mean", 0, (0.8, 0.3)),
        record(TWO, "mgda", 0, (0.7, 0.5)),
    ]
    # Task a: 0.8 twice, then 0.7; task b: 0.5, 0.4, 0.3.
    assert [line.rank for line in _summary(records).lines] == [1.75, 2.25, 2]


def test_lower_may_be_better():
    errors = make_benchmark("errors", ("a", "b"), "mae", higher=False)
    records = [
        *(record(errors, "single_task", seed, 1.0) for seed in (0, 1)),
        record(errors, "mean", 0, 0.5),
    ]
    single, mean = _summary(records, errors).lines
    assert (mean.rank, single.rank) == (1, 2)
    assert mean.row.delta_m.mean == pytest.approx(-50)


def test_delta_p_and_delta_m_stay_different_numbers():
    # Against the metrics module, with tasks of unlike numbers of measures.
    (first, second) = TWO.tasks
    more = replace(first.measures[0], name="loss", higher_is_better=False)
    uneven = replace(TWO, tasks=(replace(first, measures=(*first.measures, more)), second))
    tests = {
        "single_task": {"a": {"accuracy": 0.5, "loss": 2.0}, "b": {"accuracy": 0.8}},
        "mean": {"a": {"accuracy": 0.4, "loss": 1.0}, "b": {"accuracy": 0.4}},
    }
    records = [
        replace(record(TWO, method, 0, 0.5), test=test, validation=test)
        for method, test in tests.items()
    ]
    mean = _summary(records, uneven).lines[1]
    flags = [True, False, True]
    assert mean.row.delta_m.mean == pytest.approx(delta_m([0.4, 1, 0.4], [0.5, 2, 0.8], flags))
    assert mean.row.delta_p.mean == pytest.approx(
        delta_p([[0.4, 1], [0.4]], [[0.5, 2], [0.8]], [[True, False], [True]])
    )
    assert mean.changes == {"a": pytest.approx(15), "b": pytest.approx(-50)}


def test_time_to_target():
    # Single-task ends at 0.8, so 0.4 is a Δm of 50 % and 0.6 one of 25 %.
    single = [record(TWO, "single_task", seed, 0.8) for seed in (0, 1)]
    mean = [record(TWO, "mean", seed, 0.6, curve=_curve(0.2, 0.4, 0.6, 0.6)) for seed in (0, 1)]
    fast = [
        record(TWO, "mgda", 0, 0.7, curve=_curve(0.6, 0.7, seconds=3.0)),
        record(TWO, "mgda", 1, 0.7, curve=_curve(0.5, 0.7, 0.2, seconds=3.0)),
        record(TWO, "mgda", 2, 0.5, curve=_curve(0.5, 0.5)),
    ]
    never = [record(TWO, "uw", 0, 0.5, curve=_curve(0.5, 0.59))]
    summary = _summary([*single, *mean, *fast, *never])
    assert summary.target == pytest.approx(25)
    reached = {line.entry.method: line.reached for line in summary.lines}
    assert reached["mean"] == (3, 30, 2)
    assert reached["mgda"] == (1.5, 4.5, 2)
    assert reached["uw"] is None
    assert reached["single_task"] is None
    conflicts = {line.entry.method: line.conflicts for line in summary.lines}
    assert conflicts["uw"] == pytest.approx(0.75)
    assert conflicts["single_task"] is None
    assert all(line.cosine is None for line in summary.lines)


def test_without_plain_averaging_there_is_no_target():
    summary = _summary([*SINGLE, record(TWO, "mgda", 0, 0.5, curve=_curve(0.5))])
    assert summary.target is None
    assert summary.lines[1].reached is None


def test_without_a_baseline():
    summary = _summary([record(TWO, "mean", seed, (0.6, 0.5)) for seed in (0, 1)])
    (mean,) = summary.lines
    assert (mean.row.delta_m, mean.interval, mean.changes, mean.rank) == (None, None, {}, 1)
    assert compare([summary]).methods == ()


@pytest.mark.parametrize("value", [0.0, -0.1])
def test_a_baseline_that_is_not_positive_is_none(value):
    # A correlation may be negative; (M − B) / B would then have the wrong sign.
    zero = [record(TWO, "single_task", 0, (value, 0.5)), record(TWO, "mean", 0, (0.1, 0.5))]
    summary = _summary(zero)
    assert summary.baseline is None
    assert summary.lines[1].row.delta_m is None


def test_one_seed_has_no_interval():
    summary = _summary([SINGLE[0], record(TWO, "mean", 0, (0.6, 0.5))])
    assert summary.lines[1].interval is None
    assert summary.against(summary.lines[1], summary.lines[0]) is None


def test_failed_runs_are_counted_and_leave_the_numbers_alone():
    records = [
        *SINGLE,
        *(record(TWO, "mean", seed, (0.6, 0.5)) for seed in (0, 1)),
        failed(TWO, "mean", 2, "x"),
        failed(TWO, "mgda", 0, "x"),
    ]
    _, mean, mgda = _summary(records).lines
    assert (mean.row.seeds, mean.row.failed) == (2, 1)
    assert mean.row.delta_m.mean == pytest.approx(0)
    assert (mgda.row.seeds, mgda.row.failed, mgda.rank, mgda.row.delta_m) == (0, 1, None, None)


def _made(name, **delta_ms):
    """A benchmark whose methods have these Δm."""
    benchmark = make_benchmark(name, ("a",))
    levels = {"single_task": 0.0, **delta_ms}
    records = [
        record(benchmark, method, seed, 0.5 * (1 - level / 100))
        for method, level in levels.items()
        for seed in (0, 1)
    ]
    return _summary(records, benchmark)


def test_benchmarks_together_by_hand():
    overall = compare([_made("x", mean=1, mgda=5, uw=-1), _made("y", mean=-2, mgda=3, uw=-2)])
    assert overall.methods == ("single_task", "mean", "uw", "mgda")
    assert overall.ranks.tolist() == [[2, 3, 1, 4], [3, 1.5, 1.5, 4]]
    assert overall.mean_ranks == (2.5, 2.25, 1.25, 4)
    assert overall.rank("mgda") == 4
    assert overall.rank("pcgrad") is None


def test_one_benchmark_has_ranks_and_no_test():
    overall = compare([_made("x", mean=1)])
    assert overall.mean_ranks == (1, 2)
    assert (overall.friedman, overall.difference) == (None, None)


def test_who_is_not_everywhere_is_left_out_and_named():
    full = {"mean": 1, "mgda": 2, "uw": 3}
    overall = compare([_made("x", **full), _made("y", mean=1, mgda=2), _made("z", mean=1)])
    assert overall.methods == ("single_task", "mean")
    assert overall.left_out == {"mgda": ("z",), "uw": ("y", "z")}
    # Two of five or more: it has just begun.
    overall = compare([_made("x", **full, rlw=4), _made("z", mean=1)])
    assert overall.benchmarks == ("x",)
    assert overall.benchmarks_left_out == ("z",)


def test_no_benchmark():
    overall = compare([])
    assert (overall.methods, overall.mean_ranks) == ((), ())
    assert np.size(overall.ranks) == 0
